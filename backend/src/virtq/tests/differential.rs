//! Our queue and the one of the `virtio-queue` crate on the same memory, under random drivers.
//!
//! Both look at the same descriptors and available ring, over two mappings of one memfd; each has its own used ring, and the two
//! must stay equal. The crate is lenient: it ends a malformed chain early and says nothing. So what we accept must be
//! exactly what it yields, and what we refuse must be refused for a reason that can be seen in what it yields.

use std::sync::atomic::Ordering;

use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::super::*;
use super::driver::*;

/// The used ring of the other queue.
const OTHER_USED: u64 = 0x4_0000;
/// Indirect tables; the last ones are misaligned, and one lies across the end of memory.
const TABLES: [u64; 4] = [0x5_0000, 0x5_1000, 0x5_2003, MEM_SIZE - 40];
const TABLE_ENTRIES: u16 = 8;

#[derive(Clone, Debug)]
enum Op {
    /// A chain as the spec wants it: lengths to read, lengths to write, how many of them in an indirect table.
    Offer {
        readable: Vec<u32>,
        writable: Vec<u32>,
        indirect: Option<usize>,
    },
    /// Whatever is at this descriptor.
    OfferHead(u16),
    /// Anything at a descriptor of the table, or of an indirect one.
    Scribble {
        table: Option<usize>,
        index: u16,
        raw: Raw,
    },
    /// The available index off by this much, for one look.
    Jump(u16),
    Pop(u8),
    Unpop(u8),
    Complete(u8),
    Decide,
    UsedEvent(i16),
    AvailFlags(u16),
    EnableKicks,
    DisableKicks,
}

