//! Uplinks: where a port's packets go.
//!
//! Lives here: the two small traits between a port and its uplink, and the engines (`tap`, `xdp`, `peer`,
//! `null`). Not here: virtqueues and headers (`virtq`, `net`).
//!
//! An [`Uplink`] is the device as a whole: probed once, configured from the control helper thread, since its
//! calls may sleep. Its [`UplinkQueue`]s, one a queue pair, move to the workers that serve the pairs and
//! never sleep.

mod burst_ring;
#[cfg(test)]
pub(crate) mod netlab;
pub mod null;
pub mod peer;
#[cfg(test)]
mod steering_tests;
pub mod tap;
mod tap_queue;
pub mod tap_steering;
#[cfg(test)]
mod tap_tests;
#[cfg(test)]
pub(crate) mod testing;
pub mod xdp;

use crate::memory::{IoVec, scatter_each};
use crate::net::counters::PairCounters;
use crate::worker::Direction;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// What an uplink was probed to do.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    /// The virtio-net offload features (`VIRTIO_NET_F_*` bit mask) that the uplink can honour.
    pub offloads: u64,
    /// Largest layer-3 packet, bytes.
    pub mtu: u16,
}

/// How frames look on an uplink: what the driver has acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameFormat {
    /// Bytes of virtio-net header before each frame: 10 or 12 (VIRTIO 1.3 §5.1.6).
    pub header_len: usize,
    /// Acknowledged virtio features.
    pub features: u64,
}

/// Why a frame was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// No room now: try again when the uplink is writable.
    #[error("the uplink is full")]
    Full,
    /// This frame cannot be sent (the kernel found its header or length bad).
    #[error("the uplink refused the frame: {0}")]
    Rejected(io::Error),
    /// The interface is down or gone: nothing can be sent now.
    #[error("the uplink is down: {0}")]
    Down(io::Error),
    /// The frame's source address is not the port's, and only that may send.
    #[error("the frame's source address is not the port's")]
    Spoofed,
    /// Guest memory behind the frame is gone (its file was truncated).
    #[error("guest memory cannot be read")]
    MemoryFault,
}

/// Why nothing was received.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// No frame waits.
    #[error("no frame waits")]
    Empty,
    /// The interface is down or gone.
    #[error("the uplink is down: {0}")]
    Down(io::Error),
    /// Guest memory behind the buffers is gone (its file was truncated). A frame is lost.
    #[error("guest memory cannot be written")]
    MemoryFault,
}

/// What to do after a wake-up has ended.
#[derive(Debug)]
pub enum Woken {
    /// Nothing more.
    Done,
    /// Wake it again: frames are left, and some were taken.
    Again,
    /// Wake it again after a pause: none were taken.
    After(Duration),
    /// The uplink cannot be used any more.
    Down(io::Error),
}

/// Frames to be sent one after the other.
pub struct Burst<'a> {
    /// The buffers of all frames.
    pub buffers: &'a [IoVec<'a>],
    /// Which of them belong to each frame.
    pub frames: &'a [Range<usize>],
}

impl<'a> Burst<'a> {
    /// Each frame's buffers: virtio-net header (our own copy), then the Ethernet frame.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &'a [IoVec<'a>]> {
        let Self { buffers, frames } = *self;
        frames.iter().map(|frame| &buffers[frame.clone()])
    }
}

/// Sends frame by frame, up to the first that finds no room.
fn send_each<'a>(
    burst: &Burst<'a>,
    outcomes: &mut Vec<Result<(), SendError>>,
    mut send: impl FnMut(&'a [IoVec<'a>]) -> Result<(), SendError>,
) {
    for frame in burst.iter() {
        match send(frame) {
            Err(SendError::Full) => return,
            outcome => outcomes.push(outcome),
        }
    }
}

