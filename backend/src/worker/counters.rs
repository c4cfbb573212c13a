//! What a worker counts about itself: how often it slept, and how long it looked for work in vain. Written by its thread, read
//! by anyone.
#![forbid(unsafe_code)]

use crate::net::counters::Counter;
use std::fmt;

/// One worker's counters.
#[derive(Debug, Default)]
pub struct WorkerCounters {
    /// Times that it had nothing to do and did not look for any more.
    pub sleeps: Counter,
    /// Time for which it looked in vain, ns.
    pub polled_ns: Counter,
    /// Times that it left a CPU which others wanted.
    pub back_offs: Counter,
}

impl fmt::Display for WorkerCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let polled = self.polled_ns.get() as f64 / 1e9;
        write!(f, "sleeps={} polled={polled:.3}s back_offs={}", self.sleeps.get(), self.back_offs.get())
    }
}
