//! Whether a measurement had the machine to itself. Not here: what is measured.
#![forbid(unsafe_code)]

use std::time::Instant;

use anyhow::Result;

use super::{BACKEND_CPU, OTHER_CPU};
use crate::{interrupt, procstat};

/// Share of the two CPUs that others may take in a measurement that counts. What the kernel does for nobody in particular,
/// waking up an idle CPU some 10,000 times a second above all, looks the same and is up to 9 %.
pub const TOLERATED: f64 = 0.1;
/// How often a disturbed one is repeated.
const REPEATS: usize = 6;

/// CPU time of processes that take part, and of nobody, from now on.
struct Others<'a> {
    start: Instant,
    pids: &'a [u32],
    before: i64,
}

impl<'a> Others<'a> {
    fn start(pids: &'a [u32]) -> Result<Self> {
        Ok(Self { start: Instant::now(), pids, before: accounted(pids)? })
    }

    /// What is missing of the time of both CPUs, as a share.
    fn share(&self) -> Result<f64> {
        let accounted = accounted(self.pids)? - self.before;
        let all = 2.0 * self.start.elapsed().as_nanos() as f64;
        Ok((1.0 - accounted as f64 / all).max(0.0))
    }
}

fn accounted(pids: &[u32]) -> Result<i64> {
    let mut sum = procstat::idle_ns(BACKEND_CPU)? + procstat::idle_ns(OTHER_CPU)?;
    for &pid in pids {
        sum += procstat::cpu_time_ns(pid)?;
    }
    Ok(sum as i64)
}

/// Measures, and again while other processes disturb it, so often. Returns the least disturbed, with their share.
pub fn undisturbed<T>(pids: &[u32], mut measure: impl FnMut() -> Result<T>) -> Result<(T, f64)> {
    let mut best: Option<(T, f64)> = None;
    for _ in 0..REPEATS {
        interrupt::check()?;
        let others = Others::start(pids)?;
        let value = measure()?;
        let share = others.share()?;
        if best.as_ref().is_none_or(|(_, least)| share < *least) {
            best = Some((value, share));
        }
        if share <= TOLERATED {
            break;
        }
        eprintln!("    others used {:.0} % of the CPUs: again", share * 100.0);
    }
    Ok(best.expect("measured once at least"))
}
