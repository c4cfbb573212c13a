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
        What::Tap(rest) => {
            // A name given twice is an error, so ours come only where the caller gave none.
            let given =
                |name: &str| rest.options.iter().any(|o| o == name || o.starts_with(&format!("{name}=")));
            measure.arg("tap");
            if !given("--backend-bin") {
                measure.arg("--backend-bin").arg(release.join("vhost-user-net"));
            }
            if !given("--json") {
                measure.arg("--json").arg(target_dir().join("bench-tap.json"));
            }
            measure.args(&rest.options);
        }
        What::TapRaw(rest) => {
            measure.arg("tap-raw").args(&rest.options);
        }
    }
    Ok(measure.status().context("running vubench")?.success())
}
