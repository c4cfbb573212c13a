//! Single moves from and to memory that a guest changes meanwhile: 16, 8, 4 and 1 bytes, wherever they lie. Each is one load
//! or one store, done exactly once; the compiler may neither repeat nor merge nor leave it out.
//!
//! On x86-64 they are instructions written out: a volatile access of an unaligned type goes through the stack, twice as many
//! moves, and the stores there take the places of those that wait for lines of guest memory. Elsewhere they are volatile
//! accesses of packed wrappers.

/// Something that one move carries.
pub(super) trait Unit: Copy {
    /// Loads it, once.
    ///
    /// # Safety
    /// `from` must be valid for a read of as many bytes; it need not be aligned.
    unsafe fn load(from: *const u8) -> Self;
    /// Stores it, once.
    ///
    /// # Safety
    /// `to` must be valid for a write of as many bytes; it need not be aligned.
    unsafe fn store(self, to: *mut u8);
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod arch {
    use super::Unit;
    use std::arch::asm;

    /// The widest thing that one plain move carries on every machine of the kind.
    pub(in super::super) type Wide = std::arch::x86_64::__m128i;

    macro_rules! unit {
        ($type:ty, $class:ident, $load:literal, $store:literal) => {
            impl Unit for $type {
                #[inline(always)]
                unsafe fn load(from: *const u8) -> Self {
                    let value;
                    // SAFETY: one load of bytes that the caller vouches for.
                    unsafe {
                        asm!($load, value = lateout($class) value, from = in(reg) from,
                            options(nostack, preserves_flags, readonly));
                    }
                    value
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut u8) {
                    // SAFETY: one store of bytes that the caller vouches for.
                    unsafe {
                        asm!($store, value = in($class) self, to = in(reg) to, options(nostack, preserves_flags));
                    }
                }
            }
        };
    }

    unit!(Wide, xmm_reg, "movdqu {value}, [{from}]", "movdqu [{to}], {value}");
    unit!(u64, reg, "mov {value}, [{from}]", "mov [{to}], {value}");
    unit!(u32, reg, "mov {value:e}, [{from}]", "mov [{to}], {value:e}");
    unit!(u8, reg_byte, "mov {value}, [{from}]", "mov [{to}], {value}");

    /// Bytes of [`copy_block`].
    pub(in super::super) const BLOCK: usize = 64;

    /// Copies 64 bytes: all are loaded before the first is stored, so that no load waits behind a store.
    ///
    /// # Safety
    /// `from` must be valid for a read of 64 bytes, `to` for a write.
    #[inline(always)]
    pub(in super::super) unsafe fn copy_block(from: *const u8, to: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "movdqu {a}, [{from}]",
                "movdqu {b}, [{from} + 16]",
                "movdqu {c}, [{from} + 32]",
                "movdqu {d}, [{from} + 48]",
                "movdqu [{to}], {a}",
                "movdqu [{to} + 16], {b}",
                "movdqu [{to} + 32], {c}",
                "movdqu [{to} + 48], {d}",
                from = in(reg) from, to = in(reg) to,
                a = out(xmm_reg) _, b = out(xmm_reg) _, c = out(xmm_reg) _, d = out(xmm_reg) _,
                options(nostack, preserves_flags)
            );
        }
    }

    /// Whether [`copy_string`] is fast here (the CPU's "enhanced REP MOVSB").
    #[inline(always)]
    pub(in super::super) fn has_fast_strings() -> bool {
        std::arch::is_x86_feature_detected!("ermsb")
    }

    /// Copies `len` bytes by one string instruction, which can be interrupted (by a fault, too) and goes on where it was.
    ///
    /// # Safety
    /// `from` must be valid for a read of `len` bytes, `to` for a write.
    #[inline(always)]
    pub(in super::super) unsafe fn copy_string(from: *const u8, to: *mut u8, len: usize) {
        // SAFETY: the caller's promise; the direction flag is clear, as the ABI demands.
        unsafe {
            asm!("rep movsb", inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _,
                options(nostack, preserves_flags));
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", not(miri))))]
mod arch {
    use super::Unit;
    use std::ptr::{read_volatile, write_volatile};

    /// The widest thing that one plain move carries.
    pub(in super::super) type Wide = u64;

    #[derive(Clone, Copy)]
    #[repr(C, packed)]
    struct Packed<T>(T);

    impl<T: Copy> Unit for T {
        unsafe fn load(from: *const u8) -> Self {
            // SAFETY: the caller's promise; the wrapper has alignment 1.
            let packed = unsafe { read_volatile(from.cast::<Packed<T>>()) };
            packed.0
        }
        unsafe fn store(self, to: *mut u8) {
            // SAFETY: the caller's promise; the wrapper has alignment 1.
            unsafe { write_volatile(to.cast::<Packed<T>>(), Packed(self)) }
        }
    }

    /// Bytes of [`copy_block`].
    pub(in super::super) const BLOCK: usize = 16;

    /// Copies 16 bytes.
    ///
    /// # Safety
    /// `from` must be valid for a read of 16 bytes, `to` for a write.
    pub(in super::super) unsafe fn copy_block(from: *const u8, to: *mut u8) {
        // SAFETY: the caller's promise, 8 bytes each.
        unsafe {
            let (a, b) = (u64::load(from), u64::load(from.add(8)));
            a.store(to);
            b.store(to.add(8));
        }
    }

    /// There is no such instruction.
    pub(in super::super) fn has_fast_strings() -> bool {
        false
    }

    /// Copies `len` bytes one by one.
    ///
    /// # Safety
    /// `from` must be valid for a read of `len` bytes, `to` for a write.
    pub(in super::super) unsafe fn copy_string(from: *const u8, to: *mut u8, len: usize) {
        for i in 0..len {
            // SAFETY: the caller's promise.
            unsafe { u8::load(from.add(i)).store(to.add(i)) };
        }
    }
}

pub(super) use arch::{BLOCK, Wide, copy_block, copy_string, has_fast_strings};
