//! A port in postcopy: its userfaultfd, the regions whose pages are awaited, and the rings that wait for them.
//!
//! Here: how the session's postcopy effects become steps of a plan, and what is kept between them. Not here: which page is
//! asked for when (`crate::postcopy::engine`), and the completions of populates (`faulting`).
#![forbid(unsafe_code)]

use super::Port;
use super::helper::{Job, WakeQueued};
use super::plan::{Purpose, Step, release};
use crate::memory::{GuestMemory, Mapping, MissingRange, ResidencyMap};
use crate::observe::{Armed, trace};
use crate::postcopy::engine::{Engine, RegionId};
use crate::postcopy::uffd::Userfaultfd;
use crate::session::Outcome;
use crate::worker::{Command, Direction};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Pages so large, bytes, make stalls of seconds.
const HUGE_PAGE: u64 = 1 << 30;

/// A region whose pages are awaited.
#[derive(Clone)]
pub struct Awaited {
    /// Its name for the fault engine.
    pub id: RegionId,
    /// Where it is.
    pub mapping: Arc<Mapping>,
    /// What of it has come.
    pub present: Arc<ResidencyMap>,
    /// Where the last look for pages that came by themselves ended, bytes from its start.
    pub scanned: Arc<AtomicU64>,
}

/// What a ring waits for.
#[derive(Clone, Copy)]
pub(crate) struct Waiting {
    pub(crate) range: MissingRange,
    pub(crate) since: Instant,
    /// It is parked: nothing moves before that has come. Otherwise it only cannot be looked at in advance.
    pub(crate) parked: bool,
}

/// What follows from a page that cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageFailed {
    /// It never will: the port is to be reset.
    MemoryLost,
    /// END waited for it: memory is given up, and the plan goes on with that.
    EndFailed,
    /// It is asked for again when rings look again, for which a timer may be due already.
    LookAgain {
        /// It is.
        is_due: bool,
    },
}

/// See [`Postcopy::keep`].
pub(crate) type Keep = (Option<Arc<Userfaultfd>>, Option<Arc<Armed>>);

/// What a port keeps for postcopy.
#[derive(Default)]
pub(crate) struct Postcopy {
    pub(crate) uffd: Option<Arc<Userfaultfd>>,
    /// Regions of the memory in use, registered with the userfaultfd.
    pub(crate) regions: Vec<Awaited>,
    /// Rings that wait, by queue pair and whether it is the one for receiving.
    pub(crate) waiting: HashMap<(u16, bool), Waiting>,
    pub(crate) armed: bool,
    /// END has come: nothing is asked for any more.
    pub(crate) ending: bool,
    /// END waits for populates under way, until then.
    pub(crate) draining: Option<Instant>,
    /// Rings will look again in a moment, since a populate has failed.
    pub(crate) looks_again: bool,
    /// A scan for pages that came by themselves is under way or due.
    pub(crate) scanning: bool,
    /// How long the last one took, all pieces together.
    pub(crate) scan_took: Duration,
    wake_queued: WakeQueued,
    advised: Option<Instant>,
    /// LISTEN has come.
    listened: bool,
    /// Stalls are measured. Whoever may still sleep in a fault has a share, see [`Postcopy::keep`].
    observed: Option<Arc<Armed>>,
    pub(crate) pages_asked: u64,
    pub(crate) pages_failed: u64,
}

impl Port {
    /// POSTCOPY_ADVISE: a userfaultfd, once.
    pub(crate) fn postcopy_advise(&mut self) {
        if self.postcopy.uffd.is_none() {
            self.push(Step::Job(Job::Advise));
        }
    }

    /// The userfaultfd is there, or not.
    pub(crate) fn advised(&mut self, result: Result<Arc<Userfaultfd>, String>) {
        match result {
            Ok(uffd) if self.plan.purpose == Purpose::Effect => {
                self.postcopy = Postcopy {
                    uffd: Some(uffd),
                    advised: Some(Instant::now()),
                    observed: Some(Arc::new(self.observer.arm())),
                    ..Postcopy::default()
                };
                trace::phase(self.id, trace::Phase::Advised);
                self.note(&"postcopy: advised");
            }
            // Closing it takes the lock of the whole address space.
            Ok(uffd) => self.plan_front(release(uffd)),
            Err(why) => self.failed(why),
        }
    }

