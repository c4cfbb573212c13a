//! Peer links: what a pair sends goes straight into the receive ring of a pair of the port it is wired to.
//!
//! ```text
//!   sender's turn:   tx::run ──burst──► Far (an uplink for as long as the burst lasts) ──deliver──► receiver's ring
//!                       ▲                                                                       publish, call: once a burst
//!                       └── waits (`waits`) ◄── no buffers, pages missing ── until the receiver's ring goes on
//! ```
//! Both pairs are served by one worker, so that a turn may borrow both. A receiver that has no buffers makes the sender
//! wait, as a full uplink does, but not for ever: after [`PATIENCE`] without progress its frames are dropped and counted
//! until it gives buffers again. Where no ring runs they are dropped at once.
//!
//! Not here: the copy (`net::deliver`), offloads (`net::offload`, `net::segment`), when a pair has its turn (`datapath`).
#![forbid(unsafe_code)]

use super::datapath::Shared;
use super::half::Ring;
use super::pair::Pair;
use super::turn::finish_burst;
use super::{Direction, PairKey, PairToken, What};
use crate::memory::{GuestMemory, IoVec, IoVecStorage, gather};
use crate::net::counters::PairCounters;
use crate::net::header::{FRAME_LEN_MAX, HDR_LEN, VirtioNetHdr};
use crate::net::offload::{Taker, Way};
use crate::net::rx::RxSettings;
use crate::net::segment::Segments;
use crate::net::tx::{End, TxSettings};
use crate::net::{checksum, cross, deliver};
use crate::observe::trace;
use crate::reactor::Reactor;
use crate::uplink::{Burst, ReceiveError, SendError, UplinkQueue};
use crate::virtq::Queue;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a sender waits for a receiver that makes no progress. Long enough for a guest that has to be scheduled, short
/// enough for whoever waits behind it.
pub(super) const PATIENCE: Duration = Duration::from_millis(10);

/// A pair's side of a peer link.
#[derive(Debug)]
pub(super) struct Link {
    /// How long senders wait for it.
    pub(super) patience: Duration,
    /// The other port's pairs...
    names: Vec<PairKey>,
    /// ... and where they are, in the same order.
    ends: Vec<usize>,
    /// As sender: it waits for this pair.
    waits: Option<usize>,
    /// As receiver: a sender waits.
    awaited: bool,
    /// The clock of its patience runs.
    timer: bool,
    /// Frames found no place...
    lacks: bool,
    /// ... and others did since the clock was set.
    progress: bool,
    /// No sender waits any more: what finds no place is dropped.
    starved: bool,
}

impl Link {
    /// The link to these pairs, if there are any.
    pub(super) fn to(names: Vec<PairKey>) -> Option<Box<Self>> {
        let link = |names| Self {
            patience: PATIENCE,
            names,
            ends: Vec::new(),
            waits: None,
            awaited: false,
            timer: false,
            lacks: false,
            progress: false,
            starved: false,
        };
        (!names.is_empty()).then(|| Box::new(link(names)))
    }

    /// Finds the other pairs, as far as they are there.
    pub(super) fn resolve(&mut self, slot_of: impl Fn(&PairKey) -> Option<usize>) {
        self.ends = self.names.iter().filter_map(slot_of).collect();
    }

    /// The other port's pairs.
    pub(super) fn names(&self) -> &[PairKey] {
        &self.names
    }

    /// Where they are.
    pub(super) fn ends(&self) -> &[usize] {
        &self.ends
    }

    /// The same, taken out for a moment or put back.
    pub(super) fn ends_mut(&mut self) -> &mut Vec<usize> {
        &mut self.ends
    }

    /// A ring has stopped: nothing is known of the next.
    pub(super) fn stopped(&mut self, direction: Direction) {
        match direction {
            Direction::Transmit => self.waits = None,
            Direction::Receive => (self.lacks, self.progress, self.starved) = (false, false, false),
        }
    }
}

/// Buffers for frames that do not pass as they are.
pub struct Scratch {
    cross: cross::Scratch,
    deliver: deliver::Scratch,
    iovecs: IoVecStorage,
    frame: Box<[u8]>,
    segments: Segments,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            cross: cross::Scratch::default(),
            deliver: deliver::Scratch::default(),
            iovecs: IoVecStorage::default(),
            frame: vec![0; FRAME_LEN_MAX as usize].into_boxed_slice(),
            segments: Segments::default(),
        }
    }
}

