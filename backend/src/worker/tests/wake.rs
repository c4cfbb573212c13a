//! Wake-ups of an uplink's kernel side, and room that no poll announces.
#![forbid(unsafe_code)]

use super::rig::{Rig, kick};
use crate::uplink::Woken;
use crate::uplink::testing::Refuse;
use crate::worker::{Direction, Event};
use std::time::Duration;

fn send(rig: &mut Rig, mark: u8) {
    rig.guest_sends(mark, 60);
    kick(&rig.tx_kick);
}

#[test]
fn an_uplink_is_woken_after_a_burst_and_as_often_as_it_wants() {
    let mut rig = Rig::running();
    rig.uplink.state().wakes = [Woken::Again, Woken::Again, Woken::Done].into();
    for mark in 0..5 {
        rig.guest_sends(mark, 60);
    }
    kick(&rig.tx_kick);
    rig.settle();
    assert_eq!(rig.uplink.state().woken, 3);
    assert_eq!(rig.marks(), [0, 1, 2, 3, 4]);
}

#[test]
fn a_pause_is_kept_and_no_wake_up_is_sent_meanwhile() {
    let mut rig = Rig::running();
    let long = Duration::from_secs(600);
    rig.uplink.state().wakes =
        [Woken::After(Duration::from_millis(5)), Woken::After(long), Woken::Done].into();
    send(&mut rig, 1);
    rig.settle_until(|rig| rig.uplink.state().woken == 2);
    for mark in 2..10 {
        send(&mut rig, mark);
        rig.settle();
    }
    assert_eq!(rig.uplink.state().woken, 2);
}

#[test]
fn an_uplink_that_is_lost_is_said_once() {
    let mut rig = Rig::running();
    rig.uplink.state().wakes = [Woken::Down(std::io::Error::other("it is gone"))].into();
    send(&mut rig, 1);
    rig.settle_until(|rig| !rig.events.is_empty());
    rig.settle();
    assert!(
        matches!(&rig.events[..], [Event::UplinkDown(why)] if why.contains("it is gone")),
        "{:?}",
        rig.events
    );
}

/// Frames come back when the device is through with them, which nothing announces.
#[test]
fn room_is_looked_for_after_a_wake_up_or_a_pause() {
    for wakes in [vec![], vec![Woken::Done], vec![Woken::After(Duration::from_millis(2)), Woken::Done]] {
        let mut rig = Rig::running();
        rig.uplink.state().cannot_tell_room = true;
        rig.uplink.state().refuse = [Refuse::Full, Refuse::Full, Refuse::Full].into();
        rig.uplink.state().wakes = wakes.into();
        for mark in 0..20 {
            rig.guest_sends(mark, 60);
        }
        kick(&rig.tx_kick);
        rig.settle_until(|rig| rig.uplink.state().sent.len() == 20);
        assert_eq!(rig.marks(), (0..20).collect::<Vec<_>>());
    }
}

/// What came while nobody received is stale; while somebody does, nothing is dropped.
#[test]
fn what_nobody_received_is_not_delivered_later() {
    let mut rig = Rig::new();
    rig.uplink.state().discards = true;
    rig.uplink_delivers(1, 60);
    rig.guest_offers(2048);
    rig.start(Direction::Receive, true);
    rig.settle();
    assert_eq!((rig.uplink.state().discarded, rig.rx.used_idx()), (1, 0));
    rig.uplink_delivers(2, 60);
    rig.settle();
    assert_eq!(rig.rx.used_idx(), 1);
    rig.uplink_delivers(3, 60);
    rig.settle();
    rig.stop(Direction::Receive);
    assert_eq!(rig.uplink.waiting(), 0, "it waited for buffers");
    assert_eq!(rig.counters.read().rx_dropped_stopped, 1);
}
