//! Memory that was used once is given back to the system.
//!
//! Loading BPF programs reads the kernel's type information, which takes some 35 MB for a moment; nothing in this process
//! needs so much again. The allocator would keep a third of it: its threshold grows with the largest block that it has
//! seen freed, unless it is set.

/// What the allocator may keep at the end of each of its heaps, bytes.
#[cfg(target_env = "gnu")]
const KEPT: libc::c_int = 128 << 10;

/// Does something that needs much memory for a moment, and gives that back.
pub(super) fn with_much_memory<T>(work: impl FnOnce() -> T) -> T {
    #[cfg(target_env = "gnu")]
    // SAFETY: without preconditions; sets a number of the allocator's.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
    }
    let done = work();
    #[cfg(target_env = "gnu")]
    // SAFETY: without preconditions; only memory that is free already is given back.
    unsafe {
        libc::malloc_trim(0);
    }
    done
}
