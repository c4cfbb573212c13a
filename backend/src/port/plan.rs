//! How one effect of the session is carried out: a short list of steps, each a job for the helper or commands for
//! pairs, one after the other. Between steps the loop does other things.
#![forbid(unsafe_code)]

use super::helper::Job;
use super::postcopy::{Awaited, Keep, Postcopy};
use super::{Port, fds};
use crate::memory::{GuestMemory, Mapping, RegionSpec};
use crate::net::features;
use crate::observe::trace;
use crate::postcopy::engine::{Engine, RegionId};
use crate::postcopy::uffd::Userfaultfd;
use crate::reactor::PeerFd;
use crate::session::{Effect, Outcome, RingConfig};
use crate::virtq::QueueConfig;
use crate::worker::{Command, Direction};
use std::any::Any;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use virtio_bindings::{virtio_config as vc, virtio_ring as vr};

/// One step of a plan.
pub(crate) enum Step {
    /// For the control helper thread; the answer is waited for (but for a release).
    Job(Job),
    /// For pairs; all replies are waited for.
    Pairs(Vec<(u16, Command)>),
    /// Postcopy: pages may be asked for.
    Arm,
    /// Postcopy: wait until no page is asked for any more.
    Drain,
    /// Postcopy: nothing can fault any more.
    EndPostcopy,
    /// Postcopy: let go of given-up regions, with what belongs to them, when their populates have ended.
    Retire(Vec<RegionId>, Box<dyn Any + Send>),
}

/// What a plan is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Nothing is under way.
    #[default]
    Nothing,
    /// An effect of the session.
    Effect,
    /// The connection has ended; its rings and memory go.
    Teardown,
}

/// What regions that have just been mapped are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum MapFor {
    #[default]
    Replace,
    Add,
}

/// The steps under way.
#[derive(Default)]
pub(crate) struct Plan {
    pub(crate) purpose: Purpose,
    steps: VecDeque<Step>,
    /// Answers outstanding for the step under way.
    pub(crate) waiting: usize,
    mapping: MapFor,
    /// The pages of these regions have not arrived.
    awaited: bool,
    /// The ring that is being started: if that fails, its pair leaves the steering again.
    starting: Option<u16>,
    /// The dirty log goes when the plan is through.
    drop_log: bool,
    /// The ring that is being stopped: it waits for nothing any more.
    pub(crate) stopping: Option<u16>,
    /// If a job fails, nobody knows what guest memory shows: it must not be used any more.
    pub(crate) vital: bool,
    /// What to go back to if SET_FEATURES fails.
    log_on_before: Option<bool>,
    pub(crate) outcome: Option<Outcome>,
}

impl Plan {
    pub(crate) fn next(&mut self) -> Option<Step> {
        self.steps.pop_front()
    }

    fn refuse(&mut self, why: String) {
        self.outcome = Some(Outcome::Refused(why));
        self.drop_steps();
    }

    /// Drops what has not begun, but for memory on its way out: only the helper may let go of it.
    fn drop_steps(&mut self) {
        self.steps
            .retain(|step| matches!(step, Step::Job(Job::Release(_) | Job::GiveUp(..)) | Step::Retire(..)));
    }

    /// Memory that is to be given up in one of the steps.
    pub(crate) fn given_up(&self) -> impl Iterator<Item = (&Userfaultfd, &[Arc<Mapping>])> {
        self.steps.iter().filter_map(|step| match step {
            Step::Job(Job::GiveUp(Some(uffd), mappings)) => Some((&**uffd, &mappings[..])),
            _ => None,
        })
    }

    /// Drops all steps that have not begun.
    pub(crate) fn clear(&mut self) {
        self.drop_steps();
    }
}

pub(super) fn release<M: Any + Send>(memory: M) -> Step {
    Step::Job(Job::Release(Box::new(memory)))
}

impl Port {
    /// Starts to carry out an effect.
    pub(crate) fn begin(&mut self, effect: Effect<PeerFd>, engine: &mut Engine) {
        self.plan = Plan { purpose: Purpose::Effect, ..Plan::default() };
        if let Err(why) = self.prepare(effect, engine) {
            self.plan.refuse(why);
        }
    }

