//! Bursts on packed rings: chains of one direct descriptor in one loop, and the hints that go before. As in `burst`.
#![forbid(unsafe_code)]

use super::burst::{Access, LINE_BYTES, Single};
use super::packed::{Kept, PackedQueue};
use super::queue::QueueError;
use crate::memory::GuestMemory;
use crate::memory::packed_ring::{AVAIL, INDIRECT, NEXT, USED, WRITE, Word};

/// Descriptors in a cache line.
const DESCRIPTORS_PER_LINE: u32 = 4;

/// A used descriptor of a chain of one.
#[inline(always)]
fn used_word(flags: u16, head: u16, len: u32) -> Word {
    Word::new(len, head, flags | if len == 0 { 0 } else { WRITE })
}

impl PackedQueue {
    /// Takes chains of one direct descriptor off the ring, as the same method of `SplitQueue`.
    ///
    /// # Errors
    /// The ring is missing.
    #[inline]
    pub fn pop_singles(&mut self, access: Access, out: &mut [Single]) -> Result<usize, QueueError> {
        self.look()?;
        let ring = self.ring.access_known();
        let size = ring.size();
        let room = out.len().min((size - self.taken) as usize);
        let direction = if access == Access::Writable { WRITE } else { 0 };
        let mut out = out[..room].iter_mut();
        let mut at = self.avail;
        let mut taken = 0;
        // To the end of the ring, then from its beginning.
        'all: while out.len() > 0 {
            let wanted = at.available() | direction;
            let mut stretch = 0;
            for (slot, single) in ring.slots_from(at.slot).zip(&mut out) {
                let word = slot.word();
                // NEXT, INDIRECT, or the other direction: not one of these.
                if !word.matches(AVAIL | USED | NEXT | INDIRECT | WRITE, wanted) || word.bytes() == 0 {
                    at.slot += stretch;
                    taken += stretch;
                    break 'all;
                }
                *single = Single { gpa: slot.addr(), len: word.bytes(), head: word.id() };
                stretch += 1;
                #[cfg(debug_assertions)]
                self.ids.push_back(word.id());
            }
            at = at.forth(stretch, size);
            taken += stretch;
        }
        self.avail = at;
        self.taken += taken;
        self.popped = self.popped.wrapping_add(taken);
        Ok(taken as usize)
    }

    /// Completes the oldest chains in work, each given by its id and the bytes that were written into it. Visible with
    /// [`Self::publish`].
    #[inline]
    pub fn push_all(&mut self, chains: impl Iterator<Item = (u16, u32)>) {
        if !self.long.is_empty() || self.in_flight() == 0 {
            return chains.for_each(|(head, len)| self.push(head, len));
        }
        let ring = self.ring.access_known();
        let size = ring.size();
        let mut at = self.used;
        let mut count = 0;
        #[cfg(debug_assertions)]
        let (ids, chains) = (&mut self.ids, chains);
        #[cfg(debug_assertions)]
        let chains = chains.inspect(|(head, _)| {
            assert_eq!(ids.pop_front(), Some(*head), "chains must be completed in ring order");
        });
        let mut chains = chains;
        let mut kept = self.kept;
        if kept.is_none()
            && let Some((head, len)) = chains.next()
        {
            kept = Some(Kept { slot: at.slot, word: used_word(at.used(), head, len) });
            at = at.forth(1, size);
            count = 1;
        }
        if self.batch {
            let mut last = None;
            for (head, _) in chains {
                last = Some(head);
                count += 1;
            }
            if let (Some(kept), Some(last)) = (&mut kept, last) {
                kept.word = kept.word.with_id(last);
            }
        } else {
            loop {
                // To the end of the ring, then from its beginning.
                let flags = at.used();
                let mut stretch = 0;
                for (slot, (head, len)) in ring.slots_from(at.slot).zip(&mut chains) {
                    slot.store(used_word(flags, head, len));
                    stretch += 1;
                }
                at = at.forth(stretch, size);
                count += stretch;
                if at.slot != 0 || stretch == 0 {
                    break;
                }
            }
        }
        self.kept = kept;
        self.used = self.used.forth(count, size);
        self.pushed = self.pushed.wrapping_add(count);
    }

    /// Asks the CPU for the descriptors that the next `n` chains will be used by.
    #[inline]
    pub fn prefetch_used(&mut self, n: u16) {
        if self.look().is_ok() {
            self.prefetch_slots(self.used.slot, n.into());
        }
    }

    /// Asks for the lines of `n` slots from `first` on, to be written.
    #[inline]
    fn prefetch_slots(&self, first: u32, n: u32) {
        let size = self.ring.size();
        let ring = self.ring.access_known();
        for ahead in (0..n.min(size)).step_by(DESCRIPTORS_PER_LINE as usize) {
            let slot = first + ahead;
            ring.prefetch_write(if slot >= size { slot - size } else { slot });
        }
    }

    /// Asks the CPU for the first lines of the buffer of the chain that is `ahead` places behind the next, if each chain has
    /// one descriptor, as the same method of `SplitQueue`.
    #[inline]
    pub fn prefetch_buffer(&mut self, mem: &GuestMemory, ahead: u16) {
        if self.look().is_err() {
            return;
        }
        let size = self.ring.size();
        let at = self.avail.forth(u32::from(ahead).min(size), size);
        let ring = self.ring.access_known();
        if ring.word(at.slot).matches(AVAIL | USED, at.available()) {
            let addr = ring.addr(at.slot);
            mem.prefetch_write(addr);
            mem.prefetch_write(addr.wrapping_add(LINE_BYTES));
        }
    }
}