fn raw_descriptor() -> impl Strategy<Value = Raw> {
    let addr = prop_oneof![
        4 => 0x8_0000u64..0x9_0000,
        3 => (0..TABLES.len()).prop_map(|i| TABLES[i]),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        4 => 1u32..2000,
        3 => (0u32..=u32::from(TABLE_ENTRIES) + 1).prop_map(|n| n * 16),
        1 => Just(u32::MAX),
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![
        3 => Just(0), 3 => Just(NEXT), 3 => Just(WRITE), 2 => Just(NEXT | WRITE), 3 => Just(INDIRECT), 1 => 0u16..8,
        1 => any::<u16>()
    ];
    let next = prop_oneof![8 => 0u16..18, 1 => any::<u16>()];
    (addr, len, flags, next)
}

fn op() -> impl Strategy<Value = Op> {
    let lens = || prop::collection::vec(1u32..3000, 0..4);
    prop_oneof![
        6 => (lens(), lens(), prop::option::of(0..2usize))
            .prop_map(|(readable, writable, indirect)| Op::Offer { readable, writable, indirect }),
        4 => prop_oneof![9 => 0u16..16, 1 => any::<u16>()].prop_map(Op::OfferHead),
        6 => (prop::option::of(0..TABLES.len()), 0..16u16, raw_descriptor())
            .prop_map(|(table, index, raw)| Op::Scribble { table, index, raw }),
        1 => any::<u16>().prop_map(Op::Jump),
        8 => (1..6u8).prop_map(Op::Pop),
        2 => (1..4u8).prop_map(Op::Unpop),
        6 => (1..6u8).prop_map(Op::Complete),
        4 => Just(Op::Decide),
        3 => (-3i16..6).prop_map(Op::UsedEvent),
        1 => (0u16..2).prop_map(Op::AvailFlags),
        2 => Just(Op::EnableKicks),
        2 => Just(Op::DisableKicks),
    ]
}

struct Bench {
    driver: Driver,
    ours: SplitQueue,
    theirs: Queue,
    their_memory: GuestMemoryMmap<()>,
    /// Heads popped and not completed, oldest first.
    in_work: std::collections::VecDeque<u16>,
    /// Where descriptors of good chains are taken from next.
    fresh: u16,
    /// Used index at the last decision.
    decided: Option<u16>,
    chain: Chain,
}

impl Bench {
    fn new(size: u16, base: u16, event_idx: bool) -> Self {
        let mut driver = Driver::starting_at(size, base);
        driver.config.event_idx = event_idx;
        driver.put16(OTHER_USED + 2, base);
        let file = FileOffset::new(driver.file.try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(0), MEM_SIZE as usize, Some(file))];
        let their_memory = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        let mut theirs = Queue::new(size).unwrap();
        theirs.set_desc_table_address(Some(DESC as u32), Some(0));
        theirs.set_avail_ring_address(Some(AVAIL as u32), Some(0));
        theirs.set_used_ring_address(Some(OTHER_USED as u32), Some(0));
        theirs.set_event_idx(event_idx);
        theirs.set_next_avail(base);
        theirs.set_next_used(base);
        theirs.set_ready(true);
        Self {
            ours: driver.queue(),
            driver,
            theirs,
            their_memory,
            in_work: Default::default(),
            fresh: 0,
            decided: None,
            chain: Chain::new(),
        }
    }

    fn size(&self) -> u16 {
        self.driver.config.size
    }

    fn room(&self) -> bool {
        self.driver.avail_idx().wrapping_sub(self.driver.used_idx()) < self.size()
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Offer { readable, writable, indirect } => self.offer(readable, writable, *indirect),
            Op::OfferHead(head) if self.room() => self.driver.offer(*head),
            Op::OfferHead(_) => {}
            Op::Scribble { table: None, index, raw } => {
                self.driver.descriptor(DESC, index % self.size(), *raw)
            }
            Op::Scribble { table: Some(table), index, raw } => {
                let at = TABLES[*table] + 16 * u64::from(*index);
                if at + 16 <= MEM_SIZE {
                    self.driver.descriptor(TABLES[*table], *index, *raw);
                }
            }
            Op::Jump(by) => self.jump(*by),
            Op::Pop(n) => (0..*n).for_each(|_| self.pop()),
            Op::Unpop(n) => self.unpop(u16::from(*n)),
            Op::Complete(n) => self.complete(*n),
            Op::Decide => self.decide(),
            Op::UsedEvent(ahead) => {
                let event = self.driver.used_idx().wrapping_add_signed(*ahead);
                if self.driver.config.event_idx {
                    self.driver.set_used_event(event);
                }
            }
            Op::AvailFlags(flags) => self.driver.set_avail_flags(*flags),
            Op::EnableKicks => {
                assert_eq!(
                    self.ours.enable_kicks().unwrap(),
                    self.theirs.enable_notification(&self.their_memory).unwrap()
                );
                self.compare_event_fields();
            }
            Op::DisableKicks => {
                self.ours.disable_kicks();
                self.theirs.disable_notification(&self.their_memory).unwrap();
                self.compare_event_fields();
            }
        }
    }

    fn offer(&mut self, readable: &[u32], writable: &[u32], indirect: Option<usize>) {
        let count = (readable.len() + writable.len()) as u16;
        if count == 0 || count > self.size() || !self.room() {
            return;
        }
        let mut lens = readable.iter().map(|len| (*len, 0)).chain(writable.iter().map(|len| (*len, WRITE)));
        let (table, modulus, first) = match indirect {
            Some(table) => (TABLES[table], TABLE_ENTRIES, 0),
            None => (DESC, self.size(), self.fresh),
        };
        for i in 0..count {
            let (len, flags) = lens.next().unwrap();
            let next = if i + 1 < count { NEXT } else { 0 };
            let raw = (0x8_0000 + u64::from(i) * 0x1000, len, flags | next, (first + i + 1) % modulus);
            self.driver.descriptor(table, (first + i) % modulus, raw);
        }
        let head = self.fresh % self.size();
        if indirect.is_some() {
            self.driver.descriptor(DESC, head, (table, u32::from(TABLE_ENTRIES) * 16, INDIRECT, 0));
        }
        self.fresh = (self.fresh + count) % self.size();
        self.driver.offer(head);
    }

    fn jump(&mut self, by: u16) {
        let right = self.driver.avail_idx();
        // Ours looks at the index only when it knows of no chain.
        while self.ours.available().unwrap() > 0 {
            if self.pop_one().is_none() {
                return;
            }
        }
        let taken = self.in_work.len() as u16;
        let next = right;
        let wrong = right.wrapping_add(by);
        self.driver.set_avail_idx(wrong);
        let refused = self.ours.available();
        let theirs_refuses = self.theirs.iter(&self.their_memory).is_err();
        let ahead = wrong.wrapping_sub(next);
        if theirs_refuses {
            assert!(refused.is_err());
        }
        assert_eq!(refused.is_err(), ahead > self.size() - taken, "{ahead} ahead, {taken} taken");
        self.driver.set_avail_idx(right);
        if refused.is_ok() && ahead > 0 {
            // It believed the index: take the phantom chains as well, in step.
            self.driver.set_avail_idx(wrong);
        }
    }

    fn pop(&mut self) {
        self.pop_one();
    }

    /// Pops on both sides and compares. None: there was no chain, or the ring is broken, for now.
    fn pop_one(&mut self) -> Option<()> {
        let head = {
            let mut chains = self.theirs.iter(&self.their_memory).unwrap();
            chains.next().map(|chain| (chain.head_index(), chain.collect::<Vec<Descriptor>>()))
        };
        let ours = self.ours.pop(&self.driver.mem, &mut self.chain);
        let Some((head, descriptors)) = head else {
            assert_eq!(ours, Ok(false));
            return None;
        };
        if head >= self.size() {
            assert_eq!(ours, Err(PopError::Broken(QueueError::BadHead { head, size: self.size() })));
            assert!(descriptors.is_empty());
            self.theirs.go_to_previous_position();
            self.mend(head);
            return None;
        }
        match ours {
            Ok(true) => {
                assert_eq!(self.chain.head(), head);
                let segments: Vec<_> =
                    self.chain.readable().iter().chain(self.chain.writable()).copied().collect();
                let expected: Vec<_> =
                    descriptors.iter().map(|d| Segment { gpa: d.addr().0, len: d.len() }).collect();
                assert_eq!(segments, expected);
                let readable = descriptors.iter().position(Descriptor::is_write_only);
                assert_eq!(self.chain.readable().len(), readable.unwrap_or(descriptors.len()));
                assert!(descriptors[self.chain.readable().len()..].iter().all(Descriptor::is_write_only));
                assert!(!descriptors.last().unwrap().has_next());
                let total: u64 = descriptors.iter().map(|d| u64::from(d.len())).sum();
                assert_eq!(self.chain.readable_len() + self.chain.writable_len(), total);
            }
            Err(PopError::Bad { head: ours, why }) => {
                assert_eq!(ours, head);
                self.check_blame(head, &descriptors, why);
            }
            other => panic!("{other:?} for chain {head}: {descriptors:?}"),
        }
        self.in_work.push_back(head);
        Some(())
    }

    /// Puts a valid head where an invalid one was met.
    fn mend(&mut self, _head: u16) {
        let slot = self.theirs.next_avail() % self.size();
        self.driver.put16(AVAIL + 4 + 2 * u64::from(slot), 0);
    }

    /// Whether `why` is true of the chain at `head`, of which the other queue yielded `descriptors`.
    fn check_blame(&self, head: u16, descriptors: &[Descriptor], why: ChainError) {
        let size = self.size();
        let read = |table: u64, index: u16| -> Option<Descriptor> {
            self.their_memory.read_obj(GuestAddress(table.checked_add(16 * u64::from(index))?)).ok()
        };
        // The descriptor of the table by which the chain goes on elsewhere, if it does.
        let mut index = head;
        let mut steps = 0;
        let switch = loop {
            let descriptor = (index < size).then(|| read(DESC, index)).flatten();
            match descriptor {
                Some(d) if d.refers_to_indirect_table() => break Some(d),
                Some(d) if d.has_next() && steps < size => index = d.next(),
                _ => break None,
            }
            steps += 1;
        };
        let entries = switch.map_or(u32::from(size), |d| d.len() / 16);
        let inside = switch.map(|_| usize::from(steps)).unwrap_or(0);
        let last = descriptors.last();
        // The one at which the other queue stopped, if there is one.
        let stopped_at = match (last, switch) {
            (Some(d), Some(switch)) if descriptors.len() > inside => read(switch.addr().0, d.next()),
            (_, Some(switch)) if descriptors.len() == inside => read(switch.addr().0, 0),
            (Some(d), _) => read(DESC, d.next()),
            (None, _) => read(DESC, head),
        };
        let all: Vec<Descriptor> = descriptors.iter().copied().chain(stopped_at).collect();
        // There the other queue stops, while we look at the total length last: whatever comes behind is unseen.
        let too_many_bytes = all.iter().map(|d| u64::from(d.len())).sum::<u64>() > u64::from(u32::MAX);
        let truth = match why {
            ChainError::NextOutOfRange(next) => {
                last.is_some_and(|d| d.has_next() && d.next() == next) && u32::from(next) >= entries
            }
            ChainError::Loop => {
                last.is_some_and(Descriptor::has_next) && (descriptors.len() - inside) as u32 == entries
            }
            ChainError::TooLong => descriptors.len() > MAX_CHAIN,
            ChainError::ZeroLength => all.iter().any(|d| d.len() == 0),
            ChainError::ReadableAfterWritable => {
                all.windows(2).any(|pair| pair[0].is_write_only() && !pair[1].is_write_only())
            }
            ChainError::TooManyBytes => too_many_bytes,
            ChainError::IndirectNotNegotiated => false,
            ChainError::NestedIndirect => stopped_at.is_some_and(|d| d.refers_to_indirect_table()),
            ChainError::IndirectWithNext => switch.unwrap().has_next(),
            ChainError::IndirectLength(len) => {
                switch.unwrap().len() == len && (len == 0 || !len.is_multiple_of(16) || len / 16 > 65535)
            }
            ChainError::IndirectOutOfRange => stopped_at.is_none(),
        };
        assert!(
            truth || too_many_bytes,
            "{why:?} is not what is wrong with chain {head}: {descriptors:?}, {switch:?}"
        );
    }

    fn unpop(&mut self, n: u16) {
        let n = n.min(self.in_work.len() as u16);
        self.ours.unpop(n);
        for _ in 0..n {
            self.theirs.go_to_previous_position();
            self.in_work.pop_back();
        }
    }

    fn complete(&mut self, n: u8) {
        for i in 0..n {
            let Some(head) = self.in_work.pop_front() else { break };
            self.ours.push(head, u32::from(i) * 77);
            self.theirs.add_used(&self.their_memory, head, u32::from(i) * 77).unwrap();
        }
        assert!(n == 0 || self.driver.used_idx() == self.ours.base());
        self.ours.publish();
        self.compare_used();
    }

    fn decide(&mut self) {
        let ours = self.ours.needs_call();
        let theirs = self.theirs.needs_notification(&self.their_memory).unwrap();
        let new = self.driver.used_idx();
        let old = self.decided;
        if old == Some(new) || (old.is_none() && u32::from(new) == self.driver.config.base) {
            assert!(!ours, "nothing new");
            return;
        }
        self.decided = Some(new);
        if !self.driver.config.event_idx {
            assert_eq!(ours, self.driver.get16(AVAIL) & 1 == 0);
            return;
        }
        let Some(old) = old else {
            assert!(ours, "the first decision");
            return;
        };
        assert_eq!(ours, theirs);
        // VIRTIO 1.3 §2.7.10: as if each element had been published and decided on alone.
        let event = self.driver.get16(AVAIL + 4 + 2 * u64::from(self.size()));
        let mut index = old;
        let mut passed = false;
        while index != new {
            passed |= index == event;
            index = index.wrapping_add(1);
        }
        assert_eq!(ours, passed);
    }

    fn compare_used(&self) {
        let len = 4 + 8 * usize::from(self.size());
        let (mut a, mut b) = (vec![0; len], vec![0; len]);
        self.their_memory.read_slice(&mut a, GuestAddress(USED)).unwrap();
        self.their_memory.read_slice(&mut b, GuestAddress(OTHER_USED)).unwrap();
        assert_eq!(a[2..], b[2..]);
        assert_eq!(self.theirs.next_used(), self.ours.base());
        assert_eq!(self.theirs.used_idx(&self.their_memory, Ordering::Relaxed).unwrap().0, self.ours.base());
    }

    fn compare_event_fields(&self) {
        if self.driver.config.event_idx {
            let at = 4 + 8 * u64::from(self.size());
            assert_eq!(self.driver.get16(USED + at), self.driver.get16(OTHER_USED + at));
        }
        assert_eq!(self.driver.get16(USED), self.driver.get16(OTHER_USED));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..Default::default() })]

    #[test]
    fn two_queues_agree_under_any_driver(
        size_shift in 0u32..5,
        base in prop_oneof![Just(0u16), 65520u16..=65535, any::<u16>()],
        event_idx: bool,
        ops in prop::collection::vec(op(), 1..150),
    ) {
        let mut bench = Bench::new(1 << size_shift, base, event_idx);
        for op in &ops {
            bench.run(op);
        }
    }
}

/// Once round the 16-bit clock and more, in bursts of all sizes.
#[test]
fn indices_wrap_at_65536() {
    let mut bench = Bench::new(16, 65000, true);
    let mut total = 0u32;
    let mut burst = 1;
    while total < 70_000 {
        for _ in 0..burst {
            bench.offer(&[12, 64], &[100], None);
        }
        bench.run(&Op::UsedEvent((total % 11) as i16 - 3));
        bench.run(&Op::Pop(burst));
        bench.run(&Op::Complete(burst));
        bench.run(&Op::Decide);
        total += u32::from(burst);
        burst = burst % 16 + 1;
    }
}
