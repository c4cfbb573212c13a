//! The memory table of a guest as an immutable snapshot: translation, small copies, buffers for the kernel.
//! A new table, log or residency is a new snapshot; operations in flight keep theirs, and with it the mappings.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::copy;
use super::dirty::DirtyLog;
use super::hint;
use super::iovec::{IoVec, IoVecs};
use super::mapping::Mapping;
use super::residency::ResidencyMap;
use super::{AccessError, LayoutError, MissingRange};

/// Regions of one guest: what QEMU can have (512 memory slots, some kept for itself).
pub const MAX_REGIONS: usize = 509;

/// A snapshot of a guest's memory. Cheap to clone.
#[derive(Clone)]
pub struct GuestMemory {
    table: Arc<Table>,
}

#[derive(Clone)]
struct Table {
    /// Sorted by `start`, without overlaps.
    regions: Box<[Region]>,
    /// In the order given; `Region::mapping` points into it.
    mappings: Box<[Arc<Mapping>]>,
    log: Option<Arc<DirtyLog>>,
    /// Pages of some region may be missing.
    incomplete: bool,
}

#[derive(Clone)]
struct Region {
    /// Guest-physical address of the first byte.
    start: u64,
    size: u64,
    /// The size again if everything is present, else 0: so that the search for a region that need not be asked about its
    /// pages passes this one over, and costs no more than a search.
    whole: u64,
    host: NonNull<u8>,
    /// None = everything is present.
    residency: Option<Arc<ResidencyMap>>,
    mapping: usize,
}

// SAFETY: `Table` owns the mappings that the pointers of its regions lead into; accesses through them are volatile,
// atomic, or done by the kernel, so they need no thread of their own.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

/// A part of one region that is present.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) host: NonNull<u8>,
    pub(super) len: u64,
}

/// Where front-end user addresses lie.
pub(super) struct Found<'a> {
    pub(super) mapping: &'a Arc<Mapping>,
    pub(super) residency: Option<&'a Arc<ResidencyMap>>,
    /// Bytes from the start of the region.
    pub(super) offset: u64,
}

impl Region {
    /// The part of `len` bytes at `gpa` that this region holds; `gpa` lies in it.
    #[inline]
    fn piece(&self, gpa: u64, len: u64) -> Piece {
        let offset = gpa - self.start;
        // SAFETY: `offset < size`, and `host` is the start of a mapping of `size` bytes.
        Piece { host: unsafe { self.host.add(offset as usize) }, len: len.min(self.size - offset) }
    }

    /// Whether all of that part is present.
    fn check_present(&self, gpa: u64, len: u64) -> Result<(), MissingRange> {
        let offset = gpa - self.start;
        let range: Range<u64> = offset..offset + len.min(self.size - offset);
        match self.residency.as_ref().and_then(|map| map.first_missing(range)) {
            None => Ok(()),
            Some(gap) => Err(MissingRange { gpa: self.start + gap.start, len: gap.end - gap.start }),
        }
    }
}

impl GuestMemory {
    /// A guest without memory: before the first table, and after a reset.
    pub fn empty() -> Self {
        Self {
            table: Arc::new(Table { regions: [].into(), mappings: [].into(), log: None, incomplete: false }),
        }
    }

    /// A table of these regions, in any order.
    pub fn new(mappings: Vec<Arc<Mapping>>) -> Result<Self, LayoutError> {
        if mappings.len() > MAX_REGIONS {
            return Err(LayoutError::TooMany(mappings.len()));
        }
        let guest_ranges = mappings.iter().map(|m| (m.spec().guest_phys, m.spec().size));
        check_disjoint(guest_ranges, LayoutError::GuestOverlap)?;
        let user_ranges = mappings.iter().map(|m| (m.spec().user_addr, m.spec().size));
        check_disjoint(user_ranges, LayoutError::UserOverlap)?;
        let mut regions: Box<[Region]> = mappings
            .iter()
            .enumerate()
            .map(|(mapping, m)| Region {
                start: m.spec().guest_phys,
                size: m.spec().size,
                whole: m.spec().size,
                host: m.host(),
                residency: None,
                mapping,
            })
            .collect();
        regions.sort_unstable_by_key(|region| region.start);
        Ok(Self {
            table: Arc::new(Table { regions, mappings: mappings.into(), log: None, incomplete: false }),
        })
    }

    /// The same memory, with writes logged to `log`, or no longer.
    pub fn with_log(&self, log: Option<Arc<DirtyLog>>) -> Self {
        Self { table: Arc::new(Table { log, ..Table::clone(&self.table) }) }
    }

    /// The same memory, of which pages may be missing: one map per region in the order of [`Self::mappings`]; where
    /// it is None or absent, everything is present.
    pub fn with_residency(&self, maps: &[Option<Arc<ResidencyMap>>]) -> Self {
        let mut table = Table::clone(&self.table);
        for region in &mut table.regions {
            region.residency = maps.get(region.mapping).cloned().flatten();
            region.whole = if region.residency.is_some() { 0 } else { region.size };
        }
        table.incomplete = table.regions.iter().any(|region| region.residency.is_some());
        Self { table: Arc::new(table) }
    }

