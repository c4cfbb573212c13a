//! What a file descriptor from a front-end really is. Hostile until checked (PROTOCOL: Framing).
use crate::reactor::PeerFd;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// The descriptor, if it is an eventfd: a pipe or a socket could make its writer wait, or tell us nothing.
///
/// # Errors
/// What it is instead.
pub fn eventfd(fd: PeerFd) -> Result<OwnedFd, String> {
    let fd = fd.into_owned();
    match check_eventfd(&fd) {
        Ok(()) => Ok(fd),
        Err(why) => {
            drop(PeerFd::from(fd));
            Err(why)
        }
    }
}

fn check_eventfd(fd: &OwnedFd) -> Result<(), String> {
    let link = nix::fcntl::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()).as_str())
        .map_err(|error| format!("the descriptor cannot be identified (/proc is needed): {error}"))?;
    let link = link.to_string_lossy();
    if link == "anon_inode:[eventfd]" {
        return Ok(());
    }
    // Names of files are not repeated in logs: only their kind.
    let kind = link.split(':').next().filter(|_| !link.starts_with('/')).unwrap_or("file");
    Err(format!("the descriptor is not an eventfd but a {kind}"))
}

/// Takes over a descriptor that was passed on the command line, if it is a socket.
///
/// # Errors
/// It is not open, or no socket.
pub fn inherit_socket(raw: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD only asks whether the number is an open descriptor.
    if raw < 0 || unsafe { libc::fcntl(raw, libc::F_GETFD) } == -1 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the number is open and was passed to this process for this purpose; the configuration names each
    // number once, so nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    use std::os::unix::fs::FileTypeExt;
    let file = std::fs::File::from(fd);
    if !file.metadata()?.file_type().is_socket() {
        // Not ours after all: leave it open.
        std::mem::forget(file);
        return Err(io::Error::from_raw_os_error(libc::ENOTSOCK));
    }
    let fd = OwnedFd::from(file);
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_eventfds_pass() {
        let event = nix::sys::eventfd::EventFd::new().unwrap();
        assert_eq!(check_eventfd(&OwnedFd::from(event)), Ok(()));
        let (read, _write) = nix::unistd::pipe().unwrap();
        assert_eq!(check_eventfd(&read), Err("the descriptor is not an eventfd but a pipe".into()));
    }
}
