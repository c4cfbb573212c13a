//! `cargo xtask build-ebpf`: builds the BPF programs of `ebpf/` into `backend/bpf/*.o`, which are committed and embedded
//! in the program, so that `cargo build` alone gives the whole.
//!
//! Here: the command and the order of its steps. Which compiler: `compiler`; bpf-linker: `linker`; what is kept of an
//! object: `object`; how a rebuilt object is compared with the committed one: `compare`, with `btf`.
#![forbid(unsafe_code)]

mod btf;
mod compare;
mod compiler;
mod linker;
mod object;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::{target_dir, workspace};
use compiler::Compiler;

/// The machine that programs are built for.
const TARGET: &str = "bpfel-unknown-none";

/// The programs, each a binary of `ebpf/programs`.
const BINS: [&str; 3] = ["xdp", "tap", "faults"];

/// Arguments of `cargo xtask build-ebpf`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Rebuild, and compare with the committed objects instead of writing them
    #[arg(long)]
    check: bool,
    /// Only this program (may be given several times)
    #[arg(long, value_name = "NAME")]
    bin: Vec<String>,
}

/// Builds or checks the objects; false if a committed object is not what its source gives.
pub fn run(options: &Options) -> Result<bool> {
    let started = Instant::now();
    let mut bins: Vec<&str> = BINS.to_vec();
    if !options.bin.is_empty() {
        for name in &options.bin {
            ensure!(BINS.contains(&name.as_str()), "no program {name}; there are {}", BINS.join(", "));
        }
        bins.retain(|bin| options.bin.iter().any(|name| name == bin));
    }
    let compiler = Compiler::choose()?;
    let linker = linker::ensure(&compiler)?;
    println!("build-ebpf: {} with {}", bins.join(", "), compiler.describe());
    build(&compiler, &linker, &bins)?;
    let mut good = true;
    for bin in bins {
        let built = target_dir().join("ebpf").join(TARGET).join("release").join(bin);
        let built = fs::read(&built).with_context(|| format!("reading {}", built.display()))?;
        let origin = object::Origin {
            built_by: format!("{}; bpf-linker {}", compiler.describe(), linker::VERSION),
            sources: sources_hash(bin)?,
        };
        let built = object::reduce(&built, &origin).with_context(|| format!("the object of {bin}"))?;
        let path = workspace().join("backend/bpf").join(format!("{bin}.o"));
        let committed = fs::read(&path).ok();
        if !options.check {
            let is_new = committed.as_ref() != Some(&built);
            if is_new {
                fs::create_dir_all(path.parent().context("no folder")?)?;
                fs::write(&path, &built).with_context(|| format!("writing {}", path.display()))?;
            }
            let what = if is_new { "written" } else { "as it was" };
            println!("build-ebpf: backend/bpf/{bin}.o {what} ({} bytes)", built.len());
            continue;
        }
        let Some(committed) = committed else {
            println!(
                "build-ebpf: backend/bpf/{bin}.o is missing: run `cargo xtask build-ebpf` and commit it"
            );
            good = false;
            continue;
        };
        let verdict = compare::compare(&committed, &built).with_context(|| format!("comparing {bin}.o"))?;
        println!("build-ebpf: backend/bpf/{bin}.o {verdict}");
        good &= verdict.is_good();
    }
    if !good {
        println!("build-ebpf: run `cargo xtask build-ebpf` and commit backend/bpf");
    }
    println!("build-ebpf: {:.1} s", started.elapsed().as_secs_f32());
    Ok(good)
}

/// Runs cargo for the BPF workspace.
fn build(compiler: &Compiler, linker: &Path, bins: &[&str]) -> Result<()> {
    let mut flags = vec![
        // Registers of a traced function are those of this machine; the objects are for x86-64 whoever builds them.
        "--cfg=bpf_target_arch=\"x86_64\"".to_owned(),
        "-Cdebuginfo=2".to_owned(),
        format!("-Clinker={}", linker.display()),
        "-Clink-arg=--btf".to_owned(),
        "-Ctarget-cpu=v3".to_owned(),
    ];
    // How folders are called here must not show; those of registries exist once the sources do.
    run_cargo(compiler, |cargo| cargo.args(["fetch", "--quiet", "--locked"]))?;
    let mut folders = vec![(ebpf_dir(), "ebpf"), (compiler.sysroot().to_owned(), "rust")];
    let registries =
        fs::read_dir(cargo_home()?.join("registry/src")).context("reading cargo's registries")?;
    folders.extend(registries.flatten().map(|registry| (registry.path(), "registry")));
    for (from, to) in folders {
        flags.push(format!("--remap-path-prefix={}={to}", from.display()));
    }
    let crates = [&["aya_ebpf", "vhost_user_net_ebpf"], &BINS[..]].concat().join(",");
    run_cargo(compiler, |cargo| {
        cargo.args(["build", "--locked", "--release", "--package", "vhost-user-net-ebpf"]);
        cargo.args(["--target", TARGET]).arg("--target-dir").arg(target_dir().join("ebpf"));
        cargo.args(bins.iter().flat_map(|bin| ["--bin", bin]));
        if compiler.builds_core() {
            cargo.args(["-Z", "build-std=core"]);
        }
        cargo.env("RUSTC_BOOTSTRAP", if compiler.builds_core() { "1" } else { &crates });
        cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
    })
}

/// Runs the compiler's cargo in the BPF workspace.
fn run_cargo(compiler: &Compiler, arguments: impl FnOnce(&mut Command) -> &mut Command) -> Result<()> {
    let mut cargo = Command::new(compiler.cargo());
    arguments(cargo.current_dir(ebpf_dir()).env("RUSTC", compiler.rustc()));
    // Of the toolchain that runs us.
    for inherited in ["RUSTUP_TOOLCHAIN", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS", "CARGO"] {
        cargo.env_remove(inherited);
    }
    let status = cargo.status().with_context(|| format!("cannot run {}", compiler.cargo().display()))?;
    ensure!(status.success(), "the BPF programs do not build");
    Ok(())
}

fn ebpf_dir() -> PathBuf {
    workspace().join("ebpf")
}

fn cargo_home() -> Result<PathBuf> {
    if let Some(home) = std::env::var_os("CARGO_HOME") {
        return Ok(home.into());
    }
    let Some(home) = std::env::home_dir() else { bail!("neither CARGO_HOME nor HOME is set") };
    Ok(home.join(".cargo"))
}

/// A number for all that a program is made of: with another compiler, this tells whether the committed object is of
/// this source.
fn sources_hash(bin: &str) -> Result<u64> {
    let ebpf = ebpf_dir();
    let mut files: Vec<PathBuf> =
        ["Cargo.toml", "Cargo.lock", "common/Cargo.toml", "programs/Cargo.toml"].map(|f| ebpf.join(f)).into();
    let mut folders = vec![ebpf.join("common/src"), ebpf.join("programs/src")];
    while let Some(folder) = folders.pop() {
        let is_bins = folder.ends_with("programs/src/bin");
        for entry in fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))? {
            let path = entry?.path();
            if is_bins && path.file_stem().is_none_or(|stem| stem != bin) {
                continue;
            }
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    files.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325;
    for file in files {
        let name = file.strip_prefix(&ebpf)?.to_string_lossy().into_owned();
        let text = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
        for part in [name.as_bytes(), b"\0", &text, b"\0"] {
            hash = part.iter().fold(hash, |hash, byte| fnv1a(hash, *byte));
        }
    }
    Ok(hash)
}

fn fnv1a(hash: u64, byte: u8) -> u64 {
    (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
}
