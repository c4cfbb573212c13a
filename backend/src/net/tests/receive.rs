//! Receiving, with a well-behaved driver.
#![forbid(unsafe_code)]

use super::rig::{BUFFERS, Rig, frame};
use crate::net::tx::{BURST_BYTES, End};

#[test]
fn a_frame_in_one_chain() {
    for (header_len, mergeable) in [(10, false), (12, false), (12, true)] {
        let mut rig = Rig::new(8, header_len, mergeable);
        rig.buffer(&[2048]);
        let sent = frame(header_len, 1, 100);
        rig.uplink.deliver(sent.clone());
        assert!(matches!(rig.receive(), End::NoBuffers));
        assert_eq!(rig.frames(), [(sent, 1)]);
        let counts = rig.counts();
        assert_eq!((counts.rx_packets, counts.rx_bytes), (1, 100));
    }
}

#[test]
fn num_buffers_is_written_only_where_there_is_one() {
    let mut rig = Rig::new(8, 10, false);
    rig.buffer_at(&[(BUFFERS, 2048)]);
    let mut sent = frame(10, 1, 60);
    sent[10..12].copy_from_slice(&[0xaa, 0xbb]);
    rig.uplink.deliver(sent.clone());
    rig.receive();
    assert_eq!(rig.bytes(BUFFERS, 70), sent);
    // Without mergeable buffers it is 1 (VIRTIO 1.3 §5.1.6.4.1), whatever the uplink left there.
    let mut rig = Rig::new(8, 12, false);
    rig.buffer_at(&[(BUFFERS, 2048)]);
    let mut sent = frame(12, 1, 60);
    sent[10..12].copy_from_slice(&[0xaa, 0xbb]);
    rig.uplink.deliver(sent);
    rig.receive();
    assert_eq!(rig.bytes(BUFFERS + 10, 2), [1, 0]);
}

#[test]
fn a_frame_over_several_chains() {
    let mut rig = Rig::new(64, 12, true);
    for _ in 0..5 {
        rig.buffer(&[100, 60, 96]);
    }
    let sent = frame(12, 3, 1000);
    rig.uplink.deliver(sent.clone());
    assert!(matches!(rig.receive(), End::Idle));
    let mut shadow = rig.used();
    assert_eq!(shadow.iter().map(|(_, len)| len).sum::<u32>(), 1012);
    assert_eq!(shadow.pop().map(|(_, len)| len), Some(1012 - 3 * 256));
    assert_eq!(shadow, [(0, 256), (3, 256), (6, 256)]);
    // The one left over is used by the next frame.
    let next = frame(12, 4, 60);
    rig.uplink.deliver(next.clone());
    rig.receive();
    assert_eq!(rig.frames(), [(next, 1)]);
}

#[test]
fn the_first_large_frame_after_small_ones_is_whole() {
    let mut rig = Rig::new(256, 12, true);
    let mut sent = vec![frame(12, 0, 60), frame(12, 1, 60)];
    sent.extend((2..6).map(|seed| frame(12, seed, 65_549)));
    sent.push(frame(12, 6, 60));
    let mut got = Vec::new();
    for one in &sent {
        while rig.driver.avail_idx().wrapping_sub(rig.driver.used_idx()) < 60 {
            rig.buffer(&[1526]);
        }
        rig.uplink.deliver(one.clone());
        assert!(matches!(rig.receive(), End::Idle));
        got.extend(rig.frames());
    }
    for (i, ((got, chains), sent)) in got.iter().zip(&sent).enumerate() {
        assert!(got == sent, "frame {i}");
        assert_eq!(*chains, sent.len().div_ceil(1526));
    }
    assert_eq!(got.len(), sent.len());
}

#[test]
fn exactly_full_buffers() {
    for frame_len in [243, 244, 245, 500, 501] {
        let mut rig = Rig::new(8, 12, true);
        for _ in 0..4 {
            rig.buffer(&[256]);
        }
        for seed in 0..2 {
            let sent = frame(12, seed, if seed == 0 { 244 } else { frame_len });
            rig.uplink.deliver(sent.clone());
            rig.receive();
            assert_eq!(rig.frames(), [(sent.clone(), sent.len().div_ceil(256))]);
        }
    }
}

#[test]
fn large_frames_in_one_large_buffer() {
    let mut rig = Rig::new(8, 12, false);
    for seed in 0..20 {
        rig.buffer(&[65_562, 100]);
        let sent = frame(12, seed, 65_550);
        rig.uplink.deliver(sent.clone());
        rig.receive();
        assert!(rig.frames() == [(sent, 1)]);
    }
}

