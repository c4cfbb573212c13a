//! Starting, stopping, enabling; memory that comes, goes and moves.
#![forbid(unsafe_code)]

use super::rig::{BUFFERS, Rig, kick, nonblocking};
use crate::memory::testing::{USER_BASE, contents, map, memfd, spec};
use crate::memory::{DirtyLog, GuestMemory};
use crate::virtq::tests::driver::MEM_SIZE;
use crate::worker::Direction::{Receive, Transmit};
use crate::worker::{Command, Reply};
use std::sync::Arc;

/// vhost #343, #375: the kick may come while nobody listens, or not at all.
#[test]
fn work_that_was_there_before_the_start_is_done_without_a_kick() {
    let mut rig = Rig::new();
    rig.guest_sends(1, 60);
    rig.guest_offers(500);
    kick(&rig.tx_kick);
    rig.uplink_delivers(9, 100);
    rig.start(Transmit, true);
    rig.start(Receive, true);
    rig.settle();
    assert_eq!(rig.marks(), [1]);
    assert_eq!(rig.rx.used_idx(), 1);
    // The same after a restart, where no new kick comes.
    assert_eq!((rig.stop(Transmit), rig.stop(Receive)), (1, 1));
    rig.guest_sends(2, 60);
    rig.guest_offers(500);
    rig.uplink_delivers(9, 100);
    rig.tx.config.base = 1;
    rig.rx.config.base = 1;
    rig.start(Transmit, true);
    rig.start(Receive, true);
    rig.settle();
    assert_eq!(rig.marks(), [2]);
    assert_eq!(rig.rx.used_idx(), 2);
}

#[test]
fn a_kick_wakes_a_ring_that_ran_dry() {
    let mut rig = Rig::running();
    for mark in 0..5 {
        rig.guest_sends(mark, 60);
        kick(&rig.tx_kick);
        rig.settle();
        assert_eq!(rig.marks(), [mark]);
    }
    rig.uplink_delivers(7, 60);
    rig.settle();
    assert_eq!(rig.rx.used_idx(), 0, "no buffers");
    rig.guest_offers(500);
    kick(&rig.rx_kick);
    rig.settle();
    assert_eq!(rig.rx.used_idx(), 1);
    assert!(rig.counters.read().kicks >= 6);
}

/// vhost-user: Ring states.
#[test]
fn a_disabled_ring_discards_and_does_not_receive() {
    let mut rig = Rig::new();
    rig.start(Transmit, false);
    rig.start(Receive, false);
    rig.guest_sends(1, 60);
    rig.guest_offers(500);
    rig.uplink_delivers(9, 60);
    kick(&rig.tx_kick);
    kick(&rig.rx_kick);
    rig.settle();
    assert_eq!((rig.marks().len(), rig.tx.used_idx()), (0, 1), "discarded");
    assert_eq!((rig.rx.used_idx(), rig.uplink.waiting()), (0, 1));
    rig.enable(Receive, true);
    rig.enable(Transmit, true);
    rig.guest_sends(2, 60);
    kick(&rig.tx_kick);
    rig.settle();
    assert_eq!(rig.marks(), [2]);
    assert_eq!(rig.rx.used_idx(), 1);
    rig.enable(Receive, false);
    rig.guest_offers(500);
    rig.uplink_delivers(8, 60);
    rig.settle();
    assert_eq!(rig.rx.used_idx(), 1);
    rig.enable(Receive, true);
    rig.enable(Receive, true);
    rig.settle();
    assert_eq!(rig.rx.used_idx(), 2);
    assert_eq!(rig.counters.read().tx_discarded_disabled, 1);
}

#[test]
fn an_early_enable_is_not_an_error() {
    let mut rig = Rig::new();
    rig.enable(Receive, true);
    rig.enable(Transmit, true);
    rig.enable(Transmit, false);
    rig.settle();
    rig.start(Receive, true);
    rig.guest_offers(500);
    rig.uplink_delivers(1, 60);
    rig.settle();
    assert_eq!(rig.rx.used_idx(), 1);
}

#[test]
fn a_stop_answers_the_first_chain_that_was_not_done() {
    let mut rig = Rig::running();
    assert_eq!((rig.stop(Receive), rig.stop(Transmit)), (0, 0));
    let mut rig = Rig::running();
    for _ in 0..3 {
        rig.guest_offers(100);
    }
    rig.uplink_delivers(1, 60);
    rig.uplink_delivers(2, 1000);
    rig.settle();
    assert_eq!(rig.stop(Receive), 1, "the second is in part on two more");
    assert_eq!(rig.stop(Receive), 1, "and again");
    assert_eq!(rig.counters.read().rx_dropped_stopped, 1);
    rig.guest_sends(1, 60);
    rig.settle();
    assert_eq!(rig.stop(Transmit), 0, "not kicked, not done");
}

