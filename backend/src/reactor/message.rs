//! Messages on a Unix socket with file descriptors, laid out for RECVMSG and SENDMSG.
//!
//! Lives here: the buffers that an operation owns while the kernel uses them, and the one place that takes
//! descriptors out of a control buffer. Not here: what the bytes mean (`session`).

use super::stranger::PeerFd;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Bytes taken from a control socket in one read. Several messages may come in one read, and a message in
/// several.
pub const RECV_BYTES: usize = 4096;
/// File descriptors taken in one read. The largest legal count is 8 (SET_MEM_TABLE); one more read than legal
/// still ends up in the session, which names the error.
pub const RECV_FDS: usize = 16;

const CONTROL_BYTES: usize = {
    // SAFETY: CMSG_SPACE only computes.
    (unsafe { libc::CMSG_SPACE((RECV_FDS * size_of::<RawFd>()) as u32) }) as usize
};

#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

/// Room for one read from a control socket. Boxed, so that its addresses stay put while the kernel has them.
pub struct Incoming {
    header: libc::msghdr,
    iov: libc::iovec,
    control: Control,
    bytes: [u8; RECV_BYTES],
    strangers: usize,
}

// SAFETY: the raw pointers in `header` and `iov` point into this very allocation (or are null) and are set
// anew before each use; moving the box to another thread moves nothing they point to.
unsafe impl Send for Incoming {}

impl Incoming {
    /// An empty buffer.
    pub fn new() -> Box<Self> {
        // SAFETY: all-zero bytes are valid for msghdr, iovec and the byte arrays.
        unsafe { Box::new(std::mem::zeroed()) }
    }

    /// Points the message header at this buffer and hands it to the caller, who passes it to the kernel.
    pub(super) fn prepare(&mut self) -> *mut libc::msghdr {
        self.iov = libc::iovec { iov_base: self.bytes.as_mut_ptr().cast(), iov_len: RECV_BYTES };
        // SAFETY: all-zero bytes are a valid msghdr.
        self.header = unsafe { std::mem::zeroed() };
        self.header.msg_iov = &raw mut self.iov;
        self.header.msg_iovlen = 1;
        self.header.msg_control = (&raw mut self.control).cast();
        self.header.msg_controllen = CONTROL_BYTES as _;
        &raw mut self.header
    }

    /// The bytes of the read that ended with `received`.
    pub fn bytes(&self, received: usize) -> &[u8] {
        &self.bytes[..received.min(RECV_BYTES)]
    }

    /// True if the kernel had more control data than there was room for: descriptors were lost.
    pub fn truncated(&self) -> bool {
        self.header.msg_flags & libc::MSG_CTRUNC != 0
    }

    /// How many of the descriptors taken were of kinds that no message takes.
    pub fn strangers(&self) -> usize {
        self.strangers
    }

    /// Takes the descriptors of the read out of the control buffer. Each is handed out once, or a stand-in for it
    /// if it is of a kind that could make whoever closes it wait.
    pub fn take_fds(&mut self) -> Vec<PeerFd> {
        let mut fds = Vec::new();
        // SAFETY: `header` describes `control`, whose first msg_controllen bytes the kernel filled; the CMSG
        // macros walk within that length. Every SCM_RIGHTS number is a new descriptor of this process that
        // nobody else owns, and the control length is zeroed afterwards so that none is taken twice.
        unsafe {
            let mut cmsg = libc::CMSG_FIRSTHDR(&self.header);
            while !cmsg.is_null() {
                if (*cmsg).cmsg_level == libc::SOL_SOCKET && (*cmsg).cmsg_type == libc::SCM_RIGHTS {
                    let data = libc::CMSG_DATA(cmsg);
                    let len = (*cmsg).cmsg_len as usize - (data as usize - cmsg as usize);
                    for i in 0..len / size_of::<RawFd>() {
                        let raw = data.cast::<RawFd>().add(i).read_unaligned();
                        fds.extend(super::stranger::admit(OwnedFd::from_raw_fd(raw), &mut self.strangers));
                    }
                }
                cmsg = libc::CMSG_NXTHDR(&self.header, cmsg);
            }
        }
        self.header.msg_controllen = 0;
        fds
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // A read that nobody looked at may still hold descriptors.
        if !self.header.msg_control.is_null() {
            drop(self.take_fds());
        }
    }
}

/// One message to send, with at most one descriptor. Partly sent messages go on where they stopped.
pub struct Outgoing {
    header: libc::msghdr,
    iov: libc::iovec,
    control: Control,
    bytes: Vec<u8>,
    sent: usize,
    fd: Option<OwnedFd>,
}

// SAFETY: as for `Incoming`.
unsafe impl Send for Outgoing {}

impl Outgoing {
    /// A message of these bytes and, with its first byte, this descriptor.
    pub fn new(bytes: Vec<u8>, fd: Option<OwnedFd>) -> Box<Self> {
        // SAFETY: all-zero bytes are valid for the C structures; the Rust fields are then written in full.
        let (header, iov, control) = unsafe { std::mem::zeroed() };
        Box::new(Self { header, iov, control, bytes, sent: 0, fd })
    }

    pub(super) fn prepare(&mut self) -> *const libc::msghdr {
        let rest = &mut self.bytes[self.sent..];
        self.iov = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
        // SAFETY: all-zero bytes are a valid msghdr.
        self.header = unsafe { std::mem::zeroed() };
        self.header.msg_iov = &raw mut self.iov;
        self.header.msg_iovlen = 1;
        if let Some(fd) = self.fd.as_ref().filter(|_| self.sent == 0) {
            self.header.msg_control = (&raw mut self.control).cast();
            // SAFETY: the control buffer is aligned and has room for RECV_FDS >= 1 descriptors.
            unsafe {
                self.header.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as _;
                let cmsg = libc::CMSG_FIRSTHDR(&self.header);
                (*cmsg).cmsg_level = libc::SOL_SOCKET;
                (*cmsg).cmsg_type = libc::SCM_RIGHTS;
                (*cmsg).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
                libc::CMSG_DATA(cmsg).cast::<RawFd>().write_unaligned(fd.as_raw_fd());
            }
        }
        &raw const self.header
    }

    /// Notes that `n` more bytes have left. True if the message is out as a whole.
    pub fn advance(&mut self, n: usize) -> bool {
        self.sent = (self.sent + n).min(self.bytes.len());
        self.sent == self.bytes.len()
    }
}

/// Whether bytes wait in a socket that nobody has read; also if the socket cannot tell.
pub fn has_unread(socket: &OwnedFd) -> bool {
    let mut unread: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int through the pointer, which is a live local.
    let asked = unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &raw mut unread) };
    asked != 0 || unread > 0
}

/// The address of a Unix socket, laid out for CONNECT.
pub struct UnixAddress {
    pub(super) address: libc::sockaddr_un,
    pub(super) len: libc::socklen_t,
}

impl UnixAddress {
    /// The address of a socket in the file system.
    ///
    /// # Errors
    /// `InvalidInput` if the path is empty, too long for `sun_path` (107 bytes) or holds a NUL.
    pub fn new(path: &std::path::Path) -> io::Result<Box<Self>> {
        use std::os::unix::ffi::OsStrExt;
        let bytes = path.as_os_str().as_bytes();
        // SAFETY: all-zero bytes are a valid sockaddr_un.
        let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
        if bytes.is_empty() || bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "socket path is empty or longer than 107 bytes",
            ));
        }
        address.sun_family = libc::AF_UNIX as _;
        for (to, from) in address.sun_path.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        Ok(Box::new(Self { address, len: size_of::<libc::sockaddr_un>() as _ }))
    }
}
