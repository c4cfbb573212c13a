//! Which queue of a multi-queue tap a received frame goes to: by its flow, over the queues that take part.
//!
//! The kernel's own choice follows what the guest has sent, and puts all flows that it has not seen on one queue. So a program
//! (`ebpf/programs/src/bin/tap.rs`) looks a frame's flow up in a table, which is kept up to date here as queues are enabled and
//! disabled. Needs CAP_BPF; without it the kernel's choice stays.
//!
//! Here: the program's loading, and the table. Not here: the tap's queues (`tap`).
#![forbid(unsafe_code)]

use super::tap::ioctl;
use crate::bpf::{io_error, os_error};
use aya::maps::{Array, MapData, PerCpuArray};
use aya::programs::Program;
use aya::{Ebpf, EbpfLoader};
use ebpf_common::tap::{Queues, Stats, TABLE_LEN};
use std::error::Error;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!("../../bpf/tap.o");
const PROGRAM: &str = "vun_tap";

/// A loader reads the kernel's own types when it is made, for about 0.1 s, whether they are needed or not: once is enough.
static LOADER: LazyLock<Mutex<EbpfLoader<'static>>> = LazyLock::new(|| {
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    Mutex::new(loader)
});

/// Takes the program away.
const NONE: libc::c_int = -1;

/// The kernel's list of queues that take part, as it comes about: a new one is put at the end, and the last one takes
/// the place of one that leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Order(Vec<u16>);

impl Order {
    fn set(&mut self, queue: u16, active: bool) {
        match (self.0.iter().position(|other| *other == queue), active) {
            (None, true) => self.0.push(queue),
            (Some(index), false) => drop(self.0.swap_remove(index)),
            _ => {}
        }
    }

    /// Each entry belongs to a queue of the whole tap, so that a flow stays where it is as others come and go. Entries of
    /// queues that do not take part are shared by those that do.
    fn table(&self, queues: u16) -> Queues {
        let queues = usize::from(queues.max(1));
        let mut active: Vec<(u16, u8)> = self.0.iter().copied().zip(0..=u8::MAX).collect();
        active.sort_unstable();
        let index_of = |entry: usize| {
            let own = active.iter().find(|(queue, _)| usize::from(*queue) == entry % queues);
            let share = active.get(entry / queues % active.len().max(1));
            own.or(share).map_or(0, |(_, index)| *index)
        };
        let mut table = [0; TABLE_LEN];
        for (entry, index) in table.iter_mut().enumerate() {
            *index = index_of(entry);
        }
        Queues { active: active.len() as u32, table }
    }
}

/// The steering program of a tap. Dropped, it goes from the tap.
pub struct Steering {
    tap: Arc<OwnedFd>,
    queues: u16,
    order: Order,
    table: Array<MapData, Queues>,
    stats: PerCpuArray<MapData, Stats>,
}

impl Steering {
    /// Puts the program on a tap of so many queues, of which the first takes part. Where that is not possible, one line in
    /// the log says why.
    pub fn start(tap: &Arc<OwnedFd>, queues: u16, description: &str) -> Option<Self> {
        // Of a process that was killed: its table is of another order.
        let _ = set_program(tap, NONE);
        match Self::load(tap, queues) {
            Ok(steering) => Some(steering),
            Err(error) => {
                let why = match os_error(&*error) {
                    Some(libc::EPERM | libc::EACCES) => "CAP_BPF is missing".to_owned(),
                    _ => error.to_string(),
                };
                tracing::info!(
                    "{description}: no steering program ({why}): the kernel spreads flows over the queues as it likes"
                );
                None
            }
        }
    }

    fn load(tap: &Arc<OwnedFd>, queues: u16) -> Result<Self, Box<dyn Error>> {
        let mut ebpf = LOADER.lock().unwrap_or_else(PoisonError::into_inner).load(OBJECT)?;
        let mut steering = Self {
            tap: tap.clone(),
            queues,
            order: Order(vec![0]),
            table: take(&mut ebpf, "tap_queues")?.try_into()?,
            stats: take(&mut ebpf, "tap_stats")?.try_into()?,
        };
        steering.write()?;
        let Some(Program::SocketFilter(program)) = ebpf.program_mut(PROGRAM) else {
            return Err(io::Error::from(io::ErrorKind::NotFound).into());
        };
        program.load()?;
        set_program(tap, program.fd()?.as_fd().as_raw_fd())?;
        Ok(steering)
    }

    /// A queue has joined those that take part, or has left them.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set(&mut self, queue: u16, active: bool) -> io::Result<()> {
        self.order.set(queue, active);
        self.write()
    }

    fn write(&mut self) -> io::Result<()> {
        self.table.set(0, self.order.table(self.queues), 0).map_err(io_error)
    }

    /// The program's counters, over all CPUs.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn stats(&self) -> io::Result<Stats> {
        let mut sum = Stats::default();
        for cpu in self.stats.get(&0, 0).map_err(io_error)?.iter() {
            sum.hits += cpu.hits;
            sum.misses += cpu.misses;
        }
        Ok(sum)
    }
}

impl Drop for Steering {
    fn drop(&mut self) {
        // The tap may outlive us.
        let _ = set_program(&self.tap, NONE);
    }
}

fn take(ebpf: &mut Ebpf, name: &str) -> io::Result<aya::maps::Map> {
    ebpf.take_map(name).ok_or(io::ErrorKind::NotFound.into())
}

fn set_program(tap: &OwnedFd, program: libc::c_int) -> io::Result<()> {
    ioctl(tap, libc::TUNSETSTEERINGEBPF as _, (&raw const program) as libc::c_ulong)
}

#[cfg(test)]
#[path = "tap_steering_tests.rs"]
mod tests;