#[test]
fn nothing_is_written_after_a_stop() {
    let mut rig = Rig::running();
    rig.guest_offers(500);
    rig.guest_sends(1, 60);
    kick(&rig.tx_kick);
    rig.uplink_delivers(1, 60);
    rig.stop(Receive);
    rig.stop(Transmit);
    let before = contents(&rig.rx.file);
    kick(&rig.rx_kick);
    rig.settle();
    assert!(before == contents(&rig.rx.file));
    assert!(rig.marks().is_empty());
}

#[test]
fn running_rings_go_on_in_new_memory() {
    let mut rig = Rig::running();
    rig.guest_sends(1, 60);
    let again = GuestMemory::new(vec![map(&rig.rx.file, spec(0, MEM_SIZE, 0))]).unwrap();
    rig.done(Command::Memory(again));
    rig.settle();
    assert_eq!(rig.marks(), [1], "looked at, kicked or not");
    rig.guest_sends(2, 60);
    rig.guest_offers(500);
    rig.uplink_delivers(1, 60);
    kick(&rig.tx_kick);
    rig.settle();
    assert_eq!(rig.marks(), [2]);
    assert_eq!((rig.rx.used_idx(), rig.tx.used_idx()), (1, 2));
    assert!(rig.events.is_empty());
}

#[test]
fn a_frame_that_waits_for_buffers_survives_new_memory() {
    let mut rig = Rig::running();
    rig.guest_offers(500);
    rig.uplink_delivers(5, 1000);
    rig.settle();
    let again = GuestMemory::new(vec![map(&rig.rx.file, spec(0, MEM_SIZE, 0))]).unwrap();
    rig.done(Command::Memory(again));
    rig.guest_offers(600);
    kick(&rig.rx_kick);
    rig.settle();
    assert_eq!((rig.rx.used(0), rig.rx.used(1)), ((0, 500), (1, 512)));
}

#[test]
fn a_frame_that_waits_for_buffers_needs_no_other_frame_to_go_on() {
    let mut rig = Rig::running();
    rig.guest_offers(500);
    rig.uplink_delivers(5, 1000);
    rig.settle();
    rig.enable(Receive, false);
    rig.guest_offers(600);
    kick(&rig.rx_kick);
    rig.settle();
    assert_eq!(rig.rx.used_idx(), 0, "disabled");
    rig.enable(Receive, true);
    rig.settle();
    assert_eq!((rig.rx.used(0), rig.rx.used(1)), ((0, 500), (1, 512)));
}

#[test]
fn an_updated_ring_goes_on_where_it_is() {
    let mut rig = Rig::running();
    rig.guest_sends(1, 60);
    kick(&rig.tx_kick);
    rig.guest_offers(100);
    rig.uplink_delivers(5, 1000);
    rig.settle();
    let (rx, tx) = (rig.rx.config, rig.tx.config);
    rig.done(Command::Update { direction: Receive, config: rx });
    rig.done(Command::Update { direction: Transmit, config: tx });
    rig.guest_sends(2, 60);
    rig.settle();
    assert_eq!(rig.marks(), [1, 2]);
    assert_eq!((rig.stop(Transmit), rig.stop(Receive)), (2, 0));
    assert!(matches!(rig.command(Command::Update { direction: Transmit, config: tx }), Reply::Done));
}

#[test]
fn a_ring_outside_memory_does_not_start() {
    let mut rig = Rig::new();
    let mut config = rig.tx.config;
    config.used_user += MEM_SIZE;
    let reply =
        rig.command(Command::Start { direction: Transmit, config, kick: Some(nonblocking()), enabled: true });
    assert!(matches!(reply, Reply::Failed(why) if why.contains("Used")));
    assert_eq!(rig.stop(Transmit), 0);
}

