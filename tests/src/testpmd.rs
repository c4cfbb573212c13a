//! DPDK's testpmd: an independent virtio driver as front-end, and a back-end to compare with.
#![forbid(unsafe_code)]

use std::io::Write;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};

use crate::artefacts::find_in_path;
use crate::netns::NetNs;
use crate::process::Process;
use crate::scenario::Lab;
use crate::wait::{PATIENCE, until};

const PROMPT: &str = "testpmd> ";

/// How testpmd is started.
#[derive(Debug, Clone)]
pub struct TestpmdConfig {
    /// Name for messages and logs.
    pub name: String,
    /// Memory in MiB, without huge pages.
    pub memory_mib: u32,
    /// `--vdev` values, such as `net_virtio_user0,path=SOCK,queues=4`.
    pub vdevs: Vec<String>,
    /// The host CPU that forwards.
    pub cpu: u32,
    /// testpmd's own arguments, such as `--txpkts=64`.
    pub arguments: Vec<String>,
}

impl TestpmdConfig {
    /// A front-end on a back-end's socket; `options` is appended to the device, such as `,mrg_rxbuf=0`.
    pub fn front_end(socket: &Path, queue_pairs: u16, options: &str) -> Self {
        let path = socket.display();
        Self {
            name: "virtio-user".into(),
            memory_mib: 512,
            vdevs: vec![format!("net_virtio_user0,path={path},queues={queue_pairs}{options}")],
            cpu: 1,
            arguments: vec![format!("--rxq={queue_pairs}"), format!("--txq={queue_pairs}")],
        }
    }

    /// A back-end that serves a socket.
    pub fn back_end(socket: &Path, queue_pairs: u16) -> Self {
        let path = socket.display();
        Self {
            name: "net-vhost".into(),
            memory_mib: 512,
            vdevs: vec![format!("net_vhost0,iface={path},queues={queue_pairs}")],
            cpu: 0,
            arguments: vec![format!("--rxq={queue_pairs}"), format!("--txq={queue_pairs}")],
        }
    }

    fn command(&self, lab: &Lab, is_interactive: bool) -> Result<Command> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        // The output goes to a file; unbuffered lines make its progress visible.
        let stdbuf = find_in_path("stdbuf");
        let testpmd = lab.artefacts.testpmd()?;
        let mut command = Command::new(stdbuf.as_deref().unwrap_or(testpmd));
        if stdbuf.is_some() {
            command.arg("-oL").arg(testpmd);
        }
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // Where DPDK keeps its runtime files; ours go with the lab's folder.
        command.env("XDG_RUNTIME_DIR", lab.dir()).env("RUNTIME_DIRECTORY", lab.dir());
        command.args(["--no-huge", "--no-pci", "--no-telemetry", "--no-shconf"]);
        command.args(["-m".to_owned(), self.memory_mib.to_string()]);
        command.args(["--lcores".to_owned(), format!("0@0,1@{}", self.cpu)]);
        command.arg(format!("--file-prefix=lab{}-{number}", std::process::id()));
        for vdev in &self.vdevs {
            command.arg(format!("--vdev={vdev}"));
        }
        command.args(["--", "--no-mlockall", "--total-num-mbufs=16384"]);
        if is_interactive {
            command.arg("--interactive");
        }
        command.args(&self.arguments);
        Ok(command)
    }
}

/// Counters of one port, as `show port stats` prints them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PortStats {
    /// Packets received.
    pub rx_packets: u64,
    /// Packets that found no room.
    pub rx_missed: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Packets that could not be sent.
    pub tx_errors: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
}

/// A running, interactive testpmd.
#[derive(Debug)]
pub struct Testpmd {
    process: Process,
    stdin: ChildStdin,
}

impl Testpmd {
    /// Starts it and waits for its prompt.
    pub fn start(lab: &Lab, netns: Option<&NetNs>, config: &TestpmdConfig) -> Result<Self> {
        let mut command = config.command(lab, true)?;
        command.stdin(Stdio::piped());
        let log = lab.new_log(&config.name);
        let mut process = Process::start(&format!("testpmd {}", config.name), command, &log, netns)?;
        let stdin = process.take_stdin().context("testpmd has a pipe as its input")?;
        let mut testpmd = Self { process, stdin };
        testpmd.wait_prompt(0)?;
        Ok(testpmd)
    }

    /// Runs a command and returns what testpmd prints until its next prompt.
    pub fn command(&mut self, command: &str) -> Result<String> {
        let from = self.process.output().len();
        writeln!(self.stdin, "{command}").context("writing to testpmd")?;
        self.wait_prompt(from)
    }

    /// Reads the counters of a port.
    pub fn stats(&mut self, port: u16) -> Result<PortStats> {
        parse_stats(&self.command(&format!("show port stats {port}"))?)
    }

    /// What it has printed so far.
    pub fn output(&self) -> String {
        self.process.output()
    }

    fn wait_prompt(&mut self, from: usize) -> Result<String> {
        until("testpmd's prompt", PATIENCE, || {
            self.process.check_alive()?;
            let output = self.process.output();
            let answer = output.get(from..).unwrap_or_default();
            // The prompt may be repeated with the echo of the command; the answer ends with one.
            Ok(answer.trim_end_matches(' ').ends_with(PROMPT.trim_end()).then(|| answer.to_owned()))
        })
    }

    /// A back-end that joins a tap with a vhost-user socket.
    pub(crate) fn tap_backend_command(
        lab: &Lab,
        socket: &Path,
        tap: &str,
        queue_pairs: u16,
        is_client: bool,
        options: &str,
    ) -> Result<Command> {
        let mut config = TestpmdConfig::back_end(socket, queue_pairs);
        config.vdevs[0].push_str(options);
        if is_client {
            config.vdevs[0].push_str(",client=1");
        }
        config.vdevs.push(format!("net_tap0,iface={tap}"));
        config.arguments.push("--auto-start".into());
        config.arguments.push("--stats-period=5".into());
        config.command(lab, false)
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        // Its own way to end; the process guard takes over if that does not work.
        let _ = writeln!(self.stdin, "quit");
    }
}

fn parse_stats(text: &str) -> Result<PortStats> {
    let number = |key: &str| -> Result<u64> {
        let Some(at) = text.find(key) else { bail!("no {key} in testpmd's answer: {text}") };
        let digits: String =
            text[at + key.len()..].trim_start().chars().take_while(char::is_ascii_digit).collect();
        digits.parse().with_context(|| format!("{key} is no number"))
    };
    Ok(PortStats {
        rx_packets: number("RX-packets:")?,
        rx_missed: number("RX-missed:")?,
        rx_bytes: number("RX-bytes:")?,
        tx_packets: number("TX-packets:")?,
        tx_errors: number("TX-errors:")?,
        tx_bytes: number("TX-bytes:")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stats_are_read() {
        let text = "  RX-packets: 12         RX-missed: 1          RX-bytes:  768\n  RX-errors: 0\n\
            \x20 TX-packets: 34         TX-errors: 0          TX-bytes:  2176\n";
        let expected = PortStats {
            rx_packets: 12,
            rx_missed: 1,
            rx_bytes: 768,
            tx_packets: 34,
            tx_errors: 0,
            tx_bytes: 2176,
        };
        assert_eq!(parse_stats(text).unwrap(), expected);
    }
}
