//! An interface with its NIC queues and all its ports' sockets, shared by the ports.
//!
//! Here: opening it, which sockets take part in the steering, addresses that are learned, copies for local ports.
//! Everything but opening is quick: some map updates at most. Not here: a port as the rest of the program sees it (`port`), its
//! queues at work (`queue`).
#![forbid(unsafe_code)]

use super::error::XdpError;
use super::inbox::{Inbox, Reader};
use super::interface::Interface;
use super::nic_queue::{Lane, Made, Members, NicQueue, make_queues};
use super::program::{Mode, Options, SLOTS_MAX, XdpProgram, unload};
use super::socket::{Losses, ZeroCopy};
use super::switch::{Learned, Link, Mac, Rules, Table};
use super::topology::Topology;
use super::umem::{LINK_BYTES, MTU_MAX, frame_size};
use ebpf_common::xdp::{FLOOD_SLOT, PORTS_MAX, QUEUES_MAX, Steer};
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

/// What all ports of an interface share, as they were told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NicOptions {
    /// NIC queues to use; none: all.
    pub queues: Option<u32>,
    /// Where the program is attached.
    pub mode: Mode,
    /// Whether the kernel copies frames.
    pub zero_copy: ZeroCopy,
    /// Take the place of a program that is there.
    pub replace: bool,
}

/// One port as it is to be.
#[derive(Clone, Debug)]
pub struct PortOptions {
    /// Its name, for messages.
    pub name: String,
    /// Its queue pairs.
    pub pairs: u32,
    /// Its addresses and wishes.
    pub rules: Rules,
    /// Its largest layer-3 packet, if it was told one.
    pub mtu: Option<u16>,
}

/// What the ports of an interface know of each other.
pub struct PortState {
    /// Its name, for messages.
    pub name: String,
    /// Its place among the interface's ports.
    pub index: u32,
    /// What it was told.
    pub rules: Rules,
    /// Bytes of virtio-net header before each frame.
    pub header_len: AtomicUsize,
    /// Its addresses are those of a front-end that has left.
    pub stale: AtomicBool,
    /// It was told that the interface is gone.
    pub told_gone: AtomicBool,
    inboxes: Vec<Arc<Inbox>>,
    live: Vec<AtomicBool>,
}

impl PortState {
    /// Whether any of its pairs receives.
    pub fn is_live(&self) -> bool {
        self.live.iter().any(|live| live.load(Ordering::Relaxed))
    }

    /// The inbox of the pair that takes a frame; `spread` chooses among those that receive.
    fn inbox(&self, spread: usize) -> Option<&Arc<Inbox>> {
        let live = || self.live.iter().zip(&self.inboxes).filter(|(live, _)| live.load(Ordering::Relaxed));
        let count = live().count();
        if count == 0 { None } else { live().nth(spread % count).map(|(_, inbox)| inbox) }
    }
}

/// What a pair's queue is made of.
pub struct PairParts {
    /// Its sockets.
    pub lanes: Vec<Lane>,
    /// Its inbox.
    pub inbox: Reader,
}

/// An interface with its ports.
pub struct Nic {
    /// The interface.
    pub interface: Interface,
    /// Which sockets there are.
    pub topology: Topology,
    /// Its ports.
    pub ports: Vec<Arc<PortState>>,
    /// Its MTU when it was opened, bytes.
    pub mtu: u16,
    program: XdpProgram,
    queues: Vec<Arc<NicQueue>>,
    /// By port and NIC queue.
    sockets: Vec<Vec<Members>>,
    table: RwLock<Table>,
    /// Changes of the steering take turns.
    steering: Mutex<()>,
    gone: AtomicBool,
    /// The steering still knows addresses of an earlier process.
    has_old: AtomicBool,
}

