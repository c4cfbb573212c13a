//! The four rings of AF_XDP: single-producer, single-consumer, shared with the kernel.
//!
//! ```text
//!   producer ─► [ entry │ entry │ … ] ─► consumer       indices run freely, modulo 2^32
//!   FILL, TX: we produce            COMPLETION, RX: we consume
//! ```
//! Here: indices with their cached copies, and the only acquire and release of the uplink. Entries are written before
//! the producer index is released, and read after it was acquired; likewise for the consumer index and their reuse.
//! Not here: what an entry means, and how the memory is mapped (`socket`).

use std::any::Any;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

/// Where the parts of a ring lie.
#[derive(Clone, Copy, Debug)]
pub struct Parts {
    /// The producer's index.
    pub producer: *const AtomicU32,
    /// The consumer's index.
    pub consumer: *const AtomicU32,
    /// Flags of the kernel.
    pub flags: *const AtomicU32,
    /// The first entry.
    pub entries: *mut u8,
    /// Entries; a power of two.
    pub size: u32,
}

/// What both ends have: the parts, and whatever keeps them mapped.
struct Ring<T> {
    parts: Parts,
    entries: *mut T,
    _memory: Box<dyn Any + Send>,
}

// SAFETY: the pointers are to memory that `_memory` keeps; one thread at a time uses an end (`&mut`), and the
// indices are atomic.
unsafe impl<T: Send> Send for Ring<T> {}

impl<T: Copy> Ring<T> {
    /// # Safety
    /// `parts` must describe a ring of `size` entries of `T` that stays valid while `memory` lives.
    unsafe fn new(parts: Parts, memory: Box<dyn Any + Send>) -> io::Result<Self> {
        let entries = parts.entries.cast::<T>();
        if !parts.size.is_power_of_two() || !entries.is_aligned() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self { parts, entries, _memory: memory })
    }

    fn producer(&self) -> &AtomicU32 {
        // SAFETY: valid while `_memory` lives (contract of `new`).
        unsafe { &*self.parts.producer }
    }

    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { &*self.parts.consumer }
    }

    fn needs_wakeup(&self) -> bool {
        // SAFETY: as above.
        unsafe { &*self.parts.flags }.load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }

    fn entry(&self, index: u32) -> *mut T {
        let slot = index & (self.parts.size - 1);
        // SAFETY: the slot lies within the entries (`size` is a power of two).
        unsafe { self.entries.add(slot as usize) }
    }
}

/// Our end of FILL and TX.
pub struct Producer<T> {
    ring: Ring<T>,
    /// Entries written so far; those behind the shared index are not published yet.
    written: u32,
    /// The consumer's index when it was last looked at.
    seen: u32,
}

impl<T: Copy> Producer<T> {
    /// The producing end.
    ///
    /// # Errors
    /// The parts are no ring.
    ///
    /// # Safety
    /// `parts` must describe a ring of `size` entries of `T` that stays valid while `memory` lives, and nobody else may
    /// produce.
    pub unsafe fn new(parts: Parts, memory: Box<dyn Any + Send>) -> io::Result<Self> {
        // SAFETY: the caller's promise.
        let ring = unsafe { Ring::new(parts, memory) }?;
        let written = ring.producer().load(Ordering::Relaxed);
        let seen = ring.consumer().load(Ordering::Acquire);
        Ok(Self { ring, written, seen })
    }

    /// Entries that can be pushed now, `want` at most: the shared index is only looked at if the cached one does not do.
    #[inline]
    pub fn room(&mut self, want: u32) -> u32 {
        let mut room = self.cached_room();
        if room < want {
            self.seen = self.ring.consumer().load(Ordering::Acquire);
            room = self.cached_room();
        }
        room.min(want)
    }

    fn cached_room(&self) -> u32 {
        self.ring.parts.size - self.written.wrapping_sub(self.seen).min(self.ring.parts.size)
    }

    /// Writes an entry, if there is room; it is not the consumer's before [`Self::publish`].
    #[inline]
    pub fn push(&mut self, value: T) -> bool {
        if self.room(1) == 0 {
            return false;
        }
        // SAFETY: there is room, so the consumer does not look at this entry.
        unsafe { self.ring.entry(self.written).write(value) };
        self.written = self.written.wrapping_add(1);
        true
    }

    /// Hands over what was pushed.
    #[inline]
    pub fn publish(&mut self) {
        self.ring.producer().store(self.written, Ordering::Release);
    }

    /// Published entries that the consumer has not taken.
    #[inline]
    pub fn waiting(&mut self) -> u32 {
        self.seen = self.ring.consumer().load(Ordering::Acquire);
        self.ring.producer().load(Ordering::Relaxed).wrapping_sub(self.seen)
    }

    /// The kernel wants a system call before it goes on with this ring.
    #[inline]
    pub fn needs_wakeup(&self) -> bool {
        self.ring.needs_wakeup()
    }
}

/// Our end of COMPLETION and RX.
pub struct Consumer<T> {
    ring: Ring<T>,
    /// Entries taken so far.
    taken: u32,
    /// The producer's index when it was last looked at.
    seen: u32,
}

