//! A second port of the same process: a machine that has all its memory and sends at a fixed rate, come what may. How long
//! the back-end takes for each packet, from the moment that it is made available (and the device is kicked, if it
//! wants to be) to its use.
//!
//! The sender runs before ordinary threads and sleeps a third of the time at least, so that the pages of the other
//! port can come. It looks at the used ring all the time for [`LOOK_NS`] behind each group, and then at the next: a latency
//! above that has this program's sleep (some 20 µs) in it.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::Serialize;

use super::findings::{Findings, Wrong};
use super::guest::{Backing, Guest};
use super::histogram::{Histogram, Latency};
use super::layout::{Layout, RINGS, RX, TX};
use super::pace::{Pace, TICK_NS};
use super::ring::{Ring, RingError};
use super::session::{Session, Wishes};
use super::sleeper;
use crate::packet::HEADER;
use crate::session::Events;

const RING: u16 = 256;
/// How long the used ring is looked at without a break.
const LOOK_NS: u64 = 40_000;
/// The shortest sleep.
const NAP: Duration = Duration::from_micros(20);
/// Pause of the processor between two looks.
const SPINS: u32 = 8;
/// A word in the frame that nobody checks.
const SCRATCH_AT: u64 = 48;
/// Before anything is counted.
const WARM_UP: Duration = Duration::from_millis(200);

/// Which samples count for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mark {
    /// Nothing yet, or nothing any more.
    Off = 0,
    /// The other port is quiet.
    Alone = 1,
    /// The other port stalls.
    Beside = 2,
}

/// What became of the packets of one kind of time.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Flow {
    /// Packets sent.
    pub sent: u64,
    /// Packets that were due and found no room in the ring.
    pub lost: u64,
    /// Packets that this program was too late for.
    pub skipped: u64,
    /// Packets that were never used; they count with their age at the end as latency.
    pub unused: u64,
    /// From available to used.
    pub latency: Option<Latency>,
}

/// What was measured at the second port.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Steady {
    /// Before the first port's machine arrived.
    pub alone: Flow,
    /// While it stalled.
    pub beside: Flow,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    mark: AtomicU8,
}

/// The running machine.
#[derive(Debug)]
pub struct Neighbour {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Steady>>,
    _session: Session,
}

impl Neighbour {
    /// Connects, sends at so many packets per second, and measures itself alone for so long.
    pub fn start(
        socket: &Path,
        per_second: u64,
        frame: usize,
        alone: Duration,
        findings: &Findings,
    ) -> Result<Self> {
        let layout = Layout::small(RING, RING.into());
        let guest = Arc::new(Guest::new(Backing::Memfd, layout, frame)?);
        guest.source_ring(RX, 0, 0);
        let ring = guest.source_ring(TX, 0, 0);
        guest.arrive()?;
        let events = Arc::new([Events::new()?, Events::new()?]);
        let session = Session::open(socket, Wishes::default(), &events)?;
        session.begin()?;
        session.set_whole_table(&guest)?;
        session.start_rings(&guest, &events)?;
        session.driver_ok()?;
        let shared = Arc::new(Shared::default());
        let sender = Sender {
            guest,
            ring,
            events,
            findings: findings.clone(),
            shared: Arc::clone(&shared),
            packet_len: (HEADER + frame) as u32,
            born: vec![(0, Mark::Off); RING.into()],
            taken: 0,
            flows: Default::default(),
            start: Instant::now(),
            per_second,
        };
        let thread = std::thread::Builder::new().name("steady".into()).spawn(move || {
            sleeper::prefer_me(sleeper::Rank::Send);
            sender.run()
        })?;
        let it = Self { shared, thread: Some(thread), _session: session };
        crate::interrupt::sleep(WARM_UP)?;
        it.mark(Mark::Alone);
        crate::interrupt::sleep(alone)?;
        it.mark(Mark::Off);
        Ok(it)
    }

