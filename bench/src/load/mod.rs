//! `vubench tx|rx|both`: a front-end with the burst driver on a back-end's socket.
//!
//! Here: the command line, and what is printed. `port` makes a queue pair of ours, `lane` drives one ring, `open` is the load,
//! `check` looks into packets, `meter` counts.
#![forbid(unsafe_code)]

mod check;
mod lane;
mod meter;
mod open;
mod port;
mod result;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::driver::{BURST_MAX, ticks_per_second};
use crate::interrupt;
use crate::packet::{self, HEADER};
use check::{Expect, Incoming, Outgoing};
pub use lane::Touch;
use open::{Open, OpenLoad};
use port::{Port, PortOptions};
use result::Outcome;

/// How long the clock is measured.
const CALIBRATION: Duration = Duration::from_millis(20);
/// Longest frame: a TSO frame with its Ethernet header.
const FRAME_MAX: usize = 65_549;
/// Feature bits of offloads (VIRTIO 1.3 §5.1.3), which frames longer than an MTU need.
const OFFLOADS: u64 = 1 | 1 << 1 | 1 << 7 | 1 << 11;
/// A receive buffer, header included: what Linux gives for an MTU of 1500 bytes with mergeable buffers, and more.
const RECEIVE_LEN: u32 = 2048;

/// What every load takes.
#[derive(clap::Args, Clone, Debug)]
pub struct Common {
    /// The back-end's socket
    #[arg(long)]
    pub socket: PathBuf,
    /// Packed rings
    #[arg(long)]
    pub packed: bool,
    /// Entries of each ring, a power of two
    #[arg(long, default_value_t = 256)]
    pub ring_size: u16,
    /// Packets that are waited for before they are handled together
    #[arg(long, default_value_t = 32)]
    pub burst: u16,
    /// Length of frames, bytes
    #[arg(long)]
    pub frame: Option<usize>,
    /// Length of receive buffers, bytes
    #[arg(long, default_value_t = RECEIVE_LEN)]
    pub receive_len: u32,
    /// Without mergeable receive buffers
    #[arg(long)]
    pub no_mergeable: bool,
    /// With VIRTIO_F_EVENT_IDX
    #[arg(long)]
    pub event_idx: bool,
    /// Guest memory in hugepages of 2 MiB, which must be reserved
    #[arg(long)]
    pub hugepages: bool,
    /// What the driver writes into packets that it sends
    #[arg(long, value_enum, default_value_t)]
    pub touch: Touch,
    /// Pauses of the processor after a look that found nothing
    #[arg(long, default_value_t = 8)]
    pub pauses: u32,
    /// CPU to run on
    #[arg(long)]
    pub cpu: Option<usize>,
    /// How long is measured
    #[arg(long, default_value_t = 2.0)]
    pub seconds: f64,
    /// How long it runs before that
    #[arg(long, default_value_t = 0.3)]
    pub warm_up: f64,
    /// Look into every packet; slower
    #[arg(long)]
    pub check: bool,
    /// Write the result as JSON to this file, or to stdout
    #[arg(long, num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
}

/// `tx` and `both`.
#[derive(clap::Args, Clone, Debug)]
pub struct SendArgs {
    #[command(flatten)]
    common: Common,
    /// Packets per second to send; default: as many as the device takes
    #[arg(long)]
    pps: Option<f64>,
}

/// `rx`.
#[derive(clap::Args, Clone, Debug)]
pub struct ReceiveArgs {
    #[command(flatten)]
    common: Common,
}

impl Common {
    fn frame(&self) -> usize {
        self.frame.unwrap_or(64)
    }

    fn check_values(&self) -> Result<()> {
        ensure!(
            self.ring_size.is_power_of_two() && (2..=32_768).contains(&self.ring_size),
            "--ring-size must be a power of two from 2 to 32768"
        );
        let frames = packet::FRAME_MIN..=FRAME_MAX;
        ensure!(frames.contains(&self.frame()), "--frame must be in {frames:?}");
        let bursts = 1..=BURST_MAX as u16;
        ensure!(bursts.contains(&self.burst), "--burst must be in {bursts:?}");
        ensure!((128..=1 << 20).contains(&self.receive_len), "--receive-len must be in 128..=1048576");
        ensure!(
            self.seconds > 0.0 && self.seconds < 86_400.0 && (0.0..3600.0).contains(&self.warm_up),
            "--seconds and --warm-up must be reasonable"
        );
        Ok(())
    }

    /// Checks the values, catches signals, and goes to the CPU.
    fn begin(&self) -> Result<()> {
        self.check_values()?;
        interrupt::install()?;
        if let Some(cpu) = self.cpu {
            let mut cpus = CpuSet::new();
            cpus.set(cpu)?;
            sched_setaffinity(Pid::from_raw(0), &cpus).with_context(|| format!("running on CPU {cpu}"))?;
        }
        Ok(())
    }

    fn port(&self) -> Result<Port> {
        let frame = self.frame();
        let mut port = Port::open(
            &self.socket,
            &PortOptions {
                ring_size: self.ring_size,
                packed: self.packed,
                event_idx: self.event_idx,
                hugepages: self.hugepages,
                mergeable: !self.no_mergeable,
                features: if frame > packet::FRAME_MAX { OFFLOADS } else { 0 },
                frame,
                receive_len: self.receive_len,
            },
        )?;
        port.sender.set_manner(self.burst, self.touch);
        port.receiver.set_manner(self.burst);
        Ok(port)
    }
}

/// Which of the open loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To the device.
    Tx,
    /// From it.
    Rx,
    /// Both at once.
    Both,
}

/// `vubench tx`, `vubench both`.
pub fn run_sending(way: Way, args: &SendArgs) -> Result<()> {
    ensure!(args.pps.is_none_or(|pps| pps > 0.0), "--pps must be positive");
    run_open(way, &args.common, args.pps)
}

/// `vubench rx`.
pub fn run_receiving(args: &ReceiveArgs) -> Result<()> {
    run_open(Way::Rx, &args.common, None)
}

fn run_open(way: Way, common: &Common, pps: Option<f64>) -> Result<()> {
    common.begin()?;
    let mut port = common.port()?;
    let per_second = ticks_per_second(CALIBRATION);
    let (sends, receives) = (way != Way::Rx, way != Way::Tx);
    let load = OpenLoad { sends, receives, per_tick: pps.map(|p| p / per_second), pauses: common.pauses };
    let outgoing = (common.check && sends).then(|| Outgoing::new(common.ring_size, HEADER + common.frame()));
    let incoming = (common.check && receives).then(|| Incoming::new(Expect::Anything(common.frame)));
    let mut open = Open::new(load, &mut port, outgoing, incoming);
    let counted = result::measure(common, per_second, |ticks| open.run(ticks, per_second))?;
    let checked = open.checked();
    port.check()?;
    let outcome = Outcome {
        sends,
        receives,
        counted,
        checked: common.check.then_some(checked.0 + checked.1),
        kicks: port.sender.kicks() + port.receiver.kicks(),
    };
    result::publish(common, &outcome)
}