impl Nic {
    /// Attaches the program and makes all sockets. Sleeps; for the time before the loop.
    ///
    /// # Errors
    /// An [`XdpError`] that says what to do.
    pub fn open(
        name: &str,
        options: &NicOptions,
        ports: &[PortOptions],
    ) -> Result<(Arc<Self>, Vec<Vec<PairParts>>), XdpError> {
        let interface = Interface::named(name).map_err(|error| XdpError::no_interface(name, error))?;
        let call = |step| move |error| XdpError::Call(name.into(), step, error);
        let mtu = interface.mtu().map_err(call("its MTU"))?;
        let size = frame_size(mtu).ok_or(XdpError::MtuTooLarge(name.into(), mtu, MTU_MAX))?;
        if let Some(port) = ports.iter().find(|port| port.mtu.is_some_and(|wish| u32::from(wish) > mtu)) {
            return Err(XdpError::PortMtu(name.into(), port.name.clone(), port.mtu.unwrap_or(0), mtu));
        }
        let queues = count_queues(&interface, options.queues)?;
        if ports.len() > PORTS_MAX as usize {
            return Err(XdpError::TooManyPorts(name.into(), ports.len(), PORTS_MAX));
        }
        let topology = Topology { queues, pairs: ports.iter().map(|port| port.pairs).collect() };
        if topology.slots() > SLOTS_MAX {
            return Err(XdpError::TooManySockets(name.into(), topology.slots() - 1, SLOTS_MAX - 1));
        }
        let program = XdpProgram::attach(&Options {
            interface: name.into(),
            index: interface.index(),
            mode: options.mode,
            queues,
            ports: ports.len() as u32,
            slots: topology.slots(),
            flood: ports.iter().any(|port| port.rules.flood),
            replace: options.replace,
        })?;
        let was_pinned = program.was_pinned();
        let built = Self::build(interface, program, topology, size, mtu as u16, options.zero_copy, ports);
        if built.is_err() && !was_pinned {
            // Nobody is going to serve what has just been attached.
            if let Err(error) = unload(name) {
                tracing::warn!(%error, "the program stays attached");
            }
        }
        built
    }

    /// Makes all sockets of an interface whose program is attached.
    fn build(
        interface: Interface,
        program: XdpProgram,
        topology: Topology,
        frame_size: u32,
        mtu: u16,
        zero_copy: ZeroCopy,
        ports: &[PortOptions],
    ) -> Result<(Arc<Self>, Vec<Vec<PairParts>>), XdpError> {
        let call = |step| {
            let name = interface.name().to_owned();
            move |error| XdpError::Call(name, step, error)
        };
        let host = interface.mac().map_err(call("its address"))?;
        let table = Table::new(ports.iter().map(|port| port.rules).collect(), host);
        for (key, port) in table.addresses() {
            program.set_mac(key, Some(port)).map_err(call("giving a port its address"))?;
        }
        let Made { queues, sockets, lanes } = make_queues(&interface, &topology, frame_size, zero_copy)?;
        let mut states = Vec::new();
        let mut parts = Vec::new();
        let mut lanes = lanes.into_iter();
        for (index, port) in (0..).zip(ports) {
            let mut inboxes = Vec::new();
            let mut pairs = Vec::new();
            for lanes in lanes.by_ref().take(port.pairs as usize) {
                let (inbox, reader) = Inbox::new(mtu as usize + LINK_BYTES).map_err(call("an eventfd"))?;
                inboxes.push(inbox);
                pairs.push(PairParts { lanes, inbox: reader });
            }
            states.push(Arc::new(PortState {
                name: port.name.clone(),
                index,
                rules: port.rules,
                header_len: AtomicUsize::new(12),
                stale: AtomicBool::new(false),
                told_gone: AtomicBool::new(false),
                inboxes,
                live: (0..port.pairs).map(|_| AtomicBool::new(false)).collect(),
            }));
            parts.push(pairs);
        }
        let has_old = program.was_pinned();
        let forgets = call("forgetting old addresses");
        let nic = Self {
            interface,
            topology,
            ports: states,
            mtu,
            program,
            queues,
            sockets,
            table: RwLock::new(table),
            steering: Mutex::new(()),
            gone: AtomicBool::new(false),
            has_old: AtomicBool::new(has_old),
        };
        nic.forget_old().map_err(forgets)?;
        Ok((Arc::new(nic), parts))
    }

