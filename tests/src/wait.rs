//! Waiting for something that another process does. Tests poll and never judge by time.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long anything may take before a test gives up. Generous: guests are emulated, beside other work.
pub const PATIENCE: Duration = Duration::from_secs(60);

const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Polls until `probe` has a value; fails with `what` after `patience`, or with the probe's error.
pub fn until<T>(what: &str, patience: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(value) = probe()? {
            return Ok(value);
        }
        if started.elapsed() > patience {
            bail!("waited {} s for {what}", patience.as_secs());
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}
