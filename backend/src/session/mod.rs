//! vhost-user: one connection's session as a state machine.
//!
//! Bytes and file descriptors go in by [`Session::feed`], [`Step`]s come out of [`Session::step`]: messages to send,
//! [`Effect`]s for the owner to carry out, warnings, and the end. Nothing here does I/O, owns a clock or looks into
//! guest memory; the fd type is a parameter, and fds are only passed on. So tests and the fuzzer drive the very code
//! that runs.
//!
//! ```text
//!   bytes, fds ─► framing ─► table ─► handlers ─► todo ─► Effect ─► owner
//!                                        │          ▲                │
//!                                        ▼          └─── Outcome ◄───┘
//!                                     answer ─► Send
//! ```
//! - `framing`: from reads to messages. `message`: layouts and numbers. `table`: every message, one row each.
//! - `handlers`: one function per message. `state`: what was agreed on, and the rings. `engine`: todo and outcomes.
//! - `postcopy`: the phases of a migration to here whose pages come later.
//! - `effect` and `error`: what crosses the border to the owner.
//!
//! One message is handled at a time, and one effect is outstanding at most; what arrives meanwhile waits, within
//! bounds ([`Session::wants_input`]). A message is answered when its last effect has its outcome, and once.
#![forbid(unsafe_code)]

mod effect;
mod engine;
mod error;
mod framing;
mod handlers;
mod message;
mod postcopy;
mod state;
mod table;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

pub use effect::{Effect, Outcome, RingConfig, Step};
pub use error::{Matter, Notice, Refusal, SessionError, SessionStats};
pub use framing::{BUFFER_BYTES_MAX, BUFFER_BYTES_SOFT, BUFFER_FDS_SOFT};
pub use handlers::net::MTU_MIN;
pub use message::{
    CONFIG_BYTES_MAX, FDS_PER_MESSAGE_MAX, HEADER_BYTES, PAYLOAD_BYTES_MAX, RING_SIZE_MAX, RequestId,
    TABLE_REGIONS_MAX, protocol_feature, virtio_feature,
};
pub use postcopy::Phase;
pub use state::{LogState, RingView};

use engine::{Pending, Work};
use framing::Framing;
use handlers::Todo;
use postcopy::Postcopy;
use state::{Negotiated, Ring};

/// Most queue pairs of a session: a ring's index has eight bits in SET_VRING_KICK.
pub const QUEUE_PAIRS_MAX: u16 = 128;

/// What a session offers to its front-end.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// Virtio features offered, among them VERSION_1, LOG_ALL and PROTOCOL_FEATURES.
    pub features: u64,
    /// Protocol features offered ([`protocol_feature`]). Bits that this module has no handlers for are dropped.
    pub protocol_features: u64,
    /// Queue pairs: the answer to GET_QUEUE_NUM. At most [`QUEUE_PAIRS_MAX`], at least 1.
    pub queue_pairs: u16,
    /// Most regions by ADD_MEM_REG: the answer to GET_MAX_MEM_SLOTS.
    pub max_mem_slots: u64,
    /// `virtio_net_config`, to be read by GET_CONFIG. Without it CONFIG is not offered.
    pub config_space: Option<ConfigSpace>,
    /// Most MTU that NET_SET_MTU may ask for, bytes.
    pub mtu_max: u16,
    /// Send the answer to the memory table again for each further queue pair (see [`postcopy`]).
    pub postcopy_resend: bool,
}

/// Bytes of a device's configuration space, at most [`CONFIG_BYTES_MAX`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigSpace(Vec<u8>);

