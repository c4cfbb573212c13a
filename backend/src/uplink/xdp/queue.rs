//! One pair's queue of an XDP uplink at work: frames out and in.
//!
//! ```text
//!   guest ──copy──► frame: checksum, source, whereto ──► TX ring ──► (wake-up) kernel ──► COMPLETION
//!   guest ◄──copy── frame ◄── RX ring(s) of the pair's socket(s); then back to FILL
//!   guest ◄──copy── inbox ◄── copies of broadcasts, frames of local ports
//! ```
//! The shared rings of a NIC queue are locked once a burst. Not here: which sockets there are (`nic`).

use super::inbox::Reader;
use super::lane_set::LaneSet;
use super::nic::{Nic, PairParts, PortState};
use super::nic_queue::{BURST, Lane, RX_RING, Sender};
use super::outgoing::{self, refused};
use super::pace::Pace;
use super::socket::descriptor;
use super::switch::{Learned, Link, Mac, Route};
use super::umem::{HEADROOM, LINK_BYTES, Umem};
use crate::memory::{IoVec, IoVecStorage, gather};
use crate::net::counters::PairCounters;
use crate::net::header::{HDR_LEN, VirtioNetHdr};
use crate::uplink::{Burst, ReceiveError, SendError, UplinkQueue, Woken, receive_first};
use crate::worker::Direction;
use ebpf_common::xdp::VLAN_NONE;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Frames of the inbox that are taken before the RX rings have their turn again.
const INBOX_TURN: u32 = BURST;
/// Broadcasts that are handed on at once.
const FLOOD_TURN: u32 = 32;
/// Turns after which all broadcasts that waited at the first are handed on.
const FLOOD_TURNS: u32 = RX_RING / FLOOD_TURN;
/// Source addresses that the queue knows to be the port's, for a quick look.
const KNOWN: usize = 4;

/// Nothing is left to be done about a received frame.
const NO_HEADER: [u8; HDR_LEN] = [0; HDR_LEN];

/// A frame that local ports get.
struct Local {
    route: Route,
    frame: u32,
    len: usize,
    link: Link,
}

/// A queue pair's end of the uplink.
pub struct XdpQueue {
    nic: Arc<Nic>,
    port: Arc<PortState>,
    pair: u16,
    lanes: Vec<Lane>,
    /// The lane with the TX ring.
    sends: usize,
    inbox: Reader,
    readable: Vec<Arc<OwnedFd>>,
    counters: Arc<PairCounters>,
    /// Received frames at hand: lane, address, length.
    incoming: Vec<(u8, u64, u32)>,
    next: usize,
    inbox_turn: u32,
    /// The frames that were offered last are the inbox's.
    from_inbox: bool,
    iovecs: IoVecStorage<{ 2 * BURST as usize }>,
    /// Header and frame of each.
    ranges: Vec<Range<usize>>,
    /// Frames that are through, by lane, on their way back to FILL.
    recycle: Vec<Vec<u32>>,
    /// Lanes whose FILL ring wants its kernel side to be woken.
    fill_wake: LaneSet,
    flooded: Vec<(u64, u32)>,
    /// Frames at hand for sending.
    stash: Vec<u32>,
    local: Vec<Local>,
    known: [Mac; KNOWN],
    learned: usize,
    /// The port has as many addresses as it may: no more are looked at.
    full: bool,
    pace: Pace,
}

impl XdpQueue {
    pub(super) fn new(nic: Arc<Nic>, port: Arc<PortState>, pair: u16, parts: PairParts) -> Self {
        let PairParts { lanes, inbox } = parts;
        let mut readable = vec![inbox.inbox().event().clone()];
        for lane in &lanes {
            readable.push(lane.socket.fd().clone());
            if port.rules.flood {
                readable.push(lane.queue.flood_fd().clone());
            }
        }
        let sends = lanes.iter().position(|lane| lane.tx.is_some()).unwrap_or(0);
        Self {
            sends,
            inbox,
            readable,
            counters: Arc::default(),
            incoming: Vec::with_capacity(lanes.len() * BURST as usize),
            next: 0,
            inbox_turn: INBOX_TURN,
            from_inbox: false,
            iovecs: IoVecStorage::default(),
            ranges: (0..BURST as usize).map(|i| 2 * i..2 * i + 2).collect(),
            recycle: lanes.iter().map(|_| Vec::with_capacity(2 * BURST as usize)).collect(),
            fill_wake: LaneSet::default(),
            flooded: Vec::with_capacity(FLOOD_TURN as usize),
            stash: Vec::with_capacity(2 * BURST as usize),
            local: Vec::with_capacity(BURST as usize),
            known: [[0; 6]; KNOWN],
            learned: 0,
            full: false,
            pace: Pace::default(),
            nic,
            port,
            pair,
            lanes,
        }
    }

