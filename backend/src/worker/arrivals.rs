//! When to listen to an uplink, and when to look at it by the clock. Pure: counts and times in, decisions out.
//!
//! An uplink that wakes us for each frame costs more in wake-ups than in frames, here and where the frame comes from. So
//! once frames come faster than some number a pause, nobody listens: the uplink is looked at once a pause, as a network
//! card moderates its interrupts. One frame at a time (a request, its answer) never gets there, and waits for nothing.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// Between two looks: what network cards and their drivers wait, too (`ethtool -c`: rx-usecs).
pub const PAUSE: Duration = Duration::from_micros(50);
/// Frames a pause from which on nobody listens: 160,000 a second.
const MANY: u32 = 8;
/// Looks after which it is decided whether somebody listens again: senders send in bursts, with silence between them.
const LOOKS: u32 = 4;
/// Frames in so many looks below which that is so.
const FEW: u32 = 8;
/// Time over which frames are counted before nobody listens.
const WINDOW: Duration = Duration::from_micros(100);
/// After a silence so long the count begins anew.
const SILENCE: Duration = Duration::from_millis(1);

/// How the next frame is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It wakes us.
    Listen,
    /// We look after a [`PAUSE`].
    Pause,
}

/// What is known of the frames that came.
#[derive(Clone, Copy, Debug, Default)]
pub struct Arrivals {
    pausing: bool,
    /// Looks since the last decision.
    looks: u32,
    since: Option<Instant>,
    frames: u32,
}

impl Arrivals {
    /// So many frames more have come.
    pub fn add(&mut self, frames: u32) {
        self.frames = self.frames.saturating_add(frames);
    }

    /// The uplink is empty now.
    pub fn ran_dry(&mut self, now: Instant) -> Next {
        if self.pausing {
            self.looks += 1;
            if self.looks >= LOOKS {
                self.pausing = self.frames >= FEW;
                (self.looks, self.frames, self.since) = (0, 0, None);
            }
            return self.next();
        }
        let since = *self.since.get_or_insert(now);
        let time = now.saturating_duration_since(since);
        if time < WINDOW {
            return Next::Listen;
        }
        let many = u128::from(self.frames) * PAUSE.as_nanos() >= u128::from(MANY) * time.as_nanos();
        self.pausing = many && time < SILENCE;
        self.since = Some(now);
        self.frames = 0;
        self.next()
    }

    fn next(&self) -> Next {
        if self.pausing { Next::Pause } else { Next::Listen }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(arrivals: &mut Arrivals, frames: u32, now: Instant) -> Next {
        arrivals.add(frames);
        arrivals.ran_dry(now)
    }

    /// Frames come one by one, so far apart. What is done after each of them.
    fn play(arrivals: &mut Arrivals, apart: Duration, count: u32) -> Vec<Next> {
        let start = Instant::now();
        (0..count).map(|i| after(arrivals, 1, start + apart * i)).collect()
    }

    #[test]
    fn single_frames_always_wake() {
        for apart in [10, 50, 200, 2000].map(Duration::from_micros) {
            let all = play(&mut Arrivals::default(), apart, 1000);
            assert!(all.iter().all(|next| *next == Next::Listen), "{apart:?}");
        }
    }

    #[test]
    fn a_stream_is_looked_at_by_the_clock_until_it_ends() {
        let mut arrivals = Arrivals::default();
        // 50 times 2 µs are the window; behind it each call is a look.
        let all = play(&mut arrivals, Duration::from_micros(2), 51);
        let first = all.iter().position(|next| *next == Next::Pause);
        assert_eq!(first, Some(50), "when the window is over, and not before");
        let now = Instant::now();
        let looks = |arrivals: &mut Arrivals, counts: [u32; LOOKS as usize]| {
            counts.map(|frames| after(arrivals, frames, now)).last().copied()
        };
        assert_eq!(looks(&mut arrivals, [25, 25, 25, 25]), Some(Next::Pause));
        assert_eq!(looks(&mut arrivals, [64, 0, 0, 0]), Some(Next::Pause), "a burst and its silence");
        assert_eq!(looks(&mut arrivals, [0, 0, 0, FEW]), Some(Next::Pause));
        assert_eq!(looks(&mut arrivals, [FEW - 1, 0, 0, 0]), Some(Next::Listen));
        assert_eq!(after(&mut arrivals, 1, now), Next::Listen, "and the count begins anew");
    }

    #[test]
    fn a_burst_after_a_silence_is_no_stream() {
        let mut arrivals = Arrivals::default();
        let start = Instant::now();
        assert_eq!(after(&mut arrivals, 1, start), Next::Listen);
        assert_eq!(after(&mut arrivals, 200, start + Duration::from_secs(1)), Next::Listen);
    }
}
