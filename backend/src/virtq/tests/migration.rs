//! What migration needs of a queue: every page that changes is logged; memory that has not arrived parks the queue and
//! loses nothing.

use std::sync::Arc;

use proptest::prelude::*;

use super::super::*;
use super::driver::*;
use crate::memory::testing::{contents, memfd};
use crate::memory::{AccessError, DirtyLog, LOG_PAGE_SIZE, MissingRange, ResidencyMap};

/// Where the used ring is said to be logged: not where it is, so that the two cannot be mixed up.
const LOGGED_USED: u64 = 0x80_0000;

#[derive(Clone, Debug)]
enum Op {
    Offer(Vec<(u64, u32)>),
    /// Completes one chain, of which the first bytes are written by a copy, as the kernel would, or not at all.
    Complete {
        copied: u32,
        by_kernel: bool,
    },
    Publish,
    EnableKicks,
    DisableKicks,
    Remap,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => prop::collection::vec((0x5_0000u64..0xf_0000, 1u32..9000), 1..4).prop_map(Op::Offer),
        4 => (0u32..9000, any::<bool>()).prop_map(|(copied, by_kernel)| Op::Complete { copied, by_kernel }),
        2 => Just(Op::Publish),
        1 => Just(Op::EnableKicks),
        1 => Just(Op::DisableKicks),
        1 => Just(Op::Remap),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..Default::default() })]

    #[test]
    fn every_page_that_changes_is_logged(
        base: u16,
        event_idx: bool,
        size_shift in 2u32..9,
        ops in prop::collection::vec(op(), 1..60),
    ) {
        let mut driver = Driver::starting_at(1 << size_shift, base);
        driver.config.event_idx = event_idx;
        driver.config.log_used = Some(LOGGED_USED);
        let log_size = (LOGGED_USED + 0x10_0000) / LOG_PAGE_SIZE / 8;
        let log_file = memfd(log_size);
        let log = Arc::new(DirtyLog::new(log_file.try_clone().unwrap().into(), log_size, 0).unwrap());
        let memory = driver.mem.with_log(Some(log));
        let mut queue = SplitQueue::new(&memory, &driver.config).unwrap();
        let mut chain = Chain::new();
        let mut stamp = 0u8;
        for op in ops {
            let before = contents(&driver.file);
            match op {
                Op::Offer(segments) => {
                    offer(&driver, &segments);
                    continue;
                }
                Op::Complete { copied, by_kernel } => {
                    if !queue.pop(&memory, &mut chain).unwrap() {
                        continue;
                    }
                    stamp = stamp.wrapping_add(1);
                    let mut left = copied;
                    for segment in chain.writable() {
                        let part = left.min(segment.len);
                        let bytes = vec![stamp; part as usize];
                        if by_kernel {
                            driver.put(segment.gpa, &bytes);
                            memory.mark_written(segment.gpa, part);
                        } else {
                            memory.write(segment.gpa, &bytes).unwrap();
                        }
                        left -= part;
                    }
                    queue.push(chain.head(), copied - left);
                    // Not visible yet, but written: the element is logged by the publish that follows.
                    queue.publish();
                }
                Op::Publish => queue.publish(),
                Op::EnableKicks => assert_ne!(queue.enable_kicks(), Err(QueueError::Busy)),
                Op::DisableKicks => queue.disable_kicks(),
                Op::Remap => queue.remap(&memory).unwrap(),
            }
            let after = contents(&driver.file);
            let logged = contents(&log_file);
            let is_logged = |page: usize| logged[page / 8] & (1 << (page % 8)) != 0;
            for page in 0..after.len() / 4096 {
                let range = page * 4096..(page + 1) * 4096;
                if before[range.clone()] == after[range.clone()] {
                    continue;
                }
                // The used ring is logged elsewhere; its pages hold nothing else.
                let at = range.start as u64;
                let page = if (USED..USED + 0x1000).contains(&at) {
                    ((at - USED + LOGGED_USED) / 4096) as usize
                } else {
                    page
                };
                prop_assert!(is_logged(page), "page {page:#x} was written and not logged");
            }
        }
    }
}

fn offer(driver: &Driver, segments: &[(u64, u32)]) {
    let size = driver.config.size;
    if driver.avail_idx().wrapping_sub(driver.used_idx()) + segments.len() as u16 > size {
        return;
    }
    let head = driver.avail_idx() % size;
    let count = segments.len() as u16;
    for (i, (addr, len)) in (0..).zip(segments) {
        let next = if i + 1 < count { NEXT } else { 0 };
        driver.descriptor(DESC, (head + i) % size, (*addr, *len, WRITE | next, (head + i + 1) % size));
    }
    driver.offer(head);
}

