//! Which pages of a region have arrived. Outside postcopy there is no map at all, and everything is present.
//! Who supplies pages, and learns that they came, is not here.
#![forbid(unsafe_code)]

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
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
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
        for page in self.pages(range) {
            self.words[(page / WORD_BITS) as usize].fetch_or(1 << (page % WORD_BITS), Ordering::Release);
        }
    }

    /// The first run of missing pages that `range` (bytes from the region's start) meets: page-granular bytes from
    /// the region's start, cut off at the end of the last page of `range`. None: all there.
    pub fn first_missing(&self, range: Range<u64>) -> Option<Range<u64>> {
        let mut pages = self.pages(range);
        let first = pages.find(|page| !self.is_present(*page))?;
        let end = pages.find(|page| self.is_present(*page)).unwrap_or(pages.end);
        Some(first << self.page_shift..(end << self.page_shift).min(self.size))
    }

    fn is_present(&self, page: u64) -> bool {
        self.words[(page / WORD_BITS) as usize].load(Ordering::Acquire) & (1 << (page % WORD_BITS)) != 0
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
