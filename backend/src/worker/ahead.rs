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
/// After so many chains the whole window is looked at again, for what could not be told the last time: the buffers behind an
/// indirect table that was missing itself, what found no place in the engine's queue, or failed. In between only chains that
/// are new in the window are looked at, or each page that arrives would cost a walk over all of them.
const WHOLE_LOOK_EVERY: u16 = 32;

/// How far a ring was looked at in advance. Available indices.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Told {
    /// The first chain of the last look at the whole window, if there was one.
    whole: Option<u16>,
    /// Behind the last chain that was looked at.
    until: u16,
}

impl Told {
    /// How many chains of a window that begins at `first` need not be looked at again.
    fn skip(&mut self, first: u16) -> u16 {
        let known = self.until.wrapping_sub(first);
        match self.whole {
            // More than any ring has: the chains that were looked at are all done.
            Some(whole) if first.wrapping_sub(whole) < WHOLE_LOOK_EVERY && known <= CHAINS_AHEAD => known,
            _ => {
                self.whole = Some(first);
                0
            }
        }
    }
}

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
            let skip = ring.told.skip(ring.queue.first_waiting());
            let until =
                ring.queue.look_ahead(memory, skip, CHAINS_AHEAD, &mut shared.ahead, |range, purpose| {
                    *blind |= purpose != Purpose::Buffer;
                    if Some(range) == parked {
                        ranges[0].1 = purpose;
                    } else if ranges.len() < RANGES_MAX {
                        ranges.push((range, purpose));
                    }
                });
            // What lies behind a table that is missing was not seen.
            ring.told = if *blind { Told::default() } else { Told { until, ..ring.told } };
            if !ranges.is_empty() {
                let event = Event::Wants { direction, parked, ranges };
                shared.outbox.push(ToControl::Event(self.key(), event));
            }
        }
    }
}
