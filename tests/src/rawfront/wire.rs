//! One control connection: bytes and fds out in any shape, replies in with a time limit.
//!
//! The only unsafe code of `rawfront` is here: fds that came with a message become owned.

use super::PATIENCE;
use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Numbers of the messages (vhost-user: Front-end message types).
#[expect(missing_docs, reason = "the specification's own names")]
pub mod msg {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SEND_RARP: u32 = 19;
    pub const NET_SET_MTU: u32 = 20;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const POSTCOPY_ADVISE: u32 = 28;
    pub const POSTCOPY_LISTEN: u32 = 29;
    pub const POSTCOPY_END: u32 = 30;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

/// Header flags (vhost-user: Header).
#[expect(missing_docs, reason = "the specification's own names")]
pub mod flag {
    pub const VERSION: u32 = 0x1;
    pub const REPLY: u32 = 0x4;
    pub const NEED_REPLY: u32 = 0x8;
}

const HEADER_LEN: usize = 12;
/// Fds taken with one reply at most.
const REPLY_FDS_MAX: usize = 8;

/// Why there is no reply.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The back-end closed the connection.
    #[error("the back-end closed the connection")]
    Closed,
    /// Nothing came in time.
    #[error("no reply within {0:?}")]
    Timeout(Duration),
    /// Something came that is no reply to what was asked.
    #[error("unexpected reply: {0}")]
    Unexpected(String),
    /// The socket failed.
    #[error("control socket: {0}")]
    Io(io::Error),
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Self::Closed,
            _ => Self::Io(error),
        }
    }
}

/// What the back-end answered.
#[derive(Debug)]
pub struct Reply {
    /// Number of the message that is answered.
    pub request: u32,
    /// Header flags.
    pub flags: u32,
    /// Payload.
    pub payload: Vec<u8>,
    /// Fds that came with it.
    pub fds: Vec<OwnedFd>,
}

impl Reply {
    /// The payload as one number.
    pub fn u64(&self) -> Result<u64, WireError> {
        let bytes = self.payload.as_slice().try_into();
        bytes.map(u64::from_ne_bytes).map_err(|_| WireError::Unexpected(format!("{self:?}: not 8 bytes")))
    }
}

/// A control connection to a back-end.
#[derive(Debug)]
pub struct Wire {
    socket: UnixStream,
    /// Send messages in pieces of at most this many bytes, each with a system call of its own.
    pub piece: usize,
    /// How long to wait for a reply.
    pub patience: Duration,
}

