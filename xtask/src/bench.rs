//! `cargo xtask bench`: builds what is measured in release mode and runs `vubench`, which does the rest.
#![forbid(unsafe_code)]

use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};

use crate::{cargo, postcopy_qemu, target_dir};

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
    /// Postcopy with real QEMUs: time until a guest's packets are back at full rate, ours and DPDK's
    PostcopyQemu(postcopy_qemu::Options),
}

#[derive(Args)]
struct Rest {
    /// Options of vubench (see `--help` behind `--`)
    #[arg(last = true)]
    options: Vec<String>,
}

/// Builds and measures; false if the measurement failed (it has said why).
pub fn run(options: &Options) -> Result<bool> {
    let release = target_dir().join("release");
    if let What::PostcopyQemu(options) = &options.what {
        if options.backend_bin.is_none() {
            build(&["vhost-user-net"])?;
        }
        return postcopy_qemu::run(options, &release.join("vhost-user-net")).map(|()| true);
    }
    build(&["vhost-user-net", "vubench"])?;
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
        // It has been run above: it needs the lab, not vubench.
        What::PostcopyQemu(_) => {}
    }
    Ok(measure.status().context("running vubench")?.success())
}

fn build(packages: &[&str]) -> Result<()> {
    let mut build = cargo();
    build.args(["build", "--release"]).args(packages.iter().flat_map(|package| ["-p", package]));
    ensure!(build.status().context("running cargo")?.success(), "the build failed");
    Ok(())
}
