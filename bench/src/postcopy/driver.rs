//! The guest's driver as a thread: fills and empties both rings, looks into what it receives, notes the time.
//!
//! It polls while there is something to do, and naps when nothing moves. It stands for the guest's CPU: where a page
//! has not arrived it waits like one.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::PAGE;
use super::findings::{Findings, Wrong};
use super::guest::Guest;
use super::layout::{RINGS, RX, TX};
use super::ring::{Ring, RingError};
use super::sleeper;
use crate::packet::{self, Content, FRAME_MAX, HEADER};
use crate::session::Events;

/// After so long without a packet the driver naps between two looks.
const PATIENCE: Duration = Duration::from_micros(300);
const NAP: Duration = Duration::from_micros(30);
/// Pause of the processor between two looks before that.
const SPINS: u32 = 16;
/// Distance of the notes on how many packets there were.
const NOTE_EVERY: Duration = Duration::from_millis(1);
/// Packets of one ring before the other has its turn.
const BURST: u64 = 256;

/// Where packets go, seen from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// To the back-end, which drops them (testpmd `rxonly`, our `--uplink null`)
    Tx,
    /// From the back-end, which makes them (testpmd `txonly`)
    Rx,
    /// To the back-end, which sends them back (testpmd `io`); each one is checked
    Echo,
}

impl Direction {
    /// Whether the guest sends.
    pub fn sends(self) -> bool {
        self != Self::Rx
    }

    /// Whether the guest receives.
    pub fn receives(self) -> bool {
        self != Self::Tx
    }

    /// The ring that is measured, and stopped.
    pub fn ring(self) -> usize {
        if self == Self::Tx { TX } else { RX }
    }
}

/// What the driver is to do.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// Where packets go.
    pub direction: Direction,
    /// Bytes of each frame.
    pub frame: usize,
    /// The number of packets whose time is wanted.
    pub target: u64,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    counted: AtomicU64,
    reached: AtomicBool,
    failed: AtomicBool,
}

/// What the driver has seen.
#[derive(Debug, Default)]
pub struct Driven {
    /// When the target was reached.
    pub reached: Option<Instant>,
    /// Packets of the measured ring, from time to time.
    pub notes: Vec<(Instant, u64)>,
    /// Buffers that the device has used, by ring.
    pub used: [u64; RINGS],
    /// Packets that went out and did not come back, though later ones did.
    pub lost: u64,
    /// The longest packet of each ring, header included: nothing in a page behind it may have changed.
    pub longest: [usize; RINGS],
}

/// The running driver.
#[derive(Debug)]
pub struct Driver {
    shared: Arc<Shared>,
    thread: JoinHandle<Driven>,
}

impl Driver {
    /// Starts it, with the rings as the source left them.
    pub fn start(
        job: Job,
        guest: Arc<Guest>,
        rings: [Ring; RINGS],
        events: Arc<[Events; RINGS]>,
        findings: Findings,
    ) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("driver".into()).spawn(move || {
            sleeper::exact_timers();
            let cpu = GuestCpu {
                job,
                guest,
                rings,
                events,
                findings,
                shared: theirs,
                packet: vec![0; HEADER + job.frame],
                expected: 0,
                out: Driven::default(),
            };
            cpu.run()
        })?;
        Ok(Self { shared, thread })
    }

    /// Packets of the measured ring until now.
    pub fn counted(&self) -> u64 {
        self.shared.counted.load(Ordering::Relaxed)
    }

    /// Whether the target is reached.
    pub fn reached(&self) -> bool {
        self.shared.reached.load(Ordering::Acquire)
    }

    /// Whether the device broke a ring, so that nothing moves any more.
    pub fn failed(&self) -> bool {
        self.shared.failed.load(Ordering::Acquire)
    }

    /// Tells it to stop; it may be waiting for a page.
    pub fn halt(&self) {
        self.shared.stop.store(true, Ordering::Release);
    }

    /// Waits for its end.
    pub fn join(self) -> Result<Driven> {
        self.halt();
        self.thread.join().map_err(|_| anyhow::anyhow!("the driver's thread has panicked"))
    }
}

struct GuestCpu {
    job: Job,
    guest: Arc<Guest>,
    rings: [Ring; RINGS],
    events: Arc<[Events; RINGS]>,
    findings: Findings,
    shared: Arc<Shared>,
    packet: Vec<u8>,
    expected: u64,
    out: Driven,
}

