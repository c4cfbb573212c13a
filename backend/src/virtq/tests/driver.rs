//! A driver's side of a split queue, over the file of the guest's memory: what a guest would do, and what it should not.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::super::{QueueConfig, SplitQueue};
use crate::memory::GuestMemory;
use crate::memory::testing::{USER_BASE, guest};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Bytes of guest memory.
pub const MEM_SIZE: u64 = 0x10_0000;
pub const DESC: u64 = 0x1_0000;
pub const AVAIL: u64 = 0x2_0000;
pub const USED: u64 = 0x3_0000;

/// A descriptor: address, length, flags, next.
pub type Raw = (u64, u32, u16, u16);

pub struct Driver {
    /// Added to [`DESC`], [`AVAIL`] and [`USED`]: several rings may share a memory.
    pub origin: u64,
    pub mem: GuestMemory,
    pub file: File,
    pub config: QueueConfig,
}

impl Driver {
    pub fn new(size: u16) -> Self {
        let (mem, file) = guest(MEM_SIZE);
        Self::sharing(mem, file, 0, size)
    }

    /// A ring at `origin` in memory that exists.
    pub fn sharing(mem: GuestMemory, file: File, origin: u64, size: u16) -> Self {
        let config = QueueConfig {
            packed: false,
            in_order: false,
            transmit: false,
            size,
            base: 0,
            desc_user: USER_BASE + origin + DESC,
            avail_user: USER_BASE + origin + AVAIL,
            used_user: USER_BASE + origin + USED,
            log_used: None,
            event_idx: false,
            indirect: true,
        };
        Self { origin, mem, file, config }
    }

    /// As if the ring had been in use up to `base`.
    pub fn starting_at(size: u16, base: u16) -> Self {
        let mut driver = Self::new(size);
        driver.config.base = base.into();
        driver.set_avail_idx(base);
        driver.put16(driver.origin + USED + 2, base);
        driver
    }

    pub fn with_event_idx(mut self) -> Self {
        self.config.event_idx = true;
        self
    }

    pub fn queue(&self) -> SplitQueue {
        SplitQueue::new(&self.mem, &self.config).unwrap()
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap();
    }

    pub fn put16(&self, at: u64, value: u16) {
        self.put(at, &value.to_le_bytes());
    }

    pub fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    pub fn get16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.get(at))
    }

    /// Writes descriptor `index` of the table at `table`.
    pub fn descriptor(&self, table: u64, index: u16, (addr, len, flags, next): Raw) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(table + 16 * u64::from(index), &bytes);
    }

    /// Makes `head` available.
    pub fn offer(&self, head: u16) {
        let idx = self.avail_idx();
        self.put16(self.origin + AVAIL + 4 + 2 * u64::from(idx % self.config.size), head);
        self.set_avail_idx(idx.wrapping_add(1));
    }

    /// One descriptor at `head`, available.
    pub fn offer_one(&self, head: u16, addr: u64, len: u32, flags: u16) {
        self.descriptor(self.origin + DESC, head, (addr, len, flags, 0));
        self.offer(head);
    }

    /// A chain of descriptors from `head` on, available: address, length, flags but NEXT.
    pub fn offer_chain(&self, head: u16, parts: &[(u64, u32, u16)]) {
        for (i, (addr, len, flags)) in (head..).zip(parts) {
            let next = if usize::from(i - head) + 1 < parts.len() { NEXT } else { 0 };
            self.descriptor(self.origin + DESC, i, (*addr, *len, flags | next, i + 1));
        }
        self.offer(head);
    }

    pub fn avail_idx(&self) -> u16 {
        self.get16(self.origin + AVAIL + 2)
    }

    pub fn set_avail_idx(&self, idx: u16) {
        self.put16(self.origin + AVAIL + 2, idx);
    }

    pub fn set_avail_flags(&self, flags: u16) {
        self.put16(self.origin + AVAIL, flags);
    }

    pub fn set_used_event(&self, event: u16) {
        self.put16(self.origin + AVAIL + 4 + 2 * u64::from(self.config.size), event);
    }

    pub fn avail_event(&self) -> u16 {
        self.get16(self.origin + USED + 4 + 8 * u64::from(self.config.size))
    }

    pub fn used_flags(&self) -> u16 {
        self.get16(self.origin + USED)
    }

    pub fn used_idx(&self) -> u16 {
        self.get16(self.origin + USED + 2)
    }

    /// The used element at free-running index `index`: head and length.
    pub fn used(&self, index: u16) -> (u32, u32) {
        let at = self.origin + USED + 4 + 8 * u64::from(index % self.config.size);
        (u32::from_le_bytes(self.get(at)), u32::from_le_bytes(self.get(at + 4)))
    }
}
