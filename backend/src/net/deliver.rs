//! Frames that lie in memory, ours or another guest's, into a guest's receive ring: one copy each.
//!
//! ```text
//!  burst      [ header | piece | piece ] [ header | piece ] …        the length of each frame is known
//!  ring       [ chain ] [ chain ][ chain ] …                         exactly as many as each frame needs
//! ```
//! Unlike an uplink that reads into buffers (`rx`), nothing is offered in advance and nothing is held: a frame is taken
//! whole, or stays with whoever has it. Most are copied into one buffer of one descriptor; those go through in a loop, the
//! lines of their destination asked for ahead (a line that another core has takes some hundred ns). All else is for the
//! path behind it, frame by frame.
//!
//! Chains complete in ring order. Not here: where frames come from, and whether the guest can take their offloads
//! (`worker::link`, `uplink`).
#![forbid(unsafe_code)]

use super::counters::PairCounters;
use super::header::{HDR_LEN, HDR_LEN_LEGACY};
use super::rx::RxSettings;
use super::tx::{BATCH, End};
use crate::memory::{AccessError, GuestMemory, IoVec, Nearby, Place, Source, gather};
use crate::uplink::Burst;
use crate::virtq::{Access, Chain, PopError, Queue, Segment, Single};
use arrayvec::ArrayVec;
use std::iter::Zip;
use std::ops::Range;
use std::slice::Iter;

/// Lines of buffers that are asked for ahead of the copy: a batch of small frames, but four to eight of 1500 bytes. Those of
/// more large ones would drive each other out of the first cache.
pub(super) const LINES_AHEAD: usize = 192;
/// Bytes of one frame that are asked for ahead: what is behind them, the CPU asks for by itself, as it is copied in sequence.
pub(super) const BYTES_AHEAD: usize = 1536;
/// A cache line, as far as prefetching goes, bytes.
pub(super) const LINE: usize = 64;
/// Chains that one frame may be spread over.
const CHAINS_MAX: usize = 1024;
/// Bad chains that one burst refuses; each can cost a walk over 1024 descriptors.
const REFUSED_MAX: u32 = 8;

/// Buffers that a worker shares between the rings of all its pairs.
pub struct Scratch {
    singles: [Single; BATCH],
    chain: Chain,
    /// Of the frame that is being placed: its chains, with the bytes it fills of each...
    heads: Vec<(u16, u32)>,
    /// ... and the pieces of guest memory that it fills.
    parts: Vec<Segment>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            singles: [Single::default(); BATCH],
            chain: Chain::new(),
            heads: Vec::with_capacity(CHAINS_MAX),
            parts: Vec::with_capacity(CHAINS_MAX),
        }
    }
}

/// Chains that are too few for the next frame. They stay taken, as a ring in which some wait would seem to have work: drivers
/// are asked to kick for what comes behind those that were taken.
#[derive(Debug, Default)]
pub struct Kept(u16);

impl Kept {
    /// Gives them back: before anything else is done with the ring.
    #[inline]
    pub fn release(&mut self, ring: &mut Queue) {
        if self.0 > 0 {
            ring.unpop(std::mem::take(&mut self.0));
        }
    }
}

/// What became of a burst.
#[derive(Debug)]
pub struct Delivered {
    /// Frames that are done with, from the first on: delivered, or dropped and counted.
    pub frames: usize,
    /// Chains that were used: to be published.
    pub used: u32,
    /// Why the others were not taken: `NoBuffers`, `Parked`, `Broken`, or `Budget` (there was too much to refuse: go on
    /// later). None: there are no others.
    pub end: Option<End>,
}

/// Copies the frames of a burst into a guest's ring, each with its virtio-net header (the first of its buffers), in which
/// only num_buffers is set here. `kept` is the ring's. Used entries are pushed but not published: the caller publishes and notifies once.
pub fn run(
    ring: &mut Queue,
    memory: &GuestMemory,
    kept: &mut Kept,
    scratch: &mut Scratch,
    settings: RxSettings,
    counters: &PairCounters,
    burst: &Burst<'_>,
) -> Delivered {
    kept.release(ring);
    let mut to = Delivery { ring, memory, settings, counters, used: 0, packets: 0, bytes: 0, refused: 0 };
    let count = burst.frames.len();
    to.ring.prefetch_used(count.min(BATCH) as u16);
    let mut frames = 0;
    let mut batch = BATCH;
    let end = loop {
        let done = to.singles(scratch, burst, frames, batch);
        frames += done;
        if frames == count {
            break None;
        }
        if done > 0 && done == batch {
            batch = BATCH;
            continue;
        }
        match to.frame(kept, scratch, &burst.buffers[burst.frames[frames].clone()]) {
            Ok(()) => frames += 1,
            Err(end) => break Some(end),
        }
        // The next one is probably of the same kind.
        batch = 1;
    };
    counters.rx_packets.add(to.packets);
    counters.rx_bytes.add(to.bytes);
    Delivered { frames, used: to.used, end }
}

