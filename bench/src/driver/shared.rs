//! What the burst driver reads and writes in memory that a device shares: words reached by index, packet buffers, and
//! hints to the processor. The driver's only unsafe code.
//!
//! Bounds are checked where a [`Words`] or [`Buffers`] is made; an index wraps (words) or is checked (buffers), so an access
//! costs a mask or a comparison.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

use crate::mapping::Mapping;

/// A cache line, bytes.
pub const LINE: u64 = 64;

/// Words that any bit pattern is valid for and that may change at any time.
pub trait Word: sealed::Sealed {}
mod sealed {
    pub trait Sealed {}
}
impl sealed::Sealed for AtomicU16 {}
impl sealed::Sealed for AtomicU32 {}
impl sealed::Sealed for AtomicU64 {}
impl Word for AtomicU16 {}
impl Word for AtomicU32 {}
impl Word for AtomicU64 {}

/// A power of two of words one behind the other.
#[derive(Debug)]
pub struct Words<A: Word> {
    first: NonNull<A>,
    mask: usize,
    _memory: Arc<Mapping>,
}

// SAFETY: the pointer is to shared memory that `_memory` keeps, and only atomics are reached through it.
unsafe impl<A: Word> Send for Words<A> {}

impl<A: Word> Words<A> {
    /// `count` words from an offset on. Panics if they do not lie in the memory, aligned, or are no power of two.
    pub fn new(memory: &Arc<Mapping>, at: u64, count: usize) -> Self {
        assert!(count.is_power_of_two());
        let first = memory.pointer(at, (count * size_of::<A>()) as u64).cast::<A>();
        assert!(first.is_aligned(), "{at:#x} is not aligned");
        let first = NonNull::new(first).expect("a mapping is never at 0");
        Self { first, mask: count - 1, _memory: Arc::clone(memory) }
    }

    /// The word with this index, modulo their number.
    #[inline(always)]
    pub fn at(&self, index: usize) -> &A {
        // SAFETY: the masked index is below the count that was checked in `new`; the memory lives as long as `self`;
        // atomics may change while there is a shared reference to them.
        unsafe { self.first.add(index & self.mask).as_ref() }
    }

    /// Asks for the line of a word, to be written.
    #[inline(always)]
    pub fn prefetch_write(&self, index: usize) {
        prefetch_write(std::ptr::from_ref(self.at(index)).cast());
    }
}

/// Packet buffers, one every `stride` bytes.
#[derive(Debug)]
pub struct Buffers {
    first: NonNull<u8>,
    offset: u64,
    stride: u64,
    count: u64,
    memory: Arc<Mapping>,
}

// SAFETY: as for `Words`; bytes are copied, and no reference to them exists.
unsafe impl Send for Buffers {}

/// The beginning of a received packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Buffers of this packet (VIRTIO 1.3 §5.1.6).
    pub buffers: u16,
    /// Some bytes of its frame, from the first line.
    pub sample: u64,
}

impl Buffers {
    /// `count` buffers from an offset on, each at a line's beginning. Panics if they do not lie in the memory.
    pub fn new(memory: &Arc<Mapping>, offset: u64, stride: u64, count: u16) -> Self {
        assert!(offset.is_multiple_of(LINE) && stride.is_multiple_of(LINE) && stride > 0 && count > 0);
        let first = memory.pointer(offset, stride * u64::from(count));
        let first = NonNull::new(first).expect("a mapping is never at 0");
        Self { first, offset, stride, count: count.into(), memory: Arc::clone(memory) }
    }

    /// The device's address of a buffer: guest addresses are offsets.
    #[inline(always)]
    pub fn guest_address(&self, id: u16) -> u64 {
        self.offset + u64::from(id) * self.stride
    }

    /// Length of each, bytes.
    pub fn len(&self) -> u32 {
        self.stride as u32
    }

