//! The four rings of an AF_XDP socket, as far as the bare loops need them: one thread, cached indices.
//! Not here: set-up (`socket`).

use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};

/// Memory that is unmapped when dropped.
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

impl Mapping {
    /// Anonymous memory, zeroed and populated.
    pub fn anonymous(len: usize) -> Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        Self::map(len, flags, -1, 0)
    }

    fn map(len: usize, flags: i32, fd: i32, offset: libc::off_t) -> Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that exists.
        let p = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, offset) };
        ensure!(p != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Ok(Self { start: NonNull::new(p.cast()).context("mmap gave null")?, len })
    }

    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and its owner is going away.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// One ring of `T`, seen from user space: a producer for FILL and TX, a consumer for RX and COMPLETION.
pub struct Ring<T> {
    mapping: Mapping,
    producer: usize,
    consumer: usize,
    entries: usize,
    mask: u32,
    /// Our own index.
    mine: u32,
    /// The kernel's index as last read.
    theirs: u32,
    kind: std::marker::PhantomData<T>,
}

impl<T: Copy> Ring<T> {
    /// Maps a ring of `size` entries (a power of two) that the socket was given before.
    pub fn map(fd: &OwnedFd, page: libc::off_t, at: &libc::xdp_ring_offset, size: u32) -> Result<Self> {
        let len = at.desc as usize + size as usize * size_of::<T>();
        let mapping = Mapping::map(len, libc::MAP_SHARED | libc::MAP_POPULATE, fd.as_raw_fd(), page)?;
        Ok(Self {
            mapping,
            producer: at.producer as usize,
            consumer: at.consumer as usize,
            entries: at.desc as usize,
            mask: size - 1,
            mine: 0,
            theirs: 0,
            kind: std::marker::PhantomData,
        })
    }

    fn index(&self, at: usize) -> &AtomicU32 {
        // SAFETY: the kernel says that a 4-byte aligned index lies there, inside the mapping; it is shared with the
        // kernel only.
        unsafe { &*self.mapping.as_ptr().add(at).cast::<AtomicU32>() }
    }

    fn slot(&self, index: u32) -> *mut T {
        let offset = self.entries + (index & self.mask) as usize * size_of::<T>();
        // SAFETY: a masked index lies inside the mapping, whose length was computed from the ring's size.
        unsafe { self.mapping.as_ptr().add(offset).cast() }
    }

    /// Producer: writes an entry; there must be room: no more entries are in use than frames exist.
    pub fn push(&mut self, entry: T) {
        // SAFETY: the slot is inside the mapping and the kernel does not read it before it is published.
        unsafe { self.slot(self.mine).write(entry) };
        self.mine = self.mine.wrapping_add(1);
    }

    /// Producer: lets the kernel see what was pushed.
    pub fn publish(&self) {
        self.index(self.producer).store(self.mine, Ordering::Release);
    }

    /// Consumer: the next entry.
    pub fn pop(&mut self) -> Option<T> {
        if self.mine == self.theirs {
            self.theirs = self.index(self.producer).load(Ordering::Acquire);
            if self.mine == self.theirs {
                return None;
            }
        }
        // SAFETY: the kernel has published this slot and does not write it before it is released.
        let entry = unsafe { self.slot(self.mine).read() };
        self.mine = self.mine.wrapping_add(1);
        Some(entry)
    }

    /// Consumer: gives the slots of what was popped back.
    pub fn release(&self) {
        self.index(self.consumer).store(self.mine, Ordering::Release);
    }
}
