//! Received frames that did not fit into the chains that were offered: the rest is copied to further ones, and a
//! frame is held while there are none. Also the end of every received frame: its num_buffers and its counters.
//! Not here: how frames are read (`rx`).
#![forbid(unsafe_code)]

use super::counters::PairCounters;
use super::rx::RxSettings;
use super::tx::End;
use crate::memory::{AccessError, GuestMemory};
use crate::virtq::{Chain, PopError, Queue, Segment};

/// Bad chains that one frame steps over before others have their turn; each can cost a walk over 1024 descriptors.
const REFUSED_MAX: u32 = 8;
/// Where num_buffers stands in the header, bytes (VIRTIO 1.3 §5.1.6).
const NUM_BUFFERS_OFFSET: u64 = 10;

/// A frame of which a part has its place in the guest. Its memory is used again for the next one.
#[derive(Default)]
pub(super) struct Held {
    /// Chains it fills already: head and bytes.
    pub(super) filled: Vec<(u16, u64)>,
    /// Where its header stands.
    pub(super) header: Vec<Segment>,
    /// Bytes that had no place yet when it came to wait...
    pub(super) rest: Vec<u8>,
    /// ... and how many of them have one by now.
    pub(super) placed: usize,
    /// Length of the frame in bytes, without header.
    pub(super) frame_len: u64,
    /// It waits for more buffers.
    pub(super) waits: bool,
}

/// What the steps of the receive path share.
pub(super) struct Context<'a> {
    pub(super) ring: &'a mut Queue,
    pub(super) memory: &'a GuestMemory,
    pub(super) counters: &'a PairCounters,
    pub(super) settings: RxSettings,
    /// Chains pushed in this burst.
    pub(super) used: u32,
    /// Bytes of frames in this burst.
    pub(super) bytes: u64,
}

impl Held {
    /// A frame of `frame_len` bytes has filled the chains `heads` with their pieces `segments`, and is not whole.
    pub(super) fn begin(
        &mut self,
        heads: &[(u16, u64)],
        segments: &[Segment],
        header_len: u64,
        frame_len: u64,
    ) {
        self.filled.clear();
        self.filled.extend_from_slice(heads);
        self.header.clear();
        self.header.extend(head_segments(segments, header_len));
        self.frame_len = frame_len;
        self.waits = true;
    }

    /// Finds place for `rest` from `placed` on; completes the frame when all has one.
    pub(super) fn place(
        &mut self,
        context: &mut Context<'_>,
        chain: &mut Chain,
        rest: &[u8],
        placed: &mut usize,
    ) -> Result<(), End> {
        let mut refused = 0;
        while *placed < rest.len() {
            match context.ring.pop(context.memory, chain) {
                Ok(true) => {}
                Ok(false) if self.filled.len() >= context.ring.size().into() => {
                    // All the buffers this ring can have, and still too few: nobody will kick.
                    context.ring.unpop(self.filled.len() as u16);
                    context.counters.rx_dropped_too_long.add(1);
                    self.waits = false;
                    return Ok(());
                }
                Ok(false) => return Err(End::NoBuffers),
                Err(PopError::Bad { head, .. }) => {
                    // Ring order: the chain completes with the frame, as a part of no bytes.
                    context.counters.rx_bad_chains.add(1);
                    self.filled.push((head, 0));
                    refused += 1;
                    if refused == REFUSED_MAX {
                        return Err(End::Budget); // a ring full of bad chains must not take the turn
                    }
                    continue;
                }
                Err(PopError::Missing(range)) => return Err(End::Parked(range)),
                Err(PopError::Broken(error)) => return Err(End::Broken(error)),
            }
            let mut at = *placed;
            let mut bad = chain.writable_len() == 0;
            for segment in chain.writable() {
                let take = (rest.len() - at).min(segment.len as usize);
                match context.memory.write(segment.gpa, &rest[at..at + take]) {
                    Ok(()) => at += take,
                    Err(AccessError::Missing(range)) => {
                        // What was written of this chain is written again.
                        context.ring.unpop(1);
                        return Err(End::Parked(range));
                    }
                    Err(_) => {
                        bad = true;
                        break;
                    }
                }
                if at == rest.len() {
                    break;
                }
            }
            if bad {
                context.counters.rx_bad_chains.add(1);
            }
            self.filled.push((chain.head(), (at - *placed) as u64));
            *placed = at;
        }
        for (head, filled) in &self.filled {
            context.ring.push(*head, *filled as u32);
        }
        finish_header(context.memory, &self.header, context.settings, self.filled.len() as u16);
        context.delivered(self.filled.len() as u32, self.frame_len);
        self.waits = false;
        Ok(())
    }
}

impl Context<'_> {
    /// A frame of `frame_len` bytes went out in so many chains.
    #[inline]
    pub(super) fn delivered(&mut self, chains: u32, frame_len: u64) {
        self.used += chains;
        self.bytes += frame_len;
        self.counters.rx_packets.add(1);
        self.counters.rx_bytes.add(frame_len);
    }

    /// Completes a chain, the only one in work, without bytes.
    pub(super) fn refuse(&mut self, head: u16) {
        self.counters.rx_bad_chains.add(1);
        self.ring.push(head, 0);
        self.used += 1;
    }
}

/// Sets num_buffers (VIRTIO 1.3 §5.1.6.4.1), which the uplink leaves open.
pub(super) fn finish_header(memory: &GuestMemory, segments: &[Segment], settings: RxSettings, buffers: u16) {
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
fn head_segments(segments: &[Segment], len: u64) -> impl Iterator<Item = Segment> + '_ {
    let mut at = 0;
    segments.iter().copied().take_while(move |segment| {
        let before = at;
        at += u64::from(segment.len);
        before < len
    })
}
