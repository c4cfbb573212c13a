//! The AF_XDP uplink.

pub mod program;
