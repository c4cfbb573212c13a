//! One queue of a tap at work: frames out and in.
//!
//! Frames go from and to guest memory without a copy of ours: a burst to be sent by one system call (`burst_ring`), a
//! single one by writev(2), a received one by read(2) or readv(2), on a non-blocking descriptor. Which is faster where
//! stands in bench/README.md. Readiness comes by io_uring poll. Not here: the tap as a device (`tap`).

use super::burst_ring::{BurstRing, FRAMES_MAX};
use super::{Burst, ReceiveError, SendError, UplinkQueue, send_each};
use crate::memory::IoVec;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

/// One queue of a [`super::tap::Tap`].
pub struct TapQueue {
    fd: Arc<OwnedFd>,
    mtu: Arc<AtomicU16>,
    /// For bursts; without it (io_uring limits) frames are written one by one.
    burst_ring: Option<BurstRing>,
}

impl TapQueue {
    /// The queue behind `fd`; `mtu` is kept up to date by the tap, `tap` names it in the log.
    pub(super) fn new(fd: Arc<OwnedFd>, mtu: Arc<AtomicU16>, tap: &str) -> Self {
        let burst_ring =
            BurstRing::new(&fd).inspect_err(|error| tracing::warn!(%error, "{tap}: no ring for bursts")).ok();
        Self { fd, mtu, burst_ring }
    }
}

impl UplinkQueue for TapQueue {
    fn readable(&self) -> &[Arc<OwnedFd>] {
        std::slice::from_ref(&self.fd)
    }

    fn mtu(&self) -> u16 {
        self.mtu.load(Ordering::Relaxed)
    }

    #[inline]
    fn send(&mut self, frame: &[IoVec<'_>]) -> Result<(), SendError> {
        // SAFETY: IoVec is repr(transparent) over iovec, and each entry is memory that lives as long as the
        // slice's borrow; the kernel only reads it.
        let sent = unsafe {
            libc::writev(self.fd.as_raw_fd(), frame.as_ptr().cast::<libc::iovec>(), frame.len() as _)
        };
        if sent >= 0 { Ok(()) } else { Err(send_error(io::Error::last_os_error())) }
    }

    fn send_burst(&mut self, burst: &Burst<'_>, outcomes: &mut Vec<Result<(), SendError>>) {
        let mut rest = burst.frames;
        while let Some(ring) = self.burst_ring.as_mut().filter(|_| rest.len() > 1) {
            let (now, later) = rest.split_at(rest.len().min(FRAMES_MAX));
            match ring.write(&Burst { buffers: burst.buffers, frames: now }) {
                Ok(results) => {
                    // Frames at the end that found no room are offered again; one in the middle cannot be, those
                    // after it have left already. (A tap's send buffer is unlimited, so neither happens.)
                    let tried =
                        results.iter().rposition(|result| *result != -libc::EAGAIN).map_or(0, |i| i + 1);
                    outcomes.extend(results[..tried].iter().map(|result| outcome_of(*result)));
                    if tried < results.len() {
                        return;
                    }
                    rest = later;
                }
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    tracing::warn!(
                        "this kernel's tap takes no writes that must not wait: frames are written one by one"
                    );
                    self.burst_ring = None;
                }
                Err(error) => {
                    tracing::error!(%error, "the ring for bursts is given up");
                    self.burst_ring = None;
                    rest = later;
                    outcomes
                        .extend(now.iter().map(|_| Err(SendError::Rejected(io::ErrorKind::Other.into()))));
                }
            }
        }
        let rest = Burst { buffers: burst.buffers, frames: rest };
        send_each(&rest, outcomes, |frame| self.send(frame));
    }

    #[inline]
    fn receive(&mut self, buffers: &[IoVec<'_>]) -> Result<usize, ReceiveError> {
        // SAFETY: as above; the entries are memory that may be written (guest memory, or a buffer of ours
        // that was borrowed mutably). One buffer goes without the list, which costs the kernel a copy and a check.
        let read = unsafe {
            let list = IoVec::as_raw(buffers);
            match buffers.len() {
                1 => libc::read(self.fd.as_raw_fd(), (*list).iov_base, (*list).iov_len),
                n => libc::readv(self.fd.as_raw_fd(), list, n as _),
            }
        };
        if read >= 0 { Ok(read as usize) } else { Err(receive_error()) }
    }
}

fn outcome_of(result: i32) -> Result<(), SendError> {
    if result >= 0 {
        return Ok(());
    }
    match send_error(io::Error::from_raw_os_error(-result)) {
        SendError::Full => Err(SendError::Rejected(io::ErrorKind::WouldBlock.into())),
        error => Err(error),
    }
}

#[cold]
fn send_error(error: io::Error) -> SendError {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EINTR) => SendError::Full,
        Some(libc::EFAULT) => SendError::MemoryFault,
        // EIO: the interface is not up. EBADFD: it was deleted. (A queue outside the steering may send.)
        Some(libc::EIO | libc::EBADFD | libc::ENODEV | libc::ENETDOWN) => SendError::Down(error),
        _ => SendError::Rejected(error),
    }
}

#[cold]
fn receive_error() -> ReceiveError {
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EINTR) => ReceiveError::Empty,
        Some(libc::EFAULT) => ReceiveError::MemoryFault,
        _ => ReceiveError::Down(error),
    }
}