    /// POSTCOPY_LISTEN. Memory that is mapped already (early configuration, slots) is awaited from now on, like all that
    /// comes: what its holes will hold nobody has said yet.
    pub(crate) fn postcopy_listen(&mut self, engine: &mut Engine) {
        trace::phase(self.id, trace::Phase::Listening);
        self.postcopy.listened = true;
        self.note(&format_args!("postcopy: listening, {}", self.postcopy.age()));
        let Some(uffd) = self.postcopy.uffd.clone().filter(|_| !self.memory.mappings().is_empty()) else {
            return;
        };
        let mappings = self.memory.mappings().to_vec();
        let memory = self.memory.clone();
        self.memory = self.await_pages(&memory, engine);
        // Pairs first learn that pages are missing, and touch none; then touching them can make one wait.
        let share = self.share_memory();
        self.push(share);
        self.push(Step::Job(Job::Register(uffd, mappings)));
        self.plan.vital = true;
    }

    /// The front-end knows our addresses: pages may be asked for.
    pub(crate) fn postcopy_arm(&mut self) {
        self.push(Step::Arm);
    }

    /// Pages may be asked for from now on.
    pub(crate) fn armed(&mut self, engine: &mut Engine) {
        engine.arm(self.id, true);
        self.postcopy.armed = true;
        let regions = &self.postcopy.regions;
        let bytes: u64 = regions.iter().map(|region| region.mapping.spec().size).sum();
        self.note(&format_args!(
            "postcopy: armed, {} regions, {} MiB, {}",
            regions.len(),
            bytes >> 20,
            self.postcopy.age()
        ));
    }

    /// Reports of missing pages may have been lost: all are made again.
    pub(crate) fn postcopy_wake(&mut self) {
        if let Some(job) = self.wake_all() {
            self.push(Step::Job(job));
        }
    }

    /// None: nobody can wait, or one is due already.
    fn wake_all(&self) -> Option<Job> {
        let Postcopy { uffd, wake_queued, .. } = &self.postcopy;
        let uffd = uffd.clone().filter(|_| !wake_queued.get())?;
        Some(Job::Wake(uffd, self.awaited_mappings(), wake_queued.clone()))
    }

    /// POSTCOPY_END: nothing may be under way when the ranges are unregistered, or it would make pages of zeros. So nothing
    /// more is taken up, and what rings are known to wait for is waited for: if it does not come, the migration has failed.
    pub(crate) fn postcopy_end(&mut self, engine: &mut Engine) {
        self.postcopy.ending = true;
        if self.postcopy.looks_again {
            return self
                .lose_memory("postcopy ends while a page that a ring waits for cannot be had", engine);
        }
        if !self.postcopy.armed && engine.queued(self.id) > 0 {
            return self.lose_memory("postcopy ends before rings may ask for the pages they need", engine);
        }
        self.plan.vital = true;
        self.push(Step::Drain);
        if let Some(uffd) = self.postcopy.uffd.clone() {
            self.push(Step::Job(Job::Unregister(uffd, self.awaited_mappings())));
        }
        self.push(Step::EndPostcopy);
    }

    fn awaited_mappings(&self) -> Vec<Arc<Mapping>> {
        self.postcopy.regions.iter().map(|region| region.mapping.clone()).collect()
    }

    /// Nothing can fault any more: memory is ordinary memory.
    pub(crate) fn postcopy_ended(&mut self, engine: &mut Engine) {
        engine.arm(self.id, false);
        for region in &self.postcopy.regions {
            engine.remove(region.id);
        }
        let Postcopy { pages_asked, listened, .. } = self.postcopy;
        let age = self.postcopy.age();
        let parks = self.counts().parks;
        trace::phase(self.id, trace::Phase::Ended);
        match listened {
            true => self
                .note(&format_args!("postcopy: ended, {age}; {pages_asked} pages asked for, {parks} parks")),
            false => self.note(&format_args!("postcopy: not needed, {age}")),
        }
        let keep = self.postcopy.keep();
        let Postcopy { regions, .. } = std::mem::take(&mut self.postcopy);
        self.memory = self.memory.with_residency(&[]);
        let share = self.share_memory();
        // Closing a userfaultfd takes the lock of the whole address space.
        self.plan_front(release((regions, keep)));
        self.plan_front(share);
    }

