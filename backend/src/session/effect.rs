//! What the session and its owner say to each other: [`Step`]s out, [`Outcome`]s back.
#![forbid(unsafe_code)]

use super::error::{Notice, SessionError};
use crate::memory::RegionSpec;

/// The next thing for the owner to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<F> {
    /// Send these bytes: one whole message. It carries no fd.
    Send(Vec<u8>),
    /// Send these bytes with the port's userfaultfd ([`Effect::PostcopyAdvise`] was done).
    SendUserfaultfd(Vec<u8>),
    /// Do this and tell the [`Outcome`] by [`complete`](super::Session::complete); no step follows before.
    Effect(Effect<F>),
    /// Write this to the log, with a rate limit.
    Warn(Notice),
    /// Close this connection and stop its rings. The last step of a session.
    Close(SessionError),
}

/// Something only the owner can do, having memory, fds and rings. Each has exactly one [`Outcome`].
///
/// Nothing here has been checked against memory: addresses may point anywhere, fds may be of any kind.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect<F> {
    /// Replace all of guest memory. Rings may be running: they go on with the new mapping.
    /// 1 to 8 regions, no two with the same guest or user address. If refused, the old memory stays.
    SetMemTable {
        /// Each region with its file.
        regions: Vec<(RegionSpec, F)>,
        /// The pages have not arrived: register each region with the userfaultfd, touch nothing before
        /// [`Effect::PostcopyArm`], and end with [`Outcome::Mapped`].
        postcopy: bool,
    },
    /// Add one region to guest memory, while rings may be running.
    AddMemReg {
        /// The region.
        region: RegionSpec,
        /// Its file.
        fd: F,
        /// As in [`Effect::SetMemTable`].
        postcopy: bool,
    },
    /// Remove one region, exactly as it was added.
    RemMemReg {
        /// The region.
        region: RegionSpec,
    },
    /// Replace the dirty log. The reply goes out after the outcome, so from [`Outcome::Done`] on nothing may go to
    /// the old one.
    SetLogBase {
        /// Length, bytes; not zero.
        size: u64,
        /// Offset in the file, bytes.
        offset: u64,
        /// Its file.
        fd: F,
    },
    /// Every SET_FEATURES, also when nothing changed, also while rings run (LOG_ALL goes on and off that way).
    SetFeatures {
        /// All acknowledged bits; only offered ones.
        features: u64,
        /// Whether LOG_ALL is among them.
        log_all: bool,
    },
    /// Start a ring that is not running. Look at it once even if no kick comes
    /// (the guest may have kicked before; vhost-user: Ring states).
    /// If refused, it needs another SET_VRING_KICK.
    StartRing {
        /// Which ring: 2·pair is RX (back-end to guest), 2·pair + 1 is TX.
        index: u16,
        /// All about it.
        config: RingConfig,
        /// Kick eventfd; without it the ring is to be polled.
        kick: Option<F>,
    },
    /// A running ring's addresses or log address change. `base` is where the ring was started, not where it is.
    /// If refused, the old ones stay.
    UpdateRing {
        /// Which ring.
        index: u16,
        /// All about it.
        config: RingConfig,
    },
    /// Stop a running ring: nothing may be written to guest memory for it after the outcome, which is
    /// [`Outcome::Base`] with the index of the first chain not processed. A refusal ends the connection.
    StopRing {
        /// Which ring.
        index: u16,
    },
    /// A running ring is enabled or disabled; repeats without change happen. While disabled, TX is discarded and
    /// RX not supplied. Look at the ring once after enabling.
    EnableRing {
        /// Which ring.
        index: u16,
        /// Its new state.
        enabled: bool,
    },
    /// Where to signal used buffers. Comes before the ring's start, and while it runs. Kept over stops and resets.
    SetCall {
        /// Which ring.
        index: u16,
        /// Call eventfd; none: the driver polls.
        fd: Option<F>,
    },
    /// Where to signal errors of the ring. As [`Effect::SetCall`].
    SetErr {
        /// Which ring.
        index: u16,
        /// Error eventfd, or none.
        fd: Option<F>,
    },
    /// The guest's MTU, bytes; within the configured limit.
    SetMtu(u16),
    /// Announce this MAC address on the uplink. May come before guest memory.
    SendRarp([u8; 6]),
    /// The socket for messages from the back-end to the front-end. Replaces the one before.
    SetBackendChannel(F),
    /// Have a userfaultfd ready, the same one for all queue pairs. Nothing is registered yet.
    PostcopyAdvise,
    /// Guest memory that is mapped from now on has not arrived.
    PostcopyListen,
    /// The front-end knows where we have mapped its memory: pages may be asked for.
    PostcopyArm,
    /// The front-end may have lost reports of missing pages: whoever waits for one is to report again.
    PostcopyWake,
    /// All pages have arrived, or none will any more: nothing may fault after the outcome, and the userfaultfd is closed. Also
    /// when a ring has started without [`Effect::PostcopyListen`].
    PostcopyEnd,
    /// The device went back to its initial state. Running rings have been stopped one by one before, memory, log,
    /// call and error fds stay: front-ends do not send them again.
    Reset,
}

/// All that describes a ring to be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingConfig {
    /// Number of descriptors, at most 32768: a power of two, unless the features say that the ring is packed.
    pub size: u16,
    /// Where to begin, as in SET_VRING_BASE: index of the next available entry to process; of a packed ring that index with its
    /// wrap counter in bits 0-15, and the used one in bits 16-31.
    pub base: u32,
    /// Descriptor table, in the front-end's address space.
    pub desc_user: u64,
    /// Available ring, in the front-end's address space.
    pub avail_user: u64,
    /// Used ring, in the front-end's address space.
    pub used_user: u64,
    /// Where writes to the used ring are logged (guest physical), if they are to be logged.
    pub log_used: Option<u64>,
    /// Whether the ring is enabled.
    pub enabled: bool,
    /// Acknowledged virtio features.
    pub features: u64,
}

/// What became of an [`Effect`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done.
    Done,
    /// The ring is stopped; the place of the first available entry not processed, as in [`RingConfig::base`].
    Base(u32),
    /// Regions are mapped and registered for postcopy: where each is, in our address space, in the order of the effect.
    Mapped(Vec<u64>),
    /// It cannot be done: why, for the log. The front-end gets a non-zero acknowledgement.
    Refused(String),
}
