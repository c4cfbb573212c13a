//! The three measurements. All of them count what the tap counted and what CPU time the process used, so that every
//! contender is measured in the same way.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use crate::procstat;
use crate::testpmd::Testpmd;
use anyhow::{Result, ensure};
use lab::wire::Link;

use crate::compare::{BackEnd, Cell};
use crate::generate::{Generator, Source};
use crate::interrupt;

/// Pause between two looks at the tap's counters while it is drained. A look takes some 20 µs of the front-end's CPU.
const LOOK: Duration = Duration::from_millis(2);
/// A drain ends when nothing more was taken for so long.
const STALL: Duration = Duration::from_secs(3);
/// A drain that takes longer than this has failed.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);
/// A tap from which nothing is taken for so long is empty.
const DRY: Duration = Duration::from_millis(100);
/// How long a front-end may take to count the last packets.
const SETTLE: Duration = Duration::from_millis(50);

/// Guest to tap: how many packets the tap gets while the front-end (or the loop itself) sends all it can.
pub fn writing(backend: &BackEnd, link: &Link, window: Duration) -> Result<Cell> {
    let (start, before, cpu_before) =
        (Instant::now(), link.counters()?, procstat::cpu_time_ns(backend.pid())?);
    interrupt::sleep(window)?;
    let (wall, after, cpu_after) = (start.elapsed(), link.counters()?, procstat::cpu_time_ns(backend.pid())?);
    let packets = after.rx_packets - before.rx_packets;
    ensure!(packets > 0, "nothing reached the tap");
    Ok(reading(packets, wall, cpu_after - cpu_before, 0.0))
}

/// Tap to guest, the back-end alone: it is stopped, the tap's queue is filled, it goes on, and nobody else needs a CPU
/// but the front-end. The rate is taken from the middle of the drain.
pub fn draining(
    backend: &mut BackEnd,
    link: &Link,
    size: usize,
    prefill: u64,
    mut frontend: Option<&mut Testpmd>,
) -> Result<Cell> {
    let mut generator = Generator::open(link, Source::Packet, size)?;
    run_dry(link)?;
    backend.pause()?;
    let delivered_before = delivered(&mut frontend)?;
    let before = link.counters()?;
    generator.fill(prefill)?;
    ensure!(link.counters()?.tx_dropped == before.tx_dropped, "the tap's queue is shorter than {prefill}");
    backend.resume()?;
    let mut samples: Vec<(Instant, u64, u64)> = Vec::with_capacity(4096);
    let mut moved = Instant::now();
    loop {
        interrupt::check()?;
        let taken = link.counters()?.tx_packets - before.tx_packets;
        if samples.last().is_none_or(|s| s.1 != taken) {
            moved = Instant::now();
        }
        samples.push((Instant::now(), taken, procstat::cpu_time_ns(backend.pid())?));
        let since = samples[0].0.elapsed();
        if taken >= prefill || moved.elapsed() > STALL || since > DRAIN_TIMEOUT {
            break;
        }
        std::thread::sleep(LOOK);
    }
    std::thread::sleep(SETTLE);
    let taken = samples.last().map_or(0, |s| s.1);
    ensure!(taken >= prefill, "the back-end took {taken} of {prefill} packets and then no more");
    // The first and last tenth belong to waking up and running dry.
    let middle: Vec<_> =
        samples.iter().filter(|s| s.1 >= prefill / 10 && s.1 <= prefill - prefill / 10).copied().collect();
    ensure!(middle.len() >= 3, "{prefill} packets are too few to time a drain");
    let (first, last) = (middle[0], middle[middle.len() - 1]);
    let lost = match frontend {
        Some(_) => 1.0 - (delivered(&mut frontend)? - delivered_before) as f64 / prefill as f64,
        None => 0.0,
    };
    Ok(reading(last.1 - first.1, last.0 - first.0, last.2 - first.2, lost))
}

/// Tap to guest at a fixed rate that leaves the generator and the front-end room on their CPU.
pub fn at_rate(
    backend: &BackEnd,
    link: &Link,
    size: usize,
    pps: u64,
    window: Duration,
    mut frontend: Option<&mut Testpmd>,
) -> Result<Cell> {
    let mut generator = Generator::open(link, Source::Packet, size)?;
    run_dry(link)?;
    let delivered_before = delivered(&mut frontend)?;
    let before = link.counters()?;
    let (start, cpu_before) = (Instant::now(), procstat::cpu_time_ns(backend.pid())?);
    let sent = generator.paced(pps, window)?;
    let (wall, cpu_after) = (start.elapsed(), procstat::cpu_time_ns(backend.pid())?);
    let taken = link.counters()?.tx_packets - before.tx_packets;
    // What is late because the machine is busy is not lost.
    run_dry(link)?;
    std::thread::sleep(SETTLE);
    let got = match frontend {
        Some(_) => delivered(&mut frontend)? - delivered_before,
        None => link.counters()?.tx_packets - before.tx_packets,
    };
    ensure!(taken > 0 && got > 0, "nothing reached the guest");
    Ok(reading(taken, wall, cpu_after - cpu_before, 1.0 - got as f64 / sent as f64))
}

/// Waits until nothing from before is left in the tap.
fn run_dry(link: &Link) -> Result<()> {
    let mut last = link.counters()?.tx_packets;
    interrupt::wait_for("the tap to run dry", DRAIN_TIMEOUT, || {
        std::thread::sleep(DRY);
        let now = link.counters()?.tx_packets;
        Ok(std::mem::replace(&mut last, now) == now)
    })
}

fn delivered(frontend: &mut Option<&mut Testpmd>) -> Result<u64> {
    match frontend {
        Some(f) => Ok(f.stats(0)?.rx_packets),
        None => Ok(0),
    }
}

fn reading(packets: u64, wall: Duration, cpu_ns: u64, lost: f64) -> Cell {
    Cell::of(packets as f64 * (1.0 - lost.max(0.0)), wall, cpu_ns, lost)
}
