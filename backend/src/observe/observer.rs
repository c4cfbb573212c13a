//! The thread that measures: it loads the programs, tells them what is where, and ends with them.
//!
//! All it does may sleep, and nobody waits for it: a port comes up while the programs are still being loaded. Orders are
//! carried out in the order given. Not here: reading events, which the loop does (`events`).
#![forbid(unsafe_code)]

use super::Unavailable;
use super::areas::{Areas, Span};
use super::load::{EventRing, Programs, Ways};
use crate::config::FaultLatency;
use ebpf_common::faults::Area;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::gettid;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

/// What is measured, and as what.
pub struct Settings {
    /// The instance's name.
    pub instance: String,
    /// When.
    pub latency: FaultLatency,
    /// Names of the ports, by number.
    pub ports: Vec<String>,
}

enum Order {
    Worker { tid: u32, index: u32 },
    Areas { port: u32, spans: Vec<Span> },
    Note { address: u64, area: Option<Area> },
    Arm(bool),
    Stop,
}

/// What the thread reports.
pub enum Answer {
    /// Stalls are measured, and here they come from.
    Events(EventRing),
    /// How they are measured now (`ebpf_common::faults::mode`).
    Mode(u32),
    /// They are not, and why.
    Nothing(Unavailable),
}

/// Tells the thread what is where. Cheap to clone; what it is told does not wait, and is lost if nothing is measured.
#[derive(Clone, Default)]
pub struct Handle(Option<Sender<Order>>);

impl Handle {
    fn send(&self, order: Order) {
        // The thread ends early where nothing can be measured.
        let _ = self.0.as_ref().map(|thread| thread.send(order));
    }

    /// Whether it is worth finding out what to tell.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// The calling thread is this worker.
    pub fn register_worker(&self, index: u16) {
        let tid = gettid().as_raw() as u32;
        self.send(Order::Worker { tid, index: index.into() });
    }

    /// All of a port's memory is this from now on. Tell before memory goes: its addresses may be another's next.
    pub fn set_areas(&self, port: u16, spans: Vec<Span>) {
        self.send(Order::Areas { port: port.into(), spans });
    }

    /// The page at `address` is about to be fetched for this; `None`: it has come.
    pub fn note(&self, address: u64, area: Option<Area>) {
        self.send(Order::Note { address, area });
    }

    /// A migration begins in which memory may be missing: stalls are measured, whatever it costs, until what is returned
    /// goes.
    #[must_use]
    pub fn arm(&self) -> Armed {
        self.send(Order::Arm(true));
        Armed(self.clone())
    }
}

/// A migration is under way; see [`Handle::arm`].
pub struct Armed(Handle);

impl Drop for Armed {
    fn drop(&mut self) {
        self.0.send(Order::Arm(false));
    }
}

/// The thread, and what it has to say.
pub struct Observer {
    handle: Handle,
    answers: Receiver<Answer>,
    bell: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Observer {
    /// Starts the thread, unless nothing shall be measured.
    ///
    /// # Errors
    /// No thread or no eventfd to be had.
    pub fn start(settings: Settings) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let bell: Arc<OwnedFd> = Arc::new(EventFd::from_flags(flags)?.into());
        let (answer, answers) = channel();
        if settings.latency == FaultLatency::Off {
            return Ok(Self { handle: Handle::default(), answers, bell, thread: None });
        }
        let (orders, inbox) = channel();
        let reports = Reports { answer, bell: bell.clone() };
        let thread =
            Builder::new().name("observer".into()).spawn(move || run(&settings, &inbox, &reports))?;
        Ok(Self { handle: Handle(Some(orders)), answers, bell, thread: Some(thread) })
    }

    /// For those who know what is where.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// The eventfd that is written after each answer; poll it, do not read it.
    pub fn bell(&self) -> &Arc<OwnedFd> {
        &self.bell
    }

    /// Answers that have arrived.
    pub fn answers(&self) -> impl Iterator<Item = Answer> + '_ {
        self.answers.try_iter()
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.handle.send(Order::Stop);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the observer thread has panicked");
        }
    }
}

struct Reports {
    answer: Sender<Answer>,
    bell: Arc<OwnedFd>,
}

impl Reports {
    fn send(&self, answer: Answer) {
        let _ = self.answer.send(answer);
        // Full is as good as rung.
        let _ = nix::unistd::write(&*self.bell, &1_u64.to_ne_bytes());
    }
}

fn run(settings: &Settings, inbox: &Receiver<Order>, reports: &Reports) {
    let loaded = super::trim::with_much_memory(|| {
        Programs::load(&settings.instance, &settings.ports, Ways::default())
    });
    let (mut programs, events) = match loaded {
        Ok(loaded) => loaded,
        Err(error) => return reports.send(Answer::Nothing(error)),
    };
    reports.send(Answer::Events(events));
    if settings.latency == FaultLatency::On
        && let Err(error) = programs.arm()
    {
        return reports.send(Answer::Nothing(error));
    }
    reports.send(Answer::Mode(programs.mode()));
    let mut areas = Areas::default();
    // Migrations under way: several ports may have one each.
    let mut migrations = 0_usize;
    for order in inbox {
        let done = match order {
            Order::Worker { tid, index } => programs.set_thread(tid, index),
            Order::Areas { port, spans } => programs.change_areas(&areas.set(port, &spans)),
            Order::Note { address, area } => programs.note(address, area),
            Order::Arm(on) => {
                migrations = if on { migrations + 1 } else { migrations.saturating_sub(1) };
                let on = migrations > 0 || settings.latency == FaultLatency::On;
                match if on { programs.arm() } else { programs.disarm() } {
                    Ok(()) => reports.send(Answer::Mode(programs.mode())),
                    Err(error) => reports.send(Answer::Nothing(error)),
                }
                Ok(())
            }
            Order::Stop => return,
        };
        if let Err(error) = done {
            // Addresses beyond what the map holds are measured as unknown ones.
            tracing::debug!(%error, "fault latency: a map");
        }
    }
}
