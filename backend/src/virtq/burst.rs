//! Many chains at once: what most drivers make of most frames is a chain of one direct descriptor, and those go through in
//! one loop. Also the hints that a burst gives to the CPU before it begins. Chains of any other shape are for `pop`.
#![forbid(unsafe_code)]

use super::queue::QueueError;
use super::split::{Index, SplitQueue};
use crate::memory::GuestMemory;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

/// A chain of one direct descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Single {
    /// Guest-physical address of its buffer. Not checked against the memory table.
    pub gpa: u64,
    /// Bytes; never 0.
    pub len: u32,
    /// By what the chain is given back: the descriptor, or the buffer id in a packed ring.
    pub head: u16,
}

/// Which way the buffer of a [`Single`] goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The guest wrote it for us.
    Readable = 0,
    /// We may write there.
    Writable = VRING_DESC_F_WRITE as isize,
}

/// The flags that make a descriptor's shape.
const SHAPE: u32 = VRING_DESC_F_NEXT | VRING_DESC_F_INDIRECT | VRING_DESC_F_WRITE;

impl SplitQueue {
    /// Takes chains of one direct descriptor off the ring, up to the first chain of another shape or as many as there is room
    /// for in `out`, and returns how many. 0: [`Self::pop`] knows what the next one is, or that there is none.
    ///
    /// # Errors
    /// The ring is missing or broken, as [`Self::available`] says.
    #[inline]
    pub fn pop_singles(&mut self, access: Access, out: &mut [Single]) -> Result<usize, QueueError> {
        let known = usize::from(self.available()?).min(out.len());
        let first = self.next_avail.get();
        let ring = self.ring.access_known();
        let mut taken = 0;
        for (single, index) in out[..known].iter_mut().zip(u32::from(first)..) {
            let head = ring.avail_head(index as u16);
            let Some((gpa, rest)) = ring.descriptor_words(head) else { break };
            let (len, flags) = (rest as u32, (rest >> 32) as u32);
            // NEXT, INDIRECT, or the other direction: not one of these. (Other flags mean nothing, as in `Chain`.)
            if flags & SHAPE != access as u32 || len == 0 {
                break;
            }
            *single = Single { gpa, len, head };
            taken += 1;
            #[cfg(debug_assertions)]
            self.in_work.push_back(head);
        }
        self.next_avail = Index::from(first.wrapping_add(taken as u16));
        Ok(taken)
    }

    /// Completes the oldest chains in work, each given by its head and the bytes that were written into it. Visible with
    /// [`Self::publish`].
    #[inline]
    pub fn push_all(&mut self, chains: impl Iterator<Item = (u16, u32)>) {
        if self.in_flight() == 0 {
            return; // the ring may not be there
        }
        let ring = self.ring.access_known();
        let mut used = self.next_used.get();
        for (head, len) in chains {
            #[cfg(debug_assertions)]
            assert_eq!(self.in_work.pop_front(), Some(head), "chains must be completed in ring order");
            ring.write_used(used, u32::from(head), len);
            used = used.wrapping_add(1);
        }
        self.next_used = Index::from(used);
    }
}

/// How far before a buffer its descriptor is asked for, chains.
const DESCRIPTORS_AHEAD: u16 = 8;
/// A cache line, as far as prefetching goes, bytes.
pub(super) const LINE_BYTES: u64 = 64;
/// Used elements in one.
const USED_PER_LINE: usize = 8;

impl SplitQueue {
    /// Asks the CPU for the used elements that the next `n` chains will get: the driver has just read those lines.
    #[inline]
    pub fn prefetch_used(&mut self, n: u16) {
        let used = self.next_used.get();
        if let Ok(ring) = self.ring.access() {
            (0..n).step_by(USED_PER_LINE).for_each(|i| ring.prefetch_used(used.wrapping_add(i)));
        }
    }

    /// Asks the CPU for the first lines of the buffer of the chain that is `ahead` places behind the next, which is going
    /// to be written, and for the descriptor of one further behind, whose turn comes next. What it reads serves the
    /// hint only.
    #[inline]
    pub fn prefetch_buffer(&mut self, mem: &GuestMemory, ahead: u16) {
        let known = self.avail_cached.get().wrapping_sub(self.next_avail.get());
        if ahead >= known {
            return;
        }
        let ring = self.ring.access_known();
        let at = self.next_avail.get().wrapping_add(ahead);
        if ahead + DESCRIPTORS_AHEAD < known {
            ring.prefetch_descriptor(ring.avail_head(at.wrapping_add(DESCRIPTORS_AHEAD)));
        }
        let head = ring.avail_head(at);
        if let Some(descriptor) = ring.descriptor(head) {
            let addr = descriptor.addr().0;
            mem.prefetch_write(addr);
            mem.prefetch_write(addr.wrapping_add(LINE_BYTES));
        }
    }
}
