//! The transmit path: frames from the guest's ring to the uplink.
//!
//! The header is our own checked copy, since the guest can change its own while we look; the frame itself is
//! not copied: its pages are the iovecs. Frames complete in ring order.
//!
//! A batch goes through three passes, each short enough to stay in the cache: chains are taken and their lines asked
//! for (`take`), headers are checked and buffers listed (`assemble`, which hands all to the uplink at once), chains are
//! completed in ring order (`settle`).
#![forbid(unsafe_code)]

use super::counters::PairCounters;
use super::header::{FRAME_LEN_MAX, FRAME_LEN_MIN, HDR_LEN, VirtioNetHdr};
use super::tx_singles::{Singles, send_singles};
use crate::memory::{AccessError, GuestMemory, IoVecStorage, IoVecs, MAX_IOVECS, MissingRange};
use crate::uplink::{Burst, SendError, UplinkQueue};
use crate::virtq::{Chain, PopError, Queue, QueueError, Segment};
use std::ops::Range;

/// Bytes of frames after which a burst ends: large frames must not make other queues wait.
pub const BURST_BYTES: u64 = 512 << 10;

/// Why a run over a ring ended.
#[derive(Debug)]
pub enum End {
    /// The ring is empty (transmit), or no frame waits (receive).
    Idle,
    /// The budget is used up: there may be more.
    Budget,
    /// No room at the uplink: go on when it is writable.
    UplinkFull,
    /// No buffers for a frame (receive): go on when the guest kicks.
    NoBuffers,
    /// Guest memory is missing: go on when it has arrived.
    Parked(MissingRange),
    /// The uplink cannot receive: the text says why.
    UplinkDown(String),
    /// The ring cannot be used any more.
    Broken(QueueError),
    /// Guest memory is gone.
    MemoryFault,
}

/// What the driver has acknowledged, as far as the transmit path cares.
#[derive(Clone, Copy, Debug)]
pub struct TxSettings {
    /// Acknowledged virtio features.
    pub features: u64,
    /// Bytes of virtio-net header before each frame.
    pub header_len: usize,
    /// True if the ring is enabled; frames on a disabled ring are discarded (vhost-user: Ring states).
    pub enabled: bool,
}

/// Frames that are taken from the ring, checked and sent together.
pub(super) const BATCH: usize = 64;
/// Pieces of frames that a batch holds at most; the one that reaches it is its last.
const BATCH_PIECES: usize = 2 * MAX_IOVECS;

/// A chain taken from the ring, on its way to the used ring.
struct Taken {
    head: u16,
    /// Its pieces, in the scratch's list.
    pieces: Range<usize>,
    /// Bytes of its pieces, header included.
    len: u64,
    verdict: Verdict,
}

/// What becomes of a chain.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Send,
    Discard,
    BadChain,
    BadHeader,
    BadLength,
}

/// Buffers that a worker shares between the transmit paths of all its pairs.
pub struct Scratch {
    chain: Chain,
    taken: Vec<Taken>,
    pieces: Vec<Segment>,
    headers: Vec<[u8; HDR_LEN]>,
    iovecs: IoVecStorage,
    frames: Vec<Range<usize>>,
    outcomes: Vec<Result<(), SendError>>,
    pub(super) singles: Singles,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            chain: Chain::new(),
            taken: Vec::with_capacity(BATCH),
            pieces: Vec::with_capacity(BATCH_PIECES + MAX_IOVECS),
            headers: vec![[0; HDR_LEN]; BATCH],
            iovecs: IoVecStorage::default(),
            frames: Vec::with_capacity(BATCH),
            outcomes: Vec::with_capacity(BATCH),
            singles: Singles::default(),
        }
    }
}

