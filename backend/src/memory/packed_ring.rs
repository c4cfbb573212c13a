//! The memory of one packed virtqueue (VIRTIO 1.3 §2.8): descriptor ring, driver and device event suppression structure; and
//! indirect tables, whose entries have the same format. Element accesses only; what the values mean is for `virtq`.
//!
//! ```text
//! descriptor (§2.8.13)                               event suppression structure (§2.8.14)
//! +0  addr: le64                                     +0 off_wrap: le16   offset, wrap counter in bit 15
//! +8  len: le32   +12 id: le16   +14 flags: le16     +2 flags: le16      0 enable, 1 disable, 2 at this descriptor
//! ```
//! Length, id and flags share an aligned word, which is loaded and stored as one: a descriptor cannot change between
//! the look at its flags and that at its length, and a used one takes one store.
//!
//! Orderings: that word is loaded with acquire, before the address and before the descriptors behind it; it is stored with release,
//! after all that a used descriptor stands for. An event structure is one word as well, loaded and stored relaxed; its
//! users put the full fence that §2.8.21 needs between a store and the load that follows.

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::dirty::DirtyLog;
use super::hint;
use super::ring::{DESC_SIZE, MAX_QUEUE_SIZE, RingError, RingLayout, RingPart};
use super::ring_parts::{Area, DESC_ALIGN, Parts};
use super::{AccessError, GuestMemory, MissingRange, copy};

/// Bytes of an event suppression structure.
const EVENT_SIZE: u64 = 4;
const EVENT_ALIGN: u64 = 4;
/// Where length, id and flags are in a descriptor.
const WORD: usize = 8;

/// The descriptor goes on with the next.
pub const NEXT: u16 = 1;
/// The device may write there, or has.
pub const WRITE: u16 = 2;
/// It names a table.
pub const INDIRECT: u16 = 4;
/// Equal to the driver's wrap counter: available. Equal to [`USED`]: used.
pub const AVAIL: u16 = 1 << 7;
/// See [`AVAIL`].
pub const USED: u16 = 1 << 15;

/// Lengths of the parts, bytes.
pub(super) fn lens(entries: u64) -> [u64; 3] {
    [entries * u64::from(DESC_SIZE), EVENT_SIZE, EVENT_SIZE]
}

/// Length, id and flags of a descriptor, as they were at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word(u64);

impl Word {
    /// From its fields.
    #[inline(always)]
    pub fn new(len: u32, id: u16, flags: u16) -> Self {
        Self(u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48)
    }

    /// The same with another id.
    #[inline(always)]
    pub fn with_id(self, id: u16) -> Self {
        Self(self.0 & !(0xffff << 32) | u64::from(id) << 32)
    }

    /// Bytes of the buffer, or of the part that was written.
    #[inline(always)]
    pub fn bytes(self) -> u32 {
        self.0 as u32
    }

    /// Buffer id.
    #[inline(always)]
    pub fn id(self) -> u16 {
        (self.0 >> 32) as u16
    }

    /// All flags.
    #[inline(always)]
    pub fn flags(self) -> u16 {
        (self.0 >> 48) as u16
    }

    /// True if one of `flags` is set.
    #[inline(always)]
    pub fn has(self, flags: u16) -> bool {
        self.0 & (u64::from(flags) << 48) != 0
    }

    /// True if of the flags in `mask` exactly those in `wanted` are set.
    #[inline(always)]
    pub fn matches(self, mask: u16, wanted: u16) -> bool {
        self.0 & (u64::from(mask) << 48) == u64::from(wanted) << 48
    }
}

/// A packed ring's memory. Reads nothing until [`PackedView::access`] found all of it present.
#[derive(Debug)]
pub struct PackedView {
    desc: NonNull<u8>,
    driver: NonNull<u8>,
    device: NonNull<u8>,
    size: u32,
    log: Option<Arc<DirtyLog>>,
    parts: Parts,
}

// SAFETY: the pointers lead into mappings that `parts` keeps alive, and are not tied to a thread.
unsafe impl Send for PackedView {}

impl PackedView {
    /// Finds the ring in `mem`. Touches none of it.
    pub fn new(mem: &GuestMemory, layout: &RingLayout) -> Result<Self, RingError> {
        let size = layout.size;
        if size == 0 || size > MAX_QUEUE_SIZE {
            return Err(RingError::PackedSize(size));
        }
        let [desc_len, driver_len, device_len] = lens(size.into());
        let areas = [
            Area::new(mem, RingPart::Descriptors, layout.desc_user, desc_len, DESC_ALIGN)?,
            Area::new(mem, RingPart::DriverEvent, layout.avail_user, driver_len, EVENT_ALIGN)?,
            Area::new(mem, RingPart::DeviceEvent, layout.used_user, device_len, EVENT_ALIGN)?,
        ];
        Ok(Self {
            desc: areas[0].host,
            driver: areas[1].host,
            device: areas[2].host,
            size: size.into(),
            // The descriptor ring is written as well, and there is no address to log that at but its own. (DPDK logs it at the
            // address of the used ring, where QEMU has the device event structure.)
            log: mem.log().cloned(),
            parts: Parts::new(areas),
        })
    }

