//! The memory of one split virtqueue: descriptor table, available ring, used ring; and indirect tables.
//! Element accesses only: every index is masked or checked, every guest field is read once into our own copy. What the
//! values mean is for `virtq`.
//!
//! ```text
//! avail (VIRTIO 1.3 §2.7.6)            used (§2.7.8)                          descriptor (§2.7.5)
//! +0 flags    +2 idx                   +0 flags      +2 idx                   +0  addr: le64
//! +4 ring[size]: le16 heads            +4 ring[size]: { id: le32, len: le32 }  +8  len: le32
//! +4+2·size used_event                 +4+8·size avail_event                  +12 flags, +14 next: le16
//! ```
//!
//! Orderings: `avail.idx` is loaded with acquire, so that entries and descriptors behind it are seen; `used.idx` is stored with
//! release, so that entries and buffers before it are. Event fields are relaxed; their users put the full fence that
//! §2.7.7 and §2.7.10 need between a store and the load that follows.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use virtio_queue::desc::split::Descriptor;

use super::copy;
use super::dirty::DirtyLog;
use super::hint;
use super::ring_parts::{Area, DESC_ALIGN, Parts};
use super::{AccessError, GuestMemory, MissingRange};

pub use super::ring_parts::{RingError, RingLayout, RingPart};

/// Most entries of a split queue (VIRTIO 1.3 §2.7).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// Bytes of a descriptor.
pub const DESC_SIZE: u32 = 16;

const AVAIL_ALIGN: u64 = 2;
const USED_ALIGN: u64 = 4;

const IDX: usize = 2;
const RING: usize = 4;
const AVAIL_ELEM: usize = 2;
const USED_ELEM: usize = 8;
const EVENT_SIZE: u64 = 2;

/// Lengths of descriptor table, available and used ring, bytes.
pub(super) fn lens(entries: u64, event_idx: bool) -> [u64; 3] {
    let event = if event_idx { EVENT_SIZE } else { 0 };
    [
        entries * u64::from(DESC_SIZE),
        RING as u64 + entries * AVAIL_ELEM as u64 + event,
        RING as u64 + entries * USED_ELEM as u64 + event,
    ]
}

/// A ring's memory. Reads nothing until [`RingView::access`] found all of it present.
#[derive(Debug)]
pub struct RingView {
    desc: NonNull<u8>,
    avail: NonNull<u8>,
    used: NonNull<u8>,
    mask: u16,
    event_idx: bool,
    log: Option<UsedLog>,
    dirty: Option<Arc<DirtyLog>>,
    parts: Parts,
}

#[derive(Debug)]
struct UsedLog {
    log: Arc<DirtyLog>,
    gpa: u64,
}

// SAFETY: the pointers lead into mappings that `parts` keeps alive, and are not tied to a thread.
unsafe impl Send for RingView {}

impl RingView {
    /// Finds the ring in `mem`. Touches none of it.
    pub fn new(mem: &GuestMemory, layout: &RingLayout) -> Result<Self, RingError> {
        let size = layout.size;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(RingError::Size(size));
        }
        let [desc_len, avail_len, used_len] = layout.lens();
        let areas = [
            Area::new(mem, RingPart::Descriptors, layout.desc_user, desc_len, DESC_ALIGN)?,
            Area::new(mem, RingPart::Available, layout.avail_user, avail_len, AVAIL_ALIGN)?,
            Area::new(mem, RingPart::Used, layout.used_user, used_len, USED_ALIGN)?,
        ];
        let mut view = Self {
            desc: areas[0].host,
            avail: areas[1].host,
            used: areas[2].host,
            mask: size - 1,
            event_idx: layout.event_idx,
            log: None,
            dirty: mem.log().cloned(),
            parts: Parts::new(areas),
        };
        view.set_log_used(layout.log_used);
        Ok(view)
    }

    /// Logs writes to the used ring at another guest-physical address from now on, or no longer.
    pub fn set_log_used(&mut self, gpa: Option<u64>) {
        self.log = self.dirty.clone().zip(gpa).map(|(log, gpa)| UsedLog { log, gpa });
    }

    /// The ring, if all its pages are present. Once it is, this is one predictable branch.
    #[inline(always)]
    pub fn access(&mut self) -> Result<RingAccess<'_>, MissingRange> {
        self.parts.check()?;
        Ok(RingAccess { view: self })
    }

    /// The ring, of which all pages are known to be present: [`Self::access`] has said so, or said so of the view that this
    /// one has replaced. (Were they not, an access would wait for them.)
    #[inline(always)]
    pub fn access_known(&self) -> RingAccess<'_> {
        self.parts.assume_present();
        RingAccess { view: self }
    }

    /// Calls `visit` for each run of missing pages under the ring.
    pub fn for_each_missing(&self, visit: impl FnMut(MissingRange)) {
        self.parts.for_each_missing(visit);
    }

    /// Entries.
    #[inline]
    pub fn size(&self) -> u16 {
        self.mask + 1
    }
}

