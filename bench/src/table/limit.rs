//! What the machine can do at all: copying between buffers as they lie in guest memory.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::compare::BACKEND_CPU;
use crate::driver::{Buffers, LINE};
use crate::load::guest_memory;

/// GB/s of copies of `len` bytes from one to the other of two sets of buffers, in small pages, on the back-end's CPU.
pub fn copying(len: usize, buffers: u16, time: Duration) -> Result<f64> {
    // As the driver lays them out: an odd number of lines.
    let stride = ((len as u64).div_ceil(LINE) | 1) * LINE;
    let set = || -> Result<Buffers> {
        let (_, memory) = guest_memory(stride * u64::from(buffers), false)?;
        let it = Buffers::new(&Arc::new(memory), 0, stride, buffers);
        (0..buffers).for_each(|id| it.write(id, &vec![0x5a; len]));
        Ok(it)
    };
    let (from, to) = (set()?, set()?);
    let copier = std::thread::spawn(move || -> Result<f64> {
        let mut cpus = CpuSet::new();
        cpus.set(BACKEND_CPU)?;
        sched_setaffinity(Pid::from_raw(0), &cpus).context("the back-end's CPU")?;
        let round = || (0..buffers).for_each(|id| to.copy_from(id, &from, id, len));
        round();
        let (start, mut bytes) = (Instant::now(), 0u64);
        while start.elapsed() < time {
            round();
            bytes += len as u64 * u64::from(buffers);
        }
        Ok(bytes as f64 / start.elapsed().as_secs_f64() / 1e9)
    });
    copier.join().map_err(|_| anyhow::anyhow!("the copying thread has panicked"))?
}
