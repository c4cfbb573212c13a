//! Links the program by GNU ld where it is there, as perf does not find static tracepoints in what rust-lld has linked.
//!
//! rust-lld gives code other addresses than offsets in the file, and perf (up to 6.x at least) takes one for the other:
//! `perf probe` and `perf record` succeed, and nothing is ever hit. bpftrace and gdb are right with both linkers.

use std::env;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=CARGO_ENCODED_RUSTFLAGS");
    let is_gnu_linux = env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux")
        && env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env == "gnu");
    let is_native = env::var("HOST").ok() == env::var("TARGET").ok();
    // Whoever chooses a linker gets it.
    let flags = env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    let is_chosen = ["fuse-ld", "linker"].iter().any(|word| flags.contains(word));
    let is_there = || Command::new("ld.bfd").arg("--version").output().is_ok_and(|run| run.status.success());
    if is_gnu_linux && is_native && !is_chosen && is_there() {
        println!("cargo:rustc-link-arg-bins=-fuse-ld=bfd");
    }
}
