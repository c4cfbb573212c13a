//! Waking the kernel's side of an uplink that wants it, and waiting for room at one that cannot be polled for it.
//!
//! One wake-up is in flight for each direction at most; it goes with the loop's next system call. Which uplinks need
//! that, and when again, is theirs to say (`uplink`). Not here: the bursts before it (`turn`).
#![forbid(unsafe_code)]

use super::datapath::Shared;
use super::pair::Pair;
use super::{Direction, PairToken, What};
use crate::reactor::Reactor;
use crate::uplink::Woken;
use std::io;
use std::time::Duration;

/// The first pause of a pair that waits for room which no completion announces.
const ROOM_PAUSE_MIN: Duration = Duration::from_millis(1);
/// The longest.
const ROOM_PAUSE_MAX: Duration = Duration::from_millis(32);

/// What one direction waits for.
#[derive(Debug, Default)]
struct Wake {
    in_flight: bool,
    paused: bool,
}

/// Wake-ups of a pair's uplink.
#[derive(Debug, Default)]
pub(super) struct Wakes {
    receive: Wake,
    transmit: Wake,
    /// The transmit ring waits for room at the uplink.
    full: bool,
    room_pause: Duration,
}

impl Wakes {
    fn of(&mut self, direction: Direction) -> &mut Wake {
        match direction {
            Direction::Receive => &mut self.receive,
            Direction::Transmit => &mut self.transmit,
        }
    }
}

impl Pair {
    /// Wakes the uplink's kernel side if it wants to be woken, unless that is under way or has to wait.
    pub(super) fn wake_uplink<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        direction: Direction,
    ) {
        let token = self.token(What::UplinkWake(direction));
        let wake = self.wakes.of(direction);
        if wake.in_flight || wake.paused {
            return;
        }
        if let Some(socket) = self.uplink.wake(direction) {
            wake.in_flight = true;
            reactor.wake_socket(socket, direction == Direction::Transmit, token.into());
        }
    }

    /// A wake-up has ended.
    pub(super) fn uplink_woken<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        direction: Direction,
        result: &io::Result<()>,
        shared: &mut Shared,
    ) {
        self.wakes.of(direction).in_flight = false;
        match self.uplink.woken(direction, result) {
            Woken::Done => {}
            Woken::Again => self.wake_uplink(reactor, direction),
            Woken::After(pause) => self.pause(reactor, direction, pause),
            Woken::Down(error) => self.uplink_lost(reactor, error.to_string(), shared),
        }
        if direction == Direction::Transmit {
            self.look_for_room();
        }
    }

    /// The pause before the next wake-up is over.
    pub(super) fn uplink_paused<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        direction: Direction,
    ) {
        self.wakes.of(direction).paused = false;
        self.wake_uplink(reactor, direction);
        if direction == Direction::Transmit {
            self.look_for_room();
        }
    }

    /// The uplink is full: looks again when a wake-up has ended, or after a pause if none is needed. (Frames that were
    /// taken come back when the device is through with them, which nothing announces.)
    pub(super) fn wait_for_room<T: Copy + From<PairToken>>(&mut self, reactor: &mut Reactor<T>) {
        self.wakes.full = true;
        self.wake_uplink(reactor, Direction::Transmit);
        let Wakes { transmit, room_pause, .. } = &mut self.wakes;
        if !transmit.in_flight && !transmit.paused {
            let pause = *room_pause;
            *room_pause = (pause * 2).min(ROOM_PAUSE_MAX);
            self.pause(reactor, Direction::Transmit, pause.max(ROOM_PAUSE_MIN));
        }
    }

    /// Frames were taken: the next wait for room begins with a short pause again.
    pub(super) fn found_room(&mut self) {
        self.wakes.room_pause = ROOM_PAUSE_MIN;
    }

    fn pause<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        direction: Direction,
        pause: Duration,
    ) {
        self.wakes.of(direction).paused = true;
        let token = self.token(What::UplinkPause(direction));
        reactor.timer(pause, token.into());
    }

    fn look_for_room(&mut self) {
        if std::mem::take(&mut self.wakes.full)
            && let Some(ring) = &mut self.tx.ring
        {
            ring.pending = true;
        }
    }
}
