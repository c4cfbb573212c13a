//! `cargo xtask bench`: builds what is measured in release mode and runs `vubench`, which does the rest.
#![forbid(unsafe_code)]

use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};

use crate::{cargo, target_dir};

/// What `cargo xtask bench` takes.
#[derive(Args)]
pub struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// A tap uplink: ours, DPDK's net_vhost with net_tap, bare loops; rates, CPU time, idle ports, memory
    Tap(Rest),
    /// An AF_XDP uplink on a veth: ours, DPDK's net_vhost with net_af_xdp, bare loops; rates, CPU time
    Xdp(Rest),
    /// Only the bare tap loops: plain, vectored and io_uring
    TapRaw(Rest),
}

#[derive(Args)]
struct Rest {
    /// Options of vubench (see `--help` behind `--`)
    #[arg(last = true)]
    options: Vec<String>,
}

/// Builds and measures; false if the measurement failed (it has said why).
pub fn run(options: &Options) -> Result<bool> {
    let mut build = cargo();
    build.args(["build", "--release", "-p", "vhost-user-net", "-p", "vubench"]);
    ensure!(build.status().context("running cargo")?.success(), "the build failed");
    let release = target_dir().join("release");
    let mut measure = Command::new(release.join("vubench"));
    match &options.what {
        What::Tap(rest) => compare(&mut measure, "tap", rest),
        What::Xdp(rest) => compare(&mut measure, "xdp", rest),
        What::TapRaw(rest) => {
            measure.arg("tap-raw").args(&rest.options);
        }
    }
    Ok(measure.status().context("running vubench")?.success())
}

/// The arguments of a comparison: our program and where the JSON goes, unless the caller says so himself. (A name given
/// twice is an error.)
fn compare(measure: &mut Command, what: &str, rest: &Rest) {
    let given = |name: &str| rest.options.iter().any(|o| o == name || o.starts_with(&format!("{name}=")));
    measure.arg(what);
    if !given("--backend-bin") {
        measure.arg("--backend-bin").arg(target_dir().join("release/vhost-user-net"));
    }
    if !given("--json") {
        measure.arg("--json").arg(target_dir().join(format!("bench-{what}.json")));
    }
    measure.args(&rest.options);
}
