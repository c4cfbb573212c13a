//! A back-end that died: the base is an old one, and the ring says where it stands.

use proptest::prelude::*;

use super::super::super::*;
use super::super::driver::{NEXT, WRITE};
use super::driver::*;

/// Uses up to `n` chains, as the back-end did that died.
fn work(queue: &mut PackedQueue, driver: &mut PackedDriver, n: usize) {
    let mut chain = Chain::new();
    let mut done = 0;
    while done < n && queue.pop(driver.mem(), &mut chain).unwrap() {
        queue.push(chain.head(), 1);
        done += 1;
    }
    queue.publish();
    driver.take_used();
}

fn place(at: At) -> u32 {
    u32::from(at.off_wrap()) << 16 | u32::from(at.off_wrap())
}

/// A new queue with that base, after its first look.
fn begin(driver: &PackedDriver, base: u32) -> PackedQueue {
    let mut queue = PackedQueue::new(driver.mem(), &QueueConfig { base, ..driver.base.config }).unwrap();
    queue.available().unwrap();
    queue
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    /// A true base is always believed, however many descriptors chains have.
    #[test]
    fn a_base_that_is_true_is_believed(
        size in 1u16..40,
        rounds in prop::collection::vec((prop::collection::vec(1usize..4, 0..30), 0usize..30), 1..12),
        other in any::<u16>(),
    ) {
        let mut driver = PackedDriver::new(size);
        let mut queue = driver.queue();
        for (chains, n) in rounds {
            for len in chains {
                driver.offer(&vec![(0x8_0000, 60, WRITE); len]);
            }
            work(&mut queue, &mut driver, n);
            let truth = place(driver.next_used);
            let next = begin(&driver, truth);
            prop_assert!(!next.resynced());
            prop_assert_eq!(next.base(), truth);
            let stale = place(At { slot: other % size, wrap: other & 0x8000 != 0 });
            let next = begin(&driver, stale);
            let flags: Vec<_> = (0..size).map(|slot| driver.flags(slot)).collect();
            // All available and none of several: one of them may be the last of a list that was used, and nothing tells.
            let dubious = flags.iter().all(|f| f & NEXT == 0 && (f & F_AVAIL == 0) != (f & F_USED == 0));
            prop_assert!(
                next.base() == truth || !next.resynced() || dubious,
                "{:#x} from {stale:#x}, not {truth:#x}: {flags:x?}", next.base()
            );
        }
    }

    /// What drivers mostly do: a receive ring full of buffers of one descriptor, or a transmit ring that is mostly empty.
    #[test]
    fn usual_rings_are_found_again(
        used in 1u32..1100,
        waiting in 0u16..200,
        full: bool,
    ) {
        let mut driver = PackedDriver::new(256);
        let mut queue = driver.queue();
        for _ in 0..used {
            driver.offer(&[(0x8_0000, 60, WRITE)]);
            work(&mut queue, &mut driver, 1);
        }
        let waiting = if full { 256 } else { waiting };
        for _ in 0..waiting {
            driver.offer(&[(0x8_0000, 60, WRITE)]);
        }
        let truth = place(driver.next_used);
        // What QEMU says after a crash: where the ring was started.
        let next = begin(&driver, 0x8000_8000);
        // One slot may pass for the rest of a chain.
        let last = truth == 0x00ff_00ff;
        prop_assert!(next.base() == truth || last, "{:#x} instead of {truth:#x}", next.base());
        let mut queue = next;
        let before = driver.room;
        work(&mut queue, &mut driver, 300);
        prop_assert!(driver.room == before + waiting || last);
    }
}

/// A driver that makes chains available all the time does not make a true base look wrong.
#[test]
fn a_busy_driver_does_not_disturb_the_look() {
    for round in 0..200 {
        let at = At { slot: round % 64, wrap: round % 2 == 0 };
        let mut driver = PackedDriver::starting_at(64, at);
        let base = place(at);
        let (mem, config) = (driver.mem().clone(), driver.base.config);
        std::thread::scope(|scope| {
            let device = scope.spawn(move || {
                let mut queue = PackedQueue::new(&mem, &config).unwrap();
                queue.available().unwrap();
                queue.base()
            });
            for _ in 0..64 {
                driver.offer(&[(0x8_0000, 60, 0)]);
            }
            assert_eq!(device.join().unwrap(), base);
        });
    }
}