/// Moves up to `budget` frames from the ring to the uplink. Used entries are pushed but not published: the
/// caller publishes and notifies once for the burst. Returns how many chains were used and why it ended.
pub fn run(
    ring: &mut Queue,
    memory: &GuestMemory,
    uplink: &mut dyn UplinkQueue,
    scratch: &mut Scratch,
    settings: TxSettings,
    counters: &PairCounters,
    budget: u32,
) -> (u32, End) {
    let mut used = 0;
    let mut bytes = 0;
    loop {
        let room = BATCH.min((budget - used) as usize);
        let bytes_max = BURST_BYTES.saturating_sub(bytes);
        let mut end = None;
        let (mut done, mut sent) = (0, 0);
        if settings.enabled && settings.header_len == HDR_LEN {
            let singles = &mut scratch.singles;
            let features = settings.features;
            (done, sent) =
                send_singles(ring, memory, uplink, singles, features, counters, room, bytes_max, &mut end);
        }
        if done == 0 && end.is_none() {
            end = take(ring, memory, scratch, settings, room, bytes_max);
            let ready = assemble(memory, scratch, settings, uplink, &mut end);
            (done, sent) = settle(ring, scratch, settings, counters, ready, &mut end);
        }
        used += done;
        bytes += sent;
        match end {
            Some(end) => return (used, end),
            None if used >= budget || bytes >= BURST_BYTES => return (used, End::Budget),
            None => {}
        }
    }
}

/// Takes up to `room` chains off the ring, and asks for the lines that will be read next. Returns why there are no more.
fn take(
    ring: &mut Queue,
    memory: &GuestMemory,
    scratch: &mut Scratch,
    settings: TxSettings,
    room: usize,
    bytes_max: u64,
) -> Option<End> {
    let Scratch { chain, taken, pieces, .. } = scratch;
    taken.clear();
    pieces.clear();
    ring.prefetch_used(room as u16);
    let mut bytes = 0;
    while taken.len() < room && bytes < bytes_max && pieces.len() < BATCH_PIECES {
        let (head, verdict) = match ring.pop(memory, chain) {
            Ok(true) if settings.enabled => (chain.head(), Verdict::Send),
            Ok(true) => (chain.head(), Verdict::Discard),
            Ok(false) => return Some(End::Idle),
            Err(PopError::Bad { head, why }) => {
                tracing::debug!(head, %why, "transmit chain refused");
                (head, Verdict::BadChain)
            }
            Err(PopError::Missing(range)) => return Some(End::Parked(range)),
            Err(PopError::Broken(error)) => return Some(End::Broken(error)),
        };
        let start = pieces.len();
        let mut len = 0;
        if verdict == Verdict::Send {
            Segment::append(pieces, chain.readable());
            len = chain.readable_len();
            bytes += len;
            // The driver wrote header and frame a moment ago: their lines are in another core's cache.
            if let Some(first) = pieces.get(start) {
                memory.prefetch(first.gpa);
                // Not checked yet: the guest may have given any address.
                memory.prefetch(first.gpa.wrapping_add(u64::from(first.len.saturating_sub(1)).min(LINE)));
            }
            if let Some(second) = pieces.get(start + 1) {
                memory.prefetch(second.gpa);
            }
        }
        taken.push(Taken { head, pieces: start..pieces.len(), len, verdict });
    }
    None
}

/// Bytes of a cache line, as far as prefetching goes.
const LINE: u64 = 64;

/// Checks what was taken and hands it to the uplink. Returns how many chains have a verdict: the others are to be given
/// back to the ring.
fn assemble(
    memory: &GuestMemory,
    scratch: &mut Scratch,
    settings: TxSettings,
    uplink: &mut dyn UplinkQueue,
    end: &mut Option<End>,
) -> usize {
    let Scratch { taken, pieces, headers, iovecs, frames, outcomes, .. } = scratch;
    frames.clear();
    outcomes.clear();
    let iovecs = iovecs.begin();
    let mut ready = taken.len();
    for ((index, taken), header) in taken.iter_mut().enumerate().zip(headers.iter_mut()) {
        if taken.verdict != Verdict::Send {
            continue;
        }
        let start = iovecs.len();
        if iovecs.room() <= MAX_IOVECS {
            // Chains of very many pieces: the next batch takes them, and the reason to end comes up there again.
            ready = index;
            *end = None;
            break;
        }
        match frame(memory, &pieces[taken.pieces.clone()], taken.len, header, iovecs, settings) {
            Ok(()) => frames.push(start..iovecs.len()),
            Err(Refusal::Missing(range)) => {
                iovecs.truncate(start);
                ready = index;
                *end = Some(End::Parked(range));
                break;
            }
            Err(Refusal::For(verdict)) => {
                iovecs.truncate(start);
                taken.verdict = verdict;
            }
        }
    }
    if !frames.is_empty() {
        uplink.send_burst(&Burst { buffers: iovecs.as_slice(), frames }, outcomes);
    }
    ready
}

