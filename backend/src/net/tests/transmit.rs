//! Transmitting.
#![forbid(unsafe_code)]

use super::rig::{BUFFERS, Rig, body};
use crate::net::header::VirtioNetHdr;
use crate::net::header::{FRAME_LEN_MAX, FRAME_LEN_MIN};
use crate::net::tx::{BURST_BYTES, End};
use crate::uplink::testing::Refuse;
use crate::virtq::tests::driver::{INDIRECT, NEXT, WRITE};
use virtio_bindings::virtio_net as vn;
use zerocopy::IntoBytes;

const FRAME: u64 = BUFFERS + 0x1000;

/// A header and a frame of `len` bytes in guest memory, in one descriptor each.
fn offer(rig: &mut Rig, header: VirtioNetHdr, len: u32) -> u16 {
    rig.driver.put(BUFFERS, header.as_bytes());
    let header_len = rig.tx.header_len as u32;
    rig.offer(&[(BUFFERS, header_len, 0), (FRAME, len, 0)])
}

fn tso() -> VirtioNetHdr {
    VirtioNetHdr {
        flags: vn::VIRTIO_NET_HDR_F_NEEDS_CSUM as u8,
        gso_type: vn::VIRTIO_NET_HDR_GSO_TCPV4 as u8,
        hdr_len: 54.into(),
        gso_size: 1448.into(),
        csum_start: 34.into(),
        csum_offset: 16.into(),
        num_buffers: 0.into(),
    }
}

const OFFLOADS: u64 = 1 << vn::VIRTIO_NET_F_CSUM | 1 << vn::VIRTIO_NET_F_HOST_TSO4;

#[test]
fn header_and_frame_may_lie_anyhow() {
    for header_len in [10u32, 12] {
        let frame = body(1, 1500);
        let split = |parts: &[u32]| {
            let mut rig = Rig::new(64, header_len as usize, true);
            let mut bytes = vec![0; header_len as usize];
            bytes.extend(&frame);
            let (mut at, mut done) = (BUFFERS, 0);
            let mut chain = Vec::new();
            for len in parts {
                rig.driver.put(at, &bytes[done..done + *len as usize]);
                chain.push((at, *len, 0));
                (at, done) = (at + u64::from(*len) + 5, done + *len as usize);
            }
            assert_eq!(done, bytes.len());
            rig.offer(&chain);
            assert!(matches!(rig.transmit(), End::Idle));
            assert_eq!(rig.used(), [(0, 0)]);
            assert!(rig.uplink.sent() == [bytes.clone()], "{parts:?}");
            assert_eq!((rig.counts().tx_packets, rig.counts().tx_bytes), (1, 1500));
        };
        split(&[header_len, 1500]);
        split(&[header_len + 1500]);
        split(&[header_len + 14, 86, 1400]);
        split(&[header_len - 1, 1501]);
        let mut spread = vec![1; header_len as usize];
        spread.extend([1000, 500]);
        split(&spread);
    }
}

#[test]
fn what_goes_out_is_the_checked_copy_of_the_header() {
    let mut rig = Rig::new(16, 12, true);
    rig.tx.features = OFFLOADS;
    rig.driver.put(FRAME, &body(1, 3000));
    let file = rig.driver.file.try_clone().unwrap();
    rig.uplink.state().before_send = Some(Box::new(move || {
        std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 12], BUFFERS).unwrap();
    }));
    offer(&mut rig, VirtioNetHdr { num_buffers: 7.into(), ..tso() }, 3000);
    rig.transmit();
    assert_eq!(rig.bytes(BUFFERS, 12), [0xff; 12], "the guest changed it");
    let sent = rig.uplink.sent();
    assert_eq!(sent[0][..12], *tso().as_bytes(), "and num_buffers means nothing here");
    assert_eq!(sent[0][12..], body(1, 3000));
}

#[test]
fn bad_headers_are_dropped_counted_and_completed() {
    let bad = [
        // CVE-2024-11614
        VirtioNetHdr { csum_start: 2999.into(), csum_offset: 0.into(), ..tso() },
        VirtioNetHdr { csum_start: u16::MAX.into(), csum_offset: u16::MAX.into(), ..tso() },
        VirtioNetHdr { flags: 0, ..tso() },
        VirtioNetHdr { gso_size: 0.into(), ..tso() },
        VirtioNetHdr { gso_type: 2, ..tso() },
        VirtioNetHdr { gso_type: vn::VIRTIO_NET_HDR_GSO_TCPV6 as u8, ..tso() },
        VirtioNetHdr { flags: 0x80, ..Default::default() },
        VirtioNetHdr { hdr_len: 3001.into(), ..Default::default() },
    ];
    for header in bad {
        let mut rig = Rig::new(16, 12, true);
        rig.tx.features = OFFLOADS;
        offer(&mut rig, header, 3000);
        assert!(matches!(rig.transmit(), End::Idle));
        assert_eq!((rig.used().len(), rig.counts().tx_bad_header), (1, 1), "{header:?}");
        offer(&mut rig, tso(), 3000);
        rig.transmit();
        assert_eq!((rig.used().len(), rig.uplink.sent().len()), (1, 1), "the ring goes on");
    }
}

