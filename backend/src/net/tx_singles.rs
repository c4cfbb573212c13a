//! The transmit path's short cut: frames of one direct descriptor each, header in front, which is how drivers send most of
//! theirs. They go through in bursts, without chains and lists of pieces in between.
//!
//! What is unusual in any way (another shape, a region that may miss pages, a header that asks for something it may not) is
//! left in the ring for the ordinary path (`tx`), which has a verdict for everything.
#![forbid(unsafe_code)]

use super::counters::PairCounters;
use super::header::{HDR_LEN, VirtioNetHdr};
use super::tx::{BATCH, End, not_sent};
use crate::memory::{GuestMemory, IoVec, IoVecStorage, Nearby};
use crate::uplink::{Burst, SendError, UplinkQueue};
use crate::virtq::{Access, Queue, Single};
use arrayvec::ArrayVec;
use std::ops::Range;

/// Lines of a frame that are asked for before they are read: of the header, and of what comes behind it.
const LINES: usize = 2;

/// Buffers that the short cut uses again and again.
pub(super) struct Singles {
    chains: [Single; BATCH],
    headers: [[u8; HDR_LEN]; BATCH],
    iovecs: IoVecStorage<{ 2 * BATCH }>,
    frames: Vec<Range<usize>>,
    outcomes: Vec<Result<(), SendError>>,
}

impl Default for Singles {
    fn default() -> Self {
        Self {
            chains: [Single::default(); BATCH],
            headers: [[0; HDR_LEN]; BATCH],
            iovecs: IoVecStorage::default(),
            frames: (0..BATCH).map(|i| 2 * i..2 * i + 2).collect(),
            outcomes: Vec::with_capacity(BATCH),
        }
    }
}

/// Moves up to `room` frames, or `bytes_max` bytes and one frame, from the ring to the uplink, up to the first that is not one
/// of these. Returns chains and bytes done; `end` is set if the uplink takes no more.
#[allow(clippy::too_many_arguments)]
#[inline]
pub(super) fn send_singles(
    ring: &mut Queue,
    memory: &GuestMemory,
    uplink: &mut dyn UplinkQueue,
    scratch: &mut Singles,
    features: u64,
    counters: &PairCounters,
    room: usize,
    bytes_max: u64,
    end: &mut Option<End>,
) -> (u32, u64) {
    let Singles { chains, headers, iovecs, frames, outcomes } = scratch;
    // An error comes up again where it is reported.
    let Ok(taken) = ring.pop_singles(Access::Readable, &mut chains[..room]) else { return (0, 0) };
    if taken == 0 {
        return (0, 0);
    }
    ring.prefetch_used(taken as u16);
    let mut near = Nearby::new(memory);
    let mut wholes: ArrayVec<IoVec<'_>, BATCH> = ArrayVec::new();
    let mut bytes = 0;
    for chain in &chains[..taken] {
        let Some(whole) = near.find(chain.gpa, chain.len) else { break };
        // The driver wrote header and frame a moment ago: their lines are in another core's cache.
        whole.prefetch(LINES);
        wholes.push(whole);
        bytes += u64::from(chain.len);
        if bytes >= bytes_max {
            break;
        }
    }
    let iovecs = iovecs.begin();
    for (whole, header) in wholes.into_iter().zip(headers.iter_mut()) {
        let Some((front, frame)) = whole.take_front::<HDR_LEN>() else { break };
        *header = front;
        // num_buffers has no meaning on transmit (VIRTIO 1.3 §5.1.6.2): what the guest wrote there stays here.
        header[10..].fill(0);
        if VirtioNetHdr::parse(header).check(frame.len() as u64, features).is_err() {
            break;
        }
        iovecs.push_frame(header, frame);
    }
    let ready = iovecs.len() / 2;
    let mut done = 0;
    bytes = 0;
    if ready > 0 {
        let sent;
        outcomes.clear();
        uplink.send_burst(&Burst { buffers: iovecs.as_slice(), frames: &frames[..ready] }, outcomes);
        if outcomes.len() == ready && outcomes.iter().all(Result::is_ok) {
            (done, sent) = (ready, ready as u64);
            bytes = chains[..ready].iter().map(|chain| u64::from(chain.len) - HDR_LEN as u64).sum();
        } else {
            (done, sent, bytes) = account(&chains[..ready], outcomes, counters, end);
        }
        counters.tx_packets.add(sent);
        counters.tx_bytes.add(bytes);
        ring.push_all(chains[..done].iter().map(|chain| (chain.head, 0)));
    }
    ring.unpop((taken - done) as u16);
    (done as u32, bytes)
}

/// What became of frames of which not all were sent: how many are done with, how many were sent, and their bytes.
#[cold]
fn account(
    chains: &[Single],
    outcomes: &mut Vec<Result<(), SendError>>,
    counters: &PairCounters,
    end: &mut Option<End>,
) -> (usize, u64, u64) {
    let mut outcomes = outcomes.drain(..);
    let (mut done, mut sent, mut bytes) = (0, 0, 0);
    for chain in chains {
        match outcomes.next() {
            Some(Ok(())) => {
                sent += 1;
                bytes += u64::from(chain.len) - HDR_LEN as u64;
            }
            other => {
                *end = not_sent(other, counters);
                if end.is_some() {
                    break;
                }
            }
        }
        done += 1;
    }
    (done, sent, bytes)
}
