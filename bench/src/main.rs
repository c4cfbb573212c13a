//! vubench: loads and measures any vhost-user network back-end.
//!
//! Here: the command line only. `tap` and `xdp` run several back-ends against each other, on what is in `compare`; `raw`
//! and `xsk` have the bare loops, `load` a front-end with the driver in `driver`, `generate` puts frames into an interface, `postcopy` is a front-end whose memory has not
//! arrived.

use anyhow::Result;
use clap::{Parser, Subcommand};

mod compare;
mod driver;
mod generate;
mod interrupt;
mod load;
mod mapping;
mod netspace;
mod packet;
mod postcopy;
mod procstat;
mod raw;
mod report;
mod session;
mod table;
mod tap;
mod testpmd;
mod xdp;
mod xsk;

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
    /// Put frames into an interface, at a fixed rate or as fast as possible
    Gen(generate::Args),
    /// Everything about rings, peer links and many ports: ours, DPDK's and others' in turn, with verdicts and a picture
    Table(table::Args),
    /// Compare back-ends with a tap uplink: ours, DPDK's, and the bare loops
    Tap(tap::Args),
    /// Compare back-ends with an AF_XDP uplink on a veth: ours, DPDK's, and the bare loops
    Xdp(xdp::Args),
    /// The bare AF_XDP loop, until it is killed
    XdpLoop(xsk::Args),
    /// Send packets to a back-end, as many as it takes or at a rate
    Tx(load::OpenArgs),
    /// Receive what a back-end sends
    Rx(load::OpenArgs),
    /// Send and receive at once
    Both(load::OpenArgs),
    /// Send what comes back: so many packets in flight through a port that echoes, or between two
    Loop(load::LoopArgs),
    /// How long a packet takes there and back, one in flight or at a rate
    Latency(load::LatencyArgs),
    /// Play QEMU's part in a postcopy migration: how a back-end bears memory that has not arrived
    Postcopy(postcopy::Args),
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::TapRaw(args) => raw::run(&args),
        Command::Gen(args) => generate::run(&args),
        Command::Table(args) => table::run(&args),
        Command::Tap(args) => tap::run(&args),
        Command::Xdp(args) => xdp::run(&args),
        Command::XdpLoop(args) => xsk::run(&args),
        Command::Tx(args) => args.run(load::Way::Tx),
        Command::Rx(args) => args.run(load::Way::Rx),
        Command::Both(args) => args.run(load::Way::Both),
        Command::Loop(args) => args.run(),
        Command::Latency(args) => args.run(),
        Command::Postcopy(args) => postcopy::run(&args),
    }
}
