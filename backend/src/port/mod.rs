//! Ports: one vhost-user device with its uplink, as control sees it.
//!
//! Lives here: a port's state between messages ([`Port`]), its control connection ([`connection`]), how the
//! session's effects are carried out step by step ([`plan`]), and the calls that may sleep, on a thread of their
//! own ([`helper`]). All of it runs on the first worker. Not here: what a message means (`session`), how packets
//! move (`worker`, `net`).
//!
//! ```text
//!  socket ─bytes, fds─► Session ─Effect─► plan: [helper job]* [commands to pairs]* ─Outcome─► Session ─reply─► socket
//! ```
//! One effect is carried out at a time, and none of its steps makes the loop wait: the port is simply not asked to
//! go on until the helper or the pairs have answered.

pub mod connection;
pub mod control;
mod faulting;
mod fds;
pub mod helper;
mod limit;
mod nudge;
mod observed;
pub mod plan;
mod postcopy;
mod report;
pub mod token;

use crate::config::{PortConfig, PostcopyMultiqueue};
use crate::memory::{DirtyLog, GuestMemory};
use crate::net::counters::{PairCounters, PairCounts};
use crate::net::features;
use crate::observe;
use crate::reactor::PeerFd;
use crate::session::{ConfigSpace, Session, SessionConfig, protocol_feature};
use crate::uplink::{FrameFormat, Uplink};
use crate::virtq::QueueConfig;
use connection::Connection;
use limit::LogLimit;
use plan::Plan;
use std::sync::Arc;

/// Most memory slots offered to a front-end that adds regions one by one (CONFIGURE_MEM_SLOTS). QEMU takes the
/// smaller of this and its own limit; each slot costs a file descriptor.
pub const MEM_SLOTS_MAX: u64 = 509;
/// Fewest memory slots offered, however many ports there are: as many regions as SET_MEM_TABLE has.
pub const MEM_SLOTS_MIN: u64 = 8;

/// Warnings of one port that reach the log in ten seconds; the rest is counted.
const WARNINGS: u32 = 10;
/// Other lines that a front-end can cause (it comes, goes, announces), likewise.
const NOTES: u32 = 200;

/// One vhost-user device with its uplink.
pub struct Port {
    /// Its place in the configuration.
    pub id: u16,
    /// What it was told to be.
    pub config: PortConfig,
    /// Where its packets go.
    pub uplink: Arc<dyn Uplink>,
    /// Counters of its pairs.
    pub counters: Vec<Arc<PairCounters>>,
    pub(crate) endpoint: connection::Endpoint,
    pub(crate) connection: Option<Connection>,
    pub(crate) session: Option<Session<PeerFd>>,
    pub(crate) memory: GuestMemory,
    pub(crate) log: Option<Arc<DirtyLog>>,
    pub(crate) log_on: bool,
    /// Which pairs take part in the uplink's steering: those whose receive ring runs and is enabled.
    pub(crate) live: Vec<bool>,
    pub(crate) plan: Plan,
    pub(crate) postcopy: postcopy::Postcopy,
    /// The helper looks for pages that came by themselves, perhaps in regions that have gone since.
    pub(crate) is_scanned: bool,
    /// PAGEFAULT is offered.
    pub(crate) postcopy_offered: bool,
    /// Messages from us to the front-end would go here; none is needed so far.
    pub(crate) backend_channel: Option<PeerFd>,
    /// The frame format that the uplink was last told.
    pub(crate) format: Option<FrameFormat>,
    mem_slots: u64,
    pub(crate) warnings: LogLimit,
    pub(crate) notes: LogLimit,
    /// Connections that were refused their goal: session errors, vanished memory.
    pub(crate) failures: u64,
    /// Its front-end brought too many descriptors that take long to close: no other is served before they are gone.
    pub(crate) brought_strangers: bool,
    /// Warnings about messages that were not obeyed, whether logged or not.
    pub(crate) refused: u64,
    /// Where its running rings are, by index, for the observer.
    pub(crate) rings: Vec<Option<QueueConfig>>,
    /// Learns what the port's memory is.
    pub(crate) observer: observe::Handle,
    /// Stalls on the port's memory that were measured.
    pub(crate) stalls: observe::events::Totals,
}

