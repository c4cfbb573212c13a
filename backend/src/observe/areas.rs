//! Which addresses of the process are what, as prefixes for the kernel's longest-prefix map.
//!
//! ```text
//!  spans of a port:   region 0x7f00_0000_1000..0x7f00_0001_0000   packet buffer
//!                     ring   0x7f00_0000_4000..0x7f00_0000_6000   ring
//!  prefixes:          …1000/52 …2000/51 …4000/50 …8000/49         packet buffer
//!                     …4000/51                                    ring: longer, so it wins
//! ```
//! A range splits into the largest aligned blocks. A ring's block never holds a block of the region around it: that
//! would have been one block too. Where both have the same block, the ring's is kept.
//!
//! Pure. Not here: who has which memory (`port`), and the map (`load`).
#![forbid(unsafe_code)]

use ebpf_common::faults::{Area, kind};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// Page size, bytes: nothing is told apart within a page.
pub const PAGE: u64 = 4096;

/// Addresses with the same first `len` bits as `start`; its other bits are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    /// The first address.
    pub start: u64,
    /// Bits, 0 to 64.
    pub len: u32,
}

/// A range of addresses and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Addresses in this process. Pages that it covers in part belong to it as a whole.
    pub addresses: Range<u64>,
    /// See [`kind`].
    pub kind: u32,
}

/// A change to the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// New, or another value than before.
    Put(Prefix, Area),
    /// Gone.
    Remove(Prefix),
}

/// What the map holds, by port.
#[derive(Debug, Default)]
pub struct Areas {
    ports: HashMap<u32, BTreeMap<Prefix, u32>>,
}

impl Areas {
    /// All of a port's memory is this from now on. Returns what has to change: removals first.
    pub fn set(&mut self, port: u32, spans: &[Span]) -> Vec<Change> {
        let mut wanted = BTreeMap::new();
        let (rings, rest): (Vec<_>, Vec<_>) = spans.iter().partition(|span| span.kind == kind::RING);
        for span in rest.into_iter().chain(rings) {
            for prefix in prefixes(span.addresses.clone()) {
                wanted.insert(prefix, span.kind);
            }
        }
        let had = self.ports.remove(&port).unwrap_or_default();
        let removed =
            had.keys().filter(|prefix| !wanted.contains_key(prefix)).map(|prefix| Change::Remove(*prefix));
        let put = wanted
            .iter()
            .filter(|(prefix, kind)| had.get(prefix) != Some(kind))
            .map(|(prefix, kind)| Change::Put(*prefix, Area { port, kind: *kind }));
        let changes = removed.chain(put).collect();
        if !wanted.is_empty() {
            self.ports.insert(port, wanted);
        }
        changes
    }
}

/// The pages of a range as prefixes: the fewest there are.
pub fn prefixes(addresses: Range<u64>) -> impl Iterator<Item = Prefix> {
    let end = addresses.end.checked_next_multiple_of(PAGE).unwrap_or(!(PAGE - 1));
    let mut start = addresses.start & !(PAGE - 1);
    std::iter::from_fn(move || {
        let left = end.checked_sub(start).filter(|left| *left > 0)?;
        let bits = left.ilog2().min(start.trailing_zeros());
        let prefix = Prefix { start, len: u64::BITS - bits };
        start += 1 << bits;
        Some(prefix)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the kernel's map would answer.
    fn lookup(map: &HashMap<Prefix, Area>, address: u64) -> Option<Area> {
        (0..=u64::BITS).rev().find_map(|len| {
            let mask = if len == 0 { 0 } else { u64::MAX << (u64::BITS - len) };
            map.get(&Prefix { start: address & mask, len }).copied()
        })
    }

    fn apply(map: &mut HashMap<Prefix, Area>, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::Put(prefix, area) => drop(map.insert(prefix, area)),
                Change::Remove(prefix) => assert!(map.remove(&prefix).is_some(), "{prefix:?} was not there"),
            }
        }
    }

    #[test]
    fn a_range_is_its_largest_aligned_blocks() {
        let found: Vec<_> = prefixes(0x1000..0x1_0000).map(|p| (p.start, p.len)).collect();
        assert_eq!(found, [(0x1000, 52), (0x2000, 51), (0x4000, 50), (0x8000, 49)]);
        assert_eq!(prefixes(0x7fff..0x8001).count(), 2);
        assert_eq!(prefixes(0x7000..0x7000).count(), 0);
        assert_eq!(prefixes(0x7010..0x7020).map(|p| p.start).collect::<Vec<_>>(), [0x7000]);
        assert!(prefixes(0..u64::MAX).count() < 64);
    }

    #[test]
    fn a_ring_that_has_the_regions_own_block_keeps_it_and_gives_it_back() {
        let region = Span { addresses: 0x4000..0x6000, kind: kind::PACKET_BUFFER };
        let ring = Span { addresses: 0x4000..0x5001, kind: kind::RING };
        let mut areas = Areas::default();
        let mut map = HashMap::new();
        apply(&mut map, areas.set(3, &[ring.clone(), region.clone()]));
        assert_eq!(lookup(&map, 0x5fff), Some(Area { port: 3, kind: kind::RING }));
        apply(&mut map, areas.set(3, &[region]));
        assert_eq!(lookup(&map, 0x5fff), Some(Area { port: 3, kind: kind::PACKET_BUFFER }));
        apply(&mut map, areas.set(3, &[]));
        assert!(map.is_empty());
        assert!(areas.set(3, &[]).is_empty());
    }

    /// Regions of a port side by side with gaps, and rings inside them, in pages.
    fn memory() -> impl Strategy<Value = Vec<Span>> {
        let region = (0..40_u64, 1..200_u64, prop::collection::vec((0..200_u64, 1..40_u64), 0..4));
        prop::collection::vec(region, 0..4).prop_map(|regions| {
            let mut at = 0x7f00;
            let mut spans = Vec::new();
            for (gap, pages, rings) in regions {
                at += gap;
                let region = at * PAGE..(at + pages) * PAGE;
                for (offset, len) in rings {
                    let start = region.start + offset * PAGE;
                    let end = (start + len * PAGE).min(region.end);
                    if start < end {
                        spans.push(Span { addresses: start + 16..end - 16, kind: kind::RING });
                    }
                }
                spans.push(Span { addresses: region, kind: kind::PACKET_BUFFER });
                at += pages;
            }
            spans
        })
    }

    proptest! {
        #[test]
        fn every_page_is_what_it_should_be_after_every_change(states in prop::collection::vec(memory(), 1..5)) {
            let mut areas = Areas::default();
            let mut map = HashMap::new();
            for spans in states {
                apply(&mut map, areas.set(1, &spans));
                for page in 0x7f00 - 1..0x7f00 + 1000 {
                    let holds = |span: &&Span| {
                        let first = span.addresses.start / PAGE;
                        (first..span.addresses.end.div_ceil(PAGE)).contains(&page)
                    };
                    let ring = spans.iter().filter(|s| s.kind == kind::RING).find(holds);
                    let expected = ring.or_else(|| spans.iter().find(holds)).map(|s| Area { port: 1, kind: s.kind });
                    prop_assert_eq!(lookup(&map, page * PAGE + 8), expected);
                }
            }
        }
    }
}
