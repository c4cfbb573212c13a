//! Guest memory as a file, and the driver's side of one split virtqueue in it (VIRTIO 1.3 §2.7).
//!
//! The driver is as simple as can be: one descriptor per frame, no EVENT_IDX, always a kick. Every field can also be
//! written by hand, which is what hostile tests do.
#![forbid(unsafe_code)]

use super::eventually;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

/// Descriptor flags (VIRTIO 1.3 §2.7.5).
#[expect(missing_docs, reason = "the specification's own names")]
pub mod desc_flag {
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
}

/// Guest memory: one region, backed by a file, at guest address 0 unless told otherwise.
#[derive(Clone, Debug)]
pub struct Memory {
    file: Arc<File>,
    /// Length in bytes.
    pub size: u64,
    /// Where the guest sees it.
    pub guest: u64,
    /// Where the front-end says that it has mapped it.
    pub user: u64,
}

impl Memory {
    /// A new memfd.
    pub fn memfd(size: u64) -> io::Result<Self> {
        let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(size)?;
        Ok(Self::of_file(file, size))
    }

    /// Any file.
    pub fn of_file(file: File, size: u64) -> Self {
        Self { file: Arc::new(file), size, guest: 0, user: 0x7f00_0000_0000 }
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The file's fd, to be sent.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The region as SET_MEM_TABLE and ADD_MEM_REG have it.
    pub fn region(&self) -> [u64; 4] {
        [self.guest, self.size, self.user, 0]
    }

    /// Writes bytes at an offset.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Reads bytes at an offset.
    pub fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    fn read_u16(&self, offset: u64) -> io::Result<u16> {
        let bytes = self.read(offset, 2)?;
        Ok(u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    fn read_u32(&self, offset: u64) -> io::Result<u32> {
        let bytes = self.read(offset, 4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }
}

/// One entry of a descriptor table.
#[derive(Clone, Copy, Debug, Default)]
pub struct Desc {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// See [`desc_flag`].
    pub flags: u16,
    /// Next descriptor, with [`desc_flag::NEXT`].
    pub next: u16,
}

impl Desc {
    /// As it is in memory.
    pub fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// The driver's side of one ring, with its three eventfds.
#[derive(Debug)]
pub struct Ring {
    memory: Memory,
    /// Number of entries.
    pub size: u16,
    /// Descriptor table, offset in memory.
    pub desc: u64,
    /// Available ring, offset in memory.
    pub avail: u64,
    /// Used ring, offset in memory.
    pub used: u64,
    /// Where buffers can lie: [`Self::BUFFER_LEN`] bytes for each descriptor.
    pub buffers: u64,
    /// The driver's next avail.idx.
    pub avail_idx: u16,
    /// How far the driver has looked at the used ring.
    pub seen: u16,
    /// Driver to device.
    pub kick: EventFd,
    /// Device to driver.
    pub call: EventFd,
    /// Errors.
    pub err: EventFd,
}

impl Ring {
    /// Room for each descriptor's buffer, in bytes.
    pub const BUFFER_LEN: u64 = 4096;

    /// Bytes of memory that a ring of this size takes, buffers included.
    pub fn footprint(size: u16) -> u64 {
        let rings = 16 * u64::from(size) + (6 + 2 * u64::from(size)) + (6 + 8 * u64::from(size));
        (rings + 128).next_multiple_of(4096) + u64::from(size) * Self::BUFFER_LEN
    }

    /// Lays out a ring at an offset in memory.
    pub fn new(memory: &Memory, offset: u64, size: u16) -> io::Result<Self> {
        let n = u64::from(size);
        let avail = offset + 16 * n;
        let used = (avail + 6 + 2 * n).next_multiple_of(64);
        let event = || EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        Ok(Self {
            memory: memory.clone(),
            size,
            desc: offset,
            avail,
            used,
            buffers: (used + 6 + 8 * n).next_multiple_of(4096),
            avail_idx: 0,
            seen: 0,
            kick: event()?,
            call: event()?,
            err: event()?,
        })
    }

    /// Offset of a descriptor's buffer.
    pub fn buffer(&self, index: u16) -> u64 {
        self.buffers + u64::from(index % self.size) * Self::BUFFER_LEN
    }

    /// Guest address of a descriptor's buffer.
    pub fn buffer_guest(&self, index: u16) -> u64 {
        self.memory.guest + self.buffer(index)
    }

    /// Writes one descriptor.
    pub fn set_desc(&self, index: u16, desc: Desc) -> io::Result<()> {
        self.memory.write(self.desc + 16 * u64::from(index), &desc.bytes())
    }

    /// Writes a chain's head into the available ring and publishes it. The head may be any number.
    pub fn push(&mut self, head: u16) -> io::Result<()> {
        let slot = u64::from(self.avail_idx % self.size);
        self.memory.write(self.avail + 4 + 2 * slot, &head.to_le_bytes())?;
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.publish(self.avail_idx)
    }

    /// Writes any avail.idx.
    pub fn publish(&self, index: u16) -> io::Result<()> {
        self.memory.write(self.avail + 2, &index.to_le_bytes())
    }

    /// Notifies the device.
    pub fn kick(&self) -> io::Result<()> {
        nix::unistd::write(self.kick.as_fd(), &1u64.to_ne_bytes())?;
        Ok(())
    }

    /// The device's used.idx.
    pub fn used_idx(&self) -> io::Result<u16> {
        self.memory.read_u16(self.used + 2)
    }

    /// Entries of the used ring that the driver has not seen yet, as (head, bytes written).
    pub fn take_used(&mut self) -> io::Result<Vec<(u32, u32)>> {
        let end = self.used_idx()?;
        let mut entries = Vec::new();
        while self.seen != end {
            let at = self.used + 4 + 8 * u64::from(self.seen % self.size);
            entries.push((self.memory.read_u32(at)?, self.memory.read_u32(at + 4)?));
            self.seen = self.seen.wrapping_add(1);
        }
        Ok(entries)
    }

    /// Waits until the device has used everything that was published.
    pub fn is_drained_within(&self, patience: Duration) -> bool {
        eventually(patience, || self.used_idx().is_ok_and(|used| used == self.avail_idx))
    }

    /// How often the device has signalled an error since the last look.
    pub fn errors(&self) -> u64 {
        self.err.read().unwrap_or(0)
    }

    /// Queues one frame behind a zero header of `header` bytes, in one descriptor. No kick.
    pub fn queue_frame(&mut self, header: usize, frame: &[u8]) -> io::Result<()> {
        let mut bytes = vec![0; header];
        bytes.extend_from_slice(frame);
        self.queue_bytes(&bytes)
    }

    /// Queues header and frame as they are, in one descriptor. No kick.
    pub fn queue_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        let head = self.avail_idx % self.size;
        self.memory.write(self.buffer(head), bytes)?;
        let desc = Desc { addr: self.buffer_guest(head), len: bytes.len() as u32, ..Desc::default() };
        self.set_desc(head, desc)?;
        self.push(head)
    }

    /// Gives the device one empty buffer to receive into. No kick.
    pub fn queue_buffer(&mut self) -> io::Result<()> {
        let head = self.avail_idx % self.size;
        let len = Self::BUFFER_LEN as u32;
        self.set_desc(
            head,
            Desc { addr: self.buffer_guest(head), len, flags: desc_flag::WRITE, ..Desc::default() },
        )?;
        self.push(head)
    }

    /// What the device has received into buffers of [`Self::queue_buffer`], headers included.
    pub fn take_received(&mut self) -> io::Result<Vec<Vec<u8>>> {
        let used = self.take_used()?;
        used.into_iter()
            .map(|(head, len)| self.memory.read(self.buffer(head as u16), (len as usize).min(4096)))
            .collect()
    }
}
