//! What an operator sees of the program: how long it stood still for missing guest memory, and points to trace it at.
//!
//! ```text
//!  ports, workers ─► Handle ─► observer thread ─► load: programs in the kernel, maps pinned by `pins`
//!                                                          │ fault_events          │ fault_hist …
//!                     loop: totals, log lines ◄─ events ◄──┘                       └─► read ─► `vhost-user-net faults`
//! ```
//! Here: everything about measuring and showing. Not here: the programs themselves (`ebpf/programs/src/bin/faults.rs`)
//! and what their maps hold (`ebpf/common/src/faults.rs`).

pub mod areas;
mod btf;
pub mod command;
mod error;
pub mod events;
pub mod hist;
pub mod json;
pub mod kernel;
pub mod load;
mod observer;
pub mod pins;
pub mod read;
mod rights;
pub mod show;
pub mod trace;
mod trim;

pub use error::Unavailable;
pub use observer::{Answer, Armed, Handle, Observer, Settings};
