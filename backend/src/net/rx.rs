//! The receive path: frames from the uplink into the guest's ring.
//!
//! ```text
//!  frame on the uplink   [ header | ........................ frame ........................ ]
//!  readv(2)              [ chain 0 ][ chain 1 ] ... as many as the last frame took  [ spill ]
//!  used ring             (head 0, len)(head 1, len) ...; num_buffers = how many     └─ copied on
//! ```
//! Guest buffers are the iovecs. How long the next frame is cannot be known before it is read, so as many
//! chains are offered as the last frame took, and behind them a buffer of our own, the *spill*. What lands
//! there is copied to further chains; only the first frame of a run of large ones pays for that. If the guest
//! has too few buffers for the rest, the frame is held, and goes on with the guest's next kick. One that a ring
//! of that size can never take is dropped: nobody would kick any more.
//! Chains complete in ring order.
#![forbid(unsafe_code)]

use super::counters::PairCounters;
use super::deliver;
use super::features;
use super::held::{Context, Held, finish_header};
use super::tx::{BURST_BYTES, End};
use crate::memory::{AccessError, GuestMemory, IoVecStorage, IoVecs, MAX_IOVECS};
use crate::uplink::{ReceiveError, UplinkQueue};
use crate::virtq::{Chain, PopError, Queue, Segment};
use virtio_bindings::virtio_net as vn;

/// Longest frame an uplink hands over, header included, bytes: a 64 KiB packet with link header and two VLAN
/// tags, rounded up.
pub const SPILL_BYTES: usize = 68 * 1024;
/// Chains that one frame may be spread over (num_buffers is a u16; the ring is the real limit).
const CHAINS_MAX: usize = 1024;
/// Guest pieces that one frame may be received into: what a call takes, less the spill.
const PIECES_MAX: usize = MAX_IOVECS - 1;
/// How many chains ahead of the next one buffers are asked for.
const AHEAD: u16 = 4;
/// Link header and two VLAN tags, bytes.
const LINK_BYTES: u64 = 14 + 8;

/// What the driver has acknowledged, as far as the receive path cares.
#[derive(Clone, Copy, Debug)]
pub struct RxSettings {
    /// Bytes of virtio-net header before each frame.
    pub header_len: usize,
    /// True if a frame may be spread over several chains (VIRTIO_NET_F_MRG_RXBUF).
    pub mergeable: bool,
    /// True if frames may be larger than the MTU (segmentation offloads towards the guest).
    pub large: bool,
}

impl RxSettings {
    /// From the acknowledged virtio features.
    pub fn new(acked: u64) -> Self {
        Self {
            header_len: features::header_len(acked),
            mergeable: features::has(acked, vn::VIRTIO_NET_F_MRG_RXBUF),
            large: features::large_receive(acked),
        }
    }
}

/// Buffers that a worker shares between the receive paths of all its pairs.
pub struct Scratch {
    chain: Chain,
    segments: Vec<Segment>,
    heads: Vec<(u16, u64)>,
    iovecs: IoVecStorage,
    spill: Box<[u8]>,
    deliver: deliver::Scratch,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            chain: Chain::new(),
            segments: Vec::with_capacity(CHAINS_MAX),
            heads: Vec::with_capacity(CHAINS_MAX),
            iovecs: IoVecStorage::default(),
            spill: vec![0; SPILL_BYTES].into_boxed_slice(),
            deliver: deliver::Scratch::default(),
        }
    }
}

/// The receive state of one queue pair.
#[derive(Default)]
pub struct Receiver {
    /// Bytes the last frame took, header included: what to offer to the next.
    expect: u64,
    /// The uplink had a frame longer than its MTU: buffers are never offered without the spill any more.
    surprised: bool,
    held: Held,
    kept: deliver::Kept,
}

impl Receiver {
    /// Gives up a held frame, so that the ring's base is the first chain that was not completed.
    pub fn abandon(&mut self, ring: &mut Queue, counters: &PairCounters) {
        self.kept.release(ring);
        if std::mem::take(&mut self.held.waits) {
            ring.unpop(self.held.filled.len() as u16);
            counters.rx_dropped_stopped.add(1);
        }
    }

    /// What a burst from memory keeps of the ring (`deliver`).
    pub fn kept(&mut self) -> &mut deliver::Kept {
        &mut self.kept
    }

    /// True if a frame waits for more buffers: then there is work without the uplink having any.
    pub fn holds_frame(&self) -> bool {
        self.held.waits
    }

