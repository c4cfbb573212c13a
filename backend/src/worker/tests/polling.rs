//! Looking at rings without being told to: who is kicked when, and who is looked at.
#![forbid(unsafe_code)]

use super::rig::{Rig, kick};
use crate::config::Poll;
use crate::worker::Command;
use crate::worker::Direction::{Receive, Transmit};
use std::time::{Duration, Instant};

/// Both rings run, and nothing has come yet.
fn running(poll: Poll) -> Rig {
    let mut rig = Rig::polling(poll);
    rig.start(Receive, true);
    rig.start(Transmit, true);
    rig
}

fn auto() -> Poll {
    Poll::Auto(Duration::from_micros(200))
}

/// A driver's way: it kicks if it was asked to.
fn send(rig: &mut Rig, mark: u8) {
    rig.guest_sends(mark, 60);
    if rig.tx.used_flags() == 0 {
        kick(&rig.tx_kick);
    }
}

/// A stream long enough to be polled for. Returns the time then.
fn stream(rig: &mut Rig) -> Instant {
    let mut now = Instant::now();
    for mark in 0..40 {
        send(rig, mark);
        now += Duration::from_micros(5);
        rig.turn_at(now);
    }
    now
}

#[test]
fn a_stream_is_not_kicked_for() {
    let mut rig = running(auto());
    let now = stream(&mut rig);
    assert_eq!(rig.marks().len(), 40);
    let counts = rig.counters.read();
    assert_eq!(rig.tx.used_flags(), 1, "nobody is asked to kick");
    assert!((1..10).contains(&counts.kicks), "until it was seen to be a stream: {counts:?}");
    // Its end: looked at until the window is over, then kicks are asked for.
    assert!(rig.turn_at(now + Duration::from_micros(5)));
    assert!(!rig.turn_at(now + Duration::from_micros(201)));
    assert_eq!(rig.tx.used_flags(), 0);
    rig.guest_sends(99, 60);
    kick(&rig.tx_kick);
    rig.settle();
    assert_eq!(rig.marks(), [99]);
}

#[test]
fn a_single_frame_is_followed_by_sleep() {
    let mut rig = running(auto());
    let now = Instant::now();
    rig.turn_at(now);
    for mark in 0..5 {
        rig.guest_sends(mark, 60);
        kick(&rig.tx_kick);
        rig.settle();
        assert_eq!((rig.marks(), rig.tx.used_flags()), (vec![mark], 0));
    }
}

/// Between the last look and the request for kicks another frame comes: it is found by the look after that.
#[test]
fn what_comes_at_the_last_moment_is_seen() {
    let mut rig = running(auto());
    let now = stream(&mut rig);
    // The look of this very round finds it, though its time would be over.
    rig.guest_sends(77, 60);
    rig.turn_at(now + Duration::from_millis(5));
    assert_eq!(rig.marks().last(), Some(&77));
}

#[test]
fn always_never_asks_for_kicks() {
    let mut rig = running(Poll::Always);
    for mark in 0..3 {
        let mut now = Instant::now();
        for _ in 0..3 {
            now += Duration::from_secs(1);
            assert!(rig.turn_at(now), "it never sleeps");
        }
        rig.guest_sends(mark, 60);
        assert!(rig.turn_at(now));
        assert_eq!(rig.marks(), [mark]);
        assert_eq!((rig.tx.used_flags(), rig.counters.read().kicks), (1, 0));
    }
}

#[test]
fn buffers_are_looked_for_too() {
    let mut rig = running(Poll::Always);
    for mark in 0..3 {
        rig.uplink_delivers(mark, 60);
    }
    rig.settle_until(|rig| rig.uplink.state().receives > 0 || rig.counters.read().bursts == 0);
    for count in 1..=3 {
        rig.guest_offers(500);
        rig.settle_until(|rig| rig.rx.used_idx() == count);
    }
    assert_eq!((rig.rx.used_flags(), rig.counters.read().kicks), (1, 0));
}

#[test]
fn a_ring_that_stops_or_moves_while_it_is_hot_is_left_alone() {
    let mut rig = running(auto());
    let now = stream(&mut rig);
    let base = rig.stop(Transmit);
    assert_eq!(base, 40);
    rig.guest_sends(1, 60);
    rig.turn_at(now + Duration::from_micros(10));
    rig.turn_at(now + Duration::from_millis(10));
    assert_eq!(rig.tx.used_idx(), 40, "nothing is written after the reply");
    rig.tx.config.base = base;
    rig.start(Transmit, true);
    rig.settle();
    assert_eq!(rig.tx.used_idx(), 41);
    // New memory while it is hot.
    stream(&mut rig);
    let memory = rig.memory.clone();
    rig.done(Command::Memory(memory));
    rig.guest_sends(1, 60);
    rig.turn();
    assert_eq!(rig.tx.used_idx(), 82);
    rig.done(Command::Reset);
    rig.settle();
}

/// A ring that turns out to be broken when its kicks are asked for is given up, as ever.
#[test]
fn a_hot_ring_that_breaks_is_given_up() {
    let mut rig = running(auto());
    let now = stream(&mut rig);
    rig.tx.set_avail_idx(5000);
    rig.turn_at(now + Duration::from_micros(10));
    rig.settle();
    assert_eq!(rig.counters.read().rings_broken, 1);
}