#[test]
fn a_frame_with_too_few_buffers_is_held_and_finished() {
    let mut rig = Rig::new(64, 12, true);
    rig.buffer(&[300]);
    rig.buffer(&[300]);
    let sent: Vec<_> = (0..3).map(|seed| frame(12, seed, 2000 - seed as usize * 900)).collect();
    sent.iter().for_each(|frame| rig.uplink.deliver(frame.clone()));
    assert!(matches!(rig.receive(), End::NoBuffers));
    assert_eq!(rig.used(), [], "a part of a frame is nothing");
    assert_eq!(rig.queue.base(), 0);
    assert!(matches!(rig.receive(), End::NoBuffers), "still nothing");
    assert_eq!(rig.uplink.waiting(), 2);
    for _ in 0..3 {
        rig.buffer(&[300]);
        assert!(matches!(rig.receive(), End::NoBuffers));
        assert_eq!(rig.driver.used_idx(), 0);
    }
    for _ in 0..8 {
        rig.buffer(&[300]);
        rig.receive();
    }
    let got: Vec<_> = rig.frames().into_iter().map(|(frame, _)| frame).collect();
    assert!(got == sent);
    assert_eq!(rig.counts().rx_packets, 3);
}

#[test]
fn a_held_frame_is_given_up_when_the_ring_stops() {
    let mut rig = Rig::new(64, 12, true);
    rig.buffer(&[300]);
    let small = frame(12, 1, 60);
    rig.uplink.deliver(small.clone());
    rig.receive();
    rig.buffer(&[300]);
    rig.buffer(&[300]);
    rig.uplink.deliver(frame(12, 2, 2000));
    assert!(matches!(rig.receive(), End::NoBuffers));
    assert_eq!(rig.queue.in_flight(), 2);
    rig.receiver.abandon(&mut rig.queue, &rig.counters);
    assert_eq!((rig.queue.base(), rig.queue.in_flight()), (1, 0));
    assert_eq!(rig.counts().rx_dropped_stopped, 1);
    assert_eq!(rig.frames(), [(small, 1)]);
    rig.receiver.abandon(&mut rig.queue, &rig.counters);
    assert_eq!(rig.counts().rx_dropped_stopped, 1);
    // A ring that begins where this one ended has both buffers.
    let next = frame(12, 3, 400);
    rig.uplink.deliver(next.clone());
    rig.receive();
    assert_eq!(rig.frames(), [(next, 2)]);
}

#[test]
fn the_header_may_be_spread_over_descriptors() {
    for lens in [&[1; 12][..], &[11, 1], &[10, 1, 1], &[5, 6, 1], &[12], &[13]] {
        let mut rig = Rig::new(32, 12, true);
        let lens: Vec<u32> = lens.iter().copied().chain([200]).collect();
        rig.buffer(&lens);
        rig.buffer(&[300]);
        let sent = frame(12, 1, 400);
        rig.uplink.deliver(sent.clone());
        rig.receive();
        assert_eq!(rig.frames(), [(sent, 2)], "{lens:?}");
    }
}

#[test]
fn no_buffers_means_no_frame_is_taken() {
    let mut rig = Rig::new(8, 12, true);
    rig.uplink.deliver(frame(12, 1, 60));
    assert!(matches!(rig.receive(), End::NoBuffers));
    assert_eq!(rig.uplink.waiting(), 1);
    assert_eq!(rig.uplink.state().receives, 0);
}

#[test]
fn a_burst_has_a_budget_of_frames_and_bytes() {
    let mut rig = Rig::new(128, 12, true);
    for seed in 0..10 {
        rig.buffer(&[300]);
        rig.uplink.deliver(frame(12, seed, 60));
    }
    assert!(matches!(rig.receive_up_to(4), End::Budget));
    assert_eq!((rig.driver.used_idx(), rig.uplink.waiting()), (4, 6));
    assert!(matches!(rig.receive_up_to(7), End::NoBuffers | End::Idle));
    assert_eq!(rig.driver.used_idx(), 10);

    let mut rig = Rig::new(64, 12, true);
    let large = 65_000;
    for seed in 0..30 {
        rig.buffer(&[large as u32 + 12]);
        rig.uplink.deliver(frame(12, seed, large));
    }
    assert!(matches!(rig.receive(), End::Budget));
    assert_eq!(u64::from(rig.driver.used_idx()), BURST_BYTES.div_ceil(large as u64));
}

/// A buffer that any frame of the uplink's MTU fits into is offered alone. If somebody raises the MTU, the first longer
/// frame is lost (nobody knows how long it was), and from then on all are whole.
#[test]
fn a_raised_mtu_costs_one_frame() {
    let mut rig = Rig::new(8, 12, true);
    rig.uplink.state().mtu = Some(1500);
    for _ in 0..6 {
        rig.buffer(&[2048]);
    }
    let longest = frame(12, 1, 1522);
    let longer = frame(12, 2, 2100);
    rig.uplink.deliver(longest.clone());
    rig.uplink.deliver(longer.clone());
    rig.uplink.deliver(longer.clone());
    rig.uplink.deliver(longest.clone());
    rig.receive();
    assert_eq!(rig.frames(), [(longest.clone(), 1), (longer, 2), (longest, 1)]);
    assert_eq!(rig.counts().rx_dropped_too_long, 1);
}
