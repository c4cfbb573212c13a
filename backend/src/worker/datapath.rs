//! The pairs of one worker, and the round over those that have work.
//!
//! A pair with work stands in the ready queue once; a turn of the loop gives each a budget of packets, so that
//! no queue starves another (DESIGN: Reactor and workers). A pair that ran dry is *hot* for a while: it is looked at in
//! each round, and its drivers need not kick. When it has had nothing for its bound, or the worker is going to sleep
//! (`polling` says when), kicks are asked for again. A round costs what ready and hot pairs cost; all others cost nothing.
#![forbid(unsafe_code)]

use super::counters::WorkerCounters;
use super::link;
use super::pair::Pair;
use super::polling::Polling;
use super::{Attachment, Command, PairKey, PairToken, Reply, ToControl};
use crate::config::Poll;
use crate::net::{rx, tx};
use crate::reactor::{Done, Reactor};
use crate::virtq::Chain;
use slab::Slab;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Buffers shared by all pairs of a worker, and what they want to tell control.
#[derive(Default)]
pub struct Shared {
    /// The transmit path's buffers.
    pub tx: tx::Scratch,
    /// The receive path's buffers.
    pub rx: rx::Scratch,
    /// The peer links' buffers.
    pub link: link::Scratch,
    /// For looks at chains that nobody has taken yet.
    pub ahead: Chain,
    /// Messages for control.
    pub outbox: Vec<ToControl>,
}

/// Everything a worker does for packets.
pub struct Datapath {
    pairs: Slab<Pair>,
    slots: HashMap<PairKey, usize>,
    ready: VecDeque<usize>,
    /// Pairs that are looked at in each round; each once.
    hot: Vec<usize>,
    polling: Polling,
    /// The last round, if it found nothing and did not end in sleep.
    in_vain_since: Option<Instant>,
    counters: Arc<WorkerCounters>,
    shared: Shared,
}

impl Datapath {
    /// Without pairs.
    pub fn new(poll: Poll, counters: Arc<WorkerCounters>) -> Self {
        Self {
            pairs: Slab::new(),
            slots: HashMap::new(),
            ready: VecDeque::new(),
            hot: Vec::new(),
            polling: Polling::new(poll),
            in_vain_since: None,
            counters,
            shared: Shared::default(),
        }
    }

    /// Takes a pair over.
    pub fn attach(&mut self, attachment: Attachment) {
        let key = attachment.key;
        let slot = self.pairs.vacant_key();
        self.pairs.insert(Pair::new(attachment, slot as u32));
        self.slots.insert(key, slot);
        let Self { pairs, slots, .. } = self;
        let peers = pairs[slot].link.as_ref().map_or_else(Vec::new, |link| link.names().to_vec());
        for slot in peers.iter().filter_map(|peer| slots.get(peer).copied()).chain([slot]) {
            if let Some(link) = &mut pairs[slot].link {
                link.resolve(|peer| slots.get(peer).copied());
            }
        }
    }

    /// The pair that gets what the one at `slot` sends: that of its number, or one of those that take frames.
    fn peer_of(&self, slot: usize) -> Option<usize> {
        let pair = &self.pairs[slot];
        let ends = pair.link.as_ref()?.ends();
        let number = usize::from(pair.key().pair);
        let same = *ends.get(number % ends.len().max(1))?;
        let takes = |end: &usize| self.pairs.get(*end).is_some_and(Pair::takes_frames);
        if takes(&same) {
            return Some(same);
        }
        let live = ends.iter().filter(|end| takes(end)).count();
        let instead = ends.iter().filter(|end| takes(end)).nth(number % live.max(1));
        Some(instead.copied().unwrap_or(same))
    }

    /// Something has happened to a pair: it may have work, or its peers.
    fn stir(&mut self, slot: usize) {
        let pair = &mut self.pairs[slot];
        if pair.take_ready() {
            self.ready.push_back(slot);
        }
        if !pair.lets_senders_go() {
            return;
        }
        let ends = pair.link.as_mut().map_or_else(Vec::new, |link| std::mem::take(link.ends_mut()));
        for end in &ends {
            let Some(sender) = self.pairs.get_mut(*end) else { continue };
            sender.peer_goes_on(slot);
            if sender.take_ready() {
                self.ready.push_back(*end);
            }
        }
        if let Some(link) = &mut self.pairs[slot].link {
            *link.ends_mut() = ends;
        }
    }