/// [`UplinkQueue::receive`] of an uplink that has [`UplinkQueue::frames`].
///
/// # Safety
/// The buffers must be memory that may be written, as for [`scatter_each`].
unsafe fn receive_first(uplink: &mut dyn UplinkQueue, buffers: &[IoVec<'_>]) -> Result<usize, ReceiveError> {
    let burst = uplink.frames(1).ok_or(ReceiveError::Empty)?;
    let frame = burst.iter().next().ok_or(ReceiveError::Empty)?;
    // SAFETY: the caller's promise.
    let len = unsafe { scatter_each(buffers, frame) };
    uplink.consume(1);
    Ok(len)
}

/// An uplink as a whole. All calls but `capabilities`, `describe`, `announce`, `front_end_left` and `report` may sleep.
pub trait Uplink: Send + Sync {
    /// The uplink in the operator's words, e.g. `tap:vm1`.
    fn describe(&self) -> &str;
    /// What it was probed to do.
    fn capabilities(&self) -> Capabilities;
    /// Sets header length and offloads for all queues.
    ///
    /// # Errors
    /// What the kernel says.
    fn configure(&self, format: FrameFormat) -> io::Result<()>;
    /// Sets the largest layer-3 packet.
    ///
    /// # Errors
    /// What the kernel says.
    fn set_mtu(&self, mtu: u16) -> io::Result<()>;
    /// Lets a queue take part in the uplink's receive steering, or takes it out.
    ///
    /// # Errors
    /// What the kernel says.
    fn set_queue_active(&self, queue: u16, active: bool) -> io::Result<()>;
    /// Sends one plain Ethernet frame, without header; never sleeps. Used for announcements (RARP).
    ///
    /// # Errors
    /// What the kernel says.
    fn announce(&self, frame: &[u8]) -> io::Result<()>;
    /// The front-end is gone; the next one may be another guest.
    fn front_end_left(&self) {}
    /// What the uplink counts by itself, as words for the port's summary: `name=number …`.
    fn report(&self) -> String {
        String::new()
    }
}

/// One queue of an uplink, owned by the worker that serves its queue pair. Nothing here sleeps.
pub trait UplinkQueue: Send {
    /// The descriptors of which one turns readable when a frame waits; always the same.
    fn readable(&self) -> &[Arc<OwnedFd>];
    /// Whether it wakes whoever listens for each frame, so that a stream of them is better looked at by the clock.
    fn wakes_often(&self) -> bool {
        false
    }
    /// The descriptor that turns writable when there is room again. Without one, [`Self::wake`] and time bring room.
    fn writable(&self) -> Option<&Arc<OwnedFd>> {
        self.readable().first()
    }
    /// Where to count what only the uplink knows. Told once, before anything else.
    fn count_into(&mut self, _counters: &Arc<PairCounters>) {}
    /// Largest layer-3 packet at the moment, bytes.
    fn mtu(&self) -> u16 {
        u16::MAX
    }
    /// Sends one frame: virtio-net header (our own copy), then the Ethernet frame.
    ///
    /// # Errors
    /// See [`SendError`]; after `Full` the same frame may be offered again.
    fn send(&mut self, frame: &[IoVec<'_>]) -> Result<(), SendError>;
    /// Sends the frames of a burst in their order and appends an outcome for each. Fewer outcomes than frames mean
    /// that the uplink is full: the rest may be offered again when it is writable.
    fn send_burst(&mut self, burst: &Burst<'_>, outcomes: &mut Vec<Result<(), SendError>>) {
        send_each(burst, outcomes, |frame| self.send(frame));
    }
    /// Whether a frame waits, as far as that can be seen at the price of a load or two, without a system call; what cannot be
    /// seen turns a descriptor readable, too. `None`, always: nothing can be seen.
    fn peek(&mut self) -> Option<bool> {
        None
    }
    /// The frames that wait, as many as `max`, where the uplink has them in memory: for each a virtio-net header of zeros, then
    /// the Ethernet frame. They stay until [`Self::consume`]. `None`: it has not, and each is to be received by itself.
    fn frames(&mut self, _max: usize) -> Option<Burst<'_>> {
        None
    }
    /// The first `n` of [`Self::frames`] have been taken.
    fn consume(&mut self, _n: usize) {}
    /// Receives one frame, header first, into the buffers in their order. Returns its length in bytes, header
    /// included; a frame longer than the buffers is cut off.
    ///
    /// # Errors
    /// See [`ReceiveError`].
    fn receive(&mut self, buffers: &[IoVec<'_>]) -> Result<usize, ReceiveError>;
    /// Drops what has arrived: nobody receives now, or nobody did so far. Returns how many frames that was.
    fn discard(&mut self) -> u64 {
        0
    }
    /// The socket whose kernel side has to be woken, by a send (transmit) or receive of nothing, before it goes on.
    /// Asked once after each burst.
    fn wake(&mut self, _direction: Direction) -> Option<&Arc<OwnedFd>> {
        None
    }
    /// That has ended.
    fn woken(&mut self, _direction: Direction, _result: &io::Result<()>) -> Woken {
        Woken::Done
    }
    /// One of the descriptors has reported an error.
    ///
    /// # Errors
    /// The uplink cannot be used any more; said once.
    fn check(&mut self) -> io::Result<()> {
        Ok(())
    }
}
