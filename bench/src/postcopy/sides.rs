//! The back-ends that are measured, as processes on a CPU of their own.
#![forbid(unsafe_code)]

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::driver::Direction;
use super::second::SecondPort;
use crate::testpmd::{Memory, Testpmd, TestpmdConfig};
use crate::{interrupt, procstat};

/// The back-end's CPU.
const BACKEND_CPU: usize = 0;
/// The CPU of this program where it starts the back-ends itself.
pub const OTHER_CPU: usize = 1;
const MEMORY_MIB: u32 = 192;
const START_TIMEOUT: Duration = Duration::from_secs(10);
const END_TIMEOUT: Duration = Duration::from_secs(3);

/// A contender.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Side {
    /// Whatever listens there, at one socket for each port; started by somebody else, for the directions that were
    /// asked for.
    Socket(Vec<PathBuf>),
    /// testpmd with `net_vhost`, `postcopy-support=1`
    Dpdk(Memory),
    /// `vhost-user-net`
    Ours(PathBuf),
}

impl Side {
    /// Short name for tables and JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Socket(_) => "socket",
            Self::Dpdk(_) => "dpdk",
            Self::Ours(_) => "ours",
        }
    }

    /// Why this side cannot take part in a direction, with this at the second port.
    pub fn objection(&self, direction: Direction, second: Option<SecondPort>) -> Option<&'static str> {
        match (self, direction, second) {
            (Self::Ours(_), Direction::Echo, _) => {
                Some("no uplink of ours sends packets back to their sender")
            }
            (Self::Dpdk(_), Direction::Rx | Direction::Echo, Some(SecondPort::Steady { .. })) => {
                Some("all ports of a testpmd do the same, and the second one is to drop packets")
            }
            (Self::Socket(list), _, Some(_)) if list.len() < 2 => Some("--socket names one port only"),
            _ => None,
        }
    }
}

enum Process {
    None,
    Plain(Child),
    Testpmd(Testpmd),
}

/// A back-end that listens. Dropping it ends it.
pub struct BackEnd {
    process: Process,
    sockets: Vec<PathBuf>,
    _folder: Option<tempfile::TempDir>,
}

impl BackEnd {
    /// Starts one for packets of a direction at its first port, with or without a second one.
    pub fn start(side: &Side, direction: Direction, second: Option<SecondPort>) -> Result<Self> {
        if let Side::Socket(paths) = side {
            return Ok(Self { process: Process::None, sockets: paths.clone(), _folder: None });
        }
        let folder = tempfile::Builder::new().prefix("vub-").tempdir()?;
        let ports = if second.is_some() { 2 } else { 1 };
        let sockets: Vec<PathBuf> =
            (0..ports).map(|port| folder.path().join(format!("vhost{port}.sock"))).collect();
        let paths: Vec<String> = sockets.iter().map(|socket| socket.display().to_string()).collect();
        let process = match side {
            Side::Ours(program) => {
                let uplink = |port: usize| match (port, second) {
                    // Only what is measured gets packets, or what does the same.
                    (1, Some(SecondPort::Steady { .. })) => "null",
                    _ if direction == Direction::Rx => "null:generate",
                    _ => "null",
                };
                let port = |(port, path): (usize, &String)| {
                    format!("[[port]]\nname = 'port{port}'\nsocket = '{path}'\nuplink = '{}'\n", uplink(port))
                };
                let file = folder.path().join("ports.toml");
                std::fs::write(&file, paths.iter().enumerate().map(port).collect::<String>())?;
                let mut command = Command::new(program);
                command.arg("--config").arg(&file).args(["--log", "warn"]);
                Process::Plain(spawn(command, &sockets)?)
            }
            Side::Dpdk(memory) => {
                let config = TestpmdConfig {
                    name: format!("vbp{}", std::process::id()),
                    cpu: BACKEND_CPU,
                    vdevs: (paths.iter().enumerate())
                        .map(|(port, path)| format!("net_vhost{port},iface={path},postcopy-support=1"))
                        .collect(),
                    memory: *memory,
                    memory_mib: MEMORY_MIB,
                    queue_pairs: 1,
                    // Its mlockall would fill the guest's memory with zeros.
                    app_args: vec!["--no-mlockall".into()],
                };
                let mut testpmd = Testpmd::start(&config).context("DPDK back-end")?;
                testpmd.start_forwarding(match direction {
                    Direction::Tx => "rxonly",
                    Direction::Rx => "txonly",
                    Direction::Echo => "io",
                })?;
                free_control_thread(testpmd.pid())?;
                Process::Testpmd(testpmd)
            }
            Side::Socket(_) => Process::None,
        };
        Ok(Self { process, sockets, _folder: Some(folder) })
    }

    /// Where it listens, port by port.
    pub fn sockets(&self) -> &[PathBuf] {
        &self.sockets
    }

    /// Its process id, if it was started here.
    pub fn pid(&self) -> Option<u32> {
        match &self.process {
            Process::None => None,
            Process::Plain(child) => Some(child.id()),
            Process::Testpmd(testpmd) => Some(testpmd.pid()),
        }
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<String> {
        match &mut self.process {
            Process::None => None,
            Process::Plain(child) => {
                child.try_wait().ok().flatten().map(|s| format!("the back-end ended: {s}"))
            }
            Process::Testpmd(testpmd) => testpmd.ended(),
        }
    }
}

/// DPDK's control thread spins for a queue's lock while the packet thread waits for pages under it. On one CPU the
/// two would keep each other from running, which nobody does to them in earnest: it may have ours, too.
fn free_control_thread(pid: u32) -> Result<()> {
    let mut both = CpuSet::new();
    both.set(BACKEND_CPU)?;
    both.set(OTHER_CPU)?;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?;
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if let (true, Some(id)) = (name.contains("vhost"), task.file_name().to_str()) {
            sched_setaffinity(Pid::from_raw(id.parse()?), &both)?;
        }
    }
    Ok(())
}

fn spawn(mut command: Command, sockets: &[PathBuf]) -> Result<Child> {
    command.stdin(Stdio::null()).process_group(0);
    procstat::pin_and_die_with_parent(&mut command, Some(BACKEND_CPU));
    let mut child = command.spawn().with_context(|| format!("starting {command:?}"))?;
    interrupt::wait_for("the back-end's socket", START_TIMEOUT, || {
        ensure!(child.try_wait()?.is_none(), "the back-end ended at once: {command:?}");
        Ok(sockets.iter().all(|socket| socket.exists()))
    })?;
    Ok(child)
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        // testpmd ends itself when it is dropped.
        let Process::Plain(child) = &mut self.process else { return };
        let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
        let end = Instant::now() + END_TIMEOUT;
        while matches!(child.try_wait(), Ok(None)) {
            if Instant::now() > end {
                let _ = child.kill();
                let _ = child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
