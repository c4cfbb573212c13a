//! Control: all ports of the process, on the first worker's loop.
//!
//! It turns completions into session input, effects into plans, plans into jobs and commands, and answers back
//! into session outcomes. It never waits: whatever is not ready comes back as a completion or a message.
#![forbid(unsafe_code)]

use super::Port;
use super::connection::{Connection, Endpoint, client_socket};
use super::faulting::{DRAIN_PATIENCE, Retiring};
use super::helper::{Helper, Job, JobDone};
use super::nudge::Nudge;
use super::observed::Observation;
use super::plan::{Purpose, Step as PlanStep};
use super::token::{ControlToken, PortOp};
use crate::observe::Observer;
use crate::postcopy::engine::Engine;
use crate::reactor::message::{RECV_FDS, UnixAddress};
use crate::reactor::{Done, Reactor, crowd};
use crate::session::{Outcome, Step};
use crate::worker::{Command, Direction, Event, PairKey, Reply, ToControl};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The pause after a listener failed to accept (no descriptors left, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// All ports, and who does what for them.
pub struct Control {
    pub(super) ports: Vec<Port>,
    pub(super) helper: Helper,
    epochs: Vec<u32>,
    pub(super) commands: Vec<(PairKey, Command)>,
    pub(super) observation: Observation,
    ended: bool,
    pub(super) engine: Engine,
    /// There may be something to ask for.
    pub(super) populates_due: bool,
    pub(super) nudge: Nudge,
    /// Given-up regions with populates under way.
    pub(super) retiring: Vec<Retiring>,
}

impl Control {
    /// Control over these ports; `helper` does what may sleep, `observer` measures.
    pub fn new(mut ports: Vec<Port>, helper: Helper, observer: Observer) -> Self {
        let epochs = vec![0; ports.len()];
        for port in &mut ports {
            port.observer = observer.handle();
        }
        Self {
            ports,
            helper,
            epochs,
            commands: Vec::new(),
            observation: Observation::new(observer),
            ended: false,
            engine: Engine::default(),
            populates_due: false,
            nudge: Nudge::default(),
            retiring: Vec::new(),
        }
    }

    /// Starts listening, connecting and hearing.
    pub fn start<T: Copy + From<ControlToken>>(&mut self, reactor: &mut Reactor<T>) {
        reactor.poll(self.helper.bell(), libc::POLLIN, ControlToken::Helper.into());
        self.observation.start(reactor);
        for port in 0..self.ports.len() {
            self.await_front_end(reactor, port);
        }
    }

    /// Commands for pairs that have come up: the caller passes them on.
    pub fn commands(&mut self) -> &mut Vec<(PairKey, Command)> {
        &mut self.commands
    }

    /// True when nothing is left to serve: the last inherited connection has ended.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// The process ends, and no worker runs any more: pages that are missing stay so, whoever waits for them.
    pub fn give_up_pages(&self) {
        self.ports.iter().for_each(Port::give_up_pages);
    }

    /// Writes each port's counters to the log.
    pub fn log_counters(&self) {
        for port in &self.ports {
            tracing::info!(port = port.name(), "{}", port.summary());
        }
        self.observation.log();
    }

    /// Hears of stalls that have ended. True if more are left for the next turn.
    pub fn hear_stalls(&mut self) -> bool {
        self.observation.hear(&mut self.ports)
    }

    pub(super) fn token(&self, port: usize, what: PortOp) -> ControlToken {
        ControlToken::Port { port: port as u16, epoch: self.epochs[port], what }
    }

    /// Waits for the port's next connection.
    fn await_front_end<T: Copy + From<ControlToken>>(&mut self, reactor: &mut Reactor<T>, id: usize) {
        self.epochs[id] = self.epochs[id].wrapping_add(1);
        let accept = self.token(id, PortOp::Accept).into();
        let connect = self.token(id, PortOp::Connect).into();
        let retry = self.token(id, PortOp::Retry).into();
        let port = &mut self.ports[id];
        if port.brought_strangers && crowd() {
            reactor.timer(ACCEPT_PAUSE, retry);
            return;
        }
        port.brought_strangers = false;
        match &mut port.endpoint {
            Endpoint::Listen { listener, .. } => {
                reactor.accept(listener, accept);
            }
            Endpoint::Connect { path, attempt, .. } => {
                let socket = UnixAddress::new(path).and_then(|address| Ok((address, client_socket()?)));
                match socket {
                    Ok((address, socket)) => {
                        let socket = Arc::new(socket);
                        *attempt = Some(socket.clone());
                        reactor.connect(&socket, address, connect);
                    }
                    Err(error) => {
                        port.warn(&format_args!("cannot connect: {error}"));
                        let pause = port.endpoint.next_pause();
                        reactor.timer(pause, retry);
                    }
                }
            }
            Endpoint::Inherited(fd) => match fd.take() {
                Some(fd) => self.connected(reactor, id, fd),
                None => {
                    self.ended = self.ports.iter().all(|port| {
                        matches!(port.endpoint, Endpoint::Inherited(None)) && port.connection.is_none()
                    });
                }
            },
        }
    }

    /// Waits for the connection after one that has ended: a client pauses first, or a server that ends every
    /// connection would keep us busy.
    fn await_next<T: Copy + From<ControlToken>>(&mut self, reactor: &mut Reactor<T>, id: usize) {
        if !matches!(self.ports[id].endpoint, Endpoint::Connect { .. }) {
            return self.await_front_end(reactor, id);
        }
        let pause = self.ports[id].endpoint.next_pause();
        let retry = self.token(id, PortOp::Retry);
        reactor.timer(pause, retry.into());
    }

    fn connected<T: Copy + From<ControlToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        id: usize,
        socket: OwnedFd,
    ) {
        let epoch = self.epochs[id];
        let port = &mut self.ports[id];
        port.connection = Some(Connection::new(socket, epoch));
        port.session = Some(port.new_session());
        port.note(&"front-end connected");
        self.drive(reactor, id);
    }

    /// Takes the completion of an operation of control (signals aside).
    pub fn completion<T: Copy + From<ControlToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        token: ControlToken,
        done: Done,
    ) {
        match token {
            ControlToken::Signal => {}
            ControlToken::Helper => self.helper_answered(reactor, &done),
            ControlToken::Populate { region, page } => {
                if let Done::Populated(result) = &done {
                    self.populated(reactor, region, page, result);
                }
            }
            ControlToken::Nudge => self.nudged(reactor, &done),
            ControlToken::Observer | ControlToken::Stalls => {
                self.observation.completion(reactor, token, &done);
            }
            ControlToken::Port { port, epoch, what } => {
                if self.epochs.get(usize::from(port)) == Some(&epoch) {
                    self.port_completion(reactor, usize::from(port), what, done);
                }
            }
        }
    }

    fn port_completion<T: Copy + From<ControlToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        id: usize,
        what: PortOp,
        done: Done,
    ) {
        match (what, done) {
            (PortOp::Accept, Done::Accepted(Ok(socket))) => self.connected(reactor, id, socket),
            (PortOp::Accept, Done::Accepted(Err(error))) => {
                self.ports[id].warn(&format_args!("cannot accept a connection: {error}"));
                let retry = self.token(id, PortOp::Retry);
                reactor.timer(ACCEPT_PAUSE, retry.into());
            }
            (PortOp::Retry, _) => self.await_front_end(reactor, id),
            (PortOp::LookAgain, _) => self.look_again(id),
            (PortOp::Scan, _) => self.scan(id),
            (PortOp::Drain, _) => self.drain_timed_out(reactor, id),
            (PortOp::Connect, Done::Connected(result)) => self.connect_ended(reactor, id, result),
            (PortOp::Receive, Done::Received(result, mut buffer)) => {
                let Some(connection) = self.ports[id].connection.as_mut() else { return };
                connection.received();
                let n = match result {
                    Ok(0) => return self.close(reactor, id, "front-end disconnected"),
                    Ok(n) => n,
                    Err(error) => return self.close(reactor, id, &format!("control socket: {error}")),
                };
                let fds = buffer.take_fds();
                if buffer.truncated() {
                    self.ports[id].failures += 1;
                    let why = if fds.len() < RECV_FDS {
                        "file descriptors were lost: this process has no room for more (raise LimitNOFILE, ulimit -n)"
                    } else {
                        "more file descriptors in one read than any message has"
                    };
                    return self.close(reactor, id, why);
                }
                if buffer.strangers() > 0 && crowd() {
                    let port = &mut self.ports[id];
                    port.failures += 1;
                    port.brought_strangers = true;
                    return self.close(reactor, id, "too many descriptors of kinds that no message takes");
                }
                let fed = self.ports[id].session.as_mut().map(|session| session.feed(buffer.bytes(n), fds));
                if let Some(Err(error)) = fed {
                    return self.fail(reactor, id, &error);
                }
                // It speaks: if it goes, it may come back soon.
                self.ports[id].endpoint.connected();
                self.drive(reactor, id);
            }
            (PortOp::Send, Done::Sent(result, message)) => {
                let token = self.token(id, PortOp::Send).into();
                let Some(connection) = self.ports[id].connection.as_mut() else { return };
                let was_full = connection.is_full();
                match connection.sent(reactor, result, message, token) {
                    Err(error) => self.close(reactor, id, &format!("control socket: {error}")),
                    Ok(()) if was_full => self.drive(reactor, id),
                    Ok(()) => {}
                }
            }
            _ => {}
        }
    }

    fn connect_ended<T: Copy + From<ControlToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        id: usize,
        result: std::io::Result<()>,
    ) {
        let port = &mut self.ports[id];
        let Endpoint::Connect { attempt, .. } = &mut port.endpoint else { return };
        let socket = attempt.take().and_then(Arc::into_inner);
        match (result, socket) {
            (Ok(()), Some(socket)) => self.connected(reactor, id, socket),
            (result, _) => {
                if let Err(error) = result {
                    tracing::debug!(port = port.name(), %error, "front-end is not there yet");
                }
                let pause = port.endpoint.next_pause();
                let retry = self.token(id, PortOp::Retry);
                reactor.timer(pause, retry.into());
            }
        }
    }

    /// Goes on with a port as far as it goes without waiting.
    pub(super) fn drive<T: Copy + From<ControlToken>>(&mut self, reactor: &mut Reactor<T>, id: usize) {
        loop {
            if self.ports[id].plan.purpose != Purpose::Nothing {
                if !self.advance(reactor, id) {
                    break;
                }
                let plan = std::mem::take(&mut self.ports[id].plan);
                if plan.purpose == Purpose::Teardown {
                    return self.await_next(reactor, id);
                }
                let outcome = plan.outcome.unwrap_or(Outcome::Done);
                if let Some(session) = self.ports[id].session.as_mut() {
                    session.complete(outcome);
                }
            }
            let port = &mut self.ports[id];
            if port.connection.as_ref().is_some_and(Connection::is_full) {
                return; // go on when the front-end has read some replies
            }
            let Some(step) = port.session.as_mut().and_then(|session| session.step()) else { break };
            match step {
                Step::Send(bytes) => self.send(reactor, id, bytes, None),
                Step::SendUserfaultfd(bytes) => {
                    let copy = port.postcopy.uffd.as_ref().map(|uffd| uffd.as_fd().try_clone_to_owned());
                    match copy.transpose() {
                        Ok(fd) => self.send(reactor, id, bytes, fd),
                        Err(error) => {
                            return self.fail(reactor, id, &format!("postcopy: no descriptor left: {error}"));
                        }
                    }
                }
                Step::Effect(effect) => port.begin(effect, &mut self.engine),
                Step::Warn(notice) => port.warn(&notice),
                Step::Close(error) => return self.fail(reactor, id, &error),
            }
        }
        let token = self.token(id, PortOp::Receive).into();
        let port = &mut self.ports[id];
        if let (Some(connection), Some(session)) = (&mut port.connection, &port.session)
            && session.wants_input()
        {
            connection.receive(reactor, token);
        }
    }

    fn send<T: Copy + From<ControlToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        id: usize,
        bytes: Vec<u8>,
        fd: Option<OwnedFd>,
    ) {
        let token = self.token(id, PortOp::Send).into();
        if let Some(connection) = self.ports[id].connection.as_mut() {
            connection.send(reactor, bytes, fd, token);
        }
    }

    /// Takes a plan's next steps. True when it is through.
    fn advance<T: Copy + From<ControlToken>>(&mut self, reactor: &mut Reactor<T>, id: usize) -> bool {
        let drain = self.token(id, PortOp::Drain);
        let port = &mut self.ports[id];
        while port.plan.waiting == 0 {
            match port.plan.next() {
                None => {
                    if let Some(log) = port.unneeded_log() {
                        self.helper.submit(port.id, Job::Release(Box::new(log)));
                    }
                    return true;
                }
                Some(PlanStep::Job(job)) => {
                    port.plan.waiting = usize::from(!matches!(job, Job::Release(_) | Job::Wake(..)));
                    self.helper.submit(port.id, job);
                }
                Some(PlanStep::Arm) => {
                    port.armed(&mut self.engine);
                    self.arm(reactor, id);
                    return self.advance(reactor, id);
                }
                Some(PlanStep::Drain) if port.is_quiet(&self.engine) => {}
                Some(PlanStep::Drain) => {
                    if let Some(wake) = port.drain(Instant::now() + DRAIN_PATIENCE) {
                        self.helper.submit(port.id, wake);
                    }
                    reactor.timer(DRAIN_PATIENCE, drain.into());
                }
                Some(PlanStep::EndPostcopy) => port.postcopy_ended(&mut self.engine),
                Some(PlanStep::Retire(regions, keep)) => {
                    self.retiring.push(Retiring { regions, keep, port: port.id });
                    self.retire_quiet();
                    return self.advance(reactor, id);
                }
                Some(PlanStep::Pairs(commands)) => {
                    port.plan.waiting = commands.len();
                    let port_id = port.id;
                    self.commands.extend(
                        commands
                            .into_iter()
                            .map(|(pair, command)| (PairKey { port: port_id, pair }, command)),
                    );
                }
            }
        }
        false
    }

    fn helper_answered<T: Copy + From<ControlToken>>(&mut self, reactor: &mut Reactor<T>, done: &Done) {
        let answers: Vec<_> = self.helper.results().collect();
        for (port, answer) in answers {
            let id = usize::from(port);
            let port = &mut self.ports[id];
            if let JobDone::Scanned(more, took) = answer {
                self.scanned(reactor, id, more, took);
                continue;
            }
            port.plan.waiting = port.plan.waiting.saturating_sub(1);
            match answer {
                JobDone::Mapped(result) => port.mapped(result, &mut self.engine),
                JobDone::Advised(result) => port.advised(result),
                JobDone::Scanned(..) => {}
                JobDone::LogMapped(result) => port.log_mapped(result),
                JobDone::Aside(Err(why)) => port.warn(&why),
                JobDone::Ended(Err(why)) => port.job_failed(why, &mut self.engine),
                JobDone::Aside(Ok(())) | JobDone::Ended(Ok(())) => {}
            }
            self.drive(reactor, id);
        }
        if matches!(done, Done::Ready(_, false)) {
            reactor.poll(self.helper.bell(), libc::POLLIN, ControlToken::Helper.into());
        }
    }

    /// Takes a message of a pair.
    pub fn message<T: Copy + From<ControlToken>>(&mut self, reactor: &mut Reactor<T>, message: ToControl) {
        match message {
            ToControl::Reply(key, reply) => {
                let id = usize::from(key.port);
                let port = &mut self.ports[id];
                port.plan.waiting = port.plan.waiting.saturating_sub(1);
                match reply {
                    Reply::Done => {}
                    Reply::Base(base) => port.stopped(base),
                    Reply::Failed(why) => port.failed(why),
                }
                self.drive(reactor, id);
            }
            ToControl::Event(key, event) => self.event(reactor, key, event),
        }
    }

    fn event<T: Copy + From<ControlToken>>(&mut self, reactor: &mut Reactor<T>, key: PairKey, event: Event) {
        let id = usize::from(key.port);
        let port = &mut self.ports[id];
        match event {
            Event::RingBroken(direction, why) => {
                port.warn(&format_args!("queue pair {}: {direction:?} ring given up: {why}", key.pair));
                port.unpark(key.pair, direction);
                let job = if direction == Direction::Receive { port.leave_steering(key.pair) } else { None };
                if let Some(job) = job {
                    self.helper.submit(key.port, job);
                }
            }
            Event::UplinkDown(why) => {
                let uplink = port.uplink.clone();
                port.warn(&format_args!("uplink {} cannot be used: {why}", uplink.describe()));
            }
            Event::Wants { direction, parked, ranges } => {
                self.wants(reactor, key, direction, parked, &ranges);
            }
            Event::MemoryFault => self.lost_memory(reactor, id),
        }
    }

    /// A port's memory file is not what it was.
    pub(super) fn lost_memory<T: Copy + From<ControlToken>>(&mut self, reactor: &mut Reactor<T>, id: usize) {
        self.ports[id].failures += 1;
        if self.ports[id].connection.is_some() {
            let why = "guest memory vanished (its file was truncated): the port is reset";
            self.close(reactor, id, why);
        }
    }

    fn fail<T: Copy + From<ControlToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        id: usize,
        error: &dyn std::fmt::Display,
    ) {
        self.ports[id].failures += 1;
        self.close(reactor, id, &format!("connection closed: {error}"));
    }

    /// Ends the port's connection: its rings stop, its memory goes, the next connection may come.
    fn close<T: Copy + From<ControlToken>>(&mut self, reactor: &mut Reactor<T>, id: usize, why: &str) {
        // Completions of this connection mean nothing from now on.
        self.epochs[id] = self.epochs[id].wrapping_add(1);
        let port = &mut self.ports[id];
        if let Some(connection) = port.connection.take() {
            port.brought_strangers |= connection.end(reactor);
        }
        port.session = None;
        let summary = port.summary();
        port.note(&format_args!("{why}; {summary}"));
        port.begin_teardown(&mut self.engine);
        self.drive(reactor, id);
    }
}
