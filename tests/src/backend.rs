//! The back-end under test as a process.
//!
//! `VUN_PEER=dpdk` puts DPDK's net_vhost with net_tap in its place: a control that tells a fault of
//! the lab from a fault of the back-end.
#![forbid(unsafe_code)]

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Result, ensure};

use crate::artefacts::backend_binary;
use crate::netns::NetNs;
use crate::process::Process;
use crate::scenario::Lab;
use crate::testpmd::Testpmd;
use crate::wait::{PATIENCE, until};

/// Environment variable that puts another back-end in the place of ours.
const PEER: &str = "VUN_PEER";

/// What the back-end says when front-ends can connect.
const READY: &str = "listening";

/// How a back-end is started.
#[derive(Debug, Clone)]
pub struct BackendConfig {
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// `tap:NAME`, `null`, ...
    pub uplink: String,
    /// Number of queue pairs.
    pub queue_pairs: u16,
    /// Connect to a socket that the front-end serves.
    pub client: bool,
    /// More arguments.
    pub extra: Vec<String>,
    /// DPDK in its place, with these options of the device, such as `,postcopy-support=1`.
    pub dpdk: Option<String>,
    /// The socket of a second port in the same process, with the null uplink (ours only).
    pub neighbour: Option<PathBuf>,
}

impl BackendConfig {
    /// One queue pair, serving `socket`, with a tap as its uplink.
    pub fn tap(socket: &Path, tap: &str) -> Self {
        let uplink = format!("tap:{tap}");
        Self {
            socket: socket.to_owned(),
            uplink,
            queue_pairs: 1,
            client: false,
            extra: Vec::new(),
            dpdk: (!is_ours()).then(String::new),
            neighbour: None,
        }
    }

    /// Whether a tap that is made beforehand must be of the multi-queue kind.
    pub fn wants_multi_queue(&self) -> bool {
        // DPDK opens every tap as one.
        self.queue_pairs > 1 || self.dpdk.is_some()
    }

    /// A configuration file with both ports.
    fn with_neighbour(&self, lab: &Lab, neighbour: &Path) -> Result<PathBuf> {
        ensure!(self.extra.is_empty() && !self.client, "a process with a neighbour takes no other options");
        let port = |name: &str, socket: &Path, uplink: &str, pairs| {
            let socket = socket.display();
            format!(
                "[[port]]\nname = '{name}'\nsocket = '{socket}'\nuplink = '{uplink}'\nqueue-pairs = {pairs}\n"
            )
        };
        let name = self.socket.file_stem().unwrap_or_default().to_string_lossy();
        let text = port(&name, &self.socket, &self.uplink, self.queue_pairs)
            + &port("neighbour", neighbour, "null", 1);
        let file = lab.path(&format!("{name}.toml"));
        std::fs::write(&file, text)?;
        Ok(file)
    }

    fn arguments(&self) -> Vec<String> {
        let mut arguments =
            vec![format!("--socket-path={}", self.socket.display()), format!("--uplink={}", self.uplink)];
        if self.queue_pairs > 1 {
            arguments.push(format!("--queue-pairs={}", self.queue_pairs));
        }
        if self.client {
            arguments.push("--client".into());
        }
        arguments.extend(self.extra.iter().cloned());
        arguments
    }
}

/// A running back-end.
#[derive(Debug)]
pub struct Backend {
    process: Process,
}

impl Backend {
    /// Starts the back-end inside a namespace and waits until it serves its socket (with `client`: until it
    /// runs).
    pub fn start(lab: &Lab, netns: &NetNs, config: &BackendConfig) -> Result<Self> {
        let mut command = if let Some(options) = &config.dpdk {
            if !config.client {
                // DPDK refuses a socket that a killed predecessor left behind.
                let _ = std::fs::remove_file(&config.socket);
            }
            let tap = config.uplink.strip_prefix("tap:").unwrap_or("tap0");
            Testpmd::tap_backend_command(
                lab,
                &config.socket,
                tap,
                config.queue_pairs,
                config.client,
                options,
            )?
        } else {
            let mut command = Command::new(backend_binary()?);
            match &config.neighbour {
                None => command.args(config.arguments()),
                Some(neighbour) => command.arg("--config").arg(config.with_neighbour(lab, neighbour)?),
            };
            command
        };
        command.stdin(Stdio::null());
        // Whatever is set for the tests: a panic of the back-end is worth its backtrace.
        command.env("RUST_BACKTRACE", "1");
        let old_socket = inode(&config.socket);
        let mut process = Process::start("the back-end", command, &lab.new_log("backend"), Some(netns))?;
        if !config.client {
            until("the back-end to listen", PATIENCE, || {
                process.check_alive()?;
                let socket = inode(&config.socket);
                let is_ready = process.output().contains(READY) || (socket.is_some() && socket != old_socket);
                Ok(is_ready.then_some(()))
            })?;
        }
        Ok(Self { process })
    }

    /// Fails if it has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        self.process.check_alive()
    }

    /// Kills it with SIGKILL: nothing is cleaned up.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Ends it with SIGTERM and returns how it ended.
    pub fn stop(mut self) -> Result<ExitStatus> {
        self.process.terminate()
    }

    /// Ends it with SIGTERM; fails unless it ends with success, and if it reported a panic.
    pub fn stop_cleanly(mut self) -> Result<()> {
        let status = self.process.terminate()?;
        ensure!(status.success(), "the back-end ended with {status} after SIGTERM");
        ensure!(!self.process.output().contains("panicked at"), "the back-end has panicked");
        Ok(())
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What it has printed so far.
    pub fn output(&self) -> String {
        self.process.output()
    }
}

/// Whether the back-end under test is ours, and not the control.
pub fn is_ours() -> bool {
    std::env::var_os(PEER).is_none_or(|peer| peer != "dpdk")
}

fn inode(path: &Path) -> Option<u64> {
    path.metadata().ok().map(|m| m.ino())
}
