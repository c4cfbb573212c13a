//! The driver's side of one packed virtqueue (VIRTIO 1.3 §2.8), over the places of a [`Ring`]: one descriptor per frame unless
//! told otherwise, ids that are slots, always a kick. Every field can also be written by hand, which is what hostile tests do.
#![forbid(unsafe_code)]

use super::ring::{Desc, Memory, Ring, desc_flag};
use super::{Front, PATIENCE, eventually, test_frame};
use anyhow::{Context, Result, ensure};
use std::io;
use std::time::Duration;

/// Descriptor flag: equal to the driver's wrap counter in an available descriptor.
pub const AVAIL: u16 = 1 << 7;
/// Descriptor flag: unequal to it there, equal in a used descriptor.
pub const USED: u16 = 1 << 15;

/// A place in the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Below the ring's size.
    pub slot: u16,
    /// The wrap counter there.
    pub wrap: bool,
}

impl Place {
    /// Where a new ring begins.
    pub const START: Self = Self { slot: 0, wrap: true };

    /// As both halves of a base (vhost-user: Vring descriptor indices for packed virtqueues).
    pub fn base(self) -> u32 {
        let half = u32::from(self.slot) | u32::from(self.wrap) << 15;
        half | half << 16
    }

    /// The flags of a descriptor that is available here.
    pub fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    fn forth(self, count: u16, size: u16) -> Self {
        let slot = self.slot + count;
        if slot >= size { Self { slot: slot - size, wrap: !self.wrap } } else { Self { slot, ..self } }
    }
}

/// What the driver knows of a ring. The ring itself lends its memory, its places and its eventfds.
#[derive(Clone, Debug)]
pub struct PackedRing {
    /// Entries.
    pub size: u16,
    /// Next to be made available.
    pub next: Place,
    /// Next to be used by the device.
    pub used: Place,
    /// Descriptors of each chain that is out, by its first slot.
    counts: Vec<u16>,
    memory: Memory,
}

impl PackedRing {
    /// A driver that begins at a place of the ring, which then looks as if it had been used up to there.
    pub fn new(front: &Front, index: usize, at: Place) -> io::Result<Self> {
        let (ring, memory) = (&front.rings[index], front.memory.clone());
        for slot in 0..ring.size {
            let wrap = at.wrap == (slot < at.slot);
            let flags = if wrap { AVAIL | USED } else { 0 };
            let it = Desc { flags: 0, next: flags, ..Desc::default() };
            memory.write(ring.desc + 16 * u64::from(slot), &it.bytes())?;
        }
        memory.write(ring.avail, &[0; 4])?;
        memory.write(ring.used, &[0; 4])?;
        Ok(Self { size: ring.size, next: at, used: at, counts: vec![1; ring.size.into()], memory })
    }

    /// Writes a descriptor as it is: address, length, id, flags.
    pub fn write(
        &self,
        ring: &Ring,
        slot: u16,
        (addr, len, id, flags): (u64, u32, u16, u16),
    ) -> io::Result<()> {
        // The two halves of the last word have other names in split rings.
        let it = Desc { addr, len, flags: id, next: flags };
        self.memory.write(ring.desc + 16 * u64::from(slot % self.size), &it.bytes())
    }

    /// Makes a chain of parts (address, length, flags but those of availability and NEXT) available.
    pub fn offer(&mut self, ring: &Ring, parts: &[(u64, u32, u16)]) -> io::Result<()> {
        let head = self.next;
        for (i, (addr, len, flags)) in parts.iter().enumerate().rev() {
            let at = head.forth(i as u16, self.size);
            let more = if i + 1 < parts.len() { desc_flag::NEXT } else { 0 };
            self.write(ring, at.slot, (*addr, *len, head.slot, flags | more | at.available()))?;
        }
        self.counts[usize::from(head.slot)] = parts.len() as u16;
        self.next = head.forth(parts.len() as u16, self.size);
        Ok(())
    }

    /// Queues a frame behind a header of zeros, in one descriptor. No kick.
    pub fn queue_frame(&mut self, ring: &Ring, frame: &[u8]) -> io::Result<()> {
        let slot = self.next.slot;
        let mut bytes = vec![0; Front::HEADER_LEN];
        bytes.extend_from_slice(frame);
        self.memory.write(ring.buffer(slot), &bytes)?;
        self.offer(ring, &[(ring.buffer_guest(slot), bytes.len() as u32, 0)])
    }

    /// Gives the device an empty buffer. No kick.
    pub fn queue_buffer(&mut self, ring: &Ring) -> io::Result<()> {
        let len = Ring::BUFFER_LEN as u32;
        self.offer(ring, &[(ring.buffer_guest(self.next.slot), len, desc_flag::WRITE)])
    }

    /// What the device has used since the last look: id and length.
    pub fn take_used(&mut self, ring: &Ring) -> io::Result<Vec<(u16, u32)>> {
        let mut taken = Vec::new();
        while self.used != self.next {
            let bytes = self.memory.read(ring.desc + 16 * u64::from(self.used.slot) + 8, 8)?;
            let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
            let expected = if self.used.wrap { AVAIL | USED } else { 0 };
            if half(6) & (AVAIL | USED) != expected {
                break;
            }
            taken.push((half(4), u32::from(half(0)) | u32::from(half(2)) << 16));
            self.used = self.used.forth(self.counts[usize::from(self.used.slot)], self.size);
        }
        Ok(taken)
    }

    /// Waits until the device has used all that was made available.
    pub fn is_drained_within(&mut self, ring: &Ring, patience: Duration) -> bool {
        eventually(patience, || self.take_used(ring).is_ok() && self.used == self.next)
    }

    /// Sends `count` frames and waits for each batch to be used.
    pub fn prove_alive(&mut self, ring: &Ring, count: u32) -> Result<()> {
        let mut left = count;
        while left > 0 {
            let batch = left.min(u32::from(self.size / 2)).max(1);
            for _ in 0..batch {
                self.queue_frame(ring, &test_frame())?;
            }
            ring.kick().context("kick")?;
            ensure!(
                self.is_drained_within(ring, PATIENCE),
                "TX stands still at {:?} of {:?}",
                self.used,
                self.next
            );
            left -= batch;
        }
        Ok(())
    }
}
