//! One property at a time.

use super::super::*;
use super::driver::*;
use crate::memory::testing::USER_BASE;

fn pop(queue: &mut SplitQueue, driver: &Driver) -> Result<Option<Chain>, PopError> {
    let mut chain = Chain::new();
    queue.pop(&driver.mem, &mut chain).map(|some| some.then_some(chain))
}

fn segment(gpa: u64, len: u32) -> Segment {
    Segment { gpa, len }
}

#[test]
fn a_chain_is_split_into_what_to_read_and_what_to_write() {
    let driver = Driver::new(8);
    driver.descriptor(DESC, 3, (0x1000, 12, NEXT, 5));
    driver.descriptor(DESC, 5, (0x2000, 1500, NEXT, 0));
    driver.descriptor(DESC, 0, (0x3000, 64, NEXT | WRITE, 1));
    driver.descriptor(DESC, 1, (0x4000, 1, WRITE, 9999));
    driver.offer(3);
    let mut queue = driver.queue();
    assert_eq!(queue.available(), Ok(1));
    let chain = pop(&mut queue, &driver).unwrap().unwrap();
    assert_eq!(chain.head(), 3);
    assert_eq!(chain.readable(), [segment(0x1000, 12), segment(0x2000, 1500)]);
    assert_eq!(chain.writable(), [segment(0x3000, 64), segment(0x4000, 1)]);
    assert_eq!((chain.readable_len(), chain.writable_len()), (1512, 65));
    assert!(pop(&mut queue, &driver).unwrap().is_none());
    assert_eq!(queue.available(), Ok(0));
}

#[test]
fn direct_descriptors_may_precede_an_indirect_table() {
    let driver = Driver::new(8);
    driver.descriptor(DESC, 0, (0x1000, 12, NEXT, 1));
    // §2.7.5.3.2: WRITE means nothing here. The table need not be aligned.
    driver.descriptor(DESC, 1, (0x5003, 48, INDIRECT | WRITE, 0));
    driver.descriptor(0x5003, 0, (0x2000, 100, NEXT, 2));
    driver.descriptor(0x5003, 2, (0x3000, 200, WRITE, 0));
    driver.offer(0);
    let mut queue = driver.queue();
    let chain = pop(&mut queue, &driver).unwrap().unwrap();
    assert_eq!(chain.readable(), [segment(0x1000, 12), segment(0x2000, 100)]);
    assert_eq!(chain.writable(), [segment(0x3000, 200)]);
}

#[test]
fn used_elements_become_visible_at_publish() {
    let driver = Driver::new(4);
    driver.offer_one(2, 0x1000, 10, WRITE);
    driver.offer_one(1, 0x2000, 10, WRITE);
    let mut queue = driver.queue();
    for len in [7, 9] {
        let chain = pop(&mut queue, &driver).unwrap().unwrap();
        queue.push(chain.head(), len);
    }
    assert_eq!(driver.used_idx(), 0);
    assert_eq!(queue.base(), 0);
    queue.publish();
    assert_eq!(driver.used_idx(), 2);
    assert_eq!((driver.used(0), driver.used(1)), ((2, 7), (1, 9)));
    assert_eq!(queue.base(), 2);
}

#[test]
fn what_was_given_back_comes_again() {
    let driver = Driver::new(4);
    for head in 0..3 {
        driver.offer_one(head, 0x1000, 10, WRITE);
    }
    let mut queue = driver.queue();
    for _ in 0..3 {
        pop(&mut queue, &driver).unwrap().unwrap();
    }
    queue.unpop(2);
    assert_eq!((queue.available(), queue.in_flight()), (Ok(2), 1));
    assert_eq!(pop(&mut queue, &driver).unwrap().unwrap().head(), 1);
    queue.push(0, 0);
    queue.publish();
    assert_eq!(queue.base(), 1, "what is in work at a stop is not done");
}

