//! One property at a time.

use super::super::super::*;
use super::super::driver::{AVAIL, DESC, INDIRECT, MEM_SIZE, NEXT, USED, WRITE};
use super::driver::*;
use crate::memory::testing::USER_BASE;

fn pop(queue: &mut PackedQueue, driver: &PackedDriver) -> Result<Option<Chain>, PopError> {
    let mut chain = Chain::new();
    queue.pop(driver.mem(), &mut chain).map(|some| some.then_some(chain))
}

fn segment(gpa: u64, len: u32) -> Segment {
    Segment { gpa, len }
}

/// §2.8.6: the id is in the last descriptor.
#[test]
fn a_chain_is_split_into_what_to_read_and_what_to_write() {
    let mut driver = PackedDriver::new(7);
    let parts = [(0x1000, 12, 0), (0x2000, 1500, 0), (0x3000, 64, WRITE), (0x4000, 1, WRITE)];
    let id = driver.offer(&parts).unwrap();
    let mut queue = driver.queue();
    assert_eq!(queue.available(), Ok(1));
    let chain = pop(&mut queue, &driver).unwrap().unwrap();
    assert_eq!(chain.head(), id);
    assert_eq!(chain.readable(), [segment(0x1000, 12), segment(0x2000, 1500)]);
    assert_eq!(chain.writable(), [segment(0x3000, 64), segment(0x4000, 1)]);
    assert_eq!((chain.readable_len(), chain.writable_len()), (1512, 65));
    assert!(pop(&mut queue, &driver).unwrap().is_none());
    queue.push(id, 9);
    queue.publish();
    assert_eq!(driver.take_used(), [(id, Some(9))]);
    assert_eq!(queue.base(), 0x8004_8004);
}

/// §2.8.7: the table need not be aligned; of its flags only WRITE means something, ids nothing.
#[test]
fn a_table_is_read_from_beginning_to_end() {
    let mut driver = PackedDriver::new(8);
    let id = driver.offer_table(0x5003, &[(0x1000, 12, NEXT), (0x2000, 100, INDIRECT), (0x3000, 7, WRITE)]);
    let mut queue = driver.queue();
    let chain = pop(&mut queue, &driver).unwrap().unwrap();
    assert_eq!(Some(chain.head()), id);
    assert_eq!(chain.readable(), [segment(0x1000, 12), segment(0x2000, 100)]);
    assert_eq!(chain.writable(), [segment(0x3000, 7)]);
}

/// DPDK's driver marks the header that it sends as writable, and now and then a piece of the frame.
#[test]
fn tables_of_a_transmit_ring_are_only_read() {
    let mut driver = PackedDriver::new(8);
    driver.config().transmit = true;
    driver.offer_table(0x5000, &[(0x1000, 12, WRITE), (0x2000, 100, 0), (0x3000, 7, WRITE)]);
    let mut queue = driver.queue();
    let chain = pop(&mut queue, &driver).unwrap().unwrap();
    assert_eq!(chain.readable(), [segment(0x1000, 12), segment(0x2000, 100), segment(0x3000, 7)]);
}

/// The chain comes back by its id, in its whole length, and the next one is found.
#[test]
fn what_is_wrong_with_a_chain_costs_that_chain() {
    let long = |len: u32| (0x1000, len, 0);
    let table = |at: u64, len: u32| vec![(at, len, INDIRECT)];
    let cases = [
        (vec![long(12), long(0), long(5)], ChainError::ZeroLength),
        (vec![(0x1000, 5, WRITE), long(5), long(6)], ChainError::ReadableAfterWritable),
        (vec![long(u32::MAX), long(1)], ChainError::TooManyBytes),
        (table(0x5000, 0), ChainError::IndirectLength(0)),
        (table(0x5000, 17), ChainError::IndirectLength(17)),
        (table(0x5000, 0xffff_fff0), ChainError::IndirectLength(0xffff_fff0)),
        (table(MEM_SIZE, 16), ChainError::IndirectOutOfRange),
        (table(u64::MAX - 15, 32), ChainError::IndirectOutOfRange),
        (vec![(0x5000, 16, INDIRECT), long(5)], ChainError::IndirectWithNext),
        (vec![long(5), (0x5000, 16, INDIRECT), long(5)], ChainError::IndirectWithNext),
        (vec![long(5), (0x5000, 16, INDIRECT)], ChainError::IndirectWithNext),
    ];
    for (parts, expected) in cases {
        let mut driver = PackedDriver::new(5);
        driver.base.descriptor(0x5000, 0, (0x1000, 60, 0, 0));
        let bad = driver.offer(&parts).unwrap();
        let good = driver.offer(&[long(7)]).unwrap();
        let mut queue = driver.queue();
        assert_eq!(pop(&mut queue, &driver).unwrap_err(), PopError::Bad { head: bad, why: expected });
        assert_eq!(pop(&mut queue, &driver).unwrap().unwrap().head(), good);
        queue.push(bad, 0);
        queue.push(good, 0);
        queue.publish();
        assert_eq!(driver.take_used(), [(bad, Some(0)), (good, Some(0))], "{expected:?}");
    }
    let mut driver = PackedDriver::new(8);
    driver.config().indirect = false;
    driver.offer_table(0x5000, &[long(5)]);
    let error = pop(&mut driver.queue(), &driver).unwrap_err();
    assert!(matches!(error, PopError::Bad { why: ChainError::IndirectNotNegotiated, .. }));
    let mut driver = PackedDriver::new(2000);
    driver.offer(&vec![long(1); MAX_CHAIN + 1]);
    let id = driver.offer(&[long(1)]).unwrap();
    let mut queue = driver.queue();
    assert!(matches!(pop(&mut queue, &driver).unwrap_err(), PopError::Bad { why: ChainError::TooLong, .. }));
    assert_eq!(pop(&mut queue, &driver).unwrap().unwrap().head(), id);
}