    /// The regions, in the order given.
    pub fn mappings(&self) -> &[Arc<Mapping>] {
        &self.table.mappings
    }

    /// The dirty log, while writes are logged.
    pub fn log(&self) -> Option<&Arc<DirtyLog>> {
        self.table.log.as_ref()
    }

    /// Whether writes are logged: saves the caller work that is for [`Self::mark_written`] only.
    #[inline]
    pub fn log_on(&self) -> bool {
        self.table.log.is_some()
    }

    /// True once a file of this memory, or its log, was truncated under us: what was read since may be zeros.
    #[inline]
    pub fn poisoned(&self) -> bool {
        super::sigbus::faults() != 0
            && (self.table.mappings.iter().any(|m| m.poisoned())
                || self.table.log.as_ref().is_some_and(|log| log.poisoned()))
    }

    /// Appends `len` bytes at guest-physical `gpa` to `out`, one entry per region they lie in. On an error nothing is
    /// appended. No bytes: nothing to append.
    #[inline]
    pub fn push_iovecs<'m>(&'m self, gpa: u64, len: u32, out: &mut IoVecs<'m>) -> Result<(), AccessError> {
        let len = u64::from(len);
        let before = out.len();
        let result = self.for_each_piece(gpa, len, |piece| {
            if out.push(IoVec::new(piece.host.as_ptr(), piece.len as usize)) {
                Ok(())
            } else {
                Err(AccessError::Full)
            }
        });
        if result.is_err() {
            out.truncate(before);
        }
        result
    }

    /// Copies `buf.len()` bytes out of the guest. On an error the contents of `buf` are unspecified.
    #[inline]
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), AccessError> {
        let mut done = 0;
        self.for_each_piece(gpa, buf.len() as u64, |piece| {
            let next = done + piece.len as usize;
            // SAFETY: the piece is mapped and present for `piece.len` bytes while `self` lives.
            unsafe { copy::from_guest(piece.host.as_ptr(), &mut buf[done..next]) };
            done = next;
            Ok(())
        })
    }

    /// Copies `buf` into the guest and logs the pages as dirty. On an error nothing is written.
    #[inline]
    pub fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), AccessError> {
        let len = buf.len() as u64;
        let whole = self.piece(gpa, len)?;
        if whole.len != len {
            // In several regions: look at all of them before the first byte is written.
            self.for_each_piece(gpa, len, |_| Ok(()))?;
        }
        let mut done = 0;
        self.for_each_piece(gpa, len, |piece| {
            let next = done + piece.len as usize;
            // SAFETY: the piece is mapped and present for `piece.len` bytes while `self` lives.
            unsafe { copy::to_guest(piece.host.as_ptr(), &buf[done..next]) };
            done = next;
            Ok(())
        })?;
        if let Some(log) = &self.table.log {
            log.mark(gpa, len);
        }
        Ok(())
    }

    /// Whether `len` bytes at `gpa` are guest memory and present.
    #[inline]
    pub fn check(&self, gpa: u64, len: u32) -> Result<(), AccessError> {
        self.for_each_piece(gpa, u64::from(len), |_| Ok(()))
    }

    /// Whether pages may be missing: false outside postcopy.
    #[inline]
    pub fn is_incomplete(&self) -> bool {
        self.table.incomplete
    }

    /// Calls `visit` for each run of missing pages that `len` bytes at `gpa` meet. Bytes outside guest memory are passed
    /// over.
    pub fn for_each_missing(&self, gpa: u64, len: u64, mut visit: impl FnMut(MissingRange)) {
        let end = gpa.saturating_add(len);
        let mut at = gpa;
        while at < end {
            let Some(region) = self.table.find(at, |region| region.size) else { return };
            let region_end = region.start + region.size;
            let stop = end.min(region_end) - region.start;
            let mut offset = at - region.start;
            while let Some(gap) = region.residency.as_ref().and_then(|map| map.first_missing(offset..stop)) {
                visit(MissingRange { gpa: region.start + gap.start, len: gap.end - gap.start });
                offset = gap.end;
            }
            at = region_end;
        }
    }

    /// Which mapping holds `gpa` (its place in [`Self::mappings`]), and how far from the mapping's start, bytes.
    pub fn locate(&self, gpa: u64) -> Option<(usize, u64)> {
        self.table.find(gpa, |region| region.size).map(|region| (region.mapping, gpa - region.start))
    }

    /// Logs `len` bytes at `gpa` as dirty, after the kernel wrote there (a read from a tap).
    #[inline]
    pub fn mark_written(&self, gpa: u64, len: u32) {
        if let Some(log) = &self.table.log {
            log.mark(gpa, u64::from(len));
        }
    }

    /// Asks the CPU for the line at `gpa`, as a hint. Of no effect outside guest memory or on missing pages.
    #[inline]
    pub fn prefetch(&self, gpa: u64) {
        if let Ok(piece) = self.piece(gpa, 1) {
            hint::read(piece.host.as_ptr());
        }
    }

    /// As [`Self::prefetch`], for a line that is going to be written.
    #[inline]
    pub fn prefetch_write(&self, gpa: u64) {
        if let Ok(piece) = self.piece(gpa, 1) {
            hint::write(piece.host.as_ptr());
        }
    }

    /// Calls `visit` for each piece of `len` bytes at `gpa`, in order; stops at the first error.
    #[inline(always)]
    pub(super) fn for_each_piece(
        &self,
        gpa: u64,
        len: u64,
        mut visit: impl FnMut(Piece) -> Result<(), AccessError>,
    ) -> Result<(), AccessError> {
        let piece = self.piece(gpa, len)?;
        if piece.len == len {
            return if len == 0 { Ok(()) } else { visit(piece) };
        }
        let mut done = 0;
        loop {
            let rest = len - done;
            // Does not wrap: all that was visited lies in regions, which end within 64 bits.
            let piece = self.piece(gpa + done, rest).map_err(|error| match error {
                AccessError::OutOfRange { .. } => AccessError::OutOfRange { gpa, len },
                other => other,
            })?;
            visit(piece)?;
            done += piece.len;
            if done == len {
                return Ok(());
            }
        }
    }

    /// What the region of `gpa` holds of `len` bytes there: one byte at least, unless `len` is 0.
    #[inline(always)]
    pub(super) fn piece(&self, gpa: u64, len: u64) -> Result<Piece, AccessError> {
        match self.table.find(gpa, |region| region.whole) {
            Some(region) => Ok(region.piece(gpa, len)),
            None => self.piece_if_present(gpa, len),
        }
    }

    /// Outside postcopy nobody gets here but for an address outside guest memory.
    #[cold]
    fn piece_if_present(&self, gpa: u64, len: u64) -> Result<Piece, AccessError> {
        let region = self.table.find(gpa, |region| region.size);
        let region = region.ok_or(AccessError::OutOfRange { gpa, len })?;
        region.check_present(gpa, len)?;
        Ok(region.piece(gpa, len))
    }

    /// The first of `len` bytes at `gpa` if one region holds them all and everything in it is present.
    #[inline(always)]
    pub(super) fn plain(&self, gpa: u64, len: u64) -> Option<NonNull<u8>> {
        let piece = self.table.find(gpa, |region| region.whole)?.piece(gpa, len);
        (piece.len == len).then_some(piece.host)
    }

    /// The region of `gpa`, if everything in it is present: its start, size, and first byte.
    #[inline]
    pub(super) fn whole_region(&self, gpa: u64) -> Option<(u64, u64, NonNull<u8>)> {
        self.table.find(gpa, |region| region.whole).map(|region| (region.start, region.size, region.host))
    }

    /// The region that holds front-end user addresses `user .. user + len` whole.
    pub(super) fn find_user(&self, user: u64, len: u64) -> Option<Found<'_>> {
        self.table.regions.iter().find_map(|region| {
            let mapping = &self.table.mappings[region.mapping];
            let offset = user.checked_sub(mapping.spec().user_addr)?;
            let inside = offset < region.size && len <= region.size - offset;
            inside.then_some(Found { mapping, residency: region.residency.as_ref(), offset })
        })
    }
}

