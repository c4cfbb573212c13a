//! Which pages the chains that wait in a ring will need, before their turn comes (postcopy).
//!
//! A look only: nothing is taken, and what the guest wrote here is read again when the chain is taken. Who asks for the
//! pages is not here.
#![forbid(unsafe_code)]

use super::chain::{Chain, MAX_CHAIN, PackedWalkError, WalkError, packed_len};
use super::packed::PackedQueue;
use super::split::SplitQueue;
use crate::memory::packed_ring::{AVAIL, USED};
use crate::memory::{GuestMemory, MissingRange};

/// What missing memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Descriptor table, available or used ring.
    Ring,
    /// An indirect descriptor table.
    IndirectTable,
    /// The buffer of a frame.
    Buffer,
}

/// Segments that one look takes in: a guest with very long chains must not make it long.
const SEGMENTS_MAX: usize = 4096;
/// Bytes of a segment that are looked at: as long as any frame can be (`net::rx::SPILL_BYTES`).
const SEGMENT_BYTES_MAX: u32 = 68 << 10;
/// What a chain counts that could not be taken apart: as long as it may have been, in segments.
const FAILED_WALK: usize = MAX_CHAIN;

impl SplitQueue {
    /// The available index of the first chain that nobody has taken.
    pub fn first_waiting(&self) -> u16 {
        self.next_avail.get()
    }

    /// Calls `visit` with what is missing of the ring, or else of the first `chains_max` chains that wait in it, less the
    /// first `skip`. `chain` is scratch space. Returns the available index behind the last chain that was looked at. A ring
    /// that cannot be trusted has nothing to say: whoever takes its chains will find out.
    pub fn look_ahead(
        &mut self,
        mem: &GuestMemory,
        skip: u16,
        chains_max: u16,
        chain: &mut Chain,
        mut visit: impl FnMut(MissingRange, Purpose),
    ) -> u16 {
        let first = self.next_avail.get();
        if self.ring.access().is_err() {
            self.ring.for_each_missing(|range| visit(range, Purpose::Ring));
            return first;
        }
        if self.refill().is_err() {
            return first;
        }
        let waiting = self.avail_cached.get().wrapping_sub(first).min(chains_max);
        let Ok(ring) = self.ring.access() else { return first };
        let mut segments = 0;
        for ahead in skip..waiting {
            if segments >= SEGMENTS_MAX {
                return first.wrapping_add(ahead);
            }
            let head = ring.avail_head(first.wrapping_add(ahead));
            let Some(first_desc) = ring.descriptor(head) else { return first.wrapping_add(ahead) };
            match chain.walk(ring, mem, self.config.indirect, head, first_desc) {
                Ok(()) => segments += buffers(mem, chain, &mut visit),
                Err(WalkError::Missing(range)) => {
                    // Nothing of the table was read if its first page is missing, which is the usual case.
                    segments += if range.gpa <= first_desc.addr().0 { 1 } else { FAILED_WALK };
                    visit(range, Purpose::IndirectTable);
                }
                Err(WalkError::Bad(_)) => segments += FAILED_WALK,
            }
        }
        first.wrapping_add(waiting.max(skip))
    }
}

/// Calls `visit` with what is missing of the chain's buffers; returns how many segments it has.
fn buffers(mem: &GuestMemory, chain: &Chain, visit: &mut impl FnMut(MissingRange, Purpose)) -> usize {
    for segment in chain.readable().iter().chain(chain.writable()) {
        let len = segment.len.min(SEGMENT_BYTES_MAX);
        mem.for_each_missing(segment.gpa, len.into(), |range| visit(range, Purpose::Buffer));
    }
    chain.readable().len() + chain.writable().len()
}

impl PackedQueue {
    /// As the same method of [`SplitQueue`]; chains are counted as [`Self::first_waiting`] does. Those that are skipped are passed
    /// over by their flags, since nothing else says where a chain begins.
    pub fn look_ahead(
        &mut self,
        mem: &GuestMemory,
        skip: u16,
        chains_max: u16,
        chain: &mut Chain,
        mut visit: impl FnMut(MissingRange, Purpose),
    ) -> u16 {
        let first = self.first_waiting();
        if self.look().is_err() {
            self.ring.for_each_missing(|range| visit(range, Purpose::Ring));
            return first;
        }
        let ring = self.ring.access_known();
        let size = ring.size();
        let mut at = self.avail;
        let mut room = size - self.taken;
        let mut segments = 0;
        for ahead in 0..chains_max {
            let seen = first.wrapping_add(ahead.max(skip));
            let word = ring.word(at.slot);
            if segments >= SEGMENTS_MAX || room == 0 || !word.matches(AVAIL | USED, at.available()) {
                return seen;
            }
            let count = if ahead < skip {
                packed_len(ring, at.slot, word, room)
            } else {
                match chain.walk_packed(ring, mem, &self.config, at.slot, word, room) {
                    Ok(count) => {
                        segments += buffers(mem, chain, &mut visit);
                        count
                    }
                    Err(PackedWalkError::Missing(range)) => {
                        // As above; a chain with a table has one descriptor.
                        segments += if range.gpa <= ring.addr(at.slot) { 1 } else { FAILED_WALK };
                        visit(range, Purpose::IndirectTable);
                        1
                    }
                    Err(PackedWalkError::Bad(count, _)) => {
                        segments += FAILED_WALK;
                        count
                    }
                    Err(PackedWalkError::Overrun) => return seen,
                }
            };
            at = at.forth(count, size);
            room -= count;
        }
        first.wrapping_add(chains_max.max(skip))
    }
}
