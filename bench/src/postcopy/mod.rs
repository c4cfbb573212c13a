//! `vubench postcopy`: QEMU's part of a postcopy migration, on the destination, against any vhost-user back-end.
//!
//! ```text
//!   source: a copy of the memory ──► link (latency, bandwidth, background stream) ─┐ pages
//!                                                                                  ▼
//!   driver (the guest's CPU) ◄──► guest memory: a memfd of holes ◄── UFFDIO_COPY ── deliverer
//!        │ rings                         ▲ shared                                  │    ▲
//!        ▼                               │                              UFFDIO_WAKE│    │ faults
//!   ═════╪═══════════════════════════════╪═════════════════════════════════════════╪════╪═══ control socket
//!        ▼                               ▼                                         ▼    │
//!   back-end under test: its mapping of that memory, its userfaultfd ───────────────────┘
//! ```
//!
//! | module | what |
//! |---|---|
//! | `run`, `arrival` | one measurement from the first message to the last; its beginning |
//! | `second`, `steady` | what another port of the back-end does meanwhile; one at a fixed rate |
//! | `session` | the messages, in QEMU's order |
//! | `deliver`, `schedule` | the thread that answers faults; which page comes when (pure) |
//! | `driver`, `ring`, `packet` | the guest's driver; its side of a split ring, what is in packets (pure) |
//! | `guest`, `layout`, `mapping`, `uffd` | memory, where things lie in it (pure), system calls |
//! | `suite` | all cases of the comparison with DPDK, and the numbers to reach (pure) |
//! | `findings`, `rates`, `histogram`, `pace`, `table` | what was wrong, numbers (pure), the report |
//! | `sides` | back-ends as processes |

mod arrival;
mod deliver;
mod driver;
#[cfg(test)]
mod fake;
mod findings;
mod guest;
mod histogram;
mod layout;
mod pace;
mod rates;
mod ring;
mod run;
mod schedule;
mod second;
mod session;
mod sides;
mod sleeper;
mod steady;
mod suite;
mod table;
#[cfg(test)]
mod tests;
mod uffd;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::mapping::PAGE;
use crate::packet;
use crate::testpmd::{self, HugePages, Memory};
use crate::{interrupt, procstat};
use driver::Direction;
use guest::Backing;
use run::{Case, Outcome};
use schedule::Link;
use second::SecondPort;
use sides::{BackEnd, OTHER_CPU, Side};
use table::{Report, Row};

/// For one testpmd of 192 MiB in pages of 2 MiB, and its own tables.
const HUGEPAGES: u64 = 128;
/// For the memory of machines in hugepages: two, with 1024 buffers each.
const GUEST_HUGEPAGES: u64 = 140;
/// Buffers per ring entry where the ring is stopped often: the stall must last.
const STOP_BUFFERS: u64 = 16;
const SUITE_ROUNDS: usize = 3;
/// How long a stall is watched beside a second port at a fixed rate, ms.
const WATCH_MS: u64 = 3000;
/// Stops come within so many times the latency: as long as DPDK holds a queue for one burst.
const STOP_WITHIN: u64 = 32;

#[derive(clap::Args)]
pub struct Args {
    /// Measure the back-end that listens here
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The second port of that back-end, for --second
    #[arg(long, value_name = "PATH", requires = "socket")]
    second_socket: Option<PathBuf>,
    /// Start and measure DPDK's back-end (testpmd with net_vhost)
    #[arg(long)]
    dpdk: bool,
    /// Start and measure our back-end
    #[arg(long, value_name = "PROGRAM")]
    backend_bin: Option<PathBuf>,
    /// Give testpmd hugepages
    #[arg(long)]
    hugepages: bool,
    /// All cases of the comparison, and whether the numbers to reach are reached; only --rounds, --frame and what names
    /// back-ends count beside it
    #[arg(long)]
    suite: bool,
    /// Where packets go; the back-end at --socket must suit it
    #[arg(long, value_delimiter = ',', default_values = ["tx"])]
    direction: Vec<Direction>,
    /// From a fault to its page, in microseconds
    #[arg(long, value_delimiter = ',', default_values_t = [5000u64])]
    latency_us: Vec<u64>,
    /// Bandwidth of the link in bytes per second; 0 is no limit
    #[arg(long, default_value_t = 0)]
    bandwidth: u64,
    /// Pages per second that come without being asked for
    #[arg(long, default_value_t = 0)]
    background: u64,
    /// The rings' own pages are missing too at the start
    #[arg(long)]
    rings_missing: bool,
    /// No page ever comes: is the control socket answered, does the port survive?
    #[arg(long, conflicts_with = "stops")]
    never: bool,
    /// Stop and restart the ring this often in stalls, instead of measuring rates
    #[arg(long, default_value_t = 0)]
    stops: usize,
    /// Packets whose time is wanted
    #[arg(long, default_value_t = 10_000)]
    packets: u64,
    /// Entries of each ring
    #[arg(long, default_value_t = 256)]
    ring_size: u16,
    /// Buffers of each ring, one page each [default: ring size; 16 times that with --stops]
    #[arg(long)]
    buffers: Option<u64>,
    /// Bytes of each frame that the guest sends
    #[arg(long, default_value_t = 64)]
    frame: usize,
    /// Negotiate MRG_RXBUF
    #[arg(long)]
    mergeable: bool,
    /// What guest memory is made of
    #[arg(long, value_enum, default_value_t)]
    memory: Backing,
    /// Tell memory slot by slot (CONFIGURE_MEM_SLOTS)
    #[arg(long)]
    slots: bool,
    /// What a second port of the back-end does meanwhile
    #[arg(long, value_enum, conflicts_with = "stops")]
    second: Option<What>,
    /// Rate of --second steady, packets per second
    #[arg(long, default_value_t = 500_000)]
    second_pps: u64,
    /// Watch a stall for so long, whatever number of packets there is by then [default with --second steady: 3000]
    #[arg(long)]
    watch_ms: Option<u64>,
    /// How long full rate is measured, or how long no page comes with --never, or --second steady is watched alone
    #[arg(long, default_value_t = 1000)]
    steady_ms: u64,
    /// Give up waiting for the packets after so many seconds
    #[arg(long, default_value_t = 60)]
    limit_s: u64,
    /// Rounds; the sides take turns in each [default: 1, with --suite 3]
    #[arg(long)]
    rounds: Option<usize>,
    /// Write the JSON report here
    #[arg(long)]
    json: Option<PathBuf>,
}

