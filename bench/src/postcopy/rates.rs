//! Numbers from notes: percentiles, full rate, and when it was reached. Pure.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use serde::Serialize;

/// Over so long a rate is taken.
const WINDOW: Duration = Duration::from_millis(10);

/// How long something took, several times; milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Times {
    /// How often.
    pub count: usize,
    /// Half of them took less.
    pub p50_ms: f64,
    /// 99 of 100 took less.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

impl Times {
    /// Of a list; `None` if it is empty.
    pub fn of(list: &[Duration]) -> Option<Self> {
        let mut sorted = list.to_vec();
        sorted.sort();
        let max = sorted.last()?;
        // The smallest value that this share of all does not exceed.
        let share = |percent: usize| sorted[(sorted.len() * percent).div_ceil(100).max(1) - 1];
        Some(Self { count: sorted.len(), p50_ms: ms(share(50)), p99_ms: ms(share(99)), max_ms: ms(*max) })
    }
}

/// Milliseconds with their fraction.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Packets per second over the last part of the notes.
pub fn full_rate(notes: &[(Instant, u64)], over: Duration) -> Option<f64> {
    let &(end, last) = notes.last()?;
    let &(begin, first) = notes.iter().find(|(at, _)| end.duration_since(*at) <= over)?;
    let passed = end.duration_since(begin);
    (passed > Duration::ZERO).then(|| (last - first) as f64 / passed.as_secs_f64())
}

/// Since when packets came at `rate` or faster, for one window at least.
pub fn reached(notes: &[(Instant, u64)], rate: f64) -> Option<Instant> {
    let mut end = 0;
    for &(begin, first) in notes {
        while end < notes.len() && notes[end].0.duration_since(begin) < WINDOW {
            end += 1;
        }
        let &(at, last) = notes.get(end)?;
        if (last - first) as f64 >= rate * at.duration_since(begin).as_secs_f64() {
            return Some(begin);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        assert_eq!(Times::of(&[]), None);
        let list: Vec<Duration> = (1..=200).rev().map(Duration::from_millis).collect();
        let expected = Times { count: 200, p50_ms: 100.0, p99_ms: 198.0, max_ms: 200.0 };
        assert_eq!(Times::of(&list), Some(expected));
        assert_eq!(Times::of(&[Duration::from_millis(3)]).expect("one").p99_ms, 3.0);
    }

    #[test]
    fn a_rate_is_reached_when_the_stall_is_over() {
        let start = Instant::now();
        // 100 ms of one packet each, then 1000 each.
        let mut sum = 0;
        let notes: Vec<(Instant, u64)> = (0..400u64)
            .map(|i| {
                let note = (start + Duration::from_millis(i), sum);
                sum += if i < 100 { 1 } else { 1000 };
                note
            })
            .collect();
        let rate = full_rate(&notes, Duration::from_millis(200)).expect("rate");
        assert!((rate - 1e6).abs() < 1.0, "{rate}");
        let at = reached(&notes, 0.9 * rate).expect("reached");
        assert_eq!(at.duration_since(start), Duration::from_millis(99));
        assert_eq!(reached(&notes, 2.0 * rate), None);
        assert_eq!(full_rate(&[], WINDOW), None);
    }
}
