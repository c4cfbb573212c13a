//! The null uplink: counts and drops what the guest sends, and has no frame for it, or as many as it takes. For
//! measurements and tests of everything but an uplink.

use super::{Capabilities, FrameFormat, ReceiveError, SendError, Uplink, UplinkQueue};
use crate::memory::{IoVec, scatter};
use crate::net::features::OFFLOADS;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Longest virtio-net header, bytes.
const HEADER_MAX: usize = 12;
/// Shortest frame that is made: addresses, type, and the number it carries, bytes.
pub const GENERATED_MIN: u16 = 22;
/// Longest frame that is made, bytes.
pub const GENERATED_MAX: u16 = 9014;
/// Link header of frames that are made: unicast, and of the type for local experiments (IEEE Std 802, 0x88b5).
const LINK_HEADER: [u8; 14] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5];

/// Drops everything.
pub struct Null {
    header_len: Arc<AtomicUsize>,
    generate: Option<u16>,
}

/// A queue of [`Null`].
pub struct NullQueue {
    header_len: Arc<AtomicUsize>,
    /// The frame that is made next, behind room for a header; empty: none ever.
    frame: Vec<u8>,
    made: u64,
    /// Always readable if frames are made.
    ready: Vec<Arc<OwnedFd>>,
}

impl Null {
    /// An uplink that makes frames of so many bytes for the guest, as fast as it takes them, or none.
    pub fn new(generate: Option<u16>) -> Self {
        Self { header_len: Arc::new(AtomicUsize::new(HEADER_MAX)), generate }
    }

    /// Queues, one for each queue pair.
    ///
    /// # Errors
    /// No eventfd is to be had.
    pub fn queues(&self, pairs: u16) -> io::Result<Vec<NullQueue>> {
        (0..pairs).map(|_| self.queue()).collect()
    }

    fn queue(&self) -> io::Result<NullQueue> {
        let mut queue =
            NullQueue { header_len: self.header_len.clone(), frame: Vec::new(), made: 0, ready: Vec::new() };
        if let Some(len) = self.generate {
            let len = len.clamp(GENERATED_MIN, GENERATED_MAX);
            queue.frame = vec![0; HEADER_MAX + usize::from(len)];
            queue.frame[HEADER_MAX..][..LINK_HEADER.len()].copy_from_slice(&LINK_HEADER);
            let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
            queue.ready.push(Arc::new(EventFd::from_value_and_flags(1, flags)?.into()));
        }
        Ok(queue)
    }
}

impl Uplink for Null {
    fn describe(&self) -> &str {
        if self.generate.is_some() { "null:generate" } else { "null" }
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities { offloads: OFFLOADS, mtu: u16::MAX }
    }
    fn configure(&self, format: FrameFormat) -> io::Result<()> {
        self.header_len.store(format.header_len.min(HEADER_MAX), Ordering::Relaxed);
        Ok(())
    }
    fn set_mtu(&self, _mtu: u16) -> io::Result<()> {
        Ok(())
    }
    fn set_queue_active(&self, _queue: u16, _active: bool) -> io::Result<()> {
        Ok(())
    }
    fn announce(&self, _frame: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

impl UplinkQueue for NullQueue {
    fn readable(&self) -> &[Arc<OwnedFd>] {
        &self.ready
    }
    fn writable(&self) -> Option<&Arc<OwnedFd>> {
        None
    }
    fn send(&mut self, _frame: &[IoVec<'_>]) -> Result<(), SendError> {
        Ok(())
    }
    fn receive(&mut self, buffers: &[IoVec<'_>]) -> Result<usize, ReceiveError> {
        if self.frame.is_empty() {
            return Err(ReceiveError::Empty);
        }
        self.made += 1;
        self.frame[HEADER_MAX + LINK_HEADER.len()..][..8].copy_from_slice(&self.made.to_le_bytes());
        let frame = &self.frame[HEADER_MAX - self.header_len.load(Ordering::Relaxed)..];
        // SAFETY: buffers that are received into are guest memory, or ours and borrowed mutably.
        unsafe { scatter(buffers, frame) };
        Ok(frame.len())
    }
}
