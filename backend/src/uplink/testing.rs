//! A scripted uplink queue for unit tests: frames to receive, frames that were sent, answers to give.
//! Its calls move bytes by preadv/pwritev, so the kernel judges the lists of buffers as it does for a tap.

use super::{ReceiveError, SendError, UplinkQueue, Woken};
use crate::memory::IoVec;
use crate::memory::testing::memfd;
use crate::worker::Direction;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};

const STAGE_BYTES: u64 = 1 << 20;

/// How a frame that is offered is refused.
pub(crate) enum Refuse {
    Full,
    Down,
    Rejected,
}

/// Called in the middle of a send, when the frame was checked and before it is read.
pub(crate) type Hook = Box<dyn FnMut() + Send>;

#[derive(Default)]
pub(crate) struct State {
    /// Frames to receive, header first.
    pub(crate) inbox: VecDeque<Vec<u8>>,
    /// Frames that were sent, header first.
    pub(crate) sent: Vec<Vec<u8>>,
    /// Answers to the next sends; none: they succeed.
    pub(crate) refuse: VecDeque<Refuse>,
    pub(crate) before_send: Option<Hook>,
    /// The MTU it says it has.
    pub(crate) mtu: Option<u16>,
    /// What wake-ups are answered by; without an entry the uplink wants none.
    pub(crate) wakes: VecDeque<Woken>,
    /// Wake-ups that have ended.
    pub(crate) woken: usize,
    /// It cannot be polled for room.
    pub(crate) cannot_tell_room: bool,
    /// Frames that were discarded.
    pub(crate) discarded: u64,
    /// Calls of `receive`.
    pub(crate) receives: usize,
    /// It drops what nobody receives.
    pub(crate) discards: bool,
    /// What an empty inbox answers: `Down` instead of `Empty`.
    pub(crate) dead: bool,
}

/// A clone is the same uplink.
#[derive(Clone)]
pub(crate) struct FakeUplink {
    state: Arc<Mutex<State>>,
    stage: Arc<File>,
    event: Arc<OwnedFd>,
    /// Takes a send of nothing.
    socket: Arc<OwnedFd>,
    _peer: Arc<OwnedFd>,
}

impl FakeUplink {
    pub(crate) fn new() -> Self {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
        let (socket, peer) = std::os::unix::net::UnixDatagram::pair().unwrap();
        Self {
            state: Arc::default(),
            stage: Arc::new(memfd(STAGE_BYTES)),
            event: Arc::new(event.into()),
            socket: Arc::new(socket.into()),
            _peer: Arc::new(peer.into()),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// A frame arrives.
    pub(crate) fn deliver(&self, frame: Vec<u8>) {
        self.state().inbox.push_back(frame);
        nix::unistd::write(self.event.as_fd(), &1u64.to_ne_bytes()).unwrap();
    }

    pub(crate) fn sent(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.state().sent)
    }

    pub(crate) fn waiting(&self) -> usize {
        self.state().inbox.len()
    }
}

impl UplinkQueue for FakeUplink {
    fn readable(&self) -> &[Arc<OwnedFd>] {
        std::slice::from_ref(&self.event)
    }

    fn writable(&self) -> Option<&Arc<OwnedFd>> {
        if self.state().cannot_tell_room { None } else { Some(&self.event) }
    }

    fn discard(&mut self) -> u64 {
        let mut state = self.state();
        if !state.discards {
            return 0;
        }
        let count = state.inbox.len() as u64;
        state.inbox.clear();
        state.discarded += count;
        count
    }

    fn wake(&mut self, direction: Direction) -> Option<&Arc<OwnedFd>> {
        let wanted = direction == Direction::Transmit && !self.state().wakes.is_empty();
        wanted.then_some(&self.socket)
    }

    fn woken(&mut self, _direction: Direction, result: &io::Result<()>) -> Woken {
        assert!(result.is_ok(), "{result:?}");
        let mut state = self.state();
        state.woken += 1;
        state.wakes.pop_front().unwrap_or(Woken::Done)
    }

    fn mtu(&self) -> u16 {
        self.state().mtu.unwrap_or(u16::MAX)
    }

