//! `vubench tap-gen`: frames into a tap from the host's side, as the stack would send them to the guest.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::wire::{FOREIGN_MAC, Frame, Injector, Link};

use crate::interrupt;

/// Frames that one system call puts into the tap.
const BURST: usize = 64;
/// Pause between two looks at the clock at a fixed rate.
const PACE: Duration = Duration::from_micros(250);

#[derive(clap::Args)]
pub struct Args {
    /// Interface, in the network name space of the caller
    #[arg(long)]
    tap: String,
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
    let generator = Generator::open(&Link::named(&args.tap), args.size)?;
    let start = Instant::now();
    let taken = match args.pps {
        Some(pps) => generator.paced(pps, Duration::from_secs_f64(args.seconds))?,
        None => {
            let end = start + Duration::from_secs_f64(args.seconds);
            let mut taken = 0;
            while Instant::now() < end {
                interrupt::check()?;
                taken += generator.burst(BURST as u64)?;
            }
            taken
        }
    };
    let rate = taken as f64 / start.elapsed().as_secs_f64();
    println!("{taken} frames of {} bytes, {:.3} Mpps", args.size, rate / 1e6);
    Ok(())
}

/// One frame, many times.
pub struct Generator {
    injector: Injector,
    frame: Vec<u8>,
}

impl Generator {
    /// Frames of `size` bytes into `link`.
    pub fn open(link: &Link, size: usize) -> Result<Self> {
        Ok(Self { injector: Injector::open(link)?, frame: Frame::numbered(0, size, 0, FOREIGN_MAC) })
    }

    /// Up to `n` frames at once; returns how many the kernel took.
    pub fn burst(&self, n: u64) -> Result<u64> {
        let frames = [self.frame.as_slice(); BURST];
        let n = n.min(BURST as u64) as usize;
        Ok(self.injector.send(&frames[..n])? as u64)
    }

    /// `n` frames as fast as possible; the tap's queue must have room for them.
    pub fn fill(&self, n: u64) -> Result<()> {
        let mut left = n;
        while left > 0 {
            interrupt::check()?;
            let took = self.burst(left)?;
            ensure!(took > 0, "the tap's queue was full {left} frames before the {n}th");
            left -= took;
        }
        Ok(())
    }

    /// `pps` frames a second for `time`; what is late is made up for. Returns how many the kernel took.
    pub fn paced(&self, pps: u64, time: Duration) -> Result<u64> {
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
            std::thread::sleep(PACE);
        }
    }
}
