//! What the observer learns of a port, and the port of the observer: which memory is what, and how it stood still.
#![forbid(unsafe_code)]

use super::Port;
use super::token::ControlToken;
use crate::observe::areas::Span;
use crate::observe::events::{Events, Totals};
use crate::observe::{Answer, Observer, Unavailable};
use crate::reactor::{Done, Reactor};
use crate::virtq::QueueConfig;
use ebpf_common::faults::{Event, context, kind, mode};
use std::time::{Duration, Instant};

/// A single stall that is worth a line of the log.
const LONG_STALL: Duration = Duration::from_secs(1);

impl Port {
    /// A ring is there from now on, or no longer.
    pub(crate) fn place_ring(&mut self, index: u16, config: Option<QueueConfig>) {
        if let Some(slot) = self.rings.get_mut(usize::from(index)) {
            *slot = config;
            self.show_memory();
        }
    }

    /// Tells the observer which memory is what.
    pub(crate) fn show_memory(&self) {
        if !self.observer.is_on() {
            return;
        }
        let regions =
            self.memory.mappings().iter().map(|mapping| (mapping.host_range(), kind::PACKET_BUFFER));
        let rings = self.rings.iter().flatten().flat_map(|config| config.layout().host_ranges(&self.memory));
        let all = regions.chain(rings.map(|addresses| (addresses, kind::RING)));
        self.observer.set_areas(self.id, all.map(|(addresses, kind)| Span { addresses, kind }).collect());
    }

    /// A thread has stood still for memory of this port.
    pub(crate) fn stalled(&mut self, event: &Event) {
        self.stalls.add(event);
        let length = Duration::from_nanos(event.duration_ns);
        if length < LONG_STALL {
            return;
        }
        let Some(suppressed) = self.warnings.allow(Instant::now()) else { return };
        if suppressed > 0 {
            tracing::warn!(port = self.name(), "{suppressed} warnings left out");
        }
        tracing::warn!(port = self.name(), "{}", describe(event));
    }
}

/// A stall in words.
pub(crate) fn describe(event: &Event) -> String {
    let name =
        |names: &'static [&'static str], number: u32| names.get(number as usize).copied().unwrap_or("?");
    let kind = match name(&kind::NAMES, event.kind) {
        "unknown" => "memory",
        known => known,
    };
    let context = match event.context {
        context::OTHER => "another thread",
        _ => name(&context::NAMES, event.context),
    };
    let seconds = Duration::from_nanos(event.duration_ns).as_secs_f32();
    format!("{context} (thread {}) stood still for {seconds:.1} s: a {kind} page was missing", event.tid)
}

/// The observer as control knows it.
pub(crate) struct Observation {
    observer: Observer,
    events: Option<Events>,
    /// Stalls on memory of no port.
    unowned: Totals,
}

impl Observation {
    pub(crate) fn new(observer: Observer) -> Self {
        Self { observer, events: None, unowned: Totals::default() }
    }

    /// Listens to the observer.
    pub(crate) fn start<T: Copy + From<ControlToken>>(&self, reactor: &mut Reactor<T>) {
        reactor.poll(self.observer.bell(), libc::POLLIN, ControlToken::Observer.into());
    }

    /// Takes the completion of a poll of the observer's.
    pub(crate) fn completion<T: Copy + From<ControlToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        token: ControlToken,
        done: &Done,
    ) {
        if token == ControlToken::Observer {
            let answers: Vec<_> = self.observer.answers().collect();
            for answer in answers {
                self.answered(reactor, answer);
            }
        } else if let Some(events) = &mut self.events {
            events.wake();
        }
        if matches!(done, Done::Ready(_, false)) {
            match (token, &self.events) {
                (ControlToken::Stalls, Some(events)) => {
                    reactor.poll(events.fd(), libc::POLLIN, token.into());
                }
                (ControlToken::Stalls, None) => {}
                _ => self.start(reactor),
            }
        }
    }

    fn answered<T: Copy + From<ControlToken>>(&mut self, reactor: &mut Reactor<T>, answer: Answer) {
        match answer {
            Answer::Events(ring) => match Events::new(ring) {
                Ok(events) => {
                    reactor.poll(events.fd(), libc::POLLIN, ControlToken::Stalls.into());
                    self.events = Some(events);
                }
                Err(error) => tracing::warn!(%error, "fault latency: events cannot be read"),
            },
            Answer::Mode(mode::TRACEPOINT_IDLE) => {
                tracing::info!(
                    "fault latency: will be measured by tracepoint during migrations (--fault-latency on: always)"
                );
            }
            Answer::Mode(now) => {
                let name = mode::NAMES.get(now as usize).copied().unwrap_or("?");
                tracing::info!("fault latency: measured by {name}; see `vhost-user-net faults`");
            }
            // Not to be had, and not asked for either: no reason to worry.
            Answer::Nothing(
                why @ (Unavailable::NotAllowed(_) | Unavailable::PidNamespace | Unavailable::NoBtf),
            ) => {
                tracing::info!("fault latency: not measured: {why}");
            }
            Answer::Nothing(why) => tracing::warn!("fault latency: not measured: {why}"),
        }
    }

    /// Hears of stalls that have ended. True if more are left for the next turn.
    pub(crate) fn hear(&mut self, ports: &mut [Port]) -> bool {
        let Some(events) = &mut self.events else { return false };
        events.take(|event| match ports.get_mut(event.port as usize) {
            Some(port) => port.stalled(&event),
            None => self.unowned.add(&event),
        });
        events.has_more()
    }

    /// Writes to the log what belongs to no port.
    pub(crate) fn log(&self) {
        if self.unowned.stalls > 0 {
            tracing::info!("memory of no port: {}", self.unowned);
        }
    }
}
