//! The command line of `tx`, `rx`, `both`, `loop` and `latency`.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use serde::Serialize;

use super::{Touch, Way, result, run_closed, run_latency, run_open};
use crate::driver::BURST_MAX;
use crate::interrupt;
use crate::packet;

/// Longest frame: a TSO frame with its Ethernet header.
const FRAME_MAX: usize = 65_549;
/// A receive buffer, header included, bytes: enough for an MTU of 1500, as Linux has it with mergeable buffers, and more.
const RECEIVE_LEN: u32 = 2048;
/// Packets of a loop in flight.
const IN_FLIGHT: usize = 128;

/// How the driver is, and how long it is measured.
#[derive(clap::Args, Clone, Debug, Serialize)]
pub struct Setup {
    /// Packed rings
    #[arg(long)]
    pub packed: bool,
    /// Entries of each ring, a power of two
    #[arg(long, default_value_t = 256)]
    pub ring_size: u16,
    /// Packets that are waited for, a little, to be handled together
    #[arg(long, default_value_t = 32)]
    pub burst: u16,
    /// Length of frames that are sent, bytes
    #[arg(long, default_value_t = 64)]
    pub frame: usize,
    /// Length of receive buffers, bytes
    #[arg(long, default_value_t = RECEIVE_LEN)]
    pub receive_len: u32,
    /// Without mergeable receive buffers
    #[arg(long)]
    pub no_mergeable: bool,
    /// With VIRTIO_F_EVENT_IDX
    #[arg(long)]
    pub event_idx: bool,
    /// With VIRTIO_F_IN_ORDER
    #[arg(long)]
    pub in_order: bool,
    /// Guest memory in hugepages of 2 MiB, which must be reserved
    #[arg(long)]
    pub hugepages: bool,
    /// What the driver writes into packets that it sends
    #[arg(long, value_enum, default_value_t)]
    pub touch: Touch,
    /// Pauses of the processor after a look that found nothing
    #[arg(long, default_value_t = 8)]
    pub pauses: u32,
    /// How long is measured
    #[arg(long, default_value_t = 2.0)]
    pub seconds: f64,
    /// How long it runs before that
    #[arg(long, default_value_t = 0.3)]
    pub warm_up: f64,
    /// Look into every packet; slower
    #[arg(long)]
    pub check: bool,
    /// The back-end's process, whose CPU time is measured, too
    #[arg(long)]
    pub pid: Option<u32>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            packed: false,
            ring_size: 256,
            burst: 32,
            frame: 64,
            receive_len: RECEIVE_LEN,
            no_mergeable: false,
            event_idx: false,
            in_order: false,
            hugepages: false,
            touch: Touch::None,
            pauses: 8,
            seconds: 2.0,
            warm_up: 0.3,
            check: false,
            pid: None,
        }
    }
}

impl Setup {
    fn check_values(&self) -> Result<()> {
        ensure!(
            self.ring_size.is_power_of_two() && (2..=16_384).contains(&self.ring_size),
            "--ring-size must be a power of two from 2 to 16384"
        );
        let frames = packet::FRAME_MIN..=FRAME_MAX;
        ensure!(frames.contains(&self.frame), "--frame must be in {frames:?}");
        let bursts = 1..=BURST_MAX as u16;
        ensure!(bursts.contains(&self.burst), "--burst must be in {bursts:?}");
        ensure!((128..=1 << 20).contains(&self.receive_len), "--receive-len must be in 128..=1048576");
        ensure!(
            !self.check || self.frame <= packet::FRAME_MAX,
            "--check is for frames of {} bytes at most",
            packet::FRAME_MAX
        );
        let times = self.seconds > 0.0 && self.seconds < 86_400.0 && (0.0..3600.0).contains(&self.warm_up);
        ensure!(times, "--seconds must be above 0, --warm-up 0 or more");
        Ok(())
    }
}

