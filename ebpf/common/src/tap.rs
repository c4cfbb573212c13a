//! Steering of received frames to the queues of a multi-queue tap (TUNSETSTEERINGEBPF).

use crate::plain;

/// The one entry of `tap_queues`: which queues take part.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queues {
    /// The first queue's index among those attached to the tap.
    pub first: u32,
    /// How many, in sequence; 0 counts as 1.
    pub count: u32,
}

/// The one entry, on each CPU, of `tap_stats`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Frames with a flow: IPv4 or IPv6.
    pub hits: u64,
    /// Frames without: to the first queue.
    pub misses: u64,
}

plain!(Queues, Stats);
