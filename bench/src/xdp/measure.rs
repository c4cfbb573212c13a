//! The measurements on a veth. What counts is what the far end or the front-end received, and what CPU time the process
//! used; from DPDK's, the polling that found nothing is taken off in two ways.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::wire::Link;
use nix::time::{ClockId, clock_gettime};

use crate::compare::{BACKEND_CPU, BackEnd, Cell};
use crate::generate::Generator;
use crate::interrupt;
use crate::procstat;
use crate::testpmd::Testpmd;

/// How long the last packets may take to the front-end.
const SETTLE: Duration = Duration::from_millis(100);
/// How long DPDK's empty polling is timed.
const CALIBRATION: Duration = Duration::from_millis(500);

/// Guest to veth: how many packets the far end gets while the front-end (or the loop itself) sends all it can.
pub fn sending(backend: &BackEnd, far: &Link, window: Duration) -> Result<Cell> {
    let (start, before, cpu) = (Instant::now(), far.counters()?, procstat::cpu_time_ns(backend.pid())?);
    interrupt::sleep(window)?;
    let (wall, after) = (start.elapsed(), far.counters()?);
    let cpu = procstat::cpu_time_ns(backend.pid())? - cpu;
    let packets = after.rx_packets - before.rx_packets;
    ensure!(packets > 0, "nothing came out of the veth");
    Ok(Cell::of(packets as f64, wall, cpu, 0.0))
}

/// What a packet to the guest cost.
pub struct Received {
    /// Rate and CPU time. Of DPDK's, `work_ns` is what testpmd's own clock says about polls that found packets.
    pub cell: Cell,
    /// The same CPU time per packet in another way, ns: of DPDK's, all but as many empty polls as were counted; of the
    /// others', all that the CPU did.
    pub check_ns: f64,
    /// CPU time of the generator per packet, ns: making it, the veth, and what of its reception falls to this CPU.
    pub generator_ns: f64,
}

/// Where packets to the guest end.
pub enum Sink<'a> {
    /// A front-end that receives.
    Guest(&'a mut Testpmd),
    /// The loop itself, which the near end's counter must stand in for.
    Loop(&'a Link),
}

impl Sink<'_> {
    /// Its process, if it is one of its own.
    pub fn pid(&self) -> Option<u32> {
        match self {
            Self::Guest(testpmd) => Some(testpmd.pid()),
            Self::Loop(_) => None,
        }
    }

    fn count(&mut self) -> Result<u64> {
        match self {
            Self::Guest(testpmd) => Ok(testpmd.stats(0)?.rx_packets),
            Self::Loop(link) => Ok(link.counters()?.rx_packets),
        }
    }
}

/// Veth to guest: `pps` packets a second.
pub fn receiving(
    backend: &mut BackEnd,
    generator: &mut Generator,
    pps: u64,
    window: Duration,
    sink: &mut Sink,
) -> Result<Received> {
    let empty_poll_ns = backend.as_testpmd().map(empty_poll_ns).transpose()?;
    let received = sink.count()?;
    let pid = backend.pid();
    if let Some(testpmd) = backend.as_testpmd() {
        testpmd.clear_forward_stats()?;
    }
    let (start, own, idle) = (Instant::now(), thread_time()?, procstat::idle_ns(BACKEND_CPU)?);
    let cpu = procstat::cpu_time_ns(pid)?;
    let sent = generator.paced_in_time(pps, window)?;
    let cpu = procstat::cpu_time_ns(pid)? - cpu;
    let busy = start.elapsed().as_nanos() as f64 - (procstat::idle_ns(BACKEND_CPU)? - idle) as f64;
    let (wall, own) = (start.elapsed(), thread_time()? - own);
    let polls = backend.as_testpmd().map(Testpmd::forward_stats).transpose()?;
    std::thread::sleep(SETTLE);
    let got = sink.count()? - received;
    ensure!(got > 0, "nothing reached the guest");
    let mut cell = Cell::of(got as f64, wall, cpu, 1.0 - got as f64 / sent as f64);
    let generator_ns = own.as_nanos() as f64 / got as f64;
    let mut check_ns = busy / got as f64;
    if let Some((polls, empty_poll_ns)) = polls.zip(empty_poll_ns) {
        let empty = polls.rounds.saturating_sub(polls.bursts);
        cell.work_ns = polls.busy_ns() / got as f64;
        check_ns = (cpu as f64 - empty as f64 * empty_poll_ns) / got as f64;
        eprintln!(
            "    DPDK: {:.1} packets a burst, an empty poll of {empty_poll_ns:.0} ns",
            polls.packets as f64 / polls.bursts.max(1) as f64
        );
    }
    Ok(Received { cell, check_ns, generator_ns })
}

/// CPU time of the calling thread.
fn thread_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

/// What one round of DPDK's loop takes that finds nothing to do.
fn empty_poll_ns(testpmd: &mut Testpmd) -> Result<f64> {
    testpmd.clear_forward_stats()?;
    let start = procstat::cpu_time_ns(testpmd.pid())?;
    interrupt::sleep(CALIBRATION)?;
    let spent = procstat::cpu_time_ns(testpmd.pid())? - start;
    let polls = testpmd.forward_stats()?;
    ensure!(polls.rounds > 0, "testpmd does not poll");
    ensure!(polls.bursts == 0, "{} packets came while nothing was sent", polls.packets);
    Ok(spent as f64 / polls.rounds as f64)
}

/// Has DPDK count what [`receiving`] needs.
pub fn record(backend: &mut BackEnd) -> Result<()> {
    backend.as_testpmd().map_or(Ok(()), Testpmd::record_polls).context("counting DPDK's polls")
}
