//! AF_PACKET sockets: put frames on an interface past its queueing discipline, or capture what comes in on it.
//! Not here: what the frames are.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::Link;

const ETH_P_ALL_BE: u16 = (libc::ETH_P_ALL as u16).to_be();
/// Most frames that one system call takes; more does not make it cheaper.
pub const INJECT_BURST: usize = 64;
/// Longest frame that a capture keeps.
const CAPTURE_LEN: usize = 65536 + 64;

fn open(link: &Link, protocol: u16) -> Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: socket() takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(protocol)) };
    if fd < 0 {
        return Err(io::Error::last_os_error()).context("AF_PACKET socket (needs CAP_NET_RAW)");
    }
    // SAFETY: the descriptor is new and nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: sockaddr_ll is plain data; all zeroes is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = link.index()?;
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address is a sockaddr_ll of the length that is given.
    let r = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) };
    if r < 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("binding to {}", link.name()));
    }
    Ok(fd)
}

fn set_option(fd: &OwnedFd, level: i32, name: i32, value: i32) -> Result<()> {
    let len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the option's value is an int, which outlives the call.
    let r = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), len) };
    if r < 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("socket option {level}/{name}"));
    }
    Ok(())
}

/// Puts frames on an interface: on a tap, its user reads them.
#[derive(Debug)]
pub struct Injector {
    fd: OwnedFd,
}

impl Injector {
    /// Opens one. It receives nothing.
    pub fn open(link: &Link) -> Result<Self> {
        let fd = open(link, 0)?;
        set_option(&fd, libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, 1)?;
        set_option(&fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, 64 << 20)?;
        Ok(Self { fd })
    }

    /// Sends the frames in order, up to [`INJECT_BURST`]; returns how many the kernel took. A frame that finds the
    /// tap's queue full is taken and dropped (`tx_dropped` of the link), or not taken.
    pub fn send(&self, frames: &[&[u8]]) -> Result<usize> {
        // SAFETY: both types are plain data; all zeroes is a valid value.
        let (mut iovecs, mut messages): ([libc::iovec; INJECT_BURST], [libc::mmsghdr; INJECT_BURST]) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        let n = frames.len().min(INJECT_BURST);
        for i in 0..n {
            iovecs[i].iov_base = frames[i].as_ptr().cast_mut().cast();
            iovecs[i].iov_len = frames[i].len();
            messages[i].msg_hdr.msg_iov = &raw mut iovecs[i];
            messages[i].msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: the first n messages point to iovecs and these to frames, which all outlive the call.
        let r = unsafe { libc::sendmmsg(self.fd.as_raw_fd(), messages.as_mut_ptr(), n as u32, 0) };
        if r >= 0 {
            return Ok(r as usize);
        }
        match io::Error::last_os_error() {
            // What a device that drops answers past the queueing discipline.
            e if e.raw_os_error() == Some(libc::ENOBUFS) => Ok(0),
            e if e.kind() == io::ErrorKind::Interrupted => Ok(0),
            e => Err(e).context("sending on an AF_PACKET socket"),
        }
    }

    /// Sends all frames, no faster than `per_second`, in steps of a millisecond or so; each is offered once.
    /// Returns how many the kernel took.
    pub fn send_paced<F: AsRef<[u8]>>(&self, frames: &[F], per_second: u64) -> Result<usize> {
        let start = Instant::now();
        let (mut offered, mut taken) = (0, 0);
        while offered < frames.len() {
            let due = ((start.elapsed().as_nanos() as u64) * per_second / 1_000_000_000) as usize;
            let due = due.clamp(offered, frames.len());
            if due == offered {
                std::thread::sleep(Duration::from_micros(500));
                continue;
            }
            let n = (due - offered).min(INJECT_BURST);
            let burst: Vec<&[u8]> = frames[offered..offered + n].iter().map(AsRef::as_ref).collect();
            taken += self.send(&burst)?;
            offered += n;
        }
        Ok(taken)
    }
}

/// Captures the frames that come in on an interface: on a tap, what its user writes.
#[derive(Debug)]
pub struct Capture {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

impl Capture {
    /// Starts capturing with room for `buffer_bytes` of frames (the kernel counts about 800 bytes for a small one).
    pub fn start(link: &Link, buffer_bytes: usize) -> Result<Self> {
        let fd = open(link, ETH_P_ALL_BE)?;
        set_option(&fd, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
        // The kernel doubles the value.
        set_option(&fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, (buffer_bytes / 2).min(1 << 30) as i32)?;
        Ok(Self { fd, buffer: vec![0; CAPTURE_LEN] })
    }

    /// The next frame, or `None` if none comes within `timeout`.
    pub fn next(&mut self, timeout: Duration) -> Result<Option<&[u8]>> {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, which outlives the call.
        let r = unsafe { libc::poll(&raw mut poll, 1, timeout.as_millis() as i32) };
        if r < 0 {
            return Err(io::Error::last_os_error()).context("poll");
        }
        if r == 0 {
            return Ok(None);
        }
        // SAFETY: the buffer is ours and has the length that is given.
        let n = unsafe {
            let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
            libc::recv(self.fd.as_raw_fd(), self.buffer.as_mut_ptr().cast(), self.buffer.len(), flags)
        };
        if n < 0 {
            let e = io::Error::last_os_error();
            // That the link went down is told once, between frames.
            let none = e.kind() == io::ErrorKind::WouldBlock || e.raw_os_error() == Some(libc::ENETDOWN);
            return if none { Ok(None) } else { Err(e).context("recv") };
        }
        Ok(self.buffer.get(..n as usize))
    }

    /// Frames that did not fit into the buffer since the last call.
    pub fn lost(&self) -> Result<u64> {
        // SAFETY: tpacket_stats is plain data; all zeroes is a valid value.
        let mut stats: libc::tpacket_stats = unsafe { std::mem::zeroed() };
        let mut len = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes to the structure, which outlives the call.
        let r = unsafe {
            let value = (&raw mut stats).cast();
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                value,
                &raw mut len,
            )
        };
        if r < 0 {
            return Err(io::Error::last_os_error()).context("PACKET_STATISTICS");
        }
        Ok(stats.tp_drops.into())
    }
}
