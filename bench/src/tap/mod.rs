//! `vubench tap`: back-ends with a tap uplink against each other, in turn, in one run.
//!
//! Here: what is measured in which order. `sides` names the contenders, `measure` takes the numbers, `idle` looks at ports
//! without traffic. Each back-end makes its own tap, with no address and no IPv6: frames to a foreign
//! MAC are dropped in ip_rcv.
#![forbid(unsafe_code)]

mod idle;
mod measure;
mod sides;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use lab::wire::Link;

use crate::compare::{self, BackEnd, Cell, Goal, Heading, Place, Report, Rows, SIZES, Unit, WARM_UP};
use crate::interrupt;
use crate::raw::{Direction, Engine};
use crate::testpmd::Testpmd;
use sides::Side;

const TAP: &str = "bench0";
/// The kernel frees places of a tap's queue in batches, so a queue of exactly the right length is too short.
const QUEUE_SPARE: u32 = 64;
const GONE_TIMEOUT: Duration = Duration::from_secs(10);
/// Columns, as `Side::name` calls them.
const NAMES: [&str; 4] = ["bare", "bare-uring", "dpdk", "ours"];
/// To reach in every row: DPDK's rate, or CPU time, and so little more than the bare loop per packet, in ns.
const GOAL: Goal = Goal { ratio_min: 1.0, above_bare_ns_max: Some(50.0) };

/// A row: what is measured, with the frame length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    /// Guest to tap, as many as possible.
    Transmit(usize),
    /// Tap to guest, as many as possible.
    Receive(usize),
    /// Tap to guest at a fixed rate: CPU time per packet.
    ReceiveCpu(usize),
}

impl Rows for What {
    fn title(self) -> (&'static str, usize) {
        match self {
            Self::Transmit(size) => ("guest->tap", size),
            Self::Receive(size) => ("tap->guest", size),
            Self::ReceiveCpu(size) => ("tap->guest, fixed rate", size),
        }
    }

    fn unit(self) -> Unit {
        if matches!(self, Self::ReceiveCpu(_)) { Unit::CpuNs } else { Unit::Mpps }
    }

    fn goal(self) -> Option<Goal> {
        Some(GOAL)
    }
}

#[derive(clap::Args)]
pub struct Args {
    /// Our back-end; rows about it are left out if the file is missing
    #[arg(long, default_value = "target/release/vhost-user-net")]
    backend_bin: PathBuf,
    /// Rounds; the sides take turns in each
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of each measurement of a rate
    #[arg(long, default_value_t = 1.5)]
    seconds: f64,
    /// Frames put into the tap before the back-end may read them
    #[arg(long, default_value_t = 200_000)]
    prefill: u64,
    /// Fixed rate for CPU time per packet, packets per second
    #[arg(long, default_value_t = 200_000)]
    pps: u64,
    /// How long idle ports are watched
    #[arg(long, default_value_t = 10.0)]
    idle_seconds: f64,
    /// Leave DPDK's back-end out
    #[arg(long)]
    no_dpdk: bool,
    /// Write the JSON report here
    #[arg(long)]
    json: Option<PathBuf>,
}

pub fn run(args: &Args) -> Result<()> {
    let _place = Place::take()?;
    let mut report = Report::new(Heading { columns: &NAMES, rounds: args.rounds, pps: args.pps, text: "" });
    let mut sides = vec![Side::Bare, Side::BareUring];
    if args.no_dpdk {
        report.note("DPDK's back-end was left out (--no-dpdk)");
    } else {
        sides.push(Side::Dpdk);
    }
    if args.backend_bin.exists() {
        sides.push(Side::Ours(std::path::absolute(&args.backend_bin)?));
    } else {
        report.note(&format!("ours was left out: there is no {}", args.backend_bin.display()));
    }
    compare::take_turns(&mut report, args.rounds, &sides, Side::name, |side, cells| {
        one_round(args, side, cells)
    })?;
    if let Some(Side::Ours(program)) = sides.last() {
        match idle::watch(program, Duration::from_secs_f64(args.idle_seconds)) {
            Ok(idle) => report.extra("idle", &idle, &idle.text())?,
            Err(e) => {
                interrupt::check()?;
                report.note(&format!("idle ports: {e:#}"));
            }
        }
    }
    compare::publish(&report, args.json.as_deref())
}

