//! Copies of frames from where they lie (our memory, or another guest's) into a guest's buffers. Each byte of the source is
//! read once and each of the destination written once, whatever either guest does meanwhile: both may even be the same
//! memory.
//!
//! Not here: which buffers (`virtq`, `net::deliver`), and that a vanished file is noticed ([`super::sigbus`]).

use super::AccessError;
use super::copy;
use super::guest::GuestMemory;
use super::hint;
use super::iovec::IoVec;
use super::moves::Unit;
use super::nearby::Nearby;

/// A cache line, as far as prefetching goes, bytes.
const LINE: usize = 64;
/// Bytes of a virtio-net header.
const HEADER: usize = 12;

/// A piece of guest memory in one region, all of it present, that may be written.
#[derive(Clone, Copy)]
pub struct Place<'m>(IoVec<'m>);

impl<'m> Nearby<'m> {
    /// As [`Nearby::find`], to be written.
    #[inline(always)]
    pub fn place(&mut self, gpa: u64, len: u32) -> Option<Place<'m>> {
        self.find(gpa, len).map(Place)
    }
}

impl Place<'_> {
    /// Bytes.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True for a place of no bytes; guest memory never makes one.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Asks the CPU for the lines of its first `len` bytes (one at least), which are going to be written, as a hint. Returns for how many
    /// lines it has asked.
    #[inline(always)]
    pub fn prefetch_write(&self, len: usize) -> usize {
        if len <= 2 * LINE {
            // Most frames: the first line and the last, which may be the same; a third is of a frame that lies badly.
            hint::write(self.0.base());
            hint::write(self.0.base().wrapping_add(len.saturating_sub(1)));
            return 2;
        }
        // As `div_ceil`, without its branches.
        let lines = (self.0.base().addr() % LINE + len + LINE - 1) >> LINE.ilog2();
        let mut line = self.0.base();
        let end = line.wrapping_add(lines * LINE);
        while line != end {
            // A prefetch never faults, so one beyond the end does no harm.
            hint::write(line);
            line = line.wrapping_add(LINE);
        }
        lines
    }

    /// Writes a header of 12 bytes, its first 8 and its last 4 as little-endian numbers, and the pieces of a frame behind, as
    /// far as there is room. (Numbers stay in registers, an array would not.)
    #[inline(always)]
    pub fn fill(&self, start: u64, end: u32, frame: &[IoVec<'_>]) {
        if self.0.len() >= HEADER {
            // SAFETY: the place is guest memory that stays mapped while it lives and has room for 12 bytes.
            unsafe {
                start.to_le().store(self.0.base());
                end.to_le().store(self.0.base().add(8));
            }
            self.pieces(frame);
        }
    }

    /// The same of a frame in one piece. The checksum fields that `end` begins with are the caller's.
    #[inline(always)]
    pub fn fill_one(&self, start: u64, end: u32, frame: IoVec<'_>) {
        let Some(room) = self.0.len().checked_sub(HEADER) else { return };
        // SAFETY: as above; `len` bytes are left of the place, and a piece is memory that stays mapped while it lives.
        unsafe {
            start.to_le().store(self.0.base());
            end.to_le().store(self.0.base().add(8));
            copy::bulk_between_guests(frame.base(), self.0.base().add(HEADER), frame.len().min(room));
        }
    }

    /// The same with the header in memory.
    pub fn fill_behind(&self, header: &[u8; HEADER], frame: &[IoVec<'_>]) {
        if self.0.len() >= HEADER {
            // SAFETY: as above.
            unsafe { copy::array_to_guest(self.0.base(), header) };
            self.pieces(frame);
        }
    }

    #[inline(always)]
    fn pieces(&self, frame: &[IoVec<'_>]) {
        let mut done = HEADER;
        for piece in frame {
            let len = piece.len().min(self.0.len() - done);
            // SAFETY: `done + len` is within the place; a piece is memory that stays mapped while it lives.
            unsafe { copy::bulk_between_guests(piece.base(), self.0.base().add(done), len) };
            done += len;
        }
    }
}

impl<'m> IoVec<'m> {
    /// The first 8 bytes of its header of 12, as a little-endian number, read once, and what is behind the header; `None` if it is
    /// shorter.
    #[inline(always)]
    pub fn split_header(&self) -> Option<(u64, IoVec<'m>)> {
        let rest = self.len().checked_sub(HEADER)?;
        // SAFETY: an entry is memory that stays mapped while it lives, and has 12 bytes; what is behind is within it or its end.
        unsafe { Some((u64::from_le(u64::load(self.base())), IoVec::new(self.base().add(HEADER), rest))) }
    }

    /// Its 12 bytes as two little-endian numbers, if it has just these.
    #[inline(always)]
    pub fn first_words(&self) -> Option<(u64, u32)> {
        if self.len() != HEADER {
            return None;
        }
        // SAFETY: an entry is memory that stays mapped while it lives, and has 12 bytes.
        Some(unsafe { (u64::from_le(u64::load(self.base())), u32::from_le(u32::load(self.base().add(8)))) })
    }
}

/// A frame that is copied part by part: a header of ours, then pieces of memory.
pub struct Source<'a> {
    header: &'a [u8],
    frame: &'a [IoVec<'a>],
    /// Bytes of the first of `frame` that are gone already.
    at: usize,
}

