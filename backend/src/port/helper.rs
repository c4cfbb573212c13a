//! The control helper thread: every call that may sleep (DESIGN rule 1).
//!
//! Mapping guest memory, and network configuration, which waits for the kernel's network lock: one thread, jobs in
//! order, answers by message. Unmapping: a second thread, no answers. Looking for pages that came by themselves in
//! postcopy: a third. None touches guest pages.
#![forbid(unsafe_code)]

use super::postcopy::Awaited;
use crate::memory::{DirtyLog, Mapping, RegionSpec};
use crate::postcopy::presence;
use crate::postcopy::uffd::Userfaultfd;
use crate::uplink::{FrameFormat, Uplink};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::any::Any;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// Something that may sleep.
pub enum Job {
    /// Map regions of guest memory; in postcopy, register them with this userfaultfd.
    Map(Vec<(RegionSpec, OwnedFd)>, Option<Arc<Userfaultfd>>),
    /// Make a userfaultfd.
    Advise,
    /// In postcopy: register regions with this userfaultfd that were mapped before.
    Register(Arc<Userfaultfd>, Vec<Arc<Mapping>>),
    /// Find some of what has come of these regions, beside plans, on a thread for that.
    Scan(Vec<Awaited>),
    /// Nothing waits for these pages any more: end the reports about them.
    Unregister(Arc<Userfaultfd>, Vec<Arc<Mapping>>),
    /// Nobody uses these any more, but populates may wait for their pages: end those without making pages.
    GiveUp(Option<Arc<Userfaultfd>>, Vec<Arc<Mapping>>),
    /// Wake whoever waits for pages of these regions; those that have come are enough. No answer. One that waits for its turn
    /// does for all that come meanwhile.
    Wake(Arc<Userfaultfd>, Vec<Arc<Mapping>>, WakeQueued),
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
    /// Carry what is marked in a replaced dirty log over into the new one.
    MergeLogs {
        /// The log before.
        old: Arc<DirtyLog>,
        /// The log now.
        new: Arc<DirtyLog>,
    },
    /// Take a queue out of the steering whose ring was given up. No answer.
    LeaveSteering(Arc<dyn Uplink>, u16),
    /// Put queues into the uplink's steering or take them out.
    Queues(Arc<dyn Uplink>, Vec<(u16, bool)>),
}

/// A port's [`Job::Wake`] waits for its turn. A front-end may cause as many as it likes, but one is in the queue at a time:
/// regions are mapped and registered by jobs, so none has come that it does not know.
#[derive(Clone, Default)]
pub struct WakeQueued(Arc<AtomicBool>);

impl WakeQueued {
    /// Whether one waits.
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// One is to wait from now on; false: one does already.
    fn set(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }

    /// It has its turn. Before the first page is looked at: whoever comes now needs another.
    fn clear(&self) {
        self.0.store(false, Ordering::Release);
    }
}

/// What became of a [`Job`].
pub enum JobDone {
    /// The regions are mapped, or why not.
    Mapped(Result<Vec<Arc<Mapping>>, String>),
    /// A userfaultfd, or why there is none.
    Advised(Result<Arc<Userfaultfd>, String>),
    /// A look for pages that came by themselves has ended: whether it got to the end (false) or not, and how long it took.
    Scanned(bool, Duration),
    /// The log is mapped, or why not.
    LogMapped(Result<Arc<DirtyLog>, String>),
    /// Something ended that the front-end need not learn of (steering, memory that went), or why it did not.
    Aside(Result<(), String>),
    /// Any other job.
    Ended(Result<(), String>),
}

/// The thread's handle, owned by control.
pub struct Helper {
    jobs: Option<Sender<(u16, Job)>>,
    releases: Option<Sender<Box<dyn Any + Send>>>,
    scans: Option<Sender<(u16, Vec<Awaited>)>>,
    results: Receiver<(u16, JobDone)>,
    bell: Arc<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
}

