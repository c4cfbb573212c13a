//! Frames into an interface from the host's side. `vubench gen` does that by hand.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::ValueEnum;
use lab::wire::{FOREIGN_MAC, Frame, Injector, Link};
use serde::Serialize;

use crate::interrupt;
use crate::procstat;
use crate::xsk::Sender;

/// Address of the guest in comparisons that steer by it.
pub const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0xbe, 0xef, 0x01];
/// Frames that one system call puts into the interface.
const BURST: usize = 64;
/// Pause between two looks at the clock at a fixed rate.
const PACE_MIN: Duration = Duration::from_micros(50);
const PACE_MAX: Duration = Duration::from_micros(250);

/// How frames come onto an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// An AF_PACKET socket past the queueing discipline: each frame is a socket buffer and is received on its own
    Packet,
    /// An AF_XDP socket: the same at less cost
    Xsk,
}

#[derive(clap::Args)]
pub struct Args {
    /// Interface, in the network name space of the caller
    #[arg(long, alias = "tap")]
    iface: String,
    /// How
    #[arg(long, default_value = "packet")]
    source: Source,
    /// Send to the address that the guests of comparisons have, not to nobody's
    #[arg(long)]
    to_guest: bool,
    /// Frame length in bytes, without FCS
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Frames per second; as fast as possible if left out
    #[arg(long)]
    pps: Option<u64>,
    /// How long
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
}

pub fn run(args: &Args) -> Result<()> {
    interrupt::install()?;
    let mac = if args.to_guest { GUEST_MAC } else { FOREIGN_MAC };
    let mut generator = Generator::to(&Link::named(&args.iface), args.source, args.size, mac)?;
    let start = Instant::now();
    let time = Duration::from_secs_f64(args.seconds);
    let taken = match args.pps {
        Some(pps) => generator.paced_in_time(pps, time)?,
        None => generator.flood(time)?,
    };
    let rate = taken as f64 / start.elapsed().as_secs_f64();
    println!("{taken} frames of {} bytes, {:.3} Mpps", args.size, rate / 1e6);
    Ok(())
}

enum Way {
    Packet(Injector),
    Xsk(Box<Sender>),
}

/// One frame, many times.
pub struct Generator {
    way: Way,
    frame: Vec<u8>,
}

impl Generator {
    /// Frames of `size` bytes to nobody's address into `link`.
    pub fn open(link: &Link, source: Source, size: usize) -> Result<Self> {
        Self::to(link, source, size, FOREIGN_MAC)
    }

    /// Frames of `size` bytes to `mac`.
    pub fn to(link: &Link, source: Source, size: usize, mac: [u8; 6]) -> Result<Self> {
        let frame = Frame::numbered(0, size, 0, mac);
        let way = match source {
            Source::Packet => Way::Packet(Injector::open(link)?),
            Source::Xsk => Way::Xsk(Box::new(Sender::open(link, &frame)?)),
        };
        Ok(Self { way, frame })
    }

    /// Up to `n` frames at once; returns how many the kernel took.
    pub fn burst(&mut self, n: u64) -> Result<u64> {
        let n = n.min(BURST as u64);
        match &mut self.way {
            Way::Packet(injector) => {
                let frames = [self.frame.as_slice(); BURST];
                Ok(injector.send(&frames[..n as usize])? as u64)
            }
            Way::Xsk(sender) => Ok(sender.send(n as u32)?.into()),
        }
    }

    /// `n` frames as fast as possible; the interface's queue must have room for them.
    pub fn fill(&mut self, n: u64) -> Result<()> {
        let mut left = n;
        while left > 0 {
            interrupt::check()?;
            let took = self.burst(left)?;
            ensure!(took > 0, "the interface's queue was full {left} frames before the {n}th");
            left -= took;
        }
        Ok(())
    }

    /// As many frames as possible for `time`; returns how many the kernel took.
    pub fn flood(&mut self, time: Duration) -> Result<u64> {
        let end = Instant::now() + time;
        let mut taken = 0;
        while Instant::now() < end {
            interrupt::check()?;
            taken += self.burst(BURST as u64)?;
        }
        Ok(taken)
    }

    /// The same from a thread that nothing but the kernel holds up: it leaves the CPU between bursts, and takes it back in
    /// time. Without that, a front-end that polls on the same CPU keeps it for milliseconds at a time, and the bursts get
    /// longer than its ring.
    pub fn paced_in_time(&mut self, pps: u64, time: Duration) -> Result<u64> {
        let _first = procstat::RealTime::enter()?;
        self.paced(pps, time)
    }

    /// `pps` frames a second for `time`, a burst every so often; what is late is made up for. Returns how many the
    /// kernel took.
    pub fn paced(&mut self, pps: u64, time: Duration) -> Result<u64> {
        // As often as it takes for full bursts, and not more often than a timer can.
        let pace = Duration::from_nanos(BURST as u64 * 1_000_000_000 / pps.max(1)).clamp(PACE_MIN, PACE_MAX);
        let start = Instant::now();
        let mut taken = 0;
        loop {
            let elapsed = start.elapsed().min(time);
            let due = (elapsed.as_secs_f64() * pps as f64) as u64;
            while taken < due {
                let took = self.burst(due - taken)?;
                taken += took;
                if took == 0 {
                    break;
                }
            }
            if elapsed == time {
                return Ok(taken);
            }
            interrupt::check()?;
            std::thread::sleep(pace);
        }
    }
}
