//! Bugs that other implementations had, by their number there.

use super::super::*;
use super::driver::*;

fn take(queue: &mut SplitQueue, driver: &Driver) -> Option<u16> {
    let mut chain = Chain::new();
    queue.pop(&driver.mem, &mut chain).unwrap().then(|| chain.head())
}

/// vhost #343, #374: a kick that came while nobody listened. The ring is looked at after kicks are asked for, and once
/// at its start, whether or not anything was kicked.
#[test]
fn vhost_343_chains_offered_before_the_start_are_found() {
    for event_idx in [false, true] {
        let mut driver = Driver::starting_at(8, 3);
        driver.config.event_idx = event_idx;
        driver.offer_one(0, 0x1000, 1, 0);
        let mut queue = driver.queue();
        assert_eq!(queue.enable_kicks(), Ok(true));
        assert_eq!(queue.available(), Ok(1));
    }
}

/// vhost #375, cloud-hypervisor #8759: the receive ring was never looked at again after a restart.
#[test]
fn vhost_375_a_restarted_ring_goes_on_where_it_stopped() {
    let driver = Driver::starting_at(8, 65534);
    for head in 0..4 {
        driver.offer_one(head, 0x1000, 64, WRITE);
    }
    let mut queue = driver.queue();
    assert_eq!(take(&mut queue, &driver), Some(0));
    assert_eq!(take(&mut queue, &driver), Some(1));
    queue.push(0, 1);
    queue.publish();
    let base = queue.base();
    assert_eq!(base, 65535, "the chain in work is not done");
    let config = QueueConfig { base: base.into(), ..driver.config };
    let mut queue = SplitQueue::new(&driver.mem, &config).unwrap();
    assert_eq!(queue.enable_kicks(), Ok(true));
    assert!(!queue.resynced());
    assert_eq!(take(&mut queue, &driver), Some(1));
}

/// Firecracker #5958: after a restore both sides waited, since neither event field was in step. The new queue says
/// where it wants the next kick, and its first decision is to call.
#[test]
fn firecracker_5958_no_event_idx_stall_after_restore() {
    let driver = Driver::starting_at(8, 100).with_event_idx();
    // What the old device left: a kick wanted long ago; and a driver that waits for the element after 100.
    driver.put16(USED + 4 + 8 * 8, 40);
    driver.set_used_event(103);
    let mut queue = driver.queue();
    assert_eq!(queue.enable_kicks(), Ok(false));
    assert_eq!(driver.avail_event(), 100);
    driver.offer_one(0, 0x1000, 1, 0);
    assert_eq!(take(&mut queue, &driver), Some(0));
    queue.push(0, 0);
    queue.publish();
    assert!(queue.needs_call());
}

/// vm-virtio #196: a descriptor processed twice, since an index was advanced in one place and not in the other.
#[test]
fn vm_virtio_196_no_chain_is_taken_twice() {
    let driver = Driver::starting_at(4, 65530);
    let mut queue = driver.queue();
    let mut seen = Vec::new();
    for round in 0..20u16 {
        driver.offer_one(round % 4, 0x1000, 1, 0);
        driver.offer_one((round + 1) % 4, 0x1000, 1, 0);
        seen.extend(take(&mut queue, &driver));
        if round % 3 == 0 {
            queue.unpop(1);
            seen.pop();
            seen.extend(take(&mut queue, &driver));
        }
        seen.extend(take(&mut queue, &driver));
        assert_eq!(take(&mut queue, &driver), None);
        assert_eq!(seen, [round % 4, (round + 1) % 4]);
        for head in seen.drain(..) {
            queue.push(head, 0);
        }
        queue.publish();
    }
}

/// The used index was re-read from guest memory: a guest that writes there moved the device.
#[test]
fn used_idx_is_never_read_back() {
    let driver = Driver::new(8);
    driver.offer_one(0, 0x1000, 1, 0);
    driver.offer_one(1, 0x1000, 1, 0);
    let mut queue = driver.queue();
    assert_eq!(take(&mut queue, &driver), Some(0));
    driver.put16(USED + 2, 4711);
    queue.push(0, 0);
    queue.publish();
    assert_eq!(driver.used_idx(), 1);
    driver.put16(USED + 2, 4711);
    assert_eq!(take(&mut queue, &driver), Some(1));
    queue.push(1, 0);
    queue.publish();
    assert_eq!((driver.used_idx(), driver.used(1)), (2, (1, 0)));
}

/// A descriptor that changes between two looks: what was checked is what is used, because there is one look.
#[test]
fn a_chain_does_not_change_after_it_was_taken() {
    let driver = Driver::new(8);
    driver.offer_one(0, 0x1000, 64, WRITE);
    let mut queue = driver.queue();
    let mut chain = Chain::new();
    assert_eq!(queue.pop(&driver.mem, &mut chain), Ok(true));
    driver.descriptor(DESC, 0, (u64::MAX, u32::MAX, NEXT, 999));
    driver.put16(AVAIL + 4, 999);
    assert_eq!((chain.head(), chain.writable()), (0, [Segment { gpa: 0x1000, len: 64 }].as_slice()));
}

/// Free-running indices: a ring that is full and one that is empty differ.
#[test]
fn full_and_empty_rings_are_told_apart() {
    for base in [0, 65535, 32768] {
        let driver = Driver::starting_at(1, base);
        let mut queue = driver.queue();
        assert_eq!(queue.available(), Ok(0));
        for _ in 0..3 {
            driver.offer_one(0, 0x1000, 1, 0);
            assert_eq!(queue.available(), Ok(1));
            assert_eq!(take(&mut queue, &driver), Some(0));
            queue.push(0, 0);
            queue.publish();
        }
        let largest = Driver::new(8);
        for head in 0..8 {
            largest.offer_one(head, 0x1000, 1, 0);
        }
        assert_eq!(largest.queue().available(), Ok(8));
    }
}
