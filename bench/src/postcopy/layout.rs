//! Where rings and buffers lie in guest memory, and what is in a page before anybody uses it. Pure.
#![forbid(unsafe_code)]

use super::PAGE;
use crate::session::Place;

/// RX ring, TX ring.
pub const RINGS: usize = 2;
pub const RX: usize = 0;
pub const TX: usize = 1;
/// Pages of one ring: descriptor table, available ring, used ring.
const RING_PAGES: u64 = 3;

/// Guest memory: both rings, then the buffers, RX before TX. What arrives at once is a page of the memory's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Entries of each ring.
    pub ring_size: u16,
    /// Buffers of each ring; at least as many as entries.
    pub buffers: u64,
    /// Size of a page of the memory's file, bytes.
    pub page: u64,
    /// From one buffer to the next, bytes.
    pub stride: u64,
}

impl Layout {
    /// With buffers of one small page each.
    pub fn small(ring_size: u16, buffers: u64) -> Self {
        Self { ring_size, buffers, page: PAGE, stride: PAGE }
    }

    /// Whole size in bytes.
    pub fn bytes(&self) -> u64 {
        (self.first_buffer() + RINGS as u64 * self.buffers * self.stride).next_multiple_of(self.page)
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.bytes() / self.page
    }

    /// Pages of each part of a ring; a part of 256 entries fits into one.
    fn part_pages(&self) -> u64 {
        (16 * u64::from(self.ring_size)).div_ceil(PAGE)
    }

    /// Offset of the first buffer: no page has both rings and buffers.
    pub fn first_buffer(&self) -> u64 {
        (RINGS as u64 * RING_PAGES * self.part_pages() * PAGE).next_multiple_of(self.page)
    }

    /// Pages that belong to rings: these are the first ones.
    pub fn ring_pages(&self) -> std::ops::Range<u64> {
        0..self.first_buffer() / self.page
    }

    /// The parts of a ring.
    pub fn ring(&self, ring: usize) -> Place {
        let part = self.part_pages() * PAGE;
        let start = ring as u64 * RING_PAGES * part;
        Place { size: self.ring_size, desc: start, avail: start + part, used: start + 2 * part }
    }

    /// Offset of the buffer that a ring's n-th packet goes through.
    pub fn buffer(&self, ring: usize, number: u64) -> u64 {
        self.first_buffer() + (ring as u64 * self.buffers + number % self.buffers) * self.stride
    }
}

/// Fills a page as the source has it before anything was written there: no two words are the same, none is zero.
pub fn fill(page: u64, bytes: &mut [u8; PAGE as usize]) {
    for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
        let number = (page * PAGE / 8 + i as u64) | 1 << 56;
        word.copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_overlaps() {
        let layout = Layout::small(256, 300);
        let mut starts: Vec<u64> = [RX, TX]
            .iter()
            .flat_map(|&r| {
                let p = layout.ring(r);
                [p.desc, p.avail, p.used]
            })
            .collect();
        assert_eq!(starts.len() as u64, layout.ring_pages().end);
        for ring in [RX, TX] {
            starts.extend((0..300).map(|n| layout.buffer(ring, n)));
        }
        let mut sorted = starts.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!(sorted, starts);
        assert_eq!(layout.bytes(), starts.len() as u64 * PAGE);
        assert_eq!(layout.buffer(TX, 300), layout.buffer(TX, 0));
    }

    #[test]
    fn large_pages_have_several_buffers_and_rings_for_themselves() {
        let layout = Layout { ring_size: 256, buffers: 256, page: 2 << 20, stride: 64 << 10 };
        assert_eq!((layout.ring_pages(), layout.pages()), (0..1, 17));
        assert_eq!(layout.buffer(RX, 1), (2 << 20) + (64 << 10));
        assert_eq!(layout.buffer(TX, 0), 9 << 21);
    }

    #[test]
    fn a_filled_page_has_no_zero_word() {
        let mut bytes = [0; PAGE as usize];
        fill(7, &mut bytes);
        assert!(bytes.chunks_exact(8).all(|w| w != [0; 8]));
    }
}