impl Helper {
    /// Starts the thread.
    ///
    /// # Errors
    /// No thread or no eventfd to be had.
    pub fn start() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let bell: Arc<OwnedFd> = Arc::new(EventFd::from_flags(flags)?.into());
        let (jobs, work) = channel::<(u16, Job)>();
        let (answer, results) = channel();
        let answers = Answers { results: answer, bell: bell.clone() };
        let scanner = answers.clone();
        let thread = Builder::new().name("control-helper".into()).spawn(move || {
            for (port, job) in work {
                if let Some(done) = perform(job) {
                    answers.give(port, done);
                }
            }
        })?;
        // Memory of many holes and pages takes long to look through, and other ports' jobs must not wait for that.
        let (scans, looks) = channel::<(u16, Vec<Awaited>)>();
        let scan = Builder::new().name("page-scan".into()).spawn(move || {
            for (port, regions) in looks {
                scanner.give(port, scan(regions));
            }
        })?;
        // Unmapping 64 GiB takes a while, and nobody waits for it: it must not hold up another port's jobs.
        let (releases, memory) = channel::<Box<dyn Any + Send>>();
        let release =
            Builder::new().name("memory-release".into()).spawn(move || memory.into_iter().for_each(drop))?;
        let threads = vec![thread, release, scan];
        let (jobs, releases, scans) = (Some(jobs), Some(releases), Some(scans));
        Ok(Self { jobs, releases, scans, results, bell, threads })
    }

    /// The eventfd that is written after each answer; poll it, do not read it.
    pub fn bell(&self) -> &Arc<OwnedFd> {
        &self.bell
    }

    /// Gives the thread a job of a port.
    pub fn submit(&self, port: u16, job: Job) {
        let sent = match job {
            Job::Wake(_, _, queued) if !queued.set() => return,
            Job::Release(memory) => self.releases.as_ref().is_some_and(|thread| thread.send(memory).is_ok()),
            Job::Scan(regions) => {
                self.scans.as_ref().is_some_and(|thread| thread.send((port, regions)).is_ok())
            }
            job => self.jobs.as_ref().is_some_and(|thread| thread.send((port, job)).is_ok()),
        };
        if !sent {
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
        self.releases = None;
        self.scans = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a control helper thread has panicked");
            }
        }
    }
}

/// Where answers go.
#[derive(Clone)]
struct Answers {
    results: Sender<(u16, JobDone)>,
    bell: Arc<OwnedFd>,
}

impl Answers {
    fn give(&self, port: u16, done: JobDone) {
        // Nobody hears them any more: the process ends.
        if self.results.send((port, done)).is_ok() {
            // The counter only wakes the loop, which never reads it; full is as good as rung.
            let _ = nix::unistd::write(&*self.bell, &1_u64.to_ne_bytes());
        }
    }
}

fn scan(regions: Vec<Awaited>) -> JobDone {
    let start = Instant::now();
    let more = regions.iter().fold(false, |more, region| more | scan_some(region));
    JobDone::Scanned(more, start.elapsed())
}

/// Looks on where the last look at this region ended. True if it did not get to the end of the region.
fn scan_some(region: &Awaited) -> bool {
    let from = region.scanned.load(Ordering::Relaxed);
    let next = presence::scan(&region.mapping, &region.present, from);
    region.scanned.store(next.unwrap_or(u64::MAX), Ordering::Relaxed);
    next.is_some()
}

