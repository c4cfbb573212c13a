//! One descriptor chain of either format: what the guest gave us to read, then what it gave us to write (VIRTIO 1.3 §2.7.4,
//! §2.7.5, §2.8.5 to §2.8.7).
//!
//! Stricter than some: a descriptor of zero bytes is an error, as in QEMU, which then breaks the device. No driver
//! sends one, and later code need not think of empty buffers.
#![forbid(unsafe_code)]

use virtio_queue::desc::split::Descriptor;

use super::queue::QueueConfig;
use crate::memory::packed_ring::{self, Entry, PackedAccess, Word};
use crate::memory::ring::{DESC_SIZE, RingAccess};
use crate::memory::{AccessError, GuestMemory, MissingRange};

/// Descriptors of one chain; QEMU's limit as well (VIRTQUEUE_MAX_SIZE).
pub const MAX_CHAIN: usize = 1024;

/// Longest indirect table, bytes.
const INDIRECT_LEN_MAX: u32 = u16::MAX as u32 * DESC_SIZE;

/// A piece of guest memory as a descriptor names it. Not checked against the memory table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Bytes; never 0.
    pub len: u32,
}

impl Segment {
    /// Appends segments that were stored field by field a moment ago, in the same way: a load that is wider than the store
    /// it meets waits until all stores before that are done, to guest memory too.
    #[inline]
    pub fn append(to: &mut Vec<Self>, from: &[Self]) {
        for segment in from {
            to.push(Self { gpa: segment.gpa, len: segment.len });
        }
    }
}

/// What is wrong with a chain. The guest's fault; the chain is given back unused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// `next` leads out of the table (the indirect one, if the chain is in one).
    #[error("descriptor {0} is outside the table")]
    NextOutOfRange(u16),
    /// More descriptors than the table has: it is a loop.
    #[error("the chain is a loop")]
    Loop,
    /// More than [`MAX_CHAIN`] descriptors.
    #[error("the chain has more than 1024 descriptors")]
    TooLong,
    /// More than 4 GiB in total (§2.7.5.2).
    #[error("the chain is longer than 4 GiB")]
    TooManyBytes,
    /// A descriptor without bytes.
    #[error("a descriptor has length 0")]
    ZeroLength,
    /// A device-readable descriptor after a device-writable one (§2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    ReadableAfterWritable,
    /// An indirect table although the feature was not negotiated (§2.7.5.3.1).
    #[error("an indirect descriptor without VIRTIO_F_INDIRECT_DESC")]
    IndirectNotNegotiated,
    /// An indirect descriptor within an indirect table (§2.7.5.3.1).
    #[error("an indirect table within an indirect table")]
    NestedIndirect,
    /// Flags INDIRECT and NEXT together (§2.7.5.3.1).
    #[error("an indirect descriptor with a next one")]
    IndirectWithNext,
    /// The length of an indirect table is 0, not a multiple of 16, or more than an index can reach.
    #[error("an indirect table of {0} bytes")]
    IndirectLength(u32),
    /// An indirect table that is not guest memory.
    #[error("an indirect table outside guest memory")]
    IndirectOutOfRange,
}

/// Why a chain was not taken apart.
pub(super) enum WalkError {
    Bad(ChainError),
    Missing(MissingRange),
}

/// The same for a packed ring.
pub(super) enum PackedWalkError {
    /// It has so many descriptors.
    Bad(u32, ChainError),
    Missing(MissingRange),
    /// It runs into descriptors that are still taken: the ring cannot be trusted.
    Overrun,
}

impl From<ChainError> for WalkError {
    #[inline]
    fn from(why: ChainError) -> Self {
        Self::Bad(why)
    }
}

/// A chain taken from a queue. Reusable, without allocation; 16 KiB, most of which is never touched.
/// The size is not a power of two, so that the first lines of chains in an array do not compete for the same cache sets.
/// The counts stand beside the first segments, so that a short chain takes one or two lines.
#[derive(Clone)]
#[repr(C)]
pub struct Chain {
    tally: Tally,
    head: u16,
    segments: [Segment; MAX_CHAIN],
}

/// What a chain adds up to; kept in registers while it is taken apart.
#[derive(Clone, Copy, Default)]
struct Tally {
    readable_len: u64,
    writable_len: u64,
    /// Segments to read; the first ones.
    readable: u32,
    /// Segments.
    count: u32,
}

impl Tally {
    /// §2.7.5.2, §2.8.5: a chain of more is refused.
    #[inline(always)]
    fn check(self) -> Result<(), ChainError> {
        match self.readable_len + self.writable_len > u64::from(u32::MAX) {
            true => Err(ChainError::TooManyBytes),
            false => Ok(()),
        }
    }
}

/// The slot behind `slot` and what is in it, for a chain of `count` descriptors so far.
#[inline(always)]
fn next_slot(
    ring: PackedAccess<'_>,
    slot: u32,
    count: u32,
    room: u32,
) -> Result<(u32, Word), PackedWalkError> {
    if count >= room {
        return Err(PackedWalkError::Overrun);
    }
    let slot = if slot + 1 == ring.size() { 0 } else { slot + 1 };
    Ok((slot, ring.word(slot)))
}

