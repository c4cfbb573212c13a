//! Which compiler builds BPF programs, and whether it has `core` for them or must build it.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::TARGET;
use crate::setup::apt::Apt;

/// Debian's compiler that comes with `core` for BPF.
const PACKAGES: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];
/// Where that puts it.
const SYSTEM_RUSTC: &str = "/usr/bin/rustc";

/// What to do where nothing can be found or installed.
const BY_HAND: &str = "no compiler for BPF programs: `rustup toolchain install nightly --component rust-src`, or on Debian \
    `apt-get install --no-install-recommends rustc-web libstd-rust-web-dev-bpf`, or name one by $BPF_RUSTC";

/// A compiler that can build BPF programs.
#[derive(Debug)]
pub struct Compiler {
    rustc: PathBuf,
    cargo: PathBuf,
    sysroot: PathBuf,
    builds_core: bool,
    /// What `rustc -vV` says.
    version: String,
}

impl Compiler {
    /// The first of: `$BPF_RUSTC`; a rustup nightly with rust-src; the system's compiler with `core` for BPF, which is
    /// installed where that is possible.
    pub fn choose() -> Result<Self> {
        if let Some(rustc) = std::env::var_os("BPF_RUSTC") {
            let rustc = PathBuf::from(rustc);
            return Self::new(&rustc)
                .with_context(|| format!("$BPF_RUSTC ({}) cannot be used", rustc.display()));
        }
        if let Some(nightly) = rustup_nightly() {
            return Ok(nightly);
        }
        let system = Path::new(SYSTEM_RUSTC);
        if let Ok(found) = Self::new(system) {
            return Ok(found);
        }
        let apt = Apt::new(&crate::target_dir().join("lab")).context(BY_HAND)?;
        apt.install(&PACKAGES).context(BY_HAND)?;
        Self::new(system).context(BY_HAND)
    }

    fn new(rustc: &Path) -> Result<Self> {
        let sysroot = PathBuf::from(ask(rustc, &["--print", "sysroot"])?);
        let has_core =
            fs::read_dir(sysroot.join("lib/rustlib").join(TARGET).join("lib")).is_ok_and(|files| {
                files.flatten().any(|file| file.file_name().to_string_lossy().starts_with("libcore-"))
            });
        let has_source = sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").exists();
        ensure!(
            has_core || has_source,
            "{} has neither `core` for {TARGET} nor the source of `core` (rust-src)",
            rustc.display()
        );
        let beside = sysroot.join("bin/cargo");
        let own = PathBuf::from(std::env::var_os("CARGO").unwrap_or("cargo".into()));
        Ok(Self {
            rustc: rustc.to_owned(),
            cargo: if beside.exists() { beside } else { own },
            builds_core: !has_core,
            version: ask(rustc, &["-vV"])?,
            sysroot,
        })
    }

    /// The compiler.
    pub fn rustc(&self) -> &Path {
        &self.rustc
    }

    /// The cargo that goes with it.
    pub fn cargo(&self) -> &Path {
        &self.cargo
    }

    /// Its folder.
    pub fn sysroot(&self) -> &Path {
        &self.sysroot
    }

    /// Whether `core` must be built first.
    pub fn builds_core(&self) -> bool {
        self.builds_core
    }

    /// The compiler's and its LLVM's version.
    pub fn describe(&self) -> String {
        let first = self.version.lines().next().unwrap_or_default();
        format!("{first}, LLVM {}", self.llvm_version())
    }

    /// Such as `22.1.8`.
    pub fn llvm_version(&self) -> &str {
        self.version.lines().find_map(|l| l.strip_prefix("LLVM version: ")).unwrap_or("unknown").trim()
    }

    /// The LLVM that the compiler itself is linked with: bitcode is read only by one that is not older.
    pub fn llvm_library(&self) -> Result<PathBuf> {
        let lib = self.sysroot.join("lib");
        let drivers = fs::read_dir(&lib).with_context(|| format!("reading {}", lib.display()))?;
        let mut drivers: Vec<PathBuf> = drivers
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| {
                path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("librustc_driver-"))
            })
            .collect();
        // Debian keeps it where all libraries are.
        drivers.push(self.rustc.clone());
        for driver in drivers {
            let out = Command::new("ldd").arg(&driver).output().context("cannot run ldd")?;
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            let found = text.lines().filter(|l| l.trim().starts_with("libLLVM")).find_map(|l| {
                let (_, path) = l.split_once("=> ")?;
                Some(PathBuf::from(path.split_whitespace().next()?))
            });
            if let Some(library) = found.filter(|library| library.exists()) {
                return Ok(library);
            }
        }
        bail!(
            "{} is not linked with a shared libLLVM, so bpf-linker cannot be built for it; name a bpf-linker of LLVM {} by \
             $BPF_LINKER",
            self.rustc.display(),
            self.llvm_version()
        )
    }
}

/// A rustup nightly with the source of `core`, if there is one.
fn rustup_nightly() -> Option<Compiler> {
    let out = Command::new("rustup").args(["toolchain", "list"]).output().ok()?;
    let list = String::from_utf8_lossy(&out.stdout).into_owned();
    list.lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|n| n.starts_with("nightly"))
        .find_map(|name| {
            let sysroot = ask(Path::new("rustup"), &["run", name, "rustc", "--print", "sysroot"]).ok()?;
            Compiler::new(&Path::new(&sysroot).join("bin/rustc")).ok()
        })
}

fn ask(program: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    let out = command.args(arguments).env_remove("RUSTUP_TOOLCHAIN").output();
    let out = out.with_context(|| format!("cannot run {}", program.display()))?;
    ensure!(out.status.success(), "{}: {}", program.display(), String::from_utf8_lossy(&out.stderr).trim());
    Ok(String::from_utf8(out.stdout)?.trim().to_owned())
}