#[test]
fn a_parked_ring_goes_on_when_memory_has_arrived() {
    let mut rig = Rig::running();
    let present = BUFFERS + 0x1000;
    let arrived = rig.lose_pages(present);
    rig.guest_sends(1, 60);
    rig.guest_sends(2, 60);
    rig.guest_sends(3, 60);
    rig.guest_offers(500);
    rig.uplink_delivers(9, 60);
    kick(&rig.tx_kick);
    rig.settle();
    assert_eq!(rig.marks(), [1, 2]);
    assert_eq!((rig.tx.used_idx(), rig.rx.used_idx(), rig.uplink.waiting()), (2, 0, 1));
    assert_eq!(rig.counters.read().parks, 2);
    // Kicks do not help, and do not keep the loop busy.
    kick(&rig.tx_kick);
    kick(&rig.rx_kick);
    rig.settle();
    assert_eq!(rig.counters.read().parks, 2);
    rig.arrived();
    rig.settle();
    assert_eq!(rig.counters.read().parks, 4, "something else had arrived");
    arrived.set_present(0..MEM_SIZE);
    rig.arrived();
    rig.settle();
    assert_eq!(rig.marks(), [3]);
    assert_eq!((rig.tx.used_idx(), rig.rx.used_idx()), (3, 1));
    assert_eq!(rig.counters.read().parks, 4);
}

#[test]
fn a_parked_ring_stops_at_once() {
    let mut rig = Rig::running();
    rig.lose_pages(BUFFERS);
    rig.guest_sends(1, 60);
    kick(&rig.tx_kick);
    rig.settle();
    assert_eq!(rig.stop(Transmit), 0);
    rig.arrived();
    rig.settle();
    assert!(rig.marks().is_empty());
}

#[test]
fn a_reset_forgets_the_front_end() {
    let mut rig = Rig::running();
    let (memory, call, kick_fd) = (rig.memory.clone(), rig.tx_call.clone(), rig.tx_kick.clone());
    rig.done(Command::Reset);
    rig.settle();
    assert_eq!(rig.stop(Transmit), 0);
    assert_eq!(Rig::holders(&call), 2, "ours and the rig's");
    assert_eq!(Rig::holders(&kick_fd), 2);
    assert_eq!(rig.reactor.in_flight(), 0);
    // And the next one begins as the first did.
    rig.done(Command::Features(super::rig::FEATURES));
    rig.done(Command::Memory(memory));
    rig.start(Transmit, true);
    rig.guest_sends(1, 60);
    rig.settle();
    assert_eq!(rig.marks(), [1]);
    assert_eq!(super::rig::count(&call), 0, "its call is forgotten");
}

#[test]
fn many_lives_leave_nothing_behind() {
    let mut rig = Rig::new();
    rig.settle();
    for life in 0..500 {
        for direction in [Receive, Transmit] {
            rig.start(direction, life % 3 != 0);
        }
        if life % 2 == 0 {
            rig.turn();
        }
        if life % 5 == 0 {
            rig.done(Command::Call { direction: Transmit, fd: Some(nonblocking()) });
            rig.enable(Receive, life % 10 == 0);
        }
        rig.stop(Receive);
        rig.stop(Transmit);
    }
    rig.settle();
    rig.settle_until(|rig| rig.reactor.in_flight() == 0);
    assert_eq!(Rig::holders(&rig.rx_kick), 1);
}

/// The source of a precopy migration: the log comes while the rings run, and finds all that they write.
#[test]
fn what_is_written_is_logged_from_the_moment_the_log_is_there() {
    let mut rig = Rig::running();
    rig.guest_offers(100);
    rig.uplink_delivers(5, 1000);
    rig.settle();
    let log_file = memfd(0x1000);
    let log = DirtyLog::new(log_file.try_clone().unwrap().into(), 0x1000, 0).unwrap();
    let memory = rig.memory.with_log(Some(Arc::new(log)));
    rig.done(Command::Memory(memory));
    for direction in [Receive, Transmit] {
        let mut config = if direction == Receive { rig.rx.config } else { rig.tx.config };
        config.log_used = Some(config.used_user - USER_BASE);
        // The frame that waits for buffers is given up; its page was written before there was a log.
        rig.done(Command::Update { direction, config });
    }
    for mark in 0..10 {
        rig.guest_offers(500);
        rig.guest_sends(mark, 60);
    }
    let before = contents(&rig.rx.file);
    for mark in 0..5 {
        rig.uplink_delivers(mark, 700);
    }
    kick(&rig.tx_kick);
    kick(&rig.rx_kick);
    rig.settle();
    assert!(rig.rx.used_idx() >= 8 && rig.tx.used_idx() == 10);
    let (after, log) = (contents(&rig.rx.file), contents(&log_file));
    let pages = before.chunks(4096).zip(after.chunks(4096)).enumerate();
    let changed: Vec<_> = pages.filter(|(_, (a, b))| a != b).map(|(page, _)| page).collect();
    assert!(changed.len() >= 4, "two used rings and buffers: {changed:x?}");
    for page in changed {
        assert!(log[page / 8] & 1 << (page % 8) != 0, "page {page:#x} was written and not logged");
    }
}