/// What every load takes.
#[derive(clap::Args, Clone, Debug)]
pub struct Common {
    #[command(flatten)]
    setup: Setup,
    /// CPU to run on
    #[arg(long)]
    cpu: Option<usize>,
    /// Write the result as JSON to this file, or to stdout
    #[arg(long, num_args = 0..=1, default_missing_value = "-")]
    json: Option<PathBuf>,
}

impl Common {
    /// Checks the values, catches signals, and goes to the CPU.
    fn begin(&self) -> Result<()> {
        self.setup.check_values()?;
        interrupt::install()?;
        if let Some(cpu) = self.cpu {
            let mut cpus = CpuSet::new();
            cpus.set(cpu)?;
            sched_setaffinity(Pid::from_raw(0), &cpus).with_context(|| format!("running on CPU {cpu}"))?;
        }
        Ok(())
    }
}

/// `tx`, `rx` and `both`.
#[derive(clap::Args, Clone, Debug)]
pub struct OpenArgs {
    /// The back-end's socket; several times for several ports
    #[arg(long, required = true)]
    socket: Vec<PathBuf>,
    /// Packets per second to send at each port; default: as many as the device takes
    #[arg(long)]
    pps: Option<f64>,
    /// The first so many ports do not keep to --pps
    #[arg(long, default_value_t = 0)]
    greedy: usize,
    #[command(flatten)]
    common: Common,
}

impl OpenArgs {
    /// Does it.
    pub fn run(&self, way: Way) -> Result<()> {
        ensure!(self.pps.is_none_or(|pps| pps > 0.0), "--pps must be positive");
        self.common.begin()?;
        let pps: Vec<_> = (0..self.socket.len()).map(|i| self.pps.filter(|_| i >= self.greedy)).collect();
        let measured = run_open(&self.common.setup, &self.socket, way, &pps)?;
        result::publish(&self.common.setup, &self.socket, self.common.json.as_deref(), &measured)
    }
}

/// Sockets of `loop` and `latency`.
#[derive(clap::Args, Clone, Debug)]
struct Ends {
    /// The back-end's socket
    #[arg(long)]
    socket: PathBuf,
    /// The socket of a second port that the back-end connects with the first; default: the first echoes
    #[arg(long)]
    peer_socket: Option<PathBuf>,
}

impl Ends {
    fn all(&self) -> Vec<PathBuf> {
        std::iter::once(&self.socket).chain(&self.peer_socket).cloned().collect()
    }
}

/// `loop`.
#[derive(clap::Args, Clone, Debug)]
pub struct LoopArgs {
    #[command(flatten)]
    ends: Ends,
    /// Packets in flight from each port
    #[arg(long, default_value_t = IN_FLIGHT)]
    in_flight: usize,
    /// Only from the first port to the second
    #[arg(long, requires = "peer_socket")]
    one_way: bool,
    #[command(flatten)]
    common: Common,
}

impl LoopArgs {
    /// Does it.
    pub fn run(&self) -> Result<()> {
        ensure!(self.in_flight > 0, "--in-flight must be positive");
        self.common.begin()?;
        let sockets = self.ends.all();
        let measured = run_closed(&self.common.setup, &sockets, self.in_flight, self.one_way)?;
        result::publish(&self.common.setup, &sockets, self.common.json.as_deref(), &measured)
    }
}

/// `latency`.
#[derive(clap::Args, Clone, Debug)]
pub struct LatencyArgs {
    #[command(flatten)]
    ends: Ends,
    /// Packets per second; default: one in flight
    #[arg(long)]
    pps: Option<f64>,
    #[command(flatten)]
    common: Common,
}

impl LatencyArgs {
    /// Does it.
    pub fn run(&self) -> Result<()> {
        ensure!(self.pps.is_none_or(|pps| pps > 0.0), "--pps must be positive");
        self.common.begin()?;
        let sockets = self.ends.all();
        let measured = run_latency(&self.common.setup, &sockets, self.pps)?;
        result::publish(&self.common.setup, &sockets, self.common.json.as_deref(), &measured)
    }
}
