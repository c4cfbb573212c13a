//! `cargo xtask bench packet-cost`: instructions per packet outside postcopy, now and at the last commit before postcopy.
//!
//! The same example is built with both libraries (in a temporary git worktree for the earlier one) and counted by
//! callgrind for N and 2 N packets. Instructions are the same in every run, so a busy machine does not matter.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::{cargo, target_dir};

/// What the residency check may add to a packet, instructions.
const MOST: f64 = 2.0;
const PACKETS: u64 = 64_000;
const EXAMPLE: &str = "backend/examples/packet-cost.rs";
/// The last commit before postcopy.
const BEFORE: &str = "508617b";

/// Options of `cargo xtask bench packet-cost`.
#[derive(Args)]
pub struct Options {
    /// The commit to compare with
    #[arg(long, default_value = BEFORE)]
    base: String,
}

/// A git worktree that is removed with this.
struct Worktree(PathBuf);

impl Worktree {
    fn of(commit: &str) -> Result<Self> {
        let place = target_dir().join("packet-cost-base");
        let it = Self(place);
        it.remove();
        let path = it.0.display().to_string();
        git(&["worktree", "add", "--quiet", "--detach", "--force", &path, commit])?;
        Ok(it)
    }

    fn remove(&self) {
        // It need not be there.
        let path = self.0.display().to_string();
        let _ = Command::new("git").args(["worktree", "remove", "--force", &path]).output();
    }
}

impl Drop for Worktree {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Instructions per packet as it is now: transmit, receive.
pub fn now() -> Result<[f64; 2]> {
    valgrind()?;
    let now = build(Path::new("."), &target_dir(), false)?;
    Ok([per_packet(&now, &["tx"])?, per_packet(&now, &["rx"])?])
}

fn valgrind() -> Result<()> {
    let valgrind = Command::new("valgrind").arg("--version").output();
    ensure!(valgrind.is_ok(), "valgrind is missing; on Debian: apt-get install valgrind");
    Ok(())
}

/// Builds, counts and compares; false if a packet costs more than it may.
pub fn run(options: &Options) -> Result<bool> {
    valgrind()?;
    let now = build(Path::new("."), &target_dir(), false)?;
    let tree = Worktree::of(&options.base)?;
    let place = tree.0.join(EXAMPLE);
    std::fs::create_dir_all(place.parent().context("folder")?)?;
    std::fs::copy(EXAMPLE, &place)?;
    // The uplinks' trait was another one then.
    let old_trait = git(&["merge-base", "--is-ancestor", &options.base, BEFORE]).is_ok();
    let before = build(&tree.0, &target_dir().join("packet-cost-target"), old_trait)?;
    println!(
        "instructions per packet        {:>8}      now   difference   all pages known to be here",
        options.base
    );
    let mut reached = true;
    for direction in ["tx", "rx"] {
        let [then, now, known] = [
            per_packet(&before, &[direction])?,
            per_packet(&now, &[direction])?,
            per_packet(&now, &[direction, "all-arrived"])?,
        ];
        println!("{direction:<30} {then:>8.1} {now:>8.1} {:>12.1} {known:>13.1}", now - then);
        reached &= now - then <= MOST;
    }
    println!("packed rings                                 now");
    for (direction, more) in [("tx", "in-order"), ("tx", ""), ("rx", "")] {
        let args: Vec<&str> = [direction, "packed", more].into_iter().filter(|arg| !arg.is_empty()).collect();
        println!("{:<40} {:>7.1}", args.join(" "), per_packet(&now, &args)?);
    }
    println!("to reach: {MOST} more at most: {}", if reached { "yes" } else { "NO" });
    Ok(reached)
}

fn build(folder: &Path, target: &Path, old_trait: bool) -> Result<PathBuf> {
    let mut build = cargo();
    build.current_dir(folder).env("CARGO_TARGET_DIR", target);
    let mut flags = Vec::new();
    if old_trait {
        flags.push("--cfg before_postcopy");
    }
    if !folder.join("backend/src/virtq/queue.rs").exists() {
        flags.push("--cfg before_queue");
    }
    if !flags.is_empty() {
        build.env("RUSTFLAGS", flags.join(" "));
    }
    build.args(["build", "--release", "--quiet", "-p", "vhost-user-net", "--example", "packet-cost"]);
    ensure!(build.status().context("running cargo")?.success(), "the build in {} failed", folder.display());
    Ok(target.join("release/examples/packet-cost"))
}

fn per_packet(program: &Path, args: &[&str]) -> Result<f64> {
    let count = |packets: u64| -> Result<u64> {
        let out = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg("--toggle-collect=packet_cost::device*")
            .arg(program)
            .arg(args[0])
            .arg(packets.to_string())
            .args(&args[1..])
            .output()?;
        let text = String::from_utf8_lossy(&out.stderr);
        ensure!(out.status.success(), "callgrind: {text}");
        let counted = text.lines().find_map(|line| line.split_once("Collected :")).map(|(_, n)| n.trim());
        counted.and_then(|n| n.parse().ok()).with_context(|| format!("no count in:\n{text}"))
    };
    Ok((count(2 * PACKETS)? - count(PACKETS)?) as f64 / PACKETS as f64)
}

fn git(args: &[&str]) -> Result<()> {
    let status = Command::new("git").args(args).status().context("running git")?;
    ensure!(status.success(), "git {} failed", args.join(" "));
    Ok(())
}
