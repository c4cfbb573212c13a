//! Notifying the driver, and being kicked by it.
#![forbid(unsafe_code)]

use super::rig::{Rig, count, eventfd, kick, nonblocking};
use crate::reactor::Done;
use crate::virtq::tests::driver::Driver;
use crate::worker::Direction::{Receive, Transmit};
use crate::worker::{Command, PairToken, What};
use nix::sys::eventfd::EfdFlags;
use std::sync::Arc;

#[test]
fn one_call_for_a_burst() {
    let mut rig = Rig::running();
    for mark in 0..20 {
        rig.guest_sends(mark, 60);
        rig.guest_offers(500);
        rig.uplink_delivers(mark, 60);
    }
    kick(&rig.tx_kick);
    rig.settle();
    assert_eq!((rig.tx.used_idx(), rig.rx.used_idx()), (20, 20));
    assert_eq!((count(&rig.tx_call), count(&rig.rx_call)), (1, 1));
    assert_eq!(rig.counters.read().calls, 2);
    rig.settle();
    assert_eq!(count(&rig.tx_call), 0);
}

#[test]
fn a_driver_that_wants_no_calls_gets_none() {
    let mut rig = Rig::running();
    rig.tx.set_avail_flags(1);
    rig.guest_sends(1, 60);
    kick(&rig.tx_kick);
    rig.settle();
    assert_eq!((rig.tx.used_idx(), count(&rig.tx_call)), (1, 0));
    rig.tx.set_avail_flags(0);
    rig.guest_sends(2, 60);
    kick(&rig.tx_kick);
    rig.settle();
    assert_eq!(count(&rig.tx_call), 1);
}

#[test]
fn calls_come_when_the_event_is_passed() {
    let mut rig = Rig::new();
    rig.tx.config.event_idx = true;
    rig.start(Transmit, true);
    let send = |rig: &mut Rig, n: u16| {
        for _ in 0..n {
            rig.guest_sends(1, 60);
        }
        kick(&rig.tx_kick);
        rig.settle();
        count(&rig.tx_call)
    };
    assert_eq!(send(&mut rig, 1), 1, "the first always");
    rig.tx.set_used_event(10);
    assert_eq!(send(&mut rig, 5), 0);
    assert_eq!(send(&mut rig, 4), 0);
    assert_eq!(send(&mut rig, 4), 1);
    // The driver is asked to kick at the next chain, and only then.
    assert_eq!(rig.tx.avail_event(), rig.tx.avail_idx());
}

#[test]
fn kicks_are_wanted_exactly_while_nobody_looks() {
    let mut rig = Rig::new();
    rig.start(Transmit, true);
    assert_eq!(rig.tx.used_flags(), 1, "we look anyway");
    rig.settle();
    assert_eq!(rig.tx.used_flags(), 0);
    rig.guest_sends(1, 60);
    rig.uplink.state().refuse.push_back(crate::uplink::testing::Refuse::Full);
    kick(&rig.tx_kick);
    rig.settle();
    assert_eq!(rig.marks(), [1], "sent when the uplink was writable again");
    assert_eq!(rig.tx.used_flags(), 0);
}

/// A call eventfd that its owner has filled: the write would block.
fn full(flags: EfdFlags) -> Arc<std::os::fd::OwnedFd> {
    eventfd(u64::MAX - 1, flags)
}

#[test]
fn a_full_call_eventfd_holds_up_nothing() {
    for flags in [EfdFlags::empty(), EfdFlags::EFD_NONBLOCK] {
        let mut rig = Rig::running();
        let call = full(flags);
        rig.done(Command::Call { direction: Transmit, fd: Some(call.clone()) });
        for mark in 0..10 {
            rig.guest_sends(mark, 60);
            kick(&rig.tx_kick);
            // `turn` measures that it is not held up.
            rig.settle();
            assert_eq!(rig.marks(), [mark]);
        }
        assert!(rig.reactor.in_flight() <= 4, "kicks, uplink, and one call at most");
        // When its owner reads it, the notification that waits gets through.
        assert_eq!(count(&call), u64::MAX - 1);
        if flags.is_empty() {
            // io_uring tries such a write many times, and then gives it to a thread of its own.
            let mut told = 0;
            rig.settle_until(|_| {
                told += count(&call);
                told > 0
            });
            rig.settle();
            told += count(&call);
            assert!((1..=2).contains(&told), "{told}");
        }
        rig.guest_sends(1, 60);
        kick(&rig.tx_kick);
        rig.settle_until(|_| count(&call) == 1);
    }
}

