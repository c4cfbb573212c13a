//! A legal front-end in the order of QEMU 10, in steps that a test can stop between or disturb.
#![forbid(unsafe_code)]

use super::{Memory, PATIENCE, Ring, Wire, WireError, msg};
use anyhow::{Context, Result, ensure};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Virtio feature bits, as masks.
#[expect(missing_docs, reason = "the specification's own names")]
pub mod virtio {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const HOST_UFO: u64 = 1 << 14;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const LOG_ALL: u64 = 1 << 26;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const RING_PACKED: u64 = 1 << 34;
    pub const HOST_USO: u64 = 1 << 56;
}

/// Protocol feature bits, as masks.
#[expect(missing_docs, reason = "the specification's own names")]
pub mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const RARP: u64 = 1 << 2;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const MTU: u64 = 1 << 4;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const PAGEFAULT: u64 = 1 << 8;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

/// What a front-end wants.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Queue pairs to use.
    pub queue_pairs: u16,
    /// Entries of each ring.
    pub ring_size: u16,
    /// Virtio features to acknowledge where they are offered.
    pub features: u64,
    /// Protocol features to acknowledge where they are offered.
    pub protocol: u64,
    /// Send in pieces of at most this many bytes.
    pub piece: usize,
}

impl Default for Setup {
    fn default() -> Self {
        use protocol as p;
        use virtio as v;
        Self {
            queue_pairs: 1,
            ring_size: 64,
            features: v::CSUM
                | v::GUEST_CSUM
                | v::HOST_TSO4
                | v::HOST_TSO6
                | v::HOST_ECN
                | v::HOST_USO
                | v::MRG_RXBUF
                | v::INDIRECT_DESC
                | v::PROTOCOL_FEATURES
                | v::VERSION_1,
            protocol: p::MQ
                | p::LOG_SHMFD
                | p::RARP
                | p::REPLY_ACK
                | p::MTU
                | p::BACKEND_REQ
                | p::RESET_DEVICE
                | p::CONFIGURE_MEM_SLOTS
                | p::STATUS,
            piece: usize::MAX,
        }
    }
}

/// A front-end: its connection, its memory and its rings. Ring 2·pair is RX, 2·pair + 1 is TX.
#[derive(Debug)]
pub struct Front {
    /// The control connection.
    pub wire: Wire,
    /// Guest memory.
    pub memory: Memory,
    /// All rings.
    pub rings: Vec<Ring>,
    /// Acknowledged virtio features.
    pub features: u64,
    /// Acknowledged protocol features.
    pub protocol: u64,
    /// The back-end's own channel, if it was set up.
    pub back_channel: Option<UnixStream>,
    setup: Setup,
}

impl Front {
    /// The virtio-net header with VERSION_1 or MRG_RXBUF, in bytes (VIRTIO 1.3 §5.1.6).
    pub const HEADER_LEN: usize = 12;

    /// Connects and brings a device up, all the way to running rings.
    pub fn up(path: &Path) -> Result<Self> {
        Self::up_with(path, Setup::default())
    }

    /// As [`Self::up`], with wishes.
    pub fn up_with(path: &Path, setup: Setup) -> Result<Self> {
        let mut front = Self::connect(path, setup)?;
        front.bring_up()?;
        Ok(front)
    }

    /// Everything from the first message to running rings.
    pub fn bring_up(&mut self) -> Result<()> {
        self.negotiate()?;
        self.acknowledge_features()?;
        self.share_memory()?;
        self.start_rings()
    }

    /// Connects only, with memory and rings laid out.
    pub fn connect(path: &Path, setup: Setup) -> Result<Self> {
        let memory = Self::enough_memory(&setup)?;
        Self::connect_with_memory(path, setup, memory)
    }

    /// As [`Self::connect`], over a connection that is there already.
    pub fn over(wire: Wire, setup: Setup) -> Result<Self> {
        let memory = Self::enough_memory(&setup)?;
        Self::with_memory(wire, setup, memory)
    }

    fn enough_memory(setup: &Setup) -> Result<Memory> {
        let rings = 2 * u64::from(setup.queue_pairs);
        let footprint = Ring::footprint(setup.ring_size);
        Ok(Memory::memfd((rings * footprint).max(1 << 20).next_multiple_of(1 << 20))?)
    }

    /// As [`Self::connect`], with rings at the start of memory that is given.
    pub fn connect_with_memory(path: &Path, setup: Setup, memory: Memory) -> Result<Self> {
        let wire = Wire::connect(path).with_context(|| format!("connect to {}", path.display()))?;
        Self::with_memory(wire, setup, memory)
    }

    fn with_memory(mut wire: Wire, setup: Setup, memory: Memory) -> Result<Self> {
        wire.piece = setup.piece;
        let mut front =
            Self { wire, memory, rings: Vec::new(), features: 0, protocol: 0, back_channel: None, setup };
        front.lay_out_rings()?;
        Ok(front)
    }

