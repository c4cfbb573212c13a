//! Frames from memory into a guest's ring: what the guest sees, and when a frame stays where it is. The path that reads
//! frames from an uplink is the oracle.
#![forbid(unsafe_code)]

use super::rig::{BUFFERS, Rig, frame};
use crate::memory::testing::contents;
use crate::net::tx::End;
use crate::virtq::QueueError;
use crate::virtq::tests::driver::{DESC, INDIRECT, MEM_SIZE, NEXT, USED, WRITE};
use proptest::prelude::*;

fn all(rig: &mut Rig, frames: &[Vec<u8>]) {
    let done = rig.deliver(frames, 12, 1 << 20);
    assert!(done.end.is_none(), "{:?}", done.end);
    assert_eq!(done.frames, frames.len());
}

fn buffers(rig: &mut Rig, count: u32, len: u32) {
    for _ in 0..count {
        rig.buffer(&[len]);
    }
}

#[test]
fn a_burst_of_small_frames() {
    for (header_len, mergeable) in [(10, false), (12, false), (12, true)] {
        let mut rig = Rig::new(256, header_len, mergeable);
        buffers(&mut rig, 100, 2048);
        let sent: Vec<_> = (0..100).map(|i| frame(header_len, i, 60 + i as usize)).collect();
        let done = rig.deliver(&sent, header_len, 1 << 20);
        assert_eq!((done.frames, done.used, done.end.is_none()), (100, 100, true));
        assert_eq!(rig.frames(), sent.into_iter().map(|frame| (frame, 1)).collect::<Vec<_>>());
        let counts = rig.counts();
        assert_eq!((counts.rx_packets, counts.rx_bytes), (100, (0..100).map(|i| 60 + i).sum()));
    }
}

/// Header lengths of the two sides need not be equal: legacy and modern guests.
#[test]
fn the_header_is_the_receivers() {
    for (theirs, ours) in [(12, 10), (10, 12)] {
        for pieces in [&[200][..], &[3, 9, 188]] {
            let mut rig = Rig::new(8, ours, false);
            rig.buffer(pieces);
            let mut sent = frame(theirs, 1, 60);
            sent[..10].copy_from_slice(&[1, 0, 3, 0, 4, 0, 5, 0, 6, 0]);
            rig.deliver(&[sent.clone()], theirs, 50);
            let (got, _) = rig.frames().remove(0);
            assert_eq!(got[..10], sent[..10]);
            assert_eq!(got[ours..], sent[theirs..]);
        }
    }
}

/// VIRTIO 1.3 §5.1.6.4.1: without mergeable buffers num_buffers is 1.
#[test]
fn num_buffers_is_ours_whatever_the_sender_wrote() {
    for mergeable in [false, true] {
        let mut rig = Rig::new(8, 12, mergeable);
        rig.buffer_at(&[(BUFFERS, 200)]);
        let mut sent = frame(12, 1, 60);
        sent[10..12].copy_from_slice(&[0xaa, 0xbb]);
        all(&mut rig, &[sent]);
        assert_eq!(rig.bytes(BUFFERS + 10, 2), [1, 0]);
    }
}

#[test]
fn a_large_frame_takes_exactly_the_chains_it_needs() {
    let mut rig = Rig::new(256, 12, true);
    buffers(&mut rig, 60, 1526);
    let sent = frame(12, 1, 65_549);
    all(&mut rig, &[sent.clone(), sent.clone()[..72].to_vec()]);
    assert_eq!(rig.frames(), [(sent.clone(), 43), (sent[..72].to_vec(), 1)]);
}

#[test]
fn a_frame_that_finds_too_few_buffers_stays_where_it_is() {
    let mut rig = Rig::new(16, 12, true);
    let sent = [frame(12, 1, 60), frame(12, 2, 1000), frame(12, 3, 60)];
    buffers(&mut rig, 3, 400);
    let done = rig.deliver(&sent, 12, 100);
    assert!(matches!(done.end, Some(End::NoBuffers)));
    assert_eq!((done.frames, done.used, rig.queue.base()), (1, 1, 1));
    assert_eq!(rig.frames(), [(sent[0].clone(), 1)]);
    // Those that are too few do not look like work.
    assert!(!rig.queue.may_have_more() && !rig.queue.enable_kicks().unwrap());
    assert!(matches!(rig.deliver(&sent[1..], 12, 100).end, Some(End::NoBuffers)));
    buffers(&mut rig, 2, 400);
    assert_eq!(rig.deliver(&sent[1..], 12, 100).frames, 2);
    assert_eq!(rig.frames(), [(sent[1].clone(), 3), (sent[2].clone(), 1)]);
}