    /// Packets sent from now on count for this.
    pub fn mark(&self, mark: Mark) {
        self.shared.mark.store(mark as u8, Ordering::Relaxed);
    }

    /// Ends it.
    pub fn stop(mut self) -> Result<Steady> {
        self.shared.stop.store(true, Ordering::Release);
        let thread = self.thread.take();
        let steady = thread.and_then(|t| t.join().ok());
        ensure!(steady.is_some(), "the thread that sends at a fixed rate has panicked");
        Ok(steady.unwrap_or_default())
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Sender {
    guest: Arc<Guest>,
    ring: Ring,
    events: Arc<[Events; RINGS]>,
    findings: Findings,
    shared: Arc<Shared>,
    packet_len: u32,
    /// When the packet in each place of the ring was made available, and what it counts for.
    born: Vec<(u64, Mark)>,
    taken: u64,
    flows: [(Flow, Histogram); 3],
    start: Instant,
    per_second: u64,
}

impl Sender {
    fn run(mut self) -> Steady {
        if let Err(error) = self.send_all() {
            self.findings.add(Wrong::RingOrder, || format!("second port: {error}"));
        }
        let now = self.now_ns();
        for number in self.taken..self.ring.next() {
            let (born, mark) = self.born[number as usize % self.born.len()];
            let (flow, histogram) = &mut self.flows[mark as usize];
            flow.unused += 1;
            histogram.add(now - born);
        }
        let [_, alone, beside] =
            self.flows.map(|(flow, histogram)| Flow { latency: histogram.latency(), ..flow });
        Steady { alone, beside }
    }

    fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    fn send_all(&mut self) -> Result<(), RingError> {
        let mut pace = Pace::new(self.per_second, self.now_ns());
        let mut tick = self.now_ns();
        while !self.shared.stop.load(Ordering::Acquire) {
            self.take_used()?;
            let now = self.now_ns();
            let mark = match self.shared.mark.load(Ordering::Relaxed) {
                1 => Mark::Alone,
                2 => Mark::Beside,
                _ => Mark::Off,
            };
            let due = pace.due(now, self.ring.room());
            let flow = &mut self.flows[mark as usize].0;
            flow.sent += due.send;
            flow.lost += due.lost;
            flow.skipped += due.skipped;
            if due.send > 0 {
                self.send(due.send, mark);
            }
            while self.ring.pending() > 0 && self.now_ns() - now < LOOK_NS {
                self.take_used()?;
                (0..SPINS).for_each(|_| std::hint::spin_loop());
            }
            tick = (tick + TICK_NS).max(now);
            std::thread::sleep(Duration::from_nanos(tick.saturating_sub(self.now_ns())).max(NAP));
        }
        Ok(())
    }

    /// Makes packets available, and kicks the device if it wants to be kicked.
    fn send(&mut self, count: u64, mark: Mark) {
        let memory = &self.guest.map;
        let first = self.ring.next();
        for number in first..first + count {
            let buffer = self.guest.layout.buffer(TX, number);
            // A guest writes what it sends: the line is in this processor's cache, not in the back-end's.
            memory.store_u64(buffer + SCRATCH_AT, number);
            self.ring.publish(memory, buffer, self.packet_len, false);
        }
        let now = self.now_ns();
        for number in first..first + count {
            let place = number as usize % self.born.len();
            self.born[place] = (now, mark);
        }
        if self.ring.expose(memory) {
            let _ = nix::unistd::write(self.events[TX].kick.as_fd(), &1u64.to_ne_bytes());
        }
    }

    fn take_used(&mut self) -> Result<(), RingError> {
        if self.ring.look(&self.guest.map)? == 0 {
            return Ok(());
        }
        let now = self.now_ns();
        while let Some(used) = self.ring.take(&self.guest.map)? {
            let (born, mark) = self.born[used.number as usize % self.born.len()];
            self.flows[mark as usize].1.add(now - born);
            self.taken += 1;
        }
        Ok(())
    }
}
