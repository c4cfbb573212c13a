//! Where the three parts of a virtqueue lie, of either format: found in guest memory, checked for alignment, kept mapped.
//! What is in them is in `ring` (split) and `packed_ring`.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::guest::Found;
use super::mapping::Mapping;
use super::residency::ResidencyMap;

use super::{GuestMemory, MissingRange, packed_ring, ring};

/// Alignment of descriptors, split and packed, bytes.
pub(super) const DESC_ALIGN: u64 = 16;

/// Where a ring is, in front-end user addresses (vhost-user: Vring address description).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// It is a packed ring (VIRTIO 1.3 §2.8).
    pub packed: bool,
    /// Entries, up to [`super::ring::MAX_QUEUE_SIZE`]; a power of two if the ring is split.
    pub size: u16,
    /// User address of the descriptor table.
    pub desc_user: u64,
    /// User address of the available ring, or of the driver event suppression structure.
    pub avail_user: u64,
    /// User address of the used ring, or of the device event suppression structure.
    pub used_user: u64,
    /// Guest-physical address at which writes to the used ring are logged; None = not logged.
    pub log_used: Option<u64>,
    /// VIRTIO_F_EVENT_IDX: the rings end with an event field.
    pub event_idx: bool,
}

impl RingLayout {
    /// Lengths of descriptor table, available and used ring, bytes.
    pub(super) fn lens(&self) -> [u64; 3] {
        let entries = u64::from(self.size);
        if self.packed { packed_ring::lens(entries) } else { ring::lens(entries, self.event_idx) }
    }

    /// Where its parts are in our address space, as far as `mem` has them: numbers, for those who observe the process.
    pub fn host_ranges(self, mem: &GuestMemory) -> impl Iterator<Item = Range<u64>> {
        let parts = [self.desc_user, self.avail_user, self.used_user];
        parts.into_iter().zip(self.lens()).filter_map(|(user, len)| {
            let found = mem.find_user(user, len)?;
            let start = found.mapping.host_addr() + found.offset;
            Some(start..start + len)
        })
    }
}

/// Which part of a ring an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingPart {
    /// Descriptor table.
    Descriptors,
    /// Available ring.
    Available,
    /// Used ring.
    Used,
    /// Driver event suppression structure of a packed ring.
    DriverEvent,
    /// Device event suppression structure of a packed ring.
    DeviceEvent,
}

/// Why a ring cannot be used where it is said to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Not a power of two, zero, or above [`super::ring::MAX_QUEUE_SIZE`].
    #[error("queue size {0} is not a power of two from 1 to 32768")]
    Size(u16),
    /// Zero, or above [`super::ring::MAX_QUEUE_SIZE`]; a packed ring.
    #[error("queue size {0} is not from 1 to 32768")]
    PackedSize(u16),
    /// Not wholly within one region of guest memory.
    #[error("{part:?} at user address {user:#x}, {len} bytes, are not in one region of guest memory")]
    Unmapped {
        /// Which part.
        part: RingPart,
        /// Its user address.
        user: u64,
        /// Its length, bytes.
        len: u64,
    },
    /// Not aligned as VIRTIO 1.3 §2.7 and §2.8.10.1 demand (16, 2, 4 bytes; packed 16, 4, 4).
    #[error("{part:?} at user address {user:#x} are misaligned")]
    Misaligned {
        /// Which part.
        part: RingPart,
        /// Its user address.
        user: u64,
    },
}

/// One part of the ring in our address space; keeps its mapping alive.
#[derive(Debug)]
pub(super) struct Area {
    pub(super) host: NonNull<u8>,
    len: u64,
    /// Guest-physical address.
    gpa: u64,
    offset: u64,
    residency: Option<Arc<ResidencyMap>>,
    _mapping: Arc<Mapping>,
}

impl Area {
    pub(super) fn new(
        mem: &GuestMemory,
        part: RingPart,
        user: u64,
        len: u64,
        align: u64,
    ) -> Result<Self, RingError> {
        let Found { mapping, residency, offset } =
            mem.find_user(user, len).ok_or(RingError::Unmapped { part, user, len })?;
        // SAFETY: `offset < size` of the mapping.
        let host = unsafe { mapping.host().add(offset as usize) };
        // The guest's alignment is that of user addresses; ours is what the accesses below rely on.
        if !user.is_multiple_of(align) || !(host.as_ptr() as u64).is_multiple_of(align) {
            return Err(RingError::Misaligned { part, user });
        }
        Ok(Self {
            host,
            len,
            gpa: mapping.spec().guest_phys + offset,
            offset,
            residency: residency.cloned(),
            _mapping: mapping.clone(),
        })
    }

    fn missing(&self) -> Option<MissingRange> {
        self.missing_from(self.offset)
    }

    /// Calls `visit` for each run of missing pages under it.
    fn for_each_missing(&self, visit: &mut impl FnMut(MissingRange)) {
        let region = self.gpa - self.offset;
        let mut offset = self.offset;
        while let Some(missing) = self.missing_from(offset) {
            visit(missing);
            offset = missing.gpa - region + missing.len;
        }
    }

    /// The first run of missing pages at or behind `offset` into the region.
    fn missing_from(&self, offset: u64) -> Option<MissingRange> {
        let gap = self.residency.as_ref()?.first_missing(offset..self.offset + self.len)?;
        // Both are offsets into the region, and `gap` may begin before the area.
        Some(MissingRange { gpa: self.gpa - self.offset + gap.start, len: gap.end - gap.start })
    }
}

/// All parts of a ring, and whether everything in them is known to be present.
#[derive(Debug)]
pub(super) struct Parts {
    areas: [Area; 3],
    resident: bool,
}

impl Parts {
    pub(super) fn new(areas: [Area; 3]) -> Self {
        let resident = areas.iter().all(|area| area.residency.is_none());
        Self { areas, resident }
    }

    /// Whether all pages are present. Once they are, this is one predictable branch.
    #[inline(always)]
    pub(super) fn check(&mut self) -> Result<(), MissingRange> {
        if self.resident { Ok(()) } else { self.find_missing() }
    }

    /// For an access without [`Self::check`]: it has said so before, or of the parts that these have replaced. (Were pages
    /// missing, an access would wait for them.)
    #[inline(always)]
    pub(super) fn assume_present(&self) {
        debug_assert!(self.resident, "a ring that may be missing");
    }

    /// Guest-physical address of a part, by its place.
    #[inline]
    pub(super) fn gpa(&self, part: usize) -> u64 {
        self.areas[part].gpa
    }

    #[cold]
    fn find_missing(&mut self) -> Result<(), MissingRange> {
        match self.areas.iter().find_map(Area::missing) {
            Some(missing) => Err(missing),
            None => {
                self.resident = true;
                Ok(())
            }
        }
    }

    /// Calls `visit` for each run of missing pages under the ring.
    pub(super) fn for_each_missing(&self, mut visit: impl FnMut(MissingRange)) {
        self.areas.iter().for_each(|area| area.for_each_missing(&mut visit));
    }
}
