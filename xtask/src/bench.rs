//! `cargo xtask bench`: builds what is measured in release mode and runs `vubench`, which does the rest. Without a
//! sub-command: the whole table.
#![forbid(unsafe_code)]

use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};

use crate::{cargo, packet_cost, postcopy_qemu, target_dir};

/// What `cargo xtask bench` takes.
#[derive(Args)]
pub struct Options {
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Subcommand)]
enum What {
    /// Rings, peer links, many ports, tap and AF_XDP: ours, DPDK's and others', with verdicts and a picture (what is done
    /// without a sub-command)
    Table(Rest),
    /// A tap uplink: ours, DPDK's net_vhost with net_tap, bare loops; rates, CPU time, idle ports, memory
    Tap(Rest),
    /// An AF_XDP uplink on a veth: ours, DPDK's net_vhost with net_af_xdp, bare loops; rates, CPU time
    Xdp(Rest),
    /// Postcopy: ours and DPDK's back-end while pages come late or never, against the numbers to reach
    Postcopy(Rest),
    /// Instructions per packet outside postcopy, against those before there was postcopy; needs valgrind
    PacketCost(packet_cost::Options),
    /// What the fault-latency programs cost: per page fault and per context switch
    Faults,
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

impl Rest {
    /// Whether the caller says this option himself.
    fn given(&self, name: &str) -> bool {
        self.options.iter().any(|o| o == name || o.starts_with(&format!("{name}=")))
    }
}

/// Builds and measures; false if the measurement failed (it has said why).
pub fn run(options: &Options) -> Result<bool> {
    let Some(what) = &options.what else { return table(&Rest { options: Vec::new() }) };
    match what {
        What::Table(rest) => table(rest),
        What::Tap(rest) => compare("tap", rest),
        What::Xdp(rest) => compare("xdp", rest),
        What::Postcopy(rest) => compare("postcopy", rest),
        What::PacketCost(options) => packet_cost::run(options),
        What::Faults => faults(),
        What::PostcopyQemu(options) => postcopy_qemu(options),
        What::TapRaw(rest) => succeeds(vubench()?.arg("tap-raw").args(&rest.options)),
    }
}

/// A comparison of ours with others: our program and where the JSON goes are given, unless the caller says so himself. (A
/// name given twice is an error.)
fn compare(what: &str, rest: &Rest) -> Result<bool> {
    let given = |name: &str| rest.given(name);
    let mut measure = vubench()?;
    measure.arg(what);
    if what == "postcopy" {
        let all = ["--suite", "--dpdk", "--hugepages"];
        measure.args(all.into_iter().filter(|name| !given(name)));
    }
    if !given("--backend-bin") {
        measure.arg("--backend-bin").arg(target_dir().join("release/vhost-user-net"));
    }
    if !given("--json") {
        measure.arg("--json").arg(target_dir().join(format!("bench-{what}.json")));
    }
    succeeds(measure.args(&rest.options))
}

/// The whole table. What a packet costs in instructions is counted here, as it needs valgrind and an example of the
/// back-end.
fn table(rest: &Rest) -> Result<bool> {
    let given = |name: &str| rest.given(name);
    let mut measure = vubench()?;
    measure.arg("table");
    if !given("--backend-bin") {
        measure.arg("--backend-bin").arg(target_dir().join("release/vhost-user-net"));
    }
    for (option, file) in [("--json", "bench.json"), ("--picture", "bench.svg")] {
        if !given(option) {
            measure.arg(option).arg(target_dir().join(file));
        }
    }
    if !given("--list") && !given("--only") && !given("--instructions-tx") {
        match packet_cost::now() {
            Ok([tx, rx]) => {
                measure.args(["--instructions-tx", &tx.to_string(), "--instructions-rx", &rx.to_string()]);
            }
            Err(error) => eprintln!("note: no instruction counts: {error:#}"),
        }
    }
    succeeds(measure.args(&rest.options))
}

/// The faults themselves are made by an example of the back-end, which the tests use, too.
fn faults() -> Result<bool> {
    let mut measure = cargo();
    measure.args(["run", "--release", "-p", "vhost-user-net", "--example", "fault-latency", "--", "--cost"]);
    succeeds(&mut measure)
}

/// This one needs the lab, not vubench.
fn postcopy_qemu(options: &postcopy_qemu::Options) -> Result<bool> {
    if options.backend_bin.is_none() {
        let mut build = cargo();
        ensure!(succeeds(build.args(["build", "--release", "-p", "vhost-user-net"]))?, "the build failed");
    }
    postcopy_qemu::run(options, &target_dir().join("release/vhost-user-net")).map(|()| true)
}

/// `vubench` and our program, built.
fn vubench() -> Result<Command> {
    let mut build = cargo();
    build.args(["build", "--release", "-p", "vhost-user-net", "-p", "vubench"]);
    ensure!(succeeds(&mut build)?, "the build failed");
    Ok(Command::new(target_dir().join("release/vubench")))
}

fn succeeds(command: &mut Command) -> Result<bool> {
    Ok(command.status().with_context(|| format!("running {command:?}"))?.success())
}
