//! Lists of buffers for the kernel: pieces of guest memory, and of our own. Only the kernel follows them, and the two
//! copies here ([`gather`], [`scatter`]) for uplinks that have memory of their own; what is written into guest memory is
//! reported with [`super::GuestMemory::mark_written`] afterwards.

use super::copy;
use std::marker::PhantomData;

use arrayvec::ArrayVec;

/// Entries one readv/writev takes (UIO_MAXIOV).
pub const MAX_IOVECS: usize = 1024;

/// Entries of an [`IoVecs`]: a frame of the longest kind, and one more being put together.
pub const IOVECS_CAPACITY: usize = 2 * MAX_IOVECS;

/// One buffer, laid out like `struct iovec`. Valid for `'m`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct IoVec<'m> {
    raw: libc::iovec,
    memory: PhantomData<&'m ()>,
}

// SAFETY: an IoVec is an address for the kernel; nothing can be read through it here.
unsafe impl Send for IoVec<'_> {}

impl<'m> IoVec<'m> {
    /// Bytes of our own, to be read.
    #[inline(always)]
    pub fn own(bytes: &'m [u8]) -> Self {
        Self::new(bytes.as_ptr().cast_mut(), bytes.len())
    }

    /// `len` bytes at `base`. The caller (in `memory`) vouches that they stay mapped for the lifetime it picks.
    #[inline]
    pub(super) fn new(base: *mut u8, len: usize) -> Self {
        Self { raw: libc::iovec { iov_base: base.cast(), iov_len: len }, memory: PhantomData }
    }

    /// Its first byte.
    #[inline]
    pub(super) fn base(&self) -> *mut u8 {
        self.raw.iov_base.cast()
    }

    /// Bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.raw.iov_len
    }

    /// True for a buffer of no bytes; guest memory never makes one.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.raw.iov_len == 0
    }

    /// The list as the system calls take it. It may be followed by the kernel only.
    #[inline]
    pub fn as_raw(list: &[Self]) -> *const libc::iovec {
        // `repr(transparent)` makes the layouts equal.
        list.as_ptr().cast()
    }
}

/// Copies what the buffers hold, one after the other, to `to`, as far as there is room; each byte is read once. Returns
/// how many.
#[inline]
pub fn gather(list: &[IoVec<'_>], to: &mut [u8]) -> usize {
    let mut done = 0;
    for entry in list {
        let len = entry.len().min(to.len() - done);
        // SAFETY: an entry is memory that stays mapped while it lives, `to` has room, and memory of one list is not
        // borrowed mutably elsewhere.
        unsafe { copy::bulk_from_guest(entry.raw.iov_base.cast(), to.as_mut_ptr().add(done), len) };
        done += len;
    }
    done
}

/// Copies `from` to the buffers, one after the other, as far as there is room. Returns how many bytes.
///
/// # Safety
/// Each entry must be memory that may be written: guest memory, or a buffer of ours that was borrowed mutably
/// ([`IoVecs::push_own_mut`]).
#[inline]
pub unsafe fn scatter(list: &[IoVec<'_>], from: &[u8]) -> usize {
    let mut done = 0;
    for entry in list {
        let len = entry.len().min(from.len() - done);
        // SAFETY: an entry is memory that stays mapped while it lives, and may be written (the caller's promise).
        unsafe { copy::bulk_to_guest(from.as_ptr().add(done), entry.raw.iov_base.cast(), len) };
        done += len;
        if done == from.len() {
            break;
        }
    }
    done
}

/// Copies what the buffers of `from` hold to those of `list`, as far as there is room. Returns how many bytes.
///
/// # Safety
/// As for [`scatter`], and no byte may be in both.
#[inline]
pub unsafe fn scatter_each(list: &[IoVec<'_>], from: &[IoVec<'_>]) -> usize {
    let mut done = 0;
    let mut sources = from.iter().map(|entry| (entry.base(), entry.len()));
    let mut source = sources.next();
    for entry in list {
        let (mut to, mut room) = (entry.base(), entry.len());
        while let Some((at, left)) = source {
            let len = left.min(room);
            // SAFETY: both are memory that stays mapped while the entries live, `len` is within both, and `to` may be written
            // (the caller's promise).
            unsafe {
                copy::bulk_to_guest(at, to, len);
                to = to.add(len);
                source = if len == left { sources.next() } else { Some((at.add(len), left - len)) };
            }
            room -= len;
            done += len;
            if room == 0 {
                break;
            }
        }
    }
    done
}

impl std::fmt::Debug for IoVec<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoVec({} bytes)", self.len())
    }
}

