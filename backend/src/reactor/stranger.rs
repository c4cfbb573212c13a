//! Descriptors that a peer sent and that may not even be closed by the loop.
//!
//! close(2) waits for the owner of some files: a FUSE or NFS file is flushed first, a TCP socket lingers. A front-end
//! that serves a FUSE file itself could stop a worker for good by sending its descriptor with any message,
//! legal or not. So every descriptor that arrives is looked at, by means that ask no file system: the
//! kinds that some message takes pass; of any other kind a stand-in passes, which the receiver refuses like any wrong
//! descriptor, and the stranger is closed by a thread that may wait.
//!
//! Descriptors of the kinds that pass can take their time, too, if nobody else has the file: a memfd frees its pages, a
//! Unix socket what is queued in it, other strangers perhaps. So a [`PeerFd`] that nobody takes is closed there as well.
#![forbid(unsafe_code)]

use super::message::has_unread;
use nix::fcntl::{FcntlArg, fcntl, readlink};
use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname};
use nix::unistd::{close, pipe};
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// Threads that close strangers at the same time; more strangers wait until one of these is through.
const CLOSERS_MAX: usize = 4;
/// Stack of such a thread, bytes: it makes one system call.
const CLOSER_STACK: usize = 64 << 10;

/// How long users of a file have until [`close_late`] closes it.
const LATE: Duration = Duration::from_millis(100);
/// Strangers that may wait for their end; beyond that, whoever brings more is not listened to (see [`crowd`]).
const STRANGERS_MAX: usize = 64;

struct Waiting {
    /// Threads, busy and idle. They stay: starting one for each stranger would cost more than it is worth.
    closers: usize,
    idle: usize,
    /// Descriptors to be closed, each not before its time.
    queue: VecDeque<(RawFd, Instant)>,
}

static WAITING: Mutex<Waiting> = Mutex::new(Waiting { closers: 0, idle: 0, queue: VecDeque::new() });
static ARRIVED: Condvar = Condvar::new();

/// The descriptor itself if the loop may close it, else a stand-in, or `None` if there is no descriptor left for one:
/// then the receiver misses it, which it refuses as well.
///
/// `strangers` is increased if it is a stranger.
pub(super) fn admit(fd: OwnedFd, strangers: &mut usize) -> Option<PeerFd> {
    match kind(&fd) {
        Kind::Familiar => return Some(PeerFd(Some(fd))),
        // One message takes these, empty. What is queued in this one may be anything: who brings many is as suspect.
        Kind::FullSocket => {
            *strangers += 1;
            return Some(PeerFd(Some(fd)));
        }
        Kind::Stranger => *strangers += 1,
    }
    close_elsewhere(fd, Duration::ZERO);
    // The reading end of a pipe whose writing end is closed: no message takes it.
    pipe().ok().map(|(read, _)| PeerFd(Some(read)))
}

/// A descriptor from a peer. Dropped, it is closed without the dropping thread waiting for anything.
#[derive(Debug)]
pub struct PeerFd(Option<OwnedFd>);

impl PeerFd {
    /// The descriptor itself, from now on in the care of the caller, who may close it where that can take its time.
    pub fn into_owned(mut self) -> OwnedFd {
        self.0.take().expect("it is taken only here, and this consumes self")
    }
}

impl From<OwnedFd> for PeerFd {
    fn from(fd: OwnedFd) -> Self {
        Self(Some(fd))
    }
}

impl Drop for PeerFd {
    fn drop(&mut self) {
        if let Some(fd) = self.0.take().filter(|fd| !is_light(fd)) {
            close_elsewhere(fd, Duration::ZERO);
        }
    }
}

/// Closes another descriptor of a file after a moment in which its users let go of theirs: whatever that file holds is
/// then freed by a thread that may wait.
pub fn close_late(fd: OwnedFd) {
    close_elsewhere(fd, LATE);
}

/// Whether more strangers wait for their end than should. They hold descriptors of this process, which others need:
/// a front-end that brings more of them must not be read from until this is over.
pub fn crowd() -> bool {
    let waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
    waiting.closers - waiting.idle + waiting.queue.len() > STRANGERS_MAX
}

