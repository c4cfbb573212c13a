//! A front-end's control connection: QEMU's messages in QEMU's order, for a device whose memory is here.
//!
//! Not here: postcopy (`postcopy::session` adds it), rings and packets.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::rawfront::{Wire, mem_table, msg, protocol, state, virtio, vring_addr};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// How long a back-end may take for an answer that needs no page. A blocked one takes a burst of pages.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// ACKNOWLEDGE, DRIVER, FEATURES_OK (VIRTIO 1.3 §2.1) less DRIVER: as QEMU has it before the memory table.
const STATUS_BEGUN: u64 = 0x8;
/// All of them and DRIVER_OK.
const STATUS_RUNS: u64 = 0xf;

/// Offsets of a ring's parts in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Entries; of a split ring, a power of two.
    pub size: u16,
    /// Descriptor table, or packed ring.
    pub desc: u64,
    /// Available ring, or the driver's event suppression area.
    pub avail: u64,
    /// Used ring, or the device's event suppression area.
    pub used: u64,
}

/// One ring's eventfds.
#[derive(Debug)]
pub struct Events {
    /// Driver to device.
    pub kick: EventFd,
    /// Device to driver; nobody listens.
    pub call: EventFd,
    /// Device to front-end: something is wrong.
    pub err: EventFd,
}

impl Events {
    /// New ones.
    pub fn new() -> Result<Self> {
        let event = || EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        Ok(Self { kick: event()?, call: event()?, err: event()? })
    }
}

/// What a front-end wants of a back-end beyond what every one has.
#[derive(Clone, Copy, Debug)]
pub struct Wishes {
    /// Virtio features that are taken where they are offered.
    pub features: u64,
    /// Virtio features that must be offered.
    pub features_needed: u64,
    /// Protocol features that are taken where they are offered.
    pub protocol: u64,
    /// Protocol features that must be offered.
    pub protocol_needed: u64,
    /// How long it waits for an answer.
    pub patience: Duration,
}

impl Default for Wishes {
    fn default() -> Self {
        Self {
            features: 0,
            features_needed: virtio::PROTOCOL_FEATURES | virtio::VERSION_1,
            protocol: protocol::MQ | protocol::REPLY_ACK | protocol::STATUS,
            protocol_needed: 0,
            patience: PATIENCE,
        }
    }
}

/// A control connection with its negotiated state.
#[derive(Debug)]
pub struct Session {
    pub(crate) wire: Wire,
    features: u64,
    protocol: u64,
    rings: u32,
}

impl Session {
    /// Connects, negotiates, and does all that QEMU does before it tells the memory. `events` has those of each ring.
    pub fn open(socket: &Path, wishes: Wishes, events: &[Events]) -> Result<Self> {
        let mut wire =
            Wire::connect(socket).with_context(|| format!("connecting to {}", socket.display()))?;
        wire.patience = wishes.patience;
        let offered = wire.ask(msg::GET_FEATURES, &[])?.u64()?;
        let missing = wishes.features_needed & !offered;
        ensure!(
            missing == 0,
            "the back-end does not offer virtio features {missing:#x} (offers {offered:#x})"
        );
        let features = offered & (wishes.features | wishes.features_needed);
        let offered = wire.ask(msg::GET_PROTOCOL_FEATURES, &[])?.u64()?;
        let missing = wishes.protocol_needed & !offered;
        ensure!(
            missing == 0,
            "the back-end does not offer protocol features {missing:#x} (offers {offered:#x})"
        );
        let protocol = offered & (wishes.protocol | wishes.protocol_needed);
        wire.tell(msg::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[])?;
        let it = Self { wire, features, protocol, rings: events.len() as u32 };
        if it.has(protocol::MQ) {
            it.wire.ask(msg::GET_QUEUE_NUM, &[])?.u64()?;
        }
        it.wire.tell(msg::SET_OWNER, &[], &[])?;
        it.wire.ask(msg::GET_FEATURES, &[])?;
        for (i, ring) in events.iter().enumerate() {
            it.wire.tell(msg::SET_VRING_CALL, &(i as u64).to_ne_bytes(), &[ring.call.as_raw_fd()])?;
            it.wire.tell(msg::SET_VRING_ERR, &(i as u64).to_ne_bytes(), &[ring.err.as_raw_fd()])?;
        }
        it.enable_rings()?;
        Ok(it)
    }

    /// Whether a protocol feature was negotiated.
    pub fn has(&self, feature: u64) -> bool {
        self.protocol & feature != 0
    }

