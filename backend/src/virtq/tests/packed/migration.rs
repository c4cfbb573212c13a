//! What migration needs of a packed queue: every page that changes is logged; memory that has not arrived parks the queue
//! and loses nothing.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use proptest::prelude::*;

use super::super::super::lookahead::Purpose;
use super::super::super::*;
use super::super::driver::*;
use super::driver::*;
use crate::memory::testing::{contents, memfd};
use crate::memory::{DirtyLog, LOG_PAGE_SIZE, MissingRange, ResidencyMap};

const PAGE: u64 = 0x1000;

#[derive(Clone, Debug)]
enum Op {
    Offer(usize),
    /// Pops and completes so many chains, one by one or at once.
    Complete(u8, bool),
    Kicks(bool),
    Remap,
    Restart,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (1usize..5).prop_map(Op::Offer),
        4 => (1u8..60, any::<bool>()).prop_map(|(n, all)| Op::Complete(n, all)),
        2 => any::<bool>().prop_map(Op::Kicks),
        1 => Just(Op::Remap),
        1 => Just(Op::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..Default::default() })]

    /// Whatever SET_VRING_ADDR says about a used ring: there is none.
    #[test]
    fn every_page_that_changes_is_logged(
        // Several pages of ring.
        size in 200u16..1200,
        start: u16,
        wrap: bool,
        log_used in prop::option::of(Just(0x100_0000u64)),
        bits in 0u8..4,
        ops in prop::collection::vec(op(), 1..60),
    ) {
        let mut driver = PackedDriver::starting_at(size, At { slot: start % size, wrap });
        if bits & 1 != 0 {
            driver = driver.in_order();
        }
        driver.config().event_idx = bits & 2 != 0;
        driver.config().log_used = log_used;
        let log_size = MEM_SIZE / LOG_PAGE_SIZE / 8;
        let log_file = memfd(log_size);
        let log = Arc::new(DirtyLog::new(log_file.try_clone().unwrap().into(), log_size, 0).unwrap());
        let memory = driver.mem().with_log(Some(log));
        let mut queue = PackedQueue::new(&memory, &driver.base.config).unwrap();
        let mut chain = Chain::new();
        for op in ops {
            if let Op::Offer(len) = op {
                for _ in 0..30 {
                    driver.offer(&vec![(0x8_0000, 60, 0); len]);
                }
                continue;
            }
            let before = contents(&driver.base.file);
            match op {
                Op::Complete(n, all) => {
                    let mut done = Vec::new();
                    while done.len() < n.into() && queue.pop(&memory, &mut chain).unwrap() {
                        done.push((chain.head(), 0));
                    }
                    match all {
                        true => queue.push_all(done.into_iter()),
                        false => done.into_iter().for_each(|(id, len)| queue.push(id, len)),
                    }
                    queue.publish();
                    driver.take_used();
                }
                Op::Kicks(true) => drop(queue.enable_kicks().unwrap()),
                Op::Kicks(false) => queue.disable_kicks(),
                Op::Remap => queue.remap(&memory).unwrap(),
                _ => {
                    let config = QueueConfig { base: queue.base(), ..driver.base.config };
                    queue = PackedQueue::new(&memory, &config).unwrap();
                }
            }
            let after = contents(&driver.base.file);
            let logged = contents(&log_file);
            for page in 0..after.len() / 4096 {
                let range = page * 4096..(page + 1) * 4096;
                let is_logged = logged[page / 8] & (1 << (page % 8)) != 0;
                prop_assert!(before[range.clone()] == after[range] || is_logged, "page {page:#x}");
            }
        }
    }

    /// Pages come one by one, in the order in which they are asked for: what is told is what is needed, all chains come, and none
    /// comes before its page.
    #[test]
    fn late_memory_changes_nothing_but_the_time(
        chains in prop::collection::vec((1usize..4, any::<bool>(), 0x50u64..0xf0), 1..30),
        here in prop::collection::btree_set(0..256u64, 0..200),
    ) {
        let mut driver = PackedDriver::new(64);
        let mut expected = VecDeque::new();
        for (i, (len, table, page)) in chains.iter().enumerate() {
            let parts: Vec<_> = (0..*len as u64).map(|n| ((page + n) * PAGE + 0xf00, 0x200, WRITE)).collect();
            // Over the end of a page.
            let at = 0x4_0ff0 + (i as u64 % 8) * PAGE;
            let id = if *table { driver.offer_table(at, &parts) } else { driver.offer(&parts) };
            // A table that was written twice is what it then is: not of interest here.
            expected.extend(id);
        }
        let map = Arc::new(ResidencyMap::new(MEM_SIZE, PAGE));
        here.iter().for_each(|page| map.set_present(page * PAGE..(page + 1) * PAGE));
        let mem = driver.mem().with_residency(&[Some(map.clone())]);
        let mut queue = PackedQueue::new(&mem, &driver.base.config).unwrap();
        let mut chain = Chain::new();
        let mut told = BTreeSet::new();
        let mut asked = VecDeque::new();
        while !expected.is_empty() {
            let first = queue.first_waiting();
            let until = queue.look_ahead(&mem, 0, 64, &mut Chain::new(), |range: MissingRange, purpose| {
                let ring = [DESC, AVAIL, USED].contains(&(range.gpa & !0xfff));
                assert_eq!(ring, purpose == Purpose::Ring, "{range:?} {purpose:?}");
                for page in range.gpa / PAGE..(range.gpa + range.len).div_ceil(PAGE) {
                    if told.insert(page) {
                        asked.push_back(page);
                    }
                }
            });
            prop_assert!(until.wrapping_sub(first) as usize <= expected.len());
            match queue.pop(&mem, &mut chain) {
                Ok(true) => {
                    prop_assert_eq!(Some(chain.head()), expected.pop_front());
                    queue.push(chain.head(), 1);
                    queue.publish();
                    continue;
                }
                Err(PopError::Missing(range)) => prop_assert!(told.contains(&(range.gpa / PAGE))),
                other => prop_assert!(false, "{other:?}"),
            }
            let page = asked.pop_front().unwrap();
            map.set_present(page * PAGE..(page + 1) * PAGE);
        }
    }
}

