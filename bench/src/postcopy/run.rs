//! One measurement: a virtual machine arrives, its rings start, pages come, and it leaves again.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::arrival::Arrival;
use super::deliver::{Delivered, Deliverer};
use super::driver::{Direction, Driven, Driver, Job};
use super::findings::{Findings, Summary, Wrong};
use super::guest::{BASE, Backing, Guest};
use super::layout::{RINGS, RX, TX};
use super::rates::{self, Times, ms};
use super::ring;
use super::schedule::{Counts, Link};
use super::second::{Second, SecondPort};
use super::session::{Session, Wishes};
use super::sleeper::Preferred;
use super::steady::Steady;
use crate::interrupt;
use crate::session::Events;

/// Distance of the questions during a stall.
const PING_EVERY: Duration = Duration::from_millis(1);
/// After GET_VRING_BASE the ring is watched for this long.
const AFTER_STOP: Duration = Duration::from_millis(2);
/// A stall is over when a back-end waits for no page at any of so many looks, so far apart.
const STALL_LOOKS: u32 = 40;
const STALL_LOOK: Duration = Duration::from_micros(50);
/// When all pages are here, a ring that does not move for this long stands still.
const STANDSTILL: Duration = Duration::from_secs(3);
/// How long an answer may take where no page ever comes, before the back-end counts as stuck.
const STUCK: Duration = Duration::from_secs(3);
/// How long pages are watched after the connection was closed.
const AFTER_CLOSE: Duration = Duration::from_millis(500);

/// What is measured.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    /// Where packets go.
    pub direction: Direction,
    /// The link to the source.
    #[serde(skip)]
    pub link: Link,
    /// Entries of each ring.
    pub ring_size: u16,
    /// Buffers of each ring, a page each.
    pub buffers: u64,
    /// Bytes of each frame.
    pub frame: usize,
    /// What guest memory is made of.
    pub memory: Backing,
    /// Memory is told slot by slot.
    pub slots: bool,
    /// Whether the rings' own pages have arrived before.
    pub rings_arrived: bool,
    /// Negotiate MRG_RXBUF.
    pub mergeable: bool,
    /// The number of packets whose time is wanted.
    pub packets: u64,
    /// How often the ring is stopped during stalls; 0: never, and the time to full rate is taken instead.
    pub stops: usize,
    /// The longest time from a restart to the next stop; in between they are as likely at any moment.
    pub stop_within: Duration,
    /// A stall is watched for so long, whatever number of packets there is by then.
    pub watch: Option<Duration>,
    /// How long traffic goes on after the packets. With a second port at a fixed rate: how long that is watched alone.
    pub steady: Duration,
    /// What a second port does meanwhile.
    pub second: Option<SecondPort>,
    /// How long the packets may take.
    pub limit: Duration,
}

/// Where no page ever came.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Stuck {
    /// Whether GET_VRING_BASE was answered (how fast is in `stop`).
    pub stop_answered: bool,
    /// Whether a next front-end could use the port.
    pub usable_again: bool,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// From ring start to the number of packets.
    pub to_packets_ms: Option<f64>,
    /// From ring start to 90 % of full rate.
    pub to_full_rate_ms: Option<f64>,
    /// Full rate, packets per second, at the end of the run.
    pub full_rate_pps: Option<f64>,
    /// From ring start to the last page that the back-end waited for.
    pub last_page_ms: Option<f64>,
    /// Faults and pages.
    pub faults: Counts,
    /// GET_FEATURES during stalls.
    pub ping: Option<Times>,
    /// How late this program's asking thread was itself, when it woke from its sleep before each question: what is not
    /// longer than this says nothing about the back-end.
    pub own_delay: Option<Times>,
    /// GET_VRING_BASE during stalls.
    pub stop: Option<Times>,
    /// The same, one by one.
    #[serde(skip)]
    pub stops: Vec<Duration>,
    /// POSTCOPY_END.
    pub end_ms: Option<f64>,
    /// Where no page ever came.
    pub stuck: Option<Stuck>,
    /// The second port at a fixed rate.
    pub second: Option<Steady>,
    /// Pages that the second, stalled port waited for while the first was measured.
    pub second_outstanding: Option<u64>,
    /// Buffers that the device has used: RX, TX.
    pub used: [u64; RINGS],
    /// Packets that did not come back though later ones did.
    pub lost: u64,
    /// Part of the run, in percent, in which threads of the back-end were ready to run and had no CPU; where the
    /// process is known. Numbers of a run in which that is much say little.
    pub cpu_missing_percent: Option<f64>,
    /// What the back-end did wrong.
    pub wrong: Summary,
}