/// Element access to a ring that is wholly present.
#[derive(Clone, Copy)]
pub struct RingAccess<'a> {
    view: &'a RingView,
}

impl<'a> RingAccess<'a> {
    /// `avail.idx`, acquire.
    #[inline(always)]
    pub fn avail_idx(self) -> u16 {
        u16::from_le(self.avail(IDX).load(Ordering::Acquire))
    }

    /// `avail.flags`.
    #[inline(always)]
    pub fn avail_flags(self) -> u16 {
        u16::from_le(self.avail(0).load(Ordering::Relaxed))
    }

    /// The head in the slot of free-running index `index`.
    #[inline(always)]
    pub fn avail_head(self, index: u16) -> u16 {
        let slot = usize::from(index & self.view.mask);
        u16::from_le(self.avail(RING + slot * AVAIL_ELEM).load(Ordering::Relaxed))
    }

    /// `used_event` of the available ring; None without EVENT_IDX.
    #[inline(always)]
    pub fn used_event(self) -> Option<u16> {
        if !self.view.event_idx {
            return None;
        }
        Some(u16::from_le(self.avail(RING + self.entries() * AVAIL_ELEM).load(Ordering::Relaxed)))
    }

    /// The descriptor `index`; None outside the table.
    #[inline(always)]
    pub fn descriptor(self, index: u16) -> Option<Descriptor> {
        if index > self.view.mask {
            return None;
        }
        // SAFETY: `index < size`, and the table has `size` descriptors of 16 bytes.
        Some(unsafe { load_descriptor(self.view.desc.add(usize::from(index) * DESC_SIZE as usize)) })
    }

    /// The descriptor `index` as it lies there: its address; its length, flags (from bit 32 on) and next (from bit 48 on). None
    /// outside the table.
    #[inline(always)]
    pub fn descriptor_words(self, index: u16) -> Option<(u64, u64)> {
        if index > self.view.mask {
            return None;
        }
        // SAFETY: as in `descriptor`.
        Some(unsafe {
            copy::load_two_words(self.view.desc.add(usize::from(index) * DESC_SIZE as usize).as_ptr())
        })
    }

    /// Asks the CPU for the line of descriptor `index`, as a hint.
    #[inline(always)]
    pub fn prefetch_descriptor(self, index: u16) {
        // SAFETY: the masked index lies in the table.
        let at = unsafe { self.view.desc.add(usize::from(index & self.view.mask) * DESC_SIZE as usize) };
        hint::read(at.as_ptr());
    }

    /// Asks the CPU for the line of the used element of free-running index `index`, which is going to be written, as a hint.
    #[inline(always)]
    pub fn prefetch_used(self, index: u16) {
        let slot = usize::from(index & self.view.mask);
        // SAFETY: the masked index lies in the ring.
        hint::write(unsafe { self.view.used.add(RING + slot * USED_ELEM) }.as_ptr());
    }

    /// `used.idx`, which only we write: for the start, when somebody else did before us.
    #[inline]
    pub fn used_idx(self) -> u16 {
        u16::from_le(self.used(IDX).load(Ordering::Relaxed))
    }

    /// Writes the used element of free-running index `index`. Not logged: see [`Self::store_used_idx`].
    #[inline(always)]
    pub fn write_used(self, index: u16, id: u32, len: u32) {
        let slot = usize::from(index & self.view.mask);
        // SAFETY: the masked slot lies in the used ring, 8 bytes each from +4 on.
        unsafe { copy::store_two_halves(self.view.used.add(RING + slot * USED_ELEM).as_ptr(), id, len) };
    }

    /// Stores `used.idx` with release, and logs it and the elements `from..to`, which were written before.
    #[inline(always)]
    pub fn store_used_idx(self, from: u16, to: u16) {
        self.used(IDX).store(to.to_le(), Ordering::Release);
        if self.view.log.is_some() {
            self.log_elements(from, to);
        }
    }

