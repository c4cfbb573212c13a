//! DPDK's testpmd as a child process that is driven through its own command line.
//!
//! Here: starting it (as a virtio-user front-end, or with any `--vdev`), sending it commands, reading its counters,
//! ending it. Not here: network name spaces and taps (`wire`), what the packets look like (`wire::frame`).
//!
//! testpmd prints its prompt unbuffered but the answers through stdio, so it runs under `stdbuf -oL`: otherwise a
//! command's answer stays in its buffer until it exits.
#![forbid(unsafe_code)]

mod stats;

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
pub use stats::{ForwardStats, PortStats};

use crate::procstat;

const PROMPT: &str = "testpmd> ";
/// Start-up maps and clears hugepages and connects a virtio-user device; on a busy machine this takes seconds.
const START_TIMEOUT: Duration = Duration::from_secs(30);
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
const QUIT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where testpmd takes its memory from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Ordinary pages: slower, but needs nothing from the machine. For tests.
    Ordinary,
    /// 2 MiB hugepages, which the caller has reserved ([`HugePages`]). For measurements.
    Huge,
}

/// How to start a testpmd.
#[derive(Clone, Debug)]
pub struct TestpmdConfig {
    /// Short and unique on the machine: it becomes DPDK's file prefix.
    pub name: String,
    /// CPU that all of its threads run on.
    pub cpu: usize,
    /// `--vdev` arguments, in port order.
    pub vdevs: Vec<String>,
    /// Kind of memory.
    pub memory: Memory,
    /// Memory size in MiB.
    pub memory_mib: u32,
    /// Queue pairs per port.
    pub queue_pairs: u16,
    /// More arguments of the application (after `--`).
    pub app_args: Vec<String>,
}

impl TestpmdConfig {
    /// One virtio-user port that connects to a vhost-user back-end at `socket`;
    /// `options` is appended to the device arguments, such as `mrg_rxbuf=0`.
    pub fn virtio_user(name: &str, cpu: usize, socket: &str, queue_pairs: u16, options: &str) -> Self {
        let mut vdev = format!("net_virtio_user0,path={socket},queues={queue_pairs}");
        if !options.is_empty() {
            vdev = format!("{vdev},{options}");
        }
        Self {
            name: name.into(),
            cpu,
            vdevs: vec![vdev],
            memory: Memory::Ordinary,
            memory_mib: 192,
            queue_pairs,
            app_args: Vec::new(),
        }
    }

    fn command(&self) -> Command {
        let mut c = Command::new("stdbuf");
        c.args(["-oL", "dpdk-testpmd"]);
        c.args(["--lcores", &format!("0@{cpu},1@{cpu}", cpu = self.cpu)]);
        c.args(["--no-pci", "--no-telemetry", "--single-file-segments"]);
        match self.memory {
            Memory::Ordinary => c.args(["--no-huge", "--no-shconf"]),
            Memory::Huge => c.arg("--in-memory"),
        };
        c.args(["-m", &self.memory_mib.to_string(), "--file-prefix", &self.name]);
        for v in &self.vdevs {
            c.args(["--vdev", v]);
        }
        let q = self.queue_pairs;
        c.args(["--", "-i", "--no-lsc-interrupt", &format!("--rxq={q}"), &format!("--txq={q}")]);
        c.args(["--total-num-mbufs", "16384"]);
        c.args(&self.app_args);
        c
    }
}

/// Whether `dpdk-testpmd` and the drivers can be run here; the error says what to install.
pub fn available() -> Result<()> {
    let out = Command::new("dpdk-testpmd").arg("--version").output();
    match out {
        Ok(_) => Ok(()),
        Err(e) => bail!("dpdk-testpmd: {e}; on Debian: apt-get install dpdk-dev (it brings the drivers)"),
    }
}

#[derive(Default)]
struct Transcript {
    text: String,
    closed: bool,
}

#[derive(Default)]
struct Output {
    transcript: Mutex<Transcript>,
    grown: Condvar,
}

impl Output {
    fn append(&self, piece: &str) {
        let mut t = self.transcript.lock().unwrap_or_else(|e| e.into_inner());
        t.text.push_str(piece);
        self.grown.notify_all();
    }

    fn close(&self) {
        let mut t = self.transcript.lock().unwrap_or_else(|e| e.into_inner());
        t.closed = true;
        self.grown.notify_all();
    }

