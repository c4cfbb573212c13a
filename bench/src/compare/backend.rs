//! A contender's process, started on its CPU and ended when dropped. Not here: which programs there are.
#![forbid(unsafe_code)]

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{BACKEND_CPU, MEMORY_MIB};
use crate::interrupt;
use crate::procstat;
use crate::testpmd::{Memory, Testpmd, TestpmdConfig};

const START_TIMEOUT: Duration = Duration::from_secs(10);
const END_TIMEOUT: Duration = Duration::from_secs(3);

enum Process {
    Plain(Child),
    Testpmd(Testpmd),
}

/// A running contender.
pub struct BackEnd {
    process: Process,
}

impl BackEnd {
    /// testpmd with these devices, io forwarding between them.
    pub fn testpmd(vdevs: Vec<String>) -> Result<Self> {
        Self::testpmd_doing(vdevs, "io", None)
    }

    /// testpmd with these devices in any forward mode; frames that it makes have so many bytes.
    pub fn testpmd_doing(vdevs: Vec<String>, mode: &str, frame: Option<usize>) -> Result<Self> {
        let config = TestpmdConfig {
            name: format!("vbb{}", std::process::id()),
            cpu: BACKEND_CPU,
            vdevs,
            memory: Memory::Huge,
            memory_mib: MEMORY_MIB,
            queue_pairs: 1,
            app_args: Vec::new(),
        };
        let mut testpmd = Testpmd::start(&config).context("DPDK back-end")?;
        if let Some(bytes) = frame {
            testpmd.set_frame_size(bytes)?;
        }
        testpmd.start_forwarding(mode)?;
        let it = Self { process: Process::Testpmd(testpmd) };
        it.check_cpu()?;
        Ok(it)
    }

    /// Any other program; waits until `ready` says that what it makes is there.
    pub fn spawn(mut command: Command, what: &str, mut ready: impl FnMut() -> bool) -> Result<Self> {
        command.stdin(Stdio::null()).process_group(0);
        procstat::pin_and_die_with_parent(&mut command, Some(BACKEND_CPU));
        let child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        let mut it = Self { process: Process::Plain(child) };
        interrupt::wait_for(what, START_TIMEOUT, || {
            if let Process::Plain(child) = &mut it.process {
                ensure!(child.try_wait()?.is_none(), "the back-end ended at once: {command:?}");
            }
            Ok(ready())
        })?;
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

    /// Its command line, if it is a testpmd.
    pub fn as_testpmd(&mut self) -> Option<&mut Testpmd> {
        match &mut self.process {
            Process::Plain(_) => None,
            Process::Testpmd(t) => Some(t),
        }
    }

    /// Keeps it from taking packets, while they pile up in the uplink.
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
