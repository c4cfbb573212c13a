//! One direction of a port: what is done with a ring's used buffers, burst by burst.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;

use anyhow::Result;

use crate::driver::{BURST_MAX, Buffer, Buffers, Ring, RingError, Used};
use crate::session::Events;

/// A burst of used buffers is waited for over so many looks; after that, what is there is taken.
const LOOKS: u32 = 16;
/// Where the driver writes into what it sends if it touches only the first line: behind virtio-net and Ethernet headers.
const TOUCH_AT: u64 = 32;

/// A ring with its buffers.
struct Lane<R> {
    ring: R,
    buffers: Buffers,
    events: Events,
    burst: u16,
    looks: u32,
    used: [Used; BURST_MAX],
    kicks: u64,
}

impl<R: Ring> Lane<R> {
    fn new(ring: R, buffers: Buffers, events: Events) -> Self {
        let used = [Used::default(); BURST_MAX];
        Self { ring, buffers, events, burst: BURST_MAX as u16 / 2, looks: 0, used, kicks: 0 }
    }

    /// Takes used buffers, preferably whole bursts: to look at few at a time is to take the line from the device while it
    /// writes it.
    #[inline(always)]
    fn take(&mut self) -> Result<usize, RingError> {
        if !self.ring.ready(self.burst.min(self.ring.in_flight().max(1))) {
            self.looks += 1;
            if self.looks < LOOKS {
                return Ok(0);
            }
        }
        self.looks = 0;
        self.ring.take(&mut self.used)
    }

    #[inline(always)]
    fn expose(&mut self) {
        if self.ring.expose() {
            self.kicks += 1;
            // Full means that the device has been told already.
            let _ = nix::unistd::write(self.events.kick.as_fd(), &1u64.to_ne_bytes());
        }
    }

    fn errors(&self) -> u64 {
        self.events.err.read().unwrap_or(0)
    }
}

/// What the driver writes into a packet before it sends it again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Touch {
    /// Nothing: the packet stays in the caches where it is
    #[default]
    None,
    /// A word in its first line
    First,
    /// All of it
    All,
}

/// The ring to the device.
pub struct Sender<R> {
    lane: Lane<R>,
    /// Buffers that the device does not have, oldest first.
    free: Vec<u16>,
    first_free: usize,
    len: u32,
    touch: Touch,
    packet: Vec<u8>,
}

impl<R: Ring> Sender<R> {
    /// Sends packets of `len` bytes out of these buffers, which have them already.
    pub fn new(ring: R, buffers: Buffers, events: Events, ring_size: u16, len: u32) -> Self {
        let mut packet = vec![0; len as usize];
        buffers.read(0, &mut packet);
        let lane = Lane::new(ring, buffers, events);
        Self { lane, free: (0..ring_size).collect(), first_free: 0, len, touch: Touch::None, packet }
    }

    /// How the driver behaves.
    pub fn set_manner(&mut self, burst: u16, touch: Touch) {
        self.lane.burst = burst;
        self.touch = touch;
    }

    /// Buffers that could be sent now.
    #[inline(always)]
    pub fn free(&self) -> u16 {
        (self.free.len() - usize::from(self.lane.ring.in_flight())) as u16
    }

    /// Takes back what the device has used; returns how many. `seen` is told of each.
    #[inline(always)]
    pub fn reclaim(&mut self, mut seen: impl FnMut(&Buffers, Used) -> Result<()>) -> Result<usize> {
        let mask = self.free.len() - 1;
        let end = self.first_free + usize::from(self.free());
        let count = self.lane.take()?;
        for (i, &used) in self.lane.used[..count].iter().enumerate() {
            self.free[(end + i) & mask] = used.id;
            seen(&self.lane.buffers, used)?;
        }
        Ok(count)
    }

