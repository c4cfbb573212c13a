//! Layouts that the BPF programs and their user space share: what the maps hold.
//!
//! Here: data only, `repr(C)`, without padding, so that both sides and bpftool read the same. Each topic has a
//! module. Not here: what the programs do with it (`ebpf/programs`), who fills it (`backend`).
//!
//! A change of any layout raises [`LAYOUT`]: maps stay pinned while the program that fills them is replaced, and a map
//! of another layout is refused by name.
#![no_std]
#![forbid(unsafe_op_in_unsafe_fn)]

pub mod faults;
pub mod tap;
pub mod xdp;

/// Version of all layouts in this crate.
pub const LAYOUT: u32 = 1;

/// Declares that a layout may be read from and written to maps as bytes.
macro_rules! plain {
    ($($layout:ty),*) => {
        $(
            // SAFETY: repr(C) of integers and arrays of them, without padding: any bytes are a value.
            #[cfg(feature = "user")]
            unsafe impl aya::Pod for $layout {}
        )*
    };
}
pub(crate) use plain;
