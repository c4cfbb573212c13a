//! The pairs of one worker, and the round over those that have work.
//!
//! A pair with work stands in the ready queue once; a turn of the loop gives each a budget of packets, so that
//! no queue starves another (DESIGN: Reactor and workers).
#![forbid(unsafe_code)]

use super::pair::Pair;
use super::{Attachment, Command, PairKey, PairToken, Reply, ToControl};
use crate::net::{rx, tx};
use crate::reactor::{Done, Reactor};
use crate::virtq::Chain;
use slab::Slab;
use std::collections::{HashMap, VecDeque};

/// Buffers shared by all pairs of a worker, and what they want to tell control.
#[derive(Default)]
pub struct Shared {
    /// The transmit path's buffers.
    pub tx: tx::Scratch,
    /// The receive path's buffers.
    pub rx: rx::Scratch,
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
    shared: Shared,
}

impl Default for Datapath {
    fn default() -> Self {
        Self { pairs: Slab::new(), slots: HashMap::new(), ready: VecDeque::new(), shared: Shared::default() }
    }
}

impl Datapath {
    /// Takes a pair over.
    pub fn attach(&mut self, attachment: Attachment) {
        let key = attachment.key;
        let slot = self.pairs.vacant_key();
        self.pairs.insert(Pair::new(attachment, slot as u32));
        self.slots.insert(key, slot);
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
        let pair = &mut self.pairs[slot];
        let silent = matches!(command, Command::Arrived);
        let reply = pair.command(reactor, command, &mut self.shared);
        if !silent {
            self.shared.outbox.push(ToControl::Reply(key, reply));
        }
        if pair.take_ready() {
            self.ready.push_back(slot);
        }
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
        if pair.take_ready() {
            self.ready.push_back(slot);
        }
    }

    /// Gives every pair that has work one turn. Returns true if some still have work.
    pub fn round<T: Copy + From<PairToken>>(&mut self, reactor: &mut Reactor<T>) -> bool {
        for _ in 0..self.ready.len() {
            let Some(slot) = self.ready.pop_front() else { break };
            let pair = &mut self.pairs[slot];
            pair.turn(reactor, &mut self.shared);
            if pair.take_ready() {
                self.ready.push_back(slot);
            }
        }
        !self.ready.is_empty()
    }

    /// What the pairs want to tell control, in order.
    pub fn outbox(&mut self) -> &mut Vec<ToControl> {
        &mut self.shared.outbox
    }
}
