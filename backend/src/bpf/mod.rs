//! What all BPF programs of this process share: where maps and links are pinned, and whose they are.
//!
//! Not here: the programs (`ebpf/`, objects in `backend/bpf`), and those who load them: the XDP uplink and tap steering
//! (`uplink`), fault latency (`observe`).
//! In their modules: bpf(2) where aya does not do (`sys`), programs of interfaces (`netlink`).

pub mod netlink;
pub mod sys;

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use std::io;
use std::path::{Path, PathBuf};

/// The file system for pins.
pub const BPF_FS: &str = "/sys/fs/bpf";
/// All pins of this program lie below.
pub const PIN_ROOT: &str = "/sys/fs/bpf/vhost-user-net";

/// Makes sure that the BPF file system is mounted.
///
/// # Errors
/// It is not and may not be; the text says what to do.
pub fn ensure_bpf_fs() -> io::Result<()> {
    if statfs(BPF_FS).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC) {
        return Ok(());
    }
    mount(Some("bpf"), BPF_FS, Some("bpf"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=0700"))
        .map_err(|error| {
            io::Error::other(format!(
                "{BPF_FS} is no BPF file system and cannot be mounted ({error}): `mount -t bpf bpf {BPF_FS}`"
            ))
        })
}

/// The folder for pins of one kind, e.g. an instance's name; it need not exist.
pub fn pin_dir(name: &str) -> PathBuf {
    Path::new(PIN_ROOT).join(name)
}

/// A process, told from later ones of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its id.
    pub pid: u32,
    /// When it was started, clock ticks after boot.
    pub start_time: u64,
}

impl Owner {
    /// This process.
    pub fn this() -> Self {
        let pid = std::process::id();
        Self { pid, start_time: start_time(pid).unwrap_or(0) }
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        self.pid != 0 && start_time(self.pid) == Some(self.start_time)
    }
}

/// Field 22 of `/proc/PID/stat`; the second field, in parentheses, may hold blanks and parentheses itself.
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// What the kernel said, out of aya's errors.
pub fn io_error(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    match os_error(&error) {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::other(error),
    }
}

/// The system's error number at the bottom of an error.
pub fn os_error(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(code) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(code);
        }
        next = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_a_later_one_of_its_number_is_not_it() {
        let this = Owner::this();
        assert!(this.is_alive() && this.start_time > 0);
        assert!(!Owner { start_time: this.start_time + 1, ..this }.is_alive());
        assert!(!Owner { pid: 0, start_time: 0 }.is_alive());
    }
}