/// Nothing tells a driver's wrong from another's ring: what is available twice is not believed.
#[test]
fn descriptors_in_work_are_not_available_again() {
    let mut driver = PackedDriver::new(4);
    for _ in 0..4 {
        driver.offer(&[(0x1000, 10, 0)]);
    }
    let mut queue = driver.queue();
    for _ in 0..4 {
        assert!(pop(&mut queue, &driver).unwrap().is_some());
    }
    assert!(pop(&mut queue, &driver).unwrap().is_none());
    driver.set_flags(0, F_USED);
    let overrun = QueueError::Overrun { taken: 4, size: 4 };
    assert_eq!(pop(&mut queue, &driver).unwrap_err(), PopError::Broken(overrun));
    let mut out = [Single::default(); 8];
    assert_eq!(queue.pop_singles(Access::Readable, &mut out), Ok(0));
}

#[test]
fn a_list_without_an_end_breaks_the_ring() {
    let driver = PackedDriver::new(4);
    for slot in 0..4 {
        driver.descriptor(slot, (0x1000, 1, slot, F_AVAIL | NEXT));
    }
    let mut queue = driver.queue();
    let overrun = QueueError::Overrun { taken: 0, size: 4 };
    assert_eq!(pop(&mut queue, &driver).unwrap_err(), PopError::Broken(overrun));
    // One that runs into what is in work.
    driver.descriptor(0, (0x1000, 1, 9, F_AVAIL));
    driver.descriptor(1, (0x1000, 1, 9, F_AVAIL));
    assert!(pop(&mut queue, &driver).unwrap().is_some());
    assert!(pop(&mut queue, &driver).unwrap().is_some());
    let overrun = QueueError::Overrun { taken: 2, size: 4 };
    assert_eq!(pop(&mut queue, &driver).unwrap_err(), PopError::Broken(overrun));
}

/// The device gives ids back as they came.
#[test]
fn ids_mean_nothing_to_the_device() {
    let driver = PackedDriver::new(4);
    driver.descriptor(0, (0x1000, 10, 0xffff, F_AVAIL));
    driver.descriptor(1, (0x1000, 10, 0xffff, F_AVAIL));
    let mut queue = driver.queue();
    for _ in 0..2 {
        assert_eq!(pop(&mut queue, &driver).unwrap().unwrap().head(), 0xffff);
        queue.push(0xffff, 0);
    }
    queue.publish();
    assert_eq!((driver.flags(0), driver.flags(1)), (F_AVAIL | F_USED, F_AVAIL | F_USED));
}

/// A new ring is all zeros, which no place of its first round takes for available.
#[test]
fn flags_that_are_not_this_rounds_mean_nothing() {
    for (wrap, flags) in [(true, [0, F_USED, F_USED | F_AVAIL]), (false, [0, F_AVAIL, F_USED | F_AVAIL])] {
        let driver = PackedDriver::starting_at(4, At { slot: 0, wrap });
        for flags in flags {
            driver.descriptor(0, (0x1000, 10, 0, flags));
            assert!(pop(&mut driver.queue(), &driver).unwrap().is_none(), "{wrap} {flags:#x}");
        }
    }
}

/// vhost-user: Vring descriptor indices for packed virtqueues.
#[test]
fn a_base_has_two_halves() {
    let begin = |base: u32| {
        let mut driver = PackedDriver::new(10);
        driver.config().base = base;
        PackedQueue::new(driver.mem(), &driver.base.config).map(|queue| (queue.base(), queue.resynced()))
    };
    assert_eq!(begin(0x8000_8000), Ok((0x8000_8000, false)));
    assert_eq!(begin(0x0005_0005), Ok((0x0005_0005, false)));
    // DPDK, of either side, says nothing of the used place.
    assert_eq!(begin(0x8000), Ok((0x8000_8000, false)));
    assert_eq!(begin(0x0005), Ok((0x0005_0005, false)));
    // Taken and not given back: they come again.
    assert_eq!(begin(0x8003_8007), Ok((0x8003_8003, true)));
    assert_eq!(begin(0x8008_0002), Ok((0x8008_8008, true)));
    for base in [0x800a, 0x800a_8000, 0x8000_000a, 0xffff_ffff] {
        assert_eq!(begin(base), Err(QueueError::PackedBase { base, size: 10 }));
    }
}