    fn prepare(&mut self, effect: Effect<PeerFd>, engine: &mut Engine) -> Result<(), String> {
        match effect {
            Effect::SetMemTable { regions, postcopy } => {
                self.plan.mapping = MapFor::Replace;
                self.plan.awaited = postcopy;
                let regions = regions.into_iter().map(|(region, fd)| (region, fd.into_owned())).collect();
                self.push(Step::Job(Job::Map(regions, self.awaiting(postcopy)?)));
            }
            Effect::AddMemReg { region, fd, postcopy } => {
                self.plan.mapping = MapFor::Add;
                self.plan.awaited = postcopy;
                self.push(Step::Job(Job::Map(vec![(region, fd.into_owned())], self.awaiting(postcopy)?)));
            }
            Effect::RemMemReg { region } => self.remove_region(&region, engine)?,
            Effect::SetLogBase { size, offset, fd } => {
                self.push(Step::Job(Job::MapLog { fd: fd.into_owned(), size, offset }));
            }
            Effect::SetFeatures { features, log_all } => self.set_features(features, log_all),
            Effect::StartRing { index, config, kick } => self.start_ring(index, config, kick)?,
            Effect::UpdateRing { index, config } => {
                let (direction, config) = (Direction::of_ring(index), queue_config(index, &config));
                self.place_ring(index, Some(config));
                self.tell_pair(index, Command::Update { direction, config });
            }
            Effect::StopRing { index } => {
                self.plan.stopping = Some(index);
                self.place_ring(index, None);
                self.tell_pair(index, Command::Stop { direction: Direction::of_ring(index) });
                self.steer(index, false);
            }
            Effect::EnableRing { index, enabled } => {
                let command = Command::Enable { direction: Direction::of_ring(index), enabled };
                // A queue joins the steering before frames are looked for, and leaves it after.
                if enabled {
                    self.steer(index, true);
                    self.tell_pair(index, command);
                } else {
                    self.tell_pair(index, command);
                    self.steer(index, false);
                }
            }
            Effect::SetCall { index, fd } => {
                let fd = checked(fd)?;
                self.tell_pair(index, Command::Call { direction: Direction::of_ring(index), fd });
            }
            Effect::SetErr { index, fd } => {
                let fd = checked(fd)?;
                self.tell_pair(index, Command::Error { direction: Direction::of_ring(index), fd });
            }
            Effect::SetMtu(mtu) => self.push(Step::Job(Job::SetMtu(self.uplink.clone(), mtu))),
            Effect::SendRarp(mac) => {
                self.note(&format_args!("announcing {}", mac_text(mac)));
                self.uplink
                    .announce(&crate::net::rarp::frame(mac))
                    .map_err(|error| format!("{}: announcement: {error}", self.uplink.describe()))?;
            }
            Effect::PostcopyAdvise => self.postcopy_advise(),
            Effect::PostcopyListen => self.postcopy_listen(engine),
            Effect::PostcopyArm => self.postcopy_arm(),
            Effect::PostcopyWake => self.postcopy_wake(),
            Effect::PostcopyEnd => self.postcopy_end(engine),
            Effect::SetBackendChannel(fd) => self.backend_channel = Some(fd),
            // The session has stopped the rings; what pairs keep (call, err) is to stay.
            Effect::Reset => {}
        }
        Ok(())
    }

    pub(super) fn push(&mut self, step: Step) {
        self.plan.steps.push_back(step);
    }

    pub(super) fn plan_front(&mut self, step: Step) {
        self.plan.steps.push_front(step);
    }

    /// The userfaultfd that new regions are registered with, if their pages are awaited.
    fn awaiting(&self, postcopy: bool) -> Result<Option<Arc<Userfaultfd>>, String> {
        match (postcopy, &self.postcopy.uffd) {
            (false, _) => Ok(None),
            (true, Some(uffd)) => Ok(Some(uffd.clone())),
            (true, None) => Err("postcopy: there is no userfaultfd".into()),
        }
    }

    fn tell_pair(&mut self, ring: u16, command: Command) {
        self.push(Step::Pairs(vec![(ring / 2, command)]));
    }

    /// A step that gives every pair the memory to use now.
    pub(super) fn share_memory(&self) -> Step {
        let snapshot = self.snapshot();
        Step::Pairs((0..self.pairs()).map(|pair| (pair, Command::Memory(snapshot.clone()))).collect())
    }

    pub(super) fn replace_memory(&mut self, memory: GuestMemory, engine: &mut Engine) {
        let gone = self.forget_regions(&memory, engine);
        let old = std::mem::replace(&mut self.memory, memory);
        self.show_memory();
        // Pairs first move to the new memory, then the old one may go.
        let share = self.share_memory();
        self.plan.steps.push_back(share);
        self.let_go(gone, self.postcopy.keep(), old);
    }

    /// Lets go of memory that no pair uses any more when this is reached: of regions whose pages are awaited by populates,
    /// too.
    fn let_go<M: Any + Send>(&mut self, awaited: Vec<Awaited>, keep: Keep, memory: M) {
        if awaited.is_empty() {
            return self.push(release((memory, keep)));
        }
        let mappings = awaited.iter().map(|region| region.mapping.clone()).collect();
        self.push(Step::Job(Job::GiveUp(keep.0.clone(), mappings)));
        let ids = awaited.iter().map(|region| region.id).collect();
        self.push(Step::Retire(ids, Box::new((memory, awaited, keep))));
    }

