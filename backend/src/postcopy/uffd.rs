//! A userfaultfd: made, probed, and given ranges. The front-end reads it, we never do.
//!
//! **It is a key to this process.** Who holds it can place pages in our address space, and register more of it: the
//! protocol wants that. And a front-end that takes a page away again after it has come (a hole in the file) makes
//! whoever touches it wait. So postcopy is for front-ends that are trusted as much as this process; for others there is
//! `--postcopy off`.
//!
//! Five calls of our own: the `userfaultfd` crate generates its bindings from C headers at build time, by libclang, which
//! a build of this program shall not need.

use crate::memory::Mapping;
use nix::errno::Errno;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// The version of the interface (UFFD_API).
const API: u64 = 0xaa;
/// Report pages that are missing (UFFDIO_REGISTER_MODE_MISSING).
const MODE_MISSING: u64 = 1;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

mod request {
    #![allow(missing_docs)] // the kernel's own names
    use super::{UffdioApi, UffdioRange, UffdioRegister};
    nix::ioctl_readwrite!(uffdio_api, 0xaa, 0x3f, UffdioApi);
    nix::ioctl_readwrite!(uffdio_register, 0xaa, 0x00, UffdioRegister);
    nix::ioctl_read!(uffdio_unregister, 0xaa, 0x01, UffdioRange);
    nix::ioctl_read!(uffdio_wake, 0xaa, 0x02, UffdioRange);
}
use request::{uffdio_api, uffdio_register, uffdio_unregister, uffdio_wake};

/// Why there is no userfaultfd. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// The kernel has none.
    #[error("this kernel has no userfaultfd (CONFIG_USERFAULTFD): use another kernel, or --postcopy off")]
    NoKernelSupport,
    /// Faults of the kernel on our behalf are for the privileged only.
    #[error(
        "userfaultfd is not permitted: set `sysctl vm.unprivileged_userfaultfd=1`, or give the process CAP_SYS_PTRACE \
         (systemd: AmbientCapabilities=CAP_SYS_PTRACE) or access to /dev/userfaultfd"
    )]
    NotPermitted,
    /// Permitted by the kernel's rules, refused all the same.
    #[error(
        "userfaultfd is refused although this process may use it: allow the userfaultfd call in the container's seccomp \
         profile, or pass /dev/userfaultfd into the container"
    )]
    Filtered,
    /// Something else.
    #[error("userfaultfd: {0}: {1}")]
    Call(&'static str, Errno),
}

/// A userfaultfd of this process.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
}

impl Userfaultfd {
    /// Makes one that reports the kernel's own accesses, too (not USER_MODE_ONLY: tap writes and io-wq workers would get
    /// EFAULT instead of a page). Non-blocking, as whoever polls it needs.
    ///
    /// # Errors
    /// See [`UffdError`].
    pub fn new() -> Result<Self, UffdError> {
        let fd = open()?;
        let mut api = UffdioApi { api: API, features: 0, ioctls: 0 };
        // SAFETY: the descriptor is a userfaultfd, and `api` is what this request reads and writes.
        unsafe { uffdio_api(fd.as_raw_fd(), &raw mut api) }
            .map_err(|errno| UffdError::Call("UFFDIO_API", errno))?;
        Ok(Self { fd })
    }