impl<T: Copy> Consumer<T> {
    /// The consuming end.
    ///
    /// # Errors
    /// The parts are no ring.
    ///
    /// # Safety
    /// `parts` must describe a ring of `size` entries of `T` that stays valid while `memory` lives; any bytes must be a `T`;
    /// nobody else may consume.
    pub unsafe fn new(parts: Parts, memory: Box<dyn Any + Send>) -> io::Result<Self> {
        // SAFETY: the caller's promise.
        let ring = unsafe { Ring::new(parts, memory) }?;
        let taken = ring.consumer().load(Ordering::Relaxed);
        let seen = ring.producer().load(Ordering::Acquire);
        Ok(Self { ring, taken, seen })
    }

    /// Whether there is an entry to take.
    #[inline]
    pub fn has_more(&self) -> bool {
        self.seen != self.taken || self.ring.producer().load(Ordering::Relaxed) != self.seen
    }

    /// Takes up to `max` entries and gives their room back.
    #[inline]
    pub fn take(&mut self, max: u32, mut each: impl FnMut(T)) -> u32 {
        if self.seen == self.taken {
            self.seen = self.ring.producer().load(Ordering::Acquire);
        }
        let count = self.seen.wrapping_sub(self.taken).min(max).min(self.ring.parts.size);
        if count == 0 {
            return 0;
        }
        for i in 0..count {
            // SAFETY: published, and not given back yet: the producer does not write there.
            each(unsafe { self.ring.entry(self.taken.wrapping_add(i)).read() });
        }
        self.taken = self.taken.wrapping_add(count);
        self.ring.consumer().store(self.taken, Ordering::Release);
        count
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;
    use std::sync::Arc;

    /// A ring in plain memory.
    pub(in super::super) struct Plain {
        indices: [AtomicU32; 3],
        entries: Vec<u64>,
    }

    impl Plain {
        pub(in super::super) fn new(size: u32, start: u32) -> Arc<Self> {
            let index = || AtomicU32::new(start);
            Arc::new(Self { indices: [index(), index(), AtomicU32::new(0)], entries: vec![0; size as usize] })
        }

        fn parts(self: &Arc<Self>) -> Parts {
            Parts {
                producer: &raw const self.indices[0],
                consumer: &raw const self.indices[1],
                flags: &raw const self.indices[2],
                entries: self.entries.as_ptr().cast_mut().cast(),
                size: self.entries.len() as u32,
            }
        }

        pub(in super::super) fn ends(self: &Arc<Self>) -> (Producer<u64>, Consumer<u64>) {
            // SAFETY: each end keeps the memory; there is one of each.
            unsafe {
                (
                    Producer::new(self.parts(), Box::new(self.clone())).unwrap(),
                    Consumer::new(self.parts(), Box::new(self.clone())).unwrap(),
                )
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Push(u64),
        Publish,
        Take(u32),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            3 => any::<u64>().prop_map(Op::Push),
            2 => Just(Op::Publish),
            2 => (0u32..12).prop_map(Op::Take),
        ]
    }

    proptest! {
        /// Against a queue; indices start near their wrap, too.
        #[test]
        fn rings_behave_as_queues(
            ops in prop::collection::vec(op(), 0..400),
            start in prop_oneof![Just(0u32), Just(u32::MAX - 5), any::<u32>()],
            order in 0u32..5,
        ) {
            let size = 1 << order;
            let ring = Plain::new(size, start);
            let (mut producer, mut consumer) = ring.ends();
            let mut unpublished = VecDeque::new();
            let mut published = VecDeque::new();
            for op in ops {
                match op {
                    Op::Push(value) => {
                        let room = size as usize - unpublished.len() - published.len();
                        prop_assert_eq!(producer.room(size), room as u32);
                        prop_assert_eq!(producer.push(value), room > 0);
                        if room > 0 {
                            unpublished.push_back(value);
                        }
                    }
                    Op::Publish => {
                        producer.publish();
                        published.append(&mut unpublished);
                        prop_assert_eq!(producer.waiting() as usize, published.len());
                    }
                    Op::Take(max) => {
                        let mut got = Vec::new();
                        let count = consumer.take(max, |value| got.push(value));
                        prop_assert_eq!(count as usize, got.len());
                        // What the cached index does not show yet may come with the next call.
                        prop_assert!(got.len() <= published.len().min(max as usize));
                        prop_assert!(!got.is_empty() || published.is_empty() || max == 0);
                        for value in got {
                            prop_assert_eq!(Some(value), published.pop_front());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn threads_see_whole_entries_in_order() {
        let ring = Plain::new(8, u32::MAX - 100);
        let (mut producer, mut consumer) = ring.ends();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for value in 0..20_000u64 {
                    while !producer.push(value.wrapping_mul(0x9e37_79b9_7f4a_7c15)) {
                        producer.publish();
                        std::thread::yield_now();
                    }
                    if value % 3 == 0 {
                        producer.publish();
                    }
                }
                producer.publish();
            });
            let mut next = 0u64;
            while next < 20_000 {
                let got = consumer.take(5, |value| {
                    assert_eq!(value, next.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                    next += 1;
                });
                if got == 0 {
                    std::thread::yield_now();
                }
            }
        });
    }

    #[test]
    fn only_powers_of_two_are_rings() {
        let ring = Plain::new(8, 0);
        let parts = Parts { size: 6, ..ring.parts() };
        // SAFETY: never used; the memory is larger.
        assert!(unsafe { Producer::<u64>::new(parts, Box::new(ring.clone())) }.is_err());
    }
}
