//! Memory that somebody else may change at any time: guest memory, and the source's copy of it.
//!
//! Loads and stores are checked against the length and done through raw pointers; no reference into it exists.
//! Also here: which pages of a file have content. Not here: where things lie in it.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use nix::unistd::{Whence, lseek};

/// Size of a small page, in bytes.
pub const PAGE: u64 = 4096;

/// A mapping of this process, page aligned.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<libc::c_void>,
    len: u64,
}

// SAFETY: the memory belongs to the mapping, not to a thread; all access is by atomics or by copies between raw
// pointers, whose content is never trusted to stay the same.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// All of a file, shared, in small pages. Nothing is touched.
    pub fn of_file(file: &File, len: u64) -> io::Result<Self> {
        let size = Self::size(len)?;
        let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let base = unsafe { mmap(None, size, both, MapFlags::MAP_SHARED, file, 0) }?;
        let it = Self { base, len };
        // SAFETY: the advice changes no content. A kernel without huge pages refuses it: as good.
        let _ = unsafe { madvise(it.base, size.get(), MmapAdvise::MADV_NOHUGEPAGE) };
        Ok(it)
    }

    /// Private memory of zeros.
    pub fn private(len: u64) -> io::Result<Self> {
        let size = Self::size(len)?;
        let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: as in `of_file`.
        let base = unsafe { mmap_anonymous(None, size, both, MapFlags::MAP_PRIVATE) }?;
        Ok(Self { base, len })
    }

    fn size(len: u64) -> io::Result<NonZeroUsize> {
        usize::try_from(len)
            .ok()
            .and_then(NonZeroUsize::new)
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Where it lies in this process: QEMU's "user address".
    pub fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Pointer to `size` bytes at an offset. Panics if they do not all lie inside: the offsets are this program's own.
    pub fn pointer(&self, at: u64, size: u64) -> *mut u8 {
        assert!(size <= self.len && at <= self.len - size, "{at:#x}+{size} in {} bytes", self.len);
        // SAFETY: the offset was just checked to lie inside the mapping.
        unsafe { self.base.as_ptr().cast::<u8>().add(at as usize) }
    }

    fn word<T>(&self, at: u64) -> *mut T {
        let pointer = self.pointer(at, size_of::<T>() as u64).cast::<T>();
        assert!(pointer.is_aligned(), "{at:#x} is not aligned");
        pointer
    }

    /// A 16-bit word; what the other side wrote before it is seen after it.
    pub fn load_u16(&self, at: u64) -> u16 {
        // SAFETY: `word` checked place and alignment; the mapping lives as long as `self`.
        u16::from_le(unsafe { AtomicU16::from_ptr(self.word(at)) }.load(Ordering::Acquire))
    }

    /// Stores a 16-bit word behind everything that was written before.
    pub fn store_u16(&self, at: u64, value: u16) {
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU16::from_ptr(self.word(at)) }.store(value.to_le(), Ordering::Release);
    }

    /// A 32-bit word, in no order.
    pub fn load_u32(&self, at: u64) -> u32 {
        // SAFETY: as in `load_u16`.
        u32::from_le(unsafe { AtomicU32::from_ptr(self.word(at)) }.load(Ordering::Relaxed))
    }

    /// Stores a 32-bit word, in no order.
    pub fn store_u32(&self, at: u64, value: u32) {
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU32::from_ptr(self.word(at)) }.store(value.to_le(), Ordering::Relaxed);
    }

    /// Stores a 64-bit word, in no order.
    pub fn store_u64(&self, at: u64, value: u64) {
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU64::from_ptr(self.word(at)) }.store(value.to_le(), Ordering::Relaxed);
    }

    /// Copies bytes out.
    pub fn read(&self, at: u64, bytes: &mut [u8]) {
        let from = self.pointer(at, bytes.len() as u64);
        // SAFETY: the source was checked to lie in the mapping, and `bytes`, being a reference, is not part of it.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Copies bytes in.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        let to = self.pointer(at, bytes.len() as u64);
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing can reach into it any more: all access borrows `self`.
        let _ = unsafe { munmap(self.base, self.len as usize) };
    }
}

/// For each page of a tmpfs file, whether it has content. Nothing is touched.
pub fn pages_with_content(file: &File, len: u64) -> io::Result<Vec<bool>> {
    let mut found = vec![false; (len / PAGE) as usize];
    let mut at = 0;
    while at < len {
        let start = match lseek(file.as_fd(), at as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = lseek(file.as_fd(), start as i64, Whence::SeekHole)? as u64;
        for page in start / PAGE..end.min(len).div_ceil(PAGE) {
            found[page as usize] = true;
        }
        at = end;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    #[test]
    fn holes_are_told_from_content_without_touching() {
        let file = File::from(memfd_create("holes", MFdFlags::MFD_CLOEXEC).expect("memfd"));
        file.set_len(8 * PAGE).expect("length");
        let map = Mapping::of_file(&file, 8 * PAGE).expect("map");
        assert_eq!(pages_with_content(&file, map.len()).expect("seek"), [false; 8]);
        map.store_u16(2 * PAGE, 0x1234);
        map.write(7 * PAGE + 4000, &[7; 96]);
        let found = pages_with_content(&file, map.len()).expect("seek");
        assert_eq!(found, [false, false, true, false, false, false, false, true]);
        assert_eq!(map.load_u16(2 * PAGE), 0x1234);
    }

    #[test]
    #[should_panic(expected = "in 4096 bytes")]
    fn nothing_outside_is_reached() {
        Mapping::private(PAGE).expect("map").load_u16(PAGE - 1);
    }
}
