//! What the program does instead of serving ports: options of its commands.
#![forbid(unsafe_code)]

use super::Command;
use crate::config::{self, Problem};
use crate::observe::command::{Faults, Unload};
use clap::Subcommand;
use std::time::Duration;

/// Shortest interval of `--watch`, seconds.
const WATCH_MIN: f64 = 0.1;
/// Longest, seconds.
const WATCH_MAX: f64 = 86400.0;

const FAULTS_HELP: &str = "\
Examples:
  vhost-user-net faults                  what was measured since the process started
  vhost-user-net faults --watch          what comes, each second
  vhost-user-net faults --json | jq '.stalls[] | [.port, .kind, .context, .count, .max_ns]'

A stall is a page fault on guest memory that another process has still to supply: its length is the time that a thread slept in it.
Buckets are powers of two in microseconds, as in QEMU's postcopy-latency-distribution.
kind: ring, indirect-table, packet-buffer (any other memory of the guest), unknown. context: worker, io-wq, other threads.

JSON: {instance, layout, process: {pid, alive}, mode, events_lost,
  stalls: [{port, kind, context, count, sum_ns, mean_ns, max_ns, p50_ns, p99_ns, buckets: [{from_us, below_us, count}], sources}],
  standing: [{tid, port, kind, context, address, for_ns}]}; with --watch, interval_s, and one line for each interval.
The same with bpftool: bpftool map dump pinned /sys/fs/bpf/vhost-user-net/INSTANCE/fault_hist";

#[derive(Debug, Subcommand)]
pub(super) enum Sub {
    /// Show how long threads of a running instance stood still for missing guest memory
    #[command(after_help = FAULTS_HELP)]
    Faults {
        /// The instance [default: the only one]
        #[arg(long, value_name = "NAME", value_parser = config::instance)]
        instance: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Print what has come, every so many seconds
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = interval)]
        watch: Option<Duration>,
    },
    /// Remove what a killed process has left in /sys/fs/bpf
    Unload {
        /// The instance whose maps go [default: the only one]
        #[arg(long, value_name = "NAME", value_parser = config::instance)]
        instance: Option<String>,
        /// The interface whose XDP program is detached
        #[arg(value_name = "IFACE", conflicts_with = "instance")]
        interface: Option<String>,
        /// Everything that no process uses any more
        #[arg(long, conflicts_with_all = ["instance", "interface"])]
        all: bool,
    },
}

impl From<Sub> for Command {
    fn from(sub: Sub) -> Self {
        match sub {
            Sub::Faults { instance, json, watch } => Self::Faults(Faults { instance, json, watch }),
            Sub::Unload { all: true, .. } => Self::Unload(Unload::All),
            Sub::Unload { interface: Some(interface), .. } => Self::Unload(Unload::Interface(interface)),
            Sub::Unload { instance, .. } => Self::Unload(Unload::Instance(instance)),
        }
    }
}

fn interval(text: &str) -> Result<Duration, Problem> {
    let seconds: f64 = text.parse().map_err(|_| Problem::Interval(text.to_owned()))?;
    if (WATCH_MIN..=WATCH_MAX).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err(Problem::Interval(text.to_owned()))
    }
}