#[test]
fn malformed_chains_are_named_and_count_as_taken() {
    type Case = (&'static str, &'static [(u64, u16, Raw)], ChainError);
    const T: u64 = 0x5000;
    let cases: &[Case] = &[
        ("next outside", &[(DESC, 0, (1, 1, NEXT, 8))], ChainError::NextOutOfRange(8)),
        ("itself", &[(DESC, 0, (1, 1, NEXT, 0))], ChainError::Loop),
        ("two", &[(DESC, 0, (1, 1, NEXT, 1)), (DESC, 1, (1, 1, NEXT, 0))], ChainError::Loop),
        ("zero", &[(DESC, 0, (1, 0, 0, 0))], ChainError::ZeroLength),
        (
            "order",
            &[(DESC, 0, (1, 1, NEXT | WRITE, 1)), (DESC, 1, (1, 1, 0, 0))],
            ChainError::ReadableAfterWritable,
        ),
        ("4 GiB", &[(DESC, 0, (1, u32::MAX, NEXT, 1)), (DESC, 1, (1, 1, 0, 0))], ChainError::TooManyBytes),
        ("empty table", &[(DESC, 0, (T, 0, INDIRECT, 0))], ChainError::IndirectLength(0)),
        ("odd table", &[(DESC, 0, (T, 24, INDIRECT, 0))], ChainError::IndirectLength(24)),
        ("with next", &[(DESC, 0, (T, 16, INDIRECT | NEXT, 1))], ChainError::IndirectWithNext),
        ("nowhere", &[(DESC, 0, (MEM_SIZE, 16, INDIRECT, 0))], ChainError::IndirectOutOfRange),
        ("half outside", &[(DESC, 0, (MEM_SIZE - 8, 16, INDIRECT, 0))], ChainError::IndirectOutOfRange),
        ("wraps", &[(DESC, 0, (u64::MAX - 7, 32, INDIRECT, 0))], ChainError::IndirectOutOfRange),
        (
            "nested",
            &[(DESC, 0, (T, 16, INDIRECT, 0)), (T, 0, (T, 16, INDIRECT, 0))],
            ChainError::NestedIndirect,
        ),
        ("table left", &[(DESC, 0, (T, 16, INDIRECT, 0)), (T, 0, (1, 1, NEXT, 1))], ChainError::Loop),
        (
            "outside table",
            &[(DESC, 0, (T, 32, INDIRECT, 0)), (T, 0, (1, 1, NEXT, 2))],
            ChainError::NextOutOfRange(2),
        ),
    ];
    for (name, descriptors, why) in cases {
        let driver = Driver::new(8);
        for (table, index, raw) in *descriptors {
            driver.descriptor(*table, *index, *raw);
        }
        driver.offer(0);
        driver.offer_one(7, 0x1000, 1, 0);
        let mut queue = driver.queue();
        assert_eq!(pop(&mut queue, &driver).unwrap_err(), PopError::Bad { head: 0, why: *why }, "{name}");
        queue.push(0, 0);
        assert_eq!(pop(&mut queue, &driver).unwrap().unwrap().head(), 7, "{name}: the ring goes on");
    }
}

#[test]
fn indirect_tables_must_be_negotiated() {
    let mut driver = Driver::new(8);
    driver.config.indirect = false;
    driver.offer_one(0, 0x5000, 16, INDIRECT);
    let why = ChainError::IndirectNotNegotiated;
    assert_eq!(pop(&mut driver.queue(), &driver).unwrap_err(), PopError::Bad { head: 0, why });
}

#[test]
fn a_chain_has_1024_descriptors_at_most() {
    let chain_of = |count: u16| {
        let driver = Driver::new(8);
        for i in 0..count {
            let next = if i + 1 < count { NEXT } else { 0 };
            driver.descriptor(0x5_0000, i, (0x1000, 1, next, i + 1));
        }
        driver.offer_one(0, 0x5_0000, u32::from(count) * 16, INDIRECT);
        pop(&mut driver.queue(), &driver).map(|chain| chain.unwrap().readable().len())
    };
    assert_eq!(chain_of(1024), Ok(1024));
    assert_eq!(chain_of(1025), Err(PopError::Bad { head: 0, why: ChainError::TooLong }));
}

#[test]
fn an_available_entry_outside_the_table_breaks_the_ring() {
    let driver = Driver::new(8);
    driver.offer(8);
    let error = QueueError::BadHead { head: 8, size: 8 };
    assert_eq!(pop(&mut driver.queue(), &driver).unwrap_err(), PopError::Broken(error));
}

#[test]
fn the_available_index_must_not_jump() {
    for base in [0, 5, u16::MAX - 2] {
        let driver = Driver::starting_at(8, base);
        let jump = |idx: u16, next: u16, used: u16| QueueError::AvailJump {
            idx: base.wrapping_add(idx),
            next: base.wrapping_add(next),
            used: base.wrapping_add(used),
            size: 8,
        };
        driver.set_avail_idx(base.wrapping_add(9));
        let mut queue = driver.queue();
        assert_eq!(queue.available(), Err(jump(9, 0, 0)));
        assert_eq!(pop(&mut queue, &driver).unwrap_err(), PopError::Broken(jump(9, 0, 0)));
        assert_eq!(queue.enable_kicks(), Err(jump(9, 0, 0)));
        driver.set_avail_idx(base.wrapping_sub(1));
        assert_eq!(queue.available(), Err(jump(u16::MAX, 0, 0)));
        // Whole once, then again before anything was given back: more chains than descriptors.
        driver.descriptor(DESC, 0, (0x1000, 1, 0, 0));
        driver.set_avail_idx(base.wrapping_add(8));
        for _ in 0..8 {
            pop(&mut queue, &driver).unwrap().unwrap();
        }
        driver.set_avail_idx(base.wrapping_add(9));
        assert_eq!(queue.available(), Err(jump(9, 8, 0)));
        driver.set_avail_idx(base.wrapping_add(7));
        assert_eq!(queue.available(), Err(jump(7, 8, 0)), "it went back");
        queue.push(0, 0);
        queue.publish();
        driver.set_avail_idx(base.wrapping_add(9));
        assert_eq!(queue.available(), Ok(1));
    }
}

