//! Control's part in postcopy: wants of pairs go to the fault engine, its populates to the reactor, and what has arrived
//! back to the rings that wait.
#![forbid(unsafe_code)]

use super::control::Control;
use super::helper::Job;
use super::postcopy::{PageFailed, Waiting};
use super::token::{ControlToken, PortOp};
use crate::memory::MissingRange;
use crate::postcopy::engine::{Completed, RegionId};
use crate::reactor::Reactor;
use crate::virtq::Purpose;
use crate::worker::{Command, Direction, PairKey};
use ebpf_common::faults::{Area, kind};
use std::any::Any;
use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long END waits for populates under way. The front-end waits with it; pages that have been placed need no time.
pub(super) const DRAIN_PATIENCE: Duration = Duration::from_secs(2);
/// The pause between scans for pages that came by themselves, while a ring waits: so long at least.
const SCAN_PAUSE: Duration = Duration::from_millis(20);
/// And so many times what the last one took: the thread that looks may have no other CPU than the loop's.
const SCAN_PAUSE_TIMES: u32 = 30;
/// The pause before rings look again after a populate failed for lack of memory or the like.
const FAILED_PAUSE: Duration = Duration::from_millis(10);

/// Populates that go to the kernel in one turn of the loop. Each wakes an io-wq thread, which takes the loop's CPU at once if it
/// has no other (some 5 us with its fault): 256 of them would keep the loop from all else for 2 ms.
const POPULATES_PER_TURN: usize = 32;

/// Regions that were given up, with what must live until their populates have ended.
pub(super) struct Retiring {
    pub(super) regions: Vec<RegionId>,
    pub(super) keep: Box<dyn Any + Send>,
    pub(super) port: u16,
}

