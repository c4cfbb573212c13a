//! The engine: takes messages up, hands effects out, and makes of their outcomes state and answers.
//!
//! Which message means what is in `handlers`; here is only the order of things.
#![forbid(unsafe_code)]

use zerocopy::IntoBytes;

use super::Session;
use super::effect::{Effect, Outcome, Step};
use super::error::{Matter, Notice, Refusal, SessionError};
use super::framing::Frame;
use super::handlers::{Answer, Call, Fault, Todo, postcopy as postcopy_handlers};
use super::message::{FLAG_NEED_REPLY, LogArea, VringState, encode_reply, encode_u64, protocol_feature};
use super::postcopy;
use super::state::{LogState, RingAddresses};
use super::table::{Needs, Replies};
use crate::memory::RegionSpec;

/// The message being handled, between its handler and its answer.
pub(super) struct Work {
    request: u32,
    name: &'static str,
    need_reply: bool,
    answer: Answer,
    /// Whether something it asked for was refused by the owner.
    refused: bool,
}

/// What the outstanding effect changes in the session once it is done.
pub(super) enum Pending {
    MemTable(Vec<RegionSpec>),
    AddRegion(RegionSpec),
    Postcopy(postcopy::Step),
    RemRegion(RegionSpec),
    LogBase,
    Features(u64),
    Start(u16),
    Stop(u16),
    Update(u16, RingAddresses),
    Reset,
    Nothing,
}

