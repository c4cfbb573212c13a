//! One back-end with two ports: a bad front-end abuses the first, a good one watches from the second.
#![forbid(unsafe_code)]

use super::{Backend, Front, PATIENCE, Setup, eventually};
use anyhow::{Context, Result, ensure};
use std::path::PathBuf;
use std::time::Duration;

/// The port that is abused.
pub const BAD: &str = "badport";
/// Mappings that may come with threads (stacks, allocator arenas) and stay. A region of guest memory per abuse is more.
const SLACK_MAPPINGS: usize = 24;
/// The port that must not notice.
pub const GOOD: &str = "goodport";

/// A back-end with a good front-end at work, and what was measured before the abuse.
#[derive(Debug)]
pub struct Arena {
    /// The process.
    pub backend: Backend,
    /// A front-end on the good port, up and running.
    pub good: Front,
    fds: usize,
    mappings: usize,
}

impl Arena {
    /// Two ports with one queue pair each.
    pub fn new() -> Result<Self> {
        Self::with_queue_pairs(1)
    }

    /// Two ports.
    pub fn with_queue_pairs(pairs: u16) -> Result<Self> {
        Self::over(Backend::with_null_ports(&[BAD, GOOD], pairs)?)
    }

    /// A back-end that was started by the test, with ports [`BAD`] and [`GOOD`].
    pub fn over(backend: Backend) -> Result<Self> {
        let mut good = Front::up(&backend.socket(GOOD)).context("bring the good port up")?;
        good.prove_alive(64)?;
        // Once through everything, so that what is made on first use is there before anything is counted.
        let before = backend.fds()?;
        let mut first = Front::up(&backend.socket(BAD)).context("bring the bad port up")?;
        first.prove_alive(64)?;
        let with_front = backend.fds()?;
        drop(first);
        let settled = eventually(PATIENCE, || backend.fds().is_ok_and(|n| n < with_front));
        ensure!(settled, "no fd was closed at the end of a connection (before {before}, with {with_front})");
        // Let the rest of that connection's fds go.
        std::thread::sleep(Duration::from_millis(100));
        let (fds, mappings) = (backend.fds()?, backend.mappings()?);
        Ok(Self { backend, good, fds, mappings })
    }

    /// The socket of the port that is abused.
    pub fn bad(&self) -> PathBuf {
        self.backend.socket(BAD)
    }

    /// A front-end on the bad port, up and running.
    pub fn bad_up(&self) -> Result<Front> {
        Front::up(&self.bad())
    }

    /// A front-end on the bad port with features negotiated, but no memory and no running ring yet.
    pub fn bad_negotiated(&self) -> Result<Front> {
        let mut front = Front::connect(&self.bad(), Setup::default())?;
        front.negotiate()?;
        front.acknowledge_features()?;
        Ok(front)
    }

    /// The good port's frames still flow, on the connection that it had from the beginning.
    pub fn check_good(&mut self) -> Result<Duration> {
        self.backend.check_alive()?;
        match self.good.prove_alive(256) {
            Ok(worst) => Ok(worst),
            Err(error) => {
                self.backend.check_alive()?;
                Err(error.context(format!("the good port suffers\n{}", self.backend.log_text())))
            }
        }
    }

    /// See [`Backend::complaints`].
    pub fn complaints(&self) -> Result<u64> {
        self.backend.complaints(BAD)
    }

    /// The back-end counts more against the bad port than `before`, and the log speaks of it. Close the connection
    /// first: some things are only in the summary that is written at its end.
    pub fn check_reported(&self, before: u64) -> Result<()> {
        let counted = eventually(PATIENCE, || self.complaints().is_ok_and(|now| now > before));
        ensure!(counted, "nothing was counted against {BAD}:\n{}", self.backend.log_text());
        // Once is enough: log lines have a rate limit.
        ensure!(
            eventually(PATIENCE, || self.backend.has_reported(BAD)),
            "nothing was reported against {BAD}:\n{}",
            self.backend.log_text()
        );
        Ok(())
    }

    /// After the abuse, with no connection to the bad port left: the process lives, the good port goes on, a
    /// new front-end can use the bad port, and nothing was leaked.
    pub fn check_all(&mut self) -> Result<()> {
        self.check_good()?;
        let mut next = self
            .bad_up()
            .with_context(|| format!("a new front-end on the bad port\n{}", self.backend.log_text()))?;
        next.prove_alive(128).with_context(|| self.backend.log_text())?;
        drop(next);
        self.backend.settle_at_fds(self.fds)?;
        ensure!(
            eventually(PATIENCE, || self
                .backend
                .mappings()
                .is_ok_and(|n| n <= self.mappings + SLACK_MAPPINGS)),
            "{} memory mappings instead of {}",
            self.backend.mappings()?,
            self.mappings
        );
        self.check_good()?;
        Ok(())
    }
}
