//! The contenders on a veth: which program each is. Not here: its process (`compare::BackEnd`).
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use lab::wire::Link;

use super::guest_mac;
use crate::compare::{BACKEND_CPU, BackEnd};
use crate::raw::Direction;

/// A contender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Kind {
    /// A bare AF_XDP loop: no ring to a guest, no guest
    Bare,
    /// testpmd with net_vhost and net_af_xdp as its default is, io forwarding: a busy-polling system call whenever nothing has
    /// come
    DpdkBusy,
    /// The same without it (busy_budget=0)
    Dpdk,
    /// `vhost-user-net`
    Ours,
}

/// A contender with what it takes to start it.
#[derive(Clone, Debug)]
pub struct Side {
    /// Which.
    pub kind: Kind,
    /// Our program.
    pub program: PathBuf,
    /// What stands behind the interface in our `--uplink`.
    pub options: String,
}

impl Side {
    /// Short name for tables and JSON.
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Bare => "bare",
            Kind::Dpdk => "dpdk",
            Kind::DpdkBusy => "dpdk-busy",
            Kind::Ours => "ours",
        }
    }

    /// The back-end on `link`, listening at `socket`.
    pub fn start(&self, socket: &Path, link: &Link) -> Result<BackEnd> {
        let path = socket.to_str().context("socket path")?;
        let name = link.name();
        match self.kind {
            Kind::Ours => {
                let mut command = Command::new(&self.program);
                command.args(["--socket-path", path, "--mac", &guest_mac(), "--log", "warn"]);
                command.args(["--uplink", &format!("xdp:{name}{}", self.options)]);
                BackEnd::spawn(command, "the back-end's socket", || socket.exists())
            }
            Kind::Dpdk | Kind::DpdkBusy => {
                let budget = if self.kind == Kind::Dpdk { ",busy_budget=0" } else { "" };
                let vhost = format!("net_vhost0,iface={path}");
                let xdp = format!("net_af_xdp0,iface={name},start_queue=0,queue_count=1{budget}");
                BackEnd::testpmd(vec![vhost, xdp])
            }
            Kind::Bare => bail!("the bare loop speaks no vhost-user"),
        }
    }
}

/// The bare loop as a process of its own, so that it is measured as the others are.
pub fn bare(direction: Direction, size: usize, link: &Link) -> Result<BackEnd> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["xdp-loop", "--iface", link.name(), "--cpu", &BACKEND_CPU.to_string()]);
    command.args(["--size", &size.to_string()]);
    let direction = direction.to_possible_value().map(|v| v.get_name().to_string()).unwrap_or_default();
    command.args(["--direction", &direction]);
    BackEnd::spawn(command, "the loop", || true)
}