    fn send(&mut self, frame: &[IoVec<'_>]) -> Result<(), SendError> {
        let mut state = self.state();
        match state.refuse.pop_front() {
            Some(Refuse::Full) => return Err(SendError::Full),
            Some(Refuse::Down) => return Err(SendError::Down(io::ErrorKind::NetworkDown.into())),
            Some(Refuse::Rejected) => return Err(SendError::Rejected(io::ErrorKind::InvalidInput.into())),
            None => {}
        }
        if let Some(hook) = &mut state.before_send {
            hook();
        }
        let fd = self.stage.as_raw_fd();
        // SAFETY: as in `tap`: the entries are live memory, which the kernel only reads.
        let sent = unsafe { libc::pwritev(fd, IoVec::as_raw(frame), frame.len() as _, 0) };
        if sent < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::EFAULT) => SendError::MemoryFault,
                _ => SendError::Rejected(error),
            });
        }
        let mut bytes = vec![0; sent as usize];
        self.stage.read_exact_at(&mut bytes, 0).unwrap();
        state.sent.push(bytes);
        Ok(())
    }

    fn receive(&mut self, buffers: &[IoVec<'_>]) -> Result<usize, ReceiveError> {
        let mut state = self.state();
        state.receives += 1;
        let Some(frame) = state.inbox.front() else {
            let _ = nix::unistd::read(self.event.as_fd(), &mut [0; 8]);
            let down = || ReceiveError::Down(io::ErrorKind::NetworkDown.into());
            return Err(if state.dead { down() } else { ReceiveError::Empty });
        };
        self.stage.set_len(0).unwrap();
        self.stage.write_all_at(frame, 0).unwrap();
        let fd = self.stage.as_raw_fd();
        // SAFETY: as in `tap`: the entries are live memory that may be written.
        let read = unsafe { libc::preadv(fd, IoVec::as_raw(buffers), buffers.len() as _, 0) };
        if read < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::EFAULT) => ReceiveError::MemoryFault,
                _ => ReceiveError::Down(error),
            });
        }
        state.inbox.pop_front();
        Ok(read as usize)
    }
}

const INSIDE: &str = "VHOST_USER_NET_TEST_INSIDE";

/// Runs `test`, whose full name is `name`, in user and network namespaces of its own: starts this test binary again
/// under `unshare`, for that one test. Skipped where that is not permitted.
pub(crate) fn in_namespace(name: &str, test: fn()) {
    if std::env::var(INSIDE).as_deref() == Ok(name) {
        return test();
    }
    let output = |command: &mut Command| command.output().map_err(|error| error.to_string());
    let able = output(Command::new("unshare").args(["-Urn", "test", "-w", "/dev/net/tun"]));
    match able {
        Ok(able) if able.status.success() => {}
        Ok(able) => {
            let why = String::from_utf8_lossy(&able.stderr);
            return skip(name, &format!("no namespaces or no tun: {}", why.trim()));
        }
        Err(error) => return skip(name, &format!("unshare(1): {error}")),
    }
    let binary = std::env::current_exe().unwrap();
    let run = output(
        Command::new("unshare")
            .arg("-Urn")
            .arg(binary)
            .args(["--exact", name, "--nocapture", "--test-threads=1"])
            .env(INSIDE, name),
    )
    .unwrap();
    let text = String::from_utf8_lossy(&run.stdout) + String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{text}");
    assert!(text.contains("1 passed"), "{text}");
}

/// Says that a test is skipped, and notes it where `cargo xtask test` asks for that; fails if nothing may be skipped.
pub(crate) fn skip(name: &str, reason: &str) {
    let required = std::env::var_os("VUN_REQUIRE_ALL").is_some_and(|value| value != "0");
    assert!(!required, "{name} may not be skipped: {reason}");
    eprintln!("SKIPPED {name}: {reason}");
    if let Some(list) = std::env::var_os("VUN_SKIP_LIST") {
        let mut file = File::options().append(true).create(true).open(list).unwrap();
        writeln!(file, "{name}: {reason}").unwrap();
    }
}
