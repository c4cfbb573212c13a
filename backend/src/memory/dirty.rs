//! The dirty log of a precopy migration source: one bit per 4 KiB guest page, in memory shared with the front-end
//! (vhost-user: Migration). Which writes are to be logged is decided elsewhere; here they are marked.

use nix::unistd::{Whence, lseek};
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};

use super::MapError;
use super::mapping::SharedMap;

/// Bytes of guest memory per bit of the log, whatever the page sizes of host and guest are.
pub const LOG_PAGE_SIZE: u64 = 4096;

/// Bytes of a log at most: enough for a guest of 32 TiB.
pub const LOG_BYTES_MAX: u64 = 1 << 30;

/// The log of SET_LOG_BASE, mapped. Unmapped on drop, on the control helper thread.
#[derive(Debug)]
pub struct DirtyLog {
    map: SharedMap,
    /// Bytes of the log; the mapping may be longer.
    size: u64,
    /// Where it begins in its file.
    offset: u64,
    beyond: AtomicU64,
}

impl DirtyLog {
    /// Maps `size` bytes of `fd` at `offset`, with the same checks as a memory region. May sleep.
    pub fn new(fd: OwnedFd, size: u64, offset: u64) -> Result<Self, MapError> {
        if size > LOG_BYTES_MAX {
            return Err(MapError::LogTooLarge { size, max: LOG_BYTES_MAX });
        }
        Ok(Self { map: SharedMap::new(fd, offset, size)?, size, offset, beyond: AtomicU64::new(0) })
    }

    /// Marks the pages of `len` bytes at guest-physical `gpa`. Call it **after** the write: a front-end that clears
    /// a bit copies the page afterwards.
    #[inline]
    pub fn mark(&self, gpa: u64, len: u64) {
        if len == 0 {
            return;
        }
        // The write must be visible before a bit is seen as set already and left alone; otherwise the front-end could
        // clear that bit and copy the page without it. Orders the `fetch_or` below as well.
        fence(Ordering::SeqCst);
        let last = gpa.saturating_add(len - 1) / LOG_PAGE_SIZE;
        let mut page = gpa / LOG_PAGE_SIZE;
        loop {
            let Some(byte) = self.byte(page) else {
                self.beyond.fetch_add(last - page + 1, Ordering::Relaxed);
                return;
            };
            let bit = 1 << (page % 8);
            if byte.load(Ordering::Relaxed) & bit == 0 {
                byte.fetch_or(bit, Ordering::Release);
            }
            if page == last {
                return;
            }
            page += 1;
        }
    }

    /// Marks everything that is marked in `old`, a log that this one replaces and that nobody writes any more. Takes its
    /// time with a large log: control helper thread only.
    pub fn absorb(&self, old: &DirtyLog) {
        let end = old.size.min(self.size);
        let mut index = 0;
        // Holes are skipped: there is nothing in them, and a look would fill them with pages.
        while let Some(data) = old.data_from(index).filter(|data| data.start < end) {
            index = data.end.max(data.start + 1);
            for byte in data.start..data.end.min(end) {
                let (Some(from), Some(to)) = (old.byte(byte * 8), self.byte(byte * 8)) else { return };
                let bits = from.load(Ordering::Acquire);
                if bits != 0 {
                    to.fetch_or(bits, Ordering::Release);
                }
            }
        }
    }

    /// The next bytes of the log, from `index` on, that its file has.
    fn data_from(&self, index: u64) -> Option<std::ops::Range<u64>> {
        let at = |from: u64, whence| {
            let found = lseek(self.map.file(), i64::try_from(from).ok()?, whence).ok()?;
            u64::try_from(found).ok()
        };
        let start = at(self.offset + index, Whence::SeekData)?;
        let end = at(start, Whence::SeekHole)?;
        Some(start.checked_sub(self.offset)?..end.checked_sub(self.offset)?)
    }

    /// Pages that were written but lie beyond the log; not 0 means the front-end made it too small.
    pub fn beyond(&self) -> u64 {
        self.beyond.load(Ordering::Relaxed)
    }

    /// Bytes of the log.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// True once the log was truncated under us.
    #[inline]
    pub fn poisoned(&self) -> bool {
        self.map.poisoned()
    }

    #[inline]
    fn byte(&self, page: u64) -> Option<&AtomicU8> {
        let index = page / 8;
        if index >= self.size {
            return None;
        }
        let byte: NonNull<u8> = self.map.addr();
        // SAFETY: `index < size`, which is inside the mapping that lives as long as `self`. The front-end accesses
        // it atomically as well, and an AtomicU8 makes no assumption about the value.
        Some(unsafe { AtomicU8::from_ptr(byte.as_ptr().add(index as usize)) })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;

    fn log(size: u64) -> (DirtyLog, std::fs::File) {
        let file = testing::memfd(size);
        (DirtyLog::new(file.try_clone().unwrap().into(), size, 0).unwrap(), file)
    }

    #[test]
    fn one_bit_per_4k_page_lowest_first() {
        let (log, file) = log(16);
        log.mark(0x9fff, 2);
        log.mark(0x0, 1);
        log.mark(0x4000, 0);
        let bytes = testing::contents(&file);
        assert_eq!(&bytes[..3], &[0b0000_0001, 0b0000_0110, 0]);
        assert_eq!(log.beyond(), 0);
    }

    #[test]
    fn pages_beyond_the_log_are_counted_not_written() {
        let (log, file) = log(1);
        log.mark(7 * 4096, 3 * 4096);
        log.mark(u64::MAX - 10, u64::MAX);
        assert_eq!(testing::contents(&file)[0], 0x80);
        assert_eq!(log.beyond(), 3);
    }

    #[test]
    fn a_new_log_takes_over_what_the_old_one_has() {
        let (old, _) = log(16);
        let (new, file) = log(32);
        old.mark(0x3000, 1);
        old.mark(127 * 4096, 1);
        new.mark(0x0, 1);
        new.absorb(&old);
        let bytes = testing::contents(&file);
        assert_eq!((bytes[0], bytes[15], bytes[16]), (0b1001, 0x80, 0));
    }

    #[test]
    fn a_log_whose_file_is_too_small_is_refused() {
        let file = testing::memfd(4096);
        assert_eq!(
            DirtyLog::new(file.into(), 4097, 0).unwrap_err(),
            MapError::FileTooSmall { file_size: 4096, needed: 4097 }
        );
    }
}
