//! vubench: loads and measures any vhost-user network back-end.
//!
//! Here: the command line only. `raw` has the bare tap loops, `compare` runs several back-ends against each other on
//! a tap, `generate` puts frames into one, `postcopy` is a front-end whose memory has not arrived.

use anyhow::Result;
use clap::{Parser, Subcommand};

mod compare;
mod generate;
mod interrupt;
mod netspace;
mod postcopy;
mod procstat;
mod raw;
mod report;
mod tap;
mod testpmd;

/// Loads and measures vhost-user network back-ends.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Bare read and write loops on a tap: what the tap itself costs
    TapRaw(raw::Args),
    /// Put frames into a tap, at a fixed rate or as fast as possible
    TapGen(generate::Args),
    /// Compare back-ends with a tap uplink: ours, DPDK's, and the bare loops
    Tap(compare::Args),
    /// Play QEMU's part in a postcopy migration: how a back-end bears memory that has not arrived
    Postcopy(postcopy::Args),
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::TapRaw(args) => raw::run(&args),
        Command::TapGen(args) => generate::run(&args),
        Command::Tap(args) => compare::run(&args),
        Command::Postcopy(args) => postcopy::run(&args),
    }
}