    /// The ring, if all its pages are present. Once it is, this is one predictable branch.
    #[inline(always)]
    pub fn access(&mut self) -> Result<PackedAccess<'_>, MissingRange> {
        self.parts.check()?;
        Ok(PackedAccess { view: self })
    }

    /// The ring, of which all pages are known to be present: [`Self::access`] has said so, or said so of the view that this
    /// one has replaced. (Were they not, an access would wait for them.)
    #[inline(always)]
    pub fn access_known(&self) -> PackedAccess<'_> {
        self.parts.assume_present();
        PackedAccess { view: self }
    }

    /// Calls `visit` for each run of missing pages under the ring.
    pub fn for_each_missing(&self, visit: impl FnMut(MissingRange)) {
        self.parts.for_each_missing(visit);
    }

    /// Entries.
    #[inline(always)]
    pub fn size(&self) -> u32 {
        self.size
    }
}

/// Element access to a packed ring that is wholly present. Slots are below [`PackedView::size`].
#[derive(Clone, Copy)]
pub struct PackedAccess<'a> {
    view: &'a PackedView,
}

impl<'a> PackedAccess<'a> {
    /// The descriptors from `first` to the end of the ring.
    #[inline(always)]
    pub fn slots_from(self, first: u32) -> Slots<'a> {
        Slots { next: self.slot(first), left: self.view.size - first }
    }

    /// The descriptor in `slot`.
    #[inline(always)]
    pub fn slot(self, slot: u32) -> Slot<'a> {
        Slot { at: self.desc(slot), _ring: PhantomData }
    }

    /// Length, id and flags in `slot`, acquire.
    #[inline(always)]
    pub fn word(self, slot: u32) -> Word {
        self.slot(slot).word()
    }

    /// The address in `slot`.
    #[inline(always)]
    pub fn addr(self, slot: u32) -> u64 {
        self.slot(slot).addr()
    }

    /// Stores length, id and flags in `slot`, release. Not logged: see [`Self::log_slots`].
    #[inline(always)]
    pub fn store(self, slot: u32, word: Word) {
        self.slot(slot).store(word);
    }

    /// Logs that `count` slots from `first` on, round the end of the ring, were written.
    #[inline(always)]
    pub fn log_slots(self, first: u32, count: u32) {
        if let Some(log) = &self.view.log {
            self.mark_slots(log, first, count);
        }
    }

    #[cold]
    fn mark_slots(self, log: &DirtyLog, first: u32, count: u32) {
        let count = count.min(self.view.size);
        let until_end = count.min(self.view.size - first);
        let bytes = |slots: u32| u64::from(slots) * u64::from(DESC_SIZE);
        let gpa = self.view.parts.gpa(0);
        log.mark(gpa + bytes(first), bytes(until_end));
        log.mark(gpa, bytes(count - until_end));
    }

    /// What the driver wants to be notified of: offset and wrap counter, flags.
    #[inline(always)]
    pub fn driver_event(self) -> (u16, u16) {
        // SAFETY: four bytes, 4-aligned and mapped as long as the view.
        let event = unsafe { AtomicU32::from_ptr(self.view.driver.as_ptr().cast()) };
        let event = u32::from_le(event.load(Ordering::Relaxed));
        (event as u16, (event >> 16) as u16)
    }

    /// Says what we want to be notified of.
    #[inline]
    pub fn store_device_event(self, off_wrap: u16, flags: u16) {
        // SAFETY: four bytes, 4-aligned and mapped as long as the view.
        let event = unsafe { AtomicU32::from_ptr(self.view.device.as_ptr().cast()) };
        event.store((u32::from(off_wrap) | u32::from(flags) << 16).to_le(), Ordering::Relaxed);
        if let Some(log) = &self.view.log {
            log.mark(self.view.parts.gpa(2), EVENT_SIZE);
        }
    }

    /// Asks the CPU for the line of `slot`, as a hint.
    #[inline(always)]
    pub fn prefetch(self, slot: u32) {
        hint::read(self.desc(slot).as_ptr());
    }

    /// Asks the CPU for the line of `slot`, which is going to be written, as a hint.
    #[inline(always)]
    pub fn prefetch_write(self, slot: u32) {
        hint::write(self.desc(slot).as_ptr());
    }

    /// Entries.
    #[inline(always)]
    pub fn size(self) -> u32 {
        self.view.size
    }

    /// Where descriptor `slot` begins. Slots come from cursors that stay below the size; one that did not would be caught
    /// here, at the price of a predictable branch.
    #[inline(always)]
    fn desc(self, slot: u32) -> NonNull<u8> {
        assert!(slot < self.view.size, "a slot outside the ring");
        // SAFETY: the slot lies in the ring, which has `size` descriptors of 16 bytes.
        unsafe { self.view.desc.add(slot as usize * DESC_SIZE as usize) }
    }
}

