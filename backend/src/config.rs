//! What the program is told to do: ports, workers and their limits, as checked values.
//!
//! Here: the types that the daemon reads, the rules for each single value, and the checks between values.
//! Not here: where the values come from (`cli.rs` for options, `config/file.rs` for TOML), and anything that
//! asks the machine (whether an interface exists, what kind of socket an fd is): that is the daemon's work.
#![forbid(unsafe_code)]

mod file;
mod peers;
mod poll;
#[cfg(test)]
mod tests;
mod uplink_spec;
mod xdp_spec;

pub use file::{ConfigError, load, parse_text};
pub use peers::peer_of;
pub use poll::Poll;
pub use uplink_spec::UplinkSpec;
pub use xdp_spec::XdpSpec;

use std::fmt;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

/// Queue pairs of one port at most. vhost-user: bits 0-7 of a vring index name the ring, so 256 rings.
pub const MAX_QUEUE_PAIRS: u16 = crate::session::QUEUE_PAIRS_MAX;
/// Worker threads of the process at most.
pub const MAX_WORKERS: u16 = 64;
/// Ports of one process at most.
pub const MAX_PORTS: usize = 1024;
/// Smallest MTU of a virtio-net device, in bytes (VIRTIO 1.3 §5.1.4.1).
pub const MIN_MTU: u16 = crate::session::MTU_MIN;
/// Largest MTU of a virtio-net device, in bytes (VIRTIO 1.3 §5.1.4.1).
pub const MAX_MTU: u16 = u16::MAX;
/// Length of a port's name at most, in bytes.
pub const MAX_NAME_LEN: usize = 64;
/// Length of a Unix socket's path at most, in bytes (`sun_path` without its final zero).
pub const MAX_SOCKET_PATH_LEN: usize = 107;

/// The vhost-user protocol features by name and bit (vhost-user: Protocol features).
const PROTOCOL_FEATURES: &[(&str, u8)] = &[
    ("mq", 0),
    ("log-shmfd", 1),
    ("rarp", 2),
    ("reply-ack", 3),
    ("mtu", 4),
    ("backend-req", 5),
    ("cross-endian", 6),
    ("pagefault", 8),
    ("config", 9),
    ("backend-send-fd", 10),
    ("host-notifier", 11),
    ("inflight-shmfd", 12),
    ("reset-device", 13),
    ("inband-notifications", 14),
    ("configure-mem-slots", 15),
    ("status", 16),
    ("xen-mmap", 17),
    ("shared-object", 18),
    ("device-state", 19),
];

/// Everything the daemon needs to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Worker threads, each with its own io_uring; 1..=[`MAX_WORKERS`].
    pub workers: u16,
    /// Log filter in the syntax of `RUST_LOG`; `None` means the variable, or else `info`.
    pub log: Option<String>,
    /// The name under which what the kernel measures of this process can be read.
    pub instance: String,
    /// Whether it measures.
    pub fault_latency: FaultLatency,
    /// Whether workers look at rings without being told to.
    pub poll: Poll,
    /// At least one port; names, sockets and taps are all different.
    pub ports: Vec<PortConfig>,
}

/// Whether stalls on missing guest memory are measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FaultLatency {
    /// Where that costs nothing while nothing faults; by the costlier way only while a migration needs it.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

impl std::str::FromStr for FaultLatency {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        match text {
            "auto" => Ok(Self::Auto),
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            _ => Err(Problem::FaultLatency(text.to_owned())),
        }
    }
}

/// One vhost-user device and its uplink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// What log lines and counters call the port.
    pub name: String,
    /// The control socket.
    pub endpoint: Endpoint,
    /// Where its packets go.
    pub uplink: UplinkSpec,
    /// Queue pairs offered to the front-end; 1..=[`MAX_QUEUE_PAIRS`].
    pub queue_pairs: u16,
    /// Largest MTU, in bytes, or `None` for the uplink's own.
    pub mtu: Option<u16>,
    /// The device's address, or `None` if the front-end chooses.
    pub mac: Option<[u8; 6]>,
    /// Bits of GET_PROTOCOL_FEATURES that are not offered although the program has them.
    pub disabled_protocol_features: u64,
    /// Whether postcopy migration is offered.
    pub postcopy: Postcopy,
    /// Whether it is offered with several queue pairs.
    pub postcopy_multiqueue: PostcopyMultiqueue,
}

