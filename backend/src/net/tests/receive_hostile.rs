//! Receiving, with drivers that do what they should not. The frame goes elsewhere or waits; the ring goes on.
#![forbid(unsafe_code)]

use super::rig::{BUFFERS, Rig, frame};
use crate::net::tx::End;
use crate::virtq::tests::driver::{DESC, INDIRECT, MEM_SIZE, WRITE};

#[test]
fn without_mergeable_buffers_a_frame_that_is_too_long_is_dropped() {
    let mut rig = Rig::new(8, 12, false);
    let head = rig.buffer(&[200]);
    rig.uplink.deliver(frame(12, 1, 189));
    rig.uplink.deliver(frame(12, 2, 2000));
    let fits = frame(12, 3, 188);
    rig.uplink.deliver(fits.clone());
    rig.receive();
    assert_eq!(rig.counts().rx_dropped_too_long, 2);
    let got = rig.frames();
    assert_eq!(got, [(fits, 1)], "the chain {head} is used again");
}

#[test]
fn a_chain_shorter_than_the_header_is_refused() {
    for header_len in [10, 12] {
        let mut rig = Rig::new(8, header_len, header_len == 12);
        rig.buffer(&[header_len as u32 - 1]);
        rig.offer(&[(BUFFERS, 100, 0)]);
        rig.buffer(&[header_len as u32, 100]);
        rig.uplink.deliver(frame(header_len, 1, 60));
        rig.receive();
        assert_eq!(rig.used(), [(0, 0), (1, 0), (2, header_len as u32 + 60)]);
        assert_eq!(rig.counts().rx_bad_chains, 2);
    }
}

#[test]
fn refused_chains_are_given_back_when_no_frame_waits() {
    let mut rig = Rig::new(8, 12, true);
    rig.buffer(&[5]);
    rig.buffer(&[300]);
    assert!(matches!(rig.receive(), End::Idle));
    assert_eq!(rig.used(), [(0, 0)]);
    assert_eq!(rig.queue.base(), 1);
}

#[test]
fn a_bad_chain_in_the_middle_of_a_gather() {
    let mut rig = Rig::new(16, 12, true);
    rig.buffer(&[3000]);
    rig.uplink.deliver(frame(12, 0, 2000));
    rig.receive();
    assert_eq!(rig.frames().len(), 1);
    // Now 2012 bytes are expected, and the second of four chains is no guest memory.
    rig.buffer(&[500]);
    rig.buffer_at(&[(MEM_SIZE, 500)]);
    rig.buffer(&[500]);
    rig.buffer(&[2000]);
    let sent = frame(12, 1, 2000);
    rig.uplink.deliver(sent.clone());
    assert!(matches!(rig.receive(), End::NoBuffers | End::Idle));
    assert_eq!(rig.used(), [(1, 500), (2, 0), (3, 500), (4, 1012)]);
    assert_eq!(rig.counts().rx_bad_chains, 1);
    assert_eq!(rig.counts().rx_packets, 2);
}

#[test]
fn a_malformed_chain_in_the_middle_of_a_gather() {
    let mut rig = Rig::new(16, 12, true);
    rig.buffer(&[3000]);
    rig.uplink.deliver(frame(12, 0, 2000));
    rig.receive();
    assert_eq!(rig.frames().len(), 1);
    rig.buffer(&[500]);
    rig.buffer(&[0]);
    rig.buffer(&[2000]);
    let sent = frame(12, 1, 2000);
    rig.uplink.deliver(sent.clone());
    rig.receive();
    assert_eq!(rig.frames(), [(sent, 3)]);
    assert_eq!(rig.counts().rx_bad_chains, 1);
    // Alone and first it is given back at once.
    rig.buffer(&[0]);
    rig.buffer(&[100]);
    rig.uplink.deliver(frame(12, 2, 60));
    rig.receive();
    let used: Vec<_> = rig.used().into_iter().map(|(_, len)| len).collect();
    assert_eq!(used, [0, 72]);
}