    fn remove_region(&mut self, region: &RegionSpec, engine: &mut Engine) -> Result<(), String> {
        let rest: Vec<Arc<Mapping>> = self
            .memory
            .mappings()
            .iter()
            .filter(|mapping| {
                let spec = mapping.spec();
                (spec.guest_phys, spec.size, spec.user_addr)
                    != (region.guest_phys, region.size, region.user_addr)
            })
            .cloned()
            .collect();
        let memory = GuestMemory::new(rest).map_err(|error| error.to_string())?;
        let memory = self.with_known_residency(memory);
        self.replace_memory(memory, engine);
        Ok(())
    }

    fn set_features(&mut self, acked: u64, log_all: bool) {
        self.plan.log_on_before = Some(self.log_on);
        if self.log_on != log_all {
            trace::phase(self.id, if log_all { trace::Phase::Logging } else { trace::Phase::Normal });
        }
        self.log_on = log_all;
        self.configure(acked);
        let snapshot = self.snapshot();
        let commands = (0..self.pairs())
            .flat_map(|pair| [(pair, Command::Features(acked)), (pair, Command::Memory(snapshot.clone()))])
            .collect();
        self.push(Step::Pairs(commands));
        // The migration is over (or has failed): the next one brings a log of its own.
        self.plan.drop_log = !log_all && self.plan.log_on_before == Some(true);
    }

    /// The log, if the effect that has just ended leaves it without a use. No pair uses it any more.
    pub(crate) fn unneeded_log(&mut self) -> Option<Arc<crate::memory::DirtyLog>> {
        let plan = &mut self.plan;
        if !std::mem::take(&mut plan.drop_log) || plan.purpose != Purpose::Effect || plan.outcome.is_some() {
            return None;
        }
        self.check_log();
        self.log.take()
    }

    /// Tells the uplink what frames look like, where that changes.
    fn configure(&mut self, acked: u64) {
        let format = features::frame_format(acked & (features::OFFLOADS | features::HEADER_FEATURES));
        if self.format.replace(format) != Some(format) {
            self.push(Step::Job(Job::Configure(self.uplink.clone(), format)));
        }
    }

    /// A pair's receive ring was given up: frames must not be steered to it.
    pub(crate) fn leave_steering(&mut self, pair: u16) -> Option<Job> {
        let live = self.live.get_mut(usize::from(pair))?;
        std::mem::take(live).then(|| Job::LeaveSteering(self.uplink.clone(), pair))
    }

    fn start_ring(&mut self, index: u16, config: RingConfig, kick: Option<PeerFd>) -> Result<(), String> {
        let kick = checked(kick)?;
        let (direction, enabled) = (Direction::of_ring(index), config.enabled);
        self.steer(index, enabled);
        self.plan.starting = Some(index);
        let config = queue_config(index, &config);
        self.place_ring(index, Some(config));
        self.tell_pair(index, Command::Start { direction, config, kick, enabled });
        Ok(())
    }

    /// Puts a pair into the uplink's steering or takes it out, with its receive ring.
    pub(super) fn steer(&mut self, index: u16, live: bool) {
        let pair = index / 2;
        let Some(slot) = self.live.get_mut(usize::from(pair)).filter(|_| index.is_multiple_of(2)) else {
            return;
        };
        if std::mem::replace(slot, live) != live {
            self.push(Step::Job(Job::Queues(self.uplink.clone(), vec![(pair, live)])));
        }
    }

    /// Regions are mapped (or not): make them the memory.
    pub(crate) fn mapped(&mut self, result: Result<Vec<Arc<Mapping>>, String>, engine: &mut Engine) {
        if self.plan.purpose != Purpose::Effect {
            if let Ok(mappings) = result {
                self.plan.steps.push_front(release(mappings));
            }
            return;
        }
        let hosts =
            result.as_ref().map_or_else(|_| Vec::new(), |new| new.iter().map(|m| m.host_addr()).collect());
        let memory = result.and_then(|mut mappings| {
            if self.plan.mapping == MapFor::Add {
                mappings.extend(self.memory.mappings().iter().cloned());
            }
            let unused = mappings.clone();
            GuestMemory::new(mappings).map_err(|error| {
                self.plan.steps.push_front(release(unused));
                error.to_string()
            })
        });
        match memory {
            Ok(memory) => {
                let memory = match self.plan.awaited {
                    true => {
                        self.plan.outcome = Some(Outcome::Mapped(hosts));
                        // Nothing may fault before the front-end has acknowledged the new addresses.
                        engine.arm(self.id, false);
                        self.postcopy.armed = false;
                        self.await_pages(&memory, engine)
                    }
                    false => self.with_known_residency(memory),
                };
                self.replace_memory(memory, engine);
            }
            Err(why) => self.plan.outcome = Some(Outcome::Refused(why)),
        }
    }