    /// Makes fresh rings with fresh eventfds in the same memory, as a guest does after a reset.
    pub fn lay_out_rings(&mut self) -> Result<()> {
        let (size, count) = (self.setup.ring_size, 2 * u64::from(self.setup.queue_pairs));
        let footprint = Ring::footprint(size);
        self.memory.write(0, &vec![0; 4096])?;
        self.rings = (0..count)
            .map(|i| Ring::new(&self.memory, i * footprint, size))
            .collect::<std::io::Result<_>>()?;
        for ring in &self.rings {
            self.memory.write(ring.avail, &vec![0; 6 + 2 * usize::from(size)])?;
            self.memory.write(ring.used, &vec![0; 6 + 8 * usize::from(size)])?;
        }
        Ok(())
    }

    /// The first TX ring.
    pub fn tx(&mut self) -> &mut Ring {
        &mut self.rings[1]
    }

    /// The first RX ring.
    pub fn rx(&mut self) -> &mut Ring {
        &mut self.rings[0]
    }

    /// Whether a protocol feature was negotiated.
    pub fn has(&self, feature: u64) -> bool {
        self.protocol & feature != 0
    }

    /// From GET_FEATURES to the enabled rings: what QEMU does before the guest runs.
    pub fn negotiate(&mut self) -> Result<()> {
        let offered = self.wire.ask(msg::GET_FEATURES, &[])?.u64()?;
        self.features = offered & self.setup.features;
        ensure!(offered & virtio::PROTOCOL_FEATURES != 0, "no protocol features: {offered:#x}");
        let offered = self.wire.ask(msg::GET_PROTOCOL_FEATURES, &[])?.u64()?;
        self.protocol = offered & self.setup.protocol;
        self.wire.tell(msg::SET_PROTOCOL_FEATURES, &self.protocol.to_ne_bytes(), &[])?;
        if self.has(protocol::MQ) {
            let pairs = self.wire.ask(msg::GET_QUEUE_NUM, &[])?.u64()?;
            ensure!(pairs >= u64::from(self.setup.queue_pairs), "only {pairs} queue pairs");
        }
        if self.has(protocol::CONFIGURE_MEM_SLOTS) {
            let slots = self.wire.ask(msg::GET_MAX_MEM_SLOTS, &[])?.u64()?;
            ensure!(slots > 0, "no memory slots");
        }
        if self.has(protocol::BACKEND_REQ) {
            let (ours, theirs) = UnixStream::pair()?;
            self.order(msg::SET_BACKEND_REQ_FD, &[], &[theirs.as_raw_fd()])?;
            self.back_channel = Some(ours);
        }
        self.wire.tell(msg::SET_OWNER, &[], &[])?;
        self.wire.ask(msg::GET_FEATURES, &[])?;
        for (i, ring) in self.rings.iter().enumerate() {
            self.wire.tell(msg::SET_VRING_CALL, &(i as u64).to_ne_bytes(), &[ring.call.as_raw_fd()])?;
            self.wire.tell(msg::SET_VRING_ERR, &(i as u64).to_ne_bytes(), &[ring.err.as_raw_fd()])?;
        }
        for i in 0..self.rings.len() {
            self.order(msg::SET_VRING_ENABLE, &state(i as u32, 1), &[])?;
        }
        Ok(())
    }

    /// SET_FEATURES and the first half of the device status.
    pub fn acknowledge_features(&mut self) -> Result<()> {
        self.wire.tell(msg::SET_FEATURES, &self.features.to_ne_bytes(), &[])?;
        // Acknowledge, driver, features ok: QEMU 10 sends 8 first and 15 at the end.
        self.set_status(0x8)
    }

    /// Sets the device status, if that was negotiated.
    pub fn set_status(&self, status: u64) -> Result<()> {
        if self.has(protocol::STATUS) {
            self.wire.ask(msg::GET_STATUS, &[])?.u64()?;
            self.wire.tell(msg::SET_STATUS, &status.to_ne_bytes(), &[])?;
        }
        Ok(())
    }

    /// Hands over guest memory, as a slot or as a table.
    pub fn share_memory(&mut self) -> Result<()> {
        let region = self.memory.region();
        let fd = [self.memory.fd()];
        if self.has(protocol::CONFIGURE_MEM_SLOTS) {
            self.order(msg::ADD_MEM_REG, &mem_reg(region), &fd)
        } else {
            self.order(msg::SET_MEM_TABLE, &mem_table(&[region]), &fd)
        }
    }

    /// Configures and starts all rings, and says DRIVER_OK.
    pub fn start_rings(&mut self) -> Result<()> {
        for index in 0..self.rings.len() {
            self.start_ring(index, 0)?;
        }
        self.set_status(0xf)
    }

    /// Configures and starts one ring at a base.
    pub fn start_ring(&self, index: usize, base: u32) -> Result<()> {
        let ring = &self.rings[index];
        let i = index as u32;
        self.wire.tell(msg::SET_VRING_NUM, &state(i, ring.size.into()), &[])?;
        self.wire.tell(msg::SET_VRING_BASE, &state(i, base), &[])?;
        self.wire.tell(msg::SET_VRING_ADDR, &self.vring_addr(index), &[])?;
        self.wire.tell(msg::SET_VRING_KICK, &u64::from(i).to_ne_bytes(), &[ring.kick.as_raw_fd()])?;
        self.wire.tell(msg::SET_VRING_CALL, &u64::from(i).to_ne_bytes(), &[ring.call.as_raw_fd()])?;
        Ok(())
    }