impl Outcome {
    fn of(driver: &Driven, faults: Counts, findings: &Findings) -> Self {
        Self {
            to_packets_ms: None,
            to_full_rate_ms: None,
            full_rate_pps: None,
            last_page_ms: None,
            faults,
            ping: None,
            own_delay: None,
            stop: None,
            stops: Vec::new(),
            end_ms: None,
            stuck: None,
            second: None,
            second_outstanding: None,
            used: driver.used,
            lost: driver.lost,
            cpu_missing_percent: None,
            wrong: findings.summary(),
        }
    }

    /// Takes the stops of an earlier machine, and what was wrong there, into this one.
    pub fn join(&mut self, before: Self) {
        self.stops.extend(before.stops);
        self.stop = Times::of(&self.stops);
        for (wrong, (count, first)) in before.wrong {
            self.wrong.entry(wrong).or_insert((0, first)).0 += count;
        }
    }
}

/// The threads of a run; dropping it ends them whatever state they are in.
struct Threads {
    guest: Arc<Guest>,
    driver: Option<Driver>,
    deliverer: Option<Deliverer>,
}

impl Threads {
    fn driver(&self) -> Result<&Driver> {
        self.driver.as_ref().context("no driver")
    }

    fn deliverer(&self) -> Result<&Deliverer> {
        self.deliverer.as_ref().context("no deliverer")
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if let Some(driver) = self.driver.take() {
            driver.halt();
            self.guest.give_up();
            let _ = driver.join();
        }
        if let Some(deliverer) = self.deliverer.take() {
            let _ = deliverer.stop();
        }
    }
}

/// Measures one case at the back-end that listens at the first of `sockets`, and at the second if it has a port for that.
pub fn measure(sockets: &[PathBuf], case: &Case) -> Result<Outcome> {
    let socket = sockets.first().context("no socket")?;
    let findings = Findings::default();
    let second = Second::start(sockets.get(1).map(PathBuf::as_path), case, &findings)?;
    let Arrival { guest, events, rings, session, deliverer } =
        Arrival::at(socket, case, case.link, &findings)?;
    let mut threads = Threads { guest: Arc::clone(&guest), driver: None, deliverer: Some(deliverer) };
    let job = Job { direction: case.direction, frame: case.frame, target: case.packets };
    let driver = Driver::start(job, Arc::clone(&guest), rings, Arc::clone(&events), findings.clone())?;
    threads.driver = Some(driver);
    let start = Instant::now();
    second.stalls();
    session.start_rings(&guest, &events)?;
    let asked = Asked::default();
    let run =
        Run { case, guest: &guest, events: &events, findings: &findings, session, threads, second, asked };
    if case.link.latency_ns.is_none() { run.for_ever(socket, start) } else { run.through(start) }
}

/// What must be so some time after a connection was closed, whatever was missing.
pub fn check_after_close(guest: &Guest, delivered: &Delivered, findings: &Findings) -> Result<()> {
    interrupt::sleep(AFTER_CLOSE)?;
    guest.check_holes(|page| delivered.schedule.is_here(page), Wrong::HoleGone, findings)
}

/// Questions and answers.
#[derive(Default)]
struct Asked {
    answers: Vec<Duration>,
    own_delays: Vec<Duration>,
}

impl Asked {
    /// Sleeps until the next question is due, and notes how late that was.
    fn sleep(&mut self) {
        let due = Instant::now() + PING_EVERY;
        std::thread::sleep(PING_EVERY);
        self.own_delays.push(due.elapsed());
    }
}

