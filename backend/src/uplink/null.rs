//! The null uplink: counts and drops what the guest sends, and has no frame for it, or as many as it takes. For
//! measurements and tests of everything but an uplink.

use super::{Burst, Capabilities, FrameFormat, ReceiveError, SendError, Uplink, UplinkQueue, receive_first};
use crate::memory::{IoVec, IoVecStorage};
use crate::net::features::OFFLOADS;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Longest virtio-net header, bytes.
const HEADER_MAX: usize = 12;
/// Shortest frame that is made, bytes (Ethernet's shortest, less its checksum).
pub const GENERATED_MIN: u16 = 60;
/// Longest frame that is made, bytes.
pub const GENERATED_MAX: u16 = 9014;
/// Frames that are made at once.
const BATCH: usize = 64;
/// Bytes at the beginning of a frame that are its own; what follows is the same in all.
const HEAD: usize = 64;
/// The virtio-net header of all frames: nothing is left to be done about them.
static NO_HEADER: [u8; HEADER_MAX] = [0; HEADER_MAX];
/// Where a frame carries its number: behind Ethernet, IPv4 and UDP headers, bytes.
const NUMBER: usize = 14 + 20 + 8;

/// Drops everything.
pub struct Null {
    header_len: Arc<AtomicUsize>,
    generate: Option<u16>,
}

/// A queue of [`Null`].
pub struct NullQueue {
    header_len: Arc<AtomicUsize>,
    /// The beginnings of the frames that are made next, [`HEAD`] bytes or less; empty: none ever.
    heads: Vec<Vec<u8>>,
    /// What follows each of them.
    tail: Vec<u8>,
    /// Frames taken so far.
    made: u64,
    iovecs: IoVecStorage<{ 3 * BATCH }>,
    /// The pieces of each.
    frames: Vec<Range<usize>>,
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
        let mut queue = NullQueue {
            header_len: self.header_len.clone(),
            heads: Vec::new(),
            tail: Vec::new(),
            made: 0,
            iovecs: IoVecStorage::default(),
            frames: Vec::new(),
            ready: Vec::new(),
        };
        if let Some(len) = self.generate {
            let len = len.clamp(GENERATED_MIN, GENERATED_MAX);
            let mut frame = udp_frame(len);
            queue.tail = frame.split_off(HEAD.min(frame.len()));
            queue.heads = vec![frame; BATCH];
            let pieces = if queue.tail.is_empty() { 2 } else { 3 };
            queue.frames = (0..BATCH).map(|i| pieces * i..pieces * (i + 1)).collect();
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
    fn send_burst(&mut self, burst: &Burst<'_>, outcomes: &mut Vec<Result<(), SendError>>) {
        outcomes.resize_with(burst.frames.len(), || Ok(()));
    }
    fn peek(&mut self) -> Option<bool> {
        Some(!self.heads.is_empty())
    }
    fn frames(&mut self, max: usize) -> Option<Burst<'_>> {
        let Self { heads, tail, made, iovecs, frames, .. } = self;
        let header = &NO_HEADER[..self.header_len.load(Ordering::Relaxed)];
        let iovecs = iovecs.begin();
        let count = heads.len().min(max);
        for (head, number) in heads.iter_mut().take(max).zip(*made + 1..) {
            if let Some(place) = head.get_mut(NUMBER..NUMBER + 8) {
                place.copy_from_slice(&number.to_le_bytes());
            }
            iovecs.push_frame(header, IoVec::own(head));
            if !tail.is_empty() {
                iovecs.push_own(tail);
            }
        }
        Some(Burst { buffers: iovecs.as_slice(), frames: &frames[..count] })
    }
    fn consume(&mut self, n: usize) {
        self.made += n as u64;
    }
    fn receive(&mut self, buffers: &[IoVec<'_>]) -> Result<usize, ReceiveError> {
        // SAFETY: buffers that are received into are guest memory, or ours and borrowed mutably.
        unsafe { receive_first(self, buffers) }
    }
}

/// A UDP datagram between addresses for benchmarks (RFC 2544), `len` bytes with its link header; no byte of its payload
/// is 0, but for the number.
fn udp_frame(len: u16) -> Vec<u8> {
    let mut frame = vec![0x55; usize::from(len)];
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
    let mut ip = [0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 198, 18, 0, 1, 198, 18, 0, 2];
    ip[2..4].copy_from_slice(&(len - 14).to_be_bytes());
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    ip[10..12].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
    frame[14..34].copy_from_slice(&ip);
    // Ports 9 (discard); no checksum.
    let length = (len - 34).to_be_bytes();
    frame[34..NUMBER].copy_from_slice(&[0, 9, 0, 9, length[0], length[1], 0, 0]);
    frame
}
