//! The thread that plays QEMU's fault thread: reads both userfaultfds, lets pages come when they are due, wakes.
//!
//! What comes when is decided in `schedule`. As QEMU does, it wakes the back-end for every page, whether that
//! waited for it or not.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::findings::{Findings, Wrong};
use super::guest::Guest;
use super::schedule::{Answer, Asker, Counts, Schedule};
use super::sleeper;
use super::uffd::{Event, Uffd};

/// Longest sleep: how late a command of another thread can be seen.
const NAP: Duration = Duration::from_millis(5);

/// What other threads see and say.
#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    finish: AtomicBool,
    finished: AtomicBool,
    outstanding: AtomicU64,
}

/// How it ended.
#[derive(Debug)]
pub struct Delivered {
    /// What has happened.
    pub counts: Counts,
    /// The state of each page.
    pub schedule: Schedule,
    /// When the last page came that the back-end had waited for.
    pub last_wanted: Option<Instant>,
}

/// A piece of guest memory as the back-end has mapped it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Offset in guest memory, a multiple of the page size.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// The back-end's address of it.
    pub base: u64,
}

/// The back-end's side of the memory.
#[derive(Debug)]
pub struct Client {
    /// Its userfaultfd.
    pub uffd: Uffd,
    /// All of the memory.
    pub slots: Vec<Slot>,
    /// Size of a page, bytes.
    pub page: u64,
}

impl Client {
    /// The page that a fault is for, if there is such a page.
    pub fn page(&self, event: Event) -> Option<u64> {
        let Event::Fault(address) = event else { return None };
        self.slots.iter().find_map(|slot| {
            let inside = address.checked_sub(slot.base).filter(|offset| *offset < slot.len)?;
            Some((slot.at + inside) / self.page)
        })
    }

    /// Wakes whoever waits for a page there.
    fn wake(&self, page: u64) -> Result<()> {
        let at = page * self.page;
        let slot = self.slots.iter().find(|slot| (slot.at..slot.at + slot.len).contains(&at));
        let slot = slot.context("a page that is in no slot")?;
        self.uffd.wake(slot.base + at - slot.at, self.page).context("waking the back-end")
    }
}

/// The running thread.
#[derive(Debug)]
pub struct Deliverer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<Delivered>>>,
}

impl Deliverer {
    /// Starts it. Time 0 of the schedule is now.
    pub fn start(guest: Arc<Guest>, client: Client, schedule: Schedule, findings: Findings) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("deliver".into()).spawn(move || {
            sleeper::prefer_me(sleeper::Rank::Deliver);
            let loop_ = Loop { guest, client, schedule, findings, shared: theirs, start: Instant::now() };
            loop_.run()
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// How many pages the back-end waits for at the moment.
    pub fn outstanding(&self) -> u64 {
        self.shared.outstanding.load(Ordering::Relaxed)
    }

    /// Lets all pages come that are still missing, at once.
    pub fn finish(&self) {
        self.shared.finish.store(true, Ordering::Release);
    }

    /// Whether that has been done.
    pub fn finished(&self) -> bool {
        self.shared.finished.load(Ordering::Acquire) || self.thread.as_ref().is_none_or(|t| t.is_finished())
    }

    /// Ends the thread and closes our copy of the back-end's userfaultfd.
    pub fn stop(mut self) -> Result<Delivered> {
        self.halt().context("the delivering thread has panicked")?
    }

    fn halt(&mut self) -> Option<Result<Delivered>> {
        self.shared.stop.store(true, Ordering::Release);
        self.thread.take().and_then(|thread| thread.join().ok())
    }
}

impl Drop for Deliverer {
    fn drop(&mut self) {
        let _ = self.halt();
    }
}

struct Loop {
    guest: Arc<Guest>,
    client: Client,
    schedule: Schedule,
    findings: Findings,
    shared: Arc<Shared>,
    start: Instant,
}

impl Loop {
    fn run(mut self) -> Result<Delivered> {
        let mut last_wanted = None;
        while !self.shared.stop.load(Ordering::Acquire) {
            self.read_faults()?;
            if self.shared.finish.swap(false, Ordering::AcqRel) {
                let absent: Vec<u64> = self.schedule.absent().collect();
                for page in absent {
                    self.place(page)?;
                }
                self.shared.finished.store(true, Ordering::Release);
            }
            let now = self.now_ns();
            while let Some(page) = self.schedule.due(now) {
                let before = self.schedule.outstanding();
                // `finish` may have brought it before its time.
                if !self.schedule.is_here(page) {
                    self.place(page)?;
                }
                if self.schedule.outstanding() < before {
                    last_wanted = Some(Instant::now());
                }
            }
            self.sleep()?;
        }
        let now = self.now_ns();
        Ok(Delivered { counts: self.schedule.counts(now), schedule: self.schedule, last_wanted })
    }

    fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    fn read_faults(&mut self) -> Result<()> {
        let now = self.now_ns();
        let (schedule, findings) = (&mut self.schedule, &self.findings);
        let page_bytes = self.guest.layout.page;
        let mut late = Vec::new();
        let client = self.client.uffd.events(|event| match self.client.page(event) {
            Some(page) => {
                if schedule.fault(page, Asker::BackEnd, now) == Answer::Here {
                    late.push(page);
                }
            }
            None => findings.add(Wrong::StrangeEvent, || format!("{event:x?} is for no page of the table")),
        });
        client.context("reading the back-end's userfaultfd")?;
        late.into_iter().try_for_each(|page| self.client.wake(page))?;
        let own = self.guest.map.address();
        let mut late = Vec::new();
        self.guest.uffd().events(|event| {
            if let Event::Fault(address) = event
                && schedule.fault((address - own) / page_bytes, Asker::Guest, now) == Answer::Here
            {
                late.push(address & !(page_bytes - 1));
            }
        })?;
        for address in late {
            self.guest.uffd().wake(address, page_bytes)?;
        }
        self.publish();
        Ok(())
    }

    fn place(&mut self, page: u64) -> Result<()> {
        if !self.guest.place(page).with_context(|| format!("placing page {page}"))? {
            self.findings.add(Wrong::FilledHole, || format!("page {page} had content before it came"));
            // A driver that waits is not woken by a copy that fails.
            let page_bytes = self.guest.layout.page;
            self.guest.uffd().wake(self.guest.map.address() + page * page_bytes, page_bytes)?;
        }
        self.client.wake(page)?;
        let now = self.now_ns();
        if !self.schedule.placed(page, now) {
            self.findings.add(Wrong::DeliveredTwice, || format!("page {page}"));
        }
        self.publish();
        Ok(())
    }

    fn publish(&self) {
        self.shared.outstanding.store(self.schedule.outstanding(), Ordering::Relaxed);
    }

    fn sleep(&self) -> Result<()> {
        let now = self.now_ns();
        let nap =
            self.schedule.next_ns().map_or(NAP, |at| Duration::from_nanos(at.saturating_sub(now)).min(NAP));
        let mut fds = [
            PollFd::new(std::os::fd::AsFd::as_fd(&self.client.uffd), PollFlags::POLLIN),
            PollFd::new(std::os::fd::AsFd::as_fd(self.guest.uffd()), PollFlags::POLLIN),
        ];
        match ppoll(&mut fds, Some(TimeSpec::from_duration(nap)), None) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno).context("waiting for faults"),
        }
    }
}
