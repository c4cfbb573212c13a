//! Where the lab's parts are: QEMU, the guest, DPDK. `cargo xtask setup` writes the list, tests read it.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// Name of the list in the lab's folder.
const LIST: &str = "lab.json";

/// Environment variable that names the lab's folder.
pub const LAB_DIR: &str = "VUN_LAB_DIR";

/// Environment variable that names the back-end under test.
pub const BACKEND: &str = "VUN_BIN";

/// Paths of the parts that the lab is made of.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Artefacts {
    /// The `qemu-system-x86_64` program.
    pub qemu: PathBuf,
    /// Folders with its firmware, for `-L`; empty for an installed QEMU.
    pub qemu_data: Vec<PathBuf>,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// A guest kernel of 6.12 or newer, which lets functions be traced; the demonstration goes without it.
    #[serde(default)]
    pub newer_kernel: Option<PathBuf>,
    /// The guest's initramfs.
    pub initramfs: PathBuf,
    /// The `dpdk-testpmd` program; the demonstration goes without it.
    pub testpmd: Option<PathBuf>,
}

impl Artefacts {
    /// Reads the list of a lab folder and checks that everything in it is there.
    pub fn in_dir(dir: &Path) -> Result<Self> {
        let list = dir.join(LIST);
        let text = fs::read_to_string(&list)
            .with_context(|| format!("no {}; `cargo xtask setup` makes it", list.display()))?;
        let found: Self =
            serde_json::from_str(&text).with_context(|| format!("{} is damaged", list.display()))?;
        let programs = [&found.qemu, &found.kernel, &found.initramfs];
        for path in
            programs.into_iter().chain(&found.qemu_data).chain(&found.testpmd).chain(&found.newer_kernel)
        {
            ensure!(path.exists(), "{} is gone; `cargo xtask setup` brings it back", path.display());
        }
        ensure!(
            find_in_path("ip").is_some(),
            "there is no `ip` program; `cargo xtask setup` installs iproute2"
        );
        Ok(found)
    }

    /// Reads the list of this build's lab.
    pub fn find() -> Result<Self> {
        Self::in_dir(&lab_dir())
    }

    /// The `dpdk-testpmd` program, or what to do about its absence.
    pub fn testpmd(&self) -> Result<&Path> {
        self.testpmd.as_deref().context("there is no dpdk-testpmd; `cargo xtask setup` installs it")
    }

    /// The newer guest kernel, or what to do about its absence.
    pub fn newer_kernel(&self) -> Result<&Path> {
        self.newer_kernel.as_deref().context("there is no newer guest kernel; `cargo xtask setup` fetches it")
    }

    /// Writes the list.
    pub fn store(&self, dir: &Path) -> Result<()> {
        let list = dir.join(LIST);
        fs::write(&list, serde_json::to_string_pretty(self)?)
            .with_context(|| format!("cannot write {}", list.display()))
    }
}

/// The lab's folder: `$VUN_LAB_DIR`, or `lab` in cargo's target folder.
pub fn lab_dir() -> PathBuf {
    std::env::var_os(LAB_DIR).map_or_else(|| target_dir().join("lab"), PathBuf::from)
}

/// The back-end under test: `$VUN_BIN`, or the one that cargo built beside the running program.
pub fn backend_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(BACKEND).map(PathBuf::from) {
        ensure!(path.exists(), "{BACKEND} names {}, which does not exist", path.display());
        return Ok(path);
    }
    let own = std::env::current_exe()?;
    // Tests lie in target/<profile>/deps, other programs in target/<profile>.
    let mut places: Vec<PathBuf> = own.ancestors().skip(1).take(2).map(Path::to_owned).collect();
    places.extend(["debug", "release"].map(|profile| target_dir().join(profile)));
    places
        .into_iter()
        .map(|place| place.join("vhost-user-net"))
        .find(|path| path.is_file())
        .with_context(|| format!("vhost-user-net is not built; run `cargo build` or set {BACKEND}"))
}

/// Finds a program in `PATH` and in the administrator's folders.
pub fn find_in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    folders.extend(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.into_iter().map(|folder| folder.join(program)).find(|file| file.is_file())
}

fn target_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("CARGO_TARGET_DIR") {
        return PathBuf::from(dir);
    }
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").join("target")
}