impl ConfigSpace {
    /// None if it is too long to be read in one GET_CONFIG.
    pub fn new(bytes: Vec<u8>) -> Option<Self> {
        (bytes.len() <= CONFIG_BYTES_MAX).then_some(Self(bytes))
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// One front-end's session. `F` is the type of a file descriptor: `OwnedFd` in production. See the module's header.
pub struct Session<F> {
    cfg: SessionConfig,
    input: Framing<F>,
    agreed: Negotiated,
    rings: Vec<Ring<F>>,
    postcopy: Postcopy,
    /// The message being handled.
    work: Option<Work>,
    /// What it still needs from the owner.
    todo: VecDeque<Todo<F>>,
    /// The effect that the owner has.
    pending: Option<Pending>,
    /// Steps ready to go out before anything else.
    out: VecDeque<Step<F>>,
    /// RESET_DEVICE: rings go back to the beginning once they are stopped.
    forget_rings: bool,
    closed: bool,
    stats: SessionStats,
}

impl<F: 'static> Session<F> {
    /// A session on a new connection.
    pub fn new(mut cfg: SessionConfig) -> Self {
        cfg.queue_pairs = cfg.queue_pairs.clamp(1, QUEUE_PAIRS_MAX);
        cfg.protocol_features &= protocol_feature::IMPLEMENTED;
        if cfg.config_space.is_none() {
            cfg.protocol_features &= !protocol_feature::CONFIG;
        }
        let rings = (0..2 * cfg.queue_pairs).map(|_| Ring::new()).collect();
        Self {
            cfg,
            input: Framing::new(),
            agreed: Negotiated::new(),
            rings,
            postcopy: Postcopy::default(),
            work: None,
            todo: VecDeque::new(),
            pending: None,
            out: VecDeque::new(),
            forget_rings: false,
            closed: false,
            stats: SessionStats::default(),
        }
    }

    /// Take the bytes of one read and the fds that came with it. Fds belong to the last message that begins in these
    /// bytes. After this, call [`Session::step`] until it has nothing more.
    ///
    /// # Errors
    /// [`SessionError::Flooded`] if more is kept than [`BUFFER_BYTES_MAX`]: the owner read on although
    /// [`Session::wants_input`] said no. What the peer does wrong comes as [`Step::Close`], after the steps of the
    /// messages before.
    pub fn feed(&mut self, bytes: &[u8], fds: Vec<F>) -> Result<(), SessionError> {
        self.input.push(bytes, fds)
    }

    /// The next thing for the owner to do. None: more input is needed, or [`Session::complete`], or all is over.
    pub fn step(&mut self) -> Option<Step<F>> {
        self.advance()
    }

    /// The outcome of the one [`Effect`] handed out last.
    pub fn complete(&mut self, outcome: Outcome) {
        self.settle(outcome);
    }

    /// Whether an effect is outstanding.
    pub fn waiting(&self) -> bool {
        self.pending.is_some()
    }

    /// Whether the owner should read on from the socket.
    pub fn wants_input(&self) -> bool {
        self.input.wants_input()
    }

    /// Bytes of messages kept: whole ones that wait their turn, and the beginning of the next.
    pub fn buffered(&self) -> usize {
        self.input.buffered()
    }

    /// Counters.
    pub fn stats(&self) -> &SessionStats {
        &self.stats
    }

    /// Virtio features acknowledged; 0 before SET_FEATURES.
    pub fn features(&self) -> u64 {
        self.agreed.features
    }

    /// Protocol features acknowledged; 0 before SET_PROTOCOL_FEATURES.
    pub fn protocol_features(&self) -> u64 {
        self.agreed.protocol_features
    }

    /// Device status as last set.
    pub fn status(&self) -> u8 {
        self.agreed.status
    }

    /// Guest memory regions that the owner has.
    pub fn regions(&self) -> &[crate::memory::RegionSpec] {
        &self.agreed.regions
    }

    /// How far a postcopy migration to here is.
    pub fn postcopy(&self) -> Phase {
        self.postcopy.phase
    }

    /// The dirty log.
    pub fn log(&self) -> LogState {
        self.agreed.log
    }

    /// All rings, in order of their index.
    pub fn rings(&self) -> impl Iterator<Item = RingView> {
        self.rings.iter().zip(0u16..).map(|(ring, index)| RingView {
            index,
            size: ring.size,
            base: ring.base(&self.agreed),
            enabled: ring.is_enabled(&self.agreed),
            running: ring.running,
        })
    }

    /// How many rings the front-end may name: without MQ only those of one pair.
    fn ring_count(&self) -> u16 {
        match self.agreed.has_protocol(protocol_feature::MQ) {
            true => 2 * self.cfg.queue_pairs,
            false => 2,
        }
    }

    fn ring_index(&self, index: u64) -> Result<u16, Refusal> {
        let rings = self.ring_count();
        match u16::try_from(index) {
            Ok(index) if index < rings => Ok(index),
            _ => Err(Refusal::RingIndex { index, rings }),
        }
    }
}
