//! The control helper thread: every call that may sleep (DESIGN rule 1).
//!
//! Mapping and unmapping guest memory, and network configuration, which waits for the kernel's network lock. One
//! thread, jobs in order, answers by message. It never touches guest pages.
#![forbid(unsafe_code)]

use crate::memory::{DirtyLog, Mapping, RegionSpec};
use crate::uplink::{FrameFormat, Uplink};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::any::Any;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

/// Something that may sleep.
pub enum Job {
    /// Map regions of guest memory.
    Map(Vec<(RegionSpec, OwnedFd)>),
    /// Map a dirty log.
    MapLog {
        /// Its file.
        fd: OwnedFd,
        /// Length, bytes.
        size: u64,
        /// Offset in the file, bytes.
        offset: u64,
    },
    /// Let go of guest memory or a log that nobody uses any more, which unmaps it. No answer.
    Release(Box<dyn Any + Send>),
    /// Set the uplink's frame format.
    Configure(Arc<dyn Uplink>, FrameFormat),
    /// Set the uplink's MTU.
    SetMtu(Arc<dyn Uplink>, u16),
    /// Put queues into the uplink's steering or take them out.
    Queues(Arc<dyn Uplink>, Vec<(u16, bool)>),
}

/// What became of a [`Job`].
pub enum JobDone {
    /// The regions are mapped, or why not.
    Mapped(Result<Vec<Arc<Mapping>>, String>),
    /// The log is mapped, or why not.
    LogMapped(Result<Arc<DirtyLog>, String>),
    /// Queues were put in or out of the steering, or why not: nothing that a front-end should learn.
    Steered(Result<(), String>),
    /// Any other job.
    Ended(Result<(), String>),
}

/// The thread's handle, owned by control.
pub struct Helper {
    jobs: Option<Sender<(u16, Job)>>,
    results: Receiver<(u16, JobDone)>,
    bell: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Helper {
    /// Starts the thread.
    ///
    /// # Errors
    /// No thread or no eventfd to be had.
    pub fn start() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let bell: Arc<OwnedFd> = Arc::new(EventFd::from_flags(flags)?.into());
        let ring = bell.clone();
        let (jobs, work) = channel::<(u16, Job)>();
        let (answer, results) = channel();
        let thread = Builder::new().name("control-helper".into()).spawn(move || {
            for (port, job) in work {
                let Some(done) = perform(job) else { continue };
                if answer.send((port, done)).is_err() {
                    return;
                }
                // The counter only wakes the loop, which never reads it; full is as good as rung.
                let _ = nix::unistd::write(&*ring, &1_u64.to_ne_bytes());
            }
        })?;
        Ok(Self { jobs: Some(jobs), results, bell, thread: Some(thread) })
    }

    /// The eventfd that is written after each answer; poll it, do not read it.
    pub fn bell(&self) -> &Arc<OwnedFd> {
        &self.bell
    }

    /// Gives the thread a job of a port.
    pub fn submit(&self, port: u16, job: Job) {
        let sent = self.jobs.as_ref().map(|jobs| jobs.send((port, job)));
        if !matches!(sent, Some(Ok(()))) {
            tracing::error!("the control helper thread is gone");
        }
    }

    /// Answers that have arrived.
    pub fn results(&self) -> impl Iterator<Item = (u16, JobDone)> + '_ {
        self.results.try_iter()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the control helper thread has panicked");
        }
    }
}

fn perform(job: Job) -> Option<JobDone> {
    Some(match job {
        Job::Map(regions) => JobDone::Mapped(
            regions
                .into_iter()
                .map(|(spec, fd)| {
                    Mapping::new(fd, &spec)
                        .map(Arc::new)
                        .map_err(|error| format!("memory region at {:#x}: {error}", spec.guest_phys))
                })
                .collect(),
        ),
        Job::MapLog { fd, size, offset } => JobDone::LogMapped(
            DirtyLog::new(fd, size, offset).map(Arc::new).map_err(|error| format!("dirty log: {error}")),
        ),
        Job::Release(memory) => {
            drop(memory);
            return None;
        }
        Job::Configure(uplink, format) => JobDone::Ended(
            uplink.configure(format).map_err(|error| format!("{}: offloads: {error}", uplink.describe())),
        ),
        // Without the right to change the interface, one that can carry the MTU already will do.
        Job::SetMtu(uplink, mtu) => JobDone::Ended(match uplink.set_mtu(mtu) {
            Err(error) if uplink.capabilities().mtu < mtu => {
                Err(format!("{}: MTU {mtu}: {error}", uplink.describe()))
            }
            _ => Ok(()),
        }),
        Job::Queues(uplink, queues) => {
            JobDone::Steered(queues.into_iter().try_for_each(|(queue, active)| {
                uplink
                    .set_queue_active(queue, active)
                    .map_err(|error| format!("{}: queue {queue}: {error}", uplink.describe()))
            }))
        }
    })
}