#[test]
fn rings_must_be_aligned_mapped_and_a_power_of_two() {
    let driver = Driver::new(8);
    let refuse = |change: &dyn Fn(&mut QueueConfig)| {
        let mut config = driver.config;
        change(&mut config);
        SplitQueue::new(&driver.mem, &config).map(drop).unwrap_err()
    };
    for size in [0, 3, 6, 0xffff, 0x8001] {
        assert!(matches!(refuse(&|c| c.size = size), QueueError::Ring(RingError::Size(_))));
    }
    let misaligned: [&dyn Fn(&mut QueueConfig); 3] =
        [&|c| c.desc_user += 8, &|c| c.avail_user += 1, &|c| c.used_user += 2];
    for change in misaligned {
        assert!(matches!(refuse(change), QueueError::Ring(RingError::Misaligned { .. })));
    }
    let end = USER_BASE + MEM_SIZE;
    let outside: [&dyn Fn(&mut QueueConfig); 6] = [
        &|c| c.desc_user = end - 8 * 16 + 16,
        &|c| c.avail_user = end - 18,
        &|c| c.used_user = end - 64,
        &|c| c.used_user = 0,
        &|c| c.desc_user = u64::MAX - 15,
        &|c| (c.size, c.desc_user) = (32768, end - 0x7_0000),
    ];
    for change in outside {
        assert!(matches!(refuse(change), QueueError::Ring(RingError::Unmapped { .. })));
    }
    let mut last = driver.config;
    last.avail_user = end - 20;
    SplitQueue::new(&driver.mem, &last).unwrap();
    last.event_idx = true;
    assert!(SplitQueue::new(&driver.mem, &last).is_err(), "the event field is part of the ring");
}

#[test]
fn kicks_are_switched_by_flag() {
    let driver = Driver::new(8);
    let mut queue = driver.queue();
    queue.disable_kicks();
    assert_eq!(driver.used_flags(), 1);
    assert_eq!(queue.enable_kicks(), Ok(false));
    assert_eq!(driver.used_flags(), 0);
    queue.disable_kicks();
    driver.offer_one(0, 0x1000, 1, 0);
    assert_eq!(queue.enable_kicks(), Ok(true), "it came while nobody was to kick");
}

#[test]
fn kicks_are_asked_for_by_event() {
    let driver = Driver::starting_at(8, 65535).with_event_idx();
    let mut queue = driver.queue();
    assert_eq!(queue.enable_kicks(), Ok(false));
    assert_eq!(driver.avail_event(), 65535);
    driver.offer_one(0, 0x1000, 1, 0);
    assert_eq!(queue.enable_kicks(), Ok(true));
    pop(&mut queue, &driver).unwrap().unwrap();
    queue.disable_kicks();
    assert_eq!(driver.used_flags(), 0, "with EVENT_IDX the flag must stay 0");
    assert_eq!(queue.enable_kicks(), Ok(false));
    assert_eq!(driver.avail_event(), 0);
}

fn complete(queue: &mut SplitQueue, driver: &Driver, count: u16) {
    for _ in 0..count {
        driver.offer_one(0, 0x1000, 1, 0);
        let chain = pop(queue, driver).unwrap().unwrap();
        queue.push(chain.head(), 0);
        queue.publish();
    }
}

#[test]
fn calls_follow_the_flag_without_event_idx() {
    let driver = Driver::new(8);
    let mut queue = driver.queue();
    assert!(!queue.needs_call(), "nothing happened");
    complete(&mut queue, &driver, 1);
    assert!(queue.needs_call());
    assert!(!queue.needs_call(), "said already");
    driver.set_avail_flags(1);
    complete(&mut queue, &driver, 3);
    assert!(!queue.needs_call());
}

#[test]
fn calls_follow_the_event_with_event_idx() {
    let driver = Driver::starting_at(8, 65530).with_event_idx();
    let mut queue = driver.queue();
    driver.set_avail_flags(1);
    driver.set_used_event(17);
    complete(&mut queue, &driver, 1);
    assert!(
        queue.needs_call(),
        "the first decision after a start calls: nobody knows what was announced before"
    );
    complete(&mut queue, &driver, 3);
    assert!(!queue.needs_call());
    driver.set_used_event(65535);
    complete(&mut queue, &driver, 1);
    assert!(!queue.needs_call(), "at the event, not past it");
    complete(&mut queue, &driver, 1);
    assert_eq!(driver.used_idx(), 0);
    assert!(queue.needs_call());
}

#[test]
fn a_queue_begins_where_the_guest_was_left() {
    // A back-end died with chains 5..9 in work; a front-end that does not know says 9.
    let driver = Driver::starting_at(16, 5);
    for head in 0..4 {
        driver.offer_one(head, 0x1000, 1, 0);
    }
    let mut config = driver.config;
    config.base = 9;
    let mut queue = SplitQueue::new(&driver.mem, &config).unwrap();
    assert_eq!(queue.base(), 9, "nothing was looked at yet");
    assert_eq!(queue.available(), Ok(4));
    assert!(queue.resynced());
    assert_eq!(queue.base(), 5);
    assert_eq!(pop(&mut queue, &driver).unwrap().unwrap().head(), 0);
}