/// What a second port does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// It has all its memory and sends at a fixed rate
    Steady,
    /// It is in postcopy too, and no page of it ever comes
    Stalled,
}

impl Args {
    fn sides(&self) -> Result<Vec<Side>> {
        let mut sides = Vec::new();
        if let Some(program) = &self.backend_bin {
            ensure!(program.exists(), "there is no {}", program.display());
            sides.push(Side::Ours(std::path::absolute(program)?));
        }
        if self.dpdk {
            testpmd::available()?;
            sides.push(Side::Dpdk(if self.hugepages { Memory::Huge } else { Memory::Ordinary }));
        }
        if let Some(path) = &self.socket {
            sides.push(Side::Socket([path].into_iter().chain(&self.second_socket).cloned().collect()));
        }
        ensure!(!sides.is_empty(), "name a back-end: --socket PATH, --dpdk or --backend-bin PROGRAM");
        Ok(sides)
    }

    fn check(&self) -> Result<()> {
        ensure!(
            self.ring_size.is_power_of_two() && self.ring_size <= 32_768,
            "--ring-size is a power of two"
        );
        let frames = packet::FRAME_MIN..=packet::FRAME_MAX;
        ensure!(frames.contains(&self.frame), "--frame is {} to {}", frames.start(), frames.end());
        let buffers = self.buffers.unwrap_or(u64::from(self.ring_size));
        ensure!(buffers >= u64::from(self.ring_size), "--buffers must be at least --ring-size");
        ensure!(
            buffers.is_multiple_of(u64::from(self.ring_size)) && buffers <= 1 << 20,
            "--buffers is a multiple of --ring-size, at most 1048576"
        );
        ensure!(self.background <= 10_000_000, "--background is at most 10000000 pages per second");
        Ok(())
    }

    fn cases(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        let many = if self.stops > 0 { STOP_BUFFERS } else { 1 };
        for &direction in &self.direction {
            for &latency_us in &self.latency_us {
                let link = Link {
                    latency_ns: (!self.never).then_some(latency_us * 1000),
                    bandwidth: self.bandwidth,
                    background: self.background,
                };
                let case = Case {
                    direction,
                    link,
                    ring_size: self.ring_size,
                    buffers: self.buffers.unwrap_or(many * u64::from(self.ring_size)),
                    frame: self.frame,
                    memory: self.memory,
                    slots: self.slots,
                    second: self.second.map(|what| match what {
                        What::Steady => SecondPort::Steady { pps: self.second_pps },
                        What::Stalled => SecondPort::Stalled,
                    }),
                    rings_arrived: !self.rings_missing,
                    mergeable: self.mergeable,
                    packets: self.packets,
                    stops: self.stops,
                    stop_within: Duration::from_micros(STOP_WITHIN * latency_us),
                    watch: self
                        .watch_ms
                        .or(self.second.filter(|w| *w == What::Steady).map(|_| WATCH_MS))
                        .map(Duration::from_millis),
                    steady: Duration::from_millis(self.steady_ms),
                    limit: Duration::from_secs(self.limit_s),
                };
                cases.push(case);
                if self.never || self.suite {
                    break;
                }
            }
        }
        if self.suite { cases.first().map(suite::cases).unwrap_or_default() } else { cases }
    }
}