impl Port {
    /// A port without a front-end.
    pub fn new(
        id: u16,
        config: PortConfig,
        uplink: Arc<dyn Uplink>,
        counters: Vec<Arc<PairCounters>>,
        endpoint: connection::Endpoint,
        mem_slots: u64,
        postcopy_offered: bool,
    ) -> Self {
        let pairs = usize::from(config.queue_pairs);
        Self {
            id,
            config,
            uplink,
            counters,
            endpoint,
            connection: None,
            session: None,
            memory: GuestMemory::empty(),
            log: None,
            log_on: false,
            live: vec![false; pairs],
            plan: Plan::default(),
            postcopy: postcopy::Postcopy::default(),
            is_scanned: false,
            postcopy_offered,
            backend_channel: None,
            format: None,
            mem_slots,
            warnings: LogLimit::new(WARNINGS),
            notes: LogLimit::new(NOTES),
            failures: 0,
            brought_strangers: false,
            refused: 0,
            rings: vec![None; 2 * pairs],
            observer: observe::Handle::default(),
            stalls: observe::events::Totals::default(),
        }
    }

    /// The port's name, for log lines.
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// Queue pairs.
    pub fn pairs(&self) -> u16 {
        self.config.queue_pairs
    }

    /// Sum of the counters of all pairs.
    pub fn counts(&self) -> PairCounts {
        self.counters.iter().fold(PairCounts::default(), |mut sum, pair| {
            sum.add(&pair.read());
            sum
        })
    }

    /// A session for a new connection.
    pub(crate) fn new_session(&self) -> Session<PeerFd> {
        use protocol_feature as pf;
        let capabilities = self.uplink.capabilities();
        let mut protocol_features = pf::MQ
            | pf::LOG_SHMFD
            | pf::RARP
            | pf::REPLY_ACK
            | pf::MTU
            | pf::BACKEND_REQ
            | pf::RESET_DEVICE
            | pf::CONFIGURE_MEM_SLOTS
            | pf::STATUS;
        let resend = self.config.postcopy_multiqueue == PostcopyMultiqueue::Resend && self.pairs() > 1;
        if self.postcopy_offered {
            protocol_features |= pf::PAGEFAULT;
        }
        let mtu = self.config.mtu.unwrap_or(capabilities.mtu);
        let mut virtio = features::offered(&capabilities, self.pairs());
        let config_space = self.config.mac.map(|mac| {
            protocol_features |= pf::CONFIG;
            virtio |= 1 << virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;
            config_space(mac, self.pairs(), mtu)
        });
        Session::new(SessionConfig {
            features: virtio,
            protocol_features: protocol_features & !self.config.disabled_protocol_features,
            queue_pairs: self.pairs(),
            max_mem_slots: self.mem_slots,
            config_space: config_space.and_then(ConfigSpace::new),
            mtu_max: self.config.mtu.unwrap_or(u16::MAX),
            postcopy_resend: resend,
        })
    }

    /// The memory snapshot that pairs should use now: with the log while LOG_ALL is on.
    pub(crate) fn snapshot(&self) -> GuestMemory {
        self.memory.with_log(self.log.clone().filter(|_| self.log_on))
    }
}

/// `struct virtio_net_config` up to the MTU (VIRTIO 1.3 §5.1.4), for VMMs that read it from the back-end.
fn config_space(mac: [u8; 6], pairs: u16, mtu: u16) -> Vec<u8> {
    const LINK_UP: u16 = 1;
    let mut bytes = mac.to_vec();
    bytes.extend_from_slice(&LINK_UP.to_le_bytes());
    bytes.extend_from_slice(&pairs.to_le_bytes());
    bytes.extend_from_slice(&mtu.to_le_bytes());
    bytes
}