    fn umem(&self) -> &Arc<Umem> {
        &self.lanes[self.sends].queue.umem
    }

    /// Gets free frames, sent ones first.
    fn restock(&mut self, want: usize) {
        let lane = &self.lanes[self.sends];
        let Some(Sender { owner, .. }) = lane.tx else { return };
        let mut rings = lane.queue.rings();
        // Always, so that the few frames that were used last are used again: they are in the cache.
        rings.reap(&lane.queue.umem);
        rings.frames.take(owner, want.saturating_sub(self.stash.len()), &mut self.stash);
    }

    /// Copies a frame into `frame` and decides where it goes. Its length comes with the decision.
    #[inline]
    fn stage(
        &mut self,
        buffers: &[IoVec<'_>],
        frame: u32,
        header_len: usize,
    ) -> Result<(Route, usize, Link), SendError> {
        let mut header = NO_HEADER;
        let Some((first, rest)) = buffers.split_first().filter(|(first, _)| first.len() == header_len) else {
            return Err(refused());
        };
        gather(std::slice::from_ref(first), &mut header);
        let len: usize = rest.iter().map(IoVec::len).sum();
        if len > usize::from(self.nic.mtu) + LINK_BYTES {
            return Err(refused());
        }
        // SAFETY: the frame is from our stash: neither the kernel nor anybody else has it.
        let bytes = unsafe { self.umem().bytes(frame) };
        let data = &mut bytes[HEADROOM..HEADROOM + len];
        gather(rest, data);
        let link = outgoing::finish(data, VirtioNetHdr::parse(&header), self.nic.mtu, &self.port.rules)?;
        Ok((Route::Wire, len, link))
    }

    /// Notes a source address that is new to this queue. Quick, but not for each frame: once a burst at most.
    #[cold]
    fn learn(&mut self, source: Mac) {
        match self.nic.learn(&self.port, source) {
            Learned::Known | Learned::New(_) => {
                self.known[self.learned % KNOWN] = source;
                self.learned += 1;
            }
            Learned::Taken => self.counters.tx_unlearned.add(1),
            Learned::Full => {
                self.full = true;
                self.counters.tx_unlearned.add(1);
            }
        }
    }

    /// Hands frames of this burst to local ports; those that go nowhere else come back to the stash.
    fn deliver_local(&mut self) {
        let spread = usize::from(self.pair);
        let mut local = std::mem::take(&mut self.local);
        let umem = self.umem().clone();
        // SAFETY: the frames are ours until the TX ring is published, and read only.
        let data = |local: &Local| unsafe { &umem.bytes(local.frame)[HEADROOM..HEADROOM + local.len] };
        // A port at a time, so that its inbox is locked and its reader woken once.
        for at in 0..local.len() {
            match local[at].route {
                Route::Local(port)
                    if !local[..at].iter().any(|earlier| earlier.route == Route::Local(port)) =>
                {
                    let its = local[at..].iter().filter(|local| local.route == Route::Local(port));
                    self.nic.deliver(port, spread, its.map(data));
                }
                Route::Both => {
                    let Local { link, .. } = &local[at];
                    self.nic.flood_local(self.port.index, link, data(&local[at]), spread);
                }
                _ => {}
            }
        }
        self.counters.tx_local.add(local.len() as u64);
        self.stash.extend(local.drain(..).filter(|l| matches!(l.route, Route::Local(_))).map(|l| l.frame));
        self.local = local;
    }

    /// Brings frames that are through back to FILL, hands broadcasts on, and takes what has arrived. False if nothing has.
    fn refill(&mut self) -> bool {
        self.incoming.clear();
        self.next = 0;
        for _ in 0..FLOOD_TURNS {
            let mut more = false;
            for index in 0..self.lanes.len() {
                more |= self.exchange(index);
                let lane = &mut self.lanes[index];
                let incoming = &mut self.incoming;
                let umem = &lane.queue.umem;
                lane.rx.take(BURST, |received| {
                    umem.prefetch(received.addr);
                    incoming.push((index as u8, received.addr, received.len));
                });
            }
            // Behind broadcasts that are all for others one for us may wait: it woke us already and does not again.
            if !more || !self.incoming.is_empty() || !self.inbox.is_empty() {
                break;
            }
        }
        self.inbox_turn = INBOX_TURN;
        let lost = self.inbox.take_lost();
        if lost > 0 {
            self.counters.rx_dropped_inbox.add(lost);
        }
        !self.incoming.is_empty() || !self.inbox.is_empty()
    }

    /// What a lane's NIC queue is locked for. True if broadcasts may be left.
    fn exchange(&mut self, index: usize) -> bool {
        let lane = &self.lanes[index];
        let umem = &lane.queue.umem;
        let mut rings = lane.queue.rings();
        let flooded = &mut self.flooded;
        if self.port.rules.flood {
            rings.flood.take(FLOOD_TURN, |received| flooded.push((received.addr, received.len)));
        }
        let more = flooded.len() == FLOOD_TURN as usize;
        for (address, len) in flooded.drain(..) {
            let (frame, offset) = umem.locate(address);
            // SAFETY: the frame came off the ring just now and is not in FILL yet: it is ours.
            let data = unsafe { umem.bytes(frame) }.get(offset..offset + len as usize).unwrap_or_default();
            let vlan = Link::of(data).map_or(VLAN_NONE, |link| link.vlan);
            self.nic.flood(data, lane.queue.number as usize, |port| port.rules.wants_flood(vlan));
            self.recycle[index].push(frame);
        }
        if self.recycle[index].is_empty() {
            return more;
        }
        for frame in self.recycle[index].drain(..) {
            let pushed = rings.fill.push(umem.address(frame, 0));
            debug_assert!(pushed, "FILL has room for all frames");
        }
        rings.fill.publish();
        if rings.fill.needs_wakeup() {
            self.fill_wake.add(index);
        }
        more
    }

    /// Notes that the interface is gone. An error the first time for this port.
    fn gone(&self) -> io::Result<()> {
        if !self.nic.note_gone(&self.port) {
            return Ok(());
        }
        let name = self.nic.interface.name();
        Err(io::Error::other(format!(
            "interface {name} is gone; create it again and restart this program, other interfaces are served meanwhile"
        )))
    }
}

impl UplinkQueue for XdpQueue {
    fn readable(&self) -> &[Arc<OwnedFd>] {
        &self.readable
    }

