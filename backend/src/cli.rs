//! The command line, by QEMU's conventions for back-end programs (vhost-user: Backend program conventions).
//!
//! Here: options, and how they and a configuration file become a [`Command`]. The rules for values are in
//! `config.rs`; running a command is the daemon's work.
#![forbid(unsafe_code)]

use crate::config::{self, Config, ConfigError, FaultLatency, Poll, PortConfig, Problem, UplinkSpec};
use crate::observe::command::{Faults, Unload};
use clap::Parser;
use commands::Sub;
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

mod commands;
#[cfg(test)]
mod tests;

/// Exit code of every error in options or configuration.
pub const EXIT_USAGE: u8 = 2;

const EXAMPLES: &str = "\
Examples:
  vhost-user-net --socket-path /run/vm1.sock --uplink tap:vm1,up
  vhost-user-net --socket-path /run/qemu.sock --client --uplink tap-fd:3
  vhost-user-net --socket-path /run/vm2.sock --uplink xdp:eth1,queues=2 --queue-pairs 2
  vhost-user-net --config /etc/vhost-user-net.toml --check-config
  vhost-user-net faults --watch

The log goes to stderr; SIGTERM ends the program cleanly.";

/// A vhost-user network back-end whose event loop never blocks.
#[derive(Debug, Parser)]
#[command(name = "vhost-user-net", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
#[command(disable_help_subcommand = true)]
struct Options {
    #[command(subcommand)]
    command: Option<Sub>,

    /// Listen for the front-end at this Unix socket
    #[arg(long, value_name = "PATH", value_parser = |s: &str| config::socket_path(s.as_ref()))]
    socket_path: Option<PathBuf>,

    /// Use this inherited fd: a connected or a listening Unix socket
    #[arg(long, value_name = "N", value_parser = |s: &str| config::inherited_fd(number(s)?))]
    fd: Option<RawFd>,

    /// Connect to --socket-path, which the front-end serves, and reconnect whenever the connection ends
    #[arg(long)]
    client: bool,

    /// Where packets go: tap:NAME[,up] | tap-fd:N[:N...] (one per queue pair) | xdp:INTERFACE[,OPTION...] | peer:PORT (with --config) | null (count and drop)
    #[arg(long, value_name = "UPLINK")]
    uplink: Option<UplinkSpec>,

    /// Queue pairs to offer, 1 to 128 [default: 1]
    #[arg(long, value_name = "N", value_parser = |s: &str| config::queue_pairs(number(s)?))]
    queue_pairs: Option<u16>,

    /// Worker threads, 1 to 64 [default: 1]
    #[arg(long, value_name = "N", value_parser = |s: &str| config::workers(number(s)?))]
    workers: Option<u16>,

    /// Largest MTU, 68 to 65535 bytes [default: the uplink's]
    #[arg(long, value_name = "BYTES", value_parser = |s: &str| config::mtu(number(s)?))]
    mtu: Option<u16>,

    /// The device's MAC address [default: the front-end's choice]
    #[arg(long, value_name = "AA:BB:CC:DD:EE:FF", value_parser = config::mac)]
    mac: Option<[u8; 6]>,

    /// The port's name in log lines and counters [default: the socket's file name]
    #[arg(long, value_name = "NAME", value_parser = config::port_name)]
    name: Option<String>,

    /// Do not offer this vhost-user protocol feature, such as configure-mem-slots; can be repeated
    #[arg(long, value_name = "FEATURE", value_parser = config::protocol_feature)]
    disable_protocol_feature: Vec<u64>,

    /// Offer postcopy migration: auto (where userfaultfd can be had), on, off [default: auto]
    #[arg(long, value_name = "WHEN", value_parser = config::postcopy)]
    postcopy: Option<config::Postcopy>,

    /// Offer it with several queue pairs, too: off, or resend (works around QEMU, up to 10.2) [default: off]
    #[arg(long, value_name = "HOW", value_parser = config::postcopy_multiqueue)]
    postcopy_multiqueue: Option<config::PostcopyMultiqueue>,

    /// The name under which `vhost-user-net faults` finds this process [default: the file's or the port's]
    #[arg(long, value_name = "NAME", value_parser = config::instance)]
    instance: Option<String>,

    /// Measure stalls on missing guest memory: auto (where that costs nothing otherwise, else during migrations), on, off
    #[arg(long, value_name = "WHEN", value_parser = str::parse::<FaultLatency>)]
    fault_latency: Option<FaultLatency>,

    /// Look at rings without being told to: auto[:US] (while packets come often; without any for so many µs at most), never, always [default: auto:200]
    #[arg(long, value_name = "WHEN", value_parser = str::parse::<Poll>)]
    poll: Option<Poll>,

    /// Log level or filter; goes before RUST_LOG [default: info]
    #[arg(long, value_name = "LEVEL", value_parser = config::log_filter)]
    log: Option<String>,

    /// Read ports from this TOML file instead of from options
    #[arg(long, value_name = "FILE", conflicts_with_all = ["socket_path", "fd", "client", "uplink",
        "queue_pairs", "mtu", "mac", "name", "disable_protocol_feature",
        "postcopy", "postcopy_multiqueue"])]
    config: Option<PathBuf>,

    /// Check options and configuration, print a line for each port, and exit
    #[arg(long)]
    check_config: bool,

    /// Print capabilities as JSON and exit; all other options are ignored
    // Handled before clap looks at the options, so that a wrong one beside it is ignored too.
    #[arg(long)]
    print_capabilities: bool,
}

