//! What every comparison of back-ends shares: which CPU is whose, the contenders' processes, the front-end, taking turns,
//! and the table.
//!
//! ```text
//!   CPU 0: the contender            CPU 1: everything else
//!   back-end ◄── vhost-user ──► testpmd, virtio-user (txonly or rxonly)
//!      │
//!    uplink ── own network name space ──◄── generator
//! ```
//!
//! Not here: what is measured on which uplink (`tap`, `xdp`).
#![forbid(unsafe_code)]

mod backend;
mod others;
mod table;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

pub use backend::BackEnd;
pub use others::{TOLERATED, undisturbed};
pub use table::{Cell, Goal, Heading, Report, Rows, Unit, word};

use crate::interrupt;
use crate::netspace::NetSpace;
use crate::testpmd::{self, HugePages, Memory, Testpmd, TestpmdConfig};

/// The contender's CPU.
pub const BACKEND_CPU: usize = 0;
/// The CPU of the front-end, the generator and this program.
pub const OTHER_CPU: usize = 1;
/// For two testpmd of [`MEMORY_MIB`], in pages of 2 MiB, and some for their own tables.
const HUGEPAGES: u64 = 256;
/// Memory of a testpmd.
pub const MEMORY_MIB: u32 = 192;
/// Frame lengths in bytes, without FCS.
pub const SIZES: [usize; 2] = [64, 1500];
/// Time between the start of traffic and the first look at it.
pub const WARM_UP: Duration = Duration::from_millis(400);

/// What a comparison takes from the machine; dropping it gives it back.
pub struct Place {
    _pages: HugePages,
    _space: NetSpace,
}

impl Place {
    /// Pins the calling thread beside the front-end, reserves hugepages, and makes a network name space of our own.
    pub fn take() -> Result<Self> {
        interrupt::install()?;
        testpmd::available()?;
        let mut cpus = CpuSet::new();
        cpus.set(OTHER_CPU)?;
        sched_setaffinity(Pid::from_raw(0), &cpus).context("a comparison needs two CPUs, 0 and 1")?;
        Ok(Self { _pages: HugePages::reserve(HUGEPAGES)?, _space: NetSpace::enter()? })
    }
}

/// Has every side measured in every round; each is first in turn. What fails becomes a note: one side that fails
/// (once) must not take the others' numbers with it.
pub fn take_turns<W: Rows, S>(
    report: &mut Report<W>,
    rounds: usize,
    sides: &[S],
    name: impl Fn(&S) -> &'static str,
    mut one_round: impl FnMut(&S, &mut Vec<(W, Cell)>) -> Result<()>,
) -> Result<()> {
    for round in 0..rounds {
        for i in 0..sides.len() {
            let side = &sides[(i + round) % sides.len()];
            eprintln!("round {}/{rounds}: {}", round + 1, name(side));
            let mut cells = Vec::new();
            let result = one_round(side, &mut cells);
            cells.into_iter().for_each(|(what, cell)| report.add(name(side), what, cell));
            if let Err(e) = result {
                interrupt::check()?;
                report.note(&format!("round {}, {}: {e:#}", round + 1, name(side)));
            }
        }
    }
    Ok(())
}

/// A front-end on its CPU, connected to the back-end at `socket`; `options` as for [`TestpmdConfig::virtio_user`].
pub fn start_frontend(socket: &Path, options: &str) -> Result<Testpmd> {
    start_frontend_on(std::slice::from_ref(&socket), options)
}

/// The same with a port for each socket.
pub fn start_frontend_on(sockets: &[impl AsRef<Path>], options: &str) -> Result<Testpmd> {
    let name = format!("vbf{}", std::process::id());
    let mut config = TestpmdConfig::virtio_user(&name, OTHER_CPU, "", 1, options);
    config.vdevs.clear();
    for (i, socket) in sockets.iter().enumerate() {
        let path = socket.as_ref().to_str().context("socket path")?;
        let one = TestpmdConfig::virtio_user(&name, OTHER_CPU, path, 1, options);
        config.vdevs.extend(
            one.vdevs.iter().map(|v| v.replacen("net_virtio_user0", &format!("net_virtio_user{i}"), 1)),
        );
    }
    let config = TestpmdConfig { memory: Memory::Huge, memory_mib: MEMORY_MIB, ..config };
    Testpmd::start(&config).context("front-end")
}

/// The report as text on stdout and, if wanted, as JSON in a file.
pub fn publish<W: Rows>(report: &Report<W>, json: Option<&Path>) -> Result<()> {
    print!("{}", report.text());
    if let Some(path) = json {
        std::fs::write(path, report.json()?).with_context(|| path.display().to_string())?;
        println!("JSON: {}", path.display());
    }
    Ok(())
}
