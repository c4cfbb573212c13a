//! Steering of received frames to the queues of a multi-queue tap (TUNSETSTEERINGEBPF).
//!
//! ```text
//!  frame ─► flow hash ─► tap_queues.table[hash % TABLE_LEN] ─► index among the attached queues
//! ```

use crate::plain;

/// Entries of the table; a power of two, and enough that queues get equal shares.
pub const TABLE_LEN: usize = 1024;

/// The one entry of `tap_queues`: which queue takes which flows.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queues {
    /// Queues that take part.
    pub active: u32,
    /// For each remainder of the flow hash, the queue's index among those attached to the tap.
    pub table: [u8; TABLE_LEN],
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
