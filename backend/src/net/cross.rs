//! The short cut of a peer link: frames of one direct descriptor each that ask for nothing, from one guest's transmit ring into
//! one buffer of one descriptor each of another's receive ring. Most frames are of that kind, and go from ring to ring in a
//! loop, without lists in between.
//!
//! What is unusual in any way, at either end, is left in both rings for the ordinary paths (`tx`, `deliver`).
#![forbid(unsafe_code)]

use super::deliver::{BYTES_AHEAD, LINE, LINES_AHEAD};
use super::header::{FRAME_LEN_MAX, FRAME_LEN_MIN, HDR_LEN};
use super::offload::Taker;
use super::tx::{BATCH, BURST_BYTES};
use crate::memory::{GuestMemory, IoVec, Nearby, Place};
use crate::virtq::{Access, Queue, Single};
use arrayvec::ArrayVec;

/// Lines of a source that are asked for: of the header, and of what comes behind it. Further ones the CPU asks for by itself.
const SOURCE_LINES: usize = 2;
/// Header and shortest frame, bytes.
const LEN_MIN: u64 = HDR_LEN as u64 + FRAME_LEN_MIN;

/// Buffers that the short cut uses again and again.
pub struct Scratch {
    from: [Single; BATCH],
    to: [Single; BATCH],
}

impl Default for Scratch {
    fn default() -> Self {
        Self { from: [Single::default(); BATCH], to: [Single::default(); BATCH] }
    }
}

/// One end of the way: a ring, and the memory of its guest.
pub struct Side<'a> {
    /// The ring.
    pub ring: &'a mut Queue,
    /// The memory.
    pub memory: &'a GuestMemory,
}

/// What has crossed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Crossed {
    /// Frames, and as many chains in each ring: to be published.
    pub frames: u32,
    /// Bytes of them, without headers.
    pub bytes: u64,
}

/// A frame and its buffer.
struct Found<'a> {
    source: IoVec<'a>,
    place: Place<'a>,
}

/// Moves up to a batch of frames, up to the first that is not one of these. Both drivers must have headers of 12 bytes. Used
/// entries are pushed, not published.
pub fn run(from: &mut Side<'_>, to: &mut Side<'_>, scratch: &mut Scratch, taker: &Taker) -> Crossed {
    // Errors come up again where they are reported.
    let sent = from.ring.pop_singles(Access::Readable, &mut scratch.from).unwrap_or(0);
    if sent == 0 {
        return Crossed::default();
    }
    let taken = to.ring.pop_singles(Access::Writable, &mut scratch.to[..sent]).unwrap_or(0);
    from.ring.prefetch_used(taken as u16);
    to.ring.prefetch_used(taken as u16);
    let (sources, places) = (&scratch.from[..taken], &scratch.to[..taken]);
    let len_max = taker.len_max().min(FRAME_LEN_MAX) + HDR_LEN as u64;
    let mut near = (Nearby::new(from.memory), Nearby::new(to.memory));
    let mut next = sources.iter().zip(places);
    let mut found: ArrayVec<Found<'_>, BATCH> = ArrayVec::new();
    let (mut lines, mut done, mut bytes, mut more) = (0, 0, 0, true);
    while more {
        more = false;
        for (source, place) in next.by_ref() {
            let len = source.len;
            if u64::from(len).wrapping_sub(LEN_MIN) > len_max - LEN_MIN || bytes >= BURST_BYTES {
                break;
            }
            let Some(source) = near.0.find(source.gpa, len) else { break };
            let Some(place) = near.1.place(place.gpa, place.len) else { break };
            if place.len() < len as usize {
                break;
            }
            source.prefetch(SOURCE_LINES);
            lines += place.prefetch_write((len as usize).min(BYTES_AHEAD));
            bytes += u64::from(len);
            found.push(Found { source, place });
            if lines >= LINES_AHEAD {
                more = true;
                break;
            }
        }
        let waiting = &found[done..];
        let (count, all) =
            if more { fill::<true>(waiting, &mut lines) } else { fill::<false>(waiting, &mut lines) };
        done += count;
        more &= all;
    }
    if to.memory.log_on() {
        for (source, place) in sources.iter().zip(places).take(done) {
            to.memory.mark_written(place.gpa, source.len);
        }
    }
    from.ring.push_all(sources[..done].iter().map(|source| (source.head, 0)));
    to.ring.push_all(sources.iter().zip(places).take(done).map(|(source, place)| (place.head, source.len)));
    from.ring.unpop((sent - done) as u16);
    to.ring.unpop((taken - done) as u16);
    let bytes = found[..done].iter().map(|found| (found.source.len() - HDR_LEN) as u64).sum();
    Crossed { frames: done as u32, bytes }
}

/// Copies frames, up to the first whose header asks for something, or (if there are `MORE`) until few of the lines that were
/// asked for are left. Returns how many, and whether all headers were plain.
fn fill<const MORE: bool>(found: &[Found<'_>], lines: &mut usize) -> (usize, bool) {
    let mut done = 0;
    for Found { source, place } in found {
        let Some((start, frame)) = source.split_header() else { return (done, false) };
        // Flags and segmentation type; and a hint that must not be longer than the frame.
        if start & 0xffff != 0 || (start >> 16 & 0xffff) as usize > frame.len() {
            return (done, false);
        }
        // What the guest wrote into num_buffers means nothing; here it is 1 (VIRTIO 1.3 §5.1.6.2, §5.1.6.4.1).
        place.fill_one(start, 1 << 16, frame);
        done += 1;
        if MORE {
            *lines = lines.saturating_sub(source.len().min(BYTES_AHEAD).div_ceil(LINE));
            if *lines < LINES_AHEAD / 2 {
                break;
            }
        }
    }
    (done, true)
}