#[test]
fn buffers_outside_guest_memory_are_refused_one_by_one() {
    let mut rig = Rig::new(16, 12, true);
    for _ in 0..5 {
        rig.buffer_at(&[(BUFFERS, 1000), (MEM_SIZE - 100, 101)]);
    }
    assert!(matches!(rig.receive(), End::NoBuffers));
    assert_eq!(rig.used().len(), 5);
    rig.buffer(&[1000]);
    let sent = frame(12, 1, 900);
    rig.uplink.deliver(sent.clone());
    rig.receive();
    assert_eq!(rig.frames(), [(sent, 1)]);
    assert_eq!(rig.counts().rx_bad_chains, 5);
}

/// An indirect chain of `count` pieces of `len` bytes each.
fn indirect(rig: &mut Rig, table: u64, count: u16, len: u32) {
    for i in 0..count {
        let flags = if i + 1 < count { WRITE | 1 } else { WRITE };
        rig.driver.descriptor(table, i, (BUFFERS + u64::from(i) * u64::from(len), len, flags, i + 1));
    }
    rig.offer(&[(table, u32::from(count) * 16, INDIRECT)]);
}

#[test]
fn a_chain_of_more_pieces_than_a_call_takes_is_refused() {
    let mut rig = Rig::new(16, 12, true);
    indirect(&mut rig, 0xc_0000, 1024, 64);
    indirect(&mut rig, 0xd_0000, 1023, 64);
    let sent = frame(12, 1, 65_000);
    rig.uplink.deliver(sent.clone());
    assert!(matches!(rig.receive(), End::NoBuffers), "the uplink is not to blame");
    assert_eq!(rig.used(), [(0, 0), (1, 65_012)]);
    assert_eq!(rig.bytes(BUFFERS + 12, 65_000), sent[12..]);
}

#[test]
fn several_chains_of_many_pieces_are_offered_as_far_as_a_call_takes_them() {
    let mut rig = Rig::new(16, 12, true);
    rig.buffer(&[66_000]);
    rig.uplink.deliver(frame(12, 0, 65_000));
    rig.receive();
    assert_eq!(rig.frames().len(), 1);
    for table in 0..4 {
        indirect(&mut rig, 0xc_0000 + table * 0x4000, 400, 50);
    }
    rig.uplink.deliver(frame(12, 1, 65_000));
    rig.buffer(&[10_000]);
    rig.receive();
    let used: Vec<_> = rig.used().into_iter().map(|(_, len)| len).collect();
    assert_eq!(used, [20_000, 20_000, 20_000, 5012]);
}

#[test]
fn a_frame_that_no_ring_of_this_size_takes_is_dropped() {
    let mut rig = Rig::new(4, 12, true);
    for _ in 0..4 {
        rig.buffer(&[100]);
    }
    rig.uplink.deliver(frame(12, 1, 5000));
    let next = frame(12, 2, 350);
    rig.uplink.deliver(next.clone());
    rig.receive();
    assert_eq!(rig.counts().rx_dropped_too_long, 1);
    assert_eq!(rig.frames(), [(next, 4)]);
}

#[test]
fn a_ring_full_of_bad_chains_ends_the_burst_in_time() {
    let mut rig = Rig::new(256, 12, true);
    for _ in 0..200 {
        rig.buffer(&[1]);
    }
    rig.uplink.deliver(frame(12, 1, 60));
    assert!(matches!(rig.receive_up_to(64), End::Budget));
    assert_eq!(rig.driver.used_idx(), 64);
    for _ in 0..4 {
        rig.receive_up_to(64);
    }
    assert_eq!(rig.driver.used_idx(), 200);
}

#[test]
fn a_broken_ring_is_told_after_what_was_done() {
    let mut rig = Rig::new(8, 12, true);
    rig.buffer(&[100]);
    rig.driver.offer(9);
    rig.uplink.deliver(frame(12, 1, 60));
    rig.uplink.deliver(frame(12, 2, 60));
    assert!(matches!(rig.receive(), End::Broken(_)));
    assert_eq!(rig.frames().len(), 1);
}

#[test]
fn a_chain_that_is_offered_twice_hurts_only_its_guest() {
    let mut rig = Rig::new(8, 12, true);
    rig.buffer_at(&[(BUFFERS, 100)]);
    rig.driver.offer(0);
    rig.driver.descriptor(DESC, 1, (BUFFERS, 100, WRITE, 0));
    rig.driver.offer(1);
    rig.uplink.deliver(frame(12, 1, 250));
    rig.receive();
    assert_eq!(rig.used().len(), 3);
}
