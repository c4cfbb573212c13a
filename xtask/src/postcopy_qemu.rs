//! `cargo xtask bench postcopy-qemu`: how long a real guest's packets take to be back at full rate after a postcopy
//! migration, with ours and with DPDK's net_vhost on the destination, by turns.
//!
//! The link between the QEMUs is `lab::Relay`, in user space: 1 ms and 1 Gbit/s each way, whether or not the kernel has
//! netem. The guest echoes numbered packets; its receive buffers are whole pages (no mergeable buffers, large frames
//! allowed), a ring of them. Time starts when the source's guest stops (QEMU's STOP event).
//!
//! A guest's CPUs wait for their own pages, one after the other, whatever the back-end does. So that its part can be seen,
//! precopy goes over all memory first, and QEMU's blocktime stands beside each number.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use lab::{
    Flood, Lab, PATIENCE, Phases, Place, Postcopy, PostcopyReport, Qemu, QemuConfig, Rate, Relay,
    bridged_with, until,
};

const TAPS: [&str; 2] = ["tap0", "tap1"];
const LINK_DELAY: Duration = Duration::from_millis(1);
/// Bytes per second: 1 Gbit/s.
const LINK_RATE: u64 = 125_000_000;
const ECHO_BYTES: usize = 64;
/// What only one of the back-ends offers, the guest must not have chosen; and no mergeable buffers.
const WITHOUT: [&str; 6] =
    ["mrg_rxbuf=off", "guest_ufo=off", "host_ufo=off", "host_tso4=off", "host_tso6=off", "host_ecn=off"];
/// MiB that the guest changes before the switch, so that the background stream has something to bring.
const CHURN_MIB: u32 = 128;
/// Bytes per second of precopy meanwhile.
const TRICKLE: u64 = 1 << 20;
/// Passes of precopy before the switch.
const PASSES: u64 = 2;
/// The rate before the migration is taken over this time, and compared in windows after it.
const BEFORE: Duration = Duration::from_secs(2);
const WINDOW: Duration = Duration::from_millis(100);
const STEP: Duration = Duration::from_millis(10);
/// Full rate is this share of the rate before.
const FULL: f64 = 0.9;
/// Full rate must come within this time.
const SIGHT: Duration = Duration::from_secs(20);

/// Arguments of `cargo xtask bench postcopy-qemu`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Rounds, each with both back-ends
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Packets per second to the guest and back
    #[arg(long, default_value_t = 6000)]
    rate: u64,
    /// Bytes per second of the background stream, so that pages which are asked for have the link to themselves; 0: no limit
    #[arg(long, default_value_t = 16_000_000)]
    background: u64,
    /// Entries of the guest's receive ring: 256, 512 or 1024
    #[arg(long, default_value_t = 256)]
    ring: u32,
    /// Another build of our back-end than the release build
    #[arg(long)]
    pub backend_bin: Option<PathBuf>,
}

struct Outcome {
    first: Duration,
    full: Duration,
    before: f64,
    report: PostcopyReport,
    pages: u64,
}

/// Measures and prints.
pub fn run(options: &Options, release: &Path) -> Result<()> {
    let ours_bin = options.backend_bin.as_deref().unwrap_or(release);
    println!("link: {} ms, {} Mbit/s, in user space", LINK_DELAY.as_millis(), LINK_RATE * 8 / 1_000_000);
    let lab = Lab::open()?;
    let (mut ours, mut dpdk) = (Vec::new(), Vec::new());
    for round in 1..=options.rounds {
        for is_dpdk in [false, true] {
            let outcome = once(&lab, ours_bin, is_dpdk, options, round)
                .inspect_err(|_| eprintln!("{}", lab.tails()))?;
            let name = if is_dpdk { "DPDK" } else { "ours" };
            let (blocked, _) = outcome.report.blocktime_ms.clone().unwrap_or_default();
            println!(
                "{round} {name}: first echo after {:4.0} ms, full rate ({:.0}/s before) after {:5.0} ms; guest CPUs blocked \
                 {blocked} ms, {} pages asked for ({} by our rings), {} MB after the move in {} ms",
                milliseconds(outcome.first),
                outcome.before,
                milliseconds(outcome.full),
                outcome.report.requests,
                outcome.pages,
                outcome.report.postcopy_bytes / 1_000_000,
                outcome.report.total_ms
            );
            if is_dpdk { &mut dpdk } else { &mut ours }.push(milliseconds(outcome.full));
        }
    }
    let (ours, dpdk) = (median(ours), median(dpdk));
    println!(
        "full rate, median: ours {ours:.0} ms, DPDK {dpdk:.0} ms, {:.1} times sooner",
        dpdk / ours.max(1.0)
    );
    Ok(())
}

