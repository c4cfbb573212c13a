//! Which pages of a region have arrived. Outside postcopy there is no map at all, and everything is present.
//! Who supplies pages, and learns that they came, is not here.
#![forbid(unsafe_code)]

use super::mapping::zeroed_words;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

const WORD_BITS: u64 = u64::BITS as u64;

/// A bit per page of one region: set = present. Pages only ever arrive; bits are never cleared.
#[derive(Debug)]
pub struct ResidencyMap {
    words: Box<[AtomicU64]>,
    page_shift: u32,
    size: u64,
}

impl ResidencyMap {
    /// A map for a region of `size` bytes in pages of `page_size` bytes (a power of two); all missing.
    pub fn new(size: u64, page_size: u64) -> Self {
        assert!(page_size.is_power_of_two());
        let words = size.div_ceil(page_size).div_ceil(WORD_BITS);
        Self {
            // Not one by one: 1 TiB has 32 MiB of them, and this is the loop's thread.
            words: zeroed_words(words as usize),
            page_shift: page_size.trailing_zeros(),
            size,
        }
    }

    /// Page size, bytes.
    pub fn page_size(&self) -> u64 {
        1 << self.page_shift
    }

    /// Marks the pages that `range` (bytes from the region's start) wholly or partly covers. The contents must be
    /// visible to this process before the call. Parts outside the region are ignored.
    pub fn set_present(&self, range: Range<u64>) {
        let pages = self.pages(range);
        let mut at = pages.start;
        while at < pages.end {
            let next = (at / WORD_BITS + 1) * WORD_BITS;
            let count = next.min(pages.end) - at;
            let bits = (u64::MAX >> (WORD_BITS - count)) << (at % WORD_BITS);
            self.words[(at / WORD_BITS) as usize].fetch_or(bits, Ordering::Release);
            at = next;
        }
    }

    /// The first run of missing pages that `range` (bytes from the region's start) meets: page-granular bytes from
    /// the region's start, cut off at the end of the last page of `range`. None: all there.
    pub fn first_missing(&self, range: Range<u64>) -> Option<Range<u64>> {
        let pages = self.pages(range);
        let first = self.find(pages.clone(), false)?;
        let end = self.find(first..pages.end, true).unwrap_or(pages.end);
        Some(first << self.page_shift..(end << self.page_shift).min(self.size))
    }

    /// The first missing page from `from` (bytes from the region's start) on: where it begins. Unlike
    /// [`ResidencyMap::first_missing`] it does not look for the end of the gap, which may be far.
    pub fn next_missing(&self, from: u64) -> Option<u64> {
        self.find(self.pages(from..self.size), false).map(|page| page << self.page_shift)
    }

    /// The first page that is present, or the first that is not. A word at a time: a guest may name 4 GiB at once.
    fn find(&self, pages: Range<u64>, present: bool) -> Option<u64> {
        let mut at = pages.start;
        while at < pages.end {
            let word = self.words[(at / WORD_BITS) as usize].load(Ordering::Acquire);
            let rest = (if present { word } else { !word }) >> (at % WORD_BITS);
            if rest != 0 {
                let found = at + u64::from(rest.trailing_zeros());
                return (found < pages.end).then_some(found);
            }
            at = (at / WORD_BITS + 1) * WORD_BITS;
        }
        None
    }

    fn pages(&self, range: Range<u64>) -> Range<u64> {
        let end = range.end.min(self.size);
        if range.start >= end {
            return 0..0;
        }
        range.start >> self.page_shift..((end - 1) >> self.page_shift) + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_missing_page_is_found_without_its_gap() {
        let map = ResidencyMap::new(200 * 0x1000, 0x1000);
        map.set_present(0x1000..0x8_0000);
        assert_eq!(
            [0, 0x1000, 0x7_f000, 0x8_0000, 199 * 0x1000, 200 * 0x1000].map(|from| map.next_missing(from)),
            [Some(0), Some(0x8_0000), Some(0x8_0000), Some(0x8_0000), Some(199 * 0x1000), None]
        );
        map.set_present(0..u64::MAX);
        assert_eq!(map.next_missing(0), None);
    }

    #[test]
    fn runs_of_missing_pages_are_found_whole() {
        let map = ResidencyMap::new(0x10_0000, 0x1000);
        assert_eq!(map.first_missing(0x1234..0x1235), Some(0x1000..0x2000));
        map.set_present(0x1000..0x1001);
        map.set_present(0x5fff..0x6001);
        assert_eq!(map.first_missing(0x1000..0x2000), None);
        assert_eq!(map.first_missing(0x1000..0x9000), Some(0x2000..0x5000));
        assert_eq!(map.first_missing(0x5000..0x9000), Some(0x7000..0x9000));
        assert_eq!(map.first_missing(0x3000..0x3000), None);
    }

    /// Words at a time against bits one by one.
    #[test]
    fn runs_across_words_are_as_bits_tell() {
        let pages = 64 * 3 + 7;
        for (start, end) in [(0, 1), (5, 64), (63, 65), (64, 128), (1, 199), (130, 199), (0, 199)] {
            let map = ResidencyMap::new(pages * 0x1000, 0x1000);
            map.set_present(start * 0x1000..end * 0x1000);
            for from in 0..pages {
                for to in [from + 1, from + 63, from + 64, from + 65, pages + 9] {
                    let missing = |page: &u64| !(start..end).contains(page);
                    let range = from..to.min(pages);
                    let first = range.clone().find(missing);
                    let expected = first.map(|first| {
                        let end = (first..range.end).find(|page| !missing(page)).unwrap_or(range.end);
                        first * 0x1000..end * 0x1000
                    });
                    assert_eq!(map.first_missing(from * 0x1000..to * 0x1000), expected, "{from}..{to}");
                }
            }
        }
    }

    #[test]
    fn the_last_page_and_ranges_beyond_it() {
        let map = ResidencyMap::new(130 * 0x1000, 0x1000);
        map.set_present(0..u64::MAX);
        assert_eq!(map.first_missing(0..u64::MAX), None);
        map.set_present(u64::MAX - 1..u64::MAX);
        let huge = ResidencyMap::new(0x40_0000, 0x20_0000);
        huge.set_present(1..2);
        assert_eq!(huge.first_missing(0x10_0000..0x20_0001), Some(0x20_0000..0x40_0000));
    }
}