    /// Moves up to `budget` frames from the uplink to the ring. Used entries are pushed but not published:
    /// the caller publishes and notifies once for the burst. Returns how many chains were used and why it
    /// ended.
    #[allow(clippy::too_many_arguments)]
    pub fn run(
        &mut self,
        ring: &mut Queue,
        memory: &GuestMemory,
        uplink: &mut dyn UplinkQueue,
        scratch: &mut Scratch,
        settings: RxSettings,
        counters: &PairCounters,
        budget: u32,
    ) -> (u32, End) {
        self.kept.release(ring);
        if let Some(moved) = self.run_bursts(ring, memory, uplink, scratch, settings, counters, budget) {
            return moved;
        }
        let mut context = Context { ring, memory, counters, settings, used: 0, bytes: 0 };
        let mut frames = 0;
        let end = loop {
            let step = if self.held.waits {
                self.resume(&mut context, &mut scratch.chain)
            } else if frames >= budget || context.bytes >= BURST_BYTES {
                Err(End::Budget)
            } else {
                frames += 1;
                self.one(&mut context, uplink, scratch)
            };
            if let Err(end) = step {
                break end;
            }
        };
        (context.used, end)
    }

    /// The same for an uplink that has its frames in memory: they are copied, burst by burst.
    #[allow(clippy::too_many_arguments)]
    #[inline]
    fn run_bursts(
        &mut self,
        ring: &mut Queue,
        memory: &GuestMemory,
        uplink: &mut dyn UplinkQueue,
        scratch: &mut Scratch,
        settings: RxSettings,
        counters: &PairCounters,
        budget: u32,
    ) -> Option<(u32, End)> {
        let (mut frames, mut used) = (0, 0);
        loop {
            let burst = uplink.frames((budget - frames) as usize)?;
            let count = burst.frames.len();
            if count == 0 {
                return Some((used, End::Idle));
            }
            let done =
                deliver::run(ring, memory, &mut self.kept, &mut scratch.deliver, settings, counters, &burst);
            uplink.consume(done.frames);
            used += done.used;
            frames += done.frames as u32;
            if let Some(end) = done.end {
                return Some((used, end));
            }
            if frames >= budget {
                return Some((used, End::Budget));
            }
        }
    }

    /// Receives one frame, or only refuses what cannot take one.
    #[inline]
    fn one(
        &mut self,
        context: &mut Context<'_>,
        uplink: &mut dyn UplinkQueue,
        scratch: &mut Scratch,
    ) -> Result<(), End> {
        let capacity = self.gather(context, scratch)?;
        let Scratch { chain, segments, heads, iovecs, spill, .. } = scratch;
        let Context { ring, memory, counters, settings, .. } = context;
        if heads.is_empty() {
            return Ok(());
        }
        // A single buffer that any frame fits into needs no spill, and so no list of buffers.
        let frame_max = settings.header_len as u64 + u64::from(uplink.mtu()) + LINK_BYTES;
        let alone = segments.len() == 1 && capacity > frame_max && !settings.large && !self.surprised;
        let received = {
            let iovecs = iovecs.begin();
            offer(memory, segments, iovecs).map(|()| {
                if !alone {
                    iovecs.push_own_mut(spill);
                }
                uplink.receive(iovecs.as_slice())
            })
        };
        let received = match received {
            Ok(received) => received,
            Err(AccessError::Missing(range)) => {
                ring.unpop(heads.len() as u16);
                return Err(End::Parked(range));
            }
            // The bad one (outside guest memory, or in too many pieces) may come later: offer only the first.
            Err(_) if heads.len() > 1 => {
                ring.unpop(heads.len() as u16);
                self.expect = 0;
                return Ok(());
            }
            Err(_) => {
                context.refuse(heads[0].0);
                return Ok(());
            }
        };
        let len = match received {
            Ok(len) => len as u64,
            Err(error) => {
                ring.unpop(heads.len() as u16);
                return Err(match error {
                    ReceiveError::Empty => End::Idle,
                    ReceiveError::Down(error) => End::UplinkDown(error.to_string()),
                    ReceiveError::MemoryFault => End::MemoryFault,
                });
            }
        };
        // Logged whatever becomes of the frame: the kernel has written there.
        mark_written(memory, segments, len.min(capacity));
        // Filled to the brim: somebody has raised the MTU, and this frame was cut off.
        self.surprised |= alone && len == capacity;
        if (len > capacity && !settings.mergeable) || (alone && len == capacity) {
            ring.unpop(1);
            counters.rx_dropped_too_long.add(1);
            return Ok(());
        }
        self.expect = len;
        let frame_len = len.saturating_sub(settings.header_len as u64);
        if len > capacity {
            self.held.begin(heads, segments, settings.header_len as u64, frame_len);
            let rest = &spill[..(len - capacity) as usize];
            let mut placed = 0;
            let result = self.held.place(context, chain, rest, &mut placed);
            if self.held.waits {
                self.held.placed = 0;
                self.held.rest.clear();
                self.held.rest.extend_from_slice(&rest[placed..]);
            }
            return result;
        }
        let mut left = len;
        let mut buffers = 0;
        for (head, chain_len) in heads.iter() {
            let filled = left.min(*chain_len);
            ring.push(*head, filled as u32);
            left -= filled;
            buffers += 1;
            if left == 0 {
                break;
            }
        }
        ring.unpop((heads.len() - buffers) as u16);
        finish_header(memory, segments, *settings, buffers as u16);
        context.delivered(buffers as u32, frame_len);
        Ok(())
    }

