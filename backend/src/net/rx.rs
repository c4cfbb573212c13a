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
//! has too few buffers for the rest, the frame is held, and goes on with the guest's next kick.
//! Chains complete in ring order.
#![forbid(unsafe_code)]

use super::counters::PairCounters;
use super::features;
use super::tx::End;
use crate::memory::{AccessError, GuestMemory, IoVecs};
use crate::uplink::{ReceiveError, UplinkQueue};
use crate::virtq::{Chain, PopError, Segment, SplitQueue};
use virtio_bindings::virtio_net as vn;

/// Longest frame an uplink hands over, header included, bytes: a 64 KiB packet with link header and two VLAN
/// tags, rounded up.
pub const SPILL_BYTES: usize = 68 * 1024;
/// Chains that one frame may be spread over (num_buffers is a u16; the ring is the real limit).
const CHAINS_MAX: usize = 1024;
/// Where num_buffers stands in the header, bytes (VIRTIO 1.3 §5.1.6).
const NUM_BUFFERS_OFFSET: u64 = 10;

/// What the driver has acknowledged, as far as the receive path cares.
#[derive(Clone, Copy, Debug)]
pub struct RxSettings {
    /// Bytes of virtio-net header before each frame.
    pub header_len: usize,
    /// True if a frame may be spread over several chains (VIRTIO_NET_F_MRG_RXBUF).
    pub mergeable: bool,
}

impl RxSettings {
    /// From the acknowledged virtio features.
    pub fn new(acked: u64) -> Self {
        Self {
            header_len: features::header_len(acked),
            mergeable: features::has(acked, vn::VIRTIO_NET_F_MRG_RXBUF),
        }
    }
}

/// Buffers that a worker shares between the receive paths of all its pairs.
pub struct Scratch {
    chain: Chain,
    segments: Vec<Segment>,
    heads: Vec<(u16, u64)>,
    spill: Box<[u8]>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            chain: Chain::new(),
            segments: Vec::with_capacity(CHAINS_MAX),
            heads: Vec::with_capacity(CHAINS_MAX),
            spill: vec![0; SPILL_BYTES].into_boxed_slice(),
        }
    }
}

/// A frame that waits for more buffers.
struct Held {
    /// Chains it fills already: head and bytes.
    filled: Vec<(u16, u64)>,
    /// Where its header stands.
    header: Vec<Segment>,
    /// Bytes that have no place yet.
    rest: Vec<u8>,
    /// Length of the frame in bytes, without header.
    frame_len: u64,
}

/// The receive state of one queue pair.
#[derive(Default)]
pub struct Receiver {
    /// Bytes the last frame took, header included: what to offer to the next.
    expect: u64,
    held: Option<Held>,
}

impl Receiver {
    /// Gives up a held frame, so that the ring's base is the first chain that was not completed.
    pub fn abandon(&mut self, ring: &mut SplitQueue, counters: &PairCounters) {
        if let Some(held) = self.held.take() {
            ring.unpop(held.filled.len() as u16);
            counters.rx_dropped_stopped.add(1);
        }
    }

    /// Moves up to `budget` frames from the uplink to the ring. Used entries are pushed but not published:
    /// the caller publishes and notifies once for the burst. Returns how many chains were used and why it
    /// ended.
    #[allow(clippy::too_many_arguments)]
    pub fn run(
        &mut self,
        ring: &mut SplitQueue,
        memory: &GuestMemory,
        uplink: &mut dyn UplinkQueue,
        scratch: &mut Scratch,
        settings: RxSettings,
        counters: &PairCounters,
        budget: u32,
    ) -> (u32, End) {
        let mut used = 0;
        let mut frames = 0;
        let end = loop {
            if self.held.is_some() {
                match self.place_rest(ring, memory, scratch, counters, settings) {
                    Ok(n) => used += n,
                    Err(end) => break end,
                }
                continue;
            }
            if frames >= budget {
                break End::Budget;
            }
            match self.one(ring, memory, uplink, scratch, settings, counters) {
                Ok(n) => {
                    used += n;
                    frames += 1;
                }
                Err(end) => break end,
            }
        };
        (used, end)
    }

