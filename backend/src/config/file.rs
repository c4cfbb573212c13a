//! The TOML configuration file: one `[[port]]` per vhost-user device.
//!
//! Here: the file's shape and how its errors find their line. The rules for values are in `config.rs`.
#![forbid(unsafe_code)]

use super::{Config, FaultLatency, Poll, PortConfig, Problem, UplinkSpec};
use serde::Deserialize;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::Spanned;

/// Size of a configuration file at most, in bytes: a wrong path (a disk image, say) must not be read whole.
const MAX_FILE_LEN: u64 = 4 << 20;

/// A configuration file that cannot be used: which one, where, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1, if the error has one.
    pub line: Option<usize>,
    /// The port, if the error is about one that has a name.
    pub port: Option<String>,
    /// What is wrong and what to do.
    pub message: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, "{line}:")?;
        }
        if let Some(port) = &self.port {
            write!(f, " port '{port}':")?;
        }
        write!(f, " {}", self.message)
    }
}

impl std::error::Error for ConfigError {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    workers: Option<Spanned<i64>>,
    log: Option<Spanned<String>>,
    instance: Option<Spanned<String>>,
    fault_latency: Option<Spanned<String>>,
    poll: Option<Spanned<String>>,
    #[serde(default)]
    port: Vec<Spanned<Port>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Port {
    name: Option<Spanned<String>>,
    socket: Option<Spanned<PathBuf>>,
    fd: Option<Spanned<i64>>,
    #[serde(default)]
    client: bool,
    uplink: Option<Spanned<String>>,
    queue_pairs: Option<Spanned<i64>>,
    mtu: Option<Spanned<i64>>,
    mac: Option<Spanned<String>>,
    #[serde(default)]
    disable_protocol_features: Vec<Spanned<String>>,
    postcopy: Option<Spanned<String>>,
    postcopy_multiqueue: Option<Spanned<String>>,
}

/// Reads and checks a configuration file.
pub fn load(file: &Path) -> Result<Config, ConfigError> {
    let fail = |message: String| ConfigError { file: file.to_owned(), line: None, port: None, message };
    let advice = "check the path and its permissions";
    let length = std::fs::metadata(file).map_err(|e| fail(format!("cannot be read ({e}), {advice}")))?.len();
    if length > MAX_FILE_LEN {
        return Err(fail(format!("is larger than {MAX_FILE_LEN} bytes, is this the right file?")));
    }
    let text = std::fs::read_to_string(file).map_err(|e| fail(format!("cannot be read ({e}), {advice}")))?;
    parse_text(&text, file)
}

/// Checks a configuration's text; `file` is for the messages.
pub fn parse_text(text: &str, file: &Path) -> Result<Config, ConfigError> {
    let error = |span: Option<Range<usize>>, port: Option<&str>, message: String| ConfigError {
        file: file.to_owned(),
        line: span.map(|span| line_of(text, span.start)),
        port: port.map(str::to_owned),
        message,
    };
    let parsed: File = toml::from_str(text).map_err(|e| {
        let message = e.message().trim().replace('\n', " ");
        error(e.span(), None, format!("{message}, correct the file's syntax, keys or types"))
    })?;

    let workers = match &parsed.workers {
        Some(n) => super::workers(*n.get_ref()).map_err(|p| error(Some(n.span()), None, p.to_string()))?,
        None => 1,
    };
    let log = match &parsed.log {
        Some(s) => {
            Some(super::log_filter(s.get_ref()).map_err(|p| error(Some(s.span()), None, p.to_string()))?)
        }
        None => None,
    };
    let whole = |(span, problem): Placed| error(span, None, problem.to_string());
    let instance = checked(&parsed.instance, |name| super::instance(name)).map_err(whole)?;
    let fault_latency = checked(&parsed.fault_latency, |text| text.parse::<FaultLatency>()).map_err(whole)?;
    let poll = checked(&parsed.poll, |text| text.parse::<Poll>()).map_err(whole)?;
    let mut ports = Vec::with_capacity(parsed.port.len());
    for port in &parsed.port {
        let name = port.get_ref().name.as_ref().map(|n| n.get_ref().as_str());
        let built = build_port(port.get_ref()).map_err(|(span, problem)| {
            error(Some(span.unwrap_or_else(|| port.span())), name, problem.to_string())
        })?;
        ports.push(built);
    }
    super::check_ports(&ports).map_err(|(index, problem)| {
        let span = index.map(|i| parsed.port[i].span());
        error(span, index.map(|i| ports[i].name.as_str()), problem.to_string())
    })?;
    Ok(Config {
        workers,
        log,
        instance: instance.unwrap_or_else(|| {
            super::default_instance(&file.file_stem().map(|s| s.to_string_lossy()).unwrap_or_default())
        }),
        fault_latency: fault_latency.unwrap_or_default(),
        poll: poll.unwrap_or_default(),
        ports,
    })
}

/// A problem and, if it is about one value, that value's place in the text.
type Placed = (Option<Range<usize>>, Problem);

/// Applies a value's rule and remembers the value's place if it fails.
fn checked<T, U, E: Into<Problem>>(
    value: &Option<Spanned<T>>,
    rule: impl FnOnce(&T) -> Result<U, E>,
) -> Result<Option<U>, Placed> {
    match value {
        None => Ok(None),
        Some(v) => rule(v.get_ref()).map(Some).map_err(|e| (Some(v.span()), e.into())),
    }
}

fn build_port(port: &Port) -> Result<PortConfig, Placed> {
    let whole = |problem| (None, problem);
    let socket = checked(&port.socket, |p| super::socket_path(p))?;
    let fd = checked(&port.fd, |n| super::inherited_fd(*n))?;
    let endpoint =
        super::endpoint(socket, fd, port.client, "socket = \"PATH\", fd = NUMBER").map_err(whole)?;
    let name = checked(&port.name, |n| super::port_name(n))?;
    let uplink = checked(&port.uplink, |u| u.parse::<UplinkSpec>())?;
    let mut disabled_protocol_features = 0;
    for name in &port.disable_protocol_features {
        disabled_protocol_features |=
            super::protocol_feature(name.get_ref()).map_err(|p| (Some(name.span()), p))?;
    }
    let built = PortConfig {
        name: name.unwrap_or_else(|| super::default_name(&endpoint)),
        endpoint,
        uplink: uplink.ok_or(whole(Problem::UplinkMissing(
            "uplink = \"tap:NAME\", \"tap-fd:N\", \"xdp:INTERFACE\", \"peer:PORT\", \"null\"",
        )))?,
        queue_pairs: checked(&port.queue_pairs, |n| super::queue_pairs(*n))?.unwrap_or(1),
        mtu: checked(&port.mtu, |n| super::mtu(*n))?,
        mac: checked(&port.mac, |m| super::mac(m))?,
        disabled_protocol_features,
        postcopy: checked(&port.postcopy, |text| super::postcopy(text))?.unwrap_or_default(),
        postcopy_multiqueue: checked(&port.postcopy_multiqueue, |text| super::postcopy_multiqueue(text))?
            .unwrap_or_default(),
    };
    super::check_port(&built).map_err(whole)?;
    Ok(built)
}

/// The line of a byte offset, from 1.
fn line_of(text: &str, offset: usize) -> usize {
    1 + text.as_bytes().iter().take(offset).filter(|b| **b == b'\n').count()
}