    /// Reports missing pages of a mapping from now on. What we had mapped of it is let go of first, and huge pages are
    /// refused: the front-end places single ones. Touches no page. May sleep.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn register(&self, mapping: &Mapping) -> Result<(), UffdError> {
        mapping.forget_pages().map_err(|errno| UffdError::Call("madvise", errno))?;
        let mut register = UffdioRegister { range: range(mapping), mode: MODE_MISSING, ioctls: 0 };
        // SAFETY: the descriptor is a userfaultfd, and `register` is what this request reads and writes.
        unsafe { uffdio_register(self.fd.as_raw_fd(), &raw mut register) }
            .map(drop)
            .map_err(|errno| UffdError::Call("UFFDIO_REGISTER", errno))
    }

    /// Ends the reports about a mapping. **Only when nothing waits for its pages**: what waits would get a page of zeros.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn unregister(&self, mapping: &Mapping) -> Result<(), UffdError> {
        let mut range = range(mapping);
        // SAFETY: the descriptor is a userfaultfd, and `range` is what this request reads.
        unsafe { uffdio_unregister(self.fd.as_raw_fd(), &raw mut range) }
            .map(drop)
            .map_err(|errno| UffdError::Call("UFFDIO_UNREGISTER", errno))
    }

    /// Lets everybody who waits in this mapping look again: whose page has come goes on, the others report again.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn wake(&self, mapping: &Mapping) -> Result<(), UffdError> {
        let mut range = range(mapping);
        // SAFETY: the descriptor is a userfaultfd, and `range` is what this request reads.
        unsafe { uffdio_wake(self.fd.as_raw_fd(), &raw mut range) }
            .map(drop)
            .map_err(|errno| UffdError::Call("UFFDIO_WAKE", errno))
    }

    /// Ends all waits in a mapping that nobody uses any more, without a page being made: they fail. May sleep.
    ///
    /// # Errors
    /// What the kernel says; then waits may still be under way.
    pub fn give_up(&self, mapping: &Mapping) -> Result<(), UffdError> {
        mapping.give_up().map_err(|errno| UffdError::Call("mmap", errno))?;
        self.wake(mapping)
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn range(mapping: &Mapping) -> UffdioRange {
    UffdioRange { start: mapping.host_addr(), len: mapping.mapped_len() }
}

fn open() -> Result<OwnedFd, UffdError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: a system call without pointers.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd >= 0 {
        // SAFETY: a new descriptor that nobody else owns.
        return Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    }
    match Errno::last() {
        // Seccomp profiles say either.
        errno @ (Errno::ENOSYS | Errno::EPERM | Errno::EACCES) => {
            open_device(flags).map_err(|_| refusal(errno))
        }
        errno => Err(UffdError::Call("userfaultfd", errno)),
    }
}

/// Who may open the device needs no capability.
fn open_device(flags: i32) -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")?;
    // SAFETY: this request takes flags by value and returns a new descriptor.
    let fd = Errno::result(unsafe {
        libc::ioctl(device.as_raw_fd(), nix::request_code_none!(0xaa, 0x00) as _, flags)
    })?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What `userfaultfd` was refused for.
fn refusal(errno: Errno) -> UffdError {
    let everybody = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").ok();
    let ptrace = 1 << 19; // CAP_SYS_PTRACE
    let privileged = effective_capabilities() & ptrace != 0 && in_initial_user_namespace();
    cause(errno, everybody.as_deref().map(str::trim), privileged)
}

/// `everybody`: what vm.unprivileged_userfaultfd says; none: there is no such thing.
fn cause(errno: Errno, everybody: Option<&str>, privileged: bool) -> UffdError {
    match everybody {
        None if errno == Errno::ENOSYS => UffdError::NoKernelSupport,
        // The kernel knows the call: somebody before it does not.
        _ if errno == Errno::ENOSYS => UffdError::Filtered,
        Some("1") => UffdError::Filtered,
        _ if privileged => UffdError::Filtered,
        _ => UffdError::NotPermitted,
    }
}

/// The kernel asks for the capability there, whatever a container's root may do in its own.
fn in_initial_user_namespace() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

fn effective_capabilities() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_has_its_remedy() {
        let text = |errno, everybody, privileged| cause(errno, everybody, privileged).to_string();
        assert!(text(Errno::ENOSYS, None, true).contains("CONFIG_USERFAULTFD"));
        assert!(text(Errno::ENOSYS, Some("0"), true).contains("seccomp"));
        assert!(text(Errno::EPERM, Some("0"), false).contains("vm.unprivileged_userfaultfd"));
        assert!(text(Errno::EPERM, Some("0"), true).contains("seccomp"));
        assert!(text(Errno::EPERM, Some("1"), false).contains("seccomp"));
    }
}
