//! The text form of an uplink: `tap:NAME[,up]`, `tap-fd:N[:N…]`, `xdp:INTERFACE[,…]`, `peer:PORT`, `null`.
//!
//! Here: syntax only; of xdp in `xdp_spec`. Opening what it names is the work of `uplink/`.
#![forbid(unsafe_code)]

use super::xdp_spec::{XdpProblem, XdpSpec};
use crate::uplink::null::{GENERATED_MAX, GENERATED_MIN};
use std::fmt;
use std::os::fd::RawFd;
use std::str::FromStr;

/// Length of an interface's name at most, in bytes (`IFNAMSIZ` without its final zero).
pub const MAX_IFNAME_LEN: usize = crate::uplink::tap::NAME_MAX;

/// Where a port's packets go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UplinkSpec {
    /// A tap interface, opened by name, and created if it does not exist.
    Tap {
        /// The interface.
        name: String,
        /// Bring its link up.
        up: bool,
    },
    /// Tap fds that were opened by someone else and inherited, one per queue pair.
    TapFds(Vec<RawFd>),
    /// AF_XDP sockets on an interface, which ports may share.
    Xdp(XdpSpec),
    /// Another port of this process, by its name; that names this one.
    Peer(String),
    /// Counts and drops what the guest sends.
    Null {
        /// Frames of so many bytes are made for the guest, as fast as it takes them.
        generate: Option<u16>,
    },
}

/// What is wrong with an uplink's text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UplinkProblem {
    /// Not a kind that exists.
    #[error("uplink '{0}' is unknown, use tap:NAME, tap-fd:N, xdp:INTERFACE, peer:PORT or null")]
    Kind(String),
    /// Not a name that the kernel takes.
    #[error(
        "tap name '{0}' is not usable, take 1 to {MAX_IFNAME_LEN} characters without blank, '/', ':', '%' or ','"
    )]
    TapName(String),
    /// An unknown option after the tap's name.
    #[error("tap option '{0}' is unknown, the only one is: up (bring the link up)")]
    TapOption(String),
    /// Not a list of fd numbers.
    #[error("tap-fd '{0}' is not a list of fd numbers, write tap-fd:3 or, one per queue pair, tap-fd:3:4:5")]
    TapFd(String),
    /// The same fd twice.
    #[error("tap-fd has fd {0} twice, give each queue pair its own")]
    TapFdTwice(RawFd),
    /// The options of an XDP uplink.
    #[error(transparent)]
    Xdp(#[from] XdpProblem),
    /// Not a name that a port can have.
    #[error("peer '{0}' is no port's name, write peer:PORT with the name of another [[port]] of the file")]
    PeerName(String),
    /// Text after `null` that means nothing.
    #[error(
        "uplink null does not know '{0}', it is null, null:generate or null:generate=BYTES with {GENERATED_MIN} to {GENERATED_MAX} bytes"
    )]
    NullOption(String),
}

impl FromStr for UplinkSpec {
    type Err = UplinkProblem;

    fn from_str(text: &str) -> Result<Self, UplinkProblem> {
        let end = text.find([':', ',']).unwrap_or(text.len());
        let (kind, rest) = text.split_at(end);
        match kind {
            "tap" => tap(rest.strip_prefix(':').unwrap_or("")),
            "tap-fd" => tap_fds(rest.strip_prefix(':').unwrap_or(rest)),
            "xdp" => Ok(Self::Xdp(rest.strip_prefix(':').unwrap_or("").parse()?)),
            "peer" => peer(rest.strip_prefix(':').unwrap_or("")),
            "null" => null(rest),
            _ => Err(UplinkProblem::Kind(text.to_owned())),
        }
    }
}

fn peer(name: &str) -> Result<UplinkSpec, UplinkProblem> {
    let name = super::port_name(name).map_err(|_| UplinkProblem::PeerName(name.to_owned()))?;
    Ok(UplinkSpec::Peer(name))
}

/// Bytes of frames that are made if nothing else is said.
const GENERATED: u16 = 64;

fn null(rest: &str) -> Result<UplinkSpec, UplinkProblem> {
    let bad = || UplinkProblem::NullOption(rest.to_owned());
    let generate = match rest.split_once('=') {
        None if rest.is_empty() => None,
        None if rest == ":generate" => Some(GENERATED),
        Some((":generate", bytes)) => {
            let bytes = bytes.parse().map_err(|_| bad())?;
            Some(bytes)
                .filter(|bytes| (GENERATED_MIN..=GENERATED_MAX).contains(bytes))
                .map(Some)
                .ok_or_else(bad)?
        }
        _ => return Err(bad()),
    };
    Ok(UplinkSpec::Null { generate })
}

fn tap(text: &str) -> Result<UplinkSpec, UplinkProblem> {
    let mut parts = text.split(',');
    let name = parts.next().unwrap_or("");
    if !is_interface_name(name) {
        return Err(UplinkProblem::TapName(name.to_owned()));
    }
    let mut up = false;
    for option in parts {
        match option {
            "up" => up = true,
            _ => return Err(UplinkProblem::TapOption(option.to_owned())),
        }
    }
    Ok(UplinkSpec::Tap { name: name.to_owned(), up })
}

/// The kernel's own rule (dev_valid_name), and '%', which would let it number the interface.
pub(super) fn is_interface_name(name: &str) -> bool {
    let bad = |c: char| c.is_whitespace() || "/:%".contains(c);
    !name.is_empty() && name.len() <= MAX_IFNAME_LEN && name != "." && name != ".." && !name.contains(bad)
}

fn tap_fds(text: &str) -> Result<UplinkSpec, UplinkProblem> {
    let mut fds = Vec::new();
    for part in text.split(':') {
        let fd: RawFd = part.parse().map_err(|_| UplinkProblem::TapFd(text.to_owned()))?;
        if fd < 0 {
            return Err(UplinkProblem::TapFd(text.to_owned()));
        }
        if fds.contains(&fd) {
            return Err(UplinkProblem::TapFdTwice(fd));
        }
        fds.push(fd);
    }
    Ok(UplinkSpec::TapFds(fds))
}

impl fmt::Display for UplinkSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tap { name, up } => write!(f, "tap:{name}{}", if *up { ",up" } else { "" }),
            Self::TapFds(fds) => {
                write!(f, "tap-fd")?;
                fds.iter().try_for_each(|fd| write!(f, ":{fd}"))
            }
            Self::Xdp(xdp) => write!(f, "xdp:{xdp}"),
            Self::Peer(name) => write!(f, "peer:{name}"),
            Self::Null { generate: None } => write!(f, "null"),
            Self::Null { generate: Some(bytes) } => write!(f, "null:generate={bytes}"),
        }
    }
}