/// Whether postcopy migration (PAGEFAULT) is offered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Postcopy {
    /// Where userfaultfd can be had.
    #[default]
    Auto,
    /// Yes; without userfaultfd the program does not start.
    On,
    /// No.
    Off,
}

/// What is done about QEMU's way with several queue pairs in postcopy: it waits for an answer that nobody owes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PostcopyMultiqueue {
    /// Postcopy is not offered with several queue pairs.
    #[default]
    Off,
    /// The answer is sent again for each further pair.
    Resend,
}

/// Reads a [`Postcopy`].
pub fn postcopy(text: &str) -> Result<Postcopy, Problem> {
    match text {
        "auto" => Ok(Postcopy::Auto),
        "on" => Ok(Postcopy::On),
        "off" => Ok(Postcopy::Off),
        _ => Err(Problem::Choice { key: "postcopy", value: text.to_owned(), choices: "auto, on, off" }),
    }
}

/// Reads a [`PostcopyMultiqueue`].
pub fn postcopy_multiqueue(text: &str) -> Result<PostcopyMultiqueue, Problem> {
    match text {
        "off" => Ok(PostcopyMultiqueue::Off),
        "resend" => Ok(PostcopyMultiqueue::Resend),
        _ => Err(Problem::Choice {
            key: "postcopy-multiqueue",
            value: text.to_owned(),
            choices: "off, resend",
        }),
    }
}

/// Where a port's control socket comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// Bind and listen at this path.
    Listen(PathBuf),
    /// Connect to the socket that the front-end serves here, again and again.
    Connect(PathBuf),
    /// Use this inherited fd: connected or listening, as `SO_ACCEPTCONN` will tell
    /// (vhost-user: Backend program conventions, `--fd`).
    Fd(RawFd),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listen(path) => write!(f, "listens at {}", path.display()),
            Self::Connect(path) => write!(f, "connects to {}", path.display()),
            Self::Fd(fd) => write!(f, "uses socket fd {fd}"),
        }
    }
}

impl PortConfig {
    /// The address that frames on an XDP uplink are steered by; none: learned.
    pub fn xdp_mac(&self, uplink: &XdpSpec) -> Option<[u8; 6]> {
        uplink.mac.or(self.mac)
    }
}

impl fmt::Display for PortConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs = self.queue_pairs;
        let s = if pairs == 1 { "" } else { "s" };
        write!(f, "port {}: {}, uplink {}, {pairs} queue pair{s}", self.name, self.endpoint, self.uplink)?;
        if let Some(mtu) = self.mtu {
            write!(f, ", mtu {mtu}")?;
        }
        if let Some([a, b, c, d, e, g]) = self.mac {
            write!(f, ", mac {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")?;
        }
        let off: Vec<_> = PROTOCOL_FEATURES
            .iter()
            .filter(|(_, bit)| self.disabled_protocol_features & (1 << bit) != 0)
            .map(|(name, _)| *name)
            .collect();
        if !off.is_empty() {
            write!(f, ", without {}", off.join(" "))?;
        }
        Ok(())
    }
}