impl<'a> Source<'a> {
    /// A frame with this header in front.
    pub fn new(header: &'a [u8], frame: &'a [IoVec<'a>]) -> Self {
        Self { header, frame, at: 0 }
    }

    /// The next run of at most `max` bytes; none at the end.
    fn run(&mut self, max: usize) -> Option<(*const u8, usize)> {
        if !self.header.is_empty() {
            let (run, rest) = self.header.split_at(self.header.len().min(max));
            self.header = rest;
            return Some((run.as_ptr(), run.len()));
        }
        while let Some((piece, rest)) = self.frame.split_first() {
            let len = (piece.len() - self.at).min(max);
            if len > 0 {
                // SAFETY: `at < len` of the piece.
                let from = unsafe { piece.base().add(self.at) };
                self.at += len;
                return Some((from, len));
            }
            self.frame = rest;
            self.at = 0;
        }
        None
    }
}

impl GuestMemory {
    /// Copies the next `len` bytes of `source` to `gpa`, as far as it has them, and logs the pages as dirty. On an error
    /// `source` may have advanced.
    ///
    /// # Errors
    /// Not guest memory, or not present; bytes before that may have been written.
    pub fn write_from(&self, gpa: u64, len: u32, source: &mut Source<'_>) -> Result<(), AccessError> {
        self.for_each_piece(gpa, len.into(), |piece| {
            let room = piece.len as usize;
            let mut done = 0;
            while done < room
                && let Some((from, len)) = source.run(room - done)
            {
                // SAFETY: the piece is mapped and present for `room` bytes while `self` lives, of which `len` are left; a run
                // is memory that stays mapped while the source lives.
                unsafe { copy::bulk_between_guests(from, piece.host.as_ptr().add(done), len) };
                done += len;
            }
            Ok(())
        })?;
        self.mark_written(gpa, len);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::iovec::IoVecs;
    use super::super::testing::guest;
    use super::*;
    use std::os::unix::fs::FileExt;

    fn bytes(file: &std::fs::File, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    #[test]
    fn a_place_is_filled_with_header_and_pieces_and_no_further() {
        let (memory, file) = guest(0x4000);
        let (a, b) = ([1u8; 70], [2u8; 5]);
        let mut pieces = IoVecs::new();
        pieces.push_own(&a);
        pieces.push_own(&b);
        let mut near = Nearby::new(&memory);
        let place = near.place(0x1001, 200).unwrap();
        assert_eq!(place.prefetch_write(64), 2);
        assert_eq!(place.prefetch_write(191), 3);
        assert_eq!(place.prefetch_write(192), 4);
        place.fill(0x0909_0909_0909_0909, 0x0909_0909, pieces.as_slice());
        let expected = [&[0u8][..], &[9; 12], &a, &b, &[0]].concat();
        assert_eq!(bytes(&file, 0x1000, expected.len()), expected);
        for len in [12, 13, 82, 83, 86] {
            let place = near.place(0x2000, len).unwrap();
            place.fill_behind(&[9; 12], pieces.as_slice());
            assert_eq!(bytes(&file, 0x2000, len as usize), expected[1..][..len as usize]);
            assert_eq!(bytes(&file, 0x2000 + u64::from(len), 1), [0]);
        }
        assert!(near.place(0x3fff, 2).is_none());
        near.place(0x3000, 11).unwrap().fill(9, 9, pieces.as_slice());
        assert_eq!(bytes(&file, 0x3000, 12), [0; 12]);
    }

    #[test]
    fn a_source_is_spread_over_any_parts() {
        let (memory, file) = guest(0x4000);
        let data: Vec<u8> = (0..200).map(|i| i as u8).collect();
        for cut in [1, 7, 12, 13, 64, 199] {
            let mut pieces = IoVecs::new();
            pieces.push_own(&data[..cut]);
            pieces.push_own(&data[cut..]);
            let mut source = Source::new(&[7; 12], pieces.as_slice());
            let mut at = 0x1000;
            for len in [1, 11, 50, 100, 90] {
                memory.write_from(at, len, &mut source).unwrap();
                at += u64::from(len);
            }
            let expected = [&[7; 12][..], &data, &[0]].concat();
            assert_eq!(bytes(&file, 0x1000, expected.len()), expected, "{cut}");
        }
    }

    /// One guest on both ends: what overlaps is copied somehow, and nothing else happens.
    #[test]
    fn source_and_destination_may_be_the_same_memory() {
        let (memory, _file) = guest(0x4000);
        let mut pieces = IoVecs::new();
        memory.push_iovecs(0x1000, 300, &mut pieces).unwrap();
        let place = Nearby::new(&memory).place(0x1010, 312).unwrap();
        place.fill(0, 0, pieces.as_slice());
    }
}
