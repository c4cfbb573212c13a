//! A packed queue under random drivers, against a list of what was offered and in what order.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::super::super::*;
use super::super::driver::*;
use super::driver::*;

/// Indirect tables, one for each that may be out.
const TABLES: u64 = 0x4_0000;
const TABLE_BYTES: u64 = 0x80;
const BUFFERS: u64 = 0x8_0000;

#[derive(Clone, Debug)]
enum Op {
    /// Lengths to read, lengths to write, in a table or not.
    Offer(Vec<u32>, Vec<u32>, bool),
    Pop(u8),
    PopSingles(u8, bool),
    Unpop(u8),
    Push(u8),
    PushAll(u8),
    Publish,
    Decide,
    /// Mode, and how many slots ahead of what the driver has taken.
    DriverEvent(u16, u16),
    EnableKicks,
    DisableKicks,
    /// Stop, and go on with another queue.
    Restart,
    Remap,
}

fn op() -> impl Strategy<Value = Op> {
    let lens = || prop::collection::vec(1u32..3000, 0..4);
    prop_oneof![
        6 => (lens(), lens(), any::<bool>()).prop_map(|(a, b, c)| Op::Offer(a, b, c)),
        4 => (1u32..3000, any::<bool>())
            .prop_map(|(len, write)| if write { Op::Offer(vec![], vec![len], false) } else { Op::Offer(vec![len], vec![], false) }),
        5 => (1..6u8).prop_map(Op::Pop),
        4 => (1..9u8, any::<bool>()).prop_map(|(n, write)| Op::PopSingles(n, write)),
        2 => (1..5u8).prop_map(Op::Unpop),
        4 => (1..6u8).prop_map(Op::Push),
        3 => (1..6u8).prop_map(Op::PushAll),
        5 => Just(Op::Publish),
        4 => Just(Op::Decide),
        3 => (0..4u16, 0..20u16).prop_map(|(mode, ahead)| Op::DriverEvent(mode, ahead)),
        2 => Just(Op::EnableKicks),
        2 => Just(Op::DisableKicks),
        1 => Just(Op::Restart),
        1 => Just(Op::Remap),
    ]
}

#[derive(Clone, Debug)]
struct Offered {
    id: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    descriptors: u16,
    table: bool,
}

struct Bench {
    driver: PackedDriver,
    queue: PackedQueue,
    /// Offered, not popped.
    waiting: VecDeque<Offered>,
    /// Popped, not pushed.
    in_work: VecDeque<Offered>,
    /// Pushed, not published: descriptors, id, length.
    pushed: VecDeque<(u16, u16, u32)>,
    /// Slots used since the last decision on a call, from the place there.
    undecided: u16,
    decided_at: Option<At>,
    used_at: At,
    listening: bool,
    fresh: u64,
    chain: Chain,
}

impl Bench {
    fn new(driver: PackedDriver) -> Self {
        Self {
            queue: driver.queue(),
            waiting: VecDeque::new(),
            in_work: VecDeque::new(),
            pushed: VecDeque::new(),
            undecided: 0,
            decided_at: None,
            used_at: driver.next_used,
            listening: false,
            fresh: 0,
            chain: Chain::new(),
            driver,
        }
    }

