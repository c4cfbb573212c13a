//! One queue pair: two rings, a queue of the uplink, and when to look at them.
//!
//! Here: what control commands, and what completions mean. Not here: the work itself (`turn`), and what is kept for
//! each ring (`half`). Nothing sleeps.
#![forbid(unsafe_code)]

use super::arrivals::Arrivals;
use super::datapath::Shared;
use super::half::{Half, Ring, Watch};
use super::link::Link;
use super::wake::Wakes;
use super::{Attachment, Command, Direction, Event, PairKey, PairToken, Reply, ToControl, What};
use crate::memory::GuestMemory;
use crate::net::counters::PairCounters;
use crate::net::rx::Receiver;
use crate::observe::trace;
use crate::reactor::{Done, OpId, Reactor};
use crate::uplink::UplinkQueue;
use crate::virtq::{Queue, QueueConfig};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

/// A queue pair.
pub struct Pair {
    pub(super) key: PairKey,
    pub(super) slot: u32,
    pub(super) memory: GuestMemory,
    pub(super) features: u64,
    pub(super) uplink: Box<dyn UplinkQueue>,
    /// Polls of the uplink's descriptors; empty: it is not looked at. One that has ended is `None`.
    pub(super) uplink_polls: Vec<Option<OpId>>,
    /// Frames may wait at the uplink.
    pub(super) uplink_readable: bool,
    pub(super) uplink_epoch: u32,
    pub(super) arrivals: Arrivals,
    /// Nobody listens to the uplink: it is looked at by the clock.
    pub(super) looking: bool,
    /// The timer of that runs.
    pub(super) look_timer: bool,
    /// Frames at the uplink can be seen without a system call.
    pub(super) peeks: bool,
    writable_poll: bool,
    pub(super) wakes: Wakes,
    pub(super) receiver: Receiver,
    pub(super) rx: Half,
    pub(super) tx: Half,
    pub(super) counters: Arc<PairCounters>,
    /// It stands in the worker's ready queue.
    pub(super) queued: bool,
    /// It stands among the worker's hot pairs.
    pub(super) hot: bool,
    /// When it last moved packets.
    pub(super) worked: Option<Instant>,
    pub(super) uplink_down: bool,
    /// The port it is wired to.
    pub(super) link: Option<Box<Link>>,
}

impl Pair {
    /// A pair without a front-end.
    pub fn new(attachment: Attachment, slot: u32) -> Self {
        let Attachment { key, mut uplink, counters, peers } = attachment;
        uplink.count_into(&counters);
        let peeks = uplink.peek().is_some();
        Self {
            key,
            slot,
            memory: GuestMemory::empty(),
            features: 0,
            uplink,
            uplink_polls: Vec::new(),
            uplink_readable: false,
            uplink_epoch: 0,
            arrivals: Arrivals::default(),
            looking: false,
            look_timer: false,
            peeks,
            writable_poll: false,
            wakes: Wakes::default(),
            receiver: Receiver::default(),
            rx: Half::default(),
            tx: Half::default(),
            counters,
            queued: false,
            hot: false,
            worked: None,
            uplink_down: false,
            link: Link::to(peers),
        }
    }

    pub(super) fn slot(&self) -> usize {
        self.slot as usize
    }

    pub(super) fn key(&self) -> PairKey {
        self.key
    }

    pub(super) fn half(&mut self, direction: Direction) -> &mut Half {
        match direction {
            Direction::Receive => &mut self.rx,
            Direction::Transmit => &mut self.tx,
        }
    }

    fn half_ref(&self, direction: Direction) -> &Half {
        match direction {
            Direction::Receive => &self.rx,
            Direction::Transmit => &self.tx,
        }
    }

    pub(super) fn token(&self, what: What) -> PairToken {
        let epoch = match what {
            What::Kick(direction) => self.half_ref(direction).epoch,
            What::Call(direction) => self.half_ref(direction).call.epoch(),
            What::Error(direction) => self.half_ref(direction).error.epoch(),
            What::UplinkReadable(_) | What::UplinkLook => self.uplink_epoch,
            What::UplinkWritable | What::UplinkWake(_) | What::UplinkPause(_) | What::LinkPatience => 0,
        };
        PairToken { slot: self.slot, epoch, what }
    }

    /// True once for each time the pair comes to have work.
    pub fn take_ready(&mut self) -> bool {
        let ready = self.has_work() && !self.queued;
        self.queued |= ready;
        ready
    }

    fn has_work(&self) -> bool {
        let tx = self.tx.ring.as_ref().is_some_and(Ring::runnable);
        tx || self.looks_ahead()
            || (self.rx.enabled && self.frame_waits() && self.rx.ring.as_ref().is_some_and(Ring::runnable))
    }

    pub(super) fn frame_waits(&self) -> bool {
        self.uplink_readable || self.receiver.holds_frame()
    }

