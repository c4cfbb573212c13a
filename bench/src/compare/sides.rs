//! The contenders, each started on its CPU with a tap, and ended when dropped.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::procstat;
use crate::testpmd::{Memory, Testpmd, TestpmdConfig};
use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use lab::wire::Link;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{BACKEND_CPU, MEMORY_MIB};
use crate::interrupt;
use crate::raw::{Direction, Engine};

const START_TIMEOUT: Duration = Duration::from_secs(10);
const END_TIMEOUT: Duration = Duration::from_secs(3);

/// A contender.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// write(2), read(2) and nothing else
    Bare,
    /// the same in io_uring batches
    BareUring,
    /// testpmd with net_vhost and net_tap, io forwarding
    Dpdk,
    /// `vhost-user-net`
    Ours(PathBuf),
}

impl Side {
    /// Short name for tables and JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::BareUring => "bare-uring",
            Self::Dpdk => "dpdk",
            Self::Ours(_) => "ours",
        }
    }
}

enum Process {
    Plain(Child),
    Testpmd(Testpmd),
}

/// A running contender.
pub struct BackEnd {
    process: Process,
}

impl BackEnd {
    /// A bare loop of this program as a process of its own, so that it is measured as the others are.
    pub fn bare(engine: Engine, direction: Direction, size: usize, tap: &str) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        let word =
            |v: Option<clap::builder::PossibleValue>| v.map(|v| v.get_name().to_string()).unwrap_or_default();
        command.args([
            "tap-raw",
            "--forever",
            tap,
            "--cpu",
            &BACKEND_CPU.to_string(),
            "--size",
            &size.to_string(),
        ]);
        command.args(["--engine", &word(engine.to_possible_value())]);
        command.args(["--direction", &word(direction.to_possible_value())]);
        Self::spawn(command, tap, None)
    }

    /// DPDK's or our back-end, listening at `socket`.
    pub fn vhost_user(side: &Side, socket: &Path, tap: &str) -> Result<Self> {
        let path = socket.to_str().context("socket path")?;
        match side {
            Side::Ours(program) => {
                let mut command = Command::new(program);
                command.args(["--socket-path", path, "--uplink", &format!("tap:{tap}"), "--log", "warn"]);
                Self::spawn(command, tap, Some(socket))
            }
            Side::Dpdk => {
                let config = TestpmdConfig {
                    name: format!("vbb{}", std::process::id()),
                    cpu: BACKEND_CPU,
                    vdevs: vec![format!("net_vhost0,iface={path}"), format!("net_tap0,iface={tap}")],
                    memory: Memory::Huge,
                    memory_mib: MEMORY_MIB,
                    queue_pairs: 1,
                    app_args: Vec::new(),
                };
                let mut testpmd = Testpmd::start(&config).context("DPDK back-end")?;
                testpmd.start_forwarding("io")?;
                let it = Self { process: Process::Testpmd(testpmd) };
                it.check_cpu()?;
                Link::named(tap).set_up()?;
                Ok(it)
            }
            Side::Bare | Side::BareUring => bail!("the bare loops speak no vhost-user"),
        }
    }

    fn spawn(mut command: Command, tap: &str, socket: Option<&Path>) -> Result<Self> {
        use std::os::unix::process::CommandExt;
        command.stdin(Stdio::null()).process_group(0);
        procstat::pin_and_die_with_parent(&mut command, Some(BACKEND_CPU));
        let child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        let mut it = Self { process: Process::Plain(child) };
        let link = Link::named(tap);
        interrupt::wait_for("the back-end's tap and socket", START_TIMEOUT, || {
            if let Process::Plain(child) = &mut it.process {
                ensure!(child.try_wait()?.is_none(), "the back-end ended at once: {command:?}");
            }
            Ok(link.exists() && socket.is_none_or(Path::exists))
        })?;
        link.set_up()?;
        it.check_cpu()?;
        Ok(it)
    }

    fn check_cpu(&self) -> Result<()> {
        let cpus = procstat::cpus_allowed(self.pid())?;
        ensure!(cpus == [BACKEND_CPU.to_string()], "threads of the back-end may run on CPUs {cpus:?}");
        Ok(())
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<String> {
        match &mut self.process {
            Process::Plain(child) => {
                child.try_wait().ok().flatten().map(|s| format!("the back-end ended: {s}"))
            }
            Process::Testpmd(t) => t.ended(),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        match &self.process {
            Process::Plain(child) => child.id(),
            Process::Testpmd(t) => t.pid(),
        }
    }

    /// Keeps it from taking packets, while they pile up in the tap.
    pub fn pause(&mut self) -> Result<()> {
        match &mut self.process {
            Process::Plain(_) => self.signal(Signal::SIGSTOP),
            // Not SIGSTOP: net_tap has a real-time signal sent to itself for each packet, and once too many are
            // queued the kernel sends SIGIO instead, which ends testpmd.
            Process::Testpmd(t) => t.stop_forwarding(),
        }
    }

    /// Lets it go on.
    pub fn resume(&mut self) -> Result<()> {
        match &mut self.process {
            Process::Plain(_) => self.signal(Signal::SIGCONT),
            Process::Testpmd(t) => t.start_forwarding("io"),
        }
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid() as i32), signal).context("signalling the back-end")
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        // It may be stopped by a measurement that failed.
        let _ = self.signal(Signal::SIGCONT);
        if let Process::Plain(child) = &mut self.process {
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
}
