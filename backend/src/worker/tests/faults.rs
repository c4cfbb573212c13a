//! Rings, memory and uplinks that cannot be used any more: said once, and the rest goes on.
#![forbid(unsafe_code)]

use super::rig::{Rig, count, kick, nonblocking};
use crate::memory::GuestMemory;
use crate::memory::testing::{guest, map, spec};
use crate::uplink::tap::Tap;
use crate::uplink::testing::{FakeUplink, in_namespace, skip};
use crate::worker::Direction::{Receive, Transmit};
use crate::worker::{Command, Event};

#[test]
fn a_broken_ring_is_given_up_and_the_other_goes_on() {
    let mut rig = Rig::running();
    let error = nonblocking();
    rig.done(Command::Error { direction: Transmit, fd: Some(error.clone()) });
    rig.guest_sends(1, 60);
    rig.tx.offer(9999);
    kick(&rig.tx_kick);
    rig.settle();
    assert!(matches!(&rig.events[..], [Event::RingBroken(Transmit, why)] if why.contains("9999")));
    assert_eq!(count(&error), 1);
    assert_eq!((rig.marks(), count(&rig.tx_call)), (vec![1], 1), "what was good is done and told");
    assert_eq!(rig.counters.read().rings_broken, 1);
    assert_eq!(rig.stop(Transmit), 1);
    kick(&rig.tx_kick);
    rig.guest_offers(500);
    rig.uplink_delivers(1, 60);
    rig.settle();
    assert_eq!(rig.rx.used_idx(), 1);
    assert_eq!(rig.events.len(), 1);
}

#[test]
fn an_available_index_that_jumps_breaks_the_receive_ring() {
    let mut rig = Rig::running();
    rig.rx.set_avail_idx(1000);
    rig.uplink_delivers(1, 60);
    rig.settle();
    assert!(matches!(&rig.events[..], [Event::RingBroken(Receive, _)]));
    rig.guest_sends(1, 60);
    kick(&rig.tx_kick);
    rig.settle();
    assert_eq!(rig.marks(), [1]);
}

#[test]
fn rings_that_are_not_in_the_new_memory_are_given_up() {
    let mut rig = Rig::running();
    let errors = [nonblocking(), nonblocking()];
    for (direction, fd) in [Receive, Transmit].into_iter().zip(&errors) {
        rig.done(Command::Error { direction, fd: Some(fd.clone()) });
    }
    let part = GuestMemory::new(vec![map(&rig.rx.file, spec(0, 0x2_0000, 0))]).unwrap();
    rig.done(Command::Memory(part));
    rig.settle();
    assert!(matches!(
        &rig.events[..],
        [Event::RingBroken(Receive, why), Event::RingBroken(Transmit, _)] if why.contains("memory table")
    ));
    assert_eq!((count(&errors[0]), count(&errors[1])), (1, 1));
    rig.guest_sends(1, 60);
    kick(&rig.tx_kick);
    rig.settle();
    assert!(rig.marks().is_empty());
    // In memory that has them they start again.
    let memory = rig.memory.clone();
    rig.done(Command::Memory(memory));
    rig.start(Transmit, true);
    rig.settle();
    assert_eq!(rig.marks(), [1]);
}

#[test]
fn memory_that_is_truncated_fails_the_pair_only() {
    // The ring itself is gone, and only a frame's bytes are.
    for (rest, sends) in [(0x1_0000, true), (0x4_0000, true), (0x4_0000, false)] {
        let mut rig = Rig::running();
        let (bystander, _file) = guest(0x1000);
        if sends {
            rig.guest_sends(1, 60);
        } else {
            rig.guest_offers(500);
        }
        rig.rx.file.set_len(rest).unwrap();
        kick(&rig.tx_kick);
        rig.uplink_delivers(1, 60);
        rig.settle();
        assert!(matches!(&rig.events[..], [Event::MemoryFault]), "{:?}", rig.events);
        assert!(!bystander.poisoned());
        kick(&rig.tx_kick);
        kick(&rig.rx_kick);
        rig.settle();
        assert_eq!(rig.events.len(), 1);
        // The port resets it; the next front-end has good memory.
        rig.done(Command::Reset);
        rig.settle();
        rig.settle_until(|rig| rig.reactor.in_flight() == 0);
    }
}

#[test]
fn an_uplink_that_is_gone_is_said_once_and_does_not_keep_the_loop_busy() {
    let mut rig = Rig::running();
    rig.guest_offers(500);
    rig.uplink.state().dead = true;
    rig.uplink_delivers(1, 60);
    rig.settle();
    assert_eq!(rig.rx.used_idx(), 1, "what was there is delivered");
    rig.guest_offers(500);
    kick(&rig.rx_kick);
    rig.settle();
    rig.uplink_delivers(2, 60);
    rig.settle();
    assert!(matches!(&rig.events[..], [Event::UplinkDown(_)]), "{:?}", rig.events);
    // Transmit goes on as far as the uplink lets it, and a restart looks again.
    rig.guest_sends(1, 60);
    kick(&rig.tx_kick);
    rig.settle();
    assert_eq!(rig.marks(), [1]);
    rig.uplink.state().dead = false;
    rig.rx.config.base = rig.stop(Receive);
    rig.start(Receive, true);
    rig.settle();
    assert_eq!(rig.rx.used_idx(), 2);
}

#[test]
fn a_deleted_tap_does_not_keep_the_loop_busy() {
    in_namespace("worker::tests::faults::a_deleted_tap_does_not_keep_the_loop_busy", || {
        let tap = Tap::open("t0", 1, None).unwrap();
        tap.bring_up().unwrap();
        let queue = Box::new(tap.queues().remove(0));
        let mut rig = Rig::with_uplink(FakeUplink::new(), queue);
        rig.start(Receive, true);
        rig.settle();
        let deleted = std::process::Command::new("ip").args(["link", "delete", "t0"]).status();
        if !deleted.is_ok_and(|status| status.success()) {
            return skip("a deleted tap in a pair", "no ip(8)");
        }
        rig.settle();
        // A poll that begins now fails at once, each time, and no buffer is there to try and read into. `settle`
        // panics if the loop never rests.
        rig.stop(Receive);
        rig.start(Receive, true);
        rig.settle();
        rig.guest_offers(500);
        kick(&rig.rx_kick);
        rig.settle();
        assert!(matches!(&rig.events[..], [Event::UplinkDown(_)]), "{:?}", rig.events);
    });
}