impl Control {
    /// A ring needs pages now or soon.
    pub(super) fn wants<T: Copy + From<ControlToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        key: PairKey,
        direction: Direction,
        parked: Option<MissingRange>,
        ranges: &[(MissingRange, Purpose)],
    ) {
        let port = &mut self.ports[usize::from(key.port)];
        // When END is through, or memory has gone, rings look again anyway.
        if port.postcopy.ending || port.postcopy.regions.is_empty() {
            return;
        }
        let ring = (key.pair, direction == Direction::Receive);
        let blind = ranges.iter().find(|(_, purpose)| *purpose != Purpose::Buffer).map(|(range, _)| *range);
        if let Some(range) = parked.or(blind) {
            let since = port.postcopy.waiting.get(&ring).filter(|waiting| waiting.parked);
            let since = since.map_or_else(Instant::now, |waiting| waiting.since);
            port.postcopy.waiting.insert(ring, Waiting { range, since, parked: parked.is_some() });
        }
        for (range, purpose) in ranges {
            let Some((mapping, offset)) = port.memory.locate(range.gpa) else { continue };
            let mapping = &port.memory.mappings()[mapping];
            let region =
                port.postcopy.regions.iter().find(|region| std::sync::Arc::ptr_eq(&region.mapping, mapping));
            if let Some(region) = region {
                // Rings and buffers are told by their addresses; a table may lie anywhere.
                if *purpose == Purpose::IndirectTable && port.observer.is_on() {
                    let area = Area { port: port.id.into(), kind: kind::INDIRECT_TABLE };
                    port.observer.note(mapping.host_addr() + offset, Some(area));
                }
                self.engine.want(region.id, offset..offset + range.len, Some(*range) == parked);
            }
        }
        // It may have arrived since the ring looked.
        self.arrivals(usize::from(key.port));
        self.scan_later(reactor, usize::from(key.port));
        self.populates_due = true;
    }

    /// Pages of a port may be asked for from now on.
    pub(super) fn arm<T: Copy + From<ControlToken>>(&mut self, reactor: &mut Reactor<T>, id: usize) {
        if let Err(error) = reactor.set_workers(self.engine.workers() as u32) {
            self.ports[id]
                .warn(&format_args!("io-wq threads cannot be raised in number, stalls last longer: {error}"));
        }
        // What has come already need not be asked for, and what is asked for meanwhile costs little if it has.
        self.scan_all(id);
        self.arrivals(id);
        self.populates_due = true;
    }

    /// Hands out what may be asked for, once in a turn of the loop. True if there is more, or pairs are to be told
    /// something: the next turn is due at once.
    pub fn populate<T: Copy + From<ControlToken>>(&mut self, reactor: &mut Reactor<T>) -> bool {
        if !std::mem::take(&mut self.populates_due) {
            return false;
        }
        for _ in 0..POPULATES_PER_TURN {
            let Some(populate) = self.engine.next_populate() else {
                // What waited for its turn may have come by itself, and no populate ends to say so.
                self.drained(reactor);
                return !self.commands.is_empty();
            };
            self.ports[usize::from(populate.port)].postcopy.pages_asked += 1;
            let token = ControlToken::Populate { region: populate.region.0, page: populate.page };
            reactor.populate(populate.addr, populate.len, token.into());
            self.nudge_soon(reactor);
        }
        self.populates_due = true;
        true
    }

    /// A populate has ended.
    pub(super) fn populated<T: Copy + From<ControlToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        region: u32,
        page: u64,
        result: &io::Result<()>,
    ) {
        let id = RegionId(region);
        match self.engine.completed(id, page, result.is_ok()) {
            Completed::Arrived { port } => self.arrivals(usize::from(port)),
            Completed::GivenUp => self.retire_quiet(),
            Completed::Failed { port } => {
                let Err(error) = result else { return };
                self.not_populated(reactor, usize::from(port), error);
            }
        }
        self.populates_due = true;
        self.drained(reactor);
    }

    /// A page that was asked for cannot be had.
    fn not_populated<T: Copy + From<ControlToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        id: usize,
        error: &io::Error,
    ) {
        match self.ports[id].page_failed(error, &mut self.engine) {
            PageFailed::MemoryLost => self.lost_memory(reactor, id),
            PageFailed::EndFailed => self.drive(reactor, id),
            PageFailed::LookAgain { is_due: true } => {}
            PageFailed::LookAgain { is_due: false } => {
                let token = self.token(id, PortOp::LookAgain);
                reactor.timer(FAILED_PAUSE, token.into());
            }
        }
    }

    /// Lets rings look again whose page has come.
    pub(super) fn arrivals(&mut self, id: usize) {
        let port = &mut self.ports[id];
        let memory = &port.memory;
        let mut awake = Vec::new();
        port.postcopy.waiting.retain(|(pair, _), Waiting { range, .. }| {
            let mut missing = false;
            // The first page: a ring that still lacks others parks again, and tells which.
            memory.for_each_missing(range.gpa, 1, |_| missing = true);
            if !missing {
                awake.push(*pair);
            }
            missing
        });
        awake.dedup();
        let port = port.id;
        self.commands.extend(awake.into_iter().map(|pair| (PairKey { port, pair }, Command::Arrived)));
    }

    /// Lets all parked rings look again, whatever has come.
    pub(super) fn look_again(&mut self, id: usize) {
        let port = &mut self.ports[id];
        port.postcopy.looks_again = false;
        let mut pairs: Vec<u16> = port.postcopy.waiting.drain().map(|((pair, _), _)| pair).collect();
        pairs.dedup();
        let port = port.id;
        self.commands.extend(pairs.into_iter().map(|pair| (PairKey { port, pair }, Command::Arrived)));
    }

    /// END goes on for ports of which nothing is under way any more.
    fn drained<T: Copy + From<ControlToken>>(&mut self, reactor: &mut Reactor<T>) {
        for id in 0..self.ports.len() {
            let port = &mut self.ports[id];
            if port.postcopy.draining.is_some() && port.is_quiet(&self.engine) {
                port.postcopy.draining = None;
                port.plan.waiting = 0;
                self.drive(reactor, id);
            }
        }
    }

    /// END has waited long enough.
    pub(super) fn drain_timed_out<T: Copy + From<ControlToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        id: usize,
    ) {
        // The timer of an earlier END may be that late.
        if self.ports[id].postcopy.draining.is_some_and(|until| until <= Instant::now()) {
            debug_assert!(!self.ports[id].is_quiet(&self.engine), "END waits for nothing");
            self.ports[id].drain_failed(&mut self.engine);
            self.drive(reactor, id);
        }
    }

    /// Lets go of regions in which nothing is under way any more.
    pub(super) fn retire_quiet(&mut self) {
        let engine = &mut self.engine;
        let helper = &self.helper;
        let mut still = Vec::new();
        for retiring in self.retiring.drain(..) {
            if retiring.regions.iter().all(|id| engine.is_quiet(*id)) {
                retiring.regions.iter().for_each(|id| engine.remove(*id));
                helper.submit(retiring.port, Job::Release(retiring.keep));
            } else {
                still.push(retiring);
            }
        }
        self.retiring = still;
    }

    /// Looks for pages that came by themselves in a moment, if some ring waits and no look is due.
    pub(super) fn scan_later<T: Copy + From<ControlToken>>(&mut self, reactor: &mut Reactor<T>, id: usize) {
        let token = self.token(id, PortOp::Scan);
        let postcopy = &mut self.ports[id].postcopy;
        if postcopy.armed && !postcopy.scanning && !postcopy.waiting.is_empty() {
            postcopy.scanning = true;
            let pause = SCAN_PAUSE.max(postcopy.scan_took * SCAN_PAUSE_TIMES);
            reactor.timer(pause, token.into());
        }
    }

    /// Time to look, if anybody waits.
    pub(super) fn scan(&mut self, id: usize) {
        if self.ports[id].postcopy.waiting.is_empty() {
            self.ports[id].postcopy.scanning = false;
        } else {
            self.scan_all(id);
        }
    }

    /// Looks through all regions.
    fn scan_all(&mut self, id: usize) {
        let postcopy = &mut self.ports[id].postcopy;
        postcopy.scan_took = Duration::ZERO;
        for region in &postcopy.regions {
            region.scanned.store(0, Ordering::Relaxed);
        }
        self.scan_on(id);
    }

    fn scan_on(&mut self, id: usize) {
        let port = &mut self.ports[id];
        port.postcopy.scanning = port.postcopy.armed;
        // One at a time, whatever the front-end does: the helper looks for all ports.
        if port.postcopy.scanning && !std::mem::replace(&mut port.is_scanned, true) {
            self.helper.submit(port.id, Job::Scan(port.postcopy.regions.clone()));
        }
    }

    /// A look has ended, perhaps before it was at the end of all regions.
    pub(super) fn scanned<T: Copy + From<ControlToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        id: usize,
        more: bool,
        took: Duration,
    ) {
        self.ports[id].is_scanned = false;
        let postcopy = &mut self.ports[id].postcopy;
        postcopy.scanning = false;
        postcopy.scan_took += took;
        self.arrivals(id);
        if more {
            self.scan_on(id);
        } else {
            self.scan_later(reactor, id);
        }
    }
}
