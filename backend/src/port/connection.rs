//! A port's control socket: where connections come from, and the one that is served.
//!
//! One connection is served at a time; the next one waits in the listener's backlog until the first has ended and
//! its rings are stopped.
#![forbid(unsafe_code)]

use super::fds;
use crate::config;
use crate::reactor::{Incoming, OpId, Outgoing, Reactor, close_late, has_unread};
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, getsockopt, shutdown, socket, sockopt};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// First pause before a client connects again.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest pause before a client connects again.
const BACKOFF_MAX: Duration = Duration::from_secs(3);
/// Replies that may wait to be sent; no further messages are taken up until the front-end has read some.
const OUTBOX_MAX: usize = 64;

/// Where a port's connections come from.
pub enum Endpoint {
    /// We listen.
    Listen {
        /// The socket.
        listener: Arc<OwnedFd>,
        /// Its path, to be removed at the end; none if inherited.
        path: Option<PathBuf>,
    },
    /// We connect, again and again.
    Connect {
        /// The front-end's socket.
        path: PathBuf,
        /// The pause before the next attempt.
        backoff: Duration,
        /// The attempt under way.
        attempt: Option<Arc<OwnedFd>>,
    },
    /// One inherited connection; the port ends with it.
    Inherited(Option<OwnedFd>),
}

/// Why a control socket could not be had. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// Another process serves it.
    #[error("{0}: another process is listening there; stop it or choose another --socket-path")]
    InUse(PathBuf),
    /// Something else stands at the path.
    #[error("{0}: exists and is not a socket; remove it or choose another --socket-path")]
    NotASocket(PathBuf),
    /// Cannot be made.
    #[error("{0}: cannot listen there: {1}; the directory must exist and be writable for this user")]
    Bind(PathBuf, io::Error),
    /// An inherited descriptor is no socket.
    #[error("--fd {0}: descriptor {0} is not an open Unix socket ({1})")]
    BadFd(RawFd, io::Error),
}

impl Endpoint {
    /// Opens what the configuration names.
    ///
    /// # Errors
    /// An [`EndpointError`] that says what to do.
    pub fn open(endpoint: &config::Endpoint) -> Result<Self, EndpointError> {
        Ok(match endpoint {
            config::Endpoint::Listen(path) => {
                let listener = listen(path)?;
                Self::Listen { listener: Arc::new(listener.into()), path: Some(path.clone()) }
            }
            config::Endpoint::Connect(path) => {
                Self::Connect { path: path.clone(), backoff: BACKOFF_MIN, attempt: None }
            }
            config::Endpoint::Fd(raw) => {
                let fd = fds::inherit_socket(*raw).map_err(|error| EndpointError::BadFd(*raw, error))?;
                if getsockopt(&fd, sockopt::AcceptConn).unwrap_or(false) {
                    Self::Listen { listener: Arc::new(fd), path: None }
                } else {
                    Self::Inherited(Some(fd))
                }
            }
        })
    }

    /// The pause before the next attempt to connect; each is longer than the last.
    pub fn next_pause(&mut self) -> Duration {
        let Self::Connect { backoff, .. } = self else { return BACKOFF_MIN };
        let pause = *backoff;
        *backoff = (pause * 2).min(BACKOFF_MAX);
        pause
    }

    /// An attempt succeeded: the next pause is short again.
    pub fn connected(&mut self) {
        if let Self::Connect { backoff, .. } = self {
            *backoff = BACKOFF_MIN;
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if let Self::Listen { path: Some(path), .. } = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn listen(path: &Path) -> Result<UnixListener, EndpointError> {
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(EndpointError::NotASocket(path.into()));
        }
        // A socket left over by a process that was killed refuses connections.
        match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(|error| EndpointError::Bind(path.into(), error))?;
            }
            _ => return Err(EndpointError::InUse(path.into())),
        }
    }
    UnixListener::bind(path).map_err(|error| EndpointError::Bind(path.into(), error))
}

/// A new socket for an attempt to connect.
pub fn client_socket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?)
}

/// The connection that is served.
pub struct Connection {
    /// The socket.
    pub socket: Arc<OwnedFd>,
    /// Which connection of the port it is: operations of earlier ones are told apart by it.
    pub epoch: u32,
    receive: Option<OpId>,
    outbox: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
    sending: Option<OpId>,
}

impl Connection {
    /// A connection just made.
    pub fn new(socket: OwnedFd, epoch: u32) -> Self {
        Self { socket: Arc::new(socket), epoch, receive: None, outbox: VecDeque::new(), sending: None }
    }

    /// Reads on, unless a read is under way.
    pub fn receive<T: Copy>(&mut self, reactor: &mut Reactor<T>, token: T) {
        if self.receive.is_none() {
            self.receive = Some(reactor.receive(&self.socket, Incoming::new(), token));
        }
    }

    /// The read under way has ended.
    pub fn received(&mut self) {
        self.receive = None;
    }

    /// Whether so many replies wait that no more messages should be taken up.
    pub fn is_full(&self) -> bool {
        self.outbox.len() >= OUTBOX_MAX
    }

    /// Sends a message after those that wait.
    pub fn send<T: Copy>(&mut self, reactor: &mut Reactor<T>, bytes: Vec<u8>, fd: Option<OwnedFd>, token: T) {
        self.outbox.push_back((bytes, fd));
        self.send_next(reactor, token);
    }

    fn send_next<T: Copy>(&mut self, reactor: &mut Reactor<T>, token: T) {
        if self.sending.is_none()
            && let Some((bytes, fd)) = self.outbox.pop_front()
        {
            self.sending = Some(reactor.send(&self.socket, Outgoing::new(bytes, fd), token));
        }
    }

    /// A send has ended.
    ///
    /// # Errors
    /// What the socket says: the connection is over.
    pub fn sent<T: Copy>(
        &mut self,
        reactor: &mut Reactor<T>,
        result: io::Result<usize>,
        mut message: Box<Outgoing>,
        token: T,
    ) -> io::Result<()> {
        let n = match result {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        if message.advance(n) {
            self.sending = None;
            self.send_next(reactor, token);
        } else {
            self.sending = Some(reactor.send(&self.socket, message, token));
        }
        Ok(())
    }
}

impl Connection {
    /// Ends the connection: what is being sent may still go out if the peer takes it at once.
    /// True if the socket was left to a thread that may wait.
    pub fn end<T: Copy>(self, reactor: &mut Reactor<T>) -> bool {
        if let Some(op) = self.sending {
            reactor.cancel(op);
        }
        // Messages that nobody has read go with the socket, and with them descriptors of any kind.
        if has_unread(&self.socket)
            && let Ok(copy) = self.socket.try_clone()
        {
            if self.sending.is_none() {
                // The peer need not wait for that to see the end.
                let _ = shutdown(copy.as_raw_fd(), Shutdown::Write);
            }
            close_late(copy);
            return true;
        }
        false
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // A read under way keeps the file alive; this ends it.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Read);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    /// A socket with messages that nobody has read is closed late, but its peer need not wait.
    #[test]
    fn the_peer_sees_the_end_at_once() {
        let mut reactor: Reactor<()> = Reactor::new().unwrap();
        let (ours, mut peer) = UnixStream::pair().unwrap();
        let connection = Connection::new(ours.into(), 0);
        peer.write_all(b"never read").unwrap();
        peer.set_nonblocking(true).unwrap();
        connection.end(&mut reactor);
        assert_eq!(peer.read(&mut [0; 8]).unwrap(), 0);
    }
}