#[test]
fn the_used_ring_is_logged_across_its_end_and_only_where_asked() {
    let mut driver = Driver::new(1024);
    driver.config.log_used = Some(LOGGED_USED);
    let log_size = (LOGGED_USED + 0x10_0000) / LOG_PAGE_SIZE / 8;
    let log_file = memfd(log_size);
    let log = Arc::new(DirtyLog::new(log_file.try_clone().unwrap().into(), log_size, 0).unwrap());
    let memory = driver.mem.with_log(Some(log));
    let mut queue = SplitQueue::new(&memory, &driver.config).unwrap();
    let complete = |queue: &mut SplitQueue, count: u16| {
        let mut chain = Chain::new();
        for _ in 0..count {
            driver.offer_one(0, 0x5_0000, 1, 0);
            assert!(queue.pop(&memory, &mut chain).unwrap());
            queue.push(chain.head(), 0);
        }
        queue.publish();
        let bits = contents(&log_file);
        log_file.set_len(0).unwrap();
        log_file.set_len(log_size).unwrap();
        let first = (LOGGED_USED / LOG_PAGE_SIZE / 8) as usize;
        assert!(bits[..first].iter().all(|byte| *byte == 0));
        bits[first]
    };
    // 1024 elements of 8 bytes from +4 on: pages 0, 1, and 4 bytes of page 2.
    assert_eq!(complete(&mut queue, 1), 0b001);
    assert_eq!(complete(&mut queue, 510), 0b001);
    assert_eq!(complete(&mut queue, 1), 0b011, "an element across a page boundary");
    assert_eq!(complete(&mut queue, 511), 0b011, "the index is on page 0");
    assert_eq!(complete(&mut queue, 2), 0b111, "the last element and the first");
    queue.set_log_used(None);
    assert_eq!(complete(&mut queue, 5), 0);
    queue.set_log_used(Some(LOGGED_USED + 0x1000));
    assert_eq!(complete(&mut queue, 1), 0b010);
}

#[test]
fn a_second_migration_logs_again() {
    // cloud-hypervisor #8918: LOG_ALL was lost after a migration that failed.
    let mut driver = Driver::new(8);
    driver.config.log_used = Some(0);
    let mut queue = driver.queue();
    let mut chain = Chain::new();
    for round in 0..3 {
        let log_file = memfd(0x1000);
        let log = Arc::new(DirtyLog::new(log_file.try_clone().unwrap().into(), 0x1000, 0).unwrap());
        let logging = driver.mem.with_log(Some(log));
        queue.remap(&logging).unwrap();
        driver.offer_one(0, 0x5_0000, 8, WRITE);
        assert!(queue.pop(&logging, &mut chain).unwrap());
        logging.write(0x5_0000, &[round; 8]).unwrap();
        queue.push(0, 8);
        queue.publish();
        let bits = contents(&log_file);
        assert_eq!((bits[0], bits[0x50 / 8]), (1, 1), "round {round}");
        let quiet = logging.with_log(None);
        queue.remap(&quiet).unwrap();
        quiet.write(0x6_0000, &[round]).unwrap();
        assert_eq!(contents(&log_file)[0x60 / 8], 0);
    }
}

/// A driver whose memory is missing but for what `present` says.
fn postcopy(driver: &Driver) -> (crate::memory::GuestMemory, Arc<ResidencyMap>) {
    let map = Arc::new(ResidencyMap::new(MEM_SIZE, 0x1000));
    (driver.mem.with_residency(&[Some(map.clone())]), map)
}

fn expect_missing(result: Result<bool, PopError>, gpa: u64) -> MissingRange {
    match result {
        Err(PopError::Missing(missing)) => {
            assert_eq!(missing.gpa, gpa);
            missing
        }
        other => panic!("{other:?}, not missing {gpa:#x}"),
    }
}