    /// Whether no page of the port's memory is under way or waits for its turn.
    pub(crate) fn is_quiet(&self, engine: &Engine) -> bool {
        let under_way = self.postcopy.regions.iter().any(|region| !engine.is_quiet(region.id));
        !under_way && engine.queued(self.id) == 0
    }

    /// END waits: whoever waits for a page that is there already need not be woken by anybody else. Returns how.
    pub(crate) fn drain(&mut self, until: Instant) -> Option<Job> {
        self.plan.waiting = 1;
        self.postcopy.draining = Some(until);
        self.wake_all()
    }

    /// END came although pages are missing that rings wait for: their memory is given up, or they would become zeros.
    pub(crate) fn drain_failed(&mut self, engine: &mut Engine) {
        let missing = engine.in_flight(self.id) + engine.queued(self.id);
        self.lose_memory(&format!("{missing} pages that rings wait for have not arrived"), engine);
    }

    /// A page that was asked for cannot be had.
    pub(crate) fn page_failed(&mut self, error: &io::Error, engine: &mut Engine) -> PageFailed {
        self.postcopy.pages_failed += 1;
        // Whoever touched it would get SIGBUS: it lies behind the end of the file, or is broken. It will not come.
        if matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EHWPOISON)) {
            return PageFailed::MemoryLost;
        }
        if self.postcopy.draining.is_some() {
            // END waits for that page, and without it the ring would find zeros.
            self.warn(&format_args!("a page cannot be had at the end of postcopy: {error}"));
            self.drain_failed(engine);
            return PageFailed::EndFailed;
        }
        self.warn(&format_args!("a page cannot be had and is asked for again: {error}"));
        PageFailed::LookAgain { is_due: std::mem::replace(&mut self.postcopy.looks_again, true) }
    }

    /// Guest memory cannot be used any more, and its holes must stay holes: rings stop, it goes.
    pub(crate) fn lose_memory(&mut self, why: &str, engine: &mut Engine) {
        engine.arm(self.id, false);
        engine.drop_queue(self.id);
        self.plan.clear();
        self.plan.waiting = 0;
        self.plan.vital = false;
        self.plan.outcome = Some(Outcome::Refused(format!(
            "{why}: guest memory is given up, the device stands still until memory is set and rings are started again"
        )));
        let stops = (0..self.pairs())
            .flat_map(|pair| {
                [Direction::Receive, Direction::Transmit].map(|direction| (pair, Command::Stop { direction }))
            })
            .collect();
        self.push(Step::Pairs(stops));
        (0..self.pairs()).for_each(|pair| self.steer(2 * pair, false));
        self.replace_memory(GuestMemory::empty(), engine);
        self.postcopy = Postcopy::default();
    }

    /// A ring does not wait any more: it was stopped.
    pub(crate) fn unpark(&mut self, pair: u16, direction: Direction) {
        self.postcopy.waiting.remove(&(pair, direction == Direction::Receive));
    }

    /// The process ends and no ring is looked at any more: what populates wait for must not become zeros when the
    /// userfaultfd is closed.
    pub(crate) fn give_up_pages(&self) {
        // A teardown that has just begun has them in its plan.
        let leaving = self.plan.given_up().map(|(uffd, mappings)| (uffd, mappings.to_vec()));
        let own = self.postcopy.uffd.as_deref().map(|uffd| (uffd, self.awaited_mappings()));
        for (uffd, mappings) in leaving.chain(own) {
            for mapping in mappings {
                if let Err(error) = uffd.give_up(&mapping) {
                    tracing::error!(port = self.name(), %error, "memory cannot be given up");
                }
            }
        }
    }

    /// New regions are mapped and registered: their pages are awaited. Returns the memory with its residency.
    pub(crate) fn await_pages(&mut self, memory: &GuestMemory, engine: &mut Engine) -> GuestMemory {
        let maps: Vec<_> = memory
            .mappings()
            .iter()
            .map(|mapping| {
                let known = self.postcopy.regions.iter().find(|known| Arc::ptr_eq(&known.mapping, mapping));
                if let Some(known) = known {
                    return Some(known.present.clone());
                }
                let (size, page_size) = (mapping.spec().size, mapping.page_size());
                if page_size >= HUGE_PAGE {
                    self.caution(&stall_to_expect(mapping.spec().guest_phys, page_size));
                }
                let present = Arc::new(ResidencyMap::new(size, page_size));
                let id = engine.add(self.id, mapping.host_addr(), size, page_size, present.clone());
                let region = Awaited {
                    id,
                    mapping: mapping.clone(),
                    present: present.clone(),
                    scanned: Arc::default(),
                };
                self.postcopy.regions.push(region);
                Some(present)
            })
            .collect();
        memory.with_residency(&maps)
    }

    /// Memory with some of the mappings that it had: their pages are as missing as before.
    pub(crate) fn with_known_residency(&self, memory: GuestMemory) -> GuestMemory {
        let map_of = |mapping| {
            let known = self.postcopy.regions.iter().find(|known| Arc::ptr_eq(&known.mapping, mapping));
            known.map(|known| known.present.clone())
        };
        match self.postcopy.regions.is_empty() {
            true => memory,
            false => memory.with_residency(&memory.mappings().iter().map(map_of).collect::<Vec<_>>()),
        }
    }

    /// Regions that are awaited and not part of `memory` any more; nothing more is asked for in them.
    pub(crate) fn forget_regions(&mut self, memory: &GuestMemory, engine: &mut Engine) -> Vec<Awaited> {
        let in_use =
            |region: &Awaited| memory.mappings().iter().any(|mapping| Arc::ptr_eq(mapping, &region.mapping));
        let (kept, gone): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.postcopy.regions).into_iter().partition(in_use);
        self.postcopy.regions = kept;
        for region in &gone {
            engine.give_up(region.id);
            // A look that waits for its turn at the helper is over before it begins.
            region.scanned.store(u64::MAX, Ordering::Relaxed);
        }
        gone
    }

    /// The ring that has waited longest: for what, and how long.
    pub(crate) fn longest_stall(&self) -> Option<(u16, MissingRange, Duration)> {
        let parked = self.postcopy.waiting.iter().filter(|(_, waiting)| waiting.parked);
        let ((pair, _), oldest) = parked.min_by_key(|(_, waiting)| waiting.since)?;
        Some((*pair, oldest.range, oldest.since.elapsed()))
    }
}