    fn run(&mut self, op: &Op) {
        match op {
            // What a transmit ring never has (`QueueConfig::transmit`).
            Op::Offer(readable, writable, table) if self.driver.base.config.transmit => {
                let all = readable.iter().chain(writable).copied().collect::<Vec<_>>();
                self.offer(&all, &[], *table);
            }
            Op::Offer(readable, writable, table) => self.offer(readable, writable, *table),
            Op::Pop(n) => (0..*n).for_each(|_| self.pop()),
            Op::PopSingles(n, write) => self.pop_singles(*n, *write),
            Op::Unpop(n) => {
                let n = usize::from(*n).min(self.in_work.len());
                self.queue.unpop(n as u16);
                for _ in 0..n {
                    self.waiting.push_front(self.in_work.pop_back().unwrap());
                }
            }
            Op::Push(n) => {
                for (id, len) in self.complete(*n) {
                    self.queue.push(id, len);
                }
            }
            Op::PushAll(n) => {
                let done = self.complete(*n);
                self.queue.push_all(done.into_iter());
            }
            Op::Publish => self.publish(),
            Op::Decide => self.decide(),
            Op::DriverEvent(mode, ahead) => {
                let mut at = self.driver.next_used;
                at.go(ahead % self.driver.size(), self.driver.size());
                self.driver.set_event(at.off_wrap(), *mode);
            }
            Op::EnableKicks => {
                assert_eq!(self.queue.enable_kicks(), Ok(!self.waiting.is_empty()));
                self.driver.wants_to_kick();
                self.listening = self.waiting.is_empty();
            }
            Op::DisableKicks => {
                self.queue.disable_kicks();
                self.listening = false;
                assert_eq!(self.driver.device_event().1, DISABLE);
            }
            Op::Restart => {
                self.publish();
                self.queue.unpop(self.in_work.len() as u16);
                while let Some(chain) = self.in_work.pop_back() {
                    self.waiting.push_front(chain);
                }
                let base = self.queue.base();
                assert_eq!(base >> 16, base & 0xffff);
                assert_eq!(base as u16, self.used_at.off_wrap());
                self.queue =
                    PackedQueue::new(self.driver.mem(), &QueueConfig { base, ..self.driver.base.config })
                        .unwrap();
                (self.decided_at, self.undecided) = (None, 0);
            }
            Op::Remap => self.queue.remap(&self.driver.base.mem).unwrap(),
        }
        assert_eq!(usize::from(self.queue.in_flight()), self.in_work.len());
        assert_eq!(self.queue.available(), Ok(u16::from(!self.waiting.is_empty())));
    }

    fn offer(&mut self, readable: &[u32], writable: &[u32], table: bool) {
        let mut segments = Vec::new();
        for len in readable.iter().chain(writable) {
            segments.push(Segment { gpa: BUFFERS + self.fresh % 0x4_0000, len: *len });
            self.fresh += 0x1001;
        }
        let parts: Vec<_> = (0..)
            .zip(&segments)
            .map(|(i, s)| (s.gpa, s.len, if i < readable.len() { 0 } else { WRITE }))
            .collect();
        let id = if table && !parts.is_empty() {
            let at = TABLES + u64::from(self.driver.next_avail.slot) * TABLE_BYTES;
            self.driver.offer_table(at, &parts)
        } else {
            self.driver.offer(&parts)
        };
        let Some(id) = id else { return };
        let kick = self.driver.wants_to_kick();
        // §2.8.10: nothing between the last look and this chain, so it is the one that was waited for.
        if std::mem::take(&mut self.listening) {
            assert!(kick, "a lost kick");
        } else if self.driver.device_event().1 == DISABLE {
            assert!(!kick);
        }
        let writable = segments.split_off(readable.len());
        let descriptors = if table { 1 } else { parts.len() as u16 };
        self.waiting.push_back(Offered { id, readable: segments, writable, descriptors, table });
    }

    fn pop(&mut self) {
        let popped = self.queue.pop(self.driver.mem(), &mut self.chain).unwrap();
        let Some(expected) = self.waiting.pop_front() else {
            assert!(!popped);
            return;
        };
        assert!(popped);
        assert_eq!(self.chain.head(), expected.id);
        assert_eq!(self.chain.readable(), expected.readable);
        assert_eq!(self.chain.writable(), expected.writable);
        self.in_work.push_back(expected);
    }

    fn pop_singles(&mut self, n: u8, write: bool) {
        let mut out = [Single::default(); 16];
        let access = if write { Access::Writable } else { Access::Readable };
        let count = self.queue.pop_singles(access, &mut out[..n.into()]).unwrap();
        for single in &out[..count] {
            let expected = self.waiting.pop_front().unwrap();
            let segments = if write { &expected.writable } else { &expected.readable };
            assert_eq!(segments[..], [Segment { gpa: single.gpa, len: single.len }]);
            assert_eq!((single.head, expected.descriptors, expected.table), (expected.id, 1, false));
            assert!(expected.readable.is_empty() || expected.writable.is_empty());
            self.in_work.push_back(expected);
        }
        if count < n.into()
            && let Some(next) = self.waiting.front()
        {
            let single = !next.table && next.descriptors == 1 && next.writable.is_empty() != write;
            assert!(!single, "a chain left out");
        }
    }