#[test]
fn what_no_buffer_can_take_is_dropped() {
    let mut rig = Rig::new(8, 12, false);
    rig.buffer(&[200]);
    let fits = frame(12, 3, 188);
    all(&mut rig, &[frame(12, 1, 189), frame(12, 2, 2000), fits.clone()]);
    assert_eq!(rig.counts().rx_dropped_too_long, 2);
    assert_eq!(rig.frames(), [(fits, 1)]);
    // All that this ring can have is too little, so nobody would kick.
    let mut rig = Rig::new(4, 12, true);
    buffers(&mut rig, 4, 100);
    all(&mut rig, &[frame(12, 1, 400), frame(12, 2, 300)]);
    assert_eq!(rig.counts().rx_dropped_too_long, 1);
    assert_eq!(rig.frames(), [(frame(12, 2, 300), 4)]);
}

#[test]
fn bad_chains_are_refused_one_by_one_in_ring_order() {
    let mut rig = Rig::new(16, 12, true);
    rig.buffer(&[11]); // less than a header
    rig.offer(&[(BUFFERS, 100, 0)]); // not to be written
    rig.offer(&[(MEM_SIZE - 10, 100, WRITE)]); // not all of it memory
    rig.buffer(&[300]);
    let sent = frame(12, 1, 60);
    all(&mut rig, &[sent]);
    assert_eq!(rig.used(), [(0, 0), (1, 0), (2, 0), (3, 72)]);
    assert_eq!(rig.counts().rx_bad_chains, 3);
}

/// Chains taken for a frame before a bad one go back empty with it; the frame is whole in the next ones.
#[test]
fn a_bad_chain_in_the_middle_of_a_frame() {
    let mut rig = Rig::new(16, 12, true);
    rig.buffer(&[500]);
    rig.offer(&[(MEM_SIZE, 500, WRITE)]);
    buffers(&mut rig, 3, 500);
    all(&mut rig, &[frame(12, 1, 1000)]);
    assert_eq!(rig.used(), [(0, 0), (1, 0), (2, 500), (3, 500), (4, 12)]);
    assert_eq!((rig.counts().rx_bad_chains, rig.counts().rx_packets), (1, 1));
}

#[test]
fn a_ring_full_of_bad_chains_does_not_take_the_turn() {
    let mut rig = Rig::new(256, 12, true);
    for _ in 0..200 {
        rig.offer(&[(MEM_SIZE, 500, WRITE)]);
    }
    let done = rig.deliver(&[frame(12, 1, 60)], 12, 60);
    assert!(matches!(done.end, Some(End::Budget)), "{done:?}");
    assert_eq!((done.frames, done.used), (0, 8));
}

#[test]
fn a_broken_ring_is_reported_behind_what_was_delivered() {
    let mut rig = Rig::new(8, 12, true);
    rig.buffer(&[300]);
    rig.driver.offer(77);
    let done = rig.deliver(&[frame(12, 1, 60), frame(12, 2, 60)], 12, 60);
    assert!(matches!(done.end, Some(End::Broken(QueueError::BadHead { head: 77, .. }))), "{done:?}");
    assert_eq!((done.frames, done.used), (1, 1));
}

#[test]
fn a_missing_page_parks_before_anything_is_written() {
    let mut rig = Rig::new(16, 12, true);
    let map = rig.lose_pages(BUFFERS + 0x1000);
    rig.buffer_at(&[(BUFFERS, 500)]);
    rig.buffer_at(&[(BUFFERS + 0x800, 100)]);
    rig.buffer_at(&[(BUFFERS + 0x2f00, 500)]);
    let sent = [frame(12, 1, 400), frame(12, 2, 500)];
    let before = contents(&rig.driver.file);
    for page in [0x2000, 0x3000] {
        let done = rig.deliver(if page == 0x2000 { &sent } else { &sent[1..] }, 12, 100);
        let Some(End::Parked(range)) = done.end else { panic!("{:?}", done.end) };
        assert_eq!((range.gpa, rig.queue.in_flight()), (BUFFERS + page, 0));
        map.set_present(BUFFERS + page..BUFFERS + page + 0x1000);
    }
    assert_eq!(contents(&rig.driver.file)[BUFFERS as usize + 0x800..], before[BUFFERS as usize + 0x800..]);
    assert_eq!(rig.deliver(&sent[1..], 12, 100).frames, 1);
    assert_eq!(rig.frames(), [(sent[0].clone(), 1), (sent[1].clone(), 2)]);
}

