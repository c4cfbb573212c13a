//! Child processes that never outlive a test: they end with their guard, and with this process.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::netns::NetNs;

/// Time that a process gets to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(15);

/// A running child; dropped, it is asked to end, then killed.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts a command, its output (both kinds) in `log`, inside `netns` if one is given.
    pub fn start(name: &str, mut command: Command, log: &Path, netns: Option<&NetNs>) -> Result<Self> {
        let output = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        command.stdout(output.try_clone()?).stderr(output);
        enter_on_exec(&mut command, netns)?;
        let program = command.get_program().to_owned();
        let child =
            spawn_from_keeper(command).with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Self { child, name: name.to_owned(), log: log.to_owned() })
    }

    /// The name given at start, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Takes the pipe to the child's standard input, if the command was made with one.
    pub fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// What the process has printed so far.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Fails if the process has ended, with the end of what it printed.
    pub fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let output = self.output();
            let last: Vec<&str> = output.lines().rev().take(3).collect();
            bail!(
                "{} has ended ({status}): {}",
                self.name,
                last.into_iter().rev().collect::<Vec<_>>().join(" | ")
            );
        }
        Ok(())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.pid())?), signal)
            .with_context(|| format!("{signal} to {}", self.name))
    }

    /// Kills with SIGKILL and waits for the end.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Sends SIGTERM and waits for the end; fails if it takes longer than a generous grace time.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        self.signal(Signal::SIGTERM)?;
        let started = Instant::now();
        while started.elapsed() < GRACE {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.kill()?;
        bail!("{} did not end within {} s of SIGTERM", self.name, GRACE.as_secs())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.terminate() {
            eprintln!("lab: {error:#}");
        }
    }
}

/// Makes the command run inside a network namespace, and die with this process.
pub(crate) fn enter_on_exec(command: &mut Command, netns: Option<&NetNs>) -> Result<()> {
    let enter = netns.map(NetNs::entrance).transpose()?;
    let in_child = move || {
        if let Some(enter) = &enter {
            enter()?;
        }
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes system calls (setns, prctl); it neither
    // allocates nor takes a lock, and the descriptor it uses is owned by it.
    unsafe { command.pre_exec(in_child) };
    Ok(())
}

/// Spawns from one thread that lives as long as the process: the parent-death signal is sent when the
/// spawning *thread* ends, and test threads end before their guards may.
fn spawn_from_keeper(command: Command) -> Result<Child> {
    type Order = (Command, mpsc::Sender<std::io::Result<Child>>);
    static KEEPER: OnceLock<mpsc::Sender<Order>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, answer) in inbox {
                // The one who asked may be gone; then the child's handle is dropped.
                let _ = answer.send(command.spawn());
            }
        });
        orders
    });
    let (answer, result) = mpsc::channel();
    keeper.send((command, answer)).context("the keeper thread is gone")?;
    Ok(result.recv().context("the keeper thread is gone")??)
}

/// Runs a short command to its end, inside `netns` if one is given, and returns what it printed.
pub(crate) fn run_to_end(mut command: Command, netns: Option<&NetNs>) -> Result<String> {
    enter_on_exec(&mut command, netns)?;
    command.stdin(Stdio::null());
    let out = command.output().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    if !out.status.success() {
        bail!("{command:?}: {} ({})", String::from_utf8_lossy(&out.stderr).trim(), out.status);
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}
