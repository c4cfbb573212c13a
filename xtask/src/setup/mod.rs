//! `cargo xtask setup`: makes sure that the lab has its parts, and fetches only what is missing.
//!
//! Here: the order of the steps and what they print. How packages are fetched is in `apt`, how the
//! guest's initramfs is made is in `guest`. The result is `target/lab/lab.json`, which
//! [`lab::Artefacts`] reads.
#![forbid(unsafe_code)]

pub mod apt;
mod guest;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use lab::Artefacts;

use apt::Apt;

/// The oldest QEMU the tests run on. Debian 12's own 7.2 crashes with vhost-user-net, TCG and MSI-X.
const QEMU_MINIMUM: (u32, u32) = (8, 2);

/// DPDK drivers that tests and measurements load, without the ABI number that Debian puts behind each name.
const DPDK_DRIVERS: [&str; 6] = [
    "librte-mempool-ring",
    "librte-bus-vdev",
    "librte-net-vhost",
    "librte-net-virtio",
    "librte-net-tap",
    "librte-net-af-xdp",
];

/// What looks at the back-end from outside, with Debian's package of each.
const TRACERS: [(&str, &str); 3] = [("bpftool", "bpftool"), ("bpftrace", "bpftrace"), ("perf", "linux-perf")];

/// What to install by hand where this command cannot do it.
const BY_HAND: &str = "iproute2, bpftool, bpftrace, perf, QEMU >= 8.2 for x86-64 (qemu-system-x86), DPDK's testpmd with the vhost, virtio, \
    tap and af_xdp drivers (dpdk-dev)";

/// Which parts are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parts {
    /// Everything.
    All,
    /// What it takes to run a guest: no DPDK, which is large.
    Guest,
}

/// Makes the lab complete, as far as wanted, and returns where its parts are.
pub fn run(parts: Parts) -> Result<Artefacts> {
    let started = Instant::now();
    let dir = crate::target_dir().join("lab");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;

    if let Ok(found) = Artefacts::in_dir(&dir)
        && guest::is_current(&found.initramfs)
        && (parts == Parts::Guest
            || found.testpmd.is_some() && found.newer_kernel.is_some() && has_dpdk_drivers() && has_tracers())
    {
        println!("setup: the lab in {} is complete", dir.display());
        return Ok(found);
    }
    ensure!(
        std::env::consts::ARCH == "x86_64",
        "the lab boots x86-64 guests with a Debian kernel; this machine is {}",
        std::env::consts::ARCH
    );
    let apt = Apt::new(&dir).with_context(|| {
        format!("setup knows Debian only; install by hand: {BY_HAND}, and see the README")
    })?;

    step("iproute2", || ensure_ip(&apt))?;
    if parts == Parts::All && !has_tracers() {
        step("bpftool, bpftrace, perf", || ensure_tracers(&apt))?;
    }
    let (qemu, qemu_data) = step("QEMU", || ensure_qemu(&apt, &dir))?;
    let testpmd = match parts {
        Parts::All => Some(step("DPDK", || ensure_dpdk(&apt))?),
        Parts::Guest => Artefacts::in_dir(&dir).ok().and_then(|found| found.testpmd),
    };
    let kernel = step("guest kernel", || guest::ensure_kernel(&apt, &dir))?;
    let newer_kernel = match parts {
        Parts::All => Some(step("newer guest kernel", || guest::ensure_newer_kernel(&apt, &dir, &kernel))?),
        Parts::Guest => Artefacts::in_dir(&dir).ok().and_then(|found| found.newer_kernel),
    };
    let initramfs = step("guest initramfs", || guest::ensure_initramfs(&apt, &dir))?;

    let artefacts = Artefacts { qemu, qemu_data, kernel, newer_kernel, initramfs, testpmd };
    artefacts.store(&dir)?;
    let artefacts = Artefacts::in_dir(&dir)?;
    println!("setup: complete after {:.1} s, in {}", started.elapsed().as_secs_f32(), dir.display());
    Ok(artefacts)
}

/// Makes sure of a C++ compiler, which libFuzzer is built with.
pub fn ensure_cxx() -> Result<()> {
    let is_there = ["c++", "g++", "clang++"].iter().any(|program| lab::find_in_path(program).is_some());
    if is_there || std::env::var_os("CXX").is_some() {
        return Ok(());
    }
    let apt =
        Apt::new(&crate::target_dir().join("lab")).context("the fuzzers need a C++ compiler; install g++")?;
    apt.install(&["g++"])
}

fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    println!("setup: {what} ...");
    let started = Instant::now();
    let done = work().with_context(|| format!("setting up {what}"))?;
    println!("setup: {what} ready ({:.1} s)", started.elapsed().as_secs_f32());
    Ok(done)
}

fn ensure_ip(apt: &Apt) -> Result<()> {
    if lab::find_in_path("ip").is_none() {
        apt.install(&["iproute2"])?;
    }
    Ok(())
}

fn has_tracers() -> bool {
    TRACERS.iter().all(|(program, _)| lab::find_in_path(program).is_some())
}

fn ensure_tracers(apt: &Apt) -> Result<()> {
    let missing = TRACERS.iter().filter(|(program, _)| lab::find_in_path(program).is_none());
    apt.install(&missing.map(|(_, package)| *package).collect::<Vec<_>>())
}

/// Finds or fetches QEMU; returns the program and the folders that `-L` must name.
fn ensure_qemu(apt: &Apt, dir: &Path) -> Result<(PathBuf, Vec<PathBuf>)> {
    const PROGRAM: &str = "qemu-system-x86_64";
    if let Some(program) = lab::find_in_path(PROGRAM)
        && qemu_version(&program).is_ok_and(|version| version >= QEMU_MINIMUM)
    {
        return Ok((program, Vec::new()));
    }
    if apt.codename != "bookworm" {
        apt.install(&["qemu-system-x86"])?;
        let program =
            lab::find_in_path(PROGRAM).context("qemu-system-x86 was installed but is not in PATH")?;
        let version = qemu_version(&program)?;
        ensure!(version >= QEMU_MINIMUM, "this system's QEMU is {version:?}, the lab needs {QEMU_MINIMUM:?}");
        return Ok((program, Vec::new()));
    }
    // Debian 12: QEMU 10 from backports, unpacked beside the system's own, which stays as it is.
    let root = dir.join("qemu");
    let program = root.join("usr/bin").join(PROGRAM);
    if !program.exists() {
        let scratch = tempfile::tempdir_in(dir)?;
        let packages = apt.download_backports(
            &["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"],
            scratch.path(),
        )?;
        let staged = scratch.path().join("root");
        for package in &packages {
            apt::unpack(package, &staged)?;
        }
        let _ = fs::remove_dir_all(&root);
        fs::rename(&staged, &root).context("putting QEMU in place")?;
        let wanted = packages
            .iter()
            .find(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("qemu-system-x86_")))
            .context("apt did not deliver qemu-system-x86")?;
        fs::write(root.join("depends"), apt::depends(wanted)?.join("\n"))?;
    }
    if qemu_version(&program).is_err() {
        let depends = fs::read_to_string(root.join("depends")).unwrap_or_default();
        let libraries: Vec<&str> = depends
            .lines()
            .filter(|n| !["qemu", "seabios", "ipxe"].iter().any(|p| n.starts_with(p)))
            .collect();
        apt.install(&libraries)?;
    }
    qemu_version(&program)?;
    let data = vec![root.join("usr/share/qemu"), root.join("usr/share/seabios")];
    Ok((program, data))
}

fn qemu_version(program: &Path) -> Result<(u32, u32)> {
    let out = Command::new(program).arg("--version").output()?;
    let text = String::from_utf8_lossy(&out.stdout);
    let number = text.split_whitespace().find(|w| w.starts_with(|c: char| c.is_ascii_digit()));
    let mut parts = number.unwrap_or_default().split('.').map_while(|p| p.parse().ok());
    match (parts.next(), parts.next()) {
        (Some(major), Some(minor)) => Ok((major, minor)),
        _ => bail!("{} does not run: {}", program.display(), String::from_utf8_lossy(&out.stderr).trim()),
    }
}

/// Whether this machine's package manager knows the drivers as installed; where it is another, that is the user's care.
fn has_dpdk_drivers() -> bool {
    lab::find_in_path("dpkg-query").is_none() || apt::installed(&DPDK_DRIVERS).len() == DPDK_DRIVERS.len()
}

fn ensure_dpdk(apt: &Apt) -> Result<PathBuf> {
    const PROGRAM: &str = "dpdk-testpmd";
    if let Some(program) = lab::find_in_path(PROGRAM)
        && has_dpdk_drivers()
    {
        return Ok(program);
    }
    // Debian has testpmd among the developers' tools.
    let mut packages = vec!["dpdk-dev".to_owned()];
    packages.extend(apt.with_abi_number(&DPDK_DRIVERS)?);
    apt.install(&packages.iter().map(String::as_str).collect::<Vec<_>>())?;
    lab::find_in_path(PROGRAM).context("the dpdk-dev package has no dpdk-testpmd")
}