#[test]
fn every_page_that_changes_is_logged() {
    for lens in [&[2048][..], &[1526], &[100, 900], &[30, 5000]] {
        let mut rig = Rig::new(256, 12, true);
        let log = rig.log_writes();
        (0..60).for_each(|_| assert_ne!(rig.buffer(lens), u16::MAX));
        let before = contents(&rig.driver.file);
        let sent: Vec<_> = (1..20).map(|i| frame(12, i, 100 * i as usize)).collect();
        all(&mut rig, &sent);
        let (after, log) = (contents(&rig.driver.file), contents(&log));
        for page in 0..before.len() / 4096 {
            let same = before[page * 4096..][..4096] == after[page * 4096..][..4096];
            assert!(same || log[page / 8] & 1 << (page % 8) != 0, "{lens:?}: page {page:#x}");
        }
    }
}

#[test]
fn a_descriptor_table_elsewhere_is_none_of_ours() {
    let mut rig = Rig::new(8, 12, true);
    // Indirect, in guest memory, of two pieces.
    rig.driver.descriptor(BUFFERS + 0x8000, 0, (BUFFERS, 40, WRITE | 1, 1));
    rig.driver.descriptor(BUFFERS + 0x8000, 1, (BUFFERS + 0x100, 400, WRITE, 0));
    rig.offer(&[(BUFFERS + 0x8000, 32, crate::virtq::tests::driver::INDIRECT)]);
    let sent = frame(12, 1, 60);
    all(&mut rig, std::slice::from_ref(&sent));
    let got = [rig.bytes(BUFFERS, 40), rig.bytes(BUFFERS + 0x100, 32)].concat();
    assert_eq!(got[12..], sent[12..]);
    assert_ne!(DESC, BUFFERS);
}