/// What a burst has done at the receiver.
pub(super) struct Delivered {
    used: u32,
    end: Option<End>,
}

/// A receiver as an uplink of the sender, for one run of its transmit path.
pub(super) struct Far<'a> {
    to: &'a mut Pair,
    scratch: &'a mut Scratch,
    settings: RxSettings,
    taker: Taker,
    done: Delivered,
}

impl Pair {
    /// Takes frames: its receive ring runs and is enabled.
    pub(super) fn takes_frames(&self) -> bool {
        self.rx.enabled && self.rx.ring.is_some()
    }

    /// Frames for it have to wait: its ring does not go on by itself. (One that waits no longer, since they are dropped,
    /// does not.)
    pub(super) fn blocks(&self) -> bool {
        let starved = self.link.as_ref().is_some_and(|link| link.starved);
        let goes_on = self.rx.ring.as_ref().is_none_or(Ring::runnable) && !self.receiver.holds_frame();
        self.takes_frames() && !goes_on && !starved
    }

    /// It waits for `peer`, with which nothing goes on at the moment.
    pub(super) fn wait_for_peer<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        peer: &mut Pair,
    ) {
        let slot = peer.slot();
        if let (Some(ours), Some(theirs), Some(ring)) = (&mut self.link, &mut peer.link, &mut self.tx.ring) {
            ring.pending = false;
            ours.waits = Some(slot);
            theirs.awaited = true;
        }
        peer.lose_patience_later(reactor);
    }

    /// True if a sender waits for it that need not any more; said once.
    pub(super) fn lets_senders_go(&mut self) -> bool {
        let goes = self.link.as_ref().is_some_and(|link| link.awaited) && !self.blocks();
        if goes && let Some(link) = &mut self.link {
            link.awaited = false;
        }
        goes
    }

    /// As sender: goes on if it waits for the pair at `slot`.
    pub(super) fn peer_goes_on(&mut self, slot: usize) {
        if let Some(link) = self.link.as_mut().filter(|link| link.waits == Some(slot)) {
            link.waits = None;
            if let Some(ring) = &mut self.tx.ring {
                ring.pending = true;
            }
        }
    }

    /// Its receive ring as an uplink.
    pub(super) fn open<'a>(&'a mut self, scratch: &'a mut Scratch) -> Far<'a> {
        if let Some(ring) = self.rx.ring.as_mut().filter(|ring| ring.runnable()) {
            ring.ignore_kicks();
        }
        let settings = RxSettings::new(self.features);
        let taker = Taker::new(self.features, self.uplink.mtu());
        Far { to: self, scratch, settings, taker, done: Delivered { used: 0, end: None } }
    }

    /// The end of what [`Self::open`] began: used entries are published, the driver is notified, the ring waits for what it
    /// lacks.
    pub(super) fn delivered<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        shared: &mut Shared,
        now: Instant,
        done: Delivered,
    ) {
        let Delivered { used, end } = done;
        let token = self.token(What::Call(Direction::Receive));
        let Some(ring) = &mut self.rx.ring else { return };
        let call = finish_burst(&mut ring.queue, used, &self.counters);
        let lacks = matches!(end, Some(End::NoBuffers | End::Parked(_)));
        let mut broken = None;
        match end {
            Some(End::NoBuffers) if ring.kick.is_some() => ring.await_look(),
            Some(End::Parked(range)) => {
                ring.park(range);
                self.counters.parks.add(1);
                trace::park(self.key, Direction::Receive, &range);
            }
            Some(End::Broken(error)) => broken = Some(error),
            _ => {}
        }
        // Otherwise nothing was tried.
        if let Some(link) = self.link.as_mut().filter(|_| used > 0 || lacks) {
            link.lacks = lacks;
            link.progress |= used > 0;
            link.starved &= lacks;
        }
        if used > 0 {
            self.worked(now);
        }
        if call {
            self.rx.call.notify(reactor, token);
        }
        if lacks {
            self.lose_patience_later(reactor);
        }
        if let Some(error) = broken {
            self.give_up(reactor, Direction::Receive, error.to_string(), shared);
        }
    }

    /// Sets the clock, unless it runs.
    fn lose_patience_later<T: Copy + From<PairToken>>(&mut self, reactor: &mut Reactor<T>) {
        let token = self.token(What::LinkPatience);
        if let Some(link) = self.link.as_mut().filter(|link| !link.timer && !link.starved) {
            link.timer = true;
            link.progress = false;
            reactor.timer(link.patience, token.into());
        }
    }

    /// The clock has run down.
    pub(super) fn patience_ended<T: Copy + From<PairToken>>(&mut self, reactor: &mut Reactor<T>) {
        let blocks = self.blocks();
        let Some(link) = &mut self.link else { return };
        link.timer = false;
        if !link.lacks && !blocks {
            return;
        }
        if link.progress {
            self.lose_patience_later(reactor);
        } else {
            link.starved = true;
        }
    }
}

