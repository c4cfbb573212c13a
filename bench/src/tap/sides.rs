//! The contenders on a tap: which program each is. Not here: its process (`compare::BackEnd`).
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use lab::wire::Link;

use crate::compare::{BACKEND_CPU, BackEnd};
use crate::raw::{Direction, Engine};

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

    /// DPDK's or our back-end, listening at `socket`, with its tap up.
    pub fn start(&self, socket: &Path, tap: &str) -> Result<BackEnd> {
        let path = socket.to_str().context("socket path")?;
        let link = Link::named(tap);
        let backend = match self {
            Self::Ours(program) => {
                let mut command = Command::new(program);
                command.args(["--socket-path", path, "--uplink", &format!("tap:{tap}"), "--log", "warn"]);
                BackEnd::spawn(command, "the back-end's tap and socket", || link.exists() && socket.exists())?
            }
            Self::Dpdk => {
                BackEnd::testpmd(vec![format!("net_vhost0,iface={path}"), format!("net_tap0,iface={tap}")])?
            }
            Self::Bare | Self::BareUring => bail!("the bare loops speak no vhost-user"),
        };
        link.set_up()?;
        Ok(backend)
    }
}

/// A bare loop of this program as a process of its own, so that it is measured as the others are.
pub fn bare(engine: Engine, direction: Direction, size: usize, tap: &str) -> Result<BackEnd> {
    let mut command = Command::new(std::env::current_exe()?);
    let word =
        |v: Option<clap::builder::PossibleValue>| v.map(|v| v.get_name().to_string()).unwrap_or_default();
    command.args(["tap-raw", "--forever", tap, "--cpu", &BACKEND_CPU.to_string()]);
    command.args(["--size", &size.to_string()]);
    command.args(["--engine", &word(engine.to_possible_value())]);
    command.args(["--direction", &word(direction.to_possible_value())]);
    let link = Link::named(tap);
    let backend = BackEnd::spawn(command, "the loop's tap", || link.exists())?;
    link.set_up()?;
    Ok(backend)
}
