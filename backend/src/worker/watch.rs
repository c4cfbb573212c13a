//! How a pair notices frames at its uplink: by polls of its descriptors, by the clock, and as a hot pair by looks.
//!
//! When which is right is for `arrivals` to say. Not here: the frames (`turn`), and waking the uplink's kernel side (`wake`).
#![forbid(unsafe_code)]

use super::arrivals::Next;
use super::pair::Pair;
use super::{Direction, PairToken, What};
use crate::reactor::Reactor;
use std::time::Instant;

impl Pair {
    /// Whether frames are of interest.
    pub(super) fn watches_uplink(&self) -> bool {
        self.rx.ring.is_some() && self.rx.enabled && !self.uplink_down
    }

    /// Polls the uplink for frames exactly while the receive ring can take some.
    pub(super) fn watch_uplink<T: Copy + From<PairToken>>(&mut self, reactor: &mut Reactor<T>) {
        match (self.watches_uplink(), self.uplink_polls.is_empty()) {
            (true, true) => {
                self.uplink_epoch = self.uplink_epoch.wrapping_add(1);
                // What came while nobody looked is stale.
                self.uplink.discard();
                self.uplink_polls.resize(self.uplink.readable().len(), None);
            }
            (false, false) => {
                self.uplink_polls.drain(..).flatten().for_each(|op| reactor.cancel(op));
                // What they still report, their cancellation first of all, means nothing.
                self.uplink_epoch = self.uplink_epoch.wrapping_add(1);
                self.looking = false;
                self.look_timer = false;
                self.uplink_readable = false;
                self.counters.rx_dropped_stopped.add(self.uplink.discard());
                self.wake_uplink(reactor, Direction::Receive);
            }
            _ => {}
        }
        if self.looking {
            return;
        }
        let epoch = self.uplink_epoch;
        for (index, (poll, fd)) in self.uplink_polls.iter_mut().zip(self.uplink.readable()).enumerate() {
            if poll.is_none() {
                let token = PairToken { slot: self.slot, epoch, what: What::UplinkReadable(index as u16) };
                *poll = Some(reactor.poll(fd, libc::POLLIN, token.into()));
            }
        }
    }

    /// The uplink has no frame more: the next one wakes us, or we look for it in a moment.
    pub(super) fn uplink_ran_dry<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        now: Instant,
    ) {
        self.uplink_readable = false;
        if self.look_timer {
            return; // seen before its time
        }
        let next = match self.uplink.wakes_often() {
            true => self.arrivals.ran_dry(now),
            false => Next::Listen,
        };
        if let Next::Pause(pause) = next {
            if !std::mem::replace(&mut self.looking, true) {
                self.uplink_polls.iter_mut().filter_map(Option::take).for_each(|op| reactor.cancel(op));
                self.uplink_epoch = self.uplink_epoch.wrapping_add(1);
            }
            self.look_timer = true;
            reactor.timer(pause, self.token(What::UplinkLook).into());
        } else {
            self.looking = false;
            self.watch_uplink(reactor);
        }
    }
}
