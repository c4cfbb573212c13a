//! bpf-linker, built once for the LLVM of the compiler in use and kept under `target/`.
#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::compiler::Compiler;
use crate::{cargo, target_dir};

/// The release that is built.
pub const VERSION: &str = "0.13.0";
/// LLVM releases it has a feature for.
const LLVM_MAJORS: [&str; 3] = ["21", "22", "23"];

/// Returns a bpf-linker for that compiler: `$BPF_LINKER`, the one built before, or a new one.
pub fn ensure(compiler: &Compiler) -> Result<PathBuf> {
    if let Some(linker) = std::env::var_os("BPF_LINKER") {
        return Ok(linker.into());
    }
    let llvm = compiler.llvm_version();
    let root = target_dir().join(format!("bpf-linker/{VERSION}-llvm-{llvm}"));
    let linker = root.join("bin/bpf-linker");
    if runs(&linker) {
        return Ok(linker);
    }
    let major = llvm.split('.').next().unwrap_or_default();
    ensure!(
        LLVM_MAJORS.contains(&major),
        "the compiler has LLVM {llvm}; bpf-linker {VERSION} knows {}. Choose another compiler by $BPF_RUSTC",
        LLVM_MAJORS.join(", ")
    );
    let library = compiler.llvm_library()?;
    println!("build-ebpf: building bpf-linker {VERSION} for {} (once, 1 to 2 minutes)", library.display());
    // It is linked with `libLLVM.so`, and finds it at run time by the name that the library gives itself.
    let prefix = root.join("llvm");
    let lib = prefix.join("lib");
    let _ = fs::remove_dir_all(&lib);
    fs::create_dir_all(&lib).with_context(|| format!("making {}", lib.display()))?;
    symlink(&library, lib.join("libLLVM.so"))?;
    if let Some(name) = library.file_name().filter(|name| *name != "libLLVM.so") {
        symlink(&library, lib.join(name))?;
    }
    let mut install = cargo();
    install.args(["install", "--quiet", "bpf-linker", "--version", VERSION, "--locked", "--force"]);
    install.args(["--no-default-features", "--features", &format!("llvm-{major}")]);
    install.arg("--root").arg(&root).arg("--target-dir").arg(root.join("build"));
    install.env("LLVM_PREFIX", &prefix);
    install.env("CARGO_ENCODED_RUSTFLAGS", format!("-Clink-arg=-Wl,-rpath,{}", lib.display()));
    // Its own profile asks for debug information and takes twice as long.
    install.env("CARGO_PROFILE_RELEASE_DEBUG", "0").env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
    let status = install.status().context("cannot run cargo")?;
    ensure!(status.success() && runs(&linker), "bpf-linker does not build or does not run");
    let _ = fs::remove_dir_all(root.join("build"));
    Ok(linker)
}

fn runs(linker: &Path) -> bool {
    Command::new(linker).arg("--version").output().is_ok_and(|out| out.status.success())
}
