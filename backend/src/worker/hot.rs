//! A hot pair: one that ran dry a moment ago and is looked at in each round, so that nobody has to notify us.
//!
//! Not here: which pairs are hot (`datapath`), and for how long (`polling`).
#![forbid(unsafe_code)]

use super::datapath::Shared;
use super::half::Ring;
use super::pair::Pair;
use super::{Direction, PairToken};
use crate::reactor::Reactor;
use crate::virtq::QueueError;
use std::time::{Duration, Instant};

impl Pair {
    fn rings(&self) -> impl Iterator<Item = &Ring> {
        [&self.rx, &self.tx].into_iter().filter_map(|half| half.ring.as_ref())
    }

    /// True once for each time that it comes to have a ring that is to be looked at again and again.
    pub fn take_hot(&mut self) -> bool {
        let hot = !self.hot && self.rings().any(Ring::awaits_look);
        self.hot |= hot;
        hot
    }

    /// Looks, as a hot pair, whether there is something to do. Cheap if there is not: a load or two.
    pub fn look(&mut self) {
        for half in [&mut self.tx, &mut self.rx] {
            if let Some(ring) = half.ring.as_mut().filter(|ring| ring.awaits_look()) {
                ring.pending = ring.queue.may_have_more();
            }
        }
        if self.peeks && !self.uplink_readable && self.watches_uplink() {
            self.uplink_readable = self.uplink.peek().unwrap_or(false);
        }
    }

    /// How long it has moved no packets.
    pub fn idle(&self, now: Instant) -> Duration {
        self.worked.map_or(Duration::MAX, |worked| now.saturating_duration_since(worked))
    }

    /// Whether waiting for the uplink's frames by looking would bring them sooner.
    pub(super) fn pays_by_receiving(&self) -> bool {
        self.peeks && !self.uplink.wakes_often()
    }

    pub(super) fn worked(&mut self, now: Instant) {
        self.worked = Some(now);
    }

    /// It is not hot any more: its drivers are asked to kick.
    pub fn cool<T: Copy + From<PairToken>>(&mut self, reactor: &mut Reactor<T>, shared: &mut Shared) {
        self.hot = false;
        for direction in [Direction::Transmit, Direction::Receive] {
            let Some(ring) = self.half(direction).ring.as_mut().filter(|ring| ring.awaits_look()) else {
                continue;
            };
            match ring.await_kick() {
                Ok(()) => {}
                // It was given other memory meanwhile: its turn finds out what is missing.
                Err(QueueError::Missing(_)) => ring.pending = true,
                Err(error) => self.give_up(reactor, direction, error.to_string(), shared),
            }
        }
    }
}
