//! A vhost-user front-end that can do anything, right and wrong, and a back-end process to do it to.
//!
//! For tests that have to send what no real front-end sends: any bytes in any pieces with any fds
//! ([`Wire`]), and beside that a plain legal front-end with a small split-ring driver ([`Front`]) which proves that
//! a port still works. Guest memory is reached with `pread` and `pwrite` on its file, never mapped: 64 GiB
//! cost nothing, and a file that is truncated on purpose cannot hurt the test itself.
//!
//! Not here: QEMU and DPDK, which have runners of their own.

mod arena;
mod confined;
mod faults;
mod front;
mod fuse;
mod late;
pub mod packed;
mod process;
mod ring;
mod wire;

pub use arena::{Arena, BAD, GOOD};
pub use confined::Confinement;
pub use faults::Faults;
pub use front::{Front, Setup, mem_reg, mem_table, protocol, state, test_frame, virtio, vring_addr};
pub use fuse::SilentFuse;
pub use late::{Away, Late, PAGE};
pub use packed::{PackedRing, Place};
pub use process::{Backend, eventually};
pub use ring::{Desc, Memory, Ring, desc_flag};
pub use wire::{Reply, Wire, WireError, flag, msg};

use std::time::Duration;

/// How long anything may take that should be done at once. Generous, since tests share few cores.
pub const PATIENCE: Duration = Duration::from_secs(10);