#[test]
fn lengths_have_limits() {
    let mut rig = Rig::new(16, 12, true);
    rig.offer(&[(BUFFERS, 5, 0)]);
    rig.offer(&[(BUFFERS, 12, 0)]);
    rig.offer(&[(BUFFERS, 4096, WRITE)]);
    offer(&mut rig, VirtioNetHdr::default(), FRAME_LEN_MIN as u32 - 1);
    offer(&mut rig, VirtioNetHdr::default(), FRAME_LEN_MIN as u32);
    offer(&mut rig, VirtioNetHdr::default(), FRAME_LEN_MAX as u32);
    offer(&mut rig, VirtioNetHdr::default(), FRAME_LEN_MAX as u32 + 1);
    rig.transmit();
    assert_eq!(rig.used().len(), 7);
    assert_eq!((rig.counts().tx_bad_length, rig.counts().tx_packets), (5, 2));
    let lens: Vec<_> = rig.uplink.sent().iter().map(|frame| frame.len() as u64 - 12).collect();
    assert_eq!(lens, [FRAME_LEN_MIN, FRAME_LEN_MAX]);
}

#[test]
fn a_disabled_ring_discards() {
    let mut rig = Rig::new(16, 12, true);
    rig.tx.enabled = false;
    for _ in 0..3 {
        offer(&mut rig, VirtioNetHdr::default(), 60);
    }
    assert!(matches!(rig.transmit(), End::Idle));
    assert_eq!((rig.used().len(), rig.counts().tx_discarded_disabled), (3, 3));
    assert_eq!((rig.uplink.sent().len(), rig.counts().tx_packets), (0, 0));
}

#[test]
fn a_full_uplink_loses_and_reorders_nothing() {
    let mut rig = Rig::new(16, 12, true);
    for i in 0..4 {
        let at = FRAME + i * 0x100;
        rig.driver.put(at, &body(i, 60));
        rig.offer(&[(BUFFERS, 12, 0), (at, 60, 0)]);
    }
    let mut sent = Vec::new();
    for round in 0..3 {
        rig.uplink.state().refuse.push_back(Refuse::Full);
        assert!(matches!(rig.transmit(), End::UplinkFull));
        assert_eq!(rig.queue.in_flight(), 0);
        assert_eq!(rig.queue.base() as usize, round);
        assert!(matches!(rig.transmit_up_to(1), End::Budget));
        sent.extend(rig.uplink.sent());
    }
    rig.transmit();
    sent.extend(rig.uplink.sent());
    let want: Vec<_> = (0..4).map(|i| body(i, 60)).collect();
    assert_eq!(sent.iter().map(|frame| frame[12..].to_vec()).collect::<Vec<_>>(), want);
    assert_eq!(rig.used(), [(0, 0), (2, 0), (4, 0), (6, 0)]);
    assert_eq!(rig.counts().tx_packets, 4);
}

#[test]
fn frames_the_uplink_does_not_take_are_counted() {
    let mut rig = Rig::new(16, 12, true);
    rig.uplink.state().refuse.extend([Refuse::Down, Refuse::Rejected]);
    for _ in 0..3 {
        offer(&mut rig, VirtioNetHdr::default(), 60);
    }
    assert!(matches!(rig.transmit(), End::Idle));
    let counts = rig.counts();
    assert_eq!((counts.tx_dropped_down, counts.tx_rejected, counts.tx_packets), (1, 1, 1));
    assert_eq!(rig.used().len(), 3);
}

#[test]
fn a_chain_of_many_pieces() {
    // 1024 pieces are a chain; with our header that makes 1024 or 1025 for the kernel, which takes 1024.
    for (first, pass) in [(12, true), (13, false)] {
        let mut rig = Rig::new(16, 12, true);
        let table = 0xc_0000;
        for i in 0..1024 {
            let len = if i == 0 { first } else { 9 };
            let next = if i < 1023 { NEXT } else { 0 };
            rig.driver.descriptor(table, i, (BUFFERS + u64::from(i) * 16, len, next, i + 1));
        }
        rig.offer(&[(table, 1024 * 16, INDIRECT)]);
        rig.transmit();
        assert_eq!(rig.used().len(), 1);
        let counts = rig.counts();
        assert_eq!((counts.tx_packets == 1, counts.tx_bad_chains == 0), (pass, pass));
        assert_eq!(counts.tx_rejected, 0);
    }
}

#[test]
fn buffers_outside_guest_memory_are_dropped() {
    let mut rig = Rig::new(16, 12, true);
    let end = crate::virtq::tests::driver::MEM_SIZE;
    rig.offer(&[(end, 12, 0), (FRAME, 60, 0)]);
    rig.offer(&[(BUFFERS, 12, 0), (end - 59, 60, 0)]);
    rig.offer(&[(BUFFERS, 12, 0), (u64::MAX - 10, 60, 0)]);
    rig.offer(&[(BUFFERS, 12, 0), (FRAME, 0, 0)]);
    assert!(matches!(rig.transmit(), End::Idle));
    assert_eq!((rig.used().len(), rig.counts().tx_bad_chains), (4, 4));
    assert_eq!(rig.uplink.sent().len(), 0);
}

#[test]
fn a_burst_has_a_budget_of_bytes() {
    let mut rig = Rig::new(64, 12, true);
    for _ in 0..20 {
        offer(&mut rig, VirtioNetHdr::default(), 65_000);
    }
    assert!(matches!(rig.transmit(), End::Budget));
    assert_eq!(rig.uplink.sent().len() as u64, BURST_BYTES.div_ceil(65_000));
    while !matches!(rig.transmit(), End::Idle) {}
    assert_eq!(rig.used().len(), 20);
}