/// A ring that is missing says so, wherever it is missing, and is not touched.
#[test]
fn each_part_of_the_ring_is_waited_for() {
    for part in [DESC, DESC + PAGE, AVAIL, USED] {
        let mut driver = PackedDriver::new(300);
        let id = driver.offer(&[(0x8_0000, 60, WRITE)]).unwrap();
        let map = Arc::new(ResidencyMap::new(MEM_SIZE, PAGE));
        (0..MEM_SIZE / PAGE).map(|page| page * PAGE).filter(|page| *page != part).for_each(|page| {
            map.set_present(page..page + PAGE);
        });
        let mem = driver.mem().with_residency(&[Some(map.clone())]);
        let mut queue = PackedQueue::new(&mem, &driver.base.config).unwrap();
        let missing = MissingRange { gpa: part, len: PAGE };
        let mut chain = Chain::new();
        assert_eq!(queue.pop(&mem, &mut chain), Err(PopError::Missing(missing)));
        assert_eq!(queue.available(), Err(QueueError::Missing(missing)));
        assert_eq!(queue.enable_kicks(), Err(QueueError::Missing(missing)));
        assert_eq!(
            queue.pop_singles(Access::Writable, &mut [Single::default()]),
            Err(QueueError::Missing(missing))
        );
        assert!(queue.may_have_more());
        queue.disable_kicks();
        queue.prefetch_used(4);
        queue.prefetch_buffer(&mem, 4);
        queue.publish();
        assert!(!queue.needs_call());
        assert_eq!(driver.device_event(), (0, 0), "not written while it is missing");
        map.set_present(part..part + PAGE);
        assert_eq!(queue.pop(&mem, &mut chain), Ok(true));
        queue.push(id, 1);
        // Work in hand, and a table of which nothing has come.
        let nothing = driver.mem().with_residency(&[Some(Arc::new(ResidencyMap::new(MEM_SIZE, PAGE)))]);
        assert_eq!(queue.remap(&nothing), Err(QueueError::Busy));
        queue.publish();
        assert_eq!(driver.take_used(), [(id, Some(1))]);
        assert_eq!(queue.remap(&nothing), Ok(()));
        assert!(matches!(queue.pop(&mem, &mut chain), Err(PopError::Missing(_))));
    }
}