    /// In copy mode the kernel wakes for each frame that a virtual interface delivers.
    fn wakes_often(&self) -> bool {
        true
    }

    /// A TX ring is writable as soon as it is half empty, whether frames are free or not: [`Self::wake`] tells more.
    fn writable(&self) -> Option<&Arc<OwnedFd>> {
        None
    }

    fn count_into(&mut self, counters: &Arc<PairCounters>) {
        self.counters = counters.clone();
    }

    fn mtu(&self) -> u16 {
        self.nic.mtu
    }

    fn send(&mut self, frame: &[IoVec<'_>]) -> Result<(), SendError> {
        let (mut outcome, all) = (Vec::new(), 0..frame.len());
        self.send_burst(&Burst { buffers: frame, frames: std::slice::from_ref(&all) }, &mut outcome);
        outcome.pop().unwrap_or(Err(SendError::Full))
    }

    fn send_burst(&mut self, burst: &Burst<'_>, outcomes: &mut Vec<Result<(), SendError>>) {
        if self.nic.is_gone() || self.pace.link_is_down() {
            let down = |_| Err(SendError::Down(io::ErrorKind::NetworkDown.into()));
            return outcomes.extend(burst.iter().map(down));
        }
        if self.stash.len() < burst.frames.len() {
            self.restock(burst.frames.len());
        }
        let nic = self.nic.clone();
        // Other ports' addresses matter to those only that may reach them directly.
        let table = self.port.rules.local_switch.then(|| nic.table());
        let learns = self.port.rules.mac.is_none() && !self.full;
        let mut to_learn = None;
        let header_len = self.port.header_len.load(Ordering::Relaxed).min(HDR_LEN);
        let mut sent = false;
        for buffers in burst.iter() {
            let Some(&frame) = self.stash.last() else { break };
            let outcome = self.stage(buffers, frame, header_len).map(|(mut route, len, link)| {
                if let Some(table) = &table {
                    route = table.route(self.port.index, &link);
                }
                if learns && !self.known.contains(&link.source) {
                    to_learn = Some(link.source);
                }
                if route != Route::Wire {
                    self.local.push(Local { route, frame, len, link });
                }
                self.stash.pop();
                if matches!(route, Route::Wire | Route::Both) {
                    let lane = &mut self.lanes[self.sends];
                    let address = lane.queue.umem.address(frame, HEADROOM);
                    if let Some(Sender { ring, .. }) = &mut lane.tx {
                        let pushed = ring.push(descriptor(address, len as u32));
                        debug_assert!(pushed, "the TX ring has room for all frames of its socket");
                        sent = true;
                    }
                }
            });
            outcomes.push(outcome);
        }
        drop(table);
        if !self.local.is_empty() {
            self.deliver_local();
        }
        if let Some(Sender { ring, .. }) = self.lanes[self.sends].tx.as_mut().filter(|_| sent) {
            ring.publish();
        }
        if let Some(source) = to_learn {
            self.learn(source);
        }
    }

    fn peek(&mut self) -> Option<bool> {
        Some(self.next < self.incoming.len() || self.lanes.iter().any(|lane| lane.rx.has_more()))
    }

    fn frames(&mut self, max: usize) -> Option<Burst<'_>> {
        while self.next == self.incoming.len() && (self.inbox_turn == 0 || self.inbox.is_empty()) {
            if !self.refill() {
                break;
            }
        }
        let Self { incoming, next, inbox, inbox_turn, lanes, iovecs, ranges, from_inbox, .. } = self;
        let header = &NO_HEADER[..self.port.header_len.load(Ordering::Relaxed).min(HDR_LEN)];
        let iovecs = iovecs.begin();
        *from_inbox = *next == incoming.len();
        if *from_inbox {
            for index in 0..inbox.known().min(*inbox_turn as usize).min(max).min(BURST as usize) {
                iovecs.push_frame(header, IoVec::own(inbox.frame(index).unwrap_or_default()));
            }
        }
        for &(lane, address, len) in incoming[*next..].iter().take(max.min(BURST as usize)) {
            let umem = &lanes[usize::from(lane)].queue.umem;
            let (frame, offset) = umem.locate(address);
            // SAFETY: the frame came off our RX ring and is not in FILL before it is consumed: it is ours.
            let bytes = unsafe { umem.bytes(frame) };
            let data = bytes.get(offset..offset + len as usize).unwrap_or_default();
            iovecs.push_frame(header, IoVec::own(data));
        }
        let count = iovecs.len() / 2;
        Some(Burst { buffers: iovecs.as_slice(), frames: &ranges[..count] })
    }

