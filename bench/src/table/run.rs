//! One measurement of one contender.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::limit;
use super::rows::Work;
use super::score::LIMIT;
use super::sides::{Contender, Need, Running};
use crate::compare::{self, WARM_UP};
use crate::load::{self, Setup, Way};
use crate::{interrupt, procstat};

/// A TSO frame: the longest IPv4 packet in Ethernet.
const TSO_FRAME: usize = 65_549;
/// Packets of a TSO loop in flight.
const TSO_IN_FLIGHT: usize = 32;
/// Packets that testpmd starts a loop with, each time.
const TESTPMD_BURST: u32 = 32;
const LOW_RATE: f64 = 10_000.0;
/// Ports that share a load.
const SHARING: usize = 64;
/// Ports beside, and with, a greedy one.
const GREEDY_PORTS: usize = 16;
/// What each of the others is to send.
const MODEST_RATE: f64 = 20_000.0;
/// Idle ports whose memory is looked at.
const IDLE_PORTS: usize = 256;
/// How long idle ports settle, and are watched.
const SETTLE: Duration = Duration::from_secs(1);
const WATCH: Duration = Duration::from_secs(3);

/// A number of one row: which row of the work, whose (`None`: the contender's), the number, the front-end's idle share.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// Index into the rows of the work.
    pub row: usize,
    /// Another column than the contender's.
    pub column: Option<&'static str>,
    /// The number.
    pub value: f64,
    /// The front-end's idle share.
    pub idle: Option<f64>,
    /// Share of the CPUs that others took.
    pub others: f64,
}

impl Reading {
    fn of(row: usize, value: f64) -> Self {
        Self { row, column: None, value, idle: None, others: 0.0 }
    }
}

impl Work {
    /// What a back-end must be for it.
    pub fn need(self) -> Need {
        match self {
            Self::Open { way, frame, .. } => Self::need_of(way, frame),
            Self::TestpmdOpen(way) => Self::need_of(way, 64),
            Self::Loop { .. } | Self::TestpmdLoop(_) | Self::Latency => Need::Peers,
            Self::Tso => Need::Peers,
            Self::LowRate => Need::Sink,
            Self::Ports => Need::Sinks(IDLE_PORTS),
            Self::Sharing => Need::Sinks(SHARING),
        }
    }

    fn need_of(way: Way, frame: usize) -> Need {
        match way {
            Way::Tx => Need::Sink,
            Way::Rx => Need::Source(frame),
            Way::Both => Need::SinkAndSource(frame),
        }
    }

    /// Whether this contender is measured here.
    pub fn takes(self, contender: &Contender) -> bool {
        let only_ours = matches!(self, Self::Tso | Self::Ports | Self::Sharing);
        contender.can_be(self.need()) && (matches!(contender, Contender::Ours(_)) || !only_ours)
    }

    /// Does it.
    pub fn measure(self, contender: &Contender, seconds: f64) -> Result<Vec<Reading>> {
        // Where DPDK polls by nature, ours may, too.
        let poll = if self == Self::Latency { "always" } else { "auto" };
        let mut it = contender.start(self.need(), poll)?;
        let result = self.with(&it, contender, seconds);
        if let (Err(e), Some(how)) = (&result, it.backend.ended()) {
            anyhow::bail!("{e:#}; {how}");
        }
        result
    }

