//! Developer commands of the workspace: `cargo xtask <command>`.
//!
//! Here: the command line only. Each command has a module of its own; what they share with the
//! tests (guests, back-ends, namespaces) is the `lab` crate in `tests/`.
#![forbid(unsafe_code)]

mod bench;
mod build_ebpf;
mod demo;
mod fuzz;
mod packet_cost;
mod postcopy_qemu;
mod setup;
mod suite;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, tests and shows vhost-user-net")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Fetch what the tests and the demo need: QEMU, a guest kernel, busybox, DPDK
    Setup,
    /// Run all tests: unit tests, whole-program tests with real guests, a short run of the fuzzers
    Test(suite::Options),
    /// Build the BPF programs into backend/bpf, or check that what is committed there is of this source
    BuildEbpf(build_ebpf::Options),
    /// Boot a guest, ping it, transfer data, migrate it live, by precopy and by postcopy, and report what happened
    Demo(demo::Options),
    /// Run the fuzz targets
    Fuzz(fuzz::Options),
    /// Measure against DPDK and bare system calls, in one run
    Bench(bench::Options),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Task::Setup => setup::run(setup::Parts::All).map(|_| true),
        Task::Test(options) => suite::run(&options),
        Task::BuildEbpf(options) => build_ebpf::run(&options),
        Task::Demo(options) => demo::run(&options).map(|()| true),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Bench(options) => bench::run(&options),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The root of the workspace.
fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace")
}

/// Where cargo builds, and so where the lab's parts go.
fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// A command inside a user namespace of its own, where it may make network namespaces and taps; for root, the
/// plain command.
fn privileged(program: &Path) -> Command {
    if nix::unistd::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("unshare");
    command.arg("-Urnm").arg(program);
    command
}

/// The cargo that runs us.
fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    command.current_dir(workspace());
    command
}