#[test]
fn a_peer_that_keeps_changing_full_eventfds_uses_up_nothing() {
    let mut rig = Rig::running();
    for _ in 0..300 {
        for direction in [Receive, Transmit] {
            rig.done(Command::Call { direction, fd: Some(full(EfdFlags::empty())) });
            rig.done(Command::Error { direction, fd: Some(full(EfdFlags::empty())) });
        }
        rig.turn();
    }
    // Two kicks, the uplink, two calls; cancelling what an io_uring thread has begun takes a moment.
    rig.settle_until(|rig| rig.reactor.in_flight() <= 5);
    // Restarts do not pile up writes either.
    for _ in 0..300 {
        rig.start(Transmit, true);
        rig.tx.config.base = rig.tx.used_idx().into();
        rig.guest_sends(1, 60);
        rig.turn();
    }
    // Two kicks, the uplink, two calls; cancelling what an io_uring thread has begun takes a moment.
    rig.settle_until(|rig| rig.reactor.in_flight() <= 5);
    rig.done(Command::Reset);
    rig.settle_until(|rig| rig.reactor.in_flight() == 0);
}

#[test]
fn a_new_call_eventfd_is_told_at_once() {
    let mut rig = Rig::running();
    rig.done(Command::Call { direction: Transmit, fd: None });
    rig.guest_sends(1, 60);
    kick(&rig.tx_kick);
    rig.settle();
    assert_eq!(rig.tx.used_idx(), 1);
    let call = nonblocking();
    rig.done(Command::Call { direction: Transmit, fd: Some(call.clone()) });
    rig.settle();
    assert_eq!(count(&call), 1, "what was missed meanwhile");
    assert_eq!(count(&rig.tx_call), 0);
}

#[test]
fn a_replaced_kick_wakes_and_the_old_one_does_not() {
    let mut rig = Rig::running();
    let (old, new) = (rig.tx_kick.clone(), nonblocking());
    rig.stop(Transmit);
    rig.tx_kick = new.clone();
    rig.start(Transmit, true);
    rig.settle();
    let kicks = rig.counters.read().kicks;
    rig.guest_sends(1, 60);
    kick(&old);
    rig.settle();
    assert_eq!((rig.marks().len(), rig.counters.read().kicks), (0, kicks));
    kick(&new);
    rig.settle();
    assert_eq!(rig.marks(), [1]);
    assert_eq!(Rig::holders(&old), 1);
}

#[test]
fn a_ring_without_a_kick_is_polled() {
    let mut rig = Rig::new();
    let config = rig.tx.config;
    rig.done(Command::Start { direction: Transmit, config, kick: None, enabled: true });
    for mark in 0..3 {
        rig.guest_sends(mark, 60);
        rig.turn();
        rig.turn();
        assert_eq!(rig.marks(), [mark]);
    }
    assert_eq!(rig.tx.used_flags(), 1, "never asked to kick");
    let uncalled: &Driver = &rig.tx;
    assert_eq!(uncalled.used_idx(), 3);
}

#[test]
fn completions_of_an_earlier_life_mean_nothing() {
    let mut rig = Rig::running();
    rig.guest_sends(1, 60);
    let (kicks, in_flight) = (rig.counters.read().kicks, rig.reactor.in_flight());
    for what in [What::Kick(Transmit), What::Call(Transmit), What::Error(Receive), What::UplinkReadable(0)] {
        for epoch in [0, 77, u32::MAX] {
            let token = PairToken { slot: 0, epoch, what };
            rig.completion(token, &Done::Ready(Ok(1), false));
            rig.completion(token, &Done::Ready(Err(std::io::ErrorKind::Other.into()), false));
            if !matches!(what, What::Error(_)) {
                rig.completion(token, &Done::Signalled(Ok(())));
            }
        }
    }
    rig.completion(PairToken { slot: 99, epoch: 0, what: What::Kick(Transmit) }, &Done::Ready(Ok(1), false));
    rig.settle();
    assert_eq!((rig.counters.read().kicks, rig.reactor.in_flight()), (kicks, in_flight));
    assert!(rig.marks().is_empty());
    assert!(rig.events.is_empty());
}