#[derive(Clone, Debug)]
enum Step {
    Buffer(Vec<u32>),
    Frame(usize),
    Run,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let piece = prop_oneof![13u32..40, 200u32..2000, Just(4096u32)];
    let step = prop_oneof![
        5 => prop::collection::vec(piece.clone(), 1..5).prop_map(Step::Buffer),
        5 => piece.prop_map(|len| Step::Buffer(vec![len])),
        4 => prop_oneof![14usize..2000, 14usize..20_000].prop_map(Step::Frame),
        2 => Just(Step::Run),
    ];
    prop::collection::vec(step, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// The same buffers and frames, by this path and by that of uplinks: the same used ring and the same bytes.
    #[test]
    fn what_a_guest_sees_is_what_an_uplink_would_have_given_it(
        steps in steps(), cut in prop_oneof![Just(1usize << 20), 40usize..3000], mergeable: bool,
    ) {
        let [mut ours, mut oracle] = [0, 1].map(|_| Rig::new(256, 12, mergeable));
        let (mut waiting, mut seed) = (Vec::new(), 0);
        let (mut got, mut expected) = (Vec::new(), Vec::new());
        let mut outstanding = 0;
        let mut run = |ours: &mut Rig, oracle: &mut Rig, waiting: &mut Vec<Vec<u8>>, outstanding: &mut usize| {
            while !matches!(oracle.receive(), End::NoBuffers | End::Idle) {}
            let done = ours.deliver(waiting, 12, cut);
            waiting.drain(..done.frames);
            let new = ours.frames();
            *outstanding -= new.iter().map(|(_, chains)| chains).sum::<usize>();
            got.extend(new);
            expected.extend(oracle.frames());
            (got.clone(), expected.clone())
        };
        for step in &steps {
            match step {
                // As a driver: no more descriptors than the ring has.
                Step::Buffer(lens) if outstanding < 40 => {
                    prop_assert_eq!(ours.buffer(lens), oracle.buffer(lens));
                    outstanding += 1;
                }
                Step::Frame(len) if waiting.len() < 20 => {
                    seed += 1;
                    let frame = frame(12, seed, *len);
                    waiting.push(frame.clone());
                    oracle.uplink.deliver(frame);
                }
                Step::Run => drop(run(&mut ours, &mut oracle, &mut waiting, &mut outstanding)),
                _ => {}
            }
        }
        for _ in 0..100 {
            while outstanding < 40 {
                ours.buffer(&[4096]);
                oracle.buffer(&[4096]);
                outstanding += 1;
            }
            run(&mut ours, &mut oracle, &mut waiting, &mut outstanding);
        }
        let (got, expected) = run(&mut ours, &mut oracle, &mut waiting, &mut outstanding);
        prop_assert_eq!(waiting.len(), 0);
        prop_assert_eq!(&got, &expected);
        prop_assert_eq!(ours.counts().rx_dropped_too_long, oracle.counts().rx_dropped_too_long);
        prop_assert_eq!(ours.counts().rx_bytes, oracle.counts().rx_bytes);
    }
}

/// Descriptors as no driver would write them: address, length, flags, next.
fn wild() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let addr = prop_oneof![
        6 => BUFFERS..BUFFERS + 0x4000,
        1 => MEM_SIZE - 200..MEM_SIZE + 10,
        1 => Just(u64::MAX - 20),
        1 => Just(TABLE),
    ];
    let len = prop_oneof![3 => 1u32..200, 3 => 1000u32..3000, 1 => Just(0u32), 1 => Just(u32::MAX), 1 => Just(64u32)];
    let flags = prop_oneof![
        8 => Just(WRITE), 4 => Just(WRITE | NEXT), 1 => Just(0), 1 => Just(NEXT), 2 => Just(INDIRECT),
        1 => Just(INDIRECT | NEXT), 1 => Just(INDIRECT | WRITE),
    ];
    (addr, len, flags, 0u16..20)
}

/// Where an indirect table may be.
const TABLE: u64 = BUFFERS + 0x8000;
/// Entries of the ring.
const ENTRIES: u16 = 16;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever is in the ring, bytes change only where a descriptor allows it, and in the used ring.
    #[test]
    fn nothing_is_written_that_was_not_offered(
        direct in prop::collection::vec(wild(), usize::from(ENTRIES)),
        indirect in prop::collection::vec(wild(), 4),
        heads in prop::collection::vec(0u16..ENTRIES + 1, 1..17),
        lens in prop::collection::vec(14usize..5000, 1..20),
        mergeable: bool, cut in 40usize..6000,
    ) {
        let mut rig = Rig::new(ENTRIES, 12, mergeable);
        for (index, raw) in (0..).zip(&direct) {
            rig.driver.descriptor(DESC, index, *raw);
        }
        for (index, raw) in (0..).zip(&indirect) {
            rig.driver.descriptor(TABLE, index, *raw);
        }
        heads.iter().for_each(|head| rig.driver.offer(*head));
        let before = contents(&rig.driver.file);
        let frames: Vec<_> = (0..).zip(&lens).map(|(seed, len)| frame(12, seed, *len)).collect();
        let mut left = &frames[..];
        for _ in 0..20 {
            let done = rig.deliver(left, 12, cut);
            left = &left[done.frames..];
            match done.end {
                None => break,
                Some(End::Budget) => {}
                Some(_) => break,
            }
        }
        rig.receiver.abandon(&mut rig.queue, &rig.counters);
        prop_assert_eq!(rig.queue.in_flight(), 0);
        let after = contents(&rig.driver.file);
        let used = USED as usize..USED as usize + 4 + 8 * usize::from(ENTRIES) + 2;
        let offered = |at: u64| {
            direct.iter().chain(&indirect).any(|(addr, len, flags, _)| {
                flags & WRITE != 0 && at.checked_sub(*addr).is_some_and(|offset| offset < u64::from(*len))
            })
        };
        for (at, (old, new)) in before.iter().zip(&after).enumerate() {
            prop_assert!(old == new || used.contains(&at) || offered(at as u64), "byte {at:#x}");
        }
    }
}
