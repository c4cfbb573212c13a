//! What has been agreed on with the front-end, and where each ring stands.
//!
//! Plain state with its questions; who changes it when is in `handlers` and in the session's engine. Changes that
//! need the owner are made when the owner says they are done, not before.
#![forbid(unsafe_code)]

use super::effect::RingConfig;
use super::message::virtio_feature;
use crate::memory::RegionSpec;

/// The dirty log, as far as the session cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogState {
    /// SET_LOG_BASE never came.
    None,
    /// The owner has a log.
    Present,
    /// The owner could not use what came; LOG_ALL must not be believed.
    Refused,
}

/// Agreed on with the front-end; starts with a connection and ends with it.
#[derive(Debug)]
pub(super) struct Negotiated {
    /// Virtio features acknowledged; 0 before the first SET_FEATURES.
    pub features: u64,
    /// Protocol features acknowledged; the last SET_PROTOCOL_FEATURES counts.
    pub protocol_features: u64,
    /// Device status (VIRTIO 1.3 §2.1), as stored by SET_STATUS.
    pub status: u8,
    /// Guest memory as the owner has it.
    pub regions: Vec<RegionSpec>,
    /// The dirty log.
    pub log: LogState,
}

impl Negotiated {
    pub fn new() -> Self {
        Self { features: 0, protocol_features: 0, status: 0, regions: Vec::new(), log: LogState::None }
    }

    pub fn has_protocol(&self, bits: u64) -> bool {
        self.protocol_features & bits == bits
    }

    pub fn log_all(&self) -> bool {
        self.features & virtio_feature::LOG_ALL != 0
    }

    /// Whether rings are packed.
    pub fn packed(&self) -> bool {
        self.features & virtio_feature::RING_PACKED != 0
    }

    /// vhost-user: Ring states. Without PROTOCOL_FEATURES rings are enabled from the start.
    pub fn rings_need_enable(&self) -> bool {
        self.features & virtio_feature::PROTOCOL_FEATURES != 0
    }
}

/// Ring addresses as the front-end told them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RingAddresses {
    pub desc_user: u64,
    pub avail_user: u64,
    pub used_user: u64,
    pub log_used: Option<u64>,
}

/// One ring. `F` is the fd type.
///
/// ```text
///            NUM, ADDR, memory, KICK all there
///   stopped ───────────────────────────────────► running
///      ▲   (in any order; BASE need not be sent)    │
///      └────────────────────────────────────────────┘
///        GET_VRING_BASE, SET_STATUS 0, resets; a second KICK goes down and up again
/// ```
#[derive(Debug)]
pub(super) struct Ring<F> {
    pub size: Option<u16>,
    /// Of a stopped ring, where it will start, if that was said; of a running ring, where it was started.
    pub base: Option<u32>,
    pub addresses: Option<RingAddresses>,
    /// A kick that came and was not used yet: `Some(None)` is "poll".
    pub kick: Option<Option<F>>,
    /// The last SET_VRING_ENABLE, from whatever time.
    pub enabled: bool,
    pub running: bool,
}

impl<F> Ring<F> {
    pub fn new() -> Self {
        Self { size: None, base: None, addresses: None, kick: None, enabled: false, running: false }
    }

    /// Whether all that belongs to the ring itself is there, and it does not run.
    pub fn is_complete(&self) -> bool {
        !self.running && self.size.is_some() && self.addresses.is_some() && self.kick.is_some()
    }

    /// Whether the ring counts as enabled under what was agreed on.
    pub fn is_enabled(&self, agreed: &Negotiated) -> bool {
        self.enabled || !agreed.rings_need_enable()
    }

    /// Where the ring will start, or was started. Without SET_VRING_BASE: at its beginning, which in a packed ring is slot 0
    /// with both wrap counters 1 (VIRTIO 1.3 §2.8.1).
    pub fn base(&self, agreed: &Negotiated) -> u32 {
        self.base.unwrap_or(if agreed.packed() { 0x8000_8000 } else { 0 })
    }

    /// What the owner needs to run the ring; none while size or addresses are missing.
    pub fn config(&self, agreed: &Negotiated) -> Option<RingConfig> {
        let addresses = self.addresses?;
        Some(RingConfig {
            size: self.size?,
            base: self.base(agreed),
            desc_user: addresses.desc_user,
            avail_user: addresses.avail_user,
            used_user: addresses.used_user,
            log_used: addresses.log_used,
            enabled: self.is_enabled(agreed),
            features: agreed.features,
        })
    }

    /// Back to the state before the first message about this ring.
    pub fn reset(&mut self) {
        *self = Self::new();
    }
}

/// One ring as logs and statistics see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingView {
    /// Which ring.
    pub index: u16,
    /// Its size, if it was told.
    pub size: Option<u16>,
    /// Of a stopped ring, where it will start; of a running ring, where it was started. As in GET_VRING_BASE.
    pub base: u32,
    /// Whether it counts as enabled.
    pub enabled: bool,
    /// Whether it runs.
    pub running: bool,
}
