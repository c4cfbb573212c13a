//! Two pairs wired together: what crosses, who waits for whom and for how long, and what the end of one does to the other.
#![forbid(unsafe_code)]

use super::rig::{SIZE, count, kick, nonblocking};
use crate::config::Poll;
use crate::memory::testing::guest;
use crate::memory::{GuestMemory, ResidencyMap};
use crate::net::counters::{PairCounters, PairCounts};
use crate::reactor::Reactor;
use crate::uplink::Uplink;
use crate::uplink::peer::{PeerPort, Side as PortSide, wire};
use crate::virtq::tests::driver::{Driver, MEM_SIZE, WRITE};
use crate::worker::datapath::Datapath;
use crate::worker::link::PATIENCE;
use crate::worker::{Attachment, Command, Direction, Event, PairKey, PairToken, Reply, ToControl};
use proptest::prelude::*;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

const TX_ORIGIN: u64 = 0x8000;
const SENT: u64 = 0x4_0000;
const BUFFERS: u64 = 0x8_0000;
const BUFFER: u64 = 0x800;
/// VERSION_1, MRG_RXBUF.
const FEATURES: u64 = 1 << 32 | 1 << 15;
/// GUEST_CSUM, GUEST_TSO4.
const GUEST_OFFLOADS: u64 = 1 << 1 | 1 << 7;
/// CSUM, HOST_TSO4.
const HOST_OFFLOADS: u64 = 1 << 0 | 1 << 11;

#[derive(Clone, Debug)]
enum Step {
    /// A frame of so many bytes, with these first bytes of its header; in two descriptors or one.
    Send(usize, [u8; 4], bool),
    /// Buffers of one length.
    Offer(u32, u16),
    Settle,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Nothing; a hint; the same beyond the frame, which is refused; a checksum at 0.
    let header = prop_oneof![8 => Just([0, 0, 0, 0]), 1 => Just([0, 0, 14, 0]), 1 => Just([0, 0, 255, 255]), 1 => Just([1, 0, 0, 0])];
    let send = (prop_oneof![14usize..100, 14usize..4000], header, prop::bool::weighted(0.2));
    let step = prop_oneof![
        5 => send.prop_map(|(len, header, split)| Step::Send(len, header, split)),
        4 => (prop_oneof![4 => Just(BUFFER as u32), 1 => 100u32..2000], 1u16..8).prop_map(|(len, n)| Step::Offer(len, n)),
        1 => Just(Step::Settle),
    ];
    prop::collection::vec(step, 1..200)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// By the short cut or not, in whatever mixture: frames arrive whole, in order, once, and none is lost.
    #[test]
    fn any_mixture_of_frames_and_buffers(steps in steps()) {
        let mut wire = Wire::with_pairs([1, 1]);
        wire.bring_up(0, FEATURES | HOST_OFFLOADS);
        wire.bring_up(1, FEATURES | GUEST_OFFLOADS);
        let (mut sent, mut got, mut refused) = (Vec::new(), Vec::new(), 0);
        for (seed, step) in (0u64..).zip(&steps) {
            match *step {
                Step::Send(len, header, split) => {
                    let tx = &wire.ends[0].tx;
                    if tx.avail_idx().wrapping_sub(tx.used_idx()) >= SIZE / 4 {
                        continue;
                    }
                    let body: Vec<u8> = (0..len as u64).map(|i| (i * 7 + seed * 31) as u8).collect();
                    let mut whole = [0; 12];
                    whole[..4].copy_from_slice(&header);
                    if split { wire.send_split(0, whole, &body) } else { wire.send_with(0, whole, &body) }
                    if header[2..] == [255, 255] {
                        refused += 1;
                    } else {
                        sent.push([&whole[..10], &body].concat());
                    }
                }
                Step::Offer(len, count) => {
                    for _ in 0..count {
                        let rx = &wire.ends[1].rx;
                        if rx.avail_idx().wrapping_sub(wire.ends[1].seen) < SIZE {
                            wire.offer_one(1, len);
                        }
                    }
                    kick(&wire.ends[1].kicks[0]);
                }
                Step::Settle => {
                    wire.settle();
                    got.extend(wire.received(1));
                }
            }
        }
        for _ in 0..500 {
            wire.settle();
            got.extend(wire.received(1));
            if wire.all_sent(0) {
                break;
            }
            while wire.ends[1].rx.avail_idx().wrapping_sub(wire.ends[1].seen) < SIZE {
                wire.offer_one(1, BUFFER as u32);
            }
            kick(&wire.ends[1].kicks[0]);
        }
        let got: Vec<_> = got.iter().map(|frame| [&frame[..10], &frame[12..]].concat()).collect();
        prop_assert_eq!(&got, &sent);
        let (a, b) = (wire.counts(0), wire.counts(1));
        prop_assert_eq!(a.tx_bad_header, refused);
        prop_assert_eq!((a.tx_packets, a.tx_bytes), (b.rx_packets, b.rx_bytes));
    }
}

