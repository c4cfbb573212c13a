//! One measurement: a virtual machine arrives, its rings start, pages come, and it leaves again.
#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lab::rawfront::virtio;
use serde::Serialize;

use super::PAGE;
use super::deliver::{Client, Deliverer};
use super::driver::{Direction, Driven, Driver, Events, Job};
use super::findings::{Findings, Summary, Wrong};
use super::guest::{BASE, Guest};
use super::layout::{Layout, RINGS, RX, TX};
use super::packet::HEADER;
use super::rates::{self, Times, ms};
use super::ring;
use super::schedule::{Asker, Counts, Link, Schedule};
use super::session::Session;
use crate::interrupt;

/// How long a back-end is watched for touching memory before it may.
const BEFORE_ACK: Duration = Duration::from_millis(20);
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
    /// How long traffic goes on after that, or without any page.
    pub steady: Duration,
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
    /// GET_VRING_BASE during stalls.
    pub stop: Option<Times>,
    /// The same, one by one.
    #[serde(skip)]
    pub stops: Vec<Duration>,
    /// POSTCOPY_END.
    pub end_ms: Option<f64>,
    /// Where no page ever came.
    pub stuck: Option<Stuck>,
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
            stop: None,
            stops: Vec::new(),
            end_ms: None,
            stuck: None,
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

/// Measures one case at the back-end that listens at `socket`.
pub fn measure(socket: &Path, case: &Case) -> Result<Outcome> {
    let findings = Findings::default();
    let layout = Layout { ring_size: case.ring_size, buffers: case.buffers };
    let guest = Arc::new(Guest::new(layout, case.frame)?);
    let posted = u64::from(case.ring_size);
    let send = if case.direction.sends() { posted } else { 0 };
    let receive = if case.direction.receives() { posted } else { 0 };
    let rings = [
        guest.source_ring(RX, receive, PAGE as u32),
        guest.source_ring(TX, send, (HEADER + case.frame) as u32),
    ];
    let mut schedule = Schedule::new(case.link, guest.pages());
    if case.rings_arrived {
        for page in layout.ring_pages() {
            guest.place(page)?;
            schedule.preset(page);
        }
    }
    let events = Arc::new([Events::new()?, Events::new()?]);
    let features = if case.mergeable { virtio::MRG_RXBUF } else { 0 };

    let session = Session::open(socket, features, &events)?;
    let uffd = session.advise()?;
    session.listen()?;
    let client = session.send_table(&guest, uffd)?;
    check_untouched(&guest, &client, &mut schedule, &findings)?;
    let deliverer = Deliverer::start(Arc::clone(&guest), client, schedule, findings.clone())?;
    let mut threads = Threads { guest: Arc::clone(&guest), driver: None, deliverer: Some(deliverer) };
    session.acknowledge_table()?;

    let job = Job { direction: case.direction, frame: case.frame, target: case.packets };
    let driver = Driver::start(job, Arc::clone(&guest), rings, Arc::clone(&events), findings.clone())?;
    threads.driver = Some(driver);
    let start = Instant::now();
    session.start_rings(&guest, &events)?;
    let run = Run { case, guest: &guest, events: &events, findings: &findings, session, threads };
    if case.link.latency_ns.is_none() { run.for_ever(socket, start) } else { run.through(start) }
}

/// Before the acknowledgement, no fault may have been raised and no page filled.
fn check_untouched(
    guest: &Guest,
    client: &Client,
    schedule: &mut Schedule,
    findings: &Findings,
) -> Result<()> {
    std::thread::sleep(BEFORE_ACK);
    client.uffd.events(|event| {
        findings.add(Wrong::TouchedBeforeAck, || format!("{event:x?}"));
        // It must be answered all the same: nobody else will see it.
        if let Some(page) = client.page(event, guest.pages()) {
            schedule.fault(page, Asker::BackEnd, 0);
        }
    })?;
    for (page, content) in guest.content()?.into_iter().enumerate() {
        if content && !schedule.is_here(page as u64) {
            findings.add(Wrong::TouchedBeforeAck, || format!("page {page} was filled"));
        }
    }
    Ok(())
}