    /// Stores `used.flags`.
    #[inline]
    pub fn store_used_flags(self, flags: u16) {
        self.used(0).store(flags.to_le(), Ordering::Relaxed);
        self.log_used(0, size_of::<u16>());
    }

    /// Stores `avail_event` of the used ring; nothing without EVENT_IDX.
    #[inline]
    pub fn store_avail_event(self, index: u16) {
        if self.view.event_idx {
            let at = RING + self.entries() * USED_ELEM;
            self.used(at).store(index.to_le(), Ordering::Relaxed);
            self.log_used(at, size_of::<u16>());
        }
    }

    #[cold]
    fn log_elements(self, from: u16, to: u16) {
        let count = usize::from(to.wrapping_sub(from)).min(self.entries());
        let first = usize::from(from & self.view.mask);
        let until_end = count.min(self.entries() - first);
        self.log_used(IDX, size_of::<u16>());
        self.log_used(RING + first * USED_ELEM, until_end * USED_ELEM);
        self.log_used(RING, (count - until_end) * USED_ELEM);
    }

    #[inline]
    fn log_used(self, offset: usize, len: usize) {
        if let Some(used) = &self.view.log {
            used.log.mark(used.gpa.saturating_add(offset as u64), len as u64);
        }
    }

    /// Entries.
    #[inline(always)]
    pub fn size(self) -> u16 {
        self.view.mask + 1
    }

    #[inline(always)]
    fn entries(self) -> usize {
        usize::from(self.size())
    }

    /// The 16-bit field at `offset` of the available ring.
    #[inline(always)]
    fn avail(self, offset: usize) -> &'a AtomicU16 {
        // SAFETY: callers pass offsets of the available ring, even ones; the ring is 2-aligned and mapped as long as the view.
        unsafe { AtomicU16::from_ptr(self.view.avail.add(offset).as_ptr().cast()) }
    }

    /// The 16-bit field at `offset` of the used ring.
    #[inline(always)]
    fn used(self, offset: usize) -> &'a AtomicU16 {
        // SAFETY: callers pass offsets of the used ring, even ones; the ring is 4-aligned and mapped as long as the view.
        unsafe { AtomicU16::from_ptr(self.view.used.add(offset).as_ptr().cast()) }
    }
}

/// An indirect descriptor table (VIRTIO 1.3 §2.7.5.3): wherever the guest likes, aligned or not.
#[derive(Clone, Copy)]
pub struct IndirectTable<'m> {
    mem: &'m GuestMemory,
    gpa: u64,
    len: u32,
    /// First byte, if the table is in one region without a residency map.
    host: Option<NonNull<u8>>,
}

impl GuestMemory {
    /// The table of `len` bytes at `gpa`. Touches none of it.
    #[inline]
    pub fn indirect_table(&self, gpa: u64, len: u32) -> IndirectTable<'_> {
        IndirectTable { mem: self, gpa, len, host: self.plain(gpa, u64::from(len)) }
    }
}

impl IndirectTable<'_> {
    /// Descriptor `index`; None outside the table.
    #[inline(always)]
    pub fn descriptor(&self, index: u16) -> Option<Result<Descriptor, AccessError>> {
        let offset = u32::from(index) * DESC_SIZE;
        if offset + DESC_SIZE > self.len {
            return None;
        }
        match self.host {
            // SAFETY: `offset + 16 <= len`, all of which is mapped and needs no residency check.
            Some(host) => Some(Ok(unsafe { load_descriptor(host.add(offset as usize)) })),
            None => Some(self.read_slowly(offset)),
        }
    }

    #[cold]
    fn read_slowly(&self, offset: u32) -> Result<Descriptor, AccessError> {
        let gpa = self
            .gpa
            .checked_add(u64::from(offset))
            .ok_or(AccessError::OutOfRange { gpa: self.gpa, len: u64::from(self.len) })?;
        let mut bytes = [0; DESC_SIZE as usize];
        self.mem.read(gpa, &mut bytes)?;
        // SAFETY: 16 bytes of our own.
        Ok(unsafe { load_descriptor(NonNull::from(&mut bytes).cast()) })
    }
}

/// # Safety
/// `at` must be valid for reads of 16 bytes.
#[inline(always)]
unsafe fn load_descriptor(at: NonNull<u8>) -> Descriptor {
    // SAFETY: the caller vouches for 16 bytes.
    let (addr, rest) = unsafe { copy::load_two_words(at.as_ptr()) };
    Descriptor::new(addr, rest as u32, (rest >> 32) as u16, (rest >> 48) as u16)
}