struct Run<'a> {
    case: &'a Case,
    guest: &'a Arc<Guest>,
    events: &'a [Events; RINGS],
    findings: &'a Findings,
    session: Session,
    threads: Threads,
    second: Second,
    asked: Asked,
}

impl Run<'_> {
    /// Pages come, sooner or later.
    fn through(mut self, start: Instant) -> Result<Outcome> {
        self.session.driver_ok()?;
        let mut stops = Vec::new();
        let window = self.case.watch;
        if self.case.stops > 0 {
            self.stop_often(start, &mut stops)?;
        } else {
            self.ask(start, window)?;
            if window.is_none() {
                interrupt::sleep(self.case.steady)?;
            }
        }
        self.second.enough();
        let second_outstanding = self.second.outstanding();
        let before_end = Instant::now();
        let end_ms = self.finish()?;
        for ring in [RX, TX] {
            self.stop(ring)?;
        }
        let driver = self.threads.driver.take().context("no driver")?.join()?;
        let delivered = self.threads.deliverer.take().context("no deliverer")?.stop()?;
        let is_here = |page| delivered.schedule.is_here(page);
        self.guest.check_holes(is_here, Wrong::HoleGone, self.findings)?;
        self.guest.check_pages(|page| delivered.schedule.is_here(page), driver.longest, self.findings);
        self.session.reset_status()?;
        let second = self.second.stop(self.findings)?;
        let since = |at: Instant| ms(at.duration_since(start));
        let mut out = Outcome::of(&driver, delivered.counts, self.findings);
        if self.case.stops == 0 && window.is_none() {
            // What comes after END is not part of it.
            let notes: Vec<_> = driver.notes.iter().copied().take_while(|n| n.0 <= before_end).collect();
            out.full_rate_pps = rates::full_rate(&notes, self.case.steady / 2);
            out.to_full_rate_ms =
                out.full_rate_pps.and_then(|rate| rates::reached(&notes, 0.9 * rate)).map(since);
            out.to_packets_ms = driver.reached.map(since);
        }
        Ok(Outcome {
            last_page_ms: delivered.last_wanted.map(since),
            ping: Times::of(&self.asked.answers),
            own_delay: Times::of(&self.asked.own_delays),
            stop: Times::of(&stops),
            stops,
            end_ms: Some(end_ms),
            second,
            second_outstanding,
            ..out
        })
    }

    /// Asks the back-end something now and then as long as it waits for pages: until the packets are through, or for
    /// this long.
    fn ask(&mut self, start: Instant, window: Option<Duration>) -> Result<()> {
        let _on_time = Preferred::enter();
        loop {
            interrupt::check()?;
            let enough = match window {
                Some(window) => start.elapsed() >= window,
                None => self.threads.driver()?.reached() || start.elapsed() > self.case.limit,
            };
            if enough || self.threads.driver()?.failed() {
                return Ok(());
            }
            if self.threads.deliverer()?.outstanding() > 0 {
                self.asked.answers.push(self.session.ping()?);
            }
            self.check_threads()?;
            self.asked.sleep();
        }
    }

    fn check_threads(&self) -> Result<()> {
        // Its error comes with `stop`.
        if self.threads.deliverer()?.finished() {
            bail!("the delivering thread ended early");
        }
        Ok(())
    }

    /// Stops and restarts the ring during stalls, at moments that have nothing to do with the pages'.
    fn stop_often(&mut self, start: Instant, stops: &mut Vec<Duration>) -> Result<()> {
        let ring = self.case.direction.ring();
        let place = self.guest.layout.ring(ring);
        let _on_time = Preferred::enter();
        let mut dice = start.elapsed().as_nanos() as u64 | 1;
        while stops.len() < self.case.stops && start.elapsed() < self.case.limit {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let share = (dice >> 40) as f64 / (1u64 << 24) as f64;
            interrupt::sleep(self.case.stop_within.mul_f64(share))?;
            self.check_threads()?;
            // Between two pages of a back-end that wants one at a time there is a moment without any.
            let stalled = (0..STALL_LOOKS).any(|_| {
                std::thread::sleep(STALL_LOOK);
                self.threads.deliverer().is_ok_and(|d| d.outstanding() > 0)
            });
            if !stalled || self.threads.driver()?.failed() {
                break;
            }
            let (took, base) = self.stop(ring)?;
            stops.push(took);
            self.session.start_ring(
                ring,
                &place,
                base.into(),
                self.guest.map.address(),
                &self.events[ring],
            )?;
        }
        Ok(())
    }

    /// GET_VRING_BASE, and whether the ring really stands where it says.
    fn stop(&self, ring: usize) -> Result<(Duration, u16)> {
        let (took, base) = self.session.stop_ring(ring)?;
        let place = self.guest.layout.ring(ring);
        let (then, _) = ring::indices(&self.guest.map, &place);
        std::thread::sleep(AFTER_STOP);
        let (now, _) = ring::indices(&self.guest.map, &place);
        if then != now || base != now {
            self.findings.add(Wrong::FalseBase, || {
                format!("ring {ring} answered base {base}; used.idx was {then} then and {now} a little later")
            });
        }
        Ok((took, base))
    }

    /// The rest of the memory comes, and the migration is over. How long END took.
    fn finish(&self) -> Result<f64> {
        let (driver, deliverer) = (self.threads.driver()?, self.threads.deliverer()?);
        deliverer.finish();
        interrupt::wait_for("the rest of the pages", STANDSTILL, || Ok(deliverer.finished()))?;
        let start = Instant::now();
        self.session.end()?;
        let end_ms = ms(start.elapsed());
        let before = driver.counted();
        let wanted = before + u64::from(self.case.ring_size);
        let moves = interrupt::wait_for("packets after END", STANDSTILL, || {
            Ok(driver.counted() >= wanted || driver.failed())
        });
        if let Err(error) = moves {
            interrupt::check()?;
            let outstanding = deliverer.outstanding();
            self.findings
                .add(Wrong::NotAwake, || format!("{error:#} (after {before}; {outstanding} pages wanted)"));
        }
        Ok(end_ms)
    }

    /// No page ever comes: does the back-end answer all the same, and can its port be used again?
    fn for_ever(mut self, socket: &Path, start: Instant) -> Result<Outcome> {
        let patience = self.case.limit.min(STUCK);
        self.session.set_patience(patience);
        // A back-end that is stuck in its control thread answers nothing from the start.
        let mut answers = self.session.driver_ok().is_ok();
        let on_time = Preferred::enter();
        while start.elapsed() < self.case.watch.unwrap_or(self.case.steady) {
            interrupt::check()?;
            if answers {
                match self.session.ping() {
                    Ok(took) => self.asked.answers.push(took),
                    Err(_) => answers = false,
                }
            }
            self.asked.sleep();
        }
        drop(on_time);
        self.second.enough();
        let second_outstanding = self.second.outstanding();
        let stop = if answers { self.session.stop_ring(self.case.direction.ring()).ok() } else { None };
        if let Some((_, base)) = stop
            && base != BASE
        {
            self.findings.add(Wrong::FalseBase, || format!("base {base} where nothing could be used"));
        }
        // QEMU is gone.
        drop(self.session);
        let delivered = self.threads.deliverer.take().context("no deliverer")?.stop()?;
        check_after_close(self.guest, &delivered, self.findings)?;
        let driver = self.threads.driver.take().context("no driver")?;
        driver.halt();
        self.guest.give_up();
        let driver = driver.join()?;
        let next = [Events::new()?, Events::new()?];
        let usable_again = Session::open_within(socket, Wishes::default(), &next, patience).is_ok();
        let second = self.second.stop(self.findings)?;
        Ok(Outcome {
            ping: Times::of(&self.asked.answers),
            own_delay: Times::of(&self.asked.own_delays),
            second,
            second_outstanding,
            stop: stop.and_then(|(took, _)| Times::of(&[took])),
            stuck: Some(Stuck { stop_answered: stop.is_some(), usable_again }),
            ..Outcome::of(&driver, delivered.counts, self.findings)
        })
    }
}