impl GuestCpu {
    fn run(mut self) -> Driven {
        let mut moved = Instant::now();
        let mut noted = moved;
        self.out.notes.push((noted, 0));
        while !self.shared.stop.load(Ordering::Acquire) {
            let packets = match self.turn() {
                Ok(packets) => packets,
                Err(error) => {
                    self.findings.add(Wrong::RingOrder, || error.to_string());
                    self.shared.failed.store(true, Ordering::Release);
                    break;
                }
            };
            let now = Instant::now();
            let counted = self.out.used[self.job.direction.ring()];
            self.shared.counted.store(counted, Ordering::Relaxed);
            if counted >= self.job.target && self.out.reached.is_none() {
                self.out.reached = Some(now);
                self.shared.reached.store(true, Ordering::Release);
            }
            if now - noted >= NOTE_EVERY {
                noted = now;
                self.out.notes.push((now, counted));
            }
            if packets > 0 {
                moved = now;
            } else if now - moved > PATIENCE {
                std::thread::sleep(NAP);
            } else {
                // Looking without a break would take the line with the index from the device all the time.
                (0..SPINS).for_each(|_| std::hint::spin_loop());
            }
        }
        self.out.notes.push((Instant::now(), self.out.used[self.job.direction.ring()]));
        self.out
    }

    fn turn(&mut self) -> Result<u64, RingError> {
        let mut packets = 0;
        if self.job.direction.sends() {
            packets += self.transmit()?;
        }
        if self.job.direction.receives() {
            packets += self.receive()?;
        }
        Ok(packets)
    }

    fn transmit(&mut self) -> Result<u64, RingError> {
        let memory = &self.guest.map;
        let used = self.rings[TX].look(memory)?.min(BURST);
        for _ in 0..used {
            self.rings[TX].take(memory)?;
        }
        if used == 0 {
            return Ok(0);
        }
        for _ in 0..used {
            let number = self.rings[TX].next();
            let buffer = self.guest.layout.buffer(TX, number);
            // The first time round the buffers, the source has the packets.
            if number >= self.guest.layout.buffers {
                packet::build(number, &mut self.packet);
                memory.write(buffer, &self.packet);
            }
            self.rings[TX].publish(memory, buffer, self.packet.len() as u32, false);
        }
        self.out.longest[TX] = self.packet.len();
        self.out.used[TX] += used;
        self.expose(TX);
        Ok(used)
    }

    fn receive(&mut self) -> Result<u64, RingError> {
        let used = self.rings[RX].look(&self.guest.map)?.min(BURST);
        for _ in 0..used {
            let Some(entry) = self.rings[RX].take(&self.guest.map)? else { break };
            self.check(entry.number, entry.len as usize);
        }
        if used == 0 {
            return Ok(0);
        }
        let memory = &self.guest.map;
        for _ in 0..used {
            let buffer = self.guest.layout.buffer(RX, self.rings[RX].next());
            self.rings[RX].publish(memory, buffer, PAGE as u32, true);
        }
        self.out.used[RX] += used;
        self.expose(RX);
        Ok(used)
    }

    fn expose(&self, ring: usize) {
        if self.rings[ring].expose(&self.guest.map) {
            // Full means that the device has been told already.
            let _ = nix::unistd::write(self.events[ring].kick.as_fd(), &1u64.to_ne_bytes());
        }
    }

    fn check(&mut self, number: u64, len: usize) {
        let mut bytes = [0; HEADER + FRAME_MAX];
        let findings = &self.findings;
        let Some(bytes) = bytes.get_mut(..len) else {
            findings.add(Wrong::DamagedPacket, || format!("packet {number} has {len} bytes"));
            return;
        };
        self.guest.map.read(self.guest.layout.buffer(RX, number), bytes);
        self.out.longest[RX] = self.out.longest[RX].max(len);
        match packet::look(bytes) {
            Content::Ours(seq) if self.job.direction == Direction::Echo => {
                if seq < self.expected {
                    let expected = self.expected;
                    findings.add(Wrong::PacketOrder, || format!("packet {seq} where {expected} is due"));
                } else {
                    self.out.lost += seq - self.expected;
                    self.expected = seq + 1;
                }
            }
            Content::Ours(_) | Content::Foreign if self.job.direction == Direction::Rx => {}
            Content::Zeros => findings.add(Wrong::ZeroPacket, || format!("packet {number} of {len} bytes")),
            other => {
                findings.add(Wrong::DamagedPacket, || format!("packet {number} of {len} bytes: {other:?}"))
            }
        }
    }
}