    /// Receives one frame; returns how many chains it completed.
    #[inline]
    fn one(
        &mut self,
        ring: &mut SplitQueue,
        memory: &GuestMemory,
        uplink: &mut dyn UplinkQueue,
        scratch: &mut Scratch,
        settings: RxSettings,
        counters: &PairCounters,
    ) -> Result<u32, End> {
        let Scratch { chain, segments, heads, spill } = scratch;
        segments.clear();
        heads.clear();
        let want = if settings.mergeable { self.expect.max(1) } else { 1 };
        let mut refused = 0;
        let mut capacity = 0;
        while capacity < want && heads.len() < CHAINS_MAX {
            match take_chain(ring, memory, chain, counters, heads.is_empty(), settings) {
                Ok(Taken::Chain) => {
                    capacity += chain.writable_len();
                    heads.push((chain.head(), chain.writable_len()));
                    segments.extend_from_slice(chain.writable());
                }
                Ok(Taken::Refused) => refused += 1,
                Ok(Taken::None) if heads.is_empty() => {
                    return if refused > 0 { Ok(refused) } else { Err(End::NoBuffers) };
                }
                Ok(Taken::None) => break,
                Err(end) => {
                    ring.unpop(heads.len() as u16);
                    return Err(end);
                }
            }
        }
        let received = {
            let mut iovecs = IoVecs::new();
            let mut pushed = Ok(());
            for segment in segments.iter() {
                pushed = pushed.and_then(|()| memory.push_iovecs(segment.gpa, segment.len, &mut iovecs));
            }
            if let Err(error) = pushed {
                ring.unpop(heads.len() as u16);
                match error {
                    AccessError::Missing(range) => return Err(End::Parked(range)),
                    // `take_chain` has checked the range: more pieces than one call takes. Offer fewer.
                    _ if heads.len() > 1 => {
                        self.expect = 0;
                        return Ok(refused);
                    }
                    _ => {
                        // One chain with more pieces than a call takes: refuse it.
                        counters.rx_bad_chains.add(1);
                        ring.pop(memory, chain).map_err(pop_end)?;
                        ring.push(chain.head(), 0);
                        return Ok(refused + 1);
                    }
                }
            }
            iovecs.push_own_mut(&mut spill[..]);
            uplink.receive(iovecs.as_slice())
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
        if len > capacity && !settings.mergeable {
            ring.unpop(1);
            counters.rx_dropped_too_long.add(1);
            return Ok(refused);
        }
        self.expect = len;
        let frame_len = len.saturating_sub(settings.header_len as u64);
        if len > capacity {
            self.held = Some(Held {
                filled: heads.clone(),
                header: head_segments(segments, settings.header_len as u64),
                rest: spill[..(len - capacity) as usize].to_vec(),
                frame_len,
            });
            return Ok(refused);
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
        finish_header(memory, segments, settings, buffers as u16);
        counters.rx_packets.add(1);
        counters.rx_bytes.add(frame_len);
        Ok(refused + buffers as u32)
    }

    /// Finds place for the rest of a held frame; completes it when all has one.
    fn place_rest(
        &mut self,
        ring: &mut SplitQueue,
        memory: &GuestMemory,
        scratch: &mut Scratch,
        counters: &PairCounters,
        settings: RxSettings,
    ) -> Result<u32, End> {
        let Some(held) = self.held.as_mut() else { return Ok(0) };
        let chain = &mut scratch.chain;
        while !held.rest.is_empty() {
            match ring.pop(memory, chain) {
                Ok(true) => {}
                Ok(false) => return Err(End::NoBuffers),
                Err(PopError::Bad { head, .. }) => {
                    // Ring order: the chain completes with the frame, as a part of no bytes.
                    counters.rx_bad_chains.add(1);
                    held.filled.push((head, 0));
                    continue;
                }
                Err(error) => return Err(pop_end(error)),
            }
            let mut at = 0;
            for segment in chain.writable() {
                let take = (held.rest.len() - at).min(segment.len as usize);
                match memory.write(segment.gpa, &held.rest[at..at + take]) {
                    Ok(()) => at += take,
                    Err(AccessError::Missing(range)) => {
                        ring.unpop(1);
                        return Err(End::Parked(range));
                    }
                    Err(_) => break,
                }
            }
            held.filled.push((chain.head(), at as u64));
            held.rest.drain(..at);
        }
        let Some(held) = self.held.take() else { return Ok(0) };
        for (head, filled) in &held.filled {
            ring.push(*head, *filled as u32);
        }
        finish_header(memory, &held.header, settings, held.filled.len() as u16);
        counters.rx_packets.add(1);
        counters.rx_bytes.add(held.frame_len);
        Ok(held.filled.len() as u32)
    }
}

enum Taken {
    Chain,
    Refused,
    None,
}

/// Takes the next usable chain off the ring into `chain`; a bad one is completed empty.
fn take_chain(
    ring: &mut SplitQueue,
    memory: &GuestMemory,
    chain: &mut Chain,
    counters: &PairCounters,
    first: bool,
    settings: RxSettings,
) -> Result<Taken, End> {
    let needed = if first { settings.header_len as u64 } else { 1 };
    let head = match ring.pop(memory, chain) {
        Ok(true) if chain.writable_len() >= needed => return Ok(Taken::Chain),
        Ok(true) => chain.head(),
        Ok(false) => return Ok(Taken::None),
        Err(PopError::Bad { head, why }) => {
            tracing::debug!(head, %why, "receive chain refused");
            head
        }
        Err(error) => return Err(pop_end(error)),
    };
    if !first {
        // Completed in its turn, when it is the first: ring order.
        ring.unpop(1);
        return Ok(Taken::None);
    }
    counters.rx_bad_chains.add(1);
    ring.push(head, 0);
    Ok(Taken::Refused)
}

fn pop_end(error: PopError) -> End {
    match error {
        PopError::Missing(range) => End::Parked(range),
        PopError::Broken(error) => End::Broken(error),
        // Callers deal with it before; a bad chain that shows up here has been looked at once more.
        PopError::Bad { .. } => End::NoBuffers,
    }
}

/// Sets num_buffers (VIRTIO 1.3 §5.1.6.4.1), which the uplink leaves open.
fn finish_header(memory: &GuestMemory, segments: &[Segment], settings: RxSettings, buffers: u16) {
    if settings.header_len as u64 <= NUM_BUFFERS_OFFSET {
        return;
    }
    let bytes = buffers.to_le_bytes();
    let mut at = 0;
    for segment in segments {
        let end = at + u64::from(segment.len);
        for (i, byte) in bytes.iter().enumerate() {
            let offset = NUM_BUFFERS_OFFSET + i as u64;
            if i == 0 && offset >= at && offset + 2 <= end {
                // The usual case: both bytes in one piece. The range was checked and present a moment ago.
                let _ = memory.write(segment.gpa + offset - at, &bytes);
                return;
            }
            if (at..end).contains(&offset) {
                let _ = memory.write(segment.gpa + offset - at, &[*byte]);
            }
        }
        at = end;
        if at >= NUM_BUFFERS_OFFSET + 2 {
            return;
        }
    }
}

/// The pieces that hold the first `len` bytes.
fn head_segments(segments: &[Segment], len: u64) -> Vec<Segment> {
    let mut at = 0;
    segments
        .iter()
        .take_while(|segment| {
            let before = at;
            at += u64::from(segment.len);
            before < len
        })
        .copied()
        .collect()
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
