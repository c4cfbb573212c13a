//! Pages that have not arrived: the path parks before anything is taken, and loses nothing.
#![forbid(unsafe_code)]

use super::rig::{BUFFERS, Rig, body, frame};
use crate::memory::MissingRange;
use crate::net::tx::End;

fn missing(end: End) -> u64 {
    match end {
        End::Parked(MissingRange { gpa, .. }) => gpa,
        other => panic!("not parked: {other:?}"),
    }
}

#[test]
fn a_missing_buffer_parks_before_the_frame_is_read() {
    let mut rig = Rig::new(8, 12, true);
    let map = rig.lose_pages(BUFFERS + 0x1000);
    rig.buffer_at(&[(BUFFERS, 500)]);
    rig.buffer_at(&[(BUFFERS + 500, 100), (BUFFERS + 0x2f00, 500)]);
    let sent = [frame(12, 1, 400), frame(12, 2, 500)];
    sent.iter().for_each(|frame| rig.uplink.deliver(frame.clone()));
    assert_eq!(missing(rig.receive()), BUFFERS + 0x2000);
    assert_eq!(rig.frames(), [(sent[0].clone(), 1)], "what is done is published");
    assert_eq!((rig.uplink.waiting(), rig.queue.in_flight()), (1, 0));
    map.set_present(BUFFERS + 0x2000..BUFFERS + 0x3000);
    assert_eq!(missing(rig.receive()), BUFFERS + 0x3000);
    map.set_present(BUFFERS + 0x3000..BUFFERS + 0x4000);
    assert!(matches!(rig.receive(), End::NoBuffers));
    assert_eq!(rig.frames(), [(sent[1].clone(), 1)]);
}

#[test]
fn a_missing_page_under_the_rest_of_a_frame_keeps_what_is_placed() {
    let mut rig = Rig::new(16, 12, true);
    let map = rig.lose_pages(BUFFERS + 0x1000);
    rig.buffer_at(&[(BUFFERS, 300)]);
    rig.buffer_at(&[(BUFFERS + 300, 300)]);
    rig.buffer_at(&[(BUFFERS + 600, 100), (BUFFERS + 0x1000, 200)]);
    rig.buffer_at(&[(BUFFERS + 0x5000, 3000)]);
    let sent = frame(12, 1, 2000);
    rig.uplink.deliver(sent.clone());
    assert_eq!(missing(rig.receive()), BUFFERS + 0x1000);
    assert_eq!((rig.driver.used_idx(), rig.uplink.waiting()), (0, 0));
    assert_eq!(rig.queue.base(), 0);
    assert_eq!(missing(rig.receive()), BUFFERS + 0x1000, "asked too early");
    map.set_present(BUFFERS + 0x1000..BUFFERS + 0x1001);
    assert_eq!(missing(rig.receive()), BUFFERS + 0x5000);
    map.set_present(BUFFERS + 0x5000..BUFFERS + 0x6000);
    rig.uplink.deliver(frame(12, 2, 60));
    assert!(matches!(rig.receive(), End::NoBuffers));
    assert_eq!(rig.frames(), [(sent, 4)]);
}

#[test]
fn a_frame_held_over_a_missing_page_can_be_given_up() {
    let mut rig = Rig::new(16, 12, true);
    rig.lose_pages(BUFFERS + 0x1000);
    rig.buffer_at(&[(BUFFERS, 300)]);
    rig.buffer_at(&[(BUFFERS + 0x1000, 300)]);
    rig.uplink.deliver(frame(12, 1, 500));
    missing(rig.receive());
    rig.receiver.abandon(&mut rig.queue, &rig.counters);
    assert_eq!((rig.queue.base(), rig.queue.in_flight()), (0, 0));
}

#[test]
fn transmit_parks_at_the_frame_and_goes_on_there() {
    for (header_at, frame_at) in [(BUFFERS + 0x1000, BUFFERS + 0x80), (BUFFERS + 0x80, BUFFERS + 0x1000)] {
        let mut rig = Rig::new(16, 12, true);
        rig.driver.put(BUFFERS + 0x40, &body(1, 20));
        rig.driver.put(frame_at, &body(2, 60));
        let map = rig.lose_pages(BUFFERS + 0x1000);
        rig.offer(&[(BUFFERS, 12, 0), (BUFFERS + 0x40, 20, 0)]);
        rig.offer(&[(header_at, 12, 0), (frame_at, 60, 0)]);
        rig.offer(&[(BUFFERS, 12, 0), (BUFFERS + 0x40, 20, 0)]);
        assert_eq!(missing(rig.transmit()), BUFFERS + 0x1000);
        assert_eq!(rig.used(), [(0, 0)], "used entries before it are published");
        assert_eq!((rig.queue.base(), rig.uplink.sent().len()), (1, 1));
        assert_eq!(missing(rig.transmit()), BUFFERS + 0x1000);
        map.set_present(BUFFERS..BUFFERS + 0x2000);
        assert!(matches!(rig.transmit(), End::Idle));
        assert_eq!(rig.used(), [(2, 0), (4, 0)]);
        let sent: Vec<_> = rig.uplink.sent().iter().map(|frame| frame[12..].to_vec()).collect();
        assert_eq!(sent, [body(2, 60), body(1, 20)]);
        assert_eq!(rig.counts().tx_packets, 3);
    }
}

#[test]
fn an_indirect_table_that_is_missing_parks() {
    let mut rig = Rig::new(16, 12, true);
    let table = BUFFERS + 0x3000;
    rig.driver.descriptor(table, 0, (BUFFERS, 72, 0, 0));
    let map = rig.lose_pages(BUFFERS + 0x1000);
    rig.offer(&[(table, 16, crate::virtq::tests::driver::INDIRECT)]);
    assert_eq!(missing(rig.transmit()), table);
    map.set_present(table..table + 1);
    assert!(matches!(rig.transmit(), End::Idle));
    assert_eq!(rig.uplink.sent().len(), 1);
}