/// Descriptors of the packed ring's chain at `slot`, whose first is `word`; `room` at most.
#[inline]
pub(super) fn packed_len(ring: PackedAccess<'_>, mut slot: u32, mut word: Word, room: u32) -> u32 {
    let mut count = 1;
    while word.has(packed_ring::NEXT) {
        match next_slot(ring, slot, count, room) {
            Ok(next) => (slot, word) = next,
            Err(_) => return room,
        }
        count += 1;
    }
    count
}

impl Default for Chain {
    fn default() -> Self {
        Self::new()
    }
}

impl Chain {
    /// An empty chain.
    pub fn new() -> Self {
        Self { tally: Tally::default(), head: 0, segments: [Segment::default(); MAX_CHAIN] }
    }

    /// By what the chain is given back: index of the first descriptor, or buffer id in a packed ring.
    #[inline]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the guest wrote for us.
    #[inline]
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.tally.readable as usize]
    }

    /// Where we may write.
    #[inline]
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.tally.readable as usize..self.tally.count as usize]
    }

    /// Bytes of [`Self::readable`]; at most 4 GiB - 1, with the writable ones.
    #[inline]
    pub fn readable_len(&self) -> u64 {
        self.tally.readable_len
    }

    /// Bytes of [`Self::writable`].
    #[inline]
    pub fn writable_len(&self) -> u64 {
        self.tally.writable_len
    }

    /// Takes the chain at `head` apart. `first` is its first descriptor, read by the caller. On an error the chain is
    /// empty.
    #[inline(always)]
    pub(super) fn walk(
        &mut self,
        ring: RingAccess<'_>,
        mem: &GuestMemory,
        indirect: bool,
        head: u16,
        first: Descriptor,
    ) -> Result<(), WalkError> {
        self.head = head;
        let mut tally = Tally::default();
        let mut descriptor = first;
        let mut left = ring.size();
        let result = loop {
            if descriptor.refers_to_indirect_table() {
                let (all, result) = self.walk_indirect(tally, mem, indirect, descriptor);
                tally = all;
                break result;
            }
            if let Err(why) = self.add_split(&mut tally, descriptor) {
                break Err(why.into());
            }
            if !descriptor.has_next() {
                break Ok(());
            }
            left -= 1;
            if left == 0 {
                break Err(ChainError::Loop.into());
            }
            let next = descriptor.next();
            match ring.descriptor(next) {
                Some(next) => descriptor = next,
                None => break Err(ChainError::NextOutOfRange(next).into()),
            }
        };
        let result = result.and_then(|()| Ok(tally.check()?));
        if result.is_err() {
            tally = Tally::default();
        }
        self.tally = tally;
        result
    }

    /// Takes a packed ring's chain at `slot` apart. `first` is what its first descriptor has beside the address, read by the caller.
    /// Returns how many descriptors it has, `room` at most. On an error the chain is empty, but has its id if it is bad.
    #[inline(always)]
    pub(super) fn walk_packed(
        &mut self,
        ring: PackedAccess<'_>,
        mem: &GuestMemory,
        config: &QueueConfig,
        mut slot: u32,
        first: Word,
        room: u32,
    ) -> Result<u32, PackedWalkError> {
        let mut tally = Tally::default();
        let mut word = first;
        let mut count = 1;
        let result = loop {
            if word.has(packed_ring::INDIRECT) {
                let alone = count == 1;
                match self.walk_packed_table(tally, mem, config, alone, (ring.addr(slot), word)) {
                    (_, Err(WalkError::Missing(missing))) => return Err(PackedWalkError::Missing(missing)),
                    (_, Err(WalkError::Bad(why))) => break Err(why),
                    (all, Ok(())) => tally = all,
                }
                break Ok(());
            }
            let segment = Segment { gpa: ring.addr(slot), len: word.bytes() };
            if let Err(why) = self.add(&mut tally, segment, word.has(packed_ring::WRITE)) {
                break Err(why);
            }
            if !word.has(packed_ring::NEXT) {
                break Ok(());
            }
            (slot, word) = next_slot(ring, slot, count, room)?;
            count += 1;
        };
        // What is wrong with a chain does not end it: its id is in the last descriptor (§2.8.6).
        while word.has(packed_ring::NEXT) {
            (slot, word) = next_slot(ring, slot, count, room)?;
            count += 1;
        }
        self.head = word.id();
        match result.and_then(|()| tally.check()) {
            Ok(()) => {
                self.tally = tally;
                Ok(count)
            }
            Err(why) => {
                self.tally = Tally::default();
                Err(PackedWalkError::Bad(count, why))
            }
        }
    }

    /// The chain is in the table that is named, and `alone` if no descriptor came before. By value, as in [`Self::walk_indirect`].
    #[inline]
    fn walk_packed_table(
        &mut self,
        mut tally: Tally,
        mem: &GuestMemory,
        config: &QueueConfig,
        alone: bool,
        named: Entry,
    ) -> (Tally, Result<(), WalkError>) {
        let result = self.add_packed_table(&mut tally, mem, config, alone, named);
        (tally, result)
    }

    /// All entries, one after the other; of their flags only WRITE means something (§2.8.7).
    /// In a transmit ring not even that: DPDK's driver (up to 26.11 at least) sets it for the header that it sends, and sometimes for
    /// a piece of the frame.
    #[inline(always)]
    fn add_packed_table(
        &mut self,
        tally: &mut Tally,
        mem: &GuestMemory,
        config: &QueueConfig,
        alone: bool,
        named: Entry,
    ) -> Result<(), WalkError> {
        let (gpa, word) = named;
        if !config.indirect {
            return Err(ChainError::IndirectNotNegotiated.into());
        }
        // A list has descriptors of one kind only (§2.8.5).
        if word.has(packed_ring::NEXT) || !alone {
            return Err(ChainError::IndirectWithNext.into());
        }
        let len = word.bytes();
        if len == 0 || !len.is_multiple_of(DESC_SIZE) || len > INDIRECT_LEN_MAX {
            return Err(ChainError::IndirectLength(len).into());
        }
        let table = mem.packed_table(gpa, len / DESC_SIZE);
        let mut index = 0;
        while let Some(entry) = table.entry(index) {
            match entry {
                Ok((gpa, word)) => {
                    let writable = word.has(packed_ring::WRITE) && !config.transmit;
                    self.add(tally, Segment { gpa, len: word.bytes() }, writable)?;
                }
                Err(AccessError::Missing(missing)) => return Err(WalkError::Missing(missing)),
                Err(_) => return Err(ChainError::IndirectOutOfRange.into()),
            }
            index += 1;
        }
        Ok(())
    }

    /// The rest of the chain is in the table that `descriptor` names. The tally goes in and out by value: where its address
    /// is taken, it lies on the stack and is copied from there by loads that are wider than the stores before.
    #[inline]
    fn walk_indirect(
        &mut self,
        mut tally: Tally,
        mem: &GuestMemory,
        negotiated: bool,
        descriptor: Descriptor,
    ) -> (Tally, Result<(), WalkError>) {
        let result = self.add_indirect(&mut tally, mem, negotiated, descriptor);
        (tally, result)
    }

    /// Its own WRITE flag means nothing (§2.7.5.3.2).
    #[inline(always)]
    fn add_indirect(
        &mut self,
        tally: &mut Tally,
        mem: &GuestMemory,
        negotiated: bool,
        descriptor: Descriptor,
    ) -> Result<(), WalkError> {
        if !negotiated {
            return Err(ChainError::IndirectNotNegotiated.into());
        }
        if descriptor.has_next() {
            return Err(ChainError::IndirectWithNext.into());
        }
        let len = descriptor.len();
        if len == 0 || !len.is_multiple_of(DESC_SIZE) || len > INDIRECT_LEN_MAX {
            return Err(ChainError::IndirectLength(len).into());
        }
        let table = mem.indirect_table(descriptor.addr().0, len);
        let mut left = len / DESC_SIZE;
        let mut index = 0;
        loop {
            let entry = match table.descriptor(index).ok_or(ChainError::NextOutOfRange(index))? {
                Ok(entry) => entry,
                Err(AccessError::Missing(missing)) => return Err(WalkError::Missing(missing)),
                Err(_) => return Err(ChainError::IndirectOutOfRange.into()),
            };
            if entry.refers_to_indirect_table() {
                return Err(ChainError::NestedIndirect.into());
            }
            self.add_split(tally, entry)?;
            if !entry.has_next() {
                return Ok(());
            }
            left -= 1;
            if left == 0 {
                return Err(ChainError::Loop.into());
            }
            index = entry.next();
        }
    }

    #[inline(always)]
    fn add_split(&mut self, tally: &mut Tally, descriptor: Descriptor) -> Result<(), ChainError> {
        let segment = Segment { gpa: descriptor.addr().0, len: descriptor.len() };
        self.add(tally, segment, descriptor.is_write_only())
    }

    #[inline(always)]
    fn add(&mut self, tally: &mut Tally, segment: Segment, writable: bool) -> Result<(), ChainError> {
        if segment.len == 0 {
            return Err(ChainError::ZeroLength);
        }
        *self.segments.get_mut(tally.count as usize).ok_or(ChainError::TooLong)? = segment;
        tally.count += 1;
        if writable {
            tally.writable_len += u64::from(segment.len);
        } else {
            if tally.writable_len != 0 {
                return Err(ChainError::ReadableAfterWritable);
            }
            tally.readable += 1;
            tally.readable_len += u64::from(segment.len);
        }
        Ok(())
    }
}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chain")
            .field("head", &self.head)
            .field("readable", &self.readable())
            .field("writable", &self.writable())
            .finish()
    }
}
