//! The guest: Debian's cloud kernel, and an initramfs of busybox, the virtio-net drivers and `init.sh`.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::cpio::Archive;

use super::apt::{self, Apt};

/// Modules in the order in which they load.
const MODULES: [&str; 10] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_mmio",
    "failover",
    "net_failover",
    "virtio_net",
    "pktgen",
];

const INIT: &str = include_str!("init.sh");

/// Whether an initramfs was made from today's `init.sh`.
pub fn is_current(initramfs: &Path) -> bool {
    fs::read(initramfs).is_ok_and(|bytes| bytes.windows(INIT.len()).any(|w| w == INIT.as_bytes()))
}

/// Puts the kernel and its modules into `dir/guest`; returns the kernel.
pub fn ensure_kernel(apt: &Apt, dir: &Path) -> Result<PathBuf> {
    let guest = dir.join("guest");
    let kernel = guest.join("vmlinuz");
    if kernel.exists() {
        return Ok(kernel);
    }
    fs::create_dir_all(guest.join("modules"))?;
    let package = apt.behind("linux-image-cloud-amd64", "linux-image-")?;
    println!("setup:   downloading {package}");
    let scratch = tempfile::tempdir_in(dir)?;
    for file in apt.download(&[&package], scratch.path())? {
        apt::unpack(&file, &scratch.path().join("root"))?;
    }
    let root = scratch.path().join("root");
    let image = find(&root.join("boot"), &|name| name.starts_with("vmlinuz-"))
        .context("the package has no kernel")?;
    // Debian moved modules from /lib to /usr/lib.
    let modules = [root.join("lib/modules"), root.join("usr/lib/modules")]
        .into_iter()
        .find(|m| m.exists())
        .context("the package has no modules")?;
    let builtin = find(&modules, &|name| name == "modules.builtin").map(fs::read_to_string).transpose()?;
    let mut order = String::new();
    for module in MODULES {
        let plain = format!("{module}.ko");
        let Some(found) =
            find(&modules, &|name| name.strip_prefix(&plain).is_some_and(|r| r.is_empty() || r == ".xz"))
        else {
            let is_builtin = builtin.as_ref().is_some_and(|b| b.contains(&format!("/{plain}")));
            ensure!(is_builtin, "the kernel {package} has no module {module}");
            continue;
        };
        let bytes = if found.extension().is_some_and(|e| e == "xz") {
            let out = Command::new("xz").arg("-dc").arg(&found).output().context("cannot run xz")?;
            ensure!(out.status.success(), "cannot decompress {}", found.display());
            out.stdout
        } else {
            fs::read(&found)?
        };
        fs::write(guest.join("modules").join(&plain), bytes)?;
        order.push_str(module);
        order.push('\n');
    }
    fs::write(guest.join("modules/order"), order)?;
    fs::copy(image, &kernel)?;
    Ok(kernel)
}

/// Puts a kernel into `dir/guest` that lets functions be traced by BPF programs (6.x with BTF and the function tracer):
/// Debian 12's from its backports, as its own is too old; any later Debian's own is new enough. Returns it.
pub fn ensure_newer_kernel(apt: &Apt, dir: &Path, kernel: &Path) -> Result<PathBuf> {
    if apt.codename != "bookworm" {
        return Ok(kernel.to_owned());
    }
    let newer = dir.join("guest/vmlinuz-backports");
    if newer.exists() {
        return Ok(newer);
    }
    let package = apt.behind_backports("linux-image-cloud-amd64", "linux-image-")?;
    let scratch = tempfile::tempdir_in(dir)?;
    for file in apt.download_backports(&[&package], scratch.path())? {
        apt::unpack(&file, &scratch.path().join("root"))?;
    }
    let image = find(&scratch.path().join("root/boot"), &|name| name.starts_with("vmlinuz-"))
        .context("the package has no kernel")?;
    fs::copy(image, &newer)?;
    Ok(newer)
}

/// Makes the initramfs; the kernel must have been fetched before.
pub fn ensure_initramfs(apt: &Apt, dir: &Path) -> Result<PathBuf> {
    let guest = dir.join("guest");
    let busybox = guest.join("busybox");
    if !busybox.exists() {
        println!("setup:   downloading busybox-static");
        let scratch = tempfile::tempdir_in(dir)?;
        for file in apt.download(&["busybox-static"], scratch.path())? {
            apt::unpack(&file, &scratch.path().join("root"))?;
        }
        let places = ["bin/busybox", "usr/bin/busybox"].map(|place| scratch.path().join("root").join(place));
        let found = places.iter().find(|place| place.is_file()).context("no busybox in its package")?;
        fs::copy(found, &busybox)?;
    }
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "proc", "sys", "tmp", "lib", "lib/modules"] {
        archive.folder(folder);
    }
    archive.char_device("dev/console", 5, 1);
    archive.file("bin/busybox", 0o755, &fs::read(&busybox)?);
    archive.file("init", 0o755, INIT.as_bytes());
    let order = fs::read_to_string(guest.join("modules/order"))?;
    for module in order.lines() {
        let name = format!("{module}.ko");
        archive.file(&format!("lib/modules/{name}"), 0o644, &fs::read(guest.join("modules").join(&name))?);
    }
    archive.file("lib/modules/order", 0o644, order.as_bytes());
    let initramfs = guest.join("initramfs");
    fs::write(&initramfs, archive.finish())?;
    Ok(initramfs)
}

/// The first regular file under `folder` whose name is wanted.
fn find(folder: &Path, wanted: &dyn Fn(&str) -> bool) -> Option<PathBuf> {
    let mut folders = Vec::new();
    for entry in fs::read_dir(folder).ok()?.flatten() {
        let kind = entry.file_type().ok()?;
        if kind.is_dir() {
            folders.push(entry.path());
        } else if kind.is_file() && wanted(&entry.file_name().to_string_lossy()) {
            return Some(entry.path());
        }
    }
    folders.iter().find_map(|f| find(f, wanted))
}