fn once(lab: &Lab, binary: &Path, is_dpdk: bool, options: &Options, round: u32) -> Result<Outcome> {
    let netns = bridged_with(&[(TAPS[0], false), (TAPS[1], is_dpdk)])?;
    let guest = |config: &mut QemuConfig, place: &str| {
        config.name = format!("{place}-{round}-{}", u8::from(is_dpdk));
        config.memory_mib = 512;
        config.device.extend(WITHOUT.map(str::to_owned));
        config.device.push(format!("rx_queue_size={}", options.ring));
    };
    let mut source = Place::start_with(lab, &netns, TAPS[0], |backend, config| {
        guest(config, "source");
        backend.binary = Some(binary.to_owned());
    })?;
    let mut destination = Place::start_with(lab, &netns, TAPS[1], |backend, config| {
        guest(config, "destination");
        config.is_incoming = true;
        backend.binary = Some(binary.to_owned());
        if is_dpdk {
            backend.dpdk = Some(",postcopy-support=1".into());
        }
    })?;
    let echoed = Flood::echoed(&netns, ECHO_BYTES, options.rate)?;
    echoed.wait_arrivals(options.rate, PATIENCE)?;

    let far = Postcopy::address(lab, &destination.qemu);
    let link = Relay::start(&lab.path(&format!("link-{round}-{is_dpdk}")), &far, LINK_DELAY, LINK_RATE)?;
    let postcopy = Postcopy {
        bandwidth: LINK_RATE,
        postcopy_bandwidth: options.background,
        downtime_ms: 1,
        via: Some(link.uri()),
    };
    std::thread::sleep(BEFORE);
    let before = echoed.rate().between(Instant::now() - BEFORE, Instant::now());
    postcopy.start(lab, &mut source.qemu, &mut destination.qemu)?;
    until("precopy's passes", PATIENCE, || {
        let state = source.qemu.migration()?;
        ensure!(state["status"] == "active", "precopy is {}", state["status"]);
        Ok((state["ram"]["dirty-sync-count"].as_u64() > Some(PASSES)).then_some(()))
    })?;
    // All the memory that the guest uses has been sent once; now it changes much of it, and precopy hardly goes on.
    Postcopy { bandwidth: TRICKLE, ..postcopy.clone() }.apply(&mut source.qemu)?;
    source
        .qemu
        .run(&format!("dd if=/dev/zero bs=1M count={CHURN_MIB} 2>/dev/null | tr '\\0' x >/tmp/churn"))?;
    postcopy.apply(&mut source.qemu)?;
    postcopy.switch(&mut source.qemu)?;
    let moved = moment_of_stop(&mut source.qemu)?;
    let full = until("full rate", SIGHT, || Ok(full_rate(&echoed.rate(), moved, before)))?;
    Postcopy { postcopy_bandwidth: 0, ..postcopy.clone() }.apply(&mut source.qemu)?;
    let report = postcopy.finish(&mut source.qemu, &mut destination.qemu)?;
    let first = echoed.rate().first_after(moved).context("no packet came after the move")?;
    echoed.stop()?;
    let pages = Phases::of(&destination.backend).pages;
    Ok(Outcome { first: first - moved, full, before, report, pages })
}

/// When the source's guest stopped, on this process's clock.
fn moment_of_stop(source: &mut Qemu) -> Result<Instant> {
    let event = source.qmp.wait_event("STOP", PATIENCE)?;
    let part = |name: &str| event["timestamp"][name].as_u64().context("an event without time");
    let at = Duration::from_secs(part("seconds")?) + Duration::from_micros(part("microseconds")?);
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Instant::now().checked_sub(now.saturating_sub(at)).context("the event is older than the clock")
}

/// How long after `from` the first window begins in which packets came at full rate.
fn full_rate(rate: &Rate, from: Instant, before: f64) -> Option<Duration> {
    let mut at = from;
    while at + WINDOW < Instant::now() {
        if rate.between(at, at + WINDOW) >= FULL * before {
            return Some(at - from);
        }
        at += STEP;
    }
    None
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