    /// Sends `count` packets, no more than are free; `fill` may write into each.
    #[inline(always)]
    pub fn send(&mut self, count: usize, mut fill: impl FnMut(&Buffers, u16)) {
        let mask = self.free.len() - 1;
        let lane = &mut self.lane;
        lane.ring.prepare(count as u16);
        for i in 0..count {
            let id = self.free[(self.first_free + i) & mask];
            match self.touch {
                Touch::None => {}
                Touch::First => lane.buffers.set_word(id, TOUCH_AT, i as u64),
                Touch::All => lane.buffers.write(id, &self.packet),
            }
            fill(&lane.buffers, id);
            let address = lane.buffers.guest_address(id);
            lane.ring.post(Buffer { id, address, len: self.len, write: false });
        }
        self.first_free = (self.first_free + count) & mask;
        if count > 0 {
            lane.expose();
        }
    }

    /// Notifications that the device wanted.
    pub fn kicks(&self) -> u64 {
        self.lane.kicks
    }

    /// Errors that the device has signalled.
    pub fn errors(&self) -> u64 {
        self.lane.errors()
    }
}

/// The ring from the device.
pub struct Receiver<R> {
    lane: Lane<R>,
    mergeable: bool,
    /// Buffers that belong to a packet whose beginning was seen.
    more: u16,
    /// Keeps the reading of packets from being left out.
    sample: u64,
}

/// What a look brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Buffers.
    pub buffers: usize,
    /// Packets, counted at their first buffer.
    pub packets: u64,
    /// Bytes, headers included.
    pub bytes: u64,
}

/// A buffer of a packet, as `seen` gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which one, and how long.
    pub used: Used,
    /// Buffers of this packet that come after it.
    pub more: u16,
    /// The first of its packet.
    pub first: bool,
}

impl<R: Ring> Receiver<R> {
    /// Gives the device all buffers.
    pub fn new(ring: R, buffers: Buffers, events: Events, ring_size: u16, mergeable: bool) -> Result<Self> {
        let mut lane = Lane::new(ring, buffers, events);
        for id in 0..ring_size {
            let (address, len) = (lane.buffers.guest_address(id), lane.buffers.len());
            lane.ring.post(Buffer { id, address, len, write: true });
        }
        lane.expose();
        Ok(Self { lane, mergeable, more: 0, sample: 0 })
    }

    /// How the driver behaves.
    pub fn set_manner(&mut self, burst: u16) {
        self.lane.burst = burst;
    }

    /// Receives what is there: looks at the first line of each packet, tells `seen` of each buffer, and gives it back to
    /// the device.
    #[inline(always)]
    pub fn receive(&mut self, mut seen: impl FnMut(&Buffers, Piece) -> Result<()>) -> Result<Received> {
        let count = self.lane.take()?;
        if count == 0 {
            return Ok(Received::default());
        }
        let Lane { ring, buffers, used, .. } = &mut self.lane;
        for used in &used[..count] {
            buffers.prefetch(used.id);
        }
        ring.prepare(count as u16);
        let mut out = Received { buffers: count, ..Received::default() };
        for &used in &used[..count] {
            let first = self.more == 0;
            if first {
                let head = buffers.head(used.id);
                self.sample ^= head.sample;
                self.more = if self.mergeable { head.buffers.saturating_sub(1) } else { 0 };
                out.packets += 1;
            } else {
                self.more -= 1;
            }
            out.bytes += u64::from(used.len);
            seen(buffers, Piece { used, more: self.more, first })?;
            let (address, len) = (buffers.guest_address(used.id), buffers.len());
            ring.post(Buffer { id: used.id, address, len, write: true });
        }
        std::hint::black_box(self.sample);
        self.lane.expose();
        Ok(out)
    }

    /// Notifications that the device wanted.
    pub fn kicks(&self) -> u64 {
        self.lane.kicks
    }

    /// Errors that the device has signalled.
    pub fn errors(&self) -> u64 {
        self.lane.errors()
    }
}