/// A pair with its guest.
struct End {
    key: PairKey,
    memory: GuestMemory,
    rx: Driver,
    tx: Driver,
    kicks: [Arc<OwnedFd>; 2],
    calls: [Arc<OwnedFd>; 2],
    counters: Arc<PairCounters>,
    seen: u16,
}

struct Wire {
    reactor: Reactor<PairToken>,
    datapath: Datapath,
    ends: Vec<End>,
    ports: [PeerPort; 2],
    events: Vec<(PairKey, Event)>,
}

fn key(port: u16, pair: u16) -> PairKey {
    PairKey { port, pair }
}

impl Wire {
    /// Two ports with so many pairs: those of the first, then those of the second. No ring runs.
    fn with_pairs(pairs: [u16; 2]) -> Self {
        let side = |name, pairs| PortSide { name, pairs, mtu: None };
        let [(a, of_a), (b, of_b)] = wire(side("a", pairs[0]), side("b", pairs[1])).unwrap();
        let mut it = Self {
            reactor: Reactor::new().unwrap(),
            datapath: Datapath::new(Poll::Never, Arc::default()),
            ends: Vec::new(),
            ports: [a, b],
            events: Vec::new(),
        };
        for (port, queues) in [(0, of_a), (1, of_b)] {
            for (pair, queue) in (0..).zip(queues) {
                let (memory, file) = guest(MEM_SIZE);
                let counters = Arc::<PairCounters>::default();
                let peers = (0..pairs[1 - usize::from(port)]).map(|pair| key(1 - port, pair)).collect();
                let key = key(port, pair);
                let uplink = Box::new(queue);
                it.datapath.attach(Attachment { key, uplink, counters: counters.clone(), peers });
                it.ends.push(End {
                    key,
                    rx: Driver::sharing(memory.clone(), file.try_clone().unwrap(), 0, SIZE),
                    tx: Driver::sharing(memory.clone(), file, TX_ORIGIN, SIZE),
                    memory,
                    kicks: [nonblocking(), nonblocking()],
                    calls: [nonblocking(), nonblocking()],
                    counters,
                    seen: 0,
                });
            }
        }
        // Nobody loses patience where that is not what a test is about, however slow the machine is.
        it.datapath.set_patience(Duration::from_secs(3600));
        it
    }

    /// One pair each, all rings running.
    fn running() -> Self {
        let mut it = Self::with_pairs([1, 1]);
        it.bring_up(0, FEATURES);
        it.bring_up(1, FEATURES);
        it
    }

    fn bring_up(&mut self, end: usize, features: u64) {
        let memory = self.ends[end].memory.clone();
        self.done(end, Command::Features(features));
        self.done(end, Command::Memory(memory));
        for direction in [Direction::Receive, Direction::Transmit] {
            self.start(end, direction);
        }
        self.settle();
    }

    fn start(&mut self, end: usize, direction: Direction) {
        let it = &self.ends[end];
        let (config, index) = match direction {
            Direction::Receive => (it.rx.config, 0),
            Direction::Transmit => (it.tx.config, 1),
        };
        let (kick, call) = (Some(it.kicks[index].clone()), Some(it.calls[index].clone()));
        self.done(end, Command::Call { direction, fd: call });
        self.done(end, Command::Start { direction, config, kick, enabled: true });
    }

    fn command(&mut self, end: usize, command: Command) -> Option<Reply> {
        self.datapath.command(&mut self.reactor, self.ends[end].key, command);
        let mut reply = None;
        for message in self.datapath.outbox().drain(..) {
            match message {
                ToControl::Reply(_, it) => reply = Some(it),
                ToControl::Event(key, event) => self.events.push((key, event)),
            }
        }
        reply
    }

    fn done(&mut self, end: usize, command: Command) {
        let reply = self.command(end, command);
        assert!(matches!(reply, Some(Reply::Done)), "{reply:?}");
    }

