//! Who is measured, and how each is started for a measurement.
#![forbid(unsafe_code)]

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use super::score::{DPDK, OURS};
use crate::compare::BackEnd;

/// A contender.
#[derive(Clone, Debug)]
pub enum Contender {
    /// Our program.
    Ours(PathBuf),
    /// testpmd with net_vhost.
    Dpdk,
    /// Any other program that takes what a guest sends, or makes packets for it.
    Other {
        /// Column of the table.
        name: String,
        /// Words of its command line; `{socket}` stands for the socket's path.
        command: Vec<String>,
    },
}

/// What a back-end is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Takes and drops.
    Sink,
    /// Makes frames of so many bytes.
    Source(usize),
    /// Both at once.
    SinkAndSource(usize),
    /// Two ports that are connected.
    Peers,
    /// So many ports that drop.
    Sinks(usize),
}

/// A back-end at work. It ends with this.
pub struct Running {
    /// Its process.
    pub backend: BackEnd,
    /// Its sockets.
    pub sockets: Vec<PathBuf>,
    _folder: TempDir,
}

impl std::str::FromStr for Contender {
    type Err = anyhow::Error;

    /// `NAME=COMMAND`
    fn from_str(text: &str) -> Result<Self> {
        let (name, command) = text.split_once('=').context("write NAME=COMMAND")?;
        let command: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
        ensure!(!name.is_empty() && ![OURS, DPDK, "limit"].contains(&name), "'{name}' is taken");
        ensure!(command.iter().any(|w| w.contains("{socket}")), "the command must have {{socket}} in it");
        Ok(Self::Other { name: name.into(), command })
    }
}

impl Contender {
    /// Its column.
    pub fn name(&self) -> &str {
        match self {
            Self::Ours(_) => OURS,
            Self::Dpdk => DPDK,
            Self::Other { name, .. } => name,
        }
    }

    /// Whether it can be that.
    pub fn can_be(&self, need: Need) -> bool {
        match self {
            Self::Ours(_) => true,
            Self::Dpdk => !matches!(need, Need::Sinks(_)),
            Self::Other { .. } => matches!(need, Need::Sink | Need::Source(_)),
        }
    }

    /// Starts it; `poll` is for ours (`--poll`).
    pub fn start(&self, need: Need, poll: &str) -> Result<Running> {
        let folder = tempfile::tempdir()?;
        let count = match need {
            Need::Peers => 2,
            Need::Sinks(n) => n,
            _ => 1,
        };
        let sockets: Vec<PathBuf> = (0..count).map(|i| folder.path().join(format!("p{i}.sock"))).collect();
        let ready = || sockets.iter().all(|s| s.exists());
        let what = "the back-end's sockets";
        let backend = match self {
            Self::Ours(program) => {
                let file = folder.path().join("ports.toml");
                std::fs::write(&file, configuration(need, &sockets, poll)?)?;
                let mut command = Command::new(program);
                command.arg("--config").arg(file).args(["--log", "warn", "--fault-latency", "off"]);
                BackEnd::spawn(command, what, ready)?
            }
            Self::Dpdk => testpmd(need, &sockets)?,
            Self::Other { command, .. } => {
                let socket = sockets[0].to_str().context("socket path")?;
                let mut words = command.iter().map(|w| w.replace("{socket}", socket));
                let mut command = Command::new(words.next().context("a program")?);
                command.args(words);
                BackEnd::spawn(command, what, ready)?
            }
        };
        Ok(Running { backend, sockets, _folder: folder })
    }
}

fn configuration(need: Need, sockets: &[PathBuf], poll: &str) -> Result<String> {
    let mut text = format!("poll = '{poll}'\n\n");
    for (i, socket) in sockets.iter().enumerate() {
        let uplink = match need {
            Need::Sink | Need::Sinks(_) => "null".into(),
            Need::Source(frame) | Need::SinkAndSource(frame) => format!("null:generate={frame}"),
            Need::Peers => format!("peer:p{}", 1 - i),
        };
        write!(text, "[[port]]\nname = 'p{i}'\nsocket = '{}'\nuplink = '{uplink}'\n\n", socket.display())?;
    }
    Ok(text)
}

fn testpmd(need: Need, sockets: &[PathBuf]) -> Result<BackEnd> {
    let vhost = |(i, socket): (usize, &PathBuf)| format!("net_vhost{i},iface={}", Path::display(socket));
    let mut vdevs: Vec<String> = sockets.iter().enumerate().map(vhost).collect();
    let (mode, frame) = match need {
        Need::Sink => ("rxonly", None),
        Need::Source(frame) => ("txonly", Some(frame)),
        Need::SinkAndSource(frame) => {
            vdevs.push(format!("net_null0,size={frame}"));
            ("io", None)
        }
        Need::Peers => ("io", None),
        Need::Sinks(_) => bail!("DPDK is not measured with many ports"),
    };
    BackEnd::testpmd_doing(vdevs, mode, frame)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_back_ends_are_commands() {
        let Contender::Other { name, command } = "x=prog --s={socket} -v".parse().expect("good") else {
            panic!("another")
        };
        assert_eq!((name.as_str(), command.len()), ("x", 3));
        for bad in ["prog {socket}", "x=prog", "ours=prog {socket}", "=prog {socket}"] {
            assert!(bad.parse::<Contender>().is_err(), "{bad}");
        }
    }

    #[test]
    fn peers_name_each_other() {
        let text = configuration(Need::Peers, &["/a".into(), "/b".into()], "always").expect("text");
        assert!(text.starts_with("poll = 'always'"));
        assert!(text.contains("name = 'p0'\nsocket = '/a'\nuplink = 'peer:p1'"), "{text}");
        assert!(text.contains("name = 'p1'\nsocket = '/b'\nuplink = 'peer:p0'"), "{text}");
    }
}