/// A descriptor in the ring.
#[derive(Clone, Copy)]
pub struct Slot<'a> {
    at: NonNull<u8>,
    _ring: PhantomData<&'a PackedView>,
}

impl<'a> Slot<'a> {
    /// Length, id and flags, acquire.
    #[inline(always)]
    pub fn word(self) -> Word {
        Word(u64::from_le(self.atomic().load(Ordering::Acquire)))
    }

    /// The address.
    #[inline(always)]
    pub fn addr(self) -> u64 {
        // SAFETY: the first word of a descriptor in the ring.
        unsafe { copy::load_word(self.at.as_ptr()) }
    }

    /// Stores length, id and flags, release. Not logged: see [`PackedAccess::log_slots`].
    #[inline(always)]
    pub fn store(self, word: Word) {
        self.atomic().store(word.0.to_le(), Ordering::Release);
    }

    #[inline(always)]
    fn atomic(self) -> &'a AtomicU64 {
        // SAFETY: the second word of a descriptor in the ring, which is 16-aligned and mapped as long as the view.
        unsafe { AtomicU64::from_ptr(self.at.add(WORD).as_ptr().cast()) }
    }
}

/// Descriptors that lie one behind the other.
pub struct Slots<'a> {
    next: Slot<'a>,
    left: u32,
}

impl<'a> Iterator for Slots<'a> {
    type Item = Slot<'a>;

    #[inline(always)]
    fn next(&mut self) -> Option<Slot<'a>> {
        self.left = self.left.checked_sub(1)?;
        let slot = self.next;
        // SAFETY: there was one more descriptor; the next one is in the ring, or its end.
        self.next.at = unsafe { self.next.at.add(DESC_SIZE as usize) };
        Some(slot)
    }
}

/// An entry of an indirect table: address, and the rest.
pub type Entry = (u64, Word);

/// An indirect table of a packed ring: wherever the guest likes, aligned or not.
#[derive(Clone, Copy)]
pub struct PackedTable<'m> {
    mem: &'m GuestMemory,
    gpa: u64,
    /// First byte, if the table is in one region without a residency map.
    host: Option<NonNull<u8>>,
    entries: u32,
}

impl GuestMemory {
    /// The table of `entries` descriptors at `gpa`. Touches none of it.
    #[inline]
    pub fn packed_table(&self, gpa: u64, entries: u32) -> PackedTable<'_> {
        let host = self.plain(gpa, u64::from(entries) * u64::from(DESC_SIZE));
        PackedTable { mem: self, gpa, host, entries }
    }
}

impl PackedTable<'_> {
    /// Entry `index`; None outside the table.
    #[inline(always)]
    pub fn entry(&self, index: u32) -> Option<Result<Entry, AccessError>> {
        if index >= self.entries {
            return None;
        }
        match self.host {
            Some(host) => {
                // SAFETY: `index < entries`, all of which are mapped and need no residency check.
                let (addr, rest) =
                    unsafe { copy::load_two_words(host.add((index * DESC_SIZE) as usize).as_ptr()) };
                Some(Ok((addr, Word(rest))))
            }
            None => Some(self.read_slowly(index)),
        }
    }

    #[cold]
    fn read_slowly(&self, index: u32) -> Result<Entry, AccessError> {
        let len = u64::from(self.entries) * u64::from(DESC_SIZE);
        let gpa = self
            .gpa
            .checked_add(u64::from(index) * u64::from(DESC_SIZE))
            .ok_or(AccessError::OutOfRange { gpa: self.gpa, len })?;
        let mut bytes = [0; DESC_SIZE as usize];
        self.mem.read(gpa, &mut bytes)?;
        // SAFETY: 16 bytes of our own.
        let (addr, rest) = unsafe { copy::load_two_words(bytes.as_ptr()) };
        Ok((addr, Word(rest)))
    }
}