/// All measurements of one side. Back-end and front-end are started afresh.
fn one_round(args: &Args, side: &Side, cells: &mut Vec<(What, Cell)>) -> Result<()> {
    let link = Link::named(TAP);
    interrupt::wait_for("the previous tap to go", GONE_TIMEOUT, || Ok(!link.exists()))?;
    let window = Duration::from_secs_f64(args.seconds);
    match side {
        Side::Bare | Side::BareUring => {
            let engine = if *side == Side::Bare { Engine::Plain } else { Engine::Uring };
            for size in SIZES {
                let writer = sides::bare(engine, Direction::Tx, size, TAP)?;
                interrupt::sleep(WARM_UP)?;
                cells.push((What::Transmit(size), measure::writing(&writer, &link, window)?));
                drop(writer);
                interrupt::wait_for("the tap to go", GONE_TIMEOUT, || Ok(!link.exists()))?;
                let mut reader = sides::bare(engine, Direction::Rx, size, TAP)?;
                link.set_queue_len(args.prefill as u32 + QUEUE_SPARE)?;
                interrupt::sleep(WARM_UP)?;
                cells.push((
                    What::Receive(size),
                    measure::draining(&mut reader, &link, size, args.prefill, None)?,
                ));
                cells.push((
                    What::ReceiveCpu(size),
                    measure::at_rate(&reader, &link, size, args.pps, window, None)?,
                ));
                drop(reader);
                interrupt::wait_for("the tap to go", GONE_TIMEOUT, || Ok(!link.exists()))?;
            }
        }
        Side::Dpdk | Side::Ours(_) => {
            let folder = tempfile::tempdir()?;
            let socket = folder.path().join("vhost.sock");
            let mut backend = side.start(&socket, TAP)?;
            let mut frontend = compare::start_frontend(&socket, "")?;
            let result = through_a_guest(args, &mut backend, &mut frontend, &link, cells);
            if let (Err(e), Some(how)) = (&result, backend.ended()) {
                anyhow::bail!("{e:#}; {how}");
            }
            result?;
            // The front-end goes first, as a guest would that shuts down.
            drop(frontend);
        }
    }
    Ok(())
}

fn through_a_guest(
    args: &Args,
    backend: &mut BackEnd,
    frontend: &mut Testpmd,
    link: &Link,
    cells: &mut Vec<(What, Cell)>,
) -> Result<()> {
    let window = Duration::from_secs_f64(args.seconds);
    link.set_queue_len(args.prefill as u32 + QUEUE_SPARE)?;
    for size in SIZES {
        frontend.set_frame_size(size)?;
        eprintln!("  guest->tap {size} B");
        frontend.start_forwarding("txonly")?;
        interrupt::sleep(WARM_UP)?;
        cells.push((What::Transmit(size), measure::writing(backend, link, window)?));
        frontend.stop_forwarding()?;
    }
    frontend.start_forwarding("rxonly")?;
    for size in SIZES {
        interrupt::sleep(WARM_UP)?;
        eprintln!("  tap->guest {size} B");
        let reading = measure::draining(backend, link, size, args.prefill, Some(frontend))?;
        cells.push((What::Receive(size), reading));
        eprintln!("  tap->guest {size} B, {} packets/s", args.pps);
        let reading = measure::at_rate(backend, link, size, args.pps, window, Some(frontend))?;
        cells.push((What::ReceiveCpu(size), reading));
    }
    frontend.stop_forwarding()
}
