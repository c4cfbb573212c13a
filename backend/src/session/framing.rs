//! From reads to messages: pieces are put together, several messages in one read are taken apart, and file
//! descriptors find the message they belong to.
//!
//! What a message means is not known here; only the header is looked at, and only as far as the stream's own
//! consistency goes. After the first violation the stream cannot be trusted: what came before it is still handed
//! out, then the violation, then nothing.
//!
//! ```text
//!   read 1            read 2                read 3 (+fd)
//!   [hdr A|payl       oad A][hdr B|payload B][hdr C|payload C]
//!    A begins here             B and C begin here: the fd is C's
//! ```
//! The kernel glues messages without fds to a following one with fds, never anything after it: so the fds of a
//! read belong to the last message that begins in it.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use zerocopy::FromBytes;

use super::error::SessionError;
use super::message::{
    FDS_PER_MESSAGE_MAX, FLAG_REPLY, FLAG_VERSION_MASK, HEADER_BYTES, Header, PAYLOAD_BYTES_MAX, VERSION,
};

/// Above this many bytes of messages that wait their turn, no more should be read from the socket.
pub const BUFFER_BYTES_SOFT: usize = 16 * 1024;
/// No more than this many bytes are ever kept; a read that would exceed it ends the session.
pub const BUFFER_BYTES_MAX: usize = 64 * 1024;
/// Above this many file descriptors that wait with their messages, no more should be read from the socket.
pub const BUFFER_FDS_SOFT: usize = 4 * FDS_PER_MESSAGE_MAX;

/// One whole message of the front-end.
#[derive(Debug)]
pub(super) struct Frame<F> {
    pub header: Header,
    pub payload: Vec<u8>,
    pub fds: Vec<F>,
}

/// Reassembly of one connection's byte stream. See the module's header.
#[derive(Debug)]
pub(super) struct Framing<F> {
    whole: VecDeque<Frame<F>>,
    /// The message that has begun and is not whole yet: header and payload so far.
    partial: Vec<u8>,
    partial_fds: Vec<F>,
    /// Bytes and fds held in `whole`.
    whole_bytes: usize,
    whole_fds: usize,
    violation: Option<SessionError>,
}

impl<F> Framing<F> {
    pub fn new() -> Self {
        Self {
            whole: VecDeque::new(),
            partial: Vec::new(),
            partial_fds: Vec::new(),
            whole_bytes: 0,
            whole_fds: 0,
            violation: None,
        }
    }

    /// Bytes held, whole messages and pieces.
    pub fn buffered(&self) -> usize {
        self.whole_bytes + self.partial.len()
    }

    /// Whether there is room for another read.
    pub fn wants_input(&self) -> bool {
        self.violation.is_none()
            && self.buffered() < BUFFER_BYTES_SOFT
            && self.whole_fds + self.partial_fds.len() < BUFFER_FDS_SOFT
    }

    /// Take the bytes of one read, and the fds that came with it.
    ///
    /// # Errors
    /// [`SessionError::Flooded`] if the owner reads on although [`Framing::wants_input`] says no. Violations by the
    /// peer are no error here; they come out of [`Framing::pop`] in their turn.
    pub fn push(&mut self, mut bytes: &[u8], fds: Vec<F>) -> Result<(), SessionError> {
        if self.violation.is_some() {
            return Ok(());
        }
        if self.buffered() + bytes.len() > BUFFER_BYTES_MAX {
            return Err(SessionError::Flooded { bytes: self.buffered() + bytes.len() });
        }
        let mut begun = false;
        while !bytes.is_empty() {
            begun |= self.partial.is_empty();
            if self.partial.len() < HEADER_BYTES {
                bytes = self.take(bytes, HEADER_BYTES);
                if self.partial.len() < HEADER_BYTES {
                    break;
                }
            }
            let Some(header) = self.partial_header() else { break };
            if let Err(violation) = check(&header) {
                self.violation = Some(violation);
                self.partial = Vec::new();
                self.partial_fds.clear();
                return Ok(());
            }
            let length = HEADER_BYTES + header.size as usize;
            bytes = self.take(bytes, length);
            if self.partial.len() == length {
                self.finish(header);
            }
        }
        self.attach(fds, begun);
        Ok(())
    }

    /// The next whole message; after the last one, the violation that ended the stream.
    pub fn pop(&mut self) -> Option<Result<Frame<F>, SessionError>> {
        match self.whole.pop_front() {
            Some(frame) => {
                self.whole_bytes -= HEADER_BYTES + frame.payload.len();
                self.whole_fds -= frame.fds.len();
                Some(Ok(frame))
            }
            None => self.violation.clone().map(Err),
        }
    }

    /// Forget everything; no more input is wanted.
    pub fn close(&mut self, why: SessionError) {
        self.whole.clear();
        (self.whole_bytes, self.whole_fds) = (0, 0);
        self.partial = Vec::new();
        self.partial_fds.clear();
        self.violation = Some(why);
    }

    /// Move bytes to the partial message until it has `length`; what is left of them.
    fn take<'a>(&mut self, bytes: &'a [u8], length: usize) -> &'a [u8] {
        let count = (length - self.partial.len()).min(bytes.len());
        let (taken, rest) = bytes.split_at(count);
        self.partial.extend_from_slice(taken);
        rest
    }

    fn partial_header(&self) -> Option<Header> {
        Header::read_from_prefix(&self.partial).ok().map(|(header, _)| header)
    }

    fn finish(&mut self, header: Header) {
        let payload = self.partial.split_off(HEADER_BYTES);
        self.partial.clear();
        let fds = std::mem::take(&mut self.partial_fds);
        self.whole_bytes += HEADER_BYTES + payload.len();
        self.whole_fds += fds.len();
        self.whole.push_back(Frame { header, payload, fds });
    }

    fn attach(&mut self, fds: Vec<F>, begun: bool) {
        if fds.is_empty() {
            return;
        }
        if fds.len() > FDS_PER_MESSAGE_MAX {
            self.violation = Some(SessionError::TooManyFds { count: fds.len() });
        } else if !begun {
            self.violation = Some(SessionError::FdsWithoutMessage { count: fds.len() });
        } else if !self.partial.is_empty() {
            self.partial_fds = fds;
        } else if let Some(last) = self.whole.back_mut() {
            self.whole_fds += fds.len();
            last.fds = fds;
        }
    }
}

/// vhost-user: Header. What must hold for the rest of the stream to make sense.
fn check(header: &Header) -> Result<(), SessionError> {
    let Header { request, flags, size } = *header;
    if flags & FLAG_VERSION_MASK != VERSION {
        return Err(SessionError::Version { request, flags });
    }
    if flags & FLAG_REPLY != 0 {
        return Err(SessionError::UnexpectedReply { request });
    }
    if size as usize > PAYLOAD_BYTES_MAX {
        return Err(SessionError::Oversized { request, size });
    }
    Ok(())
}