/// What is wrong with a value, or with values together. Each message says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Not a number at all.
    #[error("'{0}' is not a whole number")]
    NotANumber(String),
    /// Outside its limits.
    #[error("{key} is {value}, choose a number from {min} to {max}")]
    OutOfRange {
        /// The option's name.
        key: &'static str,
        /// What was given.
        value: i64,
        /// Smallest that is allowed.
        min: i64,
        /// Largest that is allowed.
        max: i64,
    },
    /// Not one of the words that are known.
    #[error("{key} is '{value}', choose one of: {choices}")]
    Choice {
        /// The option's name.
        key: &'static str,
        /// What was given.
        value: String,
        /// What may be given.
        choices: &'static str,
    },
    /// An address that does not parse.
    #[error("mac '{0}' is not an address, write it as six hexadecimal bytes: 52:54:00:12:34:56")]
    MacSyntax(String),
    /// A group address.
    #[error("mac '{0}' is a multicast address, choose one whose first byte is even")]
    MacMulticast(String),
    /// The zero address.
    #[error("mac is all zero, choose another or leave it out")]
    MacZero,
    /// A name that logs or metrics could not carry.
    #[error("name '{0}' is not usable, take 1 to {MAX_NAME_LEN} of the characters A-Z a-z 0-9 . _ -")]
    Name(String),
    /// An unknown protocol feature.
    #[error("'{0}' is not a protocol feature, choose from: {list}", list = feature_names())]
    ProtocolFeature(String),
    /// The uplink's text.
    #[error(transparent)]
    Uplink(#[from] uplink_spec::UplinkProblem),
    /// An empty path.
    #[error("the socket's path is empty, give the path of a Unix socket")]
    SocketEmpty,
    /// A path that does not fit into `sun_path`.
    #[error("socket path {0} is longer than {MAX_SOCKET_PATH_LEN} bytes, choose a shorter one")]
    SocketTooLong(PathBuf),
    /// No control socket.
    #[error("no control socket, add one of: {0}")]
    EndpointMissing(&'static str),
    /// Both kinds of control socket.
    #[error("a socket path and an inherited fd exclude each other, keep one")]
    EndpointTwice,
    /// `client` together with an fd.
    #[error("client mode connects to a socket's path, it cannot be used with an inherited fd: drop one")]
    ClientWithFd,
    /// No uplink.
    #[error("no uplink, add one of: {0}")]
    UplinkMissing(&'static str),
    /// One fd per queue pair.
    #[error(
        "{pairs} queue pairs need {pairs} tap fds, but the uplink has {fds}: give one tap-fd per queue pair"
    )]
    TapFdCount {
        /// Queue pairs of the port.
        pairs: u16,
        /// Fds that were given.
        fds: usize,
    },
    /// Several pairs without the feature that announces them.
    #[error("{0} queue pairs need the protocol feature mq, enable it again or use 1 queue pair")]
    PairsWithoutMq(u16),
    /// A check that needs to know the address.
    #[error("anti-spoof=on needs the port's address: add mac= to the uplink, or mac to the port")]
    SpoofWithoutMac,
    /// Ports of one interface with different wishes for it.
    #[error(
        "uplink xdp:{interface} has another {what}= than port '{other}' on the same interface, give all its ports the same or only one of them"
    )]
    XdpConflict {
        /// The interface.
        interface: String,
        /// The option.
        what: &'static str,
        /// The port that had it first.
        other: String,
    },
    /// A peer link with one end.
    #[error(transparent)]
    Peer(#[from] peers::PeerProblem),
    /// A configuration without ports.
    #[error("there is no port, add a [[port]] section with socket and uplink")]
    NoPort,
    /// More ports than [`MAX_PORTS`].
    #[error("{0} ports are too many for one process, use up to {MAX_PORTS}")]
    TooManyPorts(usize),
    /// Two ports share what only one can have.
    #[error("{what} is also used by port '{other}', give each port its own")]
    Duplicate {
        /// The thing, in words.
        what: String,
        /// The port that had it first.
        other: String,
    },
    /// One fd in two roles of one port.
    #[error("fd {0} is given both as control socket and as tap, give two different ones")]
    FdTwice(RawFd),
    /// A name that the BPF file system could not carry.
    #[error(
        "instance '{0}' is not usable, take 1 to {MAX_NAME_LEN} of the characters A-Z a-z 0-9 _ - and not xdp- first"
    )]
    Instance(String),
    /// No interval to watch at.
    #[error("'{0}' is no interval, give seconds from 0.1 to 86400")]
    Interval(String),
    /// Neither auto, on nor off.
    #[error("fault-latency is '{0}', choose auto, on or off")]
    FaultLatency(String),
    /// A log filter that does not parse.
    #[error("log filter '{0}' is not valid, use error, warn, info, debug, trace or the syntax of RUST_LOG")]
    Log(String),
}

fn feature_names() -> String {
    PROTOCOL_FEATURES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" ")
}

fn in_range(key: &'static str, value: i64, min: u16, max: u16) -> Result<u16, Problem> {
    match u16::try_from(value) {
        Ok(n) if (min..=max).contains(&n) => Ok(n),
        _ => Err(Problem::OutOfRange { key, value, min: min.into(), max: max.into() }),
    }
}

/// Checks a number of queue pairs.
pub fn queue_pairs(value: i64) -> Result<u16, Problem> {
    in_range("queue-pairs", value, 1, MAX_QUEUE_PAIRS)
}