impl Wire {
    /// Connects, trying again while nobody listens yet.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let start = Instant::now();
        loop {
            match UnixStream::connect(path) {
                Ok(socket) => return Ok(Self::from_stream(socket)),
                Err(error) if start.elapsed() > PATIENCE => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Uses a socket that is connected already.
    pub fn from_stream(socket: UnixStream) -> Self {
        // A back-end that never reads must fail a test, not hang it.
        drop(socket.set_write_timeout(Some(PATIENCE)));
        Self { socket, piece: usize::MAX, patience: PATIENCE }
    }

    /// The socket itself, for what this type does not do.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// One `sendmsg`: exactly these bytes with exactly these fds. Returns how many bytes were taken.
    pub fn send_once(&self, bytes: &[u8], fds: &[RawFd]) -> Result<usize, WireError> {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
        let sent = sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        Ok(sent.map_err(io::Error::from)?)
    }

    /// Sends all bytes in pieces of [`Self::piece`], the fds with the first one.
    pub fn send_raw(&self, bytes: &[u8], fds: &[RawFd]) -> Result<(), WireError> {
        let mut rest = bytes;
        let mut fds = fds;
        while !rest.is_empty() {
            let sent = self.send_once(&rest[..rest.len().min(self.piece)], fds)?;
            rest = &rest[sent..];
            fds = &[];
        }
        Ok(())
    }

    /// A message as it is on the wire.
    pub fn encode(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        Self::encode_sized(request, flags, payload.len() as u32, payload)
    }

    /// A message whose header may lie about the payload's size.
    pub fn encode_sized(request: u32, flags: u32, size: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
        for word in [request, flags, size] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(payload);
        bytes
    }

    /// Sends a message and asks for no acknowledgement.
    pub fn tell(&self, request: u32, payload: &[u8], fds: &[RawFd]) -> Result<(), WireError> {
        self.send_raw(&Self::encode(request, flag::VERSION, payload), fds)
    }

    /// Sends a message that has a reply of its own, and waits for it.
    pub fn ask(&self, request: u32, payload: &[u8]) -> Result<Reply, WireError> {
        self.tell(request, payload, &[])?;
        self.reply_to(request)
    }

    /// Sends a message with need_reply and returns the acknowledgement: 0 is success.
    pub fn order(&self, request: u32, payload: &[u8], fds: &[RawFd]) -> Result<u64, WireError> {
        self.send_raw(&Self::encode(request, flag::VERSION | flag::NEED_REPLY, payload), fds)?;
        self.reply_to(request)?.u64()
    }

    /// Waits for a reply and checks that it answers `request`.
    pub fn reply_to(&self, request: u32) -> Result<Reply, WireError> {
        let reply = self.recv(self.patience)?;
        // QEMU accepts no other flags.
        if reply.request != request || reply.flags != flag::VERSION | flag::REPLY {
            return Err(WireError::Unexpected(format!("{reply:?} to message {request}")));
        }
        Ok(reply)
    }

    /// Waits for one whole message of the back-end.
    pub fn recv(&self, patience: Duration) -> Result<Reply, WireError> {
        let deadline = Instant::now() + patience;
        let mut fds = Vec::new();
        let header = self.recv_exact(HEADER_LEN, deadline, patience, &mut fds)?;
        let word = |i: usize| u32::from_ne_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
        let size = word(8) as usize;
        if size > 1 << 20 {
            return Err(WireError::Unexpected(format!("reply of {size} bytes")));
        }
        let payload = self.recv_exact(size, deadline, patience, &mut fds)?;
        Ok(Reply { request: word(0), flags: word(4), payload, fds })
    }

    /// Whether the back-end closes the connection in time; replies that come before are dropped.
    pub fn is_closed_within(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            match self.recv(deadline.saturating_duration_since(Instant::now())) {
                Ok(_) => {}
                Err(WireError::Closed) => return true,
                Err(_) => return false,
            }
        }
    }

    fn recv_exact(
        &self,
        length: usize,
        deadline: Instant,
        patience: Duration,
        fds: &mut Vec<OwnedFd>,
    ) -> Result<Vec<u8>, WireError> {
        let mut bytes = vec![0u8; length];
        let mut filled = 0;
        while filled < length {
            let left = deadline.saturating_duration_since(Instant::now());
            self.socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            let mut control = cmsg_space!([RawFd; REPLY_FDS_MAX]);
            let mut slice = [IoSliceMut::new(&mut bytes[filled..])];
            let received = recvmsg::<()>(
                self.socket.as_raw_fd(),
                &mut slice,
                Some(&mut control),
                MsgFlags::MSG_CMSG_CLOEXEC,
            );
            let received = match received {
                Ok(r) => r,
                Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => {
                    // Looked at once even if there is no time at all.
                    if Instant::now() >= deadline {
                        return Err(WireError::Timeout(patience));
                    }
                    continue;
                }
                Err(errno) => return Err(io::Error::from(errno).into()),
            };
            for message in received.cmsgs().map_err(io::Error::from)? {
                if let ControlMessageOwned::ScmRights(list) = message {
                    fds.extend(list.into_iter().map(own_fd));
                }
            }
            if received.bytes == 0 {
                return Err(WireError::Closed);
            }
            filled += received.bytes;
        }
        Ok(bytes)
    }
}

fn own_fd(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just installed this fd for us with SCM_RIGHTS, and `recv_exact` takes each of them
    // from the control message once: nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
