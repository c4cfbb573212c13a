//! Buffers that lie close together: the region of the last one is tried first. Of a burst's buffers nearly all are in the same
//! region, which then costs one comparison and no load.

use super::guest::GuestMemory;
use super::hint;
use super::iovec::IoVec;
use std::ptr::NonNull;

/// A cache line, as far as prefetching goes, bytes.
const LINE: usize = 64;

/// Finds buffers in guest memory of which everything is present.
pub struct Nearby<'m> {
    memory: &'m GuestMemory,
    start: u64,
    size: u64,
    host: NonNull<u8>,
}

impl<'m> Nearby<'m> {
    /// Begins without a region.
    #[inline]
    pub fn new(memory: &'m GuestMemory) -> Self {
        Self { memory, start: 0, size: 0, host: NonNull::dangling() }
    }

    /// `len` bytes at guest-physical `gpa`, if one region holds them all and nothing of it can be missing. Otherwise
    /// [`GuestMemory::push_iovecs`] knows what is there.
    #[inline(always)]
    pub fn find(&mut self, gpa: u64, len: u32) -> Option<IoVec<'m>> {
        if gpa.wrapping_sub(self.start) >= self.size {
            (self.start, self.size, self.host) = self.memory.whole_region(gpa)?;
        }
        let offset = gpa - self.start;
        if u64::from(len) > self.size - offset {
            return None;
        }
        // SAFETY: `offset < size`, and `host` is the start of a mapping of `size` bytes that lives as long as the memory.
        let at = unsafe { self.host.add(offset as usize) };
        Some(IoVec::new(at.as_ptr(), len as usize))
    }
}

impl<'m> IoVec<'m> {
    /// Copies the first `N` bytes out, each read once, and returns what is behind them; `None` if there are not as many.
    #[inline(always)]
    pub fn take_front<const N: usize>(self) -> Option<([u8; N], IoVec<'m>)> {
        let rest = self.len().checked_sub(N)?;
        let mut front = [0; N];
        // SAFETY: an entry is memory that stays mapped while it lives, and has `N` bytes.
        unsafe { super::copy::from_guest(self.base(), &mut front) };
        // SAFETY: `N` bytes further is within the entry, or its end.
        Some((front, IoVec::new(unsafe { self.base().add(N) }, rest)))
    }

    /// Asks the CPU for its first `lines` lines, as a hint.
    #[inline(always)]
    pub fn prefetch(&self, lines: usize) {
        for line in 0..lines {
            hint::read(self.base().wrapping_add(line * LINE));
        }
    }
}