    /// The dirty log is mapped (or not): use it.
    pub(crate) fn log_mapped(&mut self, result: Result<Arc<crate::memory::DirtyLog>, String>) {
        match result {
            Ok(log) if self.plan.purpose == Purpose::Effect => {
                self.check_log();
                if let Some(old) = self.log.replace(log.clone()) {
                    // A device that is started again in the middle of a migration gets its log last; what it wrote
                    // to the old one since belongs into the new one. Too many bits do no harm.
                    self.plan.steps.push_front(release(old.clone()));
                    self.plan.steps.push_front(Step::Job(Job::MergeLogs { old, new: log }));
                }
                let share = self.share_memory();
                self.plan.steps.push_front(share);
            }
            Ok(log) => self.plan.steps.push_front(release(log)),
            Err(why) => self.plan.outcome = Some(Outcome::Refused(why)),
        }
    }

    /// A job failed.
    pub(crate) fn job_failed(&mut self, why: String, engine: &mut Engine) {
        match self.plan.vital {
            true => self.lose_memory(&why, engine),
            false => self.failed(why),
        }
    }

    /// A job or command failed.
    pub(crate) fn failed(&mut self, why: String) {
        // Whatever the uplink was told, it may not have heard.
        self.format = None;
        if self.plan.purpose == Purpose::Effect {
            self.plan.refuse(why);
            if let Some(index) = self.plan.starting.take() {
                self.steer(index, false);
            }
            if let Some(before) = self.plan.log_on_before.take() {
                self.log_on = before;
            }
        }
    }

    /// A ring has stopped. (If memory was lost, that is the outcome, whatever stops because of it.)
    pub(crate) fn stopped(&mut self, base: u32) {
        self.plan.outcome.get_or_insert(Outcome::Base(base));
        if let Some(index) = self.plan.stopping {
            self.unpark(index / 2, Direction::of_ring(index));
        }
    }

    /// Starts to take down what a connection has built; steps under way are waited for first.
    pub(crate) fn begin_teardown(&mut self, engine: &mut Engine) {
        self.plan.purpose = Purpose::Teardown;
        // All memory goes anyway, and in the order of the steps below: a job under way that fails must not drop them.
        self.plan.vital = false;
        if self.postcopy.draining.take().is_some() {
            self.plan.waiting = 0;
        }
        engine.arm(self.id, false);
        engine.drop_queue(self.id);
        self.plan.outcome = None;
        self.plan.drop_steps();
        let resets = (0..self.pairs()).map(|pair| (pair, Command::Reset)).collect();
        // First: memory that is on its way out must not be in use when it goes.
        self.plan_front(Step::Pairs(resets));
        let queues: Vec<_> = (0..self.pairs())
            .filter(|pair| self.live[usize::from(*pair)])
            .map(|pair| (pair, false))
            .collect();
        if !queues.is_empty() {
            self.push(Step::Job(Job::Queues(self.uplink.clone(), queues)));
        }
        self.live.fill(false);
        self.uplink.front_end_left();
        self.configure(0);
        self.check_log();
        let memory = std::mem::replace(&mut self.memory, GuestMemory::empty());
        self.rings.fill(None);
        self.show_memory();
        let log = self.log.take();
        self.log_on = false;
        let awaited = self.forget_regions(&GuestMemory::empty(), engine);
        // The userfaultfd goes last: closing it is like unregistering all that is left.
        let keep = self.postcopy.keep();
        self.postcopy = Postcopy::default();
        self.let_go(awaited, keep, (memory, log));
        self.backend_channel = None;
    }
}

fn checked(fd: Option<PeerFd>) -> Result<Option<Arc<OwnedFd>>, String> {
    fd.map(|fd| fds::eventfd(fd).map(Arc::new)).transpose()
}

fn queue_config(index: u16, config: &RingConfig) -> QueueConfig {
    let transmit = Direction::of_ring(index) == Direction::Transmit;
    QueueConfig {
        packed: features::has(config.features, vc::VIRTIO_F_RING_PACKED),
        size: config.size,
        base: config.base,
        desc_user: config.desc_user,
        avail_user: config.avail_user,
        used_user: config.used_user,
        log_used: config.log_used,
        event_idx: features::has(config.features, vr::VIRTIO_RING_F_EVENT_IDX),
        indirect: features::has(config.features, vr::VIRTIO_RING_F_INDIRECT_DESC),
        in_order: features::has(config.features, vc::VIRTIO_F_IN_ORDER),
        transmit,
    }
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