/// Checks a number of worker threads.
pub fn workers(value: i64) -> Result<u16, Problem> {
    in_range("workers", value, 1, MAX_WORKERS)
}

/// Checks an MTU in bytes.
pub fn mtu(value: i64) -> Result<u16, Problem> {
    in_range("mtu", value, MIN_MTU, MAX_MTU)
}

/// Checks the number of an inherited fd.
pub fn inherited_fd(value: i64) -> Result<RawFd, Problem> {
    match RawFd::try_from(value) {
        Ok(fd) if fd >= 0 => Ok(fd),
        _ => Err(Problem::OutOfRange { key: "fd", value, min: 0, max: RawFd::MAX.into() }),
    }
}

/// Reads a unicast MAC address.
pub fn mac(text: &str) -> Result<[u8; 6], Problem> {
    let syntax = || Problem::MacSyntax(text.to_owned());
    let mut bytes = [0u8; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        let part = parts.next().ok_or_else(syntax)?;
        if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(syntax());
        }
        *byte = u8::from_str_radix(part, 16).map_err(|_| syntax())?;
    }
    if parts.next().is_some() {
        return Err(syntax());
    }
    if bytes[0] & 1 != 0 {
        return Err(Problem::MacMulticast(text.to_owned()));
    }
    if bytes == [0; 6] {
        return Err(Problem::MacZero);
    }
    Ok(bytes)
}

/// Checks a port's name.
pub fn port_name(text: &str) -> Result<String, Problem> {
    let ok = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if text.is_empty() || text.len() > MAX_NAME_LEN || !text.bytes().all(ok) {
        return Err(Problem::Name(text.to_owned()));
    }
    Ok(text.to_owned())
}

/// The mask of a protocol feature's bit.
pub fn protocol_feature(name: &str) -> Result<u64, Problem> {
    let found = PROTOCOL_FEATURES.iter().find(|(known, _)| *known == name);
    found.map(|(_, bit)| 1 << bit).ok_or_else(|| Problem::ProtocolFeature(name.to_owned()))
}

/// Checks the path of a Unix socket.
pub fn socket_path(path: &Path) -> Result<PathBuf, Problem> {
    match path.as_os_str().len() {
        0 => Err(Problem::SocketEmpty),
        1..=MAX_SOCKET_PATH_LEN => Ok(path.to_owned()),
        _ => Err(Problem::SocketTooLong(path.to_owned())),
    }
}

/// Checks a log filter.
pub fn log_filter(text: &str) -> Result<String, Problem> {
    match tracing_subscriber::EnvFilter::try_new(text) {
        Ok(_) if !text.trim().is_empty() => Ok(text.to_owned()),
        _ => Err(Problem::Log(text.to_owned())),
    }
}

/// The endpoint that `socket`, `fd` and `client` describe together; `hint` names the options to add.
pub(crate) fn endpoint(
    socket: Option<PathBuf>,
    fd: Option<RawFd>,
    client: bool,
    hint: &'static str,
) -> Result<Endpoint, Problem> {
    match (socket, fd) {
        (None, None) => Err(Problem::EndpointMissing(hint)),
        (Some(_), Some(_)) => Err(Problem::EndpointTwice),
        (None, Some(_)) if client => Err(Problem::ClientWithFd),
        (None, Some(fd)) => Ok(Endpoint::Fd(fd)),
        (Some(path), None) if client => Ok(Endpoint::Connect(path)),
        (Some(path), None) => Ok(Endpoint::Listen(path)),
    }
}

/// A name for a port that was given none: the socket's file name without its ending, or the fd.
pub(crate) fn default_name(endpoint: &Endpoint) -> String {
    match endpoint {
        Endpoint::Fd(fd) => format!("fd{fd}"),
        Endpoint::Listen(path) | Endpoint::Connect(path) => {
            let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
            let ok = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            let name: String = stem.chars().map(|c| if ok(c) { c } else { '_' }).take(MAX_NAME_LEN).collect();
            if name.is_empty() { "port".to_owned() } else { name }
        }
    }
}

/// Names of instances are folders in the BPF file system, which allows no dots.
fn is_instance_letter(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '-'
}

/// Folders with this beginning are interfaces'.
const INTERFACE_PINS: &str = "xdp-";

