//! Where rings and buffers lie in guest memory. Pure.
#![forbid(unsafe_code)]

use super::LINE;
use crate::mapping::PAGE;
use crate::session::Place;

/// Rings of a queue pair.
pub const RINGS: usize = 2;
/// The ring that the device puts packets into.
pub const RX: usize = 0;
/// The ring that it takes packets from.
pub const TX: usize = 1;

/// What a layout depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayoutOptions {
    /// Entries of each ring; there are as many buffers.
    pub ring_size: u16,
    /// Least length of an RX and a TX buffer, bytes.
    pub buffer_len: [u32; RINGS],
}

/// Offsets in guest memory, which are guest addresses: rings, each part in pages of its own, then the buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    options: LayoutOptions,
}

impl Layout {
    /// Of these.
    pub fn new(options: LayoutOptions) -> Self {
        Self { options }
    }

    fn part_bytes(&self) -> u64 {
        (16 * u64::from(self.options.ring_size)).next_multiple_of(PAGE)
    }

    /// The parts of a ring.
    pub fn ring(&self, ring: usize) -> Place {
        let part = self.part_bytes();
        let start = ring as u64 * 3 * part;
        Place { size: self.options.ring_size, desc: start, avail: start + part, used: start + 2 * part }
    }

    /// From one buffer of a ring to the next, bytes: an odd number of lines, so that the beginnings of buffers are spread
    /// over all sets of a cache.
    pub fn stride(&self, ring: usize) -> u64 {
        let lines = u64::from(self.options.buffer_len[ring]).div_ceil(LINE);
        (lines | 1) * LINE
    }

    /// Offset of the first buffer of a ring.
    pub fn buffers(&self, ring: usize) -> u64 {
        let first = RINGS as u64 * 3 * self.part_bytes();
        let before = (0..ring).map(|r| u64::from(self.options.ring_size) * self.stride(r));
        before.fold(first, |at, len| (at + len).next_multiple_of(PAGE))
    }

    /// All of it, bytes.
    pub fn bytes(&self) -> u64 {
        self.buffers(RINGS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_overlaps() {
        for ring_size in [2, 256, 1024] {
            let options = LayoutOptions { ring_size, buffer_len: [2048, 76] };
            let layout = Layout::new(options);
            let mut end = 0;
            for ring in [RX, TX] {
                let p = layout.ring(ring);
                let n = u64::from(ring_size);
                for (start, len) in [(p.desc, 16 * n), (p.avail, 6 + 2 * n), (p.used, 6 + 8 * n)] {
                    assert!(start >= end && start % PAGE == 0);
                    end = start + len;
                }
            }
            for ring in [RX, TX] {
                assert!(layout.buffers(ring) >= end);
                end = layout.buffers(ring) + u64::from(ring_size) * layout.stride(ring);
                assert!(layout.stride(ring) >= options.buffer_len[ring].into());
                assert_eq!(layout.stride(ring) / LINE % 2, 1);
            }
            assert!(layout.bytes() >= end);
        }
    }
}
