//! When a worker that has nothing to do looks at its rings again and again, and when it sleeps. Pure: times and counts in,
//! decisions out.
//!
//! Sleeping costs a notification, a wake-up, and the time that it takes; polling costs the CPU. So a packet pays for some
//! time of polling ([`PER_PACKET`]), and time uses that up, whether it was slept or polled away: what is left is the *credit*.
//! Where packets come faster than they pay for, there is always some, and the worker never sleeps; where they come more
//! slowly, there is none, and it sleeps at once. A few packets in a row do not begin it ([`START`]), so a request and its
//! answer never do. And what did not help is not repeated: without a packet the worker looks no longer than the *window*, which
//! grows when the next packet came soon after, and is halved when it came too late (as KVM does it for a halted guest CPU).
//!
//! ```text
//!  credit   ▲ packets          ┌ the bound                    window: no packet for so long ─► sleep
//!           │ ╱╲ ╱╲  ╱╲╱╲╱╲────┘╲                             (next one before bound or credit end: × 2, else: ÷ 2)
//!    START ─┼╱──╳──╲╱            ╲  nothing comes
//!           └─────────────────────╲──────────► time
//!            sleeps │ polls         │ sleeps
//! ```
//! Whoever polls takes the CPU from others. A worker from which the CPU is taken while it polls has company there, and
//! sleeps for a while instead: others run then, and the scheduler lets it come before them when it is woken, where one that
//! polls all the time waits for its next slice.
#![forbid(unsafe_code)]

use crate::config::Poll;
use std::time::{Duration, Instant};

/// Polling that a packet pays for: from some 80,000 a second on, a worker does not sleep. That is about what a wake-up and the
/// notification before it cost in a virtual machine.
const PER_PACKET: Duration = Duration::from_micros(12);
/// Credit with which polling begins.
const START: Duration = Duration::from_micros(50);
/// Credit at most, if the bound is not longer: so long after a stream's end there may be polling.
const CREDIT_MAX: Duration = Duration::from_micros(200);
/// The shortest window.
const WINDOW_MIN: Duration = Duration::from_micros(10);
/// How often the CPU time is looked at, so that it is known what it was before a gap.
const CPU_TIME_EVERY: Duration = Duration::from_millis(20);
/// So long without the CPU between two rounds, and somebody else wants it: a scheduler's slice is some 3 ms, the kernel's own
/// short work is none.
const TAKEN_MIN: Duration = Duration::from_millis(1);
/// How long there is no polling then, the first time and at most.
const BACK_OFF_MIN: Duration = Duration::from_millis(50);
const BACK_OFF_MAX: Duration = Duration::from_millis(1600);
/// When it has not happened again for so long, the next time is a first one.
const FORGET: Duration = Duration::from_secs(1);

/// What is known about a worker's packets.
#[derive(Clone, Debug)]
pub struct Polling {
    mode: Poll,
    credit: Duration,
    window: Duration,
    polls: bool,
    /// The last decision.
    last: Option<Instant>,
    /// The last packets, and the credit then.
    packets: Option<(Instant, Duration)>,
    /// Wall clock and CPU time at one moment of this stretch of polling.
    sample: Option<(Instant, Duration)>,
    back_off: Duration,
    /// No polling before that.
    quiet_until: Option<Instant>,
    back_offs: u64,
}

impl Polling {
    /// Nothing has come yet.
    pub fn new(mode: Poll) -> Self {
        Self {
            mode,
            credit: Duration::ZERO,
            window: WINDOW_MIN,
            polls: false,
            last: None,
            packets: None,
            sample: None,
            back_off: BACK_OFF_MIN,
            quiet_until: None,
            back_offs: 0,
        }
    }

    /// How often the CPU was left to others.
    pub fn back_offs(&self) -> u64 {
        self.back_offs
    }

    /// How long a single pair is looked at without having had packets, while its worker does not sleep; `None`: for ever.
    pub fn pair_bound(&self) -> Option<Duration> {
        match self.mode {
            Poll::Never => Some(Duration::ZERO),
            Poll::Auto(bound) => Some(bound),
            Poll::Always => None,
        }
    }

    /// A round has moved so many packets and left nothing to do (or has, `busy`). True: look again; false: sleep.
    pub fn goes_on(&mut self, now: Instant, packets: u32, busy: bool) -> bool {
        let bound = match self.mode {
            Poll::Never => return busy,
            Poll::Always => return true,
            Poll::Auto(bound) => bound,
        };
        let passed =
            self.last.replace(now).map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.credit = self.credit.saturating_sub(passed);
        if packets > 0 {
            self.credit = (self.credit + PER_PACKET * packets).min(bound.max(CREDIT_MAX));
            if let Some((before, credit)) = self.packets.replace((now, self.credit)) {
                self.learn(now.saturating_duration_since(before), credit, bound);
            }
        }
        if busy {
            return true;
        }
        let gap = self.packets.map_or(Duration::MAX, |(packets, _)| now.saturating_duration_since(packets));
        let enough = if self.polls { Duration::from_nanos(1) } else { START };
        self.polls = self.credit >= enough && gap < self.window && !self.is_quiet(now);
        if !self.polls {
            self.sample = None;
        }
        self.polls
    }

    /// Packets came so long after those before, when there was so much credit.
    fn learn(&mut self, gap: Duration, credit: Duration, bound: Duration) {
        if gap > bound.min(credit) {
            self.window /= 2;
        } else if gap >= self.window {
            self.window *= 2;
        }
        self.window = self.window.max(WINDOW_MIN).min(bound);
    }

    fn is_quiet(&self, now: Instant) -> bool {
        self.quiet_until.is_some_and(|until| now < until)
    }

    /// Whether [`Self::ran`] is to be told now: rarely, or after a gap.
    pub fn asks_for_cpu_time(&self, now: Instant) -> bool {
        let since = |then: Instant| now.saturating_duration_since(then);
        self.polls
            && (self.sample.is_none_or(|(then, _)| since(then) >= CPU_TIME_EVERY)
                || self.last.is_some_and(|last| since(last) >= TAKEN_MIN))
    }

    /// The CPU time that the thread has had up to now, before the round of now.
    pub fn ran(&mut self, now: Instant, cpu: Duration) {
        let gap = self.last.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        let Some((then, before)) = self.sample.replace((now, cpu)) else { return };
        let taken = now.saturating_duration_since(then).saturating_sub(cpu.saturating_sub(before));
        if gap.min(taken) < TAKEN_MIN {
            return;
        }
        let again = self.quiet_until.is_some_and(|until| now.saturating_duration_since(until) < FORGET);
        self.back_off = if again { (self.back_off * 2).min(BACK_OFF_MAX) } else { BACK_OFF_MIN };
        self.quiet_until = Some(now + self.back_off);
        self.back_offs += 1;
        self.polls = false;
        self.sample = None;
    }
}

#[cfg(test)]
#[path = "polling_tests.rs"]
mod tests;
