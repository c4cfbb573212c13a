//! An interface with its NIC queues and all its ports' sockets, shared by the ports.
//!
//! Here: opening it, which sockets take part in the steering, addresses that are learned, copies for local ports.
//! Everything but opening is quick: some map updates. Not here: a port as the rest of the program sees it (`port`), its
//! queues at work (`queue`).

use super::error::XdpError;
use super::frames::{Frames, Quotas};
use super::inbox::{Inbox, Reader};
use super::interface::Interface;
use super::program::{Mode, Options, XdpProgram};
use super::rings::{Consumer, Producer};
use super::socket::{Descriptor, Losses, Socket, SocketError, ZeroCopy};
use super::switch::{Learned, Link, Mac, Rules, Table};
use super::topology::Topology;
use super::umem::{LINK_BYTES, MTU_MAX, Umem, frame_size};
use ebpf_common::xdp::{FLOOD_SLOT, PORTS_MAX, QUEUES_MAX, Steer};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

/// Entries of a socket's RX ring, where few sockets share a NIC queue.
const RX_RING: u32 = 1024;
/// Frames that a sending socket has, likewise.
const TX_FRAMES: u32 = 1024;
/// Sockets of one NIC queue after which each has less.
const FEW: u32 = 8;
/// Entries and frames then.
const RING_SMALL: u32 = 256;
/// Frames that FILL holds in any case.
const FILL_RESERVE: u32 = 1024;
/// Frames that a pair takes off its RX ring at once.
pub const BURST: u32 = 64;
/// Frames that a pair can hold beyond its RX ring: taken off it, or on the way back to FILL.
const AT_HAND: u32 = 2 * BURST;

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

/// Memory, FILL and COMPLETION of a NIC queue: one worker uses them.
pub struct NicQueue {
    /// Its number.
    pub number: u32,
    /// The frames.
    pub umem: Arc<Umem>,
    first: Socket,
    rings: Mutex<Rings>,
}

/// The rings of a NIC queue that all its sockets share, and those of its first socket, which takes broadcasts.
pub struct Rings {
    /// Frames for the kernel to receive into.
    pub fill: Producer<u64>,
    /// Free frames for sending.
    pub frames: Frames,
    /// Broadcast and multicast.
    pub flood: Consumer<Descriptor>,
    completion: Consumer<u64>,
}

impl NicQueue {
    /// The shared rings. The lock is free, since one worker serves the queue; it is taken once a burst.
    #[inline]
    pub fn rings(&self) -> MutexGuard<'_, Rings> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What turns readable when a broadcast has come.
    pub fn flood_fd(&self) -> &Arc<OwnedFd> {
        self.first.fd()
    }
}

impl Rings {
    /// Takes back the frames that were sent.
    #[inline]
    pub fn reap(&mut self, umem: &Umem) {
        let frames = &mut self.frames;
        self.completion.take(u32::MAX, |address| {
            let known = frames.give_back(umem.locate(address).0);
            debug_assert!(known, "the kernel completed frame {address:#x} that is not with it");
        });
    }
}