    fn with(self, it: &Running, contender: &Contender, seconds: f64) -> Result<Vec<Reading>> {
        let setup = Setup { seconds, ..Setup::default() };
        let pids = [std::process::id(), it.backend.pid()];
        let undisturbed = |run: &mut dyn FnMut() -> Result<Vec<Reading>>| {
            let (mut readings, others) = compare::undisturbed(&pids, run)?;
            readings.iter_mut().for_each(|r| r.others = others);
            Ok(readings)
        };
        match self {
            Self::Open { way, packed, frame, touch } => {
                let setup = Setup { packed, frame, touch, ..setup };
                undisturbed(&mut || {
                    let m = load::run_open(&setup, &it.sockets, way, &[None])?;
                    let rate = match way {
                        Way::Tx => m.tx_mpps,
                        Way::Rx => m.rx_mpps,
                        // The slower of both.
                        Way::Both => m.tx_mpps.zip(m.rx_mpps).map(|(t, r)| t.min(r)),
                    };
                    let value = rate.context("a rate")?;
                    Ok(vec![Reading { idle: Some(m.idle_share), ..Reading::of(0, value) }])
                })
            }
            Self::Loop { packed, frame, in_flight } => {
                let setup = Setup { packed, frame, ..setup };
                undisturbed(&mut || {
                    let m = load::run_closed(&setup, &it.sockets, in_flight, false)?;
                    // Each way.
                    let value = m.rx_mpps.context("a rate")? / 2.0;
                    Ok(vec![Reading { idle: Some(m.idle_share), ..Reading::of(0, value) }])
                })
            }
            Self::Tso => undisturbed(&mut || tso(&setup, it)),
            Self::Latency => undisturbed(&mut || {
                let m = load::run_latency(&setup, &it.sockets, None)?;
                let p = m.round_trip.context("round trips")?;
                Ok(vec![Reading::of(0, p.p50_ns as f64 / 1e3), Reading::of(1, p.p99_ns as f64 / 1e3)])
            }),
            Self::LowRate => low_rate(&setup, it),
            Self::TestpmdOpen(way) => testpmd_open(it, way, seconds),
            Self::TestpmdLoop(bursts) => testpmd_loop(it, bursts, seconds),
            Self::Sharing => undisturbed(&mut || sharing(&setup, it)),
            Self::Ports => idle_ports(contender, it),
        }
    }
}

fn tso(setup: &Setup, it: &Running) -> Result<Vec<Reading>> {
    let len = TSO_FRAME + crate::packet::HEADER;
    let setup = Setup { frame: TSO_FRAME, receive_len: len as u32, ..setup.clone() };
    let m = load::run_closed(&setup, &it.sockets, TSO_IN_FLIGHT, true)?;
    let value = m.received_bytes as f64 / m.seconds / 1e9;
    // The back-end sleeps meanwhile, or looks a little while for packets: after that the CPU is free.
    interrupt::sleep(WARM_UP)?;
    let limit = limit::copying(len, setup.ring_size, Duration::from_secs_f64(setup.seconds))?;
    Ok(vec![
        Reading { idle: Some(m.idle_share), ..Reading::of(0, value) },
        Reading { column: Some(LIMIT), ..Reading::of(0, limit) },
    ])
}

fn low_rate(setup: &Setup, it: &Running) -> Result<Vec<Reading>> {
    let setup = Setup { pid: Some(it.backend.pid()), ..setup.clone() };
    let m = load::run_open(&setup, &it.sockets, Way::Tx, &[Some(LOW_RATE)])?;
    let sent = m.tx_mpps.context("a rate")? * 1e6;
    ensure!(sent > 0.95 * LOW_RATE, "only {sent:.0} of {LOW_RATE} packets/s were sent");
    let busy = m.backend_cpu_share.context("CPU time")?;
    let _held = load::hold(&setup, &it.sockets)?;
    Ok(vec![Reading::of(0, busy), Reading::of(1, cpu_when_idle(it.backend.pid())?)])
}

fn cpu_when_idle(pid: u32) -> Result<f64> {
    interrupt::sleep(SETTLE)?;
    let (start, before) = (Instant::now(), procstat::cpu_time_ns(pid)?);
    interrupt::sleep(WATCH)?;
    Ok((procstat::cpu_time_ns(pid)? - before) as f64 / start.elapsed().as_nanos() as f64)
}

