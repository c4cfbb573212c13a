//! The fault engine's core: which missing pages are asked for, in which order, and how many at once. Pure.
//!
//! Wants come in as runs of pages; populates go out one page each, never the same page twice at a time. Each port has
//! a queue and a quota, and ports take turns, so that one whose pages never come does not keep another waiting.
//!
//! ```text
//!  want ─► requested? present? ─no─► queue of the port ─► next: turn and quota ─► in flight ─► completed ─► present
//! ```
#![forbid(unsafe_code)]

use crate::memory::ResidencyMap;
use slab::Slab;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// Populates under way in the process at most, but for the least that each port has: each occupies an io-wq thread until
/// its page has come.
pub const IN_FLIGHT_MAX: usize = 1024;
/// Populates that a port may have under way whatever the others do: ports that were there first and stand still hold what
/// they got when there were fewer.
pub const PORT_IN_FLIGHT_MIN: usize = 16;
/// Populates under way for one port at most.
pub const PORT_IN_FLIGHT_MAX: usize = 320;
/// Pages that wait in a port's queue at most; whoever needs more asks again.
pub const QUEUE_MAX: usize = 4096;
/// Pages of one run that are taken up at once.
const RUN_PAGES_MAX: u64 = 64;
/// io-wq threads beyond those of the ports' quotas, for what else the loop does.
pub const WORKERS_RESERVE: usize = 16;

/// Names a region of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RegionId(pub u32);

/// A page to be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Populate {
    /// Whose it is.
    pub port: u16,
    /// Its region.
    pub region: RegionId,
    /// Its number in the region.
    pub page: u64,
    /// Its address in this process.
    pub addr: u64,
    /// Its size, bytes.
    pub len: u64,
}

struct Region {
    port: u16,
    host: u64,
    present: Arc<ResidencyMap>,
    page_size: u64,
    /// A bit per page: asked for and not answered.
    requested: Vec<u64>,
    in_flight: usize,
    /// Not used any more: what is under way is only waited for.
    given_up: bool,
}

#[derive(Default)]
struct Port {
    queue: VecDeque<(RegionId, u64)>,
    in_flight: usize,
    /// Pages may be asked for.
    armed: bool,
}

/// See the module's header.
#[derive(Default)]
pub struct Engine {
    regions: Slab<Region>,
    ports: Vec<Port>,
    in_flight: usize,
    /// Whose turn it is.
    turn: usize,
}

/// What a completion means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completed {
    /// The page is there.
    Arrived {
        /// The port that asked for it.
        port: u16,
    },
    /// The page is not there; its region was given up.
    GivenUp,
    /// The page is not there, and may be asked for again.
    Failed {
        /// The port that asked for it.
        port: u16,
    },
}

impl Engine {
    /// Takes a region on, of which nothing is asked for yet. `host`: its address; `page_size`: of its file, bytes.
    pub fn add(
        &mut self,
        port: u16,
        host: u64,
        size: u64,
        page_size: u64,
        present: Arc<ResidencyMap>,
    ) -> RegionId {
        let words = size.div_ceil(page_size).div_ceil(64) as usize;
        let region = Region {
            port,
            host,
            present,
            page_size,
            requested: vec![0; words],
            in_flight: 0,
            given_up: false,
        };
        let at = usize::from(port);
        if self.ports.len() <= at {
            self.ports.resize_with(at + 1, Port::default);
        }
        RegionId(self.regions.insert(region) as u32)
    }

    /// Whether pages of the port may be asked for.
    pub fn arm(&mut self, port: u16, armed: bool) {
        if let Some(port) = self.ports.get_mut(usize::from(port)) {
            port.armed = armed;
        }
    }

    /// Ports that are armed.
    pub fn armed(&self) -> usize {
        self.ports.iter().filter(|port| port.armed).count()
    }

    /// Forgets what of a port waits to be asked for; it may be asked for again.
    pub fn drop_queue(&mut self, port: u16) {
        let Some(port) = self.ports.get_mut(usize::from(port)) else { return };
        for (id, page) in port.queue.drain(..) {
            if let Some(region) = self.regions.get_mut(id.0 as usize) {
                region.requested[(page / 64) as usize] &= !(1 << (page % 64));
            }
        }
    }