fn perform(job: Job) -> Option<JobDone> {
    Some(match job {
        Job::Map(regions, uffd) => JobDone::Mapped(
            regions
                .into_iter()
                .map(|(spec, fd)| {
                    let at = |error: &dyn std::fmt::Display| {
                        format!("memory region at {:#x}: {error}", spec.guest_phys)
                    };
                    let mapping = Mapping::new(fd, &spec).map_err(|error| at(&error))?;
                    if let Some(uffd) = &uffd {
                        uffd.register(&mapping).map_err(|error| at(&error))?;
                    }
                    Ok(Arc::new(mapping))
                })
                .collect(),
        ),
        Job::Advise => {
            JobDone::Advised(Userfaultfd::new().map(Arc::new).map_err(|error| format!("postcopy: {error}")))
        }
        Job::Register(uffd, mappings) => JobDone::Ended(
            mappings
                .iter()
                .try_for_each(|mapping| uffd.register(mapping))
                .map_err(|error| format!("postcopy: {error}")),
        ),
        // Normally on its own thread.
        Job::Scan(regions) => scan(regions),
        Job::Unregister(uffd, mappings) => JobDone::Ended(
            mappings
                .iter()
                .try_for_each(|mapping| uffd.unregister(mapping))
                .map_err(|error| format!("postcopy: {error}")),
        ),
        // One that cannot be given up stays as it is, and with it what waits for its pages; the others go.
        Job::GiveUp(uffd, mappings) => {
            let mut done = Ok(());
            for error in mappings.iter().filter_map(|mapping| uffd.as_ref()?.give_up(mapping).err()) {
                done = Err(format!("postcopy: memory cannot be given up: {error}"));
            }
            JobDone::Aside(done)
        }
        Job::Wake(uffd, mappings, queued) => {
            queued.clear();
            for mapping in mappings {
                if let Err(error) = uffd.wake(&mapping) {
                    tracing::debug!(%error, "waking");
                }
            }
            return None;
        }
        Job::MapLog { fd, size, offset } => JobDone::LogMapped(
            DirtyLog::new(fd, size, offset).map(Arc::new).map_err(|error| format!("dirty log: {error}")),
        ),
        // Normally on its own thread.
        Job::Release(memory) => {
            drop(memory);
            return None;
        }
        Job::MergeLogs { old, new } => {
            new.absorb(&old);
            JobDone::Ended(Ok(()))
        }
        Job::LeaveSteering(uplink, queue) => {
            if let Err(error) = uplink.set_queue_active(queue, false) {
                tracing::debug!(%error, "{}: queue {queue}", uplink.describe());
            }
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
        Job::Queues(uplink, queues) => JobDone::Aside(queues.into_iter().try_for_each(|(queue, active)| {
            uplink
                .set_queue_active(queue, active)
                .map_err(|error| format!("{}: queue {queue}: {error}", uplink.describe()))
        })),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uplink::Capabilities;
    use crate::uplink::testing::skip;
    use std::sync::Mutex;

    /// Holds the thread up while it is configured.
    struct Slow(Mutex<Receiver<()>>);

    impl Uplink for Slow {
        fn describe(&self) -> &str {
            "slow"
        }
        fn capabilities(&self) -> Capabilities {
            unimplemented!("not asked for")
        }
        fn configure(&self, _: FrameFormat) -> io::Result<()> {
            unimplemented!("not asked for")
        }
        fn set_mtu(&self, _: u16) -> io::Result<()> {
            self.0.lock().unwrap().recv().map_err(io::Error::other)
        }
        fn set_queue_active(&self, _: u16, _: bool) -> io::Result<()> {
            unimplemented!("not asked for")
        }
        fn announce(&self, _: &[u8]) -> io::Result<()> {
            unimplemented!("not asked for")
        }
    }

    #[test]
    fn one_wake_of_a_port_waits_at_a_time() {
        let uffd = match Userfaultfd::new() {
            Ok(uffd) => Arc::new(uffd),
            Err(error) => return skip("one_wake_of_a_port_waits_at_a_time", &error.to_string()),
        };
        let helper = Helper::start().unwrap();
        let (go_on, slow) = channel();
        let slow = Arc::new(Slow(Mutex::new(slow)));
        let [first, second] = [WakeQueued::default(), WakeQueued::default()];
        let wake = |port, queued: &WakeQueued| {
            helper.submit(port, Job::Wake(uffd.clone(), Vec::new(), queued.clone()));
        };
        for _ in 0..3 {
            helper.submit(0, Job::SetMtu(slow.clone(), 1500));
            for _ in 0..1000 {
                wake(0, &first);
            }
            assert_eq!((Arc::strong_count(&uffd), first.get(), second.get()), (2, true, false));
            // Another port's is one of its own.
            wake(1, &second);
            wake(1, &second);
            assert_eq!((Arc::strong_count(&uffd), second.get()), (3, true));
            go_on.send(()).unwrap();
            let began = Instant::now();
            while Arc::strong_count(&uffd) > 1 {
                assert!(began.elapsed() < Duration::from_secs(20), "they wait for ever");
                std::thread::yield_now();
            }
            assert!(!first.get() && !second.get(), "the next one would not be taken");
        }
    }
}
