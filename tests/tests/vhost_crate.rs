//! The `vhost` crate's `Frontend`, a second implementation of the protocol's other side, against the real back-end.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use lab::rawfront::{Backend, Front, Memory, Ring, eventually, test_frame};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const PORT: &str = "crate";
const RINGS: usize = 2;
const RING_SIZE: u16 = 128;
const LOG_ALL: u64 = 1 << 26;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection with its memory and rings.
struct Device {
    frontend: Frontend,
    memory: Memory,
    rings: Vec<Ring>,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
    protocol: VhostUserProtocolFeatures,
    features: u64,
}

impl Device {
    fn connect(backend: &Backend) -> Result<Self> {
        // Not `Frontend::connect`: it gives up when the socket is not there yet.
        let path = backend.socket(PORT);
        let mut stream = UnixStream::connect(&path);
        eventually(PATIENCE, || {
            if stream.is_err() {
                stream = UnixStream::connect(&path);
            }
            stream.is_ok()
        });
        let frontend = Frontend::from_stream(stream.context("connect")?, RINGS as u64);
        let footprint = Ring::footprint(RING_SIZE);
        let memory = Memory::memfd((RINGS as u64 * footprint).next_multiple_of(1 << 20))?;
        let rings: std::io::Result<Vec<_>> =
            (0..RINGS as u64).map(|i| Ring::new(&memory, i * footprint, RING_SIZE)).collect();
        let events = || (0..RINGS).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<std::io::Result<Vec<_>>>();
        Ok(Self {
            frontend,
            memory,
            rings: rings?,
            kicks: events()?,
            calls: events()?,
            protocol: VhostUserProtocolFeatures::empty(),
            features: 0,
        })
    }

    /// Features of both kinds; `wanted` are the protocol features.
    fn negotiate(&mut self, wanted: VhostUserProtocolFeatures) -> Result<()> {
        let offered = self.frontend.get_features()?;
        ensure!(offered & PROTOCOL_FEATURES != 0 && offered & VERSION_1 != 0, "offered {offered:#x}");
        self.protocol = self.frontend.get_protocol_features()? & wanted;
        self.frontend.set_protocol_features(self.protocol)?;
        if self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            // From here on every message is acknowledged.
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        self.frontend.set_owner()?;
        self.features = offered & (PROTOCOL_FEATURES | VERSION_1);
        self.frontend.set_features(self.features)?;
        Ok(())
    }

    fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.memory.guest,
            memory_size: self.memory.size,
            userspace_addr: self.memory.user,
            mmap_offset: 0,
            mmap_handle: self.memory.fd(),
        }
    }

    fn share_memory(&mut self) -> Result<()> {
        if self.protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            ensure!(self.frontend.get_max_mem_slots()? > 0, "no memory slots");
            self.frontend.add_mem_region(&self.region())?;
        } else {
            self.frontend.set_mem_table(&[self.region()])?;
        }
        Ok(())
    }

    fn start(&mut self, log: bool) -> Result<()> {
        for i in 0..RINGS {
            let (ring, user) = (&self.rings[i], self.memory.user);
            self.frontend.set_vring_num(i, ring.size)?;
            let config = VringConfigData {
                queue_max_size: ring.size,
                queue_size: ring.size,
                flags: log.into(),
                desc_table_addr: user + ring.desc,
                used_ring_addr: user + ring.used,
                avail_ring_addr: user + ring.avail,
                log_addr: log.then_some(ring.used),
            };
            self.frontend.set_vring_addr(i, &config)?;
            self.frontend.set_vring_base(i, ring.avail_idx)?;
            self.frontend.set_vring_call(i, &self.calls[i])?;
            self.frontend.set_vring_kick(i, &self.kicks[i])?;
            self.frontend.set_vring_enable(i, true)?;
        }
        Ok(())
    }

    /// Sends frames in batches, each with one kick, and waits for their used entries and a call.
    fn send(&mut self, count: u32) -> Result<()> {
        let mut left = count;
        while left > 0 {
            let batch = left.min(u32::from(RING_SIZE));
            let tx = &mut self.rings[1];
            let first = tx.avail_idx;
            for _ in 0..batch {
                tx.queue_frame(Front::HEADER_LEN, &test_frame())?;
            }
            self.kicks[1].write(1)?;
            ensure!(tx.is_drained_within(PATIENCE), "avail {} used {}", tx.avail_idx, tx.used_idx()?);
            let used = tx.take_used()?;
            let heads = (0..batch as u16).map(|i| u32::from(first.wrapping_add(i) % RING_SIZE));
            // VIRTIO 1.3 §2.7.8.2: nothing was written, so the length is 0.
            ensure!(used == heads.map(|head| (head, 0)).collect::<Vec<_>>(), "used entries: {used:?}");
            ensure!(eventually(PATIENCE, || self.calls[1].read().is_ok()), "no call");
            left -= batch;
        }
        Ok(())
    }
}

fn backend() -> Result<Backend> {
    Backend::with_null_ports(&[PORT], 1)
}

