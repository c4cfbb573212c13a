//! Our back-end without traffic: what idle ports cost, and how much memory one port needs.
#![forbid(unsafe_code)]

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::procstat::{self, Resident};
use crate::testpmd::{Memory, Testpmd, TestpmdConfig};
use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::compare::{self, BACKEND_CPU, MEMORY_MIB, OTHER_CPU, word};
use crate::interrupt;
use crate::report;

/// To reach: resident memory of one port besides guest memory, in KiB.
const RESIDENT_KIB_MAX: u64 = 12 * 1024;
/// "No measurable CPU": so many µs per second, for all ports together.
const IDLE_CPU_US_PER_S_MAX: f64 = 10.0;
/// Ports in the idle row.
const PORTS: usize = 16;
const START_TIMEOUT: Duration = Duration::from_secs(10);
const SETTLE: Duration = Duration::from_secs(2);

/// What was seen.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Idle {
    /// Ports, all with a front-end.
    pub ports: usize,
    /// How long they were watched, seconds.
    pub seconds: f64,
    /// Context switches of all threads in that time.
    pub wakeups: u64,
    /// CPU time in that time, µs.
    pub cpu_us: f64,
    /// Resident memory of another process with one port, KiB: private and program text.
    pub one_port_resident_kib: u64,
    /// Shared memory that is resident there (the guest's), KiB.
    pub one_port_shared_kib: u64,
    /// Resident memory of the process with all ports, KiB.
    pub all_ports_resident_kib: u64,
}

impl Idle {
    /// For people.
    pub fn text(&self) -> String {
        let quiet = self.wakeups == 0 && self.cpu_us / self.seconds <= IDLE_CPU_US_PER_S_MAX;
        let small = self.one_port_resident_kib <= RESIDENT_KIB_MAX;
        let rows = [
            vec![
                format!("{} idle ports, {:.0} s", self.ports, self.seconds),
                format!("{} wake-ups, {:.0} us CPU", self.wakeups, self.cpu_us),
                "0 wake-ups, no measurable CPU".into(),
                word(quiet).into(),
            ],
            vec![
                "resident memory, one port".into(),
                format!(
                    "{:.1} MiB (+ {} KiB shared)",
                    self.one_port_resident_kib as f64 / 1024.0,
                    self.one_port_shared_kib
                ),
                format!("<= {} MiB", RESIDENT_KIB_MAX / 1024),
                word(small).into(),
            ],
        ];
        format!("\n{}", report::table(&["what", "ours", "to reach", "verdict"], &rows))
    }
}

/// Ends the process when dropped.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts one process with [`PORTS`] ports, connects front-ends that send nothing, and watches it.
pub fn watch(program: &Path, time: Duration) -> Result<Idle> {
    let folder = tempfile::tempdir()?;
    eprintln!("resident memory: one port");
    let one = one_port(program, folder.path())?;
    eprintln!("idle: {PORTS} ports for {time:?}");
    let config = folder.path().join("ports.toml");
    let sockets: Vec<_> = (0..PORTS).map(|i| folder.path().join(format!("port{i}.sock"))).collect();
    let mut text = String::new();
    for (i, socket) in sockets.iter().enumerate() {
        text.push_str(&format!(
            "[[port]]\nname = \"idle{i}\"\nsocket = \"{}\"\nuplink = \"tap:idle{i}\"\n\n",
            socket.display()
        ));
    }
    std::fs::write(&config, text)?;
    let mut command = Command::new(program);
    command.arg("--config").arg(&config).args(["--log", "warn"]);
    let backend = start(command, &sockets)?;
    // One front-end with all ports: a process each would need too much memory.
    let vdevs = sockets
        .iter()
        .enumerate()
        .map(|(i, s)| format!("net_virtio_user{i},path={},queues=1", s.display()))
        .collect();
    let frontend = Testpmd::start(&TestpmdConfig {
        name: format!("vbi{}", std::process::id()),
        cpu: OTHER_CPU,
        vdevs,
        memory: Memory::Huge,
        memory_mib: MEMORY_MIB,
        queue_pairs: 1,
        app_args: Vec::new(),
    })
    .context("front-end with many ports")?;
    interrupt::sleep(SETTLE)?;
    let pid = backend.0.id();
    let (switches, cpu) = (procstat::context_switches(pid)?, procstat::cpu_time_ns(pid)?);
    interrupt::sleep(time)?;
    let idle = Idle {
        ports: PORTS,
        seconds: time.as_secs_f64(),
        wakeups: procstat::context_switches(pid)? - switches,
        cpu_us: (procstat::cpu_time_ns(pid)? - cpu) as f64 / 1e3,
        one_port_resident_kib: one.anon + one.file,
        one_port_shared_kib: one.shmem,
        all_ports_resident_kib: procstat::resident(pid).map(|r| r.anon + r.file)?,
    };
    drop(frontend);
    Ok(idle)
}

fn one_port(program: &Path, folder: &Path) -> Result<Resident> {
    let socket = folder.join("one.sock");
    let mut command = Command::new(program);
    command.arg("--socket-path").arg(&socket).args(["--uplink", "tap:one0", "--log", "warn"]);
    let backend = start(command, std::slice::from_ref(&socket))?;
    let frontend = compare::start_frontend(&socket, "")?;
    interrupt::sleep(SETTLE)?;
    let resident = procstat::resident(backend.0.id())?;
    drop(frontend);
    Ok(resident)
}

fn start(mut command: Command, sockets: &[std::path::PathBuf]) -> Result<Guard> {
    command.stdin(Stdio::null()).process_group(0);
    procstat::pin_and_die_with_parent(&mut command, Some(BACKEND_CPU));
    let mut backend = Guard(command.spawn().with_context(|| format!("starting {command:?}"))?);
    interrupt::wait_for("the back-end's sockets", START_TIMEOUT, || {
        ensure!(backend.0.try_wait()?.is_none(), "the back-end ended at once: {command:?}");
        Ok(sockets.iter().all(|s| s.exists()))
    })?;
    Ok(backend)
}
