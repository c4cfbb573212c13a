//! `vubench tap-raw`: the bare loops. What does a frame cost that is written to a tap, or read from it, when there is
//! no ring and no guest: the floor for every back-end. And which way to do the I/O is the cheapest.
//!
//! Here: set-up, clocks and the table. The loops themselves are in `plain` and `uring`.

mod device;
mod plain;
mod uring;

use std::fs::File;
use std::time::{Duration, Instant};

use crate::netspace::NetSpace;
use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use device::{TapOptions, VNET_HDR_LEN, open_tap};
use lab::wire::{FOREIGN_MAC, Frame, Link};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use serde::Serialize;

use crate::generate::{Generator, Source};
use crate::interrupt;
use crate::report::{self, Spread};

/// Packets per step of a loop, and per io_uring submission.
pub const BATCH: usize = 64;
/// Frames put into the tap before its reader starts.
const PREFILL: u64 = 200_000;
const WRITE_TIME: Duration = Duration::from_millis(700);

/// Which way the I/O is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// write(2), read(2): header and frame in one buffer
    Plain,
    /// writev(2), readv(2): header and frame apart, as for a guest's buffers
    Vectored,
    /// io_uring, batches of 64 WRITEV or READV
    Uring,
    /// io_uring, READ_MULTISHOT with a ring of provided buffers (receiving only)
    UringMultishot,
}

/// Which way the frames go, seen from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// guest to tap: writing
    Tx,
    /// tap to guest: reading
    Rx,
}

#[derive(clap::Args)]
pub struct Args {
    /// Only this engine
    #[arg(long)]
    engine: Option<Engine>,
    /// Only this direction
    #[arg(long)]
    direction: Option<Direction>,
    /// Frame lengths in bytes, without FCS
    #[arg(long, value_delimiter = ',', default_values_t = [64, 1500])]
    size: Vec<usize>,
    /// CPU to run on
    #[arg(long, default_value_t = 0)]
    cpu: usize,
    /// Rounds; the engines take turns in each
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Attach to this tap of the caller's network name space and run until killed, printing nothing
    #[arg(long, requires_all = ["engine", "direction"])]
    forever: Option<String>,
}

/// One way to move frames. A step moves up to [`BATCH`] packets.
pub trait Mover {
    /// Moves packets and says how many. A reader waits up to about 100 ms for the first.
    fn step(&mut self) -> Result<u64>;
}

/// What one engine did in one round.
#[derive(Clone, Copy, Serialize)]
struct Sample {
    mpps: f64,
    wall_ns: f64,
    cpu_ns: f64,
}

#[derive(Serialize)]
struct Row {
    direction: Direction,
    size: usize,
    engine: Engine,
    mpps: Spread,
    wall_ns_per_packet: Spread,
    cpu_ns_per_packet: Spread,
}

pub fn run(args: &Args) -> Result<()> {
    interrupt::install()?;
    let mut cpus = CpuSet::new();
    cpus.set(args.cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cpus).with_context(|| format!("pinning to CPU {}", args.cpu))?;
    if let (Some(tap), Some(engine), Some(direction)) = (&args.forever, args.engine, args.direction) {
        let size = args.size.first().copied().unwrap_or(64);
        let mut mover = mover(engine, direction, tap, size)?;
        while interrupt::check().is_ok() {
            mover.step()?;
        }
        return Ok(());
    }
    let _space = NetSpace::enter()?;
    let combinations = combinations(args);
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); combinations.len()];
    for round in 0..args.rounds {
        for i in 0..combinations.len() {
            // Every engine is first in turn.
            let i = (i + round) % combinations.len();
            let (direction, size, engine) = combinations[i];
            samples[i].push(measure(direction, size, engine)?);
        }
    }
    let rows: Vec<Row> = combinations
        .iter()
        .zip(&samples)
        .map(|(&(direction, size, engine), s)| Row {
            direction,
            size,
            engine,
            mpps: Spread::of(s.iter().map(|s| s.mpps)),
            wall_ns_per_packet: Spread::of(s.iter().map(|s| s.wall_ns)),
            cpu_ns_per_packet: Spread::of(s.iter().map(|s| s.cpu_ns)),
        })
        .collect();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print_table(&rows);
    }
    Ok(())
}