    /// Carries out one command.
    pub fn command<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        command: Command,
        shared: &mut Shared,
    ) -> Reply {
        match command {
            Command::Memory(memory) => self.set_memory(reactor, memory, shared),
            Command::Features(features) => self.features = features,
            Command::Start { direction, config, kick, enabled } => {
                return self.start(reactor, direction, &config, kick, enabled);
            }
            Command::Update { direction, config } => return self.update(direction, config),
            Command::Stop { direction } => {
                self.stop(reactor, direction);
                return Reply::Base(self.half(direction).last_base);
            }
            Command::Enable { direction, enabled } => {
                let half = self.half(direction);
                half.enabled = enabled;
                if let Some(ring) = &mut half.ring {
                    ring.pending = true;
                }
                self.uplink_down &= direction == Direction::Transmit;
                self.watch_uplink(reactor);
            }
            Command::Call { direction, fd } => {
                self.half(direction).call.replace(reactor, fd);
                // The driver may have missed a notification between the old descriptor and the new.
                let token = self.token(What::Call(direction));
                let half = self.half(direction);
                if half.ring.is_some() {
                    half.call.notify(reactor, token);
                }
            }
            Command::Error { direction, fd } => {
                self.half(direction).error.replace(reactor, fd);
            }
            Command::Arrived => {
                let key = self.key;
                for direction in [Direction::Receive, Direction::Transmit] {
                    match &mut self.half(direction).ring {
                        Some(ring) if ring.parked.is_some() => {
                            ring.go_on();
                            trace::resume(key, direction);
                        }
                        Some(ring) => ring.look_ahead |= ring.blind,
                        None => {}
                    }
                }
            }
            Command::Reset => {
                for direction in [Direction::Receive, Direction::Transmit] {
                    self.stop(reactor, direction);
                    let half = self.half(direction);
                    half.call.replace(reactor, None);
                    half.error.replace(reactor, None);
                    half.enabled = false;
                    half.last_base = 0;
                }
                self.features = 0;
                self.memory = GuestMemory::empty();
            }
        }
        Reply::Done
    }

    fn set_memory<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        memory: GuestMemory,
        shared: &mut Shared,
    ) {
        for direction in [Direction::Receive, Direction::Transmit] {
            if direction == Direction::Receive
                && memory.is_incomplete()
                && let Some(ring) = &mut self.rx.ring
            {
                // A frame that waits for more buffers has taken some, whose pages may be missing now.
                self.receiver.abandon(&mut ring.queue, &self.counters);
            }
            let key = self.key;
            let Some(ring) = &mut self.half(direction).ring else { continue };
            match ring.queue.remap(&memory) {
                Ok(()) => {
                    if ring.look_again() {
                        trace::resume(key, direction);
                    }
                }
                Err(error) => {
                    let why = format!("it is not in the new memory table: {error}");
                    self.give_up(reactor, direction, why, shared);
                }
            }
        }
        self.memory = memory;
    }

    fn start<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        direction: Direction,
        config: &QueueConfig,
        kick: Option<Arc<OwnedFd>>,
        enabled: bool,
    ) -> Reply {
        self.stop(reactor, direction);
        let mut queue = match Queue::new(&self.memory, config) {
            Ok(queue) => queue,
            Err(error) => return Reply::Failed(format!("ring cannot start: {error}")),
        };
        queue.disable_kicks();
        trace::ring_start(self.key, direction, queue.base());
        let half = self.half(direction);
        half.enabled = enabled;
        // Looked at once without waiting for a kick: it may have come before we listened (vhost #343, #375).
        half.ring = Some(Ring {
            queue,
            kick,
            kick_poll: None,
            pending: true,
            watch: Watch::No,
            parked: None,
            look_ahead: true,
            told: Default::default(),
            blind: false,
        });
        self.rearm_kick(reactor, direction);
        self.uplink_down &= direction == Direction::Transmit;
        self.watch_uplink(reactor);
        Reply::Done
    }

    fn update(&mut self, direction: Direction, config: QueueConfig) -> Reply {
        if direction == Direction::Receive
            && let Some(ring) = &mut self.rx.ring
        {
            self.receiver.abandon(&mut ring.queue, &self.counters);
        }
        let memory = self.memory.clone();
        let Some(ring) = &mut self.half(direction).ring else { return Reply::Done };
        // The format is that of the beginning, whatever features were acknowledged since.
        let packed = ring.queue.config().packed;
        match Queue::new(&memory, &QueueConfig { base: ring.queue.base(), packed, ..config }) {
            Ok(queue) => {
                ring.queue = queue;
                ring.watch = Watch::Kick;
                if ring.look_again() {
                    trace::resume(self.key, direction);
                }
                Reply::Done
            }
            Err(error) => Reply::Failed(format!("ring cannot move: {error}")),
        }
    }

    fn rearm_kick<T: Copy + From<PairToken>>(&mut self, reactor: &mut Reactor<T>, direction: Direction) {
        let half = self.half(direction);
        half.epoch = half.epoch.wrapping_add(1);
        let token = self.token(What::Kick(direction));
        let Some(ring) = &mut self.half(direction).ring else { return };
        if let Some(old) = ring.kick_poll.take() {
            reactor.cancel(old);
        }
        // The eventfd is only polled, never read: each write wakes the poll, its counter tells us nothing
        // more, and a counter that the peer empties or fills cannot make us wait.
        ring.kick_poll = ring.kick.as_ref().map(|fd| reactor.poll(fd, libc::POLLIN, token.into()));
    }

    /// Stops a ring, if it runs, and keeps its base.
    fn stop<T: Copy + From<PairToken>>(&mut self, reactor: &mut Reactor<T>, direction: Direction) {
        let Some(mut ring) = self.half(direction).ring.take() else { return };
        if let Some(op) = ring.kick_poll.take() {
            reactor.cancel(op);
        }
        if direction == Direction::Receive {
            self.receiver.abandon(&mut ring.queue, &self.counters);
            self.receiver = Receiver::default();
        }
        if let Some(link) = &mut self.link {
            link.stopped(direction);
        }
        self.half(direction).last_base = ring.queue.base();
        trace::ring_stop(self.key, direction, ring.queue.base());
        self.watch_uplink(reactor);
    }

    /// Takes the completion of an operation of this pair.
    pub fn completion<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        token: PairToken,
        done: &Done,
        shared: &mut Shared,
    ) {
        if token != self.token(token.what) {
            return; // of an earlier life
        }
        match (token.what, done) {
            (What::Kick(direction), Done::Ready(result, more)) => {
                let Some(ring) = &mut self.half(direction).ring else { return };
                ring.pending = true;
                ring.look_ahead = true;
                self.counters.kicks.add(1);
                if let Err(error) = result {
                    let why = format!("its kick descriptor cannot be polled: {error}");
                    self.give_up(reactor, direction, why, shared);
                } else if !more {
                    self.rearm_kick(reactor, direction);
                }
            }
            (What::UplinkReadable(index), Done::Ready(result, more)) => {
                // When the poll has ended it is armed again once nothing waits to be read: one that reports an
                // error of the uplink at once, again and again, must not keep the loop busy.
                if let Some(poll) = self.uplink_polls.get_mut(usize::from(index)).filter(|_| !more) {
                    *poll = None;
                }
                match result {
                    Err(error) => {
                        return self.uplink_lost(reactor, format!("it cannot be polled: {error}"), shared);
                    }
                    Ok(events) if events & libc::POLLERR as u32 != 0 => {
                        if let Err(error) = self.uplink.check() {
                            return self.uplink_lost(reactor, error.to_string(), shared);
                        }
                    }
                    Ok(_) => {}
                }
                self.uplink_readable = true;
                if let Some(ring) = &mut self.rx.ring {
                    ring.pending = true;
                }
            }
            (What::UplinkLook, _) => {
                self.look_timer = false;
                self.uplink_readable = true;
                if let Some(ring) = &mut self.rx.ring {
                    ring.pending = true;
                }
            }
            (What::UplinkWritable, _) => {
                self.writable_poll = false;
                if let Some(ring) = &mut self.tx.ring {
                    ring.pending = true;
                }
            }
            (What::UplinkWake(direction), Done::Woken(result)) => {
                self.uplink_woken(reactor, direction, result, shared);
            }
            (What::UplinkPause(direction), _) => self.uplink_paused(reactor, direction),
            (What::LinkPatience, _) => self.patience_ended(reactor),
            (What::Call(direction), Done::Signalled(result)) => {
                self.half(direction).call.done(reactor, token, result);
            }
            (What::Error(direction), Done::Signalled(result)) => {
                self.half(direction).error.done(reactor, token, result);
            }
            _ => {}
        }
    }

    pub(super) fn wait_writable<T: Copy + From<PairToken>>(&mut self, reactor: &mut Reactor<T>) {
        let token = self.token(What::UplinkWritable);
        match self.uplink.writable() {
            Some(_) if self.writable_poll => {}
            Some(fd) => {
                self.writable_poll = true;
                reactor.poll_once(fd, libc::POLLOUT, token.into());
            }
            None => self.wait_for_room(reactor),
        }
    }

    pub(super) fn uplink_lost<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        why: String,
        shared: &mut Shared,
    ) {
        if !std::mem::replace(&mut self.uplink_down, true) {
            shared.outbox.push(ToControl::Event(self.key, Event::UplinkDown(why)));
        }
        self.watch_uplink(reactor);
    }

    /// Stops a ring that cannot be used, and says so: error eventfd, counter, event.
    pub(super) fn give_up<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        direction: Direction,
        why: String,
        shared: &mut Shared,
    ) {
        self.stop(reactor, direction);
        self.counters.rings_broken.add(1);
        let token = self.token(What::Error(direction));
        self.half(direction).error.notify(reactor, token);
        shared.outbox.push(ToControl::Event(self.key, Event::RingBroken(direction, why)));
    }

    pub(super) fn fail_memory<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        shared: &mut Shared,
    ) {
        self.stop(reactor, Direction::Receive);
        self.stop(reactor, Direction::Transmit);
        self.memory = GuestMemory::empty();
        shared.outbox.push(ToControl::Event(self.key, Event::MemoryFault));
    }
}