    /// Waits until `find` finds something in what was printed at or after `from`.
    fn wait<T>(&self, from: usize, timeout: Duration, find: impl Fn(&str) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + timeout;
        let mut t = self.transcript.lock().unwrap_or_else(|e| e.into_inner());
        loop {
            if let Some(found) = find(&t.text[from..]) {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!t.closed, "testpmd ended; its output:\n{}", t.text);
            ensure!(!left.is_zero(), "testpmd did not answer in {timeout:?}; its output:\n{}", t.text);
            t = self.grown.wait_timeout(t, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    fn len(&self) -> usize {
        self.transcript.lock().unwrap_or_else(|e| e.into_inner()).text.len()
    }
}

/// A running testpmd. Dropping it ends it.
pub struct Testpmd {
    child: Child,
    stdin: ChildStdin,
    output: Arc<Output>,
    log: Arc<Output>,
}

impl Testpmd {
    /// Starts testpmd in the calling thread's network name space and waits for its prompt. Forwarding is off.
    pub fn start(config: &TestpmdConfig) -> Result<Self> {
        let mut command = config.command();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Its own process group: a Ctrl-C at the terminal is ours to handle, in our order.
        command.process_group(0);
        procstat::pin_and_die_with_parent(&mut command, Some(config.cpu));
        let mut child = command.spawn().context("starting dpdk-testpmd under stdbuf")?;
        let stdin = child.stdin.take().context("stdin of testpmd")?;
        let output = collect(child.stdout.take().context("stdout of testpmd")?);
        let log = collect(child.stderr.take().context("stderr of testpmd")?);
        let it = Self { child, stdin, output, log };
        it.output
            .wait(0, START_TIMEOUT, |t| t.contains(PROMPT).then_some(()))
            .with_context(|| format!("its log:\n{}", it.log_text()))?;
        Ok(it)
    }

    /// Process id, for CPU time and the like.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to stderr (EAL and driver messages).
    pub fn log_text(&self) -> String {
        self.log.transcript.lock().unwrap_or_else(|e| e.into_inner()).text.clone()
    }

    /// How it ended, if it did, with the end of what it printed.
    pub fn ended(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok().flatten()?;
        let text = self.log_text() + &self.output.transcript.lock().unwrap_or_else(|e| e.into_inner()).text;
        let tail: Vec<&str> = text.lines().rev().take(20).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        Some(format!("testpmd ended: {status}; its last lines:\n{}", tail.join("\n")))
    }

    /// Gives one command and returns what testpmd printed until its next prompt.
    pub fn command(&mut self, line: &str) -> Result<String> {
        let from = self.output.len();
        writeln!(self.stdin, "{line}").with_context(|| format!("sending {line:?} to testpmd"))?;
        // The line is echoed after the prompt that was there, then comes the answer, then the next prompt.
        self.output
            .wait(from, COMMAND_TIMEOUT, |t| {
                let answer = &t[t.find(line)? + line.len()..];
                let end = answer.rfind(PROMPT)?;
                Some(answer[..end].replace('\r', ""))
            })
            .with_context(|| format!("testpmd command {line:?}"))
    }

    /// Starts forwarding in `mode` (`txonly`, `rxonly`, `io`, `macswap`, `flowgen`, …).
    pub fn start_forwarding(&mut self, mode: &str) -> Result<()> {
        let answer = self.command(&format!("set fwd {mode}"))?;
        ensure!(answer.contains(mode), "testpmd refused forward mode {mode}: {answer}");
        self.command("start").map(drop)
    }

    /// Starts `io` forwarding with so many bursts of 32 packets sent from each port at first.
    pub fn start_loop(&mut self, bursts: u32) -> Result<()> {
        let answer = self.command("set fwd io")?;
        ensure!(answer.contains("io"), "testpmd refused forward mode io: {answer}");
        self.command(&format!("start tx_first {bursts}")).map(drop)
    }

    /// Stops forwarding; what is in the rings already still belongs to the back-end.
    pub fn stop_forwarding(&mut self) -> Result<()> {
        self.command("stop").map(drop)
    }

    /// Sets the size of frames that `txonly` and `flowgen` make, in bytes without FCS.
    pub fn set_frame_size(&mut self, bytes: usize) -> Result<()> {
        self.command(&format!("set txpkts {bytes}")).map(drop)
    }

    /// Has forwarding count its polls and the clock cycles of those that found packets.
    pub fn record_polls(&mut self) -> Result<()> {
        self.command("set record-core-cycles on")?;
        self.command("set record-burst-stats on").map(drop)
    }

    /// Forgets what [`forward_stats`](Self::forward_stats) has counted.
    pub fn clear_forward_stats(&mut self) -> Result<()> {
        self.command("clear fwd stats all").map(drop)
    }

    /// What forwarding has done since it was started or its counters were cleared.
    pub fn forward_stats(&mut self) -> Result<ForwardStats> {
        stats::parse_forward(&self.command("show fwd stats all")?)
    }

    /// Counters of a port since its start.
    pub fn stats(&mut self, port: u16) -> Result<PortStats> {
        stats::parse_port(&self.command(&format!("show port stats {port}"))?)
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = writeln!(self.stdin, "quit");
        let deadline = Instant::now() + QUIT_TIMEOUT;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(mut from: impl Read + Send + 'static) -> Arc<Output> {
    let output = Arc::new(Output::default());
    let writer = Arc::clone(&output);
    std::thread::spawn(move || {
        let mut piece = [0u8; 4096];
        while let Ok(n @ 1..) = from.read(&mut piece) {
            writer.append(&String::from_utf8_lossy(&piece[..n]));
        }
        writer.close();
    });
    output
}

/// A reservation of 2 MiB hugepages; dropping it puts the machine's number back.
pub struct HugePages {
    before: u64,
}

const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    /// Makes sure that the machine has at least `pages` hugepages of 2 MiB.
    pub fn reserve(pages: u64) -> Result<Self> {
        let before: u64 = std::fs::read_to_string(NR_HUGEPAGES)?.trim().parse()?;
        let it = Self { before };
        if before < pages {
            std::fs::write(NR_HUGEPAGES, pages.to_string()).context("reserving hugepages (needs root)")?;
            let got: u64 = std::fs::read_to_string(NR_HUGEPAGES)?.trim().parse()?;
            ensure!(got >= pages, "the kernel found memory for {got} of {pages} hugepages of 2 MiB");
        }
        Ok(it)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(NR_HUGEPAGES, self.before.to_string());
    }
}