    fn stop(&mut self, end: usize, direction: Direction) -> u16 {
        match self.command(end, Command::Stop { direction }) {
            Some(Reply::Base(base)) => base as u16,
            other => panic!("{other:?}"),
        }
    }

    fn turn(&mut self) -> bool {
        let (mut done, mut mail) = (Vec::new(), false);
        self.reactor.turn(false, &mut done, &mut mail).unwrap();
        let happened = !done.is_empty();
        for (token, done) in done {
            self.datapath.completion(&mut self.reactor, token, &done);
        }
        let busy = self.datapath.round(&mut self.reactor);
        for message in self.datapath.outbox().drain(..) {
            if let ToControl::Event(key, event) = message {
                self.events.push((key, event));
            }
        }
        happened || busy
    }

    /// Turns until nothing happens for a moment that is shorter than anybody's patience.
    fn settle(&mut self) {
        let mut quiet = 0;
        while quiet < 3 {
            quiet = if self.turn() { 0 } else { quiet + 1 };
            std::thread::yield_now();
        }
    }

    fn settle_until(&mut self, mut what: impl FnMut(&Self) -> bool) {
        let began = Instant::now();
        while !what(self) {
            self.turn();
            assert!(began.elapsed() < Duration::from_secs(20), "it never came");
        }
    }

    /// The guest of an end sends a frame of `len` bytes with this header, and kicks.
    fn send_with(&mut self, end: usize, header: [u8; 12], body: &[u8]) {
        let it = &self.ends[end];
        let slot = it.tx.avail_idx() % (SIZE / 2);
        let at = SENT + u64::from(slot) * 0x1000;
        it.tx.put(at, &header);
        it.tx.put(at + 12, body);
        it.tx.offer_one(slot, at, 12 + body.len() as u32, 0);
        kick(&it.kicks[1]);
    }

    /// The same, with the header in a descriptor of its own.
    fn send_split(&mut self, end: usize, header: [u8; 12], body: &[u8]) {
        let it = &self.ends[end];
        // The other half of the table.
        let slot = it.tx.avail_idx() % (SIZE / 4);
        let head = SIZE / 2 + 2 * slot;
        let at = SENT + u64::from(SIZE / 2 + slot) * 0x1000;
        it.tx.put(at, &header);
        it.tx.put(at + 12, body);
        it.tx.offer_chain(head, &[(at, 12, 0), (at + 12, body.len() as u32, 0)]);
        kick(&it.kicks[1]);
    }

    fn send(&mut self, end: usize, mark: u8, len: usize) {
        self.send_with(end, [0; 12], &vec![mark; len]);
    }

    /// The guest of an end offers buffers, and kicks.
    fn offer(&mut self, end: usize, buffers: u16) {
        (0..buffers).for_each(|_| self.offer_one(end, BUFFER as u32));
        kick(&self.ends[end].kicks[0]);
    }

    fn offer_one(&mut self, end: usize, len: u32) {
        let it = &self.ends[end];
        let slot = it.rx.avail_idx() % SIZE;
        it.rx.offer_one(slot, BUFFERS + u64::from(slot) * BUFFER, len, WRITE);
    }

    /// What the guest of an end has received since the last look, header first, buffers joined.
    fn received(&mut self, end: usize) -> Vec<Vec<u8>> {
        let it = &mut self.ends[end];
        let mut frames: Vec<Vec<u8>> = Vec::new();
        let mut parts = 0;
        while it.seen != it.rx.used_idx() {
            let (slot, len) = it.rx.used(it.seen);
            it.seen = it.seen.wrapping_add(1);
            let mut bytes = vec![0; len as usize];
            it.rx.file.read_exact_at(&mut bytes, BUFFERS + u64::from(slot) * BUFFER).unwrap();
            if parts > 0 {
                frames.last_mut().unwrap().extend(bytes);
                parts -= 1;
            } else {
                parts = u16::from_le_bytes([bytes[10], bytes[11]]) - 1;
                frames.push(bytes);
            }
        }
        assert_eq!(parts, 0);
        frames
    }

    fn marks(&mut self, end: usize) -> Vec<u8> {
        self.received(end).iter().map(|frame| frame[12]).collect()
    }

    fn counts(&self, end: usize) -> PairCounts {
        self.ends[end].counters.read()
    }

    /// The guest of an end has as many frames on their way as sent, all done with.
    fn all_sent(&self, end: usize) -> bool {
        self.ends[end].tx.used_idx() == self.ends[end].tx.avail_idx()
    }
}

