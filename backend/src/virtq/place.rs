//! Places in a packed ring (VIRTIO 1.3 §2.8.1). Arithmetic only; nothing of the crate is used here, so that a test program can
//! be compiled with it.
#![forbid(unsafe_code)]

/// VIRTQ_DESC_F_AVAIL.
pub(crate) const AVAIL: u16 = 1 << 7;
/// VIRTQ_DESC_F_USED.
pub(crate) const USED: u16 = 1 << 15;
/// The wrap counter beside an index or offset.
const WRAP: u16 = 1 << 15;

/// A place in the ring: a slot, and the wrap counter that is in force there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) slot: u32,
    pub(crate) wrap: bool,
}

impl Place {
    /// From an index with the wrap counter in bit 15; `None` outside the ring.
    pub(crate) fn parse(off_wrap: u16, size: u32) -> Option<Self> {
        let slot = u32::from(off_wrap & !WRAP);
        (slot < size).then_some(Self { slot, wrap: off_wrap & WRAP != 0 })
    }

    /// As it is told to others.
    #[inline]
    pub(crate) fn off_wrap(self) -> u16 {
        self.slot as u16 | if self.wrap { WRAP } else { 0 }
    }

    /// The place `count` slots further, at most once round the ring.
    #[inline(always)]
    pub(crate) fn forth(self, count: u32, size: u32) -> Self {
        let slot = self.slot + count;
        if slot >= size { Self { slot: slot - size, wrap: !self.wrap } } else { Self { slot, ..self } }
    }

    /// The place `count` slots before, at most once round the ring.
    #[inline]
    pub(crate) fn back(self, count: u32, size: u32) -> Self {
        match self.slot.checked_sub(count) {
            Some(slot) => Self { slot, ..self },
            None => Self { slot: self.slot + size - count, wrap: !self.wrap },
        }
    }

    /// Slots from `self` on to `other`, of the two rounds that the wrap counter tells apart.
    pub(crate) fn until(self, other: Self, size: u32) -> u32 {
        let position = |place: Self| place.slot + if place.wrap { 0 } else { size };
        let (from, to) = (position(self), position(other));
        if to >= from { to - from } else { to + 2 * size - from }
    }

    /// The flags of [`AVAIL`] and [`USED`] that make a descriptor available here.
    #[inline(always)]
    pub(crate) fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// The same for a used one.
    #[inline(always)]
    pub(crate) fn used(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }
}
