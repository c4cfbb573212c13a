//! `cargo xtask fuzz`: runs the targets in `backend/fuzz` with cargo-fuzz, which it installs under `target/tools`.
//!
//! libFuzzer's instrumentation is an unstable option of rustc; `RUSTC_BOOTSTRAP` lets the stable
//! compiler take it, so that no second toolchain is needed.
#![forbid(unsafe_code)]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::{cargo, setup, target_dir, workspace};

/// Arguments of `cargo xtask fuzz`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only this target
    target: Option<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    time: u32,
}

/// Runs the targets; false if one of them found something.
pub fn run(options: &Options) -> Result<bool> {
    let mut targets = targets();
    if let Some(wanted) = &options.target {
        targets.retain(|target| target == wanted);
    }
    ensure!(!targets.is_empty(), "there is no such fuzz target; there are: {}", self::targets().join(", "));
    prepare()?;
    let mut is_clean = true;
    for target in targets {
        println!("fuzz: {target} for {} s", options.time);
        is_clean &= command(&target, options.time).status()?.success();
    }
    Ok(is_clean)
}

/// The names of all targets.
pub fn targets() -> Vec<String> {
    let Ok(entries) = fs::read_dir(fuzz_dir().join("fuzz_targets")) else { return Vec::new() };
    let files = entries.flatten().map(|entry| entry.path());
    let sources = files.filter(|file| file.extension().is_some_and(|e| e == "rs"));
    let mut names: Vec<String> =
        sources.filter_map(|file| Some(file.file_stem()?.to_string_lossy().into_owned())).collect();
    names.sort();
    names
}

/// Makes sure of the tools and builds all targets.
pub fn prepare() -> Result<()> {
    setup::ensure_cxx()?;
    if !tool().exists() {
        println!("fuzz: installing cargo-fuzz in {}", target_dir().join("tools").display());
        let mut install = cargo();
        install
            .args(["install", "cargo-fuzz", "--quiet", "--locked", "--root"])
            .arg(target_dir().join("tools"));
        install.env("CARGO_TARGET_DIR", target_dir().join("tools/build"));
        ensure!(install.status()?.success(), "cargo-fuzz could not be installed");
    }
    let built = cargo_fuzz("build").status().context("cannot run cargo-fuzz")?;
    ensure!(built.success(), "the fuzz targets do not build");
    Ok(())
}

/// A run of one target; [`prepare`] must have been called.
pub fn command(target: &str, seconds: u32) -> Command {
    let mut command = cargo_fuzz("run");
    // What is found goes into the first folder; the committed seeds are only read.
    let (corpus, seeds) = (fuzz_dir().join("corpus").join(target), fuzz_dir().join("seeds").join(target));
    command.arg(target);
    if seeds.exists() && fs::create_dir_all(&corpus).is_ok() {
        command.args([corpus, seeds]);
    }
    command.arg("--").arg(format!("-max_total_time={seconds}"));
    command.args(["-print_final_stats=1", "-verbosity=0"]);
    command
}

fn cargo_fuzz(verb: &str) -> Command {
    let mut command = Command::new(tool());
    command.args(["fuzz", verb, "--fuzz-dir"]).arg(fuzz_dir());
    command.current_dir(workspace().join("backend")).stdin(Stdio::null());
    command.env("RUSTC_BOOTSTRAP", "1").env("CARGO_TARGET_DIR", target_dir().join("fuzz"));
    command
}

fn tool() -> PathBuf {
    target_dir().join("tools/bin/cargo-fuzz")
}

fn fuzz_dir() -> PathBuf {
    workspace().join("backend/fuzz")
}
