//! The lab: what whole-program tests, the demo and the benchmarks share.
pub mod dpdk;
pub mod procstat;
pub mod wire;
