//! Which pages the chains that wait in a ring will need, before their turn comes (postcopy).
//!
//! A look only: nothing is taken, and what the guest wrote here is read again when the chain is taken. Who asks for the
//! pages is not here.
#![forbid(unsafe_code)]

use super::chain::{Chain, MAX_CHAIN, WalkError};
use super::split::SplitQueue;
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
                Ok(()) => {
                    for segment in chain.readable().iter().chain(chain.writable()) {
                        segments += 1;
                        let len = segment.len.min(SEGMENT_BYTES_MAX);
                        mem.for_each_missing(segment.gpa, len.into(), |range| {
                            visit(range, Purpose::Buffer);
                        });
                    }
                }
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