#[test]
fn frames_cross_both_ways_with_one_call_a_burst() {
    let mut wire = Wire::running();
    for end in [0, 1] {
        wire.offer(end, 20);
    }
    wire.settle();
    wire.ends.iter().for_each(|end| end.calls.iter().for_each(|call| assert!(count(call) <= 1)));
    for mark in 0..10 {
        wire.send(0, mark, 60 + usize::from(mark));
        wire.send(1, 100 + mark, 1500);
    }
    wire.settle();
    let got = wire.received(1);
    assert_eq!(got.len(), 10);
    for (mark, frame) in (0..).zip(&got) {
        assert_eq!(frame[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(frame[12..], vec![mark; 60 + usize::from(mark)]);
    }
    assert_eq!(wire.marks(0), (100..110).collect::<Vec<_>>());
    assert!(wire.all_sent(0) && wire.all_sent(1));
    let (a, b) = (wire.counts(0), wire.counts(1));
    assert_eq!((a.tx_packets, b.rx_packets, b.tx_packets, a.rx_packets), (10, 10, 10, 10));
    assert_eq!((a.tx_bytes, a.rx_bytes), (b.rx_bytes, b.tx_bytes));
    for end in &wire.ends {
        assert_eq!(end.calls.each_ref().map(count), [1, 1]);
    }
}

#[test]
fn a_large_frame_crosses_in_one_piece() {
    let mut wire = Wire::with_pairs([1, 1]);
    wire.bring_up(0, FEATURES | HOST_OFFLOADS);
    wire.bring_up(1, FEATURES | GUEST_OFFLOADS);
    wire.offer(1, 40);
    let header = [1, 1, 54, 0, 0xdc, 5, 34, 0, 16, 0, 0, 0];
    let body: Vec<u8> = (0..60_000u32).map(|i| (i * 7) as u8).collect();
    let it = &wire.ends[0];
    it.tx.put(SENT, &header);
    it.tx.put(SENT + 12, &body);
    it.tx.offer_chain(0, &[(SENT, 2000, 0), (SENT + 2000, 58_012, 0)]);
    kick(&it.kicks[1]);
    wire.settle();
    let got = wire.received(1);
    assert_eq!(got.len(), 1);
    assert_eq!(got[0][..10], header[..10]);
    assert_eq!(got[0][12..], body);
    assert_eq!(wire.counts(1).rx_software_offload, 0);
}

#[test]
fn what_the_receiver_did_not_acknowledge_is_done_in_software() {
    let mut wire = Wire::with_pairs([1, 1]);
    wire.bring_up(0, FEATURES | HOST_OFFLOADS);
    wire.bring_up(1, FEATURES);
    wire.offer(1, 20);
    // The checksum of what begins at 14, at 20: it holds the sum of nothing.
    let mut body = vec![0x11; 60];
    body[20..22].fill(0);
    wire.send_with(0, [1, 0, 0, 0, 0, 0, 14, 0, 6, 0, 0, 0], &body);
    // Nobody vouches for a checksum to another guest.
    wire.send_with(0, [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[3; 60]);
    // No TCP frame, so it cannot be cut.
    wire.send_with(0, [1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0], &[4; 1000]);
    let mut tcp =
        [&[2; 12][..], &[8, 0, 0x45, 0, 1, 0xf4, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]]
            .concat();
    tcp.extend([0, 80, 1, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    tcp.extend([9; 250]);
    wire.send_with(0, [1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0], &tcp);
    wire.settle();
    let got = wire.received(1);
    assert!(got.iter().all(|frame| frame[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]));
    let lens: Vec<_> = got.iter().map(|frame| frame.len() - 12).collect();
    assert_eq!(lens, [60, 60, 154, 154, 104]);
    // 23 words less one of 0x1111 come to 0x7776, with what was carried.
    let sum: u32 = got[0][26..].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    let counts = wire.counts(1);
    assert_eq!((counts.rx_software_offload, counts.rx_dropped_offload), (2, 1));
}

#[test]
fn the_receivers_mtu_is_kept() {
    let mut wire = Wire::running();
    wire.offer(1, 10);
    wire.ports[1].set_mtu(1000).unwrap();
    wire.send(0, 1, 1022);
    wire.send(0, 2, 1023);
    wire.settle();
    assert_eq!((wire.marks(1), wire.counts(1).rx_dropped_mtu), (vec![1], 1));
}

#[test]
fn a_sender_waits_for_buffers_and_goes_on_with_them() {
    let mut wire = Wire::running();
    wire.offer(1, 2);
    for mark in 0..5 {
        wire.send(0, mark, 60);
    }
    wire.settle();
    assert_eq!(wire.marks(1), [0, 1]);
    assert_eq!(wire.ends[0].tx.used_idx(), 2);
    wire.offer(1, 2);
    wire.settle_until(|wire| wire.ends[0].tx.used_idx() >= 4);
    assert_eq!(wire.marks(1), [2, 3]);
}

#[test]
fn a_receiver_without_buffers_does_not_stop_the_sender_for_ever() {
    let mut wire = Wire::running();
    wire.datapath.set_patience(PATIENCE);
    let began = Instant::now();
    for mark in 0..5 {
        wire.send(0, mark, 60);
    }
    wire.settle_until(|wire| wire.all_sent(0));
    assert!(began.elapsed() >= PATIENCE);
    assert_eq!(wire.counts(1).rx_dropped_no_buffers, 5);
    // From now on nobody waits.
    wire.send(0, 6, 60);
    wire.settle();
    assert_eq!(wire.counts(1).rx_dropped_no_buffers, 6);
    // Until there are buffers.
    wire.offer(1, 3);
    wire.settle();
    for mark in 10..15 {
        wire.send(0, mark, 60);
    }
    wire.settle_until(|wire| wire.ends[1].rx.used_idx() == 3);
    assert_eq!(wire.marks(1), [10, 11, 12]);
    // Those that are left may wait, or be dropped if that took too long.
    wire.settle_until(|wire| wire.all_sent(0));
}

#[test]
fn without_a_ring_frames_are_dropped_at_once() {
    let mut wire = Wire::with_pairs([1, 1]);
    wire.bring_up(0, FEATURES);
    wire.send(0, 1, 60);
    wire.settle();
    assert_eq!((wire.all_sent(0), wire.counts(1).rx_dropped_no_ring), (true, 1));
    wire.bring_up(1, FEATURES);
    wire.offer(1, 4);
    wire.done(1, Command::Enable { direction: Direction::Receive, enabled: false });
    wire.send(0, 2, 60);
    wire.settle();
    assert_eq!(wire.counts(1).rx_dropped_no_ring, 2);
    wire.done(1, Command::Enable { direction: Direction::Receive, enabled: true });
    wire.send(0, 3, 60);
    wire.settle();
    assert_eq!(wire.marks(1), [3]);
}

/// Whatever ends the receiver's ring, the sender that waited for it goes on.
#[test]
fn a_sender_is_let_go_when_the_receiver_stops() {
    let stops: [fn(&mut Wire); 3] = [
        |wire| assert_eq!(wire.stop(1, Direction::Receive), 0),
        |wire| wire.done(1, Command::Enable { direction: Direction::Receive, enabled: false }),
        |wire| wire.done(1, Command::Reset),
    ];
    for stop in stops {
        let mut wire = Wire::running();
        wire.send(0, 1, 60);
        wire.settle();
        assert!(!wire.all_sent(0));
        stop(&mut wire);
        wire.settle_until(|wire| wire.all_sent(0));
        assert_eq!(wire.counts(1).rx_dropped_no_ring, 1);
    }
}

#[test]
fn a_sender_that_waits_can_stop_and_begin_again_where_it_was() {
    let mut wire = Wire::running();
    wire.offer(1, 1);
    (0..3).for_each(|mark| wire.send(0, mark, 60));
    wire.settle();
    assert_eq!(wire.stop(0, Direction::Transmit), 1);
    wire.offer(1, 4);
    wire.settle();
    assert_eq!(wire.marks(1), [0]);
    wire.ends[0].tx.config.base = 1;
    wire.start(0, Direction::Transmit);
    wire.settle();
    assert_eq!(wire.marks(1), [1, 2]);
}

#[test]
fn a_broken_ring_harms_its_own_port_only() {
    let mut wire = Wire::running();
    wire.offer(1, 1);
    wire.ends[1].rx.offer(SIZE + 7);
    for mark in 0..4 {
        wire.send(0, mark, 60);
    }
    wire.settle_until(|wire| wire.all_sent(0));
    assert_eq!(wire.counts(1).rings_broken, 1);
    assert_eq!((wire.counts(0).rings_broken, wire.counts(0).tx_packets), (0, 4));
    assert!(matches!(
        &wire.events[..],
        [(PairKey { port: 1, .. }, Event::RingBroken(Direction::Receive, _))]
    ));
    // The other way still works.
    wire.offer(0, 2);
    wire.send(1, 9, 60);
    wire.settle();
    assert_eq!(wire.marks(0), [9]);
}

#[test]
fn a_receiver_whose_pages_are_missing_parks_and_is_told_of_it() {
    let mut wire = Wire::running();
    let map = Arc::new(ResidencyMap::new(MEM_SIZE, 0x1000));
    map.set_present(0..BUFFERS);
    let memory = wire.ends[1].memory.with_residency(&[Some(map.clone())]);
    wire.done(1, Command::Memory(memory));
    wire.offer(1, 4);
    wire.send(0, 1, 60);
    wire.settle();
    assert_eq!(wire.counts(1).parks, 1);
    let wants = |(key, event): &(PairKey, Event)| {
        key.port == 1 && matches!(event, Event::Wants { parked: Some(_), .. })
    };
    assert!(wire.events.iter().any(wants));
    map.set_present(0..MEM_SIZE);
    wire.command(1, Command::Arrived);
    wire.settle();
    assert_eq!((wire.marks(1), wire.counts(0).parks), (vec![1], 0));
}

#[test]
fn a_sender_whose_pages_are_missing_parks_alone() {
    let mut wire = Wire::running();
    wire.offer(1, 4);
    wire.offer(0, 4);
    let map = Arc::new(ResidencyMap::new(MEM_SIZE, 0x1000));
    map.set_present(0..SENT);
    map.set_present(BUFFERS..MEM_SIZE);
    let memory = wire.ends[0].memory.with_residency(&[Some(map.clone())]);
    wire.done(0, Command::Memory(memory));
    wire.send(0, 1, 60);
    wire.send(1, 2, 60);
    wire.settle();
    assert_eq!((wire.counts(0).parks, wire.counts(1).parks), (1, 0));
    assert_eq!((wire.marks(0), wire.marks(1)), (vec![2], vec![]));
    map.set_present(0..MEM_SIZE);
    wire.command(0, Command::Arrived);
    wire.settle();
    assert_eq!(wire.marks(1), [1]);
}

#[test]
fn memory_that_vanishes_fails_its_own_port_only() {
    for end in [0, 1] {
        let mut wire = Wire::running();
        wire.offer(1, 4);
        wire.settle();
        wire.send(0, 1, 60);
        let gone = &wire.ends[end];
        gone.rx.file.set_len(if end == 0 { SENT } else { BUFFERS }).unwrap();
        wire.settle();
        let faults: Vec<_> =
            wire.events.iter().map(|(key, event)| (key.port, matches!(event, Event::MemoryFault))).collect();
        assert_eq!(faults, [(end as u16, true)]);
        // The other is as it was.
        let other = 1 - end;
        wire.send(other, 2, 60);
        wire.settle_until(|wire| wire.all_sent(other));
        wire.done(other, Command::Enable { direction: Direction::Receive, enabled: true });
    }
}

#[test]
fn announcements_reach_the_other_guest() {
    let mut wire = Wire::running();
    wire.offer(1, 4);
    wire.settle();
    wire.ports[0].announce(&[0x77; 60]).unwrap();
    wire.send(0, 1, 60);
    wire.settle();
    let mut marks = wire.marks(1);
    marks.sort_unstable();
    assert_eq!(marks, [1, 0x77]);
}

/// Pairs that take no frames are passed over: guests use as many as they like.
#[test]
fn every_pair_finds_one_that_takes_its_frames() {
    let mut wire = Wire::with_pairs([2, 3]);
    for end in [0, 1, 3] {
        wire.bring_up(end, FEATURES);
        wire.offer(end, 10);
    }
    (0..3).for_each(|mark| wire.send(0, mark, 60));
    (10..13).for_each(|mark| wire.send(1, mark, 60));
    wire.settle();
    let mut marks = wire.marks(3);
    marks.sort_unstable();
    assert_eq!(marks, [0, 1, 2, 10, 11, 12], "only the second pair of the other port runs");
    wire.bring_up(2, FEATURES);
    wire.offer(2, 10);
    wire.send(0, 20, 60);
    wire.send(1, 21, 60);
    wire.settle();
    assert_eq!((wire.marks(2), wire.marks(3)), (vec![20], vec![21]), "each to that of its number");
    wire.bring_up(4, FEATURES);
    wire.send(4, 30, 60);
    wire.settle();
    assert_eq!(wire.marks(0), [30]);
}