    /// Queues what is missing of `range` (bytes from the region's start), as far as it was not asked for before.
    /// `urgent`: before all else, and even if the queue is full; without this page a ring stands still.
    pub fn want(&mut self, id: RegionId, range: Range<u64>, urgent: bool) {
        let Some(region) = self.regions.get_mut(id.0 as usize).filter(|region| !region.given_up) else {
            return;
        };
        let queue = &mut self.ports[usize::from(region.port)].queue;
        let first = range.start / region.page_size;
        let end = range.end.div_ceil(region.page_size).min(first + RUN_PAGES_MAX);
        for n in 0..end.saturating_sub(first) {
            // To the front from the last one on, so that the first comes first.
            let page = if urgent { end - 1 - n } else { first + n };
            if !urgent && queue.len() >= QUEUE_MAX {
                return;
            }
            let Some(word) = region.requested.get_mut((page / 64) as usize) else { continue };
            let bit = 1 << (page % 64);
            let at = page * region.page_size;
            if *word & bit != 0 || region.present.first_missing(at..at + 1).is_none() {
                continue;
            }
            *word |= bit;
            if urgent {
                queue.push_front((id, page));
            } else {
                queue.push_back((id, page));
            }
        }
    }

    /// The next page to be asked for. None: there is none, or too many are under way.
    pub fn next_populate(&mut self) -> Option<Populate> {
        let quota = self.quota();
        let ports = self.ports.len();
        for _ in 0..ports {
            self.turn = (self.turn + 1) % ports;
            let full = self.in_flight >= IN_FLIGHT_MAX;
            let quota = if full { quota.min(PORT_IN_FLIGHT_MIN) } else { quota };
            let port = &mut self.ports[self.turn];
            while port.armed && port.in_flight < quota {
                let Some((id, page)) = port.queue.pop_front() else { break };
                let Some(region) = self.regions.get_mut(id.0 as usize) else { continue };
                let at = page * region.page_size;
                if region.given_up || region.present.first_missing(at..at + 1).is_none() {
                    region.requested[(page / 64) as usize] &= !(1 << (page % 64));
                    continue;
                }
                region.in_flight += 1;
                port.in_flight += 1;
                self.in_flight += 1;
                let (addr, len) = (region.host + at, region.page_size);
                return Some(Populate { port: region.port, region: id, page, addr, len });
            }
        }
        None
    }

    /// Each armed port's share of what may be under way.
    fn quota(&self) -> usize {
        (IN_FLIGHT_MAX / self.armed().max(1)).clamp(PORT_IN_FLIGHT_MIN, PORT_IN_FLIGHT_MAX)
    }

    /// Populates under way, of all ports and of regions that were given up.
    pub fn under_way(&self) -> usize {
        self.in_flight
    }

    /// io-wq threads that it takes to have all that may be under way under way at once.
    pub fn workers(&self) -> usize {
        let armed = self.armed();
        // Ports may hold more than their share still, and others their least beside that.
        let all = (armed * self.quota()).max(self.in_flight + armed * PORT_IN_FLIGHT_MIN);
        all + WORKERS_RESERVE
    }

    /// A populate has ended; `arrived`: with its page.
    pub fn completed(&mut self, id: RegionId, page: u64, arrived: bool) -> Completed {
        let Some(region) = self.regions.get_mut(id.0 as usize) else {
            debug_assert!(false, "a populate of an unknown region");
            return Completed::GivenUp;
        };
        let port = &mut self.ports[usize::from(region.port)];
        region.in_flight -= 1;
        port.in_flight -= 1;
        self.in_flight -= 1;
        region.requested[(page / 64) as usize] &= !(1 << (page % 64));
        if region.given_up {
            return Completed::GivenUp;
        }
        if !arrived {
            return Completed::Failed { port: region.port };
        }
        let at = page * region.page_size;
        region.present.set_present(at..at + region.page_size);
        Completed::Arrived { port: region.port }
    }

    /// Nothing more is asked for in this region; what is under way goes on until it has ended.
    pub fn give_up(&mut self, id: RegionId) {
        let Some(region) = self.regions.get_mut(id.0 as usize) else { return };
        region.given_up = true;
        self.ports[usize::from(region.port)].queue.retain(|(region, _)| *region != id);
    }

    /// Whether nothing is under way in the region.
    pub fn is_quiet(&self, id: RegionId) -> bool {
        self.regions.get(id.0 as usize).is_none_or(|region| region.in_flight == 0)
    }

    /// Forgets a region in which nothing is under way.
    pub fn remove(&mut self, id: RegionId) {
        if self.is_quiet(id) {
            self.give_up(id);
            self.regions.try_remove(id.0 as usize);
        }
    }

    /// Populates under way for a port.
    pub fn in_flight(&self, port: u16) -> usize {
        self.ports.get(usize::from(port)).map_or(0, |port| port.in_flight)
    }

    /// Pages of a port that wait to be asked for.
    pub fn queued(&self, port: u16) -> usize {
        self.ports.get(usize::from(port)).map_or(0, |port| port.queue.len())
    }
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