/// A list of buffers in fixed, uninitialised storage (32 KiB unless said otherwise: to use one again, see [`IoVecStorage`]).
#[derive(Default)]
pub struct IoVecs<'m, const N: usize = IOVECS_CAPACITY> {
    list: ArrayVec<IoVec<'m>, N>,
    read_only: bool,
}

impl IoVecs<'_> {
    /// An empty list.
    #[inline]
    pub fn new() -> Self {
        Self::default()
    }
}

impl<'m, const N: usize> IoVecs<'m, N> {
    /// Entries.
    #[inline]
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// True without entries.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Entries that still fit.
    #[inline]
    pub fn room(&self) -> usize {
        self.list.remaining_capacity()
    }

    /// Drops the entries from `len` on.
    #[inline]
    pub fn truncate(&mut self, len: usize) {
        self.list.truncate(len);
    }

    /// Drops all entries.
    #[inline]
    pub fn clear(&mut self) {
        self.list.clear();
        self.read_only = false;
    }

    /// The entries.
    #[inline]
    pub fn as_slice(&self) -> &[IoVec<'m>] {
        &self.list
    }

    /// The entries for a system call that writes to them; None if one of them may only be read.
    #[inline]
    pub fn as_writable(&mut self) -> Option<&[IoVec<'m>]> {
        (!self.read_only).then_some(self.list.as_slice())
    }

    /// Bytes of all entries.
    #[inline]
    pub fn total_len(&self) -> u64 {
        self.list.iter().map(|entry| entry.len() as u64).sum()
    }

    /// Appends bytes of our own to be read. False when full.
    #[inline]
    pub fn push_own(&mut self, bytes: &'m [u8]) -> bool {
        self.read_only = true;
        self.push(IoVec::new(bytes.as_ptr().cast_mut(), bytes.len()))
    }

    /// Appends bytes of our own to be read or written. False when full.
    #[inline]
    pub fn push_own_mut(&mut self, bytes: &'m mut [u8]) -> bool {
        self.push(IoVec::new(bytes.as_mut_ptr(), bytes.len()))
    }

    /// Appends a frame of two pieces: a header of our own, and what [`super::Nearby::find`] has found. False when full.
    #[inline(always)]
    pub fn push_frame(&mut self, header: &'m [u8], frame: IoVec<'m>) -> bool {
        self.read_only = true;
        if self.list.remaining_capacity() < 2 {
            return false;
        }
        // SAFETY: there is room for two.
        unsafe {
            self.list.push_unchecked(IoVec::new(header.as_ptr().cast_mut(), header.len()));
            self.list.push_unchecked(frame);
        }
        true
    }

    /// Appends an entry of another list, to be read. False when full.
    #[inline]
    pub fn push_piece(&mut self, piece: IoVec<'m>) -> bool {
        self.read_only = true;
        self.push(piece)
    }

    #[inline]
    pub(super) fn push(&mut self, entry: IoVec<'m>) -> bool {
        self.list.try_push(entry).is_ok()
    }
}

/// Storage for an [`IoVecs`] that is used again and again, for one frame after another.
#[derive(Default)]
pub struct IoVecStorage<const N: usize = IOVECS_CAPACITY> {
    list: IoVecs<'static, N>,
}

impl<const N: usize> IoVecStorage<N> {
    /// An empty list for a use that lasts `'a`.
    #[inline]
    pub fn begin<'a>(&'a mut self) -> &'a mut IoVecs<'a, N> {
        self.list.clear();
        let list: *mut IoVecs<'static, N> = &mut self.list;
        // SAFETY: the types differ in a lifetime only. No entry of another lifetime is in the list: it was cleared just now,
        // and before the next `begin` clears it nobody can see what this use leaves behind.
        unsafe { &mut *list.cast::<IoVecs<'a, N>>() }
    }
}

impl<const N: usize> std::fmt::Debug for IoVecs<'_, N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.list).finish()
    }
}