    #[inline(always)]
    fn pointer(&self, id: u16, at: u64, len: u64) -> *mut u8 {
        assert!(u64::from(id) < self.count && len <= self.stride && at <= self.stride - len);
        // SAFETY: just checked to lie inside what `new` has checked.
        unsafe { self.first.as_ptr().add(usize::from(id) * self.stride as usize + at as usize) }
    }

    /// Asks for the first line of a buffer, to be read.
    #[inline(always)]
    pub fn prefetch(&self, id: u16) {
        prefetch_read(self.pointer(id, 0, LINE));
    }

    /// Reads of a buffer's first line what every driver reads.
    #[inline(always)]
    pub fn head(&self, id: u16) -> Head {
        let line = self.pointer(id, 0, LINE);
        // SAFETY: `pointer` has checked a whole line, which is aligned; the words are read as atomics, for the device
        // may write them.
        unsafe {
            let word = |i: usize| AtomicU64::from_ptr(line.cast::<u64>().add(i));
            let relaxed = std::sync::atomic::Ordering::Relaxed;
            // num_buffers is at 10; 16 lies in the frame.
            let (second, sample) = (word(1).load(relaxed), word(2).load(relaxed));
            Head { buffers: (u64::from_le(second) >> 16) as u16, sample }
        }
    }

    /// Reads the 64-bit word at a multiple of 8.
    #[inline(always)]
    pub fn word(&self, id: u16, at: u64) -> u64 {
        let pointer = self.pointer(id, at & !7, 8).cast::<u64>();
        // SAFETY: checked and aligned; read as an atomic, since the device may write it.
        u64::from_le(unsafe { AtomicU64::from_ptr(pointer) }.load(std::sync::atomic::Ordering::Relaxed))
    }

    /// Writes the 64-bit word at a multiple of 8.
    #[inline(always)]
    pub fn set_word(&self, id: u16, at: u64, value: u64) {
        let pointer = self.pointer(id, at & !7, 8).cast::<u64>();
        // SAFETY: as in `word`.
        unsafe { AtomicU64::from_ptr(pointer) }.store(value.to_le(), std::sync::atomic::Ordering::Relaxed);
    }

    /// Copies bytes out of a buffer's beginning.
    pub fn read(&self, id: u16, bytes: &mut [u8]) {
        let from = self.pointer(id, 0, bytes.len() as u64);
        // SAFETY: `pointer` has checked the source; `bytes`, being a reference, is not part of it.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Copies the beginning of a buffer of another set to that of one of this. They must not be the same memory.
    pub fn copy_from(&self, id: u16, other: &Self, other_id: u16, len: usize) {
        assert!(!Arc::ptr_eq(&self.memory, &other.memory));
        let (from, to) = (other.pointer(other_id, 0, len as u64), self.pointer(id, 0, len as u64));
        // SAFETY: both are checked, and lie in different mappings.
        unsafe { std::ptr::copy_nonoverlapping(from, to, len) };
    }

    /// Copies bytes to a buffer's beginning.
    pub fn write(&self, id: u16, bytes: &[u8]) {
        let to = self.pointer(id, 0, bytes.len() as u64);
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }
}

#[inline(always)]
fn prefetch_read(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch does not fault and changes nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// The intrinsic for writing becomes a plain prefetch unless the build names a processor that has PREFETCHW.
#[inline(always)]
fn prefetch_write(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above; it is a no-operation on processors that do not have it.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// A clock in units of its own: [`ticks_per_second`] says which.
#[inline(always)]
pub fn ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has it; it reads a counter.
    unsafe {
        std::arch::x86_64::_rdtsc()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        use std::sync::OnceLock;
        use std::time::Instant;
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }
}

/// Measures the rate of [`ticks`], for so long.
pub fn ticks_per_second(time: std::time::Duration) -> f64 {
    let (start, from) = (std::time::Instant::now(), ticks());
    std::thread::sleep(time);
    let (to, wall) = (ticks(), start.elapsed());
    (to - from) as f64 / wall.as_secs_f64()
}