fn label(case: &Case) -> String {
    let mut text = format!("{:?}", case.direction).to_lowercase();
    match case.link.latency_ns {
        Some(ns) => text += &format!(", {} ms per page", ns as f64 / 1e6),
        None => text += ", no page ever comes",
    }
    match case.link.bandwidth {
        0 => {}
        b => text += &format!(", {:.1} MB/s", b as f64 / 1e6),
    }
    match case.link.background {
        0 => {}
        b => text += &format!(", background {b} pages/s"),
    }
    text += &format!(", ring of {}, {} buffers, frames of {} B", case.ring_size, case.buffers, case.frame);
    if !case.rings_arrived {
        text += ", rings missing";
    }
    if case.memory != Backing::Memfd {
        text += &format!(", {:?}", case.memory).to_lowercase();
    }
    if case.slots {
        text += ", memory slots";
    }
    let counts = case.stops == 0 && case.link.latency_ns.is_some() && case.watch.is_none();
    if case.stops > 0 {
        text += ", ring stopped";
    }
    if let Some(watch) = case.watch {
        text += &format!(", watched for {} s", watch.as_secs_f64());
    }
    match case.second {
        Some(SecondPort::Steady { pps }) => {
            text += &format!("; second port at {} kpps", pps as f64 / 1e3);
        }
        Some(SecondPort::Stalled) => text += "; second port stalled for ever",
        None => {}
    }
    if counts {
        text += &format!(", {} packets", case.packets);
    }
    text
}

pub fn run(args: &Args) -> Result<()> {
    args.check()?;
    let sides = args.sides()?;
    interrupt::install()?;
    if sides.iter().any(|s| !matches!(s, Side::Socket(_))) {
        let mut cpus = CpuSet::new();
        cpus.set(OTHER_CPU)?;
        sched_setaffinity(Pid::from_raw(0), &cpus).context("this measurement needs two CPUs, 0 and 1")?;
    }
    let huge = if sides.contains(&Side::Dpdk(Memory::Huge)) { HUGEPAGES } else { 0 };
    let guests = if args.memory == Backing::Hugetlb { GUEST_HUGEPAGES } else { 0 };
    let _pages = if huge + guests > 0 { Some(HugePages::reserve(huge + guests)?) } else { None };
    let mut report = Report::default();
    let rounds = args.rounds.unwrap_or(if args.suite { SUITE_ROUNDS } else { 1 });
    for case in args.cases() {
        let (label, link) = (label(&case), case.link);
        for round in 0..rounds {
            for i in 0..sides.len() {
                let side = &sides[(i + round) % sides.len()];
                if let Some(why) = side.objection(case.direction, case.second) {
                    report.note(format!("{} was left out of {label}: {why}", side.name()));
                    continue;
                }
                eprintln!("{label}: round {}/{}: {}", round + 1, rounds, side.name());
                let case = suite::at_side(&case, if args.suite { side.name() } else { "" });
                let outcome = one(side, &case);
                interrupt::check()?;
                report.add(Row {
                    side: side.name(),
                    round: round + 1,
                    label: label.clone(),
                    case: case.clone(),
                    latency_us: link.latency_ns.map(|ns| ns / 1000),
                    bandwidth: link.bandwidth,
                    background: link.background,
                    outcome: outcome.map_err(|e| format!("{e:#}")),
                });
            }
        }
    }
    if args.suite {
        report.judge();
    }
    print!("{}", report.text());
    if let Some(path) = &args.json {
        std::fs::write(path, report.json()?).with_context(|| path.display().to_string())?;
        println!("JSON: {}", path.display());
    }
    if args.suite {
        ensure!(report.is_reached(), "not all numbers to reach are reached (NO above)");
        return Ok(());
    }
    ensure!(report.is_clean(), "not every back-end did what it must (lines with ! above)");
    Ok(())
}

/// One case at one side, which is started afresh. Where stops are wanted, machines come and go until there were
/// enough of them.
fn one(side: &Side, case: &Case) -> Result<Outcome> {
    let mut backend = BackEnd::start(side, case.direction, case.second)?;
    let start = Instant::now();
    let mut all: Option<Outcome> = None;
    loop {
        let began = (Instant::now(), waited(&backend));
        let mut outcome = match run::measure(backend.sockets(), case) {
            Ok(outcome) => outcome,
            Err(e) => match backend.ended() {
                Some(how) => bail!("{e:#}; {how}"),
                None => return Err(e),
            },
        };
        if let ((at, Some(before)), Some(after)) = (began, waited(&backend)) {
            let missing = after.saturating_sub(before) as f64 / at.elapsed().as_nanos() as f64;
            outcome.cpu_missing_percent = Some(100.0 * missing);
        }
        if let Some(before) = all {
            outcome.join(before);
        }
        if outcome.stops.len() >= case.stops || start.elapsed() > case.limit {
            return Ok(outcome);
        }
        all = Some(outcome);
    }
}

fn waited(backend: &BackEnd) -> Option<u64> {
    backend.pid().and_then(|pid| procstat::cpu_wait_ns(pid).ok())
}
