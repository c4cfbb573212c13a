//! A driver that writes whatever it likes wherever it likes while the device works: the device stays in step with itself,
//! and touches nothing that it was not given.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::super::super::*;
use super::driver::*;

const TABLE: u64 = 0x5_0000;

#[derive(Clone, Debug)]
enum Op {
    /// Address, length, id, flags, in a slot of the ring or of a table.
    Scribble(bool, u16, (u64, u32, u16, u16)),
    /// Flags as a driver in the other round would have them.
    Flip(u16),
    /// All that is not said of the ring is available.
    Fill(u16, bool),
    Event(u16, u16),
    Pop,
    PopSingles(u8, bool),
    Unpop(u8),
    Push(u8),
    PushAll(u8),
    Publish,
    Kicks(bool),
    LookAhead(u16, u16),
    Prefetch(u16),
}

fn op() -> impl Strategy<Value = Op> {
    let flags = prop_oneof![
        4 => prop::sample::select(vec![F_AVAIL, F_USED, 0, F_AVAIL | F_USED])
            .prop_flat_map(|wrap| (0u16..8).prop_map(move |low| wrap | low)),
        1 => any::<u16>(),
    ];
    let addr = prop_oneof![3 => 0x8_0000u64..0x9_0000, 2 => Just(TABLE), 1 => any::<u64>()];
    let len = prop_oneof![3 => 1u32..3000, 3 => (0u32..6).prop_map(|n| n * 16), 1 => any::<u32>()];
    prop_oneof![
        8 => (any::<bool>(), 0u16..16, (addr, len, any::<u16>(), flags))
            .prop_map(|(table, slot, raw)| Op::Scribble(table, slot, raw)),
        3 => (0u16..16).prop_map(Op::Flip),
        3 => (0u16..8, any::<bool>()).prop_map(|(low, wrap)| Op::Fill(low, wrap)),
        1 => (any::<u16>(), any::<u16>()).prop_map(|(off, flags)| Op::Event(off, flags)),
        8 => Just(Op::Pop),
        5 => (1u8..20, any::<bool>()).prop_map(|(n, write)| Op::PopSingles(n, write)),
        2 => (1u8..9).prop_map(Op::Unpop),
        4 => (1u8..9).prop_map(Op::Push),
        3 => (1u8..20).prop_map(Op::PushAll),
        4 => Just(Op::Publish),
        2 => any::<bool>().prop_map(Op::Kicks),
        1 => (0u16..20, 0u16..40).prop_map(|(skip, most)| Op::LookAhead(skip, most)),
        1 => any::<u16>().prop_map(Op::Prefetch),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..Default::default() })]

    #[test]
    fn nothing_gets_out_of_step(
        size in 1u16..16,
        start: u16,
        wrap: bool,
        bits in 0u8..16,
        ops in prop::collection::vec(op(), 1..200),
    ) {
        let mut driver = PackedDriver::starting_at(size, At { slot: start % size, wrap });
        let [event_idx, indirect, in_order, transmit] = [1, 2, 4, 8].map(|bit| bits & bit != 0);
        *driver.config() = QueueConfig { event_idx, indirect, in_order, transmit, ..driver.base.config };
        let mut queue = driver.queue();
        let mut in_work = VecDeque::new();
        let mut chain = Chain::new();
        for op in ops {
            match op {
                Op::Scribble(true, slot, raw) => driver.base.descriptor(TABLE, slot, raw),
                Op::Scribble(false, slot, raw) => driver.descriptor(slot % size, raw),
                Op::Flip(slot) => {
                    let slot = slot % size;
                    driver.set_flags(slot, driver.flags(slot) ^ (F_AVAIL | F_USED));
                }
                Op::Fill(low, wrap) => {
                    let flags = low | if wrap { F_AVAIL } else { F_USED };
                    (0..size).for_each(|slot| driver.descriptor(slot, (0x8_0000, 64, slot, flags)));
                }
                Op::Event(off_wrap, flags) => driver.set_event(off_wrap, flags),
                Op::Pop => match queue.pop(driver.mem(), &mut chain) {
                    Ok(true) => {
                        let segments = || chain.readable().iter().chain(chain.writable());
                        prop_assert!(segments().count() > 0 && segments().count() <= MAX_CHAIN);
                        prop_assert!(segments().all(|segment| segment.len > 0));
                        let total: u64 = segments().map(|segment| u64::from(segment.len)).sum();
                        prop_assert_eq!(total, chain.readable_len() + chain.writable_len());
                        in_work.push_back(chain.head());
                    }
                    Err(PopError::Bad { head, .. }) => in_work.push_back(head),
                    Ok(false) | Err(PopError::Broken(QueueError::Overrun { .. })) => {}
                    other => prop_assert!(false, "{other:?}"),
                },
                Op::PopSingles(n, write) => {
                    let mut out = [Single::default(); 20];
                    let access = if write { Access::Writable } else { Access::Readable };
                    let count = queue.pop_singles(access, &mut out[..n.into()]).unwrap();
                    for single in &out[..count] {
                        prop_assert!(single.len > 0);
                        in_work.push_back(single.head);
                    }
                }
                Op::Unpop(n) => {
                    let n = usize::from(n).min(in_work.len());
                    queue.unpop(n as u16);
                    in_work.truncate(in_work.len() - n);
                }
                Op::Push(n) => {
                    for head in in_work.drain(..usize::from(n).min(in_work.len())) {
                        queue.push(head, 1);
                    }
                }
                Op::PushAll(n) => {
                    let count = usize::from(n).min(in_work.len());
                    queue.push_all(in_work.drain(..count).map(|head| (head, 0)));
                }
                Op::Publish => {
                    queue.publish();
                    queue.needs_call();
                }
                Op::Kicks(true) => drop(queue.enable_kicks()),
                Op::Kicks(false) => queue.disable_kicks(),
                Op::LookAhead(skip, most) => {
                    queue.look_ahead(driver.mem(), skip, most, &mut chain, |_, _| panic!("nothing is missing"));
                }
                Op::Prefetch(n) => {
                    queue.prefetch_used(n);
                    queue.prefetch_buffer(driver.mem(), n);
                }
            }
            prop_assert_eq!(usize::from(queue.in_flight()), in_work.len());
            prop_assert!(in_work.len() <= size.into());
            let base = queue.base();
            prop_assert!(base & 0x7fff < size.into() && base >> 16 == base & 0xffff);
        }
        // Whatever happened, another queue can begin where this one stood.
        queue.publish();
        let config = QueueConfig { base: queue.base(), ..driver.base.config };
        prop_assert!(PackedQueue::new(driver.mem(), &config).is_ok());
    }
}
