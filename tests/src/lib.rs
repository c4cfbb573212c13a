//! The lab: what whole-program tests, the demo and the benchmarks share.
