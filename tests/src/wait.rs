//! Waiting for something that another process does. Tests poll and never judge by time.
#![forbid(unsafe_code)]

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

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

/// Connects to a socket that a program is about to serve: its file is there a moment before anybody listens.
pub(crate) fn connect(path: &Path) -> Result<UnixStream> {
    until(&format!("somebody to listen at {}", path.display()), PATIENCE, || {
        match UnixStream::connect(path) {
            Ok(stream) => Ok(Some(stream)),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(None),
            Err(error) => Err(error).with_context(|| format!("connecting to {}", path.display())),
        }
    })
}