    /// How the program is attached and frames move, in words.
    pub fn describe(&self) -> String {
        let copies =
            if self.queues.iter().all(|queue| queue.first.is_zero_copy()) { "zero-copy" } else { "copy" };
        let pinned = if self.program.was_pinned() { ", program found attached" } else { "" };
        let mode = match self.program.attached_mode() {
            Mode::Skb => "skb",
            _ => "native",
        };
        format!("{mode} mode, {copies}, {} receive queue(s){pinned}", self.queues.len())
    }

    /// Lets a pair take part in the steering, or takes it out: its port's sockets that take part stand together from the
    /// first slot on. Without any, frames for the port are dropped and counted.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_active(&self, port: &PortState, pair: u16, active: bool) -> io::Result<()> {
        if self.is_gone() {
            return Err(io::Error::other("the interface is gone; create it again and restart this program"));
        }
        let _turn = self.steering.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(live) = port.live.get(usize::from(pair)) else { return Ok(()) };
        if active && port.stale.swap(false, Ordering::Relaxed) {
            // Another guest, maybe: it shows its own addresses. Nobody learns one of the old before the program has
            // forgotten it, too: it would forget whose it is now.
            let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
            table.forget(port.index).into_iter().try_for_each(|key| self.program.set_mac(key, None))?;
        }
        live.store(active, Ordering::Relaxed);
        for queue in self.topology.queues_of(port.index as usize, pair.into()) {
            self.steer(port, queue)?;
        }
        self.forget_old()
    }

    /// Lets go of addresses that an earlier process has left, once each port has shown its own: until then their frames
    /// are dropped, and do not reach the stack.
    fn forget_old(&self) -> io::Result<()> {
        if !self.has_old.load(Ordering::Relaxed) {
            return Ok(());
        }
        let all = {
            let table = self.table();
            self.ports.iter().all(|port| table.addresses().any(|(_, owner)| owner == port.index))
        };
        if all {
            self.has_old.store(false, Ordering::Relaxed);
            self.program.forget_old_macs()?;
        }
        Ok(())
    }

    fn steer(&self, port: &PortState, queue: u32) -> io::Result<()> {
        let slots = self.topology.slots_of(port.index as usize);
        let is_live = |port: &PortState, pair: u32| port.live[pair as usize].load(Ordering::Relaxed);
        let sockets = &self.sockets[port.index as usize][queue as usize];
        let live: Vec<_> =
            sockets.iter().filter(|(pair, _)| is_live(port, *pair)).map(|(_, socket)| socket).collect();
        let steer = Steer { first: slots.start, count: live.len() as u32 };
        // Slots are never counted that have no socket.
        if live.is_empty() {
            self.program.set_steer(queue, port.index, Steer { count: 0, ..steer })?;
        }
        for (slot, socket) in slots.clone().zip(&live) {
            self.program.set_socket(queue, slot, Some(socket.fd().as_fd()))?;
        }
        self.program.set_steer(queue, port.index, steer)?;
        for slot in slots.skip(live.len()) {
            self.program.set_socket(queue, slot, None)?;
        }
        // Broadcasts are taken while somebody is there who empties the ring.
        let on_queue = |port: &&Arc<PortState>| {
            port.rules.flood
                && self.topology.pairs_on(port.index as usize, queue).any(|pair| is_live(port, pair))
        };
        let flood = self.ports.iter().any(|port| on_queue(&port));
        let first = &self.queues[queue as usize].first;
        self.program.set_socket(queue, FLOOD_SLOT, flood.then(|| first.fd().as_fd()))
    }

    /// The addresses and their owners, for a burst.
    pub fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a port's guest sends with an address, and steers frames for it to the port.
    pub fn learn(&self, port: &PortState, source: Mac) -> Learned {
        let is_live = |other: u32| self.ports[other as usize].is_live();
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let learned = table.learn(port.index, source, is_live);
        if let Learned::New(key) = learned
            && let Err(error) = self.program.set_mac(key, Some(port.index))
        {
            tracing::warn!(port = port.name, %error, "an address was not learned");
        }
        learned
    }

    /// Copies a frame to every port that wants it, but for its sender.
    pub fn flood(&self, frame: &[u8], spread: usize, wanted: impl Fn(&PortState) -> bool) -> u64 {
        let mut copies = 0;
        for port in self.ports.iter().filter(|port| wanted(port)) {
            if let Some(inbox) = port.inbox(spread) {
                copies += u64::from(inbox.write().push(frame));
            }
        }
        copies
    }

    /// Copies frames to a port, as many as come.
    pub fn deliver<'a>(&self, port: u32, spread: usize, frames: impl Iterator<Item = &'a [u8]>) {
        let Some(inbox) = self.ports.get(port as usize).and_then(|port| port.inbox(spread)) else { return };
        let mut writer = inbox.write();
        for frame in frames {
            writer.push(frame);
        }
    }

    /// Copies a group frame that a local port sends to the others.
    pub fn flood_local(&self, sender: u32, link: &Link, frame: &[u8], spread: usize) -> u64 {
        self.flood(frame, spread, |port| {
            port.index != sender && port.rules.local_switch && port.rules.wants_flood(link.vlan)
        })
    }

    /// Whether the interface is known to be gone.
    #[inline]
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// The interface was found to be gone. True the first time for each port.
    pub fn note_gone(&self, port: &PortState) -> bool {
        self.gone.store(true, Ordering::Relaxed);
        !port.told_gone.swap(true, Ordering::Relaxed)
    }

    /// What the kernel counts for a port and its interface, in words; only what is not zero.
    pub fn report(&self, port: &PortState) -> String {
        let mut losses = Losses::default();
        for (_, socket) in self.sockets[port.index as usize].iter().flatten() {
            let more = socket.losses();
            losses.dropped += more.dropped;
            losses.ring_full += more.ring_full;
            losses.fill_empty += more.fill_empty;
        }
        let steered = self.program.port_stats(port.index).unwrap_or_default();
        let all = self.program.stats().unwrap_or_default();
        let counts = [
            ("xdp_steered", steered.hits),
            ("xdp_dropped_no_socket", steered.drop_no_socket),
            ("xdp_dropped_queue", steered.drop_queue),
            ("xdp_ring_full", losses.ring_full),
            ("xdp_dropped", losses.dropped),
            ("xdp_fill_empty", losses.fill_empty),
            ("nic_flooded", all.flooded),
            ("nic_to_stack", all.misses + all.short),
        ];
        let words: Vec<_> =
            counts.iter().filter(|(_, n)| *n > 0).map(|(name, n)| format!("{name}={n}")).collect();
        words.join(" ")
    }
}

/// How many NIC queues to use.
fn count_queues(interface: &Interface, wish: Option<u32>) -> Result<u32, XdpError> {
    let name = interface.name();
    let has = interface.receive_queues();
    match (wish, has) {
        (Some(wish), Some(has)) if wish > has => Err(XdpError::TooManyQueues(name.into(), wish, has)),
        (Some(wish), has) => {
            if let Some(has) = has.filter(|has| *has > wish) {
                tracing::warn!(
                    "xdp:{name}: it has {has} receive queues and {wish} are served: frames for the ports that arrive on \
                     others are dropped; use queues={has}, or give it fewer: `ethtool -L {name} combined {wish}`"
                );
            }
            Ok(wish)
        }
        (None, Some(has)) if has > QUEUES_MAX => Err(XdpError::ManyQueues(name.into(), has, QUEUES_MAX)),
        (None, has) => Ok(has.unwrap_or(1)),
    }
}