fn testpmd_open(it: &Running, way: Way, seconds: f64) -> Result<Vec<Reading>> {
    let mut frontend = compare::start_frontend(&it.sockets[0], "")?;
    frontend.start_forwarding(if way == Way::Tx { "txonly" } else { "rxonly" })?;
    let pids = [std::process::id(), it.backend.pid(), frontend.pid()];
    interrupt::sleep(WARM_UP)?;
    let (value, others) = compare::undisturbed(&pids, || {
        let count = |f: &mut crate::testpmd::Testpmd| {
            f.stats(0).map(|s| if way == Way::Tx { s.tx_packets } else { s.rx_packets })
        };
        let (before, start) = (count(&mut frontend)?, Instant::now());
        interrupt::sleep(Duration::from_secs_f64(seconds))?;
        let packets = count(&mut frontend)? - before;
        ensure!(packets > 0, "nothing moved");
        Ok(packets as f64 / start.elapsed().as_secs_f64() / 1e6)
    })?;
    Ok(vec![Reading { others, ..Reading::of(0, value) }])
}

fn testpmd_loop(it: &Running, bursts: u32, seconds: f64) -> Result<Vec<Reading>> {
    let mut frontend = compare::start_frontend_on(&it.sockets, "")?;
    frontend.start_loop(bursts)?;
    let pids = [std::process::id(), it.backend.pid(), frontend.pid()];
    interrupt::sleep(WARM_UP)?;
    let (value, others) = compare::undisturbed(&pids, || {
        let mut count =
            || -> Result<u64> { Ok(frontend.stats(0)?.rx_packets + frontend.stats(1)?.rx_packets) };
        let (before, start) = (count()?, Instant::now());
        interrupt::sleep(Duration::from_secs_f64(seconds))?;
        let packets = count()? - before;
        ensure!(packets > 0, "nothing goes round: {} packets were to", bursts * TESTPMD_BURST);
        Ok(packets as f64 / 2.0 / start.elapsed().as_secs_f64() / 1e6)
    })?;
    Ok(vec![Reading { others, ..Reading::of(0, value) }])
}

fn sharing(setup: &Setup, it: &Running) -> Result<Vec<Reading>> {
    let rate = |count: usize| {
        let sockets = &it.sockets[..count];
        load::run_open(setup, sockets, Way::Tx, &vec![None; count])
    };
    let (one, all) = (rate(1)?, rate(SHARING)?);
    let share = all.tx_mpps.context("a rate")? / one.tx_mpps.context("a rate")?;
    let slowest = |by_port: &[u64]| by_port.iter().min().copied().unwrap_or(0) as f64;
    let mean = all.by_port.iter().sum::<u64>() as f64 / all.by_port.len() as f64;
    let mut rates = vec![Some(MODEST_RATE); GREEDY_PORTS];
    rates[0] = None;
    let greedy = load::run_open(setup, &it.sockets[..GREEDY_PORTS], Way::Tx, &rates)?;
    let due = MODEST_RATE * greedy.seconds;
    Ok(vec![
        Reading { idle: Some(all.idle_share), ..Reading::of(0, share) },
        Reading::of(1, slowest(&all.by_port) / mean),
        Reading::of(2, slowest(&greedy.by_port[1..]) / due),
    ])
}

fn idle_ports(contender: &Contender, many: &Running) -> Result<Vec<Reading>> {
    let setup = Setup::default();
    let resident = |it: &Running| procstat::resident(it.backend.pid()).map(|r| (r.anon + r.file) as f64);
    let of_one = {
        let one = contender.start(Need::Sinks(1), "auto")?;
        let _held = load::hold(&setup, &one.sockets)?;
        interrupt::sleep(SETTLE)?;
        resident(&one)?
    };
    let _held = load::hold(&setup, &many.sockets)?;
    let cpu = cpu_when_idle(many.backend.pid())?;
    let each = (resident(many)? - of_one) / (IDLE_PORTS - 1) as f64;
    Ok(vec![Reading::of(0, each), Reading::of(1, cpu)])
}
