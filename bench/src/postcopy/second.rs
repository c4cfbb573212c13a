//! What a second port of the back-end does while the first one is measured.
#![forbid(unsafe_code)]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::Serialize;

use super::arrival::Arrival;
use super::findings::Findings;
use super::run::Case;
use super::schedule::Link;
use super::steady::{Mark, Neighbour, Steady};

/// How long a back-end may take to have asked for what the rings of the stalled port need, and how long the measurement
/// waits at least.
const SETTLE_MAX: Duration = Duration::from_secs(2);
const SETTLE: Duration = Duration::from_millis(200);

/// What a second port does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "what")]
pub enum SecondPort {
    /// It has all its memory and sends at this rate, packets per second.
    Steady {
        /// See above.
        pps: u64,
    },
    /// It is in postcopy too, and no page of it ever comes.
    Stalled,
}

/// The second port at work.
pub enum Second {
    /// There is none.
    None,
    /// See [`SecondPort::Steady`].
    Steady(Neighbour),
    /// See [`SecondPort::Stalled`].
    Stalled(Box<Arrival>),
}

impl Second {
    /// Starts it before the first port's machine arrives.
    pub fn start(socket: Option<&Path>, case: &Case, findings: &Findings) -> Result<Self> {
        let (Some(what), Some(socket)) = (case.second, socket) else { return Ok(Self::None) };
        Ok(match what {
            SecondPort::Steady { pps } => {
                Self::Steady(Neighbour::start(socket, pps, case.frame, case.steady, findings)?)
            }
            SecondPort::Stalled => {
                let link = Link { latency_ns: None, ..case.link };
                let it = Arrival::at(socket, case, link, findings)?;
                it.session.start_rings(&it.guest, &it.events)?;
                it.session.driver_ok()?;
                let start = Instant::now();
                let asked = || it.deliverer.outstanding() > 0 && start.elapsed() > SETTLE;
                while !asked() {
                    ensure!(start.elapsed() < SETTLE_MAX, "the port that is to stall asks for no page");
                    crate::interrupt::sleep(Duration::from_millis(5))?;
                }
                Self::Stalled(Box::new(it))
            }
        })
    }

    /// The first port stalls from now on.
    pub fn stalls(&self) {
        self.mark(Mark::Beside);
    }

    /// What comes now does not count any more.
    pub fn enough(&self) {
        self.mark(Mark::Off);
    }

    fn mark(&self, mark: Mark) {
        if let Self::Steady(neighbour) = self {
            neighbour.mark(mark);
        }
    }

    /// Pages that the stalled port waits for.
    pub fn outstanding(&self) -> Option<u64> {
        if let Self::Stalled(arrival) = self { Some(arrival.deliverer.outstanding()) } else { None }
    }

    /// Ends it. A stalled one ends as if its front-end had been killed, and must not have got any page.
    pub fn stop(self, findings: &Findings) -> Result<Option<Steady>> {
        match self {
            Self::None => Ok(None),
            Self::Steady(neighbour) => neighbour.stop().map(Some),
            Self::Stalled(arrival) => {
                let Arrival { guest, session, deliverer, .. } = *arrival;
                drop(session);
                let delivered = deliverer.stop()?;
                super::run::check_after_close(&guest, &delivered, findings)?;
                Ok(None)
            }
        }
    }
}