struct Run<'a> {
    case: &'a Case,
    guest: &'a Arc<Guest>,
    events: &'a [Events; RINGS],
    findings: &'a Findings,
    session: Session,
    threads: Threads,
}

impl Run<'_> {
    /// Pages come, sooner or later.
    fn through(mut self, start: Instant) -> Result<Outcome> {
        self.session.driver_ok()?;
        let (mut pings, mut stops) = (Vec::new(), Vec::new());
        if self.case.stops > 0 {
            self.stop_often(start, &mut stops)?;
        } else {
            self.until_packets(start, &mut pings)?;
            interrupt::sleep(self.case.steady)?;
        }
        let before_end = Instant::now();
        let end_ms = self.finish()?;
        for ring in [RX, TX] {
            self.stop(ring)?;
        }
        let driver = self.threads.driver.take().context("no driver")?.join()?;
        let delivered = self.threads.deliverer.take().context("no deliverer")?.stop()?;
        self.guest.check_holes(|page| delivered.schedule.is_here(page), self.findings)?;
        self.guest.check_pages(|page| delivered.schedule.is_here(page), driver.longest, self.findings);
        self.session.reset_status()?;
        let since = |at: Instant| ms(at.duration_since(start));
        let mut out = Outcome::of(&driver, delivered.counts, self.findings);
        if self.case.stops == 0 {
            // What comes after END is not part of it.
            let notes: Vec<_> = driver.notes.iter().copied().take_while(|n| n.0 <= before_end).collect();
            out.full_rate_pps = rates::full_rate(&notes, self.case.steady / 2);
            out.to_full_rate_ms =
                out.full_rate_pps.and_then(|rate| rates::reached(&notes, 0.9 * rate)).map(since);
            out.to_packets_ms = driver.reached.map(since);
        }
        Ok(Outcome {
            last_page_ms: delivered.last_wanted.map(since),
            ping: Times::of(&pings),
            stop: Times::of(&stops),
            stops,
            end_ms: Some(end_ms),
            ..out
        })
    }

    /// Asks the back-end something now and then, as long as it waits for pages, until the packets are through.
    fn until_packets(&mut self, start: Instant, pings: &mut Vec<Duration>) -> Result<()> {
        while !self.threads.driver()?.reached() {
            interrupt::check()?;
            if self.threads.deliverer()?.outstanding() > 0 {
                pings.push(self.session.ping()?);
            }
            if self.threads.driver()?.failed() || start.elapsed() > self.case.limit {
                break;
            }
            self.check_threads()?;
            std::thread::sleep(PING_EVERY);
        }
        Ok(())
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
            self.session.start_ring(ring, &place, base, self.guest.map.address(), &self.events[ring])?;
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
        let mut pings = Vec::new();
        let patience = self.case.limit.min(STUCK);
        self.session.set_patience(patience);
        // A back-end that is stuck in its control thread answers nothing from the start.
        let mut answers = self.session.driver_ok().is_ok();
        while answers && start.elapsed() < self.case.steady {
            interrupt::check()?;
            match self.session.ping() {
                Ok(took) => pings.push(took),
                Err(_) => answers = false,
            }
            std::thread::sleep(PING_EVERY);
        }
        let stop = if answers { self.session.stop_ring(self.case.direction.ring()).ok() } else { None };
        if let Some((_, base)) = stop
            && base != BASE
        {
            self.findings.add(Wrong::FalseBase, || format!("base {base} where nothing could be used"));
        }
        // QEMU is gone.
        drop(self.session);
        let delivered = self.threads.deliverer.take().context("no deliverer")?.stop()?;
        interrupt::sleep(AFTER_CLOSE)?;
        self.guest.check_holes(|page| delivered.schedule.is_here(page), self.findings)?;
        let driver = self.threads.driver.take().context("no driver")?;
        driver.halt();
        self.guest.give_up();
        let driver = driver.join()?;
        let next = [Events::new()?, Events::new()?];
        let usable_again = Session::open_within(socket, 0, &next, patience).is_ok();
        Ok(Outcome {
            ping: Times::of(&pings),
            stop: stop.and_then(|(took, _)| Times::of(&[took])),
            stuck: Some(Stuck { stop_answered: stop.is_some(), usable_again }),
            ..Outcome::of(&driver, delivered.counts, self.findings)
        })
    }
}