impl Far<'_> {
    /// Moves a batch of usual frames from the sender's ring; returns how many. The others are for the transmit path.
    pub(super) fn cross(
        &mut self,
        ring: &mut Queue,
        memory: &GuestMemory,
        sender: &TxSettings,
        counters: &PairCounters,
    ) -> u32 {
        let both_modern = sender.header_len == HDR_LEN && self.settings.header_len == HDR_LEN;
        let takes = self.to.takes_frames() && !self.to.receiver.holds_frame();
        let Pair { rx, receiver, memory: far_memory, .. } = &mut *self.to;
        let Some(far) = rx.ring.as_mut().filter(|far| both_modern && takes && far.runnable()) else {
            return 0;
        };
        receiver.kept().release(&mut far.queue);
        let mut from = cross::Side { ring, memory };
        let mut to = cross::Side { ring: &mut far.queue, memory: far_memory };
        let cross::Crossed { frames, bytes } =
            cross::run(&mut from, &mut to, &mut self.scratch.cross, &self.taker);
        counters.tx_packets.add(frames.into());
        counters.tx_bytes.add(bytes);
        self.to.counters.rx_packets.add(frames.into());
        self.to.counters.rx_bytes.add(bytes);
        self.done.used += frames;
        frames
    }

    /// What has been done.
    pub(super) fn close(self) -> Delivered {
        self.done
    }

    /// Whether a frame passes as it is, as far as that is quickly known.
    #[inline]
    fn passes(&self, buffers: &[IoVec<'_>]) -> bool {
        let start = buffers.first().and_then(IoVec::first_words);
        start.is_some_and(|(start, _)| self.taker.passes(start, deliver::frame_len(buffers)))
    }

    /// Delivers frames as they are; returns how many were taken.
    fn deliver(&mut self, burst: &Burst<'_>) -> usize {
        deliver_to(self.to, &mut self.scratch.deliver, self.settings, &mut self.done, burst)
    }

    /// Makes one frame what its receiver takes, and delivers that. False: it has to wait.
    fn unusual(&mut self, buffers: &[IoVec<'_>]) -> bool {
        let mut bytes = [0; HDR_LEN];
        gather(&buffers[..1], &mut bytes);
        let header = VirtioNetHdr::parse(&bytes);
        let len = deliver::frame_len(buffers);
        let Self { to, scratch, settings, done, .. } = self;
        let Scratch { deliver, iovecs, frame, segments, .. } = &mut **scratch;
        match self.taker.way(&header, len as u64) {
            Way::AsIs => {
                let range = 0..buffers.len();
                let whole = Burst { buffers, frames: std::slice::from_ref(&range) };
                deliver_to(to, deliver, *settings, done, &whole) == 1
            }
            Way::Clean => {
                let clean = header.cleaned();
                let list = iovecs.begin();
                list.push_own(clean.bytes(HDR_LEN));
                for piece in &buffers[1..] {
                    list.push_piece(*piece);
                }
                let range = 0..list.len();
                let whole = Burst { buffers: list.as_slice(), frames: std::slice::from_ref(&range) };
                deliver_to(to, deliver, *settings, done, &whole) == 1
            }
            Way::TooLong => {
                to.counters.rx_dropped_mtu.add(1);
                true
            }
            Way::Complete => {
                let frame = &mut frame[..len];
                gather(&buffers[1..], frame);
                // Was found to lie within the frame.
                checksum::complete(frame, header.csum_start.get().into(), header.csum_offset.get().into());
                let taken = own(to, deliver, *settings, done, iovecs, std::iter::once(&*frame)) == 1;
                to.counters.rx_software_offload.add(taken.into());
                taken
            }
            Way::Segment => {
                let frame = &mut frame[..len];
                gather(&buffers[1..], frame);
                if !segments.cut(frame, &header) {
                    to.counters.rx_dropped_offload.add(1);
                    return true;
                }
                let count = segments.iter().len();
                let taken = own(to, deliver, *settings, done, iovecs, segments.iter());
                if taken > 0 {
                    // In part: the rest is lost, as on any network that is full.
                    to.counters.rx_dropped_no_buffers.add((count - taken) as u64);
                    to.counters.rx_software_offload.add(1);
                }
                taken > 0
            }
        }
    }
}

/// Frames that a burst of ours holds at most.
const OWN_BURST: usize = 64;

/// Delivers frames of ours, which ask for nothing; returns how many were taken.
fn own<'f>(
    to: &mut Pair,
    scratch: &mut deliver::Scratch,
    settings: RxSettings,
    done: &mut Delivered,
    iovecs: &mut IoVecStorage,
    mut frames: impl ExactSizeIterator<Item = &'f [u8]>,
) -> usize {
    const HEADER: [u8; HDR_LEN] = [0; HDR_LEN];
    let mut taken = 0;
    while frames.len() > 0 && done.end.is_none() {
        let list = iovecs.begin();
        for frame in frames.by_ref().take(OWN_BURST) {
            list.push_own(&HEADER);
            list.push_own(frame);
        }
        let mut ranges = [const { 0..0 }; OWN_BURST];
        let count = list.len() / 2;
        ranges.iter_mut().enumerate().for_each(|(i, range)| *range = 2 * i..2 * i + 2);
        let burst = Burst { buffers: list.as_slice(), frames: &ranges[..count] };
        taken += deliver_to(to, scratch, settings, done, &burst);
    }
    taken
}

