//! Postcopy: what a pair's rings will need of memory that has not arrived, told to control before and while they park.
//!
//! A window of chains goes out at once, so that hundreds of pages are asked for together, not one after the other.
//! Not here: who asks for them (`postcopy`), and what a look at a ring is (`virtq::lookahead`).
#![forbid(unsafe_code)]

use super::datapath::Shared;
use super::pair::Pair;
use super::{Direction, Event, ToControl};
use crate::virtq::Purpose;

/// Chains of a ring that are looked at in advance.
const CHAINS_AHEAD: u16 = 512;
/// Runs of pages that are told at once.
const RANGES_MAX: usize = 1024;

impl Pair {
    /// Whether a ring is to be looked at in advance. Outside postcopy: no, at the price of two flags.
    pub(super) fn looks_ahead(&self) -> bool {
        let asks = |half: &super::half::Half| half.ring.as_ref().is_some_and(|ring| ring.look_ahead);
        (asks(&self.tx) || asks(&self.rx)) && self.memory.is_incomplete()
    }

    /// Tells control which pages the rings wait for, and which they will.
    pub(super) fn look_ahead(&mut self, shared: &mut Shared) {
        for direction in [Direction::Transmit, Direction::Receive] {
            let Self { memory, rx, tx, .. } = self;
            let half = if direction == Direction::Receive { rx } else { tx };
            let Some(ring) = half.ring.as_mut().filter(|ring| ring.look_ahead) else { continue };
            ring.look_ahead = false;
            let parked = ring.parked;
            let blind = &mut ring.blind;
            *blind = false;
            // What nothing moves without goes first.
            let mut ranges: Vec<_> = parked.map(|range| (range, Purpose::Buffer)).into_iter().collect();
            ring.queue.look_ahead(memory, CHAINS_AHEAD, &mut shared.ahead, |range, purpose| {
                *blind |= purpose != Purpose::Buffer;
                if Some(range) == parked {
                    ranges[0].1 = purpose;
                } else if ranges.len() < RANGES_MAX {
                    ranges.push((range, purpose));
                }
            });
            if !ranges.is_empty() {
                let event = Event::Wants { direction, parked, ranges };
                shared.outbox.push(ToControl::Event(self.key(), event));
            }
        }
    }
}
