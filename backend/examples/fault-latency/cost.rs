//! What the programs cost: per context switch and per page fault, attached against detached, alternating in one run.
//!
//! A switch is half a round trip of two threads on one CPU that wake each other by eventfds. The difference is what matters:
//! - *another process*: every switch of the machine pays this while the tracepoint is attached;
//! - *this process*: its threads pay for a look at their stack each time they fall asleep;
//! - *fault*: a first touch of anonymous memory, which no program looks at;
//! - *stall*: a missing page that another thread supplies at once; what is measured costs something itself.

use crate::uffd::{Missing, PAGE};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::eventfd::EventFd;
use nix::unistd::Pid;
use serde_json::json;
use std::error::Error;
use std::process::Command;
use std::thread;
use std::time::Instant;
use vhost_user_net::observe::load::{Programs, Ways};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Alternations of attached and detached.
const ROUNDS: usize = 9;
const ROUND_TRIPS: u32 = 30_000;
/// Pages of a round that are touched first.
const FAULTS: usize = 8_192;
/// Pages of a round that are missing.
const STALLS: usize = 500;

/// Measures, and prints a table and a line of JSON.
pub fn run() -> Result<()> {
    let instance = format!("fault-latency-{}", std::process::id());
    let missing = Missing::prompt(2 * ROUNDS * STALLS)?;
    let mut next = 0;
    let mut attached = Samples::default();
    let mut detached = Samples::default();
    let mut mode = "";
    for _ in 0..ROUNDS {
        detached.round(&missing, &mut next)?;
        let (mut programs, _events) = Programs::load(&instance, &["vm1".to_owned()], Ways::default())?;
        programs.arm()?;
        mode = ebpf_common::faults::mode::NAMES[programs.mode() as usize];
        attached.round(&missing, &mut next)?;
    }
    println!("{mode}, medians of {ROUNDS} alternating rounds:");
    println!("{:32}{:>12}{:>12}{:>12}", "", "detached", "attached", "difference");
    let mut rows = serde_json::Map::new();
    for ((name, before), (_, after)) in detached.rows().into_iter().zip(attached.rows()) {
        println!("{name:32}{before:>9} ns{after:>9} ns{:>+9} ns", after - before);
        rows.insert(
            name.replace(", ", "_").replace(' ', "_"),
            json!({ "detached_ns": before, "attached_ns": after }),
        );
    }
    println!("{}", json!({ "mode": mode, "rounds": ROUNDS, "cost": rows }));
    Ok(())
}

#[derive(Default)]
struct Samples {
    other_switch: Vec<i64>,
    own_switch: Vec<i64>,
    fault: Vec<i64>,
    stall: Vec<i64>,
}

impl Samples {
    fn round(&mut self, missing: &Missing, next: &mut usize) -> Result<()> {
        let other = Command::new(std::env::current_exe()?).arg("--switches").output()?;
        self.other_switch.push(String::from_utf8(other.stdout)?.trim().parse()?);
        self.own_switch.push(switch_ns()?);
        self.fault.push(fault_ns());
        let started = Instant::now();
        for page in *next..*next + STALLS {
            // SAFETY: a mapped page, which will come.
            unsafe { (missing.page(page) as *const u8).read_volatile() };
        }
        *next += STALLS;
        self.stall.push(started.elapsed().as_nanos() as i64 / STALLS as i64);
        Ok(())
    }

    fn rows(&mut self) -> [(&'static str, i64); 4] {
        let median = |samples: &mut Vec<i64>| {
            samples.sort_unstable();
            samples[samples.len() / 2]
        };
        [
            ("context switch, another process", median(&mut self.other_switch)),
            ("context switch, this process", median(&mut self.own_switch)),
            ("page fault", median(&mut self.fault)),
            ("stall, supplied at once", median(&mut self.stall)),
        ]
    }
}

/// Prints what a switch takes: for `another process`.
pub fn print_switches() -> Result<()> {
    println!("{}", switch_ns()?);
    Ok(())
}

/// Time of a context switch between two threads on one CPU.
fn switch_ns() -> Result<i64> {
    let this = Pid::from_raw(0);
    let all = sched_getaffinity(this)?;
    let cpu = (0..CpuSet::count()).find(|cpu| all.is_set(*cpu).unwrap_or(false)).ok_or("no CPU")?;
    let mut one = CpuSet::new();
    one.set(cpu)?;
    sched_setaffinity(this, &one)?;
    let (ping, pong) = (EventFd::new()?, EventFd::new()?);
    let elapsed = thread::scope(|scope| {
        let other = scope.spawn(|| {
            for _ in 0..ROUND_TRIPS {
                if ping.read().and_then(|_| pong.write(1)).is_err() {
                    return;
                }
            }
        });
        let started = Instant::now();
        for _ in 0..ROUND_TRIPS {
            ping.write(1)?;
            pong.read()?;
        }
        let elapsed = started.elapsed();
        drop(other.join());
        Ok::<_, nix::Error>(elapsed)
    });
    sched_setaffinity(this, &all)?;
    Ok(elapsed?.as_nanos() as i64 / i64::from(2 * ROUND_TRIPS))
}

/// Time of a first touch of a page of anonymous memory.
fn fault_ns() -> i64 {
    let len = FAULTS * PAGE;
    // SAFETY: a new mapping, of which each page is written to once, and which goes again.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let start = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        assert!(start != libc::MAP_FAILED, "mmap");
        libc::madvise(start, len, libc::MADV_NOHUGEPAGE);
        let started = Instant::now();
        for page in 0..FAULTS {
            start.cast::<u8>().add(page * PAGE).write_volatile(1);
        }
        let elapsed = started.elapsed();
        libc::munmap(start, len);
        elapsed.as_nanos() as i64 / FAULTS as i64
    }
}
