//! The driver's side of a split virtqueue in memory that the device shares (VIRTIO 1.3 §2.7). Pure: no thread, no
//! fd, no clock.
//!
//! One descriptor per buffer; the n-th buffer always uses descriptor `n % size`, so the order of the used ring can be
//! checked. The device's notifications are turned off; whether the device wants kicks is read from the used ring.
#![forbid(unsafe_code)]

use crate::mapping::Mapping;
use crate::session::Place;

const DESC_WRITE: u16 = 2;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// A buffer that the device has used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Which one, counted from the first that was ever published.
    pub number: u64,
    /// Bytes that the device says to have written.
    pub len: u32,
}

/// What the device did wrong. The ring cannot be used any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// More was used than was available.
    #[error("used.idx is {used}, but only {pending} buffers are with the device and it was {seen} before")]
    Index {
        /// The device's index.
        used: u16,
        /// The index up to which buffers were taken back.
        seen: u16,
        /// Buffers that the device has.
        pending: u64,
    },
    /// A buffer was used before one that came earlier, or twice, or never was one.
    #[error("used entry {number} names descriptor {id} where {expected} is due: not in ring order")]
    Order {
        /// Counted from the first buffer.
        number: u64,
        /// Descriptor in the used ring.
        id: u32,
        /// Descriptor that is due.
        expected: u32,
    },
}

/// One ring.
#[derive(Clone, Debug)]
pub struct Ring {
    place: Place,
    base: u16,
    published: u64,
    taken: u64,
    device: u16,
}

impl Ring {
    /// A ring whose indices both are at `base`, as when a guest has used it before.
    pub fn new(place: Place, base: u16) -> Self {
        Self { place, base, published: 0, taken: 0, device: base }
    }

    /// Writes the empty ring.
    pub fn format(&self, memory: &Mapping) {
        let p = self.place;
        (0..u64::from(p.size)).for_each(|i| self.write_desc(memory, i, 0, 0, 0));
        memory.store_u16(p.avail, AVAIL_NO_INTERRUPT);
        memory.store_u16(p.avail + 2, self.base);
        memory.store_u16(p.used, 0);
        memory.store_u16(p.used + 2, self.base);
    }

    fn write_desc(&self, memory: &Mapping, index: u64, address: u64, len: u32, flags: u16) {
        let at = self.place.desc + 16 * index;
        memory.store_u64(at, address);
        memory.store_u32(at + 8, len);
        memory.store_u16(at + 12, flags);
        memory.store_u16(at + 14, 0);
    }

    fn slot(&self, number: u64) -> u64 {
        number % u64::from(self.place.size)
    }

    fn index(&self, number: u64) -> u16 {
        self.base.wrapping_add(number as u16)
    }

    /// Buffers that the device has.
    pub fn pending(&self) -> u64 {
        self.published - self.taken
    }

    /// Buffers that can be published now.
    pub fn room(&self) -> u64 {
        u64::from(self.place.size) - self.pending()
    }

    /// Number of the next buffer to publish.
    pub fn next(&self) -> u64 {
        self.published
    }

    /// Puts one buffer into the ring; [`Self::expose`] shows it to the device.
    pub fn publish(&mut self, memory: &Mapping, address: u64, len: u32, device_writes: bool) {
        debug_assert!(self.room() > 0);
        let slot = self.slot(self.published);
        self.write_desc(memory, slot, address, len, if device_writes { DESC_WRITE } else { 0 });
        let at = u64::from(self.index(self.published) % self.place.size);
        memory.store_u16(self.place.avail + 4 + 2 * at, slot as u16);
        self.published += 1;
    }

    /// Shows everything that was published; whether the device wants to be kicked for it.
    pub fn expose(&self, memory: &Mapping) -> bool {
        memory.store_u16(self.place.avail + 2, self.index(self.published));
        // VIRTIO 1.3 §2.7.13.4: the index must be visible before the flags are read.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        memory.load_u16(self.place.used) & USED_NO_NOTIFY == 0
    }

    /// Looks at the device's index; how many buffers can be taken back with [`Self::take`].
    pub fn look(&mut self, memory: &Mapping) -> Result<u64, RingError> {
        let used = memory.load_u16(self.place.used + 2);
        let seen = self.index(self.taken);
        let new = u64::from(used.wrapping_sub(seen));
        if new > self.pending() {
            return Err(RingError::Index { used, seen, pending: self.pending() });
        }
        self.device = used;
        Ok(new)
    }

