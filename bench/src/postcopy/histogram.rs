//! How often something took how long: a histogram that takes millions of samples and stays small. Pure.
//!
//! Each power of two of nanoseconds is cut into 32 parts, so a value that is read back is at most 3 % above the true one.
#![forbid(unsafe_code)]

use serde::Serialize;

const PARTS_LOG2: u32 = 5;
const PARTS: u64 = 1 << PARTS_LOG2;
const BINS: usize = 64 * PARTS as usize;

/// Counts by duration.
#[derive(Clone, Debug)]
pub struct Histogram {
    bins: Vec<u32>,
    count: u64,
    max_ns: u64,
}

/// What is told about one; microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// How many samples.
    pub count: u64,
    /// Half of them took less.
    pub p50_us: f64,
    /// 99 of 100 took less.
    pub p99_us: f64,
    /// 999 of 1000 took less.
    pub p999_us: f64,
    /// The longest.
    pub max_us: f64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { bins: vec![0; BINS], count: 0, max_ns: 0 }
    }
}

impl Histogram {
    /// One more sample.
    pub fn add(&mut self, ns: u64) {
        self.bins[bin(ns)] += 1;
        self.count += 1;
        self.max_ns = self.max_ns.max(ns);
    }

    /// The time that this many of a million samples do not exceed.
    fn share_ns(&self, of_a_million: u64) -> u64 {
        let wanted = (u128::from(self.count) * u128::from(of_a_million)).div_ceil(1_000_000).max(1) as u64;
        let mut sum = 0;
        for (i, &n) in self.bins.iter().enumerate() {
            sum += u64::from(n);
            if sum >= wanted {
                return last_of(i).min(self.max_ns);
            }
        }
        self.max_ns
    }

    /// Its summary; `None` without samples.
    pub fn latency(&self) -> Option<Latency> {
        let us = |ns: u64| ns as f64 / 1e3;
        (self.count > 0).then(|| Latency {
            count: self.count,
            p50_us: us(self.share_ns(500_000)),
            p99_us: us(self.share_ns(990_000)),
            p999_us: us(self.share_ns(999_000)),
            max_us: us(self.max_ns),
        })
    }
}

fn bin(ns: u64) -> usize {
    if ns < PARTS {
        return ns as usize;
    }
    let shift = ns.ilog2() - PARTS_LOG2;
    (u64::from(shift + 1) * PARTS + (ns >> shift) - PARTS) as usize
}

/// The longest time that falls into a bin.
fn last_of(bin: usize) -> u64 {
    let bin = bin as u64;
    if bin < PARTS {
        return bin;
    }
    let shift = bin / PARTS - 1;
    ((PARTS + bin % PARTS + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_follow_each_other_without_gaps() {
        for bin_now in 0..1800 {
            let last = last_of(bin_now);
            assert_eq!((bin(last), bin(last + 1)), (bin_now, bin_now + 1), "{last}");
        }
        assert!(bin(u64::MAX) < BINS);
    }

    #[test]
    fn shares_are_right_within_three_percent() {
        let mut h = Histogram::default();
        assert_eq!(h.latency(), None);
        (1..=100_000).for_each(|us| h.add(us * 1000));
        let l = h.latency().expect("samples");
        for (got, exact) in [(l.p50_us, 50_000.0), (l.p99_us, 99_000.0), (l.p999_us, 99_900.0)] {
            assert!(got >= exact && got <= exact * 1.04, "{got} for {exact}");
        }
        assert_eq!((l.max_us, l.count), (100_000.0, 100_000));
    }
}