#[test]
fn a_full_session() -> Result<()> {
    let backend = backend()?;
    let mut device = Device::connect(&backend)?;
    // MQ is left out: the crate takes GET_QUEUE_NUM for a number of rings, QEMU and we for queue pairs.
    device.negotiate(VhostUserProtocolFeatures::all() & !VhostUserProtocolFeatures::MQ)?;
    ensure!(device.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK), "{:?}", device.protocol);
    device.share_memory()?;
    device.start(false)?;
    device.send(1000)?;
    ensure!(device.frontend.get_vring_base(1)? == 1000, "base of the TX ring");
    ensure!(device.frontend.get_vring_base(0)? == 0, "base of the RX ring");
    // Again from where it was.
    device.start(false)?;
    device.send(100)?;
    ensure!(device.frontend.get_vring_base(1)? == 1100, "base after going on");
    Ok(())
}

/// As an old front-end: a memory table, no acknowledgements.
#[test]
fn a_session_with_no_protocol_features() -> Result<()> {
    let backend = backend()?;
    let mut device = Device::connect(&backend)?;
    device.negotiate(VhostUserProtocolFeatures::empty())?;
    device.share_memory()?;
    device.start(false)?;
    device.send(500)?;
    ensure!(device.frontend.get_vring_base(1)? == 500, "base");
    Ok(())
}

#[test]
fn a_disabled_ring_discards_and_a_reset_starts_anew() -> Result<()> {
    let backend = backend()?;
    let mut device = Device::connect(&backend)?;
    device.negotiate(VhostUserProtocolFeatures::all() & !VhostUserProtocolFeatures::MQ)?;
    device.share_memory()?;
    device.start(false)?;
    device.send(10)?;
    device.frontend.set_vring_enable(1, false)?;
    device.send(10).context("on a disabled ring")?;
    device.frontend.set_vring_enable(1, true)?;
    device.send(10)?;
    device.frontend.reset_device()?;
    device.negotiate_again()?;
    device.start(false)?;
    device.send(10).context("after the reset")?;
    Ok(())
}

impl Device {
    /// What a front-end does after RESET_DEVICE.
    fn negotiate_again(&mut self) -> Result<()> {
        self.frontend.set_features(self.features)?;
        Ok(())
    }
}

/// What is offered as device configuration can be read; what is not is refused, and the session goes on.
#[test]
fn device_configuration() -> Result<()> {
    let backend = backend()?;
    let mut device = Device::connect(&backend)?;
    device.negotiate(VhostUserProtocolFeatures::all() & !VhostUserProtocolFeatures::MQ)?;
    if device.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
        let (_, config) = device.frontend.get_config(0, 12, VhostUserConfigFlags::empty(), &[0; 12])?;
        ensure!(config.len() == 12, "{config:?}");
        // VIRTIO 1.3 §5.1.4: mac, status, max_virtqueue_pairs, mtu.
        let pairs = u16::from_le_bytes([config[8], config[9]]);
        ensure!(pairs <= 1, "max_virtqueue_pairs {pairs}");
    } else {
        println!("CONFIG is not offered");
    }
    device.share_memory()?;
    device.start(false)?;
    device.send(10)
}

/// Precopy migration: the log's reply has the form that the crate waits for, and used rings are logged.
#[test]
fn the_dirty_log() -> Result<()> {
    let backend = backend()?;
    let mut device = Device::connect(&backend)?;
    device.negotiate(VhostUserProtocolFeatures::all() & !VhostUserProtocolFeatures::MQ)?;
    let log = Memory::memfd(1 << 20)?;
    let region = VhostUserDirtyLogRegion { mmap_size: log.size, mmap_offset: 0, mmap_handle: log.fd() };
    device.frontend.set_log_base(0, Some(region))?;
    device.frontend.set_features(device.features | LOG_ALL)?;
    device.share_memory()?;
    device.start(true)?;
    device.send(100)?;
    device.frontend.get_vring_base(1)?;
    let page = device.rings[1].used / 4096;
    let byte = log.read(page / 8, 1)?[0];
    ensure!(byte & (1 << (page % 8)) != 0, "page {page} of the used ring is not in the log");
    // TX reads guest memory: the pages of its buffers must not be dirty.
    let buffer = device.rings[1].buffer(0) / 4096;
    let byte = log.read(buffer / 8, 1)?[0];
    ensure!(byte & (1 << (buffer % 8)) == 0, "a page that was only read is in the log");
    Ok(())
}

#[test]
fn the_number_of_queue_pairs() -> Result<()> {
    let backend = Backend::with_null_ports(&[PORT], 4)?;
    let mut device = Device::connect(&backend)?;
    device.negotiate(VhostUserProtocolFeatures::all())?;
    ensure!(device.frontend.get_queue_num()? == 4, "queue pairs");
    device.share_memory()?;
    device.start(false)?;
    device.send(100)
}

#[test]
fn fifty_sessions_one_after_the_other() -> Result<()> {
    let mut backend = backend()?;
    let mut fds = 0;
    for round in 0..50 {
        let mut device = Device::connect(&backend)?;
        device.negotiate(VhostUserProtocolFeatures::all() & !VhostUserProtocolFeatures::MQ)?;
        device.share_memory()?;
        device.start(false)?;
        device.send(50).with_context(|| format!("round {round}"))?;
        backend.check_alive()?;
        if round == 0 {
            fds = backend.fds()?;
        }
        // The memory of the session before goes by a thread that nobody waits for.
        let settled = eventually(PATIENCE, || backend.fds().is_ok_and(|now| now <= fds));
        ensure!(settled, "fds grow: {:#?}", backend.fd_list());
    }
    Ok(())
}
