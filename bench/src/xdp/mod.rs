//! `vubench xdp`: back-ends with an AF_XDP uplink on a veth against each other, in turn, in one run.
//!
//! Here: what is measured in which order. `sides` names the contenders, `measure` takes the numbers, `veth` makes the
//! interfaces anew for every contender.
//!
//! ```text
//!   back-end, CPU 0 ── bench0 ═ veth ═ far0: no address, no IPv6, no program; what arrives for a foreign MAC dies in ip_rcv
//!                                       └── AF_PACKET generator, CPU 1
//! ```
//! Who pays: what is sent is received by the far end in the sender's own softirq, so the back-end's CPU time has both
//! (allocation and copy of the socket buffer, veth, ip_rcv). What arrives runs the near end's XDP program and is copied
//! into frame memory in the generator's softirq on CPU 1: the back-end's CPU time has only what happens afterwards.
#![forbid(unsafe_code)]

mod measure;
mod sides;
mod veth;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::ValueEnum;

use crate::compare::{self, BackEnd, Cell, Goal, Heading, Place, Report, Rows, SIZES, Unit, WARM_UP};
use crate::generate::{GUEST_MAC, Generator, Source};
use crate::interrupt;
use crate::raw::Direction;
use crate::testpmd::Testpmd;
use measure::{Received, Sink};
use sides::{Kind, Side};
use veth::Veth;

/// Columns, as `Side::name` calls them.
const NAMES: [&str; 4] = ["bare", "dpdk-busy", "dpdk", "ours"];
/// To reach, guest to veth: so much of DPDK's rate.
const RATE_GOAL: Goal = Goal { ratio_min: 1.1, above_bare_ns_max: None };
/// To reach, veth to guest at a fixed rate: 0.9 of DPDK's CPU time without its empty polls.
const CPU_GOAL: Goal = Goal { ratio_min: 1.0 / 0.9, above_bare_ns_max: None };
const TEXT: &str = "DPDK's CPU ns at a fixed rate are without its empty polls: testpmd's own clock (record-core-cycles). \
    Cross-check: its CPU time without as many empty polls as were counted, each as long as without traffic; of the others, \
    all that CPU 0 did, interrupts included.\n";

/// A row: what is measured, with the frame length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    /// Guest to veth, as many as possible.
    Transmit(usize),
    /// Veth to guest at a fixed rate: CPU time per packet.
    ReceiveCpu(usize),
    /// The same, measured in another way.
    ReceiveCheck(usize),
    /// The same, with the CPU time of the generator.
    ReceiveAll(usize),
}

impl Rows for What {
    fn title(self) -> (&'static str, usize) {
        match self {
            Self::Transmit(size) => ("guest->veth", size),
            Self::ReceiveCpu(size) => ("veth->guest, fixed rate", size),
            Self::ReceiveCheck(size) => ("  cross-check", size),
            Self::ReceiveAll(size) => ("  with the generator's CPU", size),
        }
    }

    fn unit(self) -> Unit {
        match self {
            Self::Transmit(_) => Unit::Mpps,
            Self::ReceiveCpu(_) | Self::ReceiveCheck(_) | Self::ReceiveAll(_) => Unit::CpuNs,
        }
    }

    fn goal(self) -> Option<Goal> {
        match self {
            Self::Transmit(_) => Some(RATE_GOAL),
            Self::ReceiveCpu(_) => Some(CPU_GOAL),
            Self::ReceiveCheck(_) | Self::ReceiveAll(_) => None,
        }
    }
}

#[derive(clap::Args)]
pub struct Args {
    /// Our back-end; rows about it are left out if the file is missing
    #[arg(long, default_value = "target/release/vhost-user-net")]
    backend_bin: PathBuf,
    /// What to put behind the interface in our `--uplink`, such as `,mode=skb`
    #[arg(long, default_value = "")]
    uplink_options: String,
    /// Which contenders
    #[arg(long, value_delimiter = ',', default_value = "bare,dpdk-busy,dpdk,ours")]
    sides: Vec<Kind>,
    /// Only these frame lengths, in bytes
    #[arg(long, value_delimiter = ',', default_values_t = SIZES)]
    size: Vec<usize>,
    /// Only this direction
    #[arg(long)]
    direction: Option<Direction>,
    /// Rounds; the sides take turns in each
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of each measurement
    #[arg(long, default_value_t = 1.5)]
    seconds: f64,
    /// Fixed rate for CPU time per packet, packets per second
    #[arg(long, default_value_t = 500_000)]
    pps: u64,
    /// How frames to the guest are made
    #[arg(long, value_enum, default_value_t = Source::Xsk)]
    source: Source,
    /// Write the JSON report here
    #[arg(long)]
    json: Option<PathBuf>,
}

