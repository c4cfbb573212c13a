//! A worker: one thread, one io_uring, the queue pairs it serves.
//!
//! Lives here: the messages between control and queue pairs, the life of a pair ([`pair`]), and the round over
//! the pairs that have work ([`datapath`]). Not here: ports, sessions and connections (`port`), which run on
//! the first worker only, and what a ring or a frame is (`virtq`, `net`).
//!
//! ```text
//!  port (worker 0) ── Command ──► Datapath of worker k ──► Pair: rings + uplink queue
//!                  ◄── Reply/Event ──┘
//! ```

mod ahead;
mod arrivals;
pub mod counters;
pub mod datapath;
mod half;
mod hot;
mod link;
pub mod pair;
mod polling;
#[cfg(test)]
mod tests;
pub mod thread;
mod turn;
mod wake;
mod watch;

use crate::memory::{GuestMemory, MissingRange};
use crate::net::counters::PairCounters;
use crate::uplink::UplinkQueue;
use crate::virtq::{Purpose, QueueConfig};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Names a queue pair of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PairKey {
    /// The port, by its place in the configuration.
    pub port: u16,
    /// The pair, from 0.
    pub pair: u16,
}

/// One of the two rings of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Towards the guest: even ring index.
    Receive,
    /// From the guest: odd ring index.
    Transmit,
}

impl Direction {
    /// The direction of the ring with this index (VIRTIO 1.3 §5.1.2).
    pub fn of_ring(index: u16) -> Self {
        if index.is_multiple_of(2) { Self::Receive } else { Self::Transmit }
    }
}

/// What control tells a pair. Each is answered by one [`Reply`].
pub enum Command {
    /// Use this memory from now on, for running rings too.
    Memory(GuestMemory),
    /// The driver has acknowledged these features.
    Features(u64),
    /// Start a ring.
    Start {
        /// Which one.
        direction: Direction,
        /// Its place and size.
        config: QueueConfig,
        /// The driver's notifications; `None`: look all the time.
        kick: Option<Arc<OwnedFd>>,
        /// Whether it may move frames already.
        enabled: bool,
    },
    /// A running ring has new addresses or a new log address; it goes on where it is.
    Update {
        /// Which one.
        direction: Direction,
        /// Its place and size; the base is ignored.
        config: QueueConfig,
    },
    /// Stop a ring: nothing is written to guest memory after the reply.
    Stop {
        /// Which one.
        direction: Direction,
    },
    /// Enable or disable a ring.
    Enable {
        /// Which one.
        direction: Direction,
        /// The new state.
        enabled: bool,
    },
    /// Where to notify the driver; `None`: it polls.
    Call {
        /// Which ring.
        direction: Direction,
        /// An eventfd.
        fd: Option<Arc<OwnedFd>>,
    },
    /// Where to report a broken ring.
    Error {
        /// Which ring.
        direction: Direction,
        /// An eventfd.
        fd: Option<Arc<OwnedFd>>,
    },
    /// Guest memory that was missing has arrived: parked rings look again. Has no reply.
    Arrived,
    /// Stop both rings and forget everything about the front-end.
    Reset,
}

/// A pair's answer to a [`Command`].
#[derive(Debug)]
pub enum Reply {
    /// Done.
    Done,
    /// The ring is stopped; where it goes on (vhost-user: GET_VRING_BASE).
    Base(u32),
    /// Not done, and why.
    Failed(String),
}

/// What a pair reports without being asked.
#[derive(Debug)]
pub enum Event {
    /// A ring was given up.
    RingBroken(Direction, String),
    /// Guest memory vanished under us.
    MemoryFault,
    /// The uplink cannot be used now.
    UplinkDown(String),
    /// Pages are missing that a ring needs now or soon.
    Wants {
        /// Which ring.
        direction: Direction,
        /// What it waits for, if it is parked: nothing moves before this has arrived.
        parked: Option<MissingRange>,
        /// What it and the chains behind need, in the order of need.
        ranges: Vec<(MissingRange, Purpose)>,
    },
}

/// What a worker is started with or told.
pub enum ToWorker {
    /// Serve this pair from now on.
    Attach(Attachment),
    /// For a pair.
    Pair(PairKey, Command),
    /// End the thread.
    Stop,
}

/// A pair as it is handed to its worker.
pub struct Attachment {
    /// Its name.
    pub key: PairKey,
    /// Its queue of the uplink.
    pub uplink: Box<dyn UplinkQueue>,
    /// The pairs of the port that it is wired to, which the same worker serves; empty: none.
    pub peers: Vec<PairKey>,
    /// Its counters.
    pub counters: Arc<PairCounters>,
}

/// What control hears from pairs.
pub enum ToControl {
    /// The answer to one command.
    Reply(PairKey, Reply),
    /// Something happened.
    Event(PairKey, Event),
}

/// What a reactor operation of a pair is for. `epoch` tells operations of an earlier life of the ring apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairToken {
    /// The pair's slot in its worker's table.
    pub slot: u32,
    /// Which life of the ring.
    pub epoch: u32,
    /// What for.
    pub what: What,
}

/// The operations a pair may have in flight: one of each kind and direction at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Poll of a kick eventfd.
    Kick(Direction),
    /// Poll of one of the uplink's descriptors for frames.
    UplinkReadable(u16),
    /// The end of the time that senders wait for the receive ring (peer links).
    LinkPatience,
    /// The time between two looks at an uplink that nobody listens to.
    UplinkLook,
    /// Poll of the uplink for room.
    UplinkWritable,
    /// Wake-up of the uplink's kernel side.
    UplinkWake(Direction),
    /// The pause before the next one.
    UplinkPause(Direction),
    /// Write to a call eventfd.
    Call(Direction),
    /// Write to an error eventfd.
    Error(Direction),
}
