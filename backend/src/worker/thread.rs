//! The threads of the workers after the first. The first worker is the main thread, with the ports' control
//! beside its pairs (`daemon`).
#![forbid(unsafe_code)]

use super::counters::WorkerCounters;
use super::datapath::Datapath;
use super::{PairToken, ToControl, ToWorker};
use crate::config::Poll;
use crate::observe;
use crate::reactor::{Mailbox, Postbox, Reactor, SetupError};
use std::io;
use std::sync::{Arc, mpsc};
use std::thread::{Builder, JoinHandle};

/// A running worker thread.
pub struct Worker {
    /// Where its messages go.
    pub postbox: Postbox<ToWorker>,
    /// What it counts.
    pub counters: Arc<WorkerCounters>,
    thread: JoinHandle<()>,
}

impl Worker {
    /// Waits for the thread's end; tell it to [`ToWorker::Stop`] first.
    pub fn join(self) {
        if self.thread.join().is_err() {
            tracing::error!("a worker thread has panicked");
        }
    }
}

/// Why a worker could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// No thread.
    #[error("a worker thread cannot be started: {0}")]
    Thread(io::Error),
    /// No ring.
    #[error(transparent)]
    Ring(#[from] SetupError),
    /// It ended before it had a ring.
    #[error("a worker thread ended at its start")]
    Ended,
}

/// Starts a worker that reports to `control`, and tells `observer` which thread it is.
///
/// # Errors
/// See [`SpawnError`].
pub fn spawn(
    index: u16,
    poll: Poll,
    control: Postbox<ToControl>,
    observer: observe::Handle,
) -> Result<Worker, SpawnError> {
    let (tell, hear) = mpsc::channel();
    let counters = Arc::<WorkerCounters>::default();
    let datapath = Datapath::new(poll, counters.clone());
    let thread = Builder::new()
        .name(format!("worker-{index}"))
        .spawn(move || {
            // The ring belongs to the thread that makes it (SINGLE_ISSUER).
            let reactor = match Reactor::new() {
                Ok(reactor) => reactor,
                Err(error) => return drop(tell.send(Err(error))),
            };
            observer.register_worker(index);
            let mailbox = Mailbox::new(reactor.ring_fd());
            let _ = tell.send(Ok(mailbox.postbox()));
            if let Err(error) = run(reactor, datapath, &mailbox, &control) {
                tracing::error!(%error, worker = index, "worker ended");
            }
        })
        .map_err(SpawnError::Thread)?;
    let postbox = hear.recv().map_err(|_| SpawnError::Ended)??;
    Ok(Worker { postbox, counters, thread })
}

fn run(
    mut reactor: Reactor<PairToken>,
    mut datapath: Datapath,
    mailbox: &Mailbox<ToWorker>,
    control: &Postbox<ToControl>,
) -> io::Result<()> {
    let mut done = Vec::new();
    let mut busy = false;
    loop {
        let mut mail = false;
        reactor.turn(!busy, &mut done, &mut mail)?;
        if mail {
            for message in mailbox.drain() {
                match message {
                    ToWorker::Attach(attachment) => datapath.attach(attachment),
                    ToWorker::Pair(key, command) => datapath.command(&mut reactor, key, command),
                    ToWorker::Stop => return Ok(()),
                }
            }
        }
        for (token, done) in done.drain(..) {
            datapath.completion(&mut reactor, token, &done);
        }
        busy = datapath.round(&mut reactor);
        for message in datapath.outbox().drain(..) {
            control.send(&mut reactor, message);
        }
    }
}