    /// Virtio features that were negotiated.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// A message whose acceptance is confirmed, where the back-end can.
    pub fn order(&self, request: u32, payload: &[u8], fds: &[RawFd]) -> Result<()> {
        if self.has(protocol::REPLY_ACK) {
            let ack = self.wire.order(request, payload, fds).with_context(|| format!("message {request}"))?;
            ensure!(ack == 0, "message {request} was refused ({ack})");
        } else {
            self.wire.tell(request, payload, fds)?;
        }
        Ok(())
    }

    /// SET_VRING_ENABLE for all rings.
    pub fn enable_rings(&self) -> Result<()> {
        (0..self.rings).try_for_each(|i| self.order(msg::SET_VRING_ENABLE, &state(i, 1), &[]))
    }

    /// What QEMU sends before the memory table.
    pub fn begin(&self) -> Result<()> {
        self.enable_rings()?;
        self.wire.tell(msg::SET_FEATURES, &self.features.to_ne_bytes(), &[])?;
        self.set_status(STATUS_BEGUN)
    }

    fn set_status(&self, status: u64) -> Result<()> {
        if self.has(protocol::STATUS) {
            self.wire.ask(msg::GET_STATUS, &[])?.u64()?;
            self.wire.tell(msg::SET_STATUS, &status.to_ne_bytes(), &[])?;
        }
        Ok(())
    }

    /// The memory table: one region at guest address 0, `len` bytes of `file`, which this program has mapped at `user`.
    pub fn set_table(&self, file: &File, len: u64, user: u64) -> Result<()> {
        self.wire.tell(msg::SET_MEM_TABLE, &mem_table(&[[0, len, user, 0]]), &[file.as_raw_fd()])?;
        self.ping().map(drop)
    }

    /// Configures and starts one ring. `base` is where it goes on (vhost-user: VRING_BASE), `user` where this program has
    /// mapped guest memory.
    pub fn start_ring(
        &self,
        ring: usize,
        place: &Place,
        base: u32,
        user: u64,
        events: &Events,
    ) -> Result<()> {
        let i = ring as u32;
        let addresses = [user + place.desc, user + place.used, user + place.avail, 0];
        self.wire.tell(msg::SET_VRING_NUM, &state(i, place.size.into()), &[])?;
        self.wire.tell(msg::SET_VRING_BASE, &state(i, base), &[])?;
        self.wire.tell(msg::SET_VRING_ADDR, &vring_addr(i, 0, addresses), &[])?;
        self.wire.tell(msg::SET_VRING_KICK, &u64::from(i).to_ne_bytes(), &[events.kick.as_raw_fd()])?;
        self.wire.tell(msg::SET_VRING_CALL, &u64::from(i).to_ne_bytes(), &[events.call.as_raw_fd()])?;
        Ok(())
    }

    /// DRIVER_OK. It waits for an answer, which a back-end may give only when its rings run.
    pub fn driver_ok(&self) -> Result<()> {
        self.set_status(STATUS_RUNS)
    }

    /// A message that only asks: how long until its answer.
    pub fn ping(&self) -> Result<Duration> {
        let start = Instant::now();
        self.wire.ask(msg::GET_FEATURES, &[]).context("GET_FEATURES")?.u64()?;
        Ok(start.elapsed())
    }

    /// GET_VRING_BASE: stops a ring; how long that took, and where it stopped.
    pub fn stop_ring(&self, ring: usize) -> Result<(Duration, u16)> {
        let start = Instant::now();
        let reply = self.wire.ask(msg::GET_VRING_BASE, &state(ring as u32, 0)).context("GET_VRING_BASE")?;
        let took = start.elapsed();
        let payload = reply.payload.as_slice();
        ensure!(payload.len() == 8, "GET_VRING_BASE was answered with {payload:?}");
        ensure!(payload[..4] == (ring as u32).to_ne_bytes(), "the answer is for another ring: {payload:?}");
        Ok((took, u16::from_ne_bytes([payload[4], payload[5]])))
    }

    /// From now on, no answer within this time is an error.
    pub fn set_patience(&mut self, patience: Duration) {
        self.wire.patience = patience;
    }

    /// The guest resets the device.
    pub fn reset_status(&self) -> Result<()> {
        if self.has(protocol::STATUS) {
            self.wire.tell(msg::SET_STATUS, &0u64.to_ne_bytes(), &[])?;
        }
        Ok(())
    }
}