/// What came off the ring.
enum Taken {
    /// A chain of which a frame fills so many bytes.
    Chain(u64),
    /// One that cannot be used; its head.
    Bad(u16),
    None,
}

/// A burst on its way.
struct Delivery<'a> {
    ring: &'a mut Queue,
    memory: &'a GuestMemory,
    settings: RxSettings,
    counters: &'a PairCounters,
    /// Chains pushed.
    used: u32,
    packets: u64,
    /// Bytes of frames, without headers.
    bytes: u64,
    /// Bad chains.
    refused: u32,
}

/// Bytes of a frame, without its header.
#[inline(always)]
pub fn frame_len(buffers: &[IoVec<'_>]) -> usize {
    match buffers {
        [_, frame] => frame.len(),
        _ => buffers.iter().skip(1).map(IoVec::len).sum(),
    }
}

/// A frame's header with num_buffers.
#[inline(always)]
fn header(buffers: &[IoVec<'_>], num_buffers: u16) -> [u8; HDR_LEN] {
    let mut header = match buffers.first().and_then(|header| header.take_front::<HDR_LEN>()) {
        Some((header, _)) => header,
        None => short_header(buffers),
    };
    header[HDR_LEN_LEGACY..].copy_from_slice(&num_buffers.to_le_bytes());
    header
}

#[cold]
fn short_header(buffers: &[IoVec<'_>]) -> [u8; HDR_LEN] {
    let mut header = [0; HDR_LEN];
    gather(&buffers[..1], &mut header);
    header
}

/// A frame, and its buffer that was found.
struct Found<'a> {
    buffers: &'a [IoVec<'a>],
    place: Place<'a>,
    /// Bytes of header and frame.
    len: usize,
}

/// Finds the buffers of frames, and asks for their lines, up to the first that does not fit or [`LINES_AHEAD`]. True if there
/// may be more.
fn find<'a>(
    near: &mut Nearby<'a>,
    next: &mut Zip<Iter<'_, Single>, Iter<'_, Range<usize>>>,
    buffers: &'a [IoVec<'a>],
    found: &mut ArrayVec<Found<'a>, BATCH>,
    lines: &mut usize,
) -> bool {
    for (single, frame) in next {
        let Some(buffers) = buffers.get(frame.clone()) else { return false };
        let len = HDR_LEN + frame_len(buffers);
        let Some(place) = near.place(single.gpa, single.len).filter(|place| place.len() >= len) else {
            return false;
        };
        *lines += place.prefetch_write(len.min(BYTES_AHEAD));
        if found.try_push(Found { buffers, place, len }).is_err() || *lines >= LINES_AHEAD {
            return true;
        }
    }
    false
}