/// Delivers a burst as it is; returns how many frames were taken.
fn deliver_to(
    to: &mut Pair,
    scratch: &mut deliver::Scratch,
    settings: RxSettings,
    done: &mut Delivered,
    burst: &Burst<'_>,
) -> usize {
    let Pair { rx, receiver, memory, counters, .. } = to;
    let Some(ring) = &mut rx.ring else { return 0 };
    let kept = receiver.kept();
    let delivered = deliver::run(&mut ring.queue, memory, kept, scratch, settings, counters, burst);
    done.used += delivered.used;
    done.end = delivered.end;
    delivered.frames
}

impl UplinkQueue for Far<'_> {
    fn readable(&self) -> &[Arc<OwnedFd>] {
        &[]
    }

    fn send(&mut self, _frame: &[IoVec<'_>]) -> Result<(), SendError> {
        Err(SendError::Full)
    }

    fn receive(&mut self, _buffers: &[IoVec<'_>]) -> Result<usize, ReceiveError> {
        Err(ReceiveError::Empty)
    }

    fn send_burst(&mut self, burst: &Burst<'_>, outcomes: &mut Vec<Result<(), SendError>>) {
        let count = burst.frames.len();
        let mut taken = 0;
        if !self.to.takes_frames() {
            self.to.counters.rx_dropped_no_ring.add(count as u64);
            taken = count;
        }
        let starved = self.to.link.as_ref().is_some_and(|link| link.starved);
        let mut goes_on =
            self.to.rx.ring.as_ref().is_some_and(Ring::runnable) && !self.to.receiver.holds_frame();
        while goes_on && taken < count {
            let rest = &burst.frames[taken..];
            let unusual = rest.iter().position(|frame| !self.passes(&burst.buffers[frame.clone()]));
            let usual = unusual.unwrap_or(rest.len());
            if usual > 0 {
                taken += self.deliver(&Burst { buffers: burst.buffers, frames: &rest[..usual] });
            } else if self.unusual(&burst.buffers[rest[0].clone()]) {
                taken += 1;
            }
            goes_on = self.done.end.is_none();
        }
        // Broken: the ring is gone in a moment, and the rest with it. Budget: soon.
        if starved && taken < count && !matches!(self.done.end, Some(End::Broken(_) | End::Budget)) {
            self.to.counters.rx_dropped_no_buffers.add((count - taken) as u64);
            taken = count;
        }
        outcomes.resize_with(outcomes.len() + taken, || Ok(()));
    }
}