enum Kind {
    /// Some message takes it, and closing it is quick unless it is the last of its file.
    Familiar,
    /// A Unix socket in which something waits to be read.
    FullSocket,
    /// No message takes it.
    Stranger,
}

/// What a descriptor is. None of these questions reaches a file system or a driver.
fn kind(fd: &OwnedFd) -> Kind {
    // memfd, tmpfs, hugetlbfs: guest memory and logs.
    if fcntl(fd, FcntlArg::F_GET_SEALS).is_ok() {
        return Kind::Familiar;
    }
    match getsockname::<SockaddrStorage>(fd.as_raw_fd()) {
        Ok(address) if address.family() == Some(AddressFamily::Unix) => match has_unread(fd) {
            true => Kind::FullSocket,
            false => Kind::Familiar,
        },
        Ok(_) => Kind::Stranger,
        Err(_) if is_light(fd) => Kind::Familiar,
        Err(_) => Kind::Stranger,
    }
}

/// Whether closing is always quick.
fn is_light(fd: &OwnedFd) -> bool {
    // The link's text is made by the kernel, of what it has in memory.
    fcntl(fd, FcntlArg::F_GETPIPE_SZ).is_ok()
        || readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()).as_str())
            .is_ok_and(|link| link == "anon_inode:[eventfd]")
}

fn close_elsewhere(fd: OwnedFd, pause: Duration) {
    // As a number: an error on the way to the thread must leave it open rather than close it here.
    let fd = fd.into_raw_fd();
    let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
    waiting.queue.push_back((fd, Instant::now() + pause));
    let closer = || Builder::new().name("closer".into()).stack_size(CLOSER_STACK);
    let more = waiting.queue.len() > waiting.idle && waiting.closers < CLOSERS_MAX;
    if more && closer().spawn(close_strangers).is_ok() {
        waiting.closers += 1;
    } else {
        ARRIVED.notify_one();
    }
}

fn close_strangers() {
    let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if let Some((fd, due)) = waiting.queue.pop_front() {
            drop(waiting);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let _ = close(fd);
            waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
        } else {
            waiting.idle += 1;
            waiting = ARRIVED.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            waiting.idle -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn kinds_that_messages_take_pass() {
        let memfd = nix::sys::memfd::memfd_create("m", nix::sys::memfd::MFdFlags::empty()).unwrap();
        let event = nix::sys::eventfd::EventFd::new().unwrap().into();
        let (unix, peer) = UnixStream::pair().unwrap();
        let (full, mut writer) = UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut writer, b"x").unwrap();
        let pipe = pipe().unwrap().1;
        for (fd, suspects) in [(memfd, 0), (event, 0), (unix.into(), 0), (full.into(), 1), (pipe, 0)] {
            let number = fd.as_raw_fd();
            let mut strangers = 0;
            assert_eq!(admit(fd, &mut strangers).map(|fd| fd.into_owned().as_raw_fd()), Some(number));
            assert_eq!(strangers, suspects);
        }
        drop(peer);
    }

    #[test]
    fn strangers_are_replaced_and_closed() {
        let path = std::path::PathBuf::from(format!("/proc/{}/limits", std::process::id()));
        let file = std::fs::File::open(&path).unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let name = tcp.local_addr().unwrap();
        let mut strangers = 0;
        let stand_in = admit(file.into(), &mut strangers).unwrap().into_owned();
        assert!(fcntl(&stand_in, FcntlArg::F_GETPIPE_SZ).is_ok());
        admit(tcp.into(), &mut strangers).unwrap();
        assert_eq!(strangers, 2);
        let deadline = Instant::now() + Duration::from_secs(5);
        let open = || {
            let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
            links.filter_map(|link| std::fs::read_link(link.path()).ok()).any(|target| target == path)
        };
        while open() || std::net::TcpListener::bind(name).is_err() {
            assert!(Instant::now() < deadline, "a stranger is still open");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