impl<F: 'static> Session<F> {
    /// See [`Session::step`].
    pub(super) fn advance(&mut self) -> Option<Step<F>> {
        loop {
            if let Some(step) = self.out.pop_front() {
                return Some(step);
            }
            if self.pending.is_some() || self.closed {
                return None;
            }
            if let Some(todo) = self.todo.pop_front() {
                if let Some((effect, pending)) = self.materialise(todo) {
                    self.pending = Some(pending);
                    self.stats.effects += 1;
                    return Some(Step::Effect(effect));
                }
            } else if let Some(work) = self.work.take() {
                self.answer(work);
            } else {
                match self.input.pop()? {
                    Ok(frame) => self.take_up(frame),
                    Err(violation) => self.close(violation),
                }
            }
        }
    }

    /// Check a message against its row of the table, and give it to its handler.
    fn take_up(&mut self, frame: Frame<F>) {
        let Frame { header, payload, fds } = frame;
        self.stats.messages += 1;
        let need_reply = header.flags & FLAG_NEED_REPLY != 0;
        let Some(row) = Self::row(header.request) else {
            return self.refuse(header.request, "message", need_reply, Answer::Ack, Refusal::Unknown);
        };
        let wants_ack = need_reply && self.has_ack();
        let mut call = Call { request: header.request, name: row.name, payload, fds, wants_ack };
        let (least, most) = row.fds;
        let form = match row.needs {
            Needs::Part(part) => Err(Refusal::NotOffered(part)),
            Needs::Acked(bit) if !self.agreed.has_protocol(bit) => {
                Err(Refusal::NotNegotiated(bit.trailing_zeros()))
            }
            Needs::Offered(bit) if self.cfg.protocol_features & bit == 0 => {
                Err(Refusal::NotNegotiated(bit.trailing_zeros()))
            }
            _ if !row.payload.fits(call.payload.len()) => {
                Err(Refusal::PayloadSize { size: call.payload.len() })
            }
            _ if !(least..=most).contains(&call.fds.len()) => Err(Refusal::FdCount { count: call.fds.len() }),
            _ => Ok(()),
        };
        let handled = form.map_err(Fault::Refuse).and_then(|()| (row.handler)(self, &mut call));
        match handled {
            Ok(answer) => {
                let (request, name) = (call.request, call.name);
                self.work = Some(Work { request, name, need_reply, answer, refused: false });
            }
            Err(Fault::Close(why)) => self.close(why),
            Err(Fault::Refuse(why)) if row.replies == Replies::Own && !is_agreement(&why) => {
                self.stats.count_refusal(&why);
                self.close(SessionError::Unanswerable { name: call.name, why });
            }
            Err(Fault::Refuse(why)) => {
                let answer = postcopy_handlers::answer_to_refused(self, &call);
                self.refuse(call.request, call.name, need_reply, answer, why);
            }
        }
    }

    /// Refuse a message; the connection goes on.
    fn refuse(&mut self, request: u32, name: &'static str, need_reply: bool, answer: Answer, why: Refusal) {
        self.refused(request, name, why);
        self.work = Some(Work { request, name, need_reply, answer, refused: true });
    }

    /// Count and report a refusal.
    pub(super) fn refused(&mut self, request: u32, name: &'static str, why: Refusal) {
        self.stats.count_refusal(&why);
        self.out.push_back(Step::Warn(Notice { request, name, what: Matter::Refused(why) }));
    }

    /// Report something odd about a message that is obeyed.
    pub(super) fn warn(&mut self, call: &Call<F>, what: Matter) {
        self.stats.odd += 1;
        self.out.push_back(Step::Warn(Notice { request: call.request, name: call.name, what }));
    }

    fn warn_work(&mut self, what: Matter) {
        let (request, name) = self.work.as_ref().map_or((0, "message"), |work| (work.request, work.name));
        self.stats.odd += 1;
        self.out.push_back(Step::Warn(Notice { request, name, what }));
    }

    fn close(&mut self, why: SessionError) {
        self.todo.clear();
        self.work = None;
        self.closed = true;
        self.input.close(why.clone());
        self.out.push_back(Step::Close(why));
    }

    /// Queue the stop of every ring, and drop kicks that wait for the rest of their ring.
    pub(super) fn stop_all(&mut self) {
        for (ring, index) in self.rings.iter_mut().zip(0u16..) {
            ring.kick = None;
            self.todo.push_back(Todo::Stop(index));
        }
    }

    /// Queue the start of every ring that may have waited for what just came.
    fn start_all(&mut self) {
        self.todo.extend((0u16..).take(self.rings.len()).map(Todo::Start));
    }

    /// The effect of a todo and what it will change; none if there is nothing to do (any more).
    fn materialise(&mut self, todo: Todo<F>) -> Option<(Effect<F>, Pending)> {
        Some(match todo {
            Todo::MemTable(regions) => {
                let specs = regions.iter().map(|(spec, _)| *spec).collect();
                let postcopy = self.postcopy.is_on();
                (Effect::SetMemTable { regions, postcopy }, Pending::MemTable(specs))
            }
            Todo::AddRegion(region, fd) => {
                let postcopy = self.postcopy.is_on();
                (Effect::AddMemReg { region, fd, postcopy }, Pending::AddRegion(region))
            }
            Todo::Postcopy(step) => (step.effect(), Pending::Postcopy(step)),
            Todo::RemRegion(region) => (Effect::RemMemReg { region }, Pending::RemRegion(region)),
            Todo::LogBase { size, offset, fd } => (Effect::SetLogBase { size, offset, fd }, Pending::LogBase),
            Todo::Features(features) => {
                let log_all = features & super::virtio_feature::LOG_ALL != 0;
                (Effect::SetFeatures { features, log_all }, Pending::Features(features))
            }
            Todo::Start(index) => return self.start(index),
            Todo::Stop(index) => {
                if !self.rings[usize::from(index)].running {
                    return None;
                }
                (Effect::StopRing { index }, Pending::Stop(index))
            }
            Todo::Update(index, addresses) => return self.update(index, addresses),
            Todo::Enable(index) => {
                let ring = &self.rings[usize::from(index)];
                if !ring.running {
                    return None;
                }
                (Effect::EnableRing { index, enabled: ring.is_enabled(&self.agreed) }, Pending::Nothing)
            }
            Todo::Reset => (Effect::Reset, Pending::Reset),
            Todo::Simple(effect) => (effect, Pending::Nothing),
        })
    }

    /// Start a ring that has all it needs. LOG_ALL without a log counts as a need: QEMU starts a device in the
    /// middle of a migration with LOG_ALL first and SET_LOG_BASE last, and what a ring wrote between would be lost.
    fn start(&mut self, index: u16) -> Option<(Effect<F>, Pending)> {
        let ring = &mut self.rings[usize::from(index)];
        if !ring.is_complete() || self.agreed.regions.is_empty() {
            return None;
        }
        if self.agreed.log_all()
            && self.agreed.log != LogState::Present
            && self.agreed.has_protocol(protocol_feature::LOG_SHMFD)
        {
            self.warn_work(Matter::RingWaitsForLog { index });
            return None;
        }
        let config = ring.config(&self.agreed)?;
        let kick = ring.kick.take()?;
        Some((Effect::StartRing { index, config, kick }, Pending::Start(index)))
    }

    fn update(&mut self, index: u16, addresses: RingAddresses) -> Option<(Effect<F>, Pending)> {
        let ring = &mut self.rings[usize::from(index)];
        let old = ring.addresses.replace(addresses);
        if !ring.running {
            return None;
        }
        let config = ring.config(&self.agreed)?;
        // Takes effect when the owner has taken it.
        ring.addresses = old;
        Some((Effect::UpdateRing { index, config }, Pending::Update(index, addresses)))
    }

    /// See [`Session::complete`].
    pub(super) fn settle(&mut self, outcome: Outcome) {
        let Some(pending) = self.pending.take() else {
            debug_assert!(false, "an outcome without an effect");
            return;
        };
        match outcome {
            Outcome::Refused(why) => self.settle_refused(pending, why),
            Outcome::Done => self.settle_done(pending, None, Vec::new()),
            Outcome::Base(base) => self.settle_done(pending, Some(base), Vec::new()),
            Outcome::Mapped(hosts) => self.settle_done(pending, None, hosts),
        }
    }

    fn settle_done(&mut self, pending: Pending, base: Option<u32>, hosts: Vec<u64>) {
        match pending {
            Pending::MemTable(regions) => {
                self.postcopy.table_mapped(&regions, hosts);
                self.agreed.regions = regions;
                self.start_all();
            }
            Pending::AddRegion(region) => {
                self.postcopy.slot_mapped(region, hosts);
                self.agreed.regions.push(region);
                self.start_all();
            }
            Pending::RemRegion(region) => {
                self.postcopy.slot_removed(&region);
                self.agreed.regions.retain(|known| *known != region);
            }
            Pending::Postcopy(step) => self.postcopy.done(step),
            Pending::LogBase => {
                self.agreed.log = LogState::Present;
                self.start_all();
            }
            Pending::Features(features) => self.features_set(features),
            Pending::Start(index) => {
                self.rings[usize::from(index)].running = true;
                if let Some(step) = self.postcopy.ring_started() {
                    // Before the next ring, or each would end it.
                    self.todo.push_front(Todo::Postcopy(step));
                }
            }
            Pending::Stop(index) => {
                let ring = &mut self.rings[usize::from(index)];
                ring.running = false;
                ring.base = base.or(ring.base);
            }
            Pending::Update(index, addresses) => self.rings[usize::from(index)].addresses = Some(addresses),
            Pending::Reset => self.reset_done(),
            Pending::Nothing => {}
        }
    }

    fn settle_refused(&mut self, pending: Pending, why: String) {
        let running = self.rings.iter().any(|ring| ring.running);
        match pending {
            // The front-end would rely on a ring at rest that is not.
            Pending::Stop(index) => return self.close(SessionError::StopFailed { index, why }),
            Pending::LogBase if running && self.agreed.log_all() => {
                return self.close(SessionError::LogLost { why });
            }
            Pending::LogBase => self.agreed.log = LogState::Refused,
            // vhost-user: Migration. Both decide what lands in the dirty log and how packets look, so the
            // front-end has to know.
            Pending::Features(_) | Pending::Update(_, RingAddresses { log_used: Some(_), .. })
                if !self.is_acknowledged() =>
            {
                let name = self.work.as_ref().map_or("message", |work| work.name);
                return self.close(SessionError::Disagreement { name, why: Refusal::Owner(why) });
            }
            // A ring that became ready by memory or log: that message itself was obeyed.
            Pending::Start(index) if !self.starts_one_ring() => {
                return self.warn_work(Matter::RingNotStarted { index, why });
            }
            Pending::Reset => self.reset_done(),
            // Whatever is left of it, the front-end will not hear of it again.
            Pending::Postcopy(postcopy::Step::End) => self.postcopy.done(postcopy::Step::End),
            _ => {}
        }
        if let Some(work) = &mut self.work {
            work.refused = true;
            let (request, name) = (work.request, work.name);
            self.refused(request, name, Refusal::Owner(why));
        }
    }

    fn has_ack(&self) -> bool {
        self.agreed.has_protocol(protocol_feature::REPLY_ACK)
    }

    /// Whether the front-end will learn of a refusal of the message being handled.
    fn is_acknowledged(&self) -> bool {
        self.has_ack() && self.work.as_ref().is_some_and(|work| work.need_reply)
    }

    /// Whether the message being handled is about one ring, so that its start is what was asked for.
    fn starts_one_ring(&self) -> bool {
        use super::message::RequestId as Id;
        let about_one = [Id::SetVringKick, Id::SetVringAddr, Id::SetVringNum];
        self.work.as_ref().is_some_and(|work| about_one.iter().any(|id| *id as u32 == work.request))
    }

    fn features_set(&mut self, features: u64) {
        let before: Vec<bool> = self.rings.iter().map(|ring| ring.is_enabled(&self.agreed)).collect();
        // The migration is over, or has failed: the front-end frees its log, and brings another for the next one
        // (cloud-hypervisor #8918). Rings that start with LOG_ALL then must wait for it.
        if self.agreed.log_all() && features & super::virtio_feature::LOG_ALL == 0 {
            self.agreed.log = LogState::None;
        }
        self.agreed.features = features;
        for ((ring, index), before) in self.rings.iter().zip(0u16..).zip(before) {
            if ring.is_enabled(&self.agreed) != before {
                self.todo.push_back(Todo::Enable(index));
            }
        }
        self.start_all();
    }

    fn reset_done(&mut self) {
        if std::mem::take(&mut self.forget_rings) {
            for ring in &mut self.rings {
                ring.reset();
            }
        }
    }

    /// Answer a message of which everything is done: its own reply, or the acknowledgement if asked for.
    fn answer(&mut self, work: Work) {
        let Work { request, need_reply, refused, .. } = work;
        let message = match work.answer {
            Answer::Payload(payload) => encode_reply(request, &payload),
            Answer::Base(index) => {
                let num = self.rings[usize::from(index)].base(&self.agreed);
                encode_reply(request, VringState { index: index.into(), num }.as_bytes())
            }
            Answer::Log(_) if refused => encode_reply(request, LogArea { size: 0, offset: 0 }.as_bytes()),
            Answer::Log(payload) => encode_reply(request, &payload),
            // The acknowledgement's u64 would be taken for a table.
            Answer::Mapped if refused => encode_reply(request, &[]),
            Answer::Mapped => self.postcopy.latest_reply(request),
            Answer::Userfaultfd if refused => encode_reply(request, &[]),
            Answer::Userfaultfd => {
                self.stats.replies += 1;
                self.out.push_back(Step::SendUserfaultfd(encode_reply(request, &[])));
                return;
            }
            Answer::Code(code) => encode_u64(request, code | u64::from(refused)),
            // Only now, since SET_PROTOCOL_FEATURES may just have agreed on it.
            Answer::Ack if need_reply && self.has_ack() => encode_u64(request, refused.into()),
            Answer::Ack => return self.resend_tables(request),
        };
        self.stats.replies += 1;
        self.out.push_back(Step::Send(message));
        self.resend_tables(request);
    }

    /// What QEMU reads for a further queue pair without having asked (see `postcopy`).
    fn resend_tables(&mut self, request: u32) {
        if !self.cfg.postcopy_resend {
            return;
        }
        let with_status = self.agreed.has_protocol(protocol_feature::STATUS);
        let running = self.rings.iter().any(|ring| ring.running);
        for message in self.postcopy.resend(request, with_status, running) {
            self.stats.replies += 1;
            self.out.push_back(Step::Send(message));
        }
    }
}

/// Whether a refusal is about what was agreed on. The sender of a question that was never agreed on gets the
/// acknowledgement, if it wants one; one that is malformed cannot be answered.
fn is_agreement(why: &Refusal) -> bool {
    matches!(why, Refusal::NotOffered(_) | Refusal::NotNegotiated(_))
}