/// Pushes what is done, in ring order, and gives the rest back. Returns chains and bytes done.
fn settle(
    ring: &mut Queue,
    scratch: &mut Scratch,
    settings: TxSettings,
    counters: &PairCounters,
    ready: usize,
    end: &mut Option<End>,
) -> (u32, u64) {
    let Scratch { taken, outcomes, .. } = scratch;
    let mut outcomes = outcomes.drain(..);
    let mut done = 0;
    let (mut packets, mut bytes) = (0, 0);
    for taken in &taken[..ready] {
        match taken.verdict {
            Verdict::Send => match outcomes.next() {
                Some(Ok(())) => {
                    packets += 1;
                    bytes += taken.len - settings.header_len as u64;
                }
                other => {
                    if let Some(why) = not_sent(other, counters) {
                        *end = Some(why);
                        break;
                    }
                }
            },
            Verdict::Discard => counters.tx_discarded_disabled.add(1),
            Verdict::BadChain => counters.tx_bad_chains.add(1),
            Verdict::BadHeader => counters.tx_bad_header.add(1),
            Verdict::BadLength => counters.tx_bad_length.add(1),
        }
        ring.push(taken.head, 0);
        done += 1;
    }
    ring.unpop((taken.len() - done) as u16);
    counters.tx_packets.add(packets);
    counters.tx_bytes.add(bytes);
    (done as u32, bytes)
}

/// Counts a frame that was not sent but is done with, or says why it and those behind it wait.
#[cold]
pub(super) fn not_sent(outcome: Option<Result<(), SendError>>, counters: &PairCounters) -> Option<End> {
    match outcome {
        Some(Ok(())) => {}
        Some(Err(SendError::Rejected(error))) => {
            tracing::debug!(%error, "frame refused by the uplink");
            counters.tx_rejected.add(1);
        }
        Some(Err(SendError::Down(_))) => counters.tx_dropped_down.add(1),
        Some(Err(SendError::Spoofed)) => counters.tx_spoofed.add(1),
        Some(Err(SendError::MemoryFault)) => return Some(End::MemoryFault),
        Some(Err(SendError::Full)) | None => return Some(End::UplinkFull),
    }
    None
}

enum Refusal {
    For(Verdict),
    Missing(MissingRange),
}

impl From<AccessError> for Refusal {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::Missing(range) => Self::Missing(range),
            _ => Self::For(Verdict::BadChain),
        }
    }
}

/// Copies and checks a frame's header, and lists its buffers.
#[inline]
fn frame<'a>(
    memory: &'a GuestMemory,
    pieces: &[Segment],
    len: u64,
    header: &'a mut [u8; HDR_LEN],
    iovecs: &mut IoVecs<'a>,
    settings: TxSettings,
) -> Result<(), Refusal> {
    let header_len = settings.header_len;
    // A chain shorter than the header wraps round to a huge length.
    let frame_len = len.wrapping_sub(header_len as u64);
    if !(FRAME_LEN_MIN..=FRAME_LEN_MAX).contains(&frame_len) {
        return Err(Refusal::For(Verdict::BadLength));
    }
    // ANY_LAYOUT: the header may share a descriptor with the frame, or be spread over several.
    let mut pieces = pieces.iter();
    let mut have = 0;
    let mut rest = (0, 0);
    while have < header_len {
        let Some(piece) = pieces.next() else { return Err(Refusal::For(Verdict::BadLength)) };
        let take = (header_len - have).min(piece.len as usize);
        memory.read(piece.gpa, &mut header[have..have + take])?;
        have += take;
        rest = (piece.gpa + take as u64, piece.len - take as u32);
    }
    // num_buffers has no meaning on transmit (VIRTIO 1.3 §5.1.6.2): what the guest wrote there stays here.
    header[10..].fill(0);
    if VirtioNetHdr::parse(header).check(frame_len, settings.features).is_err() {
        return Err(Refusal::For(Verdict::BadHeader));
    }
    let start = iovecs.len();
    iovecs.push_own(&header[..header_len]);
    if rest.1 > 0 {
        memory.push_iovecs(rest.0, rest.1, iovecs)?;
    }
    for piece in pieces {
        memory.push_iovecs(piece.gpa, piece.len, iovecs)?;
    }
    // More than a call takes, the header included: the kernel would refuse it (EINVAL).
    if iovecs.len() - start > MAX_IOVECS {
        return Err(Refusal::For(Verdict::BadChain));
    }
    Ok(())
}