/// A name for an instance that was given none, from that of its configuration file or its port.
pub(crate) fn default_instance(from: &str) -> String {
    let letter = |c: char| if is_instance_letter(c) { c } else { '_' };
    let name: String = from.chars().map(letter).take(MAX_NAME_LEN).collect();
    if instance(&name).is_ok() { name } else { "vhost-user-net".to_owned() }
}

/// Checks an instance's name.
pub fn instance(text: &str) -> Result<String, Problem> {
    let is_name = (1..=MAX_NAME_LEN).contains(&text.len()) && text.chars().all(is_instance_letter);
    if !is_name || text.starts_with(INTERFACE_PINS) {
        return Err(Problem::Instance(text.to_owned()));
    }
    Ok(text.to_owned())
}

/// Checks the values of one port against each other.
pub(crate) fn check_port(port: &PortConfig) -> Result<(), Problem> {
    let pairs = port.queue_pairs;
    if let UplinkSpec::TapFds(fds) = &port.uplink
        && fds.len() != usize::from(pairs)
    {
        return Err(Problem::TapFdCount { pairs, fds: fds.len() });
    }
    if let (Endpoint::Fd(fd), UplinkSpec::TapFds(fds)) = (&port.endpoint, &port.uplink)
        && fds.contains(fd)
    {
        return Err(Problem::FdTwice(*fd));
    }
    if let UplinkSpec::Xdp(xdp) = &port.uplink
        && xdp.anti_spoof
        && port.xdp_mac(xdp).is_none()
    {
        return Err(Problem::SpoofWithoutMac);
    }
    if pairs > 1 && port.disabled_protocol_features & protocol_feature("mq")? != 0 {
        return Err(Problem::PairsWithoutMq(pairs));
    }
    Ok(())
}

/// Checks the ports against each other. An error comes with the index of the later port of the two, or
/// `None` if it is about all of them.
pub(crate) fn check_ports(ports: &[PortConfig]) -> Result<(), (Option<usize>, Problem)> {
    if ports.is_empty() {
        return Err((None, Problem::NoPort));
    }
    if ports.len() > MAX_PORTS {
        return Err((None, Problem::TooManyPorts(ports.len())));
    }
    let mut seen = std::collections::HashMap::new();
    let mut interfaces: std::collections::HashMap<&str, Vec<usize>> = std::collections::HashMap::new();
    for (index, port) in ports.iter().enumerate() {
        if let UplinkSpec::Xdp(xdp) = &port.uplink {
            let others = interfaces.entry(&xdp.interface).or_default();
            for other in others.iter().map(|other| &ports[*other]) {
                if let UplinkSpec::Xdp(before) = &other.uplink
                    && let Some(what) = xdp.conflict(before)
                {
                    let (interface, other) = (xdp.interface.clone(), other.name.clone());
                    return Err((Some(index), Problem::XdpConflict { interface, what, other }));
                }
            }
            others.push(index);
        }
        for what in exclusive_things(port) {
            if let Some(&first) = seen.get(&what) {
                let other: &PortConfig = &ports[first];
                return Err((Some(index), Problem::Duplicate { what, other: other.name.clone() }));
            }
            seen.insert(what, index);
        }
    }
    peers::check(ports).map_err(|(index, problem)| (Some(index), problem.into()))
}

/// What a port has for itself, in the words of the error message.
fn exclusive_things(port: &PortConfig) -> Vec<String> {
    let mut things = vec![format!("name '{}'", port.name)];
    things.push(match &port.endpoint {
        Endpoint::Listen(path) | Endpoint::Connect(path) => {
            // `./a` and `a` are one socket; links are not followed, the path need not exist yet.
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            format!("socket {}", path.display())
        }
        Endpoint::Fd(fd) => format!("fd {fd}"),
    });
    match &port.uplink {
        UplinkSpec::Tap { name, .. } => things.push(format!("tap '{name}'")),
        UplinkSpec::TapFds(fds) => things.extend(fds.iter().map(|fd| format!("fd {fd}"))),
        UplinkSpec::Xdp(xdp) => {
            things.extend(port.xdp_mac(xdp).map(|mac| {
                let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
                let vlan = xdp.vlan.map(|vlan| format!(" of VLAN {vlan}")).unwrap_or_default();
                format!("address {mac}{vlan} on xdp:{}", xdp.interface)
            }));
        }
        UplinkSpec::Peer(_) | UplinkSpec::Null { .. } => {}
    }
    things
}
