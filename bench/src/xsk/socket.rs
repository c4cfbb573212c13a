//! An AF_XDP socket with a UMEM of its own on one queue, in copy mode: set-up by plain system calls.
//! Not here: the loops that use it (`bare`).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use lab::wire::Link;

use super::ring::{Mapping, Ring};

/// Bytes of a frame in the UMEM.
pub const FRAME_LEN: u32 = 2048;
/// Frames in the UMEM, and entries of each ring.
pub const FRAMES: u32 = 2048;

/// A socket with its rings. It lives in the name space of the thread that made it.
pub struct Socket {
    // The rings are dropped before the socket and the UMEM after it: a queue stays busy while anything is mapped.
    /// Frames the kernel may fill.
    pub fill: Ring<u64>,
    /// Frames that were sent.
    pub completion: Ring<u64>,
    /// Frames that came.
    pub rx: Ring<libc::xdp_desc>,
    /// Frames to send.
    pub tx: Ring<libc::xdp_desc>,
    fd: OwnedFd,
    umem: Mapping,
}

impl Socket {
    /// Binds to queue 0 of `link`.
    pub fn bind(link: &Link) -> Result<Self> {
        // SAFETY: socket() takes no pointers.
        let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error()).context("AF_XDP socket (needs CAP_NET_RAW)");
        }
        // SAFETY: the descriptor is new and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let umem = Mapping::anonymous((FRAMES * FRAME_LEN) as usize)?;
        let registration = libc::xdp_umem_reg {
            addr: umem.as_ptr() as u64,
            len: umem.len() as u64,
            chunk_size: FRAME_LEN,
            headroom: 0,
            flags: 0,
            tx_metadata_len: 0,
        };
        set_option(&fd, libc::XDP_UMEM_REG, &registration).context("UMEM")?;
        for ring in
            [libc::XDP_UMEM_FILL_RING, libc::XDP_UMEM_COMPLETION_RING, libc::XDP_RX_RING, libc::XDP_TX_RING]
        {
            set_option(&fd, ring, &FRAMES).context("ring")?;
        }
        let at = offsets(&fd)?;
        let it = Self {
            fill: Ring::map(&fd, libc::XDP_UMEM_PGOFF_FILL_RING as libc::off_t, &at.fr, FRAMES)?,
            completion: Ring::map(&fd, libc::XDP_UMEM_PGOFF_COMPLETION_RING as libc::off_t, &at.cr, FRAMES)?,
            rx: Ring::map(&fd, libc::XDP_PGOFF_RX_RING, &at.rx, FRAMES)?,
            tx: Ring::map(&fd, libc::XDP_PGOFF_TX_RING, &at.tx, FRAMES)?,
            fd,
            umem,
        };
        let address = libc::sockaddr_xdp {
            sxdp_family: libc::AF_XDP as u16,
            sxdp_flags: libc::XDP_COPY | libc::XDP_USE_NEED_WAKEUP,
            sxdp_ifindex: link.index()? as u32,
            sxdp_queue_id: 0,
            sxdp_shared_umem_fd: 0,
        };
        let len = size_of::<libc::sockaddr_xdp>() as libc::socklen_t;
        // SAFETY: the address is a sockaddr_xdp of the length that is given.
        let r = unsafe { libc::bind(it.fd.as_raw_fd(), (&raw const address).cast(), len) };
        ensure!(r == 0, "binding to queue 0 of {}: {}", link.name(), io::Error::last_os_error());
        Ok(it)
    }

    /// Writes bytes to the beginning of a frame.
    pub fn write(&mut self, frame: u32, bytes: &[u8]) {
        assert!(frame < FRAMES && bytes.len() <= FRAME_LEN as usize, "outside the UMEM");
        let to = self.umem.as_ptr();
        // SAFETY: the frame and the length are inside the UMEM, which nothing else borrows.
        unsafe { to.add((frame * FRAME_LEN) as usize).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Has the kernel send what is in the TX ring; it takes some frames per call.
    pub fn kick(&self) -> Result<()> {
        // SAFETY: no buffer and no address are given.
        let r = unsafe {
            libc::sendto(self.fd.as_raw_fd(), std::ptr::null(), 0, libc::MSG_DONTWAIT, std::ptr::null(), 0)
        };
        if r >= 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            // There is more to send, or no room for completions.
            e if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::EINTR)) => Ok(()),
            e => Err(e).context("sending on an AF_XDP socket"),
        }
    }

    /// Waits until a frame has come, or for `timeout_ms`. (In copy mode poll() also sends.)
    pub fn wait(&self, timeout_ms: i32) -> Result<()> {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, which outlives the call.
        let r = unsafe { libc::poll(&raw mut poll, 1, timeout_ms) };
        match io::Error::last_os_error() {
            _ if r >= 0 => Ok(()),
            e if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            e => Err(e).context("poll"),
        }
    }

    /// The descriptor, for an XSKMAP.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}

fn set_option<T>(fd: &OwnedFd, name: i32, value: &T) -> Result<()> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of the value, which outlives the call.
    let r = unsafe {
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_XDP, name, std::ptr::from_ref(value).cast(), len)
    };
    ensure!(r == 0, "socket option {name} of AF_XDP: {}", io::Error::last_os_error());
    Ok(())
}

fn offsets(fd: &OwnedFd) -> Result<libc::xdp_mmap_offsets> {
    // SAFETY: the structure is plain data; all zeroes is a valid value.
    let mut at: libc::xdp_mmap_offsets = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::xdp_mmap_offsets>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to the structure, which outlives the call.
    let r = unsafe {
        let to = (&raw mut at).cast();
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_XDP, libc::XDP_MMAP_OFFSETS, to, &raw mut len)
    };
    ensure!(r == 0, "offsets of the AF_XDP rings: {}", io::Error::last_os_error());
    Ok(at)
}