impl Args {
    fn window(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    fn wants(&self, direction: Direction) -> bool {
        self.direction.is_none_or(|d| d == direction)
    }
}

pub fn run(args: &Args) -> Result<()> {
    let _place = Place::take()?;
    let heading = Heading { columns: &NAMES, rounds: args.rounds, pps: args.pps, text: TEXT };
    let mut report = Report::new(heading);
    let mut sides = Vec::new();
    for &kind in Kind::value_variants() {
        let program = std::path::absolute(&args.backend_bin)?;
        if !args.sides.contains(&kind) {
            report.note(&format!("{kind:?} was left out (--sides)"));
        } else if kind == Kind::Ours && !program.exists() {
            report.note(&format!("ours was left out: there is no {}", program.display()));
        } else {
            sides.push(Side { kind, program, options: args.uplink_options.clone() });
        }
    }
    compare::take_turns(&mut report, args.rounds, &sides, Side::name, |side, cells| {
        one_round(args, side, cells)
    })?;
    compare::publish(&report, args.json.as_deref())
}

/// The guest's address, which frames to it are sent to, as text.
fn guest_mac() -> String {
    GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":")
}

type Cells = Vec<(What, Cell)>;

/// All measurements of one side. Interfaces, back-end and front-end are made afresh.
fn one_round(args: &Args, side: &Side, cells: &mut Cells) -> Result<()> {
    if side.kind == Kind::Bare {
        return args.size.iter().try_for_each(|&size| without_guest(args, size, cells));
    }
    let veth = Veth::new()?;
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("vhost.sock");
    let mut backend = side.start(&socket, &veth.near)?;
    let mut frontend = compare::start_frontend(&socket, &format!("mac={}", guest_mac()))?;
    let result = through_a_guest(args, &mut backend, &mut frontend, &veth, cells);
    if let (Err(e), Some(how)) = (&result, backend.ended()) {
        anyhow::bail!("{e:#}; {how}");
    }
    result?;
    // The front-end goes first, as a guest would that shuts down.
    drop(frontend);
    Ok(())
}

fn without_guest(args: &Args, size: usize, cells: &mut Cells) -> Result<()> {
    if args.wants(Direction::Tx) {
        let veth = Veth::new()?;
        let sender = sides::bare(Direction::Tx, size, &veth.near)?;
        interrupt::sleep(WARM_UP)?;
        cells.push((What::Transmit(size), send(args, &sender, None, &veth)?));
    }
    if args.wants(Direction::Rx) {
        let veth = Veth::new()?;
        let mut receiver = sides::bare(Direction::Rx, size, &veth.near)?;
        interrupt::sleep(WARM_UP)?;
        receive(args, &mut receiver, size, &veth, &mut Sink::Loop(&veth.near), cells)?;
    }
    Ok(())
}

fn through_a_guest(
    args: &Args,
    backend: &mut BackEnd,
    frontend: &mut Testpmd,
    veth: &Veth,
    cells: &mut Cells,
) -> Result<()> {
    if args.wants(Direction::Tx) {
        for &size in &args.size {
            frontend.set_frame_size(size)?;
            eprintln!("  guest->veth {size} B");
            frontend.start_forwarding("txonly")?;
            interrupt::sleep(WARM_UP)?;
            cells.push((What::Transmit(size), send(args, backend, Some(frontend), veth)?));
            frontend.stop_forwarding()?;
        }
    }
    if args.wants(Direction::Rx) {
        measure::record(backend)?;
        frontend.start_forwarding("rxonly")?;
        for &size in &args.size {
            interrupt::sleep(WARM_UP)?;
            receive(args, backend, size, veth, &mut Sink::Guest(frontend), cells)?;
        }
        frontend.stop_forwarding()?;
    }
    Ok(())
}

fn send(args: &Args, backend: &BackEnd, frontend: Option<&Testpmd>, veth: &Veth) -> Result<Cell> {
    let pids = [Some(std::process::id()), Some(backend.pid()), frontend.map(Testpmd::pid)];
    let pids: Vec<u32> = pids.into_iter().flatten().collect();
    let (cell, others) = compare::undisturbed(&pids, || measure::sending(backend, &veth.far, args.window()))?;
    Ok(Cell { others, ..cell })
}

fn receive(
    args: &Args,
    backend: &mut BackEnd,
    size: usize,
    veth: &Veth,
    sink: &mut Sink,
    cells: &mut Cells,
) -> Result<()> {
    let mut generator = Generator::to(&veth.far, args.source, size, GUEST_MAC)?;
    eprintln!("  veth->guest {size} B, {} packets/s", args.pps);
    let mut pids = vec![std::process::id(), backend.pid()];
    pids.extend(sink.pid());
    let (received, others) = compare::undisturbed(&pids, || {
        measure::receiving(backend, &mut generator, args.pps, args.window(), sink)
    })?;
    let Received { cell, check_ns, generator_ns } = received;
    let cell = Cell { others, ..cell };
    cells.push((What::ReceiveCpu(size), cell));
    cells.push((What::ReceiveCheck(size), Cell { work_ns: check_ns, ..cell }));
    cells.push((What::ReceiveAll(size), Cell { work_ns: cell.work_ns + generator_ns, ..cell }));
    Ok(())
}