    /// Takes as many chains off the ring as the next frame may need; returns the bytes they hold.
    #[inline]
    fn gather(&mut self, context: &mut Context<'_>, scratch: &mut Scratch) -> Result<u64, End> {
        let Scratch { chain, segments, heads, .. } = scratch;
        segments.clear();
        heads.clear();
        let want = if context.settings.mergeable { self.expect.max(1) } else { 1 };
        let mut capacity = 0;
        context.ring.prefetch_buffer(context.memory, AHEAD);
        while capacity < want && heads.len() < CHAINS_MAX {
            match take_chain(context, chain, heads.is_empty()) {
                Ok(Taken::Chain)
                    if heads.is_empty() || segments.len() + chain.writable().len() <= PIECES_MAX =>
                {
                    capacity += chain.writable_len();
                    heads.push((chain.head(), chain.writable_len()));
                    Segment::append(segments, chain.writable());
                }
                Ok(Taken::Chain) => {
                    context.ring.unpop(1);
                    break;
                }
                // One step of the burst's budget: a ring full of bad chains must not take the turn.
                Ok(Taken::Refused) => return Ok(0),
                Ok(Taken::None) if heads.is_empty() => return Err(End::NoBuffers),
                Ok(Taken::None) => break,
                Err(end) => {
                    context.ring.unpop(heads.len() as u16);
                    return Err(end);
                }
            }
        }
        Ok(capacity)
    }

    /// Goes on with a frame that waits.
    fn resume(&mut self, context: &mut Context<'_>, chain: &mut Chain) -> Result<(), End> {
        let rest = std::mem::take(&mut self.held.rest);
        let mut placed = self.held.placed;
        let result = self.held.place(context, chain, &rest, &mut placed);
        self.held.placed = placed;
        self.held.rest = rest;
        result
    }
}

/// Offers guest memory to a call that has room for one more piece.
#[inline]
fn offer<'m>(
    memory: &'m GuestMemory,
    segments: &[Segment],
    iovecs: &mut IoVecs<'m>,
) -> Result<(), AccessError> {
    for segment in segments {
        // No frame is longer, and in postcopy every page that is offered must have come.
        memory.push_iovecs(segment.gpa, segment.len.min(SPILL_BYTES as u32), iovecs)?;
    }
    // More and the kernel refuses the call (EINVAL).
    if iovecs.len() > PIECES_MAX { Err(AccessError::Full) } else { Ok(()) }
}

enum Taken {
    Chain,
    Refused,
    None,
}

/// Takes the next usable chain off the ring into `chain`; a bad one is completed empty.
#[inline]
fn take_chain(context: &mut Context<'_>, chain: &mut Chain, first: bool) -> Result<Taken, End> {
    let needed = if first { context.settings.header_len as u64 } else { 1 };
    let head = match context.ring.pop(context.memory, chain) {
        Ok(true) if chain.writable_len() >= needed => return Ok(Taken::Chain),
        Ok(true) => chain.head(),
        Ok(false) => return Ok(Taken::None),
        Err(PopError::Bad { head, why }) => {
            tracing::debug!(head, %why, "receive chain refused");
            head
        }
        Err(PopError::Missing(range)) => return Err(End::Parked(range)),
        Err(PopError::Broken(error)) => return Err(End::Broken(error)),
    };
    if !first {
        // Completed in its turn, when it is the first: ring order.
        context.ring.unpop(1);
        return Ok(Taken::None);
    }
    context.refuse(head);
    Ok(Taken::Refused)
}

fn mark_written(memory: &GuestMemory, segments: &[Segment], mut len: u64) {
    if memory.log().is_none() {
        return;
    }
    for segment in segments {
        let part = len.min(segment.len.into());
        memory.mark_written(segment.gpa, part as u32);
        len -= part;
        if len == 0 {
            return;
        }
    }
}