/// What the program was asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Serve these ports.
    Run(Config),
    /// Print [`crate::capabilities::capabilities_json`].
    PrintCapabilities,
    /// Print [`summary`]; everything was found to be right.
    CheckConfig(Config),
    /// Show what an instance has measured.
    Faults(Faults),
    /// Remove what a killed process has left.
    Unload(Unload),
}

/// Why there is no [`Command`].
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Wrong options, or a request for help or the version, which clap has rendered.
    #[error("{0}")]
    Clap(#[from] clap::Error),
    /// Options that do not fit together.
    #[error("{0}")]
    Options(#[from] Problem),
    /// The configuration file.
    #[error("{0}")]
    Config(#[from] ConfigError),
}

impl CliError {
    /// Prints the message: help and version to stdout, errors to stderr.
    pub fn print(&self) {
        match self {
            // If stderr or stdout is closed there is nobody to tell.
            Self::Clap(e) => drop(e.print()),
            Self::Options(_) => eprintln!("error: {self}; see --help"),
            Self::Config(_) => eprintln!("error: {self}"),
        }
    }

    /// 0 for help and version, else [`EXIT_USAGE`].
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Clap(e) if e.exit_code() == 0 => 0,
            _ => EXIT_USAGE,
        }
    }
}

/// Reads the process's own arguments.
pub fn parse() -> Result<Command, CliError> {
    parse_from(std::env::args_os())
}

/// Reads arguments, the program's name first.
pub fn parse_from<I, T>(args: I) -> Result<Command, CliError>
where
    I: IntoIterator<Item = T>,
    T: Into<OsString>,
{
    let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    // "Other options and arguments should be ignored" (vhost-user: Backend program conventions).
    if args.iter().skip(1).any(|arg| arg == "--print-capabilities") {
        return Ok(Command::PrintCapabilities);
    }
    let mut options = Options::try_parse_from(args)?;
    if let Some(sub) = options.command.take() {
        return Ok(sub.into());
    }
    let check = options.check_config;
    let config = match options.config.take() {
        Some(file) => {
            let mut config = config::load(&file)?;
            // What is about the process may be overridden for one run.
            config.workers = options.workers.unwrap_or(config.workers);
            config.log = options.log.or(config.log);
            config.instance = options.instance.unwrap_or(config.instance);
            config.poll = options.poll.unwrap_or(config.poll);
            config.fault_latency = options.fault_latency.unwrap_or(config.fault_latency);
            config
        }
        None => single_port(options)?,
    };
    Ok(if check { Command::CheckConfig(config) } else { Command::Run(config) })
}

/// One line per port and one for the process, for `--check-config`.
pub fn summary(config: &Config) -> String {
    let mut text = String::new();
    for port in &config.ports {
        text.push_str(&format!("{port}\n"));
    }
    let (ports, workers) = (config.ports.len(), config.workers);
    let plural = |n: usize| if n == 1 { "" } else { "s" };
    text.push_str(&format!(
        "ok: {ports} port{}, {workers} worker{}\n",
        plural(ports),
        plural(workers.into())
    ));
    text
}

/// Writes to stdout. If nobody reads it any more, that is no error of ours.
pub fn print_out(text: &str) {
    use std::io::Write;
    drop(std::io::stdout().write_all(text.as_bytes()));
}

/// Log lines that may wait for a slow stderr; further ones are dropped.
const LOG_LINES: usize = 4096;

/// Starts logging to stderr: `filter`, or else `RUST_LOG`, or else `info`. A second call changes nothing.
///
/// Lines are written by a thread of their own, since a pipe that nobody reads must not stop the loop. Keep what is
/// returned until the end: its drop writes what still waits.
#[must_use]
pub fn init_log(filter: Option<&str>) -> impl Drop + use<> {
    use std::io::IsTerminal;
    use tracing_subscriber::EnvFilter;
    let filter = match filter {
        Some(text) => EnvFilter::try_new(text).unwrap_or_else(|_| EnvFilter::new("info")),
        None => EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")),
    };
    let (writer, guard) = tracing_appender::non_blocking::NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(LOG_LINES)
        .finish(std::io::stderr());
    // An error means that a subscriber is there already, as in tests.
    drop(
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(writer)
            .with_ansi(std::io::stderr().is_terminal())
            .try_init(),
    );
    guard
}

fn single_port(options: Options) -> Result<Config, Problem> {
    let endpoint = config::endpoint(
        options.socket_path,
        options.fd,
        options.client,
        "--socket-path PATH, --fd N, --config FILE",
    )?;
    let port = PortConfig {
        name: options.name.unwrap_or_else(|| config::default_name(&endpoint)),
        endpoint,
        uplink: options.uplink.ok_or(Problem::UplinkMissing(
            "--uplink tap:NAME, --uplink tap-fd:N, --uplink xdp:INTERFACE, --uplink null",
        ))?,
        queue_pairs: options.queue_pairs.unwrap_or(1),
        mtu: options.mtu,
        mac: options.mac,
        disabled_protocol_features: options.disable_protocol_feature.iter().fold(0, |mask, bit| mask | bit),
        postcopy: options.postcopy.unwrap_or_default(),
        postcopy_multiqueue: options.postcopy_multiqueue.unwrap_or_default(),
    };
    config::check_port(&port)?;
    let ports = vec![port];
    config::check_ports(&ports).map_err(|(_, problem)| problem)?;
    Ok(Config {
        workers: options.workers.unwrap_or(1),
        log: options.log,
        instance: options.instance.unwrap_or_else(|| config::default_instance(&ports[0].name)),
        fault_latency: options.fault_latency.unwrap_or_default(),
        poll: options.poll.unwrap_or_default(),
        ports,
    })
}

fn number(text: &str) -> Result<i64, Problem> {
    text.parse().map_err(|_| Problem::NotANumber(text.to_owned()))
}