    /// Payload of SET_VRING_ADDR for a ring where it is.
    pub fn vring_addr(&self, index: usize) -> Vec<u8> {
        let (ring, user) = (&self.rings[index], self.memory.user);
        vring_addr(index as u32, 0, [user + ring.desc, user + ring.used, user + ring.avail, 0])
    }

    /// Stops a ring; its base.
    pub fn stop_ring(&self, index: usize) -> Result<u32> {
        let reply = self.wire.ask(msg::GET_VRING_BASE, &state(index as u32, 0))?;
        let payload = reply.payload.as_slice();
        ensure!(payload.len() == 8, "GET_VRING_BASE was answered with {payload:?}");
        ensure!(payload[..4] == (index as u32).to_ne_bytes(), "the answer is for another ring: {payload:?}");
        Ok(u32::from_ne_bytes([payload[4], payload[5], payload[6], payload[7]]))
    }

    /// Sends a message that must succeed: with need_reply if that was negotiated.
    pub fn order(&self, request: u32, payload: &[u8], fds: &[RawFd]) -> Result<()> {
        if self.has(protocol::REPLY_ACK) {
            let ack = self.wire.order(request, payload, fds)?;
            ensure!(ack == 0, "message {request} was refused ({ack})");
        } else {
            self.wire.tell(request, payload, fds)?;
        }
        Ok(())
    }

    /// Sends a message that must not succeed: either refused, or the connection is closed. `true`: it is still open.
    pub fn refused(&self, request: u32, payload: &[u8], fds: &[RawFd]) -> Result<bool> {
        if request == msg::SET_LOG_BASE {
            // Answered by the log's description, or by zeros.
            self.wire.tell(request, payload, fds)?;
            return match self.wire.reply_to(request) {
                Ok(reply) if reply.payload.iter().any(|b| *b != 0) => anyhow::bail!("the log was accepted"),
                Ok(_) => Ok(true),
                Err(WireError::Closed) => Ok(false),
                Err(error) => Err(error.into()),
            };
        }
        match self.wire.order(request, payload, fds) {
            Ok(0) => anyhow::bail!("message {request} was accepted"),
            Ok(_) => Ok(true),
            Err(WireError::Closed) => Ok(false),
            Err(error) => Err(error).with_context(|| format!("message {request}")),
        }
    }

    /// Sends `count` frames on the first TX ring and waits until the device has used them all. The longest wait for
    /// one batch is returned.
    pub fn prove_alive(&mut self, count: u32) -> Result<Duration> {
        let (frame, size) = (test_frame(), self.setup.ring_size);
        let mut worst = Duration::ZERO;
        let mut left = count;
        while left > 0 {
            let batch = left.min(u32::from(size / 2)).max(1);
            let start = Instant::now();
            let tx = self.tx();
            for _ in 0..batch {
                tx.queue_frame(Self::HEADER_LEN, &frame)?;
            }
            tx.kick()?;
            ensure!(
                tx.is_drained_within(PATIENCE),
                "TX stands still: avail {} used {}",
                tx.avail_idx,
                tx.used_idx()?
            );
            worst = worst.max(start.elapsed());
            left -= batch;
        }
        Ok(worst)
    }
}

/// An Ethernet frame of 60 bytes that nobody wants: IEEE's experimental EtherType.
pub fn test_frame() -> Vec<u8> {
    let mut frame = vec![0x02, 0, 0, 0, 0, 2, 0x02, 0, 0, 0, 0, 1, 0x88, 0xb5];
    frame.resize(60, 0x5a);
    frame
}

/// Payload with a ring's index and a number.
pub fn state(index: u32, number: u32) -> Vec<u8> {
    [index.to_ne_bytes(), number.to_ne_bytes()].concat()
}

/// Payload of SET_VRING_ADDR; addresses are desc, used, avail, log.
pub fn vring_addr(index: u32, flags: u32, addresses: [u64; 4]) -> Vec<u8> {
    let mut payload = state(index, flags);
    addresses.iter().for_each(|a| payload.extend_from_slice(&a.to_ne_bytes()));
    payload
}

/// Payload of ADD_MEM_REG and REM_MEM_REG; a region is guest address, size, user address, offset.
pub fn mem_reg(region: [u64; 4]) -> Vec<u8> {
    let mut payload = vec![0; 8];
    region.iter().for_each(|word| payload.extend_from_slice(&word.to_ne_bytes()));
    payload
}

/// Payload of SET_MEM_TABLE.
pub fn mem_table(regions: &[[u64; 4]]) -> Vec<u8> {
    let mut payload = state(regions.len() as u32, 0);
    regions.iter().flatten().for_each(|word| payload.extend_from_slice(&word.to_ne_bytes()));
    payload
}