/// Copies frames into their buffers: all, or (if there are `MORE`) until few of the lines that were asked for are left.
/// Returns how many.
fn fill<const MORE: bool>(found: &[Found<'_>], lines: &mut usize) -> usize {
    let mut done = 0;
    for Found { buffers, place, len } in found {
        let Some((header, frame)) = buffers.split_first() else { break };
        // Whatever the sender wrote there, num_buffers is 1 (VIRTIO 1.3 §5.1.6.4.1).
        match header.first_words() {
            Some((start, end)) => place.fill(start, end & 0xffff | 1 << 16, frame),
            None => place.fill_behind(&self::header(buffers, 1), frame),
        }
        done += 1;
        if MORE {
            *lines = lines.saturating_sub((*len).min(BYTES_AHEAD).div_ceil(LINE));
            if *lines < LINES_AHEAD / 2 {
                break;
            }
        }
    }
    done
}

impl Delivery<'_> {
    /// Delivers up to `batch` frames from `first` on that fit into one buffer of one descriptor each, up to the first that
    /// does not. Returns how many.
    #[inline]
    fn singles(&mut self, scratch: &mut Scratch, burst: &Burst<'_>, first: usize, batch: usize) -> usize {
        // Legacy guests are few, and old.
        if self.settings.header_len != HDR_LEN {
            return 0;
        }
        let frames = &burst.frames[first..];
        let room = frames.len().min(batch);
        // An error comes up again where it is reported.
        let taken = self.ring.pop_singles(Access::Writable, &mut scratch.singles[..room]).unwrap_or(0);
        if taken == 0 {
            return 0;
        }
        let singles = &scratch.singles[..taken];
        let mut near = Nearby::new(self.memory);
        let mut next = singles.iter().zip(frames);
        let mut found = ArrayVec::new();
        let (mut lines, mut done) = (0, 0);
        loop {
            let more = find(&mut near, &mut next, burst.buffers, &mut found, &mut lines);
            let waiting = &found[done..];
            done += if more { fill::<true>(waiting, &mut lines) } else { fill::<false>(waiting, &mut lines) };
            if !more {
                break;
            }
        }
        let used = || singles.iter().zip(&found);
        if self.memory.log_on() {
            used().for_each(|(single, found)| self.memory.mark_written(single.gpa, found.len as u32));
        }
        self.ring.push_all(used().map(|(single, found)| (single.head, found.len as u32)));
        self.ring.unpop((taken - done) as u16);
        self.used += done as u32;
        self.packets += done as u64;
        self.bytes += found.iter().map(|found| (found.len - HDR_LEN) as u64).sum::<u64>();
        done
    }

    /// Delivers one frame of any kind into chains of any kind, or refuses chains until there is none.
    fn frame(&mut self, kept: &mut Kept, scratch: &mut Scratch, buffers: &[IoVec<'_>]) -> Result<(), End> {
        let Scratch { chain, heads, parts, .. } = scratch;
        let len = frame_len(buffers);
        let need = (self.settings.header_len + len) as u64;
        heads.clear();
        parts.clear();
        let mut room = 0;
        while room < need {
            let taken = heads.len();
            match self.take(chain, taken == 0, need - room, parts) {
                Ok(Taken::Chain(bytes)) => {
                    heads.push((chain.head(), bytes as u32));
                    room += bytes;
                    if room < need && (!self.settings.mergeable || heads.len() == CHAINS_MAX) {
                        return self.drop_too_long(heads.len());
                    }
                }
                Ok(Taken::Bad(head)) => {
                    // Ring order: what was taken for the frame goes back with it, empty.
                    heads.push((head, 0));
                    self.refuse(heads)?;
                    parts.clear();
                    room = 0;
                }
                // All the buffers this ring can have, and still too few: nobody will kick.
                Ok(Taken::None) if taken >= self.ring.size().into() => return self.drop_too_long(taken),
                Ok(Taken::None) => {
                    kept.0 = taken as u16;
                    return Err(End::NoBuffers);
                }
                Err(end) => {
                    self.ring.unpop(taken as u16);
                    return Err(end);
                }
            }
        }
        let header = header(buffers, heads.len() as u16);
        let mut source = Source::new(&header[..self.settings.header_len], &buffers[1..]);
        for part in parts.iter() {
            // Was found to be there a moment ago, and pages only ever arrive.
            let _ = self.memory.write_from(part.gpa, part.len, &mut source);
        }
        for (head, filled) in heads.iter() {
            self.ring.push(*head, *filled);
        }
        self.used += heads.len() as u32;
        self.packets += 1;
        self.bytes += len as u64;
        Ok(())
    }

    /// Takes the next chain off the ring and appends the parts that a frame fills of it, of which `need` bytes have no place
    /// yet. An error leaves the chain there.
    fn take(
        &mut self,
        chain: &mut Chain,
        first: bool,
        need: u64,
        parts: &mut Vec<Segment>,
    ) -> Result<Taken, End> {
        // The header must not be cut.
        let least = if first { self.settings.header_len as u64 } else { 1 };
        match self.ring.pop(self.memory, chain) {
            Ok(true) if chain.writable_len() < least => Ok(Taken::Bad(chain.head())),
            Ok(true) => match self.measure(chain, need, parts) {
                Ok(bytes) => Ok(Taken::Chain(bytes)),
                Err(AccessError::Missing(range)) => {
                    self.ring.unpop(1);
                    Err(End::Parked(range))
                }
                Err(_) => Ok(Taken::Bad(chain.head())),
            },
            Ok(false) => Ok(Taken::None),
            Err(PopError::Bad { head, why }) => {
                tracing::debug!(head, %why, "receive chain refused");
                Ok(Taken::Bad(head))
            }
            Err(PopError::Missing(range)) => Err(End::Parked(range)),
            Err(PopError::Broken(error)) => Err(End::Broken(error)),
        }
    }

    /// Appends the parts of a chain that a frame fills of which `need` bytes have no place yet; returns their bytes.
    fn measure(&self, chain: &Chain, need: u64, parts: &mut Vec<Segment>) -> Result<u64, AccessError> {
        let mut left = need;
        for segment in chain.writable() {
            let len = left.min(segment.len.into()) as u32;
            if len == 0 {
                break;
            }
            self.memory.check(segment.gpa, len)?;
            parts.push(Segment { gpa: segment.gpa, len });
            left -= u64::from(len);
        }
        Ok(need - left)
    }

    /// Completes chains without bytes: the last of them is bad.
    fn refuse(&mut self, heads: &mut Vec<(u16, u32)>) -> Result<(), End> {
        self.counters.rx_bad_chains.add(1);
        self.used += heads.len() as u32;
        for (head, _) in heads.drain(..) {
            self.ring.push(head, 0);
        }
        self.refused += 1;
        // A ring full of bad chains must not take the turn.
        if self.refused >= REFUSED_MAX { Err(End::Budget) } else { Ok(()) }
    }

    /// The guest's buffers are too small for the frame that is being placed: they stay for the next.
    fn drop_too_long(&mut self, chains: usize) -> Result<(), End> {
        self.ring.unpop(chains as u16);
        self.counters.rx_dropped_too_long.add(1);
        Ok(())
    }
}