/// A pair's socket on a NIC queue, as its queue gets it.
pub struct Lane {
    /// The NIC queue.
    pub queue: Arc<NicQueue>,
    /// The socket.
    pub socket: Arc<Socket>,
    /// What it receives.
    pub rx: Consumer<Descriptor>,
    /// What it sends, and whose frames those are; only where it sends.
    pub tx: Option<(Producer<Descriptor>, u32)>,
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
    /// Sockets by port, NIC queue and place in the steering, with their pairs.
    sockets: Vec<Vec<Vec<(u32, Arc<Socket>)>>>,
    table: RwLock<Table>,
    /// Changes of the steering take turns.
    steering: Mutex<()>,
    gone: AtomicBool,
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
        let program = XdpProgram::attach(&Options {
            interface: name.into(),
            index: interface.index(),
            mode: options.mode,
            queues,
            ports: ports.len() as u32,
            slots: topology.slots(),
            flood: ports.iter().any(|port| port.rules.flood),
            replace: options.replace,
        })
        .map_err(|error| XdpError::program(name, error))?;
        let table = Table::new(ports.iter().map(|port| port.rules).collect());
        for (key, port) in table.addresses() {
            program.set_mac(key, Some(port)).map_err(|error| XdpError::program(name, error))?;
        }
        let made = make_queues(&interface, &topology, size, options.zero_copy)?;
        let mut states = Vec::new();
        let mut parts = Vec::new();
        let mut lanes = made.lanes.into_iter();
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
        let nic = Self {
            interface,
            topology,
            ports: states,
            mtu: mtu as u16,
            program,
            queues: made.queues,
            sockets: made.sockets,
            table: RwLock::new(table),
            steering: Mutex::new(()),
            gone: AtomicBool::new(false),
        };
        Ok((Arc::new(nic), parts))
    }

    /// How the program is attached and frames move, in words.
    pub fn describe(&self) -> String {
        let copies =
            if self.queues.iter().all(|queue| queue.first.is_zero_copy()) { "zero-copy" } else { "copy" };
        let pinned = if self.program.was_pinned() { ", program found attached" } else { "" };
        format!(
            "{} mode, {copies}, {} receive queue(s){pinned}",
            self.program.attached_mode(),
            self.queues.len()
        )
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
            // Another guest, maybe: it shows its own addresses.
            let forgotten = self.table.write().unwrap_or_else(PoisonError::into_inner).forget(port.index);
            forgotten
                .into_iter()
                .try_for_each(|key| self.program.set_mac(key, None))
                .map_err(io::Error::other)?;
        }
        live.store(active, Ordering::Relaxed);
        for queue in self.topology.queues_of(port.index as usize, pair.into()) {
            self.steer(port, queue).map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn steer(&self, port: &PortState, queue: u32) -> Result<(), super::program::ProgramError> {
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

struct Made {
    queues: Vec<Arc<NicQueue>>,
    sockets: Vec<Vec<Vec<(u32, Arc<Socket>)>>>,
    /// Of all pairs of all ports, in order.
    lanes: Vec<Vec<Lane>>,
}

/// Makes memory and sockets of all NIC queues.
fn make_queues(
    interface: &Interface,
    topology: &Topology,
    frame_size: u32,
    zero_copy: ZeroCopy,
) -> Result<Made, XdpError> {
    let name = interface.name();
    let failed = |error: SocketError| XdpError::socket(name, error);
    let ports = topology.pairs.len();
    let mut lanes: Vec<Vec<Vec<Lane>>> =
        topology.pairs.iter().map(|pairs| (0..*pairs).map(|_| Vec::new()).collect()).collect();
    let mut sockets = vec![vec![Vec::new(); topology.queues as usize]; ports];
    let mut queues = Vec::new();
    for number in 0..topology.queues {
        let members: Vec<(usize, u32)> = (0..ports)
            .flat_map(|port| topology.pairs_on(port, number).map(move |pair| (port, pair)))
            .collect();
        let senders =
            members.iter().filter(|(port, pair)| topology.sends_on(*port, *pair) == number).count() as u32;
        let few = members.len() as u32 <= FEW;
        let rx_ring = if few { RX_RING } else { RING_SMALL };
        let tx_frames = if few { TX_FRAMES } else { RING_SMALL };
        let quotas = Quotas {
            reserve: FILL_RESERVE,
            receivers: members.len() as u32 + 1,
            per_receiver: rx_ring + AT_HAND,
            senders,
            per_sender: tx_frames,
        };
        let umem = Umem::new(quotas.total(), frame_size)
            .map_err(|error| XdpError::Memory(name.into(), quotas.total() * (frame_size >> 10), error))?;
        let umem = Arc::new(umem);
        let first = Socket::new().map_err(failed)?;
        let fill_size = quotas.receive().next_power_of_two();
        let completion_size = quotas.send().max(1).next_power_of_two();
        let (mut fill, completion) = first
            .register(&umem, fill_size, completion_size)
            .map_err(|error| XdpError::register(name, quotas.total() * (frame_size >> 10), error))?;
        let flood = first.receive_ring(rx_ring, &umem).map_err(failed)?;
        first
            .bind(interface.index(), number, zero_copy)
            .map_err(|error| XdpError::bind(name, number, error))?;
        (0..quotas.receive()).for_each(|frame| {
            fill.push(umem.address(frame, 0));
        });
        fill.publish();
        let rings = Rings { fill, frames: Frames::new(quotas), flood, completion };
        let queue = Arc::new(NicQueue { number, umem: umem.clone(), first, rings: Mutex::new(rings) });
        let mut sender = 0;
        for (port, pair) in members {
            let socket = Socket::new().map_err(failed)?;
            let rx = socket.receive_ring(rx_ring, &umem).map_err(failed)?;
            let tx = if topology.sends_on(port, pair) == number {
                sender += 1;
                Some((socket.send_ring(tx_frames.next_power_of_two(), &umem).map_err(failed)?, sender - 1))
            } else {
                None
            };
            socket.bind_shared(interface.index(), number, &queue.first).map_err(failed)?;
            let socket = Arc::new(socket);
            sockets[port][number as usize].push((pair, socket.clone()));
            lanes[port][pair as usize].push(Lane { queue: queue.clone(), socket, rx, tx });
        }
        queues.push(queue);
    }
    Ok(Made { queues, sockets, lanes: lanes.into_iter().flatten().collect() })
}