    /// Gives a pair its turn; returns the packets it was worth.
    fn turn<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        slot: usize,
        now: Instant,
    ) -> u32 {
        let Some(peer) = self.peer_of(slot) else {
            return self.pairs[slot].turn(reactor, &mut self.shared, now, None);
        };
        let Some((pair, other)) = self.pairs.get2_mut(slot, peer) else { return 0 };
        let packets = pair.turn(reactor, &mut self.shared, now, Some(other));
        if other.take_hot() {
            self.hot.push(peer);
        }
        self.stir(peer);
        packets
    }

    /// Carries out a command for one of the pairs; the reply lands in the outbox.
    pub fn command<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        key: PairKey,
        command: Command,
    ) {
        let Some(&slot) = self.slots.get(&key) else {
            self.shared.outbox.push(ToControl::Reply(key, Reply::Failed("no such queue pair".into())));
            return;
        };
        let silent = matches!(command, Command::Arrived);
        let reply = self.pairs[slot].command(reactor, command, &mut self.shared);
        if !silent {
            self.shared.outbox.push(ToControl::Reply(key, reply));
        }
        self.stir(slot);
    }

    /// Takes the completion of an operation that a pair started.
    pub fn completion<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        token: PairToken,
        done: &Done,
    ) {
        let slot = token.slot as usize;
        let Some(pair) = self.pairs.get_mut(slot) else { return };
        pair.completion(reactor, token, done, &mut self.shared);
        self.stir(slot);
    }

    /// Gives every pair that has work one turn. Returns true if the worker is not to sleep: some still have work, or may
    /// soon have.
    pub fn round<T: Copy + From<PairToken>>(&mut self, reactor: &mut Reactor<T>) -> bool {
        let now = Instant::now();
        if self.polling.asks_for_cpu_time(now) {
            let before = self.polling.back_offs();
            self.polling.ran(now, cpu_time());
            self.counters.back_offs.add(self.polling.back_offs() - before);
        }
        self.round_at(reactor, now)
    }

    /// The same, at a given time.
    pub fn round_at<T: Copy + From<PairToken>>(&mut self, reactor: &mut Reactor<T>, now: Instant) -> bool {
        if let Some(since) = self.in_vain_since.take() {
            self.counters.polled_ns.add(now.saturating_duration_since(since).as_nanos() as u64);
        }
        self.look(reactor, now);
        let mut packets = 0;
        for _ in 0..self.ready.len() {
            let Some(slot) = self.ready.pop_front() else { break };
            packets += self.turn(reactor, slot, now);
            self.stir(slot);
            if self.pairs[slot].take_hot() {
                self.hot.push(slot);
            }
        }
        let goes_on = self.polling.goes_on(now, packets, !self.ready.is_empty());
        if !goes_on {
            self.counters.sleeps.add(1);
            while let Some(slot) = self.hot.pop() {
                self.cool(reactor, slot);
            }
        } else if packets == 0 {
            self.in_vain_since = self.ready.is_empty().then_some(now);
            // Nothing but looks: leave the core's other thread, and the memory, some room.
            std::hint::spin_loop();
        }
        goes_on || !self.ready.is_empty()
    }

    /// Looks at the hot pairs. Those that have had nothing for too long are to be kicked again.
    fn look<T: Copy + From<PairToken>>(&mut self, reactor: &mut Reactor<T>, now: Instant) {
        let bound = self.polling.pair_bound();
        let mut index = 0;
        while let Some(&slot) = self.hot.get(index) {
            self.pairs[slot].look();
            self.stir(slot);
            let pair = &self.pairs[slot];
            if !pair.queued && bound.is_some_and(|bound| pair.idle(now) >= bound) {
                self.hot.swap_remove(index);
                self.cool(reactor, slot);
                continue;
            }
            index += 1;
        }
    }

    /// A pair is not hot any more.
    fn cool<T: Copy + From<PairToken>>(&mut self, reactor: &mut Reactor<T>, slot: usize) {
        self.pairs[slot].cool(reactor, &mut self.shared);
        self.stir(slot);
    }

    /// Sets how long senders wait for pairs of a peer link.
    #[cfg(test)]
    pub fn set_patience(&mut self, patience: Duration) {
        for link in self.pairs.iter_mut().filter_map(|(_, pair)| pair.link.as_mut()) {
            link.patience = patience;
        }
    }

    /// How many pairs are looked at in each round.
    #[cfg(test)]
    pub fn hot(&self) -> usize {
        self.hot.len()
    }

    /// What the pairs want to tell control, in order.
    pub fn outbox(&mut self) -> &mut Vec<ToControl> {
        &mut self.shared.outbox
    }
}

/// The CPU time of this thread.
fn cpu_time() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map_or(Duration::ZERO, Duration::from)
}