    fn complete(&mut self, n: u8) -> Vec<(u16, u32)> {
        let count = usize::from(n).min(self.in_work.len());
        let batch = self.driver.base.config.transmit;
        self.in_work
            .drain(..count)
            .map(|chain| {
                let len = if batch { 0 } else { u32::from(chain.id) * 3 % 70 };
                self.pushed.push_back((chain.descriptors, chain.id, len));
                (chain.id, len)
            })
            .collect()
    }

    fn publish(&mut self) {
        assert_eq!(self.driver.take_used(), [], "visible before it was published");
        self.queue.publish();
        let expected: Vec<_> = self.pushed.iter().map(|(_, id, len)| (*id, Some(*len))).collect();
        let mut seen = self.driver.take_used();
        if self.driver.base.config.transmit {
            seen.iter_mut().for_each(|(_, len)| *len = Some(0));
        }
        assert_eq!(seen, expected);
        for (descriptors, ..) in self.pushed.drain(..) {
            self.undecided = self.undecided.saturating_add(descriptors);
            self.used_at.go(descriptors, self.driver.size());
        }
        assert_eq!(self.driver.next_used, self.used_at);
    }

    fn decide(&mut self) {
        let call = self.queue.needs_call();
        if self.undecided == 0 {
            assert!(!call, "nothing new");
            return;
        }
        let (off_wrap, flags) = (self.driver.base.get16(AVAIL), self.driver.base.get16(AVAIL + 2));
        let old = self.decided_at.replace(self.used_at);
        let count = std::mem::take(&mut self.undecided);
        let expected = match (flags & 3, old) {
            (DISABLE, _) => false,
            (AT_DESCRIPTOR, Some(mut at)) if self.driver.base.config.event_idx => {
                // Slot by slot, as if each had been used and decided on alone.
                let mut passed = false;
                for _ in 0..count {
                    passed |= at.off_wrap() == off_wrap;
                    at.go(1, self.driver.size());
                }
                passed
            }
            _ => true,
        };
        assert_eq!(call, expected, "{flags} {off_wrap:#x} {old:?} {count}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..Default::default() })]

    #[test]
    fn chains_come_and_go_in_order_under_any_driver(
        size in 1u16..20,
        start in any::<u16>(),
        wrap: bool,
        event_idx: bool,
        in_order: bool,
        ops in prop::collection::vec(op(), 1..150),
    ) {
        let mut driver = PackedDriver::starting_at(size, At { slot: start % size, wrap });
        driver.config().event_idx = event_idx;
        if in_order {
            driver = driver.in_order();
        }
        let mut bench = Bench::new(driver);
        for op in &ops {
            bench.run(op);
        }
    }
}

/// Many times round the ring, in bursts of all sizes, through every slot with both wrap counters.
#[test]
fn wrap_counters_flip_at_the_end_of_the_ring() {
    for size in [1, 2, 3, 7, 16, 100] {
        let mut driver = PackedDriver::new(size);
        driver.config().event_idx = true;
        let mut bench = Bench::new(driver);
        let mut burst = 1;
        for round in 0..2000 {
            for _ in 0..burst {
                bench.run(&Op::Offer(vec![12], vec![100], round % 3 == 0));
                bench.run(&Op::Offer(vec![], vec![100], false));
            }
            bench.run(&Op::DriverEvent(AT_DESCRIPTOR, round % 11));
            bench.run(&Op::PopSingles(burst, true));
            bench.run(&Op::Pop(burst));
            bench.run(&if round % 2 == 0 { Op::Push(burst + 3) } else { Op::PushAll(burst + 3) });
            bench.run(&Op::Publish);
            bench.run(&Op::Decide);
            burst = burst % 16 + 1;
        }
    }
}