impl Table {
    /// The region of `gpa`, among those of the size that `size` tells.
    #[inline(always)]
    fn find(&self, gpa: u64, size: impl Fn(&Region) -> u64) -> Option<&Region> {
        // Guests have a few regions (two, mostly) unless memory was hotplugged.
        const LINEAR: usize = 4;
        if self.regions.len() <= LINEAR {
            return self.regions.iter().find(|region| gpa.wrapping_sub(region.start) < size(region));
        }
        self.find_among_many(gpa).filter(|region| gpa - region.start < size(region))
    }

    fn find_among_many(&self, gpa: u64) -> Option<&Region> {
        let after = self.regions.partition_point(|region| region.start <= gpa);
        let region = &self.regions[after.checked_sub(1)?];
        (gpa - region.start < region.size).then_some(region)
    }
}

fn check_disjoint(
    ranges: impl Iterator<Item = (u64, u64)>,
    overlap: impl Fn(u64) -> LayoutError,
) -> Result<(), LayoutError> {
    let mut sorted: Vec<(u64, u64)> = ranges.collect();
    sorted.sort_unstable();
    let mut end = 0;
    for (start, size) in sorted {
        if start < end {
            return Err(overlap(start));
        }
        end = start.checked_add(size).ok_or(LayoutError::Wraps(start))?;
    }
    Ok(())
}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.table.mappings.iter().map(|m| m.spec())).finish()
    }
}
