//! The lab: what whole-program tests, the demo and the benchmarks share.
//!
//! A test is a [`scenario`]: it gets a [`Lab`] (a folder for sockets and logs, a lock against other
//! scenarios) and starts guards in it: [`NetNs`], [`Backend`], [`Qemu`], [`Testpmd`]. Guards stop what they
//! started when they are dropped, and everything they start also ends when this process dies:
//! children by their parent-death signal, network namespaces because nothing but our descriptors
//! holds them.
//!
//! | module | what |
//! |---|---|
//! | `artefacts` | where QEMU, the guest and DPDK are |
//! | `scenario` | one test's surroundings; skipping; what is printed when it fails |
//! | `process`, `netns`, `wait` | children, namespaces with taps and bridges, polling |
//! | `backend`, `qemu`, `qmp`, `serial`, `migration`, `testpmd` | the programs under test and their peers |
//! | `postcopy`, `relay`, `hugepages` | postcopy migration, and a link that is slow or cut |
//! | `ping`, `transfer`, `sniff`, `flood` | the host's side of the traffic |
//! | `virtio_user` | the same with DPDK's driver as the guest |
//! | [`xdp`] | ports on one interface, and what is outside of it |
//! | `wire` | numbered frames, put on a tap and captured from it |
//! | `bed` | the usual arrangements of all these |
//! | [`rawfront`] | a front-end that can do anything wrong, and a small driver that does it right |
#![deny(missing_docs)]

mod artefacts;
mod backend;
mod bed;
mod flood;

mod hugepages;
mod migration;
mod netns;
mod ping;
mod postcopy;
mod process;
mod qemu;
mod qmp;
pub mod rawfront;
mod relay;
mod scenario;
mod serial;
mod sniff;
mod testpmd;
mod transfer;
mod virtio_user;
mod wait;
pub mod wire;
pub mod xdp;

pub use artefacts::{Artefacts, BACKEND, LAB_DIR, backend_binary, find_in_path, lab_dir};
pub use backend::{Backend, BackendConfig, is_ours};
pub use bed::{Bed, Filled, Place, bridged, bridged_with, pull, push, there_and_back};

pub use flood::{Flood, FloodReport, Rate};
pub use hugepages::HugePages;
pub use migration::{Migration, MigrationReport};
pub use netns::NetNs;
pub use ping::{PingReport, Pinger, ping, ping_whole};
pub use postcopy::{Phases, Postcopy, PostcopyReport};
pub use process::Process;
pub use qemu::{Backing, GUEST_IP, GUEST_MAC, HOST_IP, PREFIX, Qemu, QemuConfig};
pub use qmp::Qmp;
pub use relay::Relay;
pub use scenario::{Lab, REQUIRE_ALL, SKIP_LIST, scenario, skip};
pub use serial::Shell;
pub use sniff::Sniffer;
pub use testpmd::{PortStats, Testpmd, TestpmdConfig};
pub use transfer::{Amount, Digest, Sink, Source};
pub use virtio_user::{Echo, VirtioUser, Wiring};
pub use wait::{PATIENCE, until};