impl Postcopy {
    /// What memory on its way out needs until nobody sleeps in its faults any more, in the order in which it goes: the
    /// userfaultfd, and the measuring of stalls, or the longest ones would not be counted.
    pub(crate) fn keep(&self) -> Keep {
        (self.uffd.clone(), self.observed.clone())
    }

    /// How long ago the migration was advised, in words.
    fn age(&self) -> String {
        let age = self.advised.map_or(0.0, |advised| advised.elapsed().as_secs_f64());
        format!("{age:.3} s after advice")
    }
}

/// What pages so large cost, in words.
fn stall_to_expect(guest_phys: u64, page_size: u64) -> String {
    let seconds = |gbits: f64| page_size as f64 * 8.0 / (gbits * 1e9);
    format!(
        "postcopy: guest memory at {guest_phys:#x} has pages of {} GiB: a ring that needs one stands still until all of it \
         has come, {:.1} s at 10 Gbit/s and {:.1} s at 1 Gbit/s. Pages of 2 MiB or less keep stalls short",
        page_size >> 30,
        seconds(10.0),
        seconds(1.0)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stall_to_expect_is_told_in_seconds() {
        let text = stall_to_expect(1 << 32, HUGE_PAGE);
        assert!(text.contains("at 0x100000000 has pages of 1 GiB"), "{text}");
        assert!(text.contains("0.9 s at 10 Gbit/s and 8.6 s at 1 Gbit/s"), "{text}");
    }
}