fn combinations(args: &Args) -> Vec<(Direction, usize, Engine)> {
    let mut all = Vec::new();
    for direction in [Direction::Tx, Direction::Rx] {
        for &size in &args.size {
            for &engine in Engine::value_variants() {
                let wanted = args.engine.is_none_or(|e| e == engine)
                    && args.direction.is_none_or(|d| d == direction)
                    && (engine != Engine::UringMultishot || direction == Direction::Rx);
                if wanted {
                    all.push((direction, size, engine));
                }
            }
        }
    }
    all
}

fn mover(engine: Engine, direction: Direction, tap: &str, size: usize) -> Result<Box<dyn Mover>> {
    // A reader must see EAGAIN to know that the tap is empty; a write to a tap never waits.
    let options = TapOptions { vnet_hdr: true, nonblocking: true, ..TapOptions::default() };
    let file: File = open_tap(tap, options)?;
    let link = Link::named(tap);
    link.set_up()?;
    let frame = Frame::numbered(0, size, 0, FOREIGN_MAC);
    Ok(match (engine, direction) {
        (Engine::Plain, Direction::Tx) => Box::new(plain::Writer::new(file, &frame)),
        (Engine::Plain, Direction::Rx) => Box::new(plain::Reader::new(file)),
        (Engine::Vectored, Direction::Tx) => Box::new(plain::VectoredWriter::new(file, &frame)),
        (Engine::Vectored, Direction::Rx) => Box::new(plain::VectoredReader::new(file)),
        (Engine::Uring, Direction::Tx) => Box::new(uring::Writer::new(file, &frame)?),
        (Engine::Uring, Direction::Rx) => Box::new(uring::Reader::new(file)?),
        (Engine::UringMultishot, Direction::Rx) => Box::new(uring::MultishotReader::new(file)?),
        (Engine::UringMultishot, Direction::Tx) => anyhow::bail!("uring-multishot only receives"),
    })
}

fn measure(direction: Direction, size: usize, engine: Engine) -> Result<Sample> {
    const TAP: &str = "raw0";
    let link = Link::named(TAP);
    // io_uring lets go of its registered files some time after it was closed.
    interrupt::wait_for("the previous tap to go", Duration::from_secs(5), || Ok(!link.exists()))?;
    let mut mover = mover(engine, direction, TAP, size)?;
    let prefill = if direction == Direction::Rx { PREFILL } else { 0 };
    if prefill > 0 {
        // The kernel frees the queue's places in batches.
        link.set_queue_len(prefill as u32 + 64)?;
        Generator::open(&link, Source::Packet, size)?.fill(prefill)?;
    }
    let before = link.counters()?;
    let (start, cpu_start) = (Instant::now(), cpu_now()?);
    let mut packets = 0;
    loop {
        interrupt::check()?;
        packets += mover.step()?;
        let done = if prefill > 0 { packets >= prefill } else { start.elapsed() >= WRITE_TIME };
        if done {
            break;
        }
    }
    let (wall, cpu) = (start.elapsed(), cpu_now()? - cpu_start);
    let after = link.counters()?;
    let counted = match direction {
        Direction::Tx => after.rx_packets - before.rx_packets,
        Direction::Rx => after.tx_packets - before.tx_packets,
    };
    ensure!(counted == packets, "{engine:?} says {packets} packets, the tap counted {counted}");
    let n = packets as f64;
    Ok(Sample {
        mpps: n / wall.as_secs_f64() / 1e6,
        wall_ns: wall.as_nanos() as f64 / n,
        cpu_ns: cpu.as_nanos() as f64 / n,
    })
}

fn cpu_now() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

fn print_table(rows: &[Row]) {
    println!("Bare tap loops: header of {VNET_HDR_LEN} bytes, medians (min-max)\n");
    let head = ["direction", "bytes", "engine", "Mpps", "ns per packet", "CPU ns per packet"];
    let body: Vec<Vec<String>> = rows
        .iter()
        .map(|r| {
            vec![
                format!("{:?}", r.direction).to_lowercase(),
                r.size.to_string(),
                r.engine.to_possible_value().map(|v| v.get_name().to_string()).unwrap_or_default(),
                r.mpps.show(2),
                r.wall_ns_per_packet.show(0),
                r.cpu_ns_per_packet.show(0),
            ]
        })
        .collect();
    print!("{}", report::table(&head, &body));
}
