//! `vubench tap`: back-ends with a tap uplink against each other, in turn, in one run.
//!
//! Here: what is measured in which order, and cleaning up. `sides` starts the contenders, `measure` takes the numbers,
//! `idle` looks at ports without traffic, `table` judges and prints.
//!
//! ```text
//!   CPU 0: the contender            CPU 1: everything else
//!   back-end ◄── vhost-user ──► testpmd, virtio-user (txonly or rxonly)
//!      │
//!     tap  ── own network name space, no address, no IPv6: frames to a foreign MAC are dropped in ip_rcv
//!      └────◄── AF_PACKET generator
//! ```
#![forbid(unsafe_code)]

mod idle;
mod measure;
mod sides;
mod table;

use std::path::PathBuf;
use std::time::Duration;

use crate::netspace::NetSpace;
use crate::testpmd::{self, HugePages, Memory, Testpmd, TestpmdConfig};
use anyhow::{Context, Result};
use lab::wire::Link;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::interrupt;
use crate::raw::{Direction, Engine};
use crate::report::Spread;
use measure::Reading;
use sides::{BackEnd, Side};
use table::{Cell, Report, What};

/// The contender's CPU.
const BACKEND_CPU: usize = 0;
/// The CPU of the front-end, the generator and this program.
const OTHER_CPU: usize = 1;
/// For two testpmd of 192 MiB, in pages of 2 MiB, and some for their own tables.
const HUGEPAGES: u64 = 256;
const MEMORY_MIB: u32 = 192;
const TAP: &str = "bench0";
const SIZES: [usize; 2] = [64, 1500];
/// The kernel frees places of a tap's queue in batches, so a queue of exactly the right length is too short.
const QUEUE_SPARE: u32 = 64;
const WARM_UP: Duration = Duration::from_millis(400);
const GONE_TIMEOUT: Duration = Duration::from_secs(10);

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
    interrupt::install()?;
    testpmd::available()?;
    let mut cpus = CpuSet::new();
    cpus.set(OTHER_CPU)?;
    sched_setaffinity(Pid::from_raw(0), &cpus).context("this comparison needs two CPUs, 0 and 1")?;
    let _pages = HugePages::reserve(HUGEPAGES)?;
    let _space = NetSpace::enter()?;

    let mut report = Report::new(args.rounds, args.pps);
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
    for round in 0..args.rounds {
        for i in 0..sides.len() {
            let side = &sides[(i + round) % sides.len()];
            eprintln!("round {}/{}: {}", round + 1, args.rounds, side.name());
            let mut cells = Vec::new();
            let result = one_round(args, side, &mut cells);
            cells.into_iter().for_each(|(what, cell)| report.add(side, what, cell));
            // One side that fails (once) must not take the others' numbers with it.
            if let Err(e) = result {
                interrupt::check()?;
                report.note(&format!("round {}, {}: {e:#}", round + 1, side.name()));
            }
        }
    }
    if let Some(Side::Ours(program)) = sides.last() {
        match idle::watch(program, Duration::from_secs_f64(args.idle_seconds)) {
            Ok(idle) => report.idle(idle),
            Err(e) => {
                interrupt::check()?;
                report.note(&format!("idle ports: {e:#}"));
            }
        }
    }
    print!("{}", report.text());
    if let Some(path) = &args.json {
        std::fs::write(path, report.json()?).with_context(|| path.display().to_string())?;
        println!("JSON: {}", path.display());
    }
    Ok(())
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
                let writer = BackEnd::bare(engine, Direction::Tx, size, TAP)?;
                interrupt::sleep(WARM_UP)?;
                cells.push((What::Transmit(size), measure::writing(&writer, &link, window)?.into()));
                drop(writer);
                interrupt::wait_for("the tap to go", GONE_TIMEOUT, || Ok(!link.exists()))?;
                let mut reader = BackEnd::bare(engine, Direction::Rx, size, TAP)?;
                link.set_queue_len(args.prefill as u32 + QUEUE_SPARE)?;
                interrupt::sleep(WARM_UP)?;
                cells.push((
                    What::Receive(size),
                    measure::draining(&mut reader, &link, size, args.prefill, None)?.into(),
                ));
                cells.push((
                    What::ReceiveCpu(size),
                    measure::at_rate(&reader, &link, size, args.pps, window, None)?.into(),
                ));
                drop(reader);
                interrupt::wait_for("the tap to go", GONE_TIMEOUT, || Ok(!link.exists()))?;
            }
        }
        Side::Dpdk | Side::Ours(_) => {
            let folder = tempfile::tempdir()?;
            let socket = folder.path().join("vhost.sock");
            let mut backend = BackEnd::vhost_user(side, &socket, TAP)?;
            let mut frontend = start_frontend(&socket)?;
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
        cells.push((What::Transmit(size), measure::writing(backend, link, window)?.into()));
        frontend.stop_forwarding()?;
    }
    frontend.start_forwarding("rxonly")?;
    for size in SIZES {
        interrupt::sleep(WARM_UP)?;
        eprintln!("  tap->guest {size} B");
        let reading = measure::draining(backend, link, size, args.prefill, Some(frontend))?;
        cells.push((What::Receive(size), reading.into()));
        eprintln!("  tap->guest {size} B, {} packets/s", args.pps);
        let reading = measure::at_rate(backend, link, size, args.pps, window, Some(frontend))?;
        cells.push((What::ReceiveCpu(size), reading.into()));
    }
    frontend.stop_forwarding()
}

fn start_frontend(socket: &std::path::Path) -> Result<Testpmd> {
    let path = socket.to_str().context("socket path")?;
    let name = format!("vbf{}", std::process::id());
    let config = TestpmdConfig {
        memory: Memory::Huge,
        memory_mib: MEMORY_MIB,
        ..TestpmdConfig::virtio_user(&name, OTHER_CPU, path, 1, "")
    };
    Testpmd::start(&config).context("front-end")
}

impl From<Reading> for Cell {
    fn from(r: Reading) -> Self {
        Self { mpps: r.mpps, cpu_ns: r.cpu_ns, cpu_share: r.cpu_share, lost: r.lost }
    }
}

/// Spread of one number over rounds.
fn spread(cells: &[Cell], number: impl Fn(&Cell) -> f64) -> Spread {
    Spread::of(cells.iter().map(number))
}
