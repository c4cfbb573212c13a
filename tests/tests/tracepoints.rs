//! The program's static tracepoints, hit by perf and by bpftrace.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::rawfront::{Backend, Front, PATIENCE};
use lab::{backend_binary, find_in_path, skip};

/// Rings start and stop for so long while a tool looks on.
const LOOK: Duration = Duration::from_secs(2);
/// What perf calls the provider.
const GROUP: &str = "sdt_vhost_user_net";
/// A tool may take its time to begin.
const TOOL_PATIENCE: Duration = Duration::from_secs(60);

fn backend() -> Result<Backend> {
    Backend::with_options(&["--socket-path=@/vm1.sock", "--uplink=null"])
}

/// Makes a front-end start both rings and leave.
fn one_front_end(backend: &Backend) -> Result<()> {
    Front::up(&backend.socket("vm1"))?.prove_alive(1).map(drop)
}

#[test]
fn bpftrace_sees_rings_start_and_stop() -> Result<()> {
    const NAME: &str = "bpftrace_sees_rings_start_and_stop";
    if find_in_path("bpftrace").is_none() || !nix::unistd::geteuid().is_root() {
        skip(NAME, "there is no bpftrace, or no right to use it");
        return Ok(());
    }
    let backend = backend()?;
    let program = backend_binary()?;
    let point = |name: &str| format!("usdt:{}:vhost_user_net:{name}", program.display());
    let script = format!(
        "{} {{ printf(\"start %d %d %d %d\\n\", arg0, arg1, arg2, arg3); }} \
         {} {{ printf(\"stop %d %d %d %d\\n\", arg0, arg1, arg2, arg3); }}",
        point("ring_start"),
        point("ring_stop")
    );
    let folder = tempfile::tempdir()?;
    let output = folder.path().join("output");
    let mut tool = Command::new("bpftrace");
    tool.args(["-B", "line", "-e", &script]).stdin(Stdio::null());
    tool.stdout(fs::File::create(&output)?).stderr(fs::File::create(folder.path().join("errors"))?);
    let mut tool = tool.spawn()?;
    let started = Instant::now();
    let mut text = String::new();
    // It does not say when it has begun to look.
    let wanted = ["start 0 0 0 0\n", "start 0 0 1 0\n", "stop 0 0 0 0\n", "stop 0 0 1 1\n"];
    while started.elapsed() < TOOL_PATIENCE && !wanted.iter().all(|line| text.contains(line)) {
        one_front_end(&backend)?;
        std::thread::sleep(Duration::from_millis(50));
        text = fs::read_to_string(&output)?;
    }
    tool.kill()?;
    tool.wait()?;
    for line in wanted {
        let errors = fs::read_to_string(folder.path().join("errors"))?;
        ensure!(text.contains(line), "no {line:?}: {text}\n{errors}");
    }
    Ok(())
}

/// perf's own folder for programs it knows, and the points it has made in the kernel; they go when dropped.
struct Perf {
    folder: tempfile::TempDir,
    program: PathBuf,
    made: Vec<String>,
}

impl Perf {
    /// A copy of the program: points are known by its name, and others may look at the original.
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let program = folder.path().join(format!("vun{}", std::process::id()));
        fs::copy(backend_binary()?, &program)?;
        Ok(Self { folder, program, made: Vec::new() })
    }

    fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = self.command(arguments).output().context("cannot run perf")?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        ensure!(output.status.success(), "perf {arguments:?}: {text}");
        Ok(text)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("perf");
        command.arg("--buildid-dir").arg(self.folder.path()).args(arguments).stdin(Stdio::null());
        command
    }

    /// Makes the point known to the kernel, under a name of its own if others look at one of the name; returns it.
    fn make(&mut self, point: &str) -> Result<String> {
        let program = self.program.display().to_string();
        let said = self.run(&["probe", "-f", "-x", &program, &format!("%{GROUP}:{point}")])?;
        let name =
            said.split_whitespace().find(|word| word.starts_with(GROUP)).context(said.clone())?.to_owned();
        self.made.push(name.clone());
        Ok(name)
    }
}

impl Drop for Perf {
    fn drop(&mut self) {
        for name in &self.made {
            let _ = self.run(&["probe", "-q", "-d", name]);
        }
    }
}

#[test]
fn perf_counts_rings_that_start() -> Result<()> {
    const NAME: &str = "perf_counts_rings_that_start";
    // Not mounted everywhere; it stays, as after bpftrace and perf themselves.
    let events = Path::new("/sys/kernel/tracing/uprobe_events");
    if !events.exists() {
        let _ = Command::new("mount").args(["-t", "tracefs", "nodev", "/sys/kernel/tracing"]).status();
    }
    let can_probe = events.exists();
    if find_in_path("perf").is_none() || !can_probe || !nix::unistd::geteuid().is_root() {
        skip(NAME, "there is no perf, or no right to use it (and tracefs) for probes");
        return Ok(());
    }
    let mut perf = Perf::new()?;
    let program = perf.program.display().to_string();
    perf.run(&["buildid-cache", "--add", &program])?;
    let known = perf.run(&["list", "sdt"])?;
    for point in ["ring_start", "ring_stop", "park", "resume", "phase", "handover"] {
        ensure!(known.contains(&format!("{GROUP}:{point}")), "perf knows no {point}: {known}");
    }
    let event = perf.make("ring_start")?;

    let folder = perf.folder.path();
    let socket = folder.join("vm1.sock");
    let mut served = Command::new(&perf.program);
    served
        .arg("--socket-path")
        .arg(&socket)
        .args(["--uplink=null", "--fault-latency=off"])
        .stderr(Stdio::null());
    let mut served = served.spawn()?;
    let fronts = || -> Result<String> {
        ensure!(lab::rawfront::eventually(PATIENCE, || socket.exists()), "the program does not start");
        let seconds = LOOK.as_secs().to_string();
        let mut look = perf.command(&["stat", "-x,", "-a", "-e", &event, "--", "sleep", &seconds]);
        let look = look.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let started = Instant::now();
        while started.elapsed() < LOOK {
            Front::up(&socket)?.prove_alive(1)?;
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(String::from_utf8_lossy(&look.wait_with_output()?.stderr).into_owned())
    };
    let counted = fronts();
    served.kill()?;
    served.wait()?;
    let counted = counted?;
    let count = counted.split(',').next().and_then(|n| n.trim().parse::<u64>().ok());
    ensure!(count.is_some_and(|count| count > 1), "perf saw no ring start: {counted}");
    Ok(())
}
