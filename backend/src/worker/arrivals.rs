//! When to listen to an uplink, and when to look at it by the clock. Pure: counts and times in, decisions out.
//!
//! An uplink that wakes us for each frame costs more in wake-ups than in frames, here and where the frame comes from. So
//! once frames come faster than some number a pause, nobody listens: the uplink is looked at once a pause, as a network
//! card moderates its interrupts; and the fewer frames a look finds, the longer is the next pause, within limits. One frame
//! at a time (a request, its answer) never gets there, and waits for nothing.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// The shortest pause between two looks: what network cards and their drivers wait, too (`ethtool -c`: rx-usecs).
const PAUSE_MIN: Duration = Duration::from_micros(50);
/// The longest: as far as adaptive moderation of network cards goes (Linux's net_dim), too. Pauses double and halve in between.
const PAUSE_MAX: Duration = Duration::from_micros(256);
/// Frames of a look below which pauses get longer: a wake-up costs some 1 µs, 15 µs in some virtual machines.
const LOOK_MIN: u32 = 64;
/// Frames of a look above which they get shorter: rings have an end.
const LOOK_MAX: u32 = 160;
/// Frames a shortest pause from which on nobody listens: 160,000 a second.
const MANY: u32 = 8;
/// Looks after which it is decided whether somebody listens again: senders send in bursts, with silence between them.
const LOOKS: u32 = 4;
/// Frames in so many looks, a shortest pause apart, below which that is so: 40,000 a second.
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
    /// We look after a pause.
    Pause(Duration),
}

/// What is known of the frames that came.
#[derive(Clone, Copy, Debug, Default)]
pub struct Arrivals {
    /// The pause between two looks, while nobody listens.
    pause: Option<Duration>,
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
        if let Some(pause) = self.pause {
            self.looks += 1;
            if self.looks >= LOOKS {
                self.pause = after(pause, self.frames);
                (self.looks, self.frames, self.since) = (0, 0, None);
            }
            return self.next();
        }
        let since = *self.since.get_or_insert(now);
        let time = now.saturating_duration_since(since);
        if time < WINDOW {
            return Next::Listen;
        }
        let many = u128::from(self.frames) * PAUSE_MIN.as_nanos() >= u128::from(MANY) * time.as_nanos();
        self.pause = (many && time < SILENCE).then_some(PAUSE_MIN);
        self.since = Some(now);
        self.frames = 0;
        self.next()
    }

    fn next(&self) -> Next {
        self.pause.map_or(Next::Listen, Next::Pause)
    }
}

/// The next pause after [`LOOKS`] looks that found so many frames; none if somebody is to listen again.
fn after(pause: Duration, frames: u32) -> Option<Duration> {
    if u128::from(frames) * PAUSE_MIN.as_nanos() < u128::from(FEW) * pause.as_nanos() {
        return None;
    }
    let pause = match frames / LOOKS {
        0..LOOK_MIN => pause * 2,
        LOOK_MIN..=LOOK_MAX => pause,
        _ => pause / 2,
    };
    Some(pause.clamp(PAUSE_MIN, PAUSE_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn came(arrivals: &mut Arrivals, frames: u32, now: Instant) -> Next {
        arrivals.add(frames);
        arrivals.ran_dry(now)
    }

    /// Frames come one by one, so far apart. What is done after each of them.
    fn play(arrivals: &mut Arrivals, apart: Duration, count: u32) -> Vec<Next> {
        let start = Instant::now();
        (0..count).map(|i| came(arrivals, 1, start + apart * i)).collect()
    }

    fn looks(arrivals: &mut Arrivals, counts: [u32; LOOKS as usize]) -> Next {
        counts.map(|frames| came(arrivals, frames, Instant::now()))[LOOKS as usize - 1]
    }

    #[test]
    fn single_frames_always_wake() {
        for apart in [10, 50, 200, 2000].map(Duration::from_micros) {
            let all = play(&mut Arrivals::default(), apart, 1000);
            assert!(all.iter().all(|next| *next == Next::Listen), "{apart:?}");
        }
    }

    #[test]
    fn a_stream_is_looked_at_by_the_clock() {
        let all = play(&mut Arrivals::default(), Duration::from_micros(2), 60);
        let first = all.iter().position(|next| *next == Next::Pause(PAUSE_MIN)).expect("it comes to that");
        assert!(first >= 50, "not before the window is over: {first}");
    }

    #[test]
    fn listening_begins_again_when_a_stream_ends() {
        let mut arrivals = Arrivals { pause: Some(PAUSE_MIN), ..Arrivals::default() };
        assert_eq!(looks(&mut arrivals, [LOOK_MIN; 4]), Next::Pause(PAUSE_MIN));
        assert_eq!(
            looks(&mut arrivals, [4 * LOOK_MIN, 0, 0, 0]),
            Next::Pause(PAUSE_MIN),
            "a burst and its silence"
        );
        assert_eq!(looks(&mut arrivals, [0, 0, 0, FEW]), Next::Pause(2 * PAUSE_MIN));
        assert_eq!(looks(&mut arrivals, [0, 0, 0, FEW]), Next::Listen);
        assert_eq!(came(&mut arrivals, 1, Instant::now()), Next::Listen, "and the count begins anew");
    }

    #[test]
    fn pauses_keep_their_limits() {
        let pause = |pause, frames| after(pause, LOOKS * frames);
        assert_eq!(pause(PAUSE_MIN, 25), Some(2 * PAUSE_MIN));
        assert_eq!(pause(PAUSE_MAX, 25), Some(PAUSE_MAX));
        assert_eq!(pause(PAUSE_MAX, LOOK_MAX + 1), Some(PAUSE_MAX / 2));
        assert_eq!(pause(PAUSE_MIN, 1000), Some(PAUSE_MIN));
        assert_eq!(pause(PAUSE_MIN, 1), None);
    }

    #[test]
    fn a_burst_after_a_silence_is_no_stream() {
        let mut arrivals = Arrivals::default();
        let start = Instant::now();
        assert_eq!(came(&mut arrivals, 1, start), Next::Listen);
        assert_eq!(came(&mut arrivals, 200, start + Duration::from_secs(1)), Next::Listen);
    }
}
