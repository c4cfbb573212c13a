//! What a look ahead tells against what taking the chains then needs: all of it, and nothing else.

use super::super::lookahead::Purpose;
use super::super::*;
use super::driver::*;
use crate::memory::{GuestMemory, MissingRange, ResidencyMap};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::Arc;

const PAGE: u64 = 0x1000;
const SIZE: u16 = 64;
/// Indirect tables and buffers lie from here on.
const ROOM: u64 = 0x4_0000;
/// No buffer is so long, bytes.
const LEN_MAX: u32 = 0x2800;

#[derive(Clone, Debug)]
struct Asked {
    /// Descriptors in the table of the ring, as address and length.
    direct: Vec<(u64, u32)>,
    /// An indirect table at this address follows, with these.
    indirect: Option<(u64, Vec<(u64, u32)>)>,
}

fn buffer() -> impl Strategy<Value = (u64, u32)> {
    (ROOM..MEM_SIZE - 0x3000, 1..LEN_MAX)
}

fn chains() -> impl Strategy<Value = Vec<Asked>> {
    let table = (ROOM..MEM_SIZE - 0x1000, prop::collection::vec(buffer(), 1..20));
    let chain = (prop::collection::vec(buffer(), 1..3), prop::option::of(table))
        .prop_map(|(direct, indirect)| Asked { direct, indirect });
    prop::collection::vec(chain, 1..16)
}

fn write(driver: &Driver, chains: &[Asked]) {
    let mut head = 0;
    // Tables first: one that lies in another is whatever it then is, for both sides.
    for chain in chains {
        if let Some((table, buffers)) = &chain.indirect {
            for (i, (addr, len)) in (0u16..).zip(buffers) {
                let more = if usize::from(i) + 1 < buffers.len() { NEXT } else { 0 };
                driver.descriptor(*table, i, (*addr, *len, WRITE | more, i + 1));
            }
        }
    }
    for chain in chains {
        let mut parts: Vec<_> = chain.direct.iter().map(|(addr, len)| (*addr, *len, WRITE)).collect();
        if let Some((table, buffers)) = &chain.indirect {
            parts.push((*table, 16 * buffers.len() as u32, INDIRECT));
        }
        driver.offer_chain(head, &parts);
        head += parts.len() as u16;
    }
}

fn pages(range: MissingRange) -> impl Iterator<Item = u64> {
    range.gpa / PAGE..(range.gpa + range.len).div_ceil(PAGE)
}

fn look(queue: &mut SplitQueue, mem: &GuestMemory) -> Vec<(MissingRange, Purpose)> {
    let mut told = Vec::new();
    queue.look_ahead(mem, 0, SIZE, &mut Chain::new(), |range, purpose| told.push((range, purpose)));
    told
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn what_is_told_is_what_is_needed(chains in chains(), here in prop::collection::btree_set(0..256u64, 0..200)) {
        let driver = Driver::new(SIZE);
        write(&driver, &chains);
        let map = Arc::new(ResidencyMap::new(MEM_SIZE, PAGE));
        here.iter().for_each(|page| map.set_present(page * PAGE..(page + 1) * PAGE));
        let mem = driver.mem.with_residency(&[Some(map.clone())]);
        let mut queue = SplitQueue::new(&mem, &driver.config).unwrap();
        let mut told_ever = BTreeSet::new();
        // The ring, then tables, page by page (an entry may lie on two), then buffers.
        for round in 0.. {
            let told = look(&mut queue, &mem);
            if told.is_empty() {
                break;
            }
            prop_assert!(round < 8, "it tells something new again and again");
            for (range, purpose) in told {
                prop_assert!(range.len > 0);
                if purpose == Purpose::Ring {
                    prop_assert!(range.gpa < ROOM);
                }
                for page in pages(range) {
                    // Told in this look for two chains, perhaps; never if it is there.
                    prop_assert!(map.first_missing(page * PAGE..page * PAGE + 1).is_some() || told_ever.contains(&page));
                    told_ever.insert(page);
                }
            }
            told_ever.iter().for_each(|page| map.set_present(page * PAGE..(page + 1) * PAGE));
        }
        // All of it: everything can be taken, and every buffer is there.
        let mut needed: BTreeSet<u64> = [DESC, AVAIL, USED].iter().flat_map(|at| at / PAGE..at / PAGE + 1).collect();
        let mut chain = Chain::new();
        // A table that another was written over names anything: that may be no memory, or longer than what is looked at.
        let mut overwritten = false;
        for asked in &chains {
            match queue.pop(&mem, &mut chain) {
                Ok(some) => {
                    prop_assert!(some);
                    for segment in chain.writable().iter().chain(chain.readable()) {
                        if segment.len >= LEN_MAX || segment.gpa.saturating_add(segment.len.into()) > MEM_SIZE {
                            overwritten = true;
                            continue;
                        }
                        prop_assert_eq!(mem.check(segment.gpa, segment.len), Ok(()));
                        needed.extend(segment.gpa / PAGE..=(segment.gpa + u64::from(segment.len) - 1) / PAGE);
                    }
                }
                Err(PopError::Bad { .. }) => {}
                Err(other) => prop_assert!(false, "{other}"),
            }
            if let Some((table, buffers)) = &asked.indirect {
                needed.extend(table / PAGE..=(table + 16 * buffers.len() as u64 - 1) / PAGE);
            }
        }
        // Nothing else. (A chain that turned out bad may have had more.)
        if queue.in_flight() == chains.len() as u16 && !overwritten {
            let strange: Vec<_> = told_ever.difference(&needed).collect();
            prop_assert!(strange.is_empty(), "{strange:?}");
        }
    }
}

/// However long its chains are, a guest cannot make a look long.
#[test]
fn a_look_has_an_end() {
    let driver = Driver::new(1024);
    let map = Arc::new(ResidencyMap::new(MEM_SIZE, PAGE));
    map.set_present(0..ROOM);
    let mem = driver.mem.with_residency(&[Some(map)]);
    // One chain of 1024 descriptors of 4 GiB, offered 1024 times.
    for i in 0..1024u16 {
        driver.descriptor(DESC, i, (ROOM, 0x40_0000, NEXT, i + 1));
    }
    driver.descriptor(DESC, 1023, (ROOM, 0x40_0000 - 1, 0, 0));
    (0..1024).for_each(|_| driver.offer(0));
    let mut queue = SplitQueue::new(&mem, &driver.config).unwrap();
    let mut told = 0;
    let mut bytes = 0;
    queue.look_ahead(&mem, 0, 1024, &mut Chain::new(), |range, _| {
        told += 1;
        bytes = bytes.max(range.len);
    });
    assert_eq!(told, 4 * 1024, "as many segments as a look takes in");
    assert_eq!(bytes, 68 << 10);
    // A loop, which is found out at its 1024th step.
    driver.descriptor(DESC, 1023, (ROOM, 1, NEXT, 0));
    let began = std::time::Instant::now();
    for _ in 0..100 {
        assert!(look(&mut queue, &mem).is_empty());
    }
    // 4 chains each time, not 1024: 0.4 million descriptors instead of 100 million.
    assert!(began.elapsed() < std::time::Duration::from_secs(1), "{:?}", began.elapsed());
}