    /// Takes the next used buffer back; only as many as [`Self::look`] has found.
    pub fn take(&mut self, memory: &Mapping) -> Result<Option<Used>, RingError> {
        let seen = self.index(self.taken);
        if seen == self.device {
            return Ok(None);
        }
        let at = self.place.used + 4 + 8 * u64::from(seen % self.place.size);
        let (id, len) = (memory.load_u32(at), memory.load_u32(at + 4));
        let expected = self.slot(self.taken) as u32;
        if id != expected {
            return Err(RingError::Order { number: self.taken, id, expected });
        }
        let used = Used { number: self.taken, len };
        self.taken += 1;
        Ok(Some(used))
    }
}

/// The device's used.idx and the driver's avail.idx of a ring, as they are in memory now.
pub fn indices(memory: &Mapping, place: &Place) -> (u16, u16) {
    (memory.load_u16(place.used + 2), memory.load_u16(place.avail + 2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::PAGE;

    const PLACE: Place = Place { size: 8, desc: 0, avail: PAGE, used: 2 * PAGE };

    fn ring() -> (Mapping, Ring) {
        let memory = Mapping::private(3 * PAGE).expect("map");
        // So that the indices wrap in mid-test.
        let ring = Ring::new(PLACE, 65_533);
        ring.format(&memory);
        (memory, ring)
    }

    /// What a device does: uses `ids` in this order.
    fn device(memory: &Mapping, ids: &[u32]) {
        for &id in ids {
            let idx = memory.load_u16(PLACE.used + 2);
            let at = PLACE.used + 4 + 8 * u64::from(idx % 8);
            memory.store_u32(at, id);
            memory.store_u32(at + 4, 60 + id);
            memory.store_u16(PLACE.used + 2, idx.wrapping_add(1));
        }
    }

    #[test]
    fn buffers_go_round_past_the_wrap_of_the_index() {
        let (memory, mut ring) = ring();
        for round in 0..10u64 {
            while ring.room() > 0 {
                ring.publish(&memory, ring.next() << 12, 64, round % 2 == 0);
            }
            assert!(ring.expose(&memory));
            assert_eq!(indices(&memory, &PLACE).1, 65_533u16.wrapping_add(8 * (round as u16 + 1)));
            // Available entries are the descriptors in order, wherever the index stands.
            for i in 0..8u16 {
                let idx = 65_533u16.wrapping_add(8 * round as u16 + i);
                assert_eq!(memory.load_u16(PLACE.avail + 4 + 2 * u64::from(idx % 8)), i);
            }
            device(&memory, &[0, 1, 2, 3, 4, 5, 6, 7]);
            assert_eq!(ring.look(&memory), Ok(8));
            for n in 0..8 {
                let used = Used { number: 8 * round + n, len: 60 + n as u32 };
                assert_eq!(ring.take(&memory), Ok(Some(used)));
            }
            assert_eq!(ring.take(&memory), Ok(None));
        }
    }

    #[test]
    fn a_device_that_wants_no_kick_gets_none() {
        let (memory, ring) = ring();
        memory.store_u16(PLACE.used, USED_NO_NOTIFY);
        assert!(!ring.expose(&memory));
    }

    #[test]
    fn disorder_and_false_indices_are_found() {
        let (memory, mut ring) = ring();
        (0..3).for_each(|_| ring.publish(&memory, PAGE, 64, false));
        ring.expose(&memory);
        device(&memory, &[0, 2]);
        assert_eq!(ring.look(&memory), Ok(2));
        assert!(ring.take(&memory).expect("first").is_some());
        assert_eq!(ring.take(&memory), Err(RingError::Order { number: 1, id: 2, expected: 1 }));
        device(&memory, &[1, 1]);
        assert!(matches!(ring.look(&memory), Err(RingError::Index { pending: 2, .. })));
        // A used.idx of zeros, as it is in a page that has not arrived, is not where the ring stands.
        let ring = Ring::new(PLACE, 65_300);
        ring.format(&memory);
        memory.store_u16(PLACE.used + 2, 0);
        assert!(ring.clone().look(&memory).is_err());
    }
}
