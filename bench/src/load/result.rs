//! A load's numbers: taken in intervals, as text and for JSON.
#![forbid(unsafe_code)]

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use super::Setup;
use super::latency::Percentiles;
use super::meter::Counted;
use crate::procstat;
use crate::report::Spread;

/// Intervals of a measurement: how far they are apart says how steady it was.
const INTERVALS: usize = 10;
/// A number is the back-end's only if the front-end had nothing to do for this share of the time at least.
pub const IDLE_MIN: f64 = 0.5;

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// How long, seconds.
    pub seconds: f64,
    /// Millions of packets per second to the back-end, all ports together.
    pub tx_mpps: Option<f64>,
    /// Millions of packets per second from it.
    pub rx_mpps: Option<f64>,
    /// By intervals.
    pub tx_mpps_intervals: Option<Spread>,
    /// By intervals.
    pub rx_mpps_intervals: Option<Spread>,
    /// Bytes that came, virtio-net headers included.
    pub received_bytes: u64,
    /// Packets that should have come and did not.
    pub lost: u64,
    /// Share of the time in which the front-end had nothing to do.
    pub idle_share: f64,
    /// CPU time of the back-end per time, where its process is known.
    pub backend_cpu_share: Option<f64>,
    /// Packets by port, sent or else received, where there are several.
    pub by_port: Vec<u64>,
    /// Notifications that the back-end wanted, warm-up included.
    pub kicks: u64,
    /// Packets that were looked into.
    pub checked: u64,
    /// Round trips.
    pub round_trip: Option<Percentiles>,
}

/// Warms up, then measures in intervals.
pub fn measure(
    setup: &Setup,
    ticks_per_second: f64,
    sends: bool,
    receives: bool,
    mut run: impl FnMut(u64) -> Result<Counted>,
) -> Result<Measured> {
    run((setup.warm_up * ticks_per_second) as u64)?;
    let each = (setup.seconds / INTERVALS as f64 * ticks_per_second) as u64;
    let cpu = CpuTime::start(setup.pid)?;
    let counted = (0..INTERVALS).map(|_| run(each)).collect::<Result<Vec<_>>>()?;
    let sum = |of: fn(&Counted) -> u64| counted.iter().map(of).sum::<u64>();
    let seconds = sum(|c| c.ticks) as f64 / ticks_per_second;
    let mpps = |packets: u64, ticks: u64| packets as f64 * ticks_per_second / ticks as f64 / 1e6;
    let spread = |wanted: bool, of: fn(&Counted) -> u64| {
        wanted.then(|| Spread::of(counted.iter().map(|c| mpps(of(c), c.ticks))))
    };
    let whole = |wanted: bool, of: fn(&Counted) -> u64| wanted.then(|| mpps(sum(of), sum(|c| c.ticks)));
    Ok(Measured {
        seconds,
        tx_mpps: whole(sends, |c| c.sent),
        rx_mpps: whole(receives, |c| c.received),
        tx_mpps_intervals: spread(sends, |c| c.sent),
        rx_mpps_intervals: spread(receives, |c| c.received),
        received_bytes: sum(|c| c.received_bytes),
        lost: sum(|c| c.lost),
        idle_share: sum(|c| c.idle_ticks) as f64 / sum(|c| c.ticks) as f64,
        backend_cpu_share: cpu.share(seconds)?,
        by_port: Vec::new(),
        kicks: 0,
        checked: 0,
        round_trip: None,
    })
}

/// The CPU time of a process from now on, if there is one.
pub struct CpuTime {
    before: Option<(u32, u64)>,
}

impl CpuTime {
    /// From now on.
    pub fn start(pid: Option<u32>) -> Result<Self> {
        let before = pid.map(|pid| procstat::cpu_time_ns(pid).map(|ns| (pid, ns))).transpose()?;
        Ok(Self { before })
    }

    /// Per time.
    pub fn share(&self, seconds: f64) -> Result<Option<f64>> {
        let Some((pid, before)) = self.before else { return Ok(None) };
        Ok(Some((procstat::cpu_time_ns(pid)? - before) as f64 / 1e9 / seconds))
    }
}

/// Text to stdout, JSON to where it is wanted; JSON on stdout stands alone.
pub fn publish(
    setup: &Setup,
    sockets: &[impl AsRef<Path>],
    json: Option<&Path>,
    it: &Measured,
) -> Result<()> {
    let Some(path) = json else {
        print!("{}", text(it));
        return Ok(());
    };
    let sockets: Vec<_> = sockets.iter().map(AsRef::as_ref).collect();
    let all = serde_json::json!({ "sockets": sockets, "setup": setup, "measured": it });
    let all = serde_json::to_string_pretty(&all)?;
    if path == Path::new("-") {
        println!("{all}");
        return Ok(());
    }
    print!("{}", text(it));
    std::fs::write(path, all).with_context(|| path.display().to_string())
}

fn text(it: &Measured) -> String {
    let mut out = String::new();
    for (name, rate) in [("to the back-end", &it.tx_mpps_intervals), ("from it", &it.rx_mpps_intervals)] {
        if let Some(rate) = rate {
            out.push_str(&format!("{name}: {} Mpps\n", rate.show(2)));
        }
    }
    if let Some(p) = &it.round_trip {
        let us = |ns: u64| ns as f64 / 1e3;
        out.push_str(&format!(
            "round trips: {}, p50 {:.2} us, p90 {:.2}, p99 {:.2}, p99.9 {:.2}, longest {:.1}; {} lost\n",
            p.packets,
            us(p.p50_ns),
            us(p.p90_ns),
            us(p.p99_ns),
            us(p.p999_ns),
            us(p.max_ns),
            p.lost
        ));
    } else {
        let whose = if it.idle_share >= IDLE_MIN { "the back-end's limit" } else { "the front-end's limit" };
        let (idle, seconds) = (it.idle_share * 100.0, it.seconds);
        out.push_str(&format!("front-end idle {idle:.0} % of {seconds:.1} s: {whose}; {} kicks\n", it.kicks));
    }
    if it.received_bytes > 0 {
        let rate = it.received_bytes as f64 / it.seconds / 1e9;
        out.push_str(&format!("received: {rate:.2} GB/s with virtio-net headers\n"));
    }
    if it.by_port.len() > 1 {
        let (min, max) = (it.by_port.iter().min().unwrap_or(&0), it.by_port.iter().max().unwrap_or(&0));
        let mean = it.by_port.iter().sum::<u64>() as f64 / it.by_port.len() as f64;
        out.push_str(&format!("packets by port: {min} to {max}, mean {mean:.0}\n"));
    }
    if let Some(share) = it.backend_cpu_share {
        out.push_str(&format!("back-end: {share:.3} of a CPU\n"));
    }
    if it.lost > 0 {
        out.push_str(&format!("{} packets lost\n", it.lost));
    }
    if it.checked > 0 {
        out.push_str(&format!("{} packets looked into: all good\n", it.checked));
    }
    out
}