/// §2.8.10.1
#[test]
fn size_and_alignment_are_checked() {
    let new = |change: fn(&mut QueueConfig)| {
        let mut driver = PackedDriver::new(8);
        change(driver.config());
        PackedQueue::new(driver.mem(), &driver.base.config).map(|_| ())
    };
    assert_eq!(new(|_| {}), Ok(()));
    assert_eq!(new(|config| config.size = 0), Err(QueueError::Ring(RingError::PackedSize(0))));
    assert_eq!(new(|config| config.size = 32769), Err(QueueError::Ring(RingError::PackedSize(32769))));
    assert_eq!(new(|config| config.avail_user = USER_BASE + MEM_SIZE - 4), Ok(()));
    for change in [
        (|config| config.desc_user += 8) as fn(&mut QueueConfig),
        |config| config.avail_user += 2,
        |config| config.used_user += 2,
    ] {
        assert!(matches!(new(change), Err(QueueError::Ring(RingError::Misaligned { .. }))));
    }
    for change in [
        (|config| config.desc_user = USER_BASE + MEM_SIZE - 112) as fn(&mut QueueConfig),
        |config| config.avail_user = USER_BASE + MEM_SIZE,
        |config| config.used_user = 0,
        |config| config.used_user = u64::MAX - 3,
    ] {
        assert!(matches!(new(change), Err(QueueError::Ring(RingError::Unmapped { .. }))));
    }
}

/// §2.8.10, §2.8.14: value 3 and the other bits are reserved, and DESC without EVENT_IDX says nothing.
#[test]
fn an_event_that_says_nothing_gets_its_calls() {
    let mut driver = PackedDriver::new(8);
    let mut queue = driver.queue();
    for (event_idx, off_wrap, flags, call) in [
        (false, 0, 0, true),
        (false, 0, DISABLE, false),
        (false, 0, 0xfffc | DISABLE, false),
        (false, 3, AT_DESCRIPTOR, true),
        (true, 3, 3, true),
        // Outside the ring.
        (true, 9, AT_DESCRIPTOR, true),
        (true, 0x7fff, AT_DESCRIPTOR, true),
    ] {
        if driver.base.config.event_idx != event_idx {
            driver.config().event_idx = event_idx;
            let base = queue.base();
            queue = PackedQueue::new(driver.mem(), &QueueConfig { base, ..driver.base.config }).unwrap();
            queue.needs_call();
        }
        driver.set_event(off_wrap, flags);
        let id = driver.offer(&[(0x1000, 1, 0)]).unwrap();
        assert!(pop(&mut queue, &driver).unwrap().is_some());
        queue.push(id, 0);
        assert!(!queue.needs_call(), "nothing is published");
        queue.publish();
        assert_eq!(queue.needs_call(), call, "{event_idx} {off_wrap:#x} {flags:#x}");
        assert!(!queue.needs_call());
        assert_eq!(driver.take_used().len(), 1);
    }
}

/// What the device says of kicks, in the device area and nowhere else.
#[test]
fn kicks_are_asked_for_at_the_next_descriptor() {
    let mut driver = PackedDriver::starting_at(5, At { slot: 4, wrap: false });
    driver.config().event_idx = true;
    let mut queue = driver.queue();
    queue.disable_kicks();
    assert_eq!(driver.device_event().1, DISABLE);
    assert_eq!(queue.enable_kicks(), Ok(false));
    assert_eq!(driver.device_event(), (4, AT_DESCRIPTOR));
    let id = driver.offer(&[(0x1000, 1, 0)]).unwrap();
    assert_eq!(queue.enable_kicks(), Ok(true), "there is something to do");
    assert!(pop(&mut queue, &driver).unwrap().is_some());
    queue.push(id, 0);
    assert_eq!(queue.enable_kicks(), Ok(false));
    assert_eq!(driver.device_event(), (0x8000, AT_DESCRIPTOR), "the next round");
    driver.config().event_idx = false;
    let mut queue = driver.queue();
    queue.enable_kicks().unwrap();
    assert_eq!(driver.device_event().1, 0);
    assert_eq!((driver.base.get16(AVAIL), driver.base.get16(AVAIL + 2)), (0, 0));
    assert_eq!(driver.base.get::<4>(USED + 4), [0; 4]);
    assert_eq!(driver.base.get::<4>(DESC + 5 * 16), [0; 4]);
}

/// NEXT means nothing in a used descriptor (§2.8.6); we leave it where the slots behind belong to the same chain.
#[test]
fn a_used_descriptor_says_whether_more_belong_to_it() {
    let mut driver = PackedDriver::new(8);
    let ids = [driver.offer(&[(0x1000, 1, 0), (0x1000, 1, 0)]), driver.offer(&[(0x1000, 1, 0)])]
        .map(Option::unwrap);
    let mut queue = driver.queue();
    for id in ids {
        assert!(pop(&mut queue, &driver).unwrap().is_some());
        queue.push(id, 0);
    }
    queue.publish();
    assert_eq!(driver.flags(0), F_AVAIL | F_USED | NEXT);
    assert_eq!(driver.flags(2), F_AVAIL | F_USED);
}
