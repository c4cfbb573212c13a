//! Nudges: populates that the kernel has taken and started no thread for are started.
//!
//! io-wq starts threads from the sleep of others: a thread that goes to sleep in its work makes sure that another looks
//! after the queue, unless some thread runs. Since Linux 6.16 that promise can get lost. A thread made for the purpose finds
//! a free one to wake and counts as running itself meanwhile; if the one it woke takes a populate and sleeps in its fault
//! before the first has ended, nobody looks. What is queued then waits until something else is queued, or for 5 s, when
//! idle threads look by themselves (seen with 200 populates once in about ten migrations: 5 s without a packet).
//!
//! So something else is queued: an operation that does nothing, a moment after populates have been handed over and more and
//! more rarely until the next ones are.
#![forbid(unsafe_code)]

use super::control::Control;
use super::token::ControlToken;
use crate::reactor::{Done, Reactor};
use std::time::Duration;

/// The pause before the first nudge after populates have been handed over.
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// Pauses double up to this one.
const PAUSE_MAX: Duration = Duration::from_millis(64);
/// Nudges under way at most. One that does not come back has been lost as populates are, and is found by the next.
const UNDER_WAY_MAX: u32 = 16;

/// When to nudge.
#[derive(Debug)]
pub(super) struct Nudge {
    /// A timer runs.
    due: bool,
    pause: Duration,
    under_way: u32,
}

impl Default for Nudge {
    fn default() -> Self {
        Self { due: false, pause: PAUSE_MIN, under_way: 0 }
    }
}

impl Control {
    /// Populates have been handed over.
    pub(super) fn nudge_soon<T: Copy + From<ControlToken>>(&mut self, reactor: &mut Reactor<T>) {
        let nudge = &mut self.nudge;
        nudge.pause = PAUSE_MIN;
        if !std::mem::replace(&mut nudge.due, true) {
            reactor.timer(nudge.pause, ControlToken::Nudge.into());
        }
    }

    /// A nudge is due, or has ended.
    pub(super) fn nudged<T: Copy + From<ControlToken>>(&mut self, reactor: &mut Reactor<T>, done: &Done) {
        let nudge = &mut self.nudge;
        if !matches!(done, Done::Elapsed(_)) {
            nudge.under_way -= 1;
            return;
        }
        // Regions that were given up count, too: their memory stays until they are through.
        nudge.due = self.engine.under_way() > 0;
        if nudge.due {
            if nudge.under_way < UNDER_WAY_MAX {
                nudge.under_way += 1;
                reactor.nudge(ControlToken::Nudge.into());
            }
            nudge.pause = (nudge.pause * 2).min(PAUSE_MAX);
            reactor.timer(nudge.pause, ControlToken::Nudge.into());
        }
    }
}
