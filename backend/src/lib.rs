//! `vhost-user-net`: a vhost-user network back-end whose event loop never blocks.
//!
//! Where things live: see ARCHITECTURE in the README; each module's header says what is in it.

pub mod bpf;
pub mod capabilities;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod memory;
pub mod net;
pub mod observe;
pub mod port;
pub mod postcopy;
pub mod reactor;
pub mod session;
pub mod uplink;
pub mod virtq;
pub mod worker;
