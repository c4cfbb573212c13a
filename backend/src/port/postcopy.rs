//! A port in postcopy: its userfaultfd, the regions whose pages are awaited, and the rings that wait for them.
//!
//! Here: how the session's postcopy effects become steps of a plan, and what is kept between them. Not here: which page is
//! asked for when (`crate::postcopy::engine`), and the completions of populates (`faulting`).
#![forbid(unsafe_code)]

use super::Port;
use super::helper::Job;
use super::plan::{Purpose, Step};
use crate::memory::{GuestMemory, Mapping, MissingRange, ResidencyMap};
use crate::postcopy::engine::{Engine, RegionId};
use crate::postcopy::uffd::Userfaultfd;
use crate::session::Outcome;
use crate::worker::{Command, Direction};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

/// A region whose pages are awaited.
#[derive(Clone)]
pub struct Awaited {
    /// Its name for the fault engine.
    pub id: RegionId,
    /// Where it is.
    pub mapping: Arc<Mapping>,
    /// What of it has come.
    pub present: Arc<ResidencyMap>,
}

/// What a port keeps for postcopy.
#[derive(Default)]
pub(crate) struct Postcopy {
    pub(crate) uffd: Option<Arc<Userfaultfd>>,
    /// Regions of the memory in use, registered with the userfaultfd.
    pub(crate) regions: Vec<Awaited>,
    /// Rings that are parked: what each waits for, and since when.
    pub(crate) parked: HashMap<(u16, bool), (MissingRange, Instant)>,
    pub(crate) armed: bool,
    /// END waits for populates under way.
    pub(crate) draining: bool,
    /// A scan for pages that came by themselves is under way or due.
    pub(crate) scanning: bool,
    advised: Option<Instant>,
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
                self.postcopy =
                    Postcopy { uffd: Some(uffd), advised: Some(Instant::now()), ..Postcopy::default() };
                self.note(&"postcopy: advised");
            }
            Ok(_) => {}
            Err(why) => self.failed(why),
        }
    }

    /// POSTCOPY_LISTEN.
    pub(crate) fn postcopy_listen(&mut self) {
        self.note(&format_args!("postcopy: listening, {}", self.postcopy.age()));
    }

    /// The front-end knows our addresses: what has come already is found, then pages may be asked for.
    pub(crate) fn postcopy_arm(&mut self) {
        self.postcopy.scanning = true;
        self.push(Step::Job(Job::Scan(self.postcopy.regions.clone())));
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

    fn wake_all(&self) -> Option<Job> {
        let mappings = self.postcopy.regions.iter().map(|region| region.mapping.clone()).collect();
        Some(Job::Wake(self.postcopy.uffd.clone()?, mappings))
    }

    /// POSTCOPY_END: nothing may be under way when the ranges are unregistered.
    pub(crate) fn postcopy_end(&mut self) {
        self.push(Step::Drain);
        if let Some(uffd) = self.postcopy.uffd.clone() {
            let mappings = self.postcopy.regions.iter().map(|region| region.mapping.clone()).collect();
            self.push(Step::Job(Job::Unregister(uffd, mappings)));
        }
        self.push(Step::EndPostcopy);
    }

    /// Nothing can fault any more: memory is ordinary memory.
    pub(crate) fn postcopy_ended(&mut self, engine: &mut Engine) {
        engine.arm(self.id, false);
        for region in &self.postcopy.regions {
            engine.remove(region.id);
        }
        let Postcopy { pages_asked, .. } = self.postcopy;
        let age = self.postcopy.age();
        let parks = self.counts().parks;
        self.note(&format_args!("postcopy: ended, {age}; {pages_asked} pages asked for, {parks} parks"));
        self.postcopy = Postcopy::default();
        self.memory = self.memory.with_residency(&[]);
        let share = self.share_memory();
        self.plan_front(share);
    }

    /// END waits: whoever waits for a page that is there already need not be woken by anybody else.
    pub(crate) fn drain(&mut self) {
        self.plan.waiting = 1;
        self.postcopy.draining = true;
        if let Some(job) = self.wake_all() {
            self.plan_front(Step::Job(job));
        }
    }

    /// END came although pages are missing that rings wait for: their memory is given up, or they would become zeros.
    pub(crate) fn drain_failed(&mut self, engine: &mut Engine) {
        let missing = engine.in_flight(self.id) + engine.queued(self.id);
        self.postcopy.draining = false;
        self.plan.clear();
        self.plan.waiting = 0;
        self.plan.outcome = Some(Outcome::Refused(format!(
            "postcopy has ended although {missing} pages that rings wait for have not arrived: guest memory is given up, \
             the device stands still until the guest's memory is set again"
        )));
        let stops = (0..self.pairs())
            .flat_map(|pair| {
                [Direction::Receive, Direction::Transmit].map(|direction| (pair, Command::Stop { direction }))
            })
            .collect();
        self.push(Step::Pairs(stops));
        self.replace_memory(GuestMemory::empty(), engine);
        engine.arm(self.id, false);
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
                let present = Arc::new(ResidencyMap::new(size, page_size));
                let id = engine.add(self.id, mapping.host_addr(), size, page_size, present.clone());
                let region = Awaited { id, mapping: mapping.clone(), present: present.clone() };
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
        gone.iter().for_each(|region| engine.give_up(region.id));
        gone
    }

    /// The ring that has waited longest: for what, and how long.
    pub(crate) fn longest_stall(&self) -> Option<(u16, MissingRange, std::time::Duration)> {
        let oldest = self.postcopy.parked.iter().min_by_key(|(_, (_, since))| *since)?;
        let ((pair, _), (range, since)) = oldest;
        Some((*pair, *range, since.elapsed()))
    }
}

impl Postcopy {
    /// How long ago the migration was advised, in words.
    fn age(&self) -> String {
        let age = self.advised.map_or(0.0, |advised| advised.elapsed().as_secs_f64());
        format!("{age:.3} s after advice")
    }
}