#[test]
fn a_queue_parks_on_each_missing_part_and_goes_on() {
    let driver = Driver::new(512);
    const TABLE: u64 = 0x5_0ff0; // Its second descriptor is on the next page.
    driver.descriptor(DESC, 7, (TABLE, 32, INDIRECT, 0));
    driver.descriptor(TABLE, 0, (0x6_0000, 10, NEXT, 1));
    driver.descriptor(TABLE, 1, (0x7_0ffe, 4, WRITE, 0));
    driver.offer(7);
    driver.offer_one(8, 0x8_0000, 1, 0);
    let (memory, map) = postcopy(&driver);
    let mut queue = SplitQueue::new(&memory, &driver.config).unwrap();
    let mut chain = Chain::new();
    let arrive = |missing: MissingRange| map.set_present(missing.gpa..missing.gpa + missing.len);
    // Descriptor table (two pages), available ring, used ring: none is touched before it is there.
    let missing = expect_missing(queue.pop(&memory, &mut chain), DESC);
    assert_eq!(missing.len, 0x2000);
    assert_eq!(queue.available(), Err(QueueError::Missing(missing)));
    assert_eq!(queue.enable_kicks(), Err(QueueError::Missing(missing)));
    queue.disable_kicks();
    assert!(!queue.needs_call());
    queue.publish();
    assert_eq!(driver.used_flags(), 0);
    arrive(missing);
    arrive(expect_missing(queue.pop(&memory, &mut chain), AVAIL));
    let missing = expect_missing(queue.pop(&memory, &mut chain), USED);
    assert_eq!(missing.len, 0x2000);
    map.set_present(USED..USED + 1);
    arrive(expect_missing(queue.pop(&memory, &mut chain), USED + 0x1000));
    // Both pages of the indirect table.
    arrive(expect_missing(queue.pop(&memory, &mut chain), 0x5_0000));
    assert_eq!(queue.in_flight(), 0);
    arrive(expect_missing(queue.pop(&memory, &mut chain), 0x5_1000));
    assert_eq!(queue.pop(&memory, &mut chain), Ok(true));
    assert_eq!((chain.head(), chain.readable().len(), chain.writable().len()), (7, 1, 1));
    // Buffers are asked for when they are used; the chain is given back meanwhile.
    let segment = chain.writable()[0];
    let missing = match memory.check(segment.gpa, segment.len) {
        Err(AccessError::Missing(missing)) => missing,
        other => panic!("{other:?}"),
    };
    assert_eq!(missing, MissingRange { gpa: 0x7_0000, len: 0x2000 });
    queue.unpop(1);
    assert_eq!(queue.base(), 0, "GET_VRING_BASE of a parked ring: the first chain that was not completed");
    arrive(missing);
    for head in [7, 8] {
        assert_eq!(queue.pop(&memory, &mut chain), Ok(true));
        assert_eq!(chain.head(), head);
        queue.push(head, 4);
    }
    queue.publish();
    assert_eq!((driver.used(0), driver.used(1)), ((7, 4), (8, 4)));
    // The end of postcopy: the same memory, all present.
    queue.remap(&memory.with_residency(&[])).unwrap();
    driver.offer_one(9, 0x9_0000, 1, 0);
    assert_eq!(queue.pop(&memory, &mut chain), Ok(true));
}

#[test]
fn memory_that_may_be_missing_is_not_put_under_chains_in_work() {
    let driver = Driver::new(8);
    driver.offer_one(0, 0x1000, 1, 0);
    let mut queue = driver.queue();
    let mut chain = Chain::new();
    assert_eq!(queue.pop(&driver.mem, &mut chain), Ok(true));
    let (memory, map) = postcopy(&driver);
    assert_eq!(queue.remap(&memory), Err(QueueError::Busy));
    queue.push(0, 0);
    queue.publish();
    assert_eq!(driver.used_idx(), 1, "the old memory stays in use");
    queue.remap(&memory).unwrap();
    assert!(matches!(queue.available(), Err(QueueError::Missing(_))));
    map.set_present(0..MEM_SIZE);
    assert_eq!(queue.available(), Ok(0));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..Default::default() })]

    /// Chains through a memory that arrives page by page, in any order, come out as through one that was always there.
    #[test]
    fn nothing_is_lost_while_pages_arrive(
        tables in prop::collection::vec((0x5_0000u64..0x9_0000, 1u16..9), 1..30),
        extra in prop::collection::vec(0u64..MEM_SIZE, 0..40),
    ) {
        let driver = Driver::new(32);
        for (head, (table, count)) in (0..).zip(&tables) {
            // A gap between tables keeps them from overwriting each other.
            let table = table & !0xff | 0x8;
            driver.descriptor(DESC, head, (table, u32::from(*count) * 16, INDIRECT, 0));
            for i in 0..*count {
                let next = if i + 1 < *count { NEXT } else { 0 };
                driver.descriptor(table, i, (u64::from(i), 1 + u32::from(head), next, i + 1));
            }
            driver.offer(head);
        }
        let chains = |memory: &crate::memory::GuestMemory, arrive: &mut dyn FnMut(MissingRange)| {
            let mut queue = SplitQueue::new(memory, &driver.config).unwrap();
            let mut chain = Chain::new();
            let mut seen = Vec::new();
            loop {
                match queue.pop(memory, &mut chain) {
                    Ok(true) => seen.push((chain.head(), chain.readable().to_vec())),
                    Ok(false) => return seen,
                    Err(PopError::Missing(missing)) => arrive(missing),
                    Err(PopError::Bad { head, .. }) => seen.push((head, vec![])),
                    Err(PopError::Broken(error)) => panic!("{error}"),
                }
            }
        };
        let expected = chains(&driver.mem, &mut |_| panic!("all is present"));
        let (memory, map) = postcopy(&driver);
        let mut extra = extra.into_iter();
        let seen = chains(&memory, &mut |missing| {
            map.set_present(missing.gpa..missing.gpa + 1);
            if let Some(page) = extra.next() {
                map.set_present(page..page + 1);
            }
        });
        prop_assert_eq!(seen, expected);
    }
}
