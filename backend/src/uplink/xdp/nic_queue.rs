//! The NIC queues of an interface: memory, rings and sockets, made before the loop.
//!
//! Here: how much of each there is, and in which order it is made. Not here: which of them take part (`nic`), frames
//! (`queue`).
#![forbid(unsafe_code)]

use super::error::XdpError;
use super::frames::{Frames, Quotas};
use super::interface::Interface;
use super::rings::{Consumer, Producer};
use super::socket::{Descriptor, Socket, SocketError, ZeroCopy};
use super::topology::Topology;
use super::umem::Umem;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Entries of a socket's RX ring, where few sockets share a NIC queue: the most there are.
pub const RX_RING: u32 = 1024;
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

/// Memory, FILL and COMPLETION of a NIC queue: one worker uses them.
pub struct NicQueue {
    /// Its number.
    pub number: u32,
    /// The frames.
    pub umem: Arc<Umem>,
    /// Its first socket.
    pub first: Socket,
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
    /// Its way out; only where it sends.
    pub tx: Option<Sender>,
}

/// What a pair sends through: a socket of its own that is never polled. While a socket is, the kernel goes through its
/// waiters for every frame that has been sent, in vain, which costs about an eighth of sending it.
pub struct Sender {
    /// The socket.
    pub socket: Socket,
    /// What it sends.
    pub ring: Producer<Descriptor>,
    /// Whose frames those are.
    pub owner: u32,
}

/// A port's sockets on a NIC queue in the order of their slots, each with its pair.
pub type Members = Vec<(u32, Arc<Socket>)>;

/// All of an interface.
pub struct Made {
    /// In order.
    pub queues: Vec<Arc<NicQueue>>,
    /// By port and NIC queue.
    pub sockets: Vec<Vec<Members>>,
    /// Of all pairs of all ports, in order.
    pub lanes: Vec<Vec<Lane>>,
}

/// Makes memory and sockets of all NIC queues. Sleeps.
///
/// # Errors
/// An [`XdpError`] that says what to do.
pub fn make_queues(
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
                let socket = Socket::new().map_err(failed)?;
                let ring = socket.send_ring(tx_frames.next_power_of_two(), &umem).map_err(failed)?;
                socket.bind_shared(interface.index(), number, &queue.first).map_err(failed)?;
                sender += 1;
                Some(Sender { socket, ring, owner: sender - 1 })
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
