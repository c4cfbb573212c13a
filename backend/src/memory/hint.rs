//! Hints to the CPU: lines that are going to be read or written soon. A hint never faults and changes nothing, so any address
//! will do.

/// For the line at an address, to be read.
#[inline(always)]
pub(super) fn read(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch does not fault and changes nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// For ownership of the line at an address, to be written. The intrinsic becomes a plain prefetch unless the build names a CPU
/// that has PREFETCHW; the instruction itself does nothing on those that have not.
#[inline(always)]
pub(super) fn write(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch does not fault and changes nothing.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