    fn consume(&mut self, n: usize) {
        if self.from_inbox {
            self.inbox.pop(n);
            self.inbox_turn = self.inbox_turn.saturating_sub(n as u32);
            self.counters.rx_inbox.add(n as u64);
            return;
        }
        let taken = self.next..(self.next + n).min(self.incoming.len());
        self.next = taken.end;
        for &(lane, address, _) in &self.incoming[taken] {
            let lane = usize::from(lane);
            self.recycle[lane].push(self.lanes[lane].queue.umem.locate(address).0);
        }
    }

    fn receive(&mut self, buffers: &[IoVec<'_>]) -> Result<usize, ReceiveError> {
        // SAFETY: buffers to be received into may be written (the trait's contract).
        unsafe { receive_first(self, buffers) }
    }

    fn discard(&mut self) -> u64 {
        // The next guest may be another.
        self.known = [[0; 6]; KNOWN];
        self.full = false;
        let mut count = 0;
        loop {
            count += (self.incoming.len() - self.next) as u64 + self.inbox.clear();
            for (lane, address, _) in self.incoming.drain(self.next..) {
                let lane = usize::from(lane);
                self.recycle[lane].push(self.lanes[lane].queue.umem.locate(address).0);
            }
            if !self.refill() {
                return count;
            }
        }
    }

    fn wake(&mut self, direction: Direction) -> Option<&Arc<OwnedFd>> {
        if self.nic.is_gone() {
            return None;
        }
        if direction == Direction::Receive {
            let lane = self.fill_wake.take()?;
            return Some(self.lanes[lane].socket.fd());
        }
        let lane = &mut self.lanes[self.sends];
        let Sender { ring, socket, .. } = lane.tx.as_mut()?;
        let waiting = ring.waiting();
        self.pace.before(waiting);
        let wanted = self.pace.link_is_down() || (waiting > 0 && ring.needs_wakeup());
        wanted.then(|| socket.fd())
    }

    fn woken(&mut self, direction: Direction, result: &io::Result<()>) -> Woken {
        if direction == Direction::Receive {
            return if self.fill_wake.is_empty() { Woken::Done } else { Woken::Again };
        }
        let waiting = self.lanes[self.sends].tx.as_mut().map_or(0, |tx| tx.ring.waiting());
        match self.pace.after(result, waiting) {
            Ok(woken) => woken,
            Err(_) => self.gone().map_or_else(Woken::Down, |()| Woken::Done),
        }
    }

    fn check(&mut self) -> io::Result<()> {
        if self.nic.interface.exists() { Ok(()) } else { self.gone() }
    }
}
