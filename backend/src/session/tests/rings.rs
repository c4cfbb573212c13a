//! Rings: start in any order, stop, restart, enable, and what is wrong with them.

use super::*;

const RING_0: RingConfig = RingConfig {
    size: 256,
    base: 7,
    desc_user: 0x7000_0000,
    avail_user: 0x7000_1000,
    used_user: 0x7000_2000,
    log_used: None,
    enabled: false,
    features: FEATURES & !virtio_feature::LOG_ALL,
};

fn kick(index: u64) -> [u8; 8] {
    index.to_ne_bytes()
}

#[test]
fn a_ring_starts_at_its_kick() {
    let mut lab = Lab::agreed();
    lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
    let told = effects(lab.ring_up(0));
    assert_eq!(told, [Effect::StartRing { index: 0, config: RING_0, kick: Some(Fd(1)) }]);
    let view = lab.session.rings().next().unwrap();
    assert_eq!(view, RingView { index: 0, size: Some(256), base: 7, enabled: false, running: true });
    assert_eq!(lab.session.rings().filter(|ring| ring.running).count(), 1);
}

#[test]
fn no_fd_means_polling() {
    let mut lab = Lab::running();
    lab.send(Id::GetVringBase, &state(0, 0), 0);
    let told = effects(lab.send(Id::SetVringKick, &kick(0x100), 0));
    assert!(matches!(told[..], [Effect::StartRing { index: 0, kick: None, .. }]), "{told:?}");
}

/// The four things a ring needs may come in any order; it starts when the last is there, and once.
#[test]
fn a_ring_starts_whatever_came_last() {
    let pieces: [(Id, Vec<u8>, u32); 4] = [
        (Id::SetVringNum, state(0, 256), 0),
        (Id::SetVringAddr, addr(0, false), 0),
        (Id::SetVringKick, kick(0).to_vec(), 1),
        (Id::SetMemTable, table(&[region(0)]), 1),
    ];
    for order in 0..24 {
        let mut left: Vec<usize> = (0..4).collect();
        let mut code = order;
        let mut lab = Lab::agreed();
        lab.send(Id::SetVringBase, &state(0, 7), 0);
        while !left.is_empty() {
            assert!(lab.owner.rings[0].is_none(), "order {order}: too early");
            let (id, payload, fds) = &pieces[left.remove(code % left.len())];
            code /= left.len() + 1;
            lab.send(*id, payload, *fds);
        }
        assert_eq!(lab.owner.rings[0], Some(RING_0), "order {order}");
        assert_eq!(lab.session.stats().refused(), 0);
    }
}

#[test]
fn a_slot_is_memory_too() {
    let mut lab = Lab::agreed();
    lab.ring_up(0);
    let told = effects(lab.send(Id::AddMemReg, &slot(0), 1));
    assert!(matches!(told[..], [Effect::AddMemReg { .. }, Effect::StartRing { index: 0, .. }]), "{told:?}");
}

/// vhost-user: Ring states. Without PROTOCOL_FEATURES rings are enabled from the start.
#[test]
fn without_protocol_features_rings_are_enabled_from_the_start() {
    for features in [None, Some(1u64 << 32)] {
        let mut lab = Lab::with(config());
        if let Some(features) = features {
            lab.send(Id::SetFeatures, &features.to_ne_bytes(), 0);
        }
        lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
        lab.ring_up(0);
        assert!(lab.owner.rings[0].unwrap().enabled);
    }
}

#[test]
fn an_early_enable_counts_at_the_start() {
    let mut lab = Lab::with(config());
    lab.send(Id::SetProtocolFeatures, &protocol_feature::IMPLEMENTED.to_ne_bytes(), 0);
    for _ in 0..3 {
        assert_eq!(effects(lab.ask(Id::SetVringEnable, &state(0, 1), 0)), []);
    }
    lab.send(Id::SetFeatures, &FEATURES.to_ne_bytes(), 0);
    lab.send(Id::SetFeatures, &RING_0.features.to_ne_bytes(), 0);
    lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
    lab.ring_up(0);
    lab.ring_up(1);
    assert!(lab.owner.rings[0].unwrap().enabled);
    assert!(!lab.owner.rings[1].unwrap().enabled);
}

/// vhost #343 and others lose a kick here: the owner must hear of every enable, to look at the ring.
#[test]
fn vhost_343_every_enable_of_a_running_ring_reaches_the_owner() {
    let mut lab = Lab::running();
    for enabled in [true, true, false, false, true] {
        let steps = lab.ask(Id::SetVringEnable, &state(1, enabled.into()), 0);
        assert_eq!(reply_u64(Id::SetVringEnable, &steps), 0);
        assert_eq!(effects(steps), [Effect::EnableRing { index: 1, enabled }]);
    }
}

#[test]
fn get_vring_base_stops_and_answers_the_same_again() {
    let mut lab = Lab::running();
    lab.owner.bases[0] = 61;
    let steps = lab.send(Id::GetVringBase, &state(0, 0), 0);
    assert_eq!(reply(Id::GetVringBase, &steps), state(0, 61));
    assert_eq!(effects(steps), [Effect::StopRing { index: 0 }]);
    let steps = lab.send(Id::GetVringBase, &state(0, 0), 0);
    assert_eq!(reply(Id::GetVringBase, &steps), state(0, 61));
    assert_eq!(effects(steps), []);
    assert!(lab.owner.rings[1].is_some(), "the other ring runs on");
}

#[test]
fn get_vring_base_of_a_ring_that_never_ran_answers_set_vring_base() {
    let mut lab = Lab::agreed();
    assert_eq!(reply(Id::GetVringBase, &lab.send(Id::GetVringBase, &state(3, 0), 0)), state(3, 0));
    lab.send(Id::SetVringBase, &state(3, 1234), 0);
    assert_eq!(reply(Id::GetVringBase, &lab.send(Id::GetVringBase, &state(3, 0), 0)), state(3, 1234));
}

#[test]
fn a_stopped_ring_needs_a_new_kick() {
    let mut lab = Lab::running();
    lab.owner.bases[0] = 40;
    lab.send(Id::GetVringBase, &state(0, 0), 0);
    lab.send(Id::SetVringNum, &state(0, 256), 0);
    lab.send(Id::SetVringAddr, &addr(0, false), 0);
    assert!(lab.owner.rings[0].is_none());
    let told = effects(lab.send(Id::SetVringKick, &kick(0), 1));
    let [Effect::StartRing { config, .. }] = &told[..] else { panic!("{told:?}") };
    assert_eq!(config.base, 40, "it goes on where it stopped");
}

#[test]
fn get_vring_base_drops_a_kick_that_waits() {
    let mut lab = Lab::agreed();
    lab.ring_up(0);
    lab.send(Id::GetVringBase, &state(0, 0), 0);
    lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
    assert!(lab.owner.rings[0].is_none());
}

/// A new kick eventfd for a running ring: it goes on with that, where it stood.
#[test]
fn a_second_kick_restarts_the_ring_with_the_new_fd() {
    let mut lab = Lab::running();
    lab.owner.bases[1] = 99;
    let steps = lab.ask(Id::SetVringKick, &kick(1), 1);
    assert_eq!(reply_u64(Id::SetVringKick, &steps), 0);
    let told = effects(steps);
    let [Effect::StopRing { index: 1 }, Effect::StartRing { index: 1, config, kick: Some(_) }] = &told[..]
    else {
        panic!("{told:?}")
    };
    assert_eq!((config.base, config.enabled), (99, true));
}

#[test]
fn call_and_error_fds_come_at_any_time() {
    let mut lab = Lab::with(config());
    assert_eq!(
        effects(lab.send(Id::SetVringCall, &kick(1), 1)),
        [Effect::SetCall { index: 1, fd: Some(Fd(0)) }]
    );
    assert_eq!(
        effects(lab.send(Id::SetVringCall, &kick(0x101), 0)),
        [Effect::SetCall { index: 1, fd: None }]
    );
    assert_eq!(
        effects(lab.send(Id::SetVringErr, &kick(0), 1)),
        [Effect::SetErr { index: 0, fd: Some(Fd(1)) }]
    );
    assert_eq!(effects(lab.send(Id::SetVringErr, &kick(0x100), 0)), [Effect::SetErr { index: 0, fd: None }]);
}

#[test]
fn the_no_fd_bit_and_the_fds_must_agree() {
    let mut lab = Lab::agreed();
    for id in [Id::SetVringKick, Id::SetVringCall, Id::SetVringErr] {
        for (value, fds) in [(0u64, 0u32), (0x100, 1), (0, 2)] {
            let steps = lab.ask(id, &value.to_ne_bytes(), fds);
            assert_eq!(refusal(&steps), &Refusal::FdCount { count: fds as usize }, "{id:?}");
            assert_eq!(reply_u64(id, &steps), 1);
        }
    }
    assert_eq!(lab.session.stats().bad_fds, 9);
}

#[test]
fn ring_sizes_are_powers_of_two_up_to_32768() {
    let mut lab = Lab::agreed();
    for size in [0, 3, 255, 32767, 65536, 1 << 31, u32::MAX] {
        let steps = lab.ask(Id::SetVringNum, &state(0, size), 0);
        assert_eq!(refusal(&steps), &Refusal::RingSize(size));
    }
    for size in [1, 2, 256, 32768] {
        assert_eq!(reply_u64(Id::SetVringNum, &lab.ask(Id::SetVringNum, &state(0, size), 0)), 0);
    }
}

/// cloud-hypervisor #8772: only queue pairs that were negotiated exist.
#[test]
fn cloud_hypervisor_8772_rings_of_pairs_not_negotiated_are_refused() {
    let mut lab = Lab::agreed();
    let steps = lab.ask(Id::SetVringNum, &state(4, 256), 0);
    assert_eq!(refusal(&steps), &Refusal::RingIndex { index: 4, rings: 4 });
    // Without MQ there is one pair, whatever we would have.
    let mut lab = Lab::with(config());
    lab.send(Id::SetProtocolFeatures, &protocol_feature::REPLY_ACK.to_ne_bytes(), 0);
    for (id, payload, fds) in [
        (Id::SetVringNum, state(2, 256), 0),
        (Id::SetVringBase, state(2, 0), 0),
        (Id::SetVringAddr, addr(2, false), 0),
        (Id::SetVringEnable, state(2, 1), 0),
        (Id::SetVringKick, kick(2).to_vec(), 1),
        (Id::SetVringCall, kick(2).to_vec(), 1),
        (Id::SetVringErr, kick(2).to_vec(), 1),
    ] {
        let steps = lab.ask(id, &payload, fds);
        assert_eq!(refusal(&steps), &Refusal::RingIndex { index: 2, rings: 2 }, "{id:?}");
    }
    // Only pairs that are kicked run.
    let mut lab = Lab::running();
    assert_eq!(lab.session.rings().filter(|ring| ring.running).count(), 2);
    lab.ring_up(3);
    assert!(lab.owner.rings[2].is_none() && lab.owner.rings[3].is_some());
}

#[test]
fn the_base_of_no_ring_cannot_be_answered() {
    let mut lab = Lab::agreed();
    let steps = lab.send(Id::GetVringBase, &state(200, 0), 0);
    assert!(matches!(steps[..], [Step::Close(SessionError::Unanswerable { .. })]), "{steps:?}");
}

#[test]
fn values_of_rings_are_checked() {
    let mut lab = Lab::running();
    let steps = lab.ask(Id::SetVringBase, &state(2, 0x1_0000), 0);
    assert_eq!(refusal(&steps), &Refusal::RingBase(0x1_0000));
    let steps = lab.ask(Id::SetVringEnable, &state(0, 2), 0);
    assert_eq!(refusal(&steps), &Refusal::EnableValue(2));
    let steps = lab.ask(Id::SetVringBase, &state(0, 5), 0);
    assert_eq!(refusal(&steps), &Refusal::RingRunning(0));
    let steps = lab.ask(Id::SetVringNum, &state(0, 512), 0);
    assert_eq!(refusal(&steps), &Refusal::RingRunning(0));
    assert_eq!(reply_u64(Id::SetVringNum, &lab.ask(Id::SetVringNum, &state(0, 256), 0)), 0, "no change");
}

#[test]
fn a_start_that_the_owner_refuses_is_told_and_needs_a_new_kick() {
    let mut lab = Lab::agreed();
    lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
    lab.send(Id::SetVringNum, &state(0, 256), 0);
    lab.send(Id::SetVringAddr, &addr(0, false), 0);
    lab.refuse_after = Some(0);
    assert_eq!(reply_u64(Id::SetVringKick, &lab.ask(Id::SetVringKick, &kick(0), 1)), 1);
    assert!(!lab.session.rings().next().unwrap().running);
    assert_eq!(effects(lab.send(Id::SetVringAddr, &addr(0, false), 0)), []);
    assert_eq!(reply_u64(Id::SetVringKick, &lab.ask(Id::SetVringKick, &kick(0), 1)), 0);
    assert!(lab.owner.rings[0].is_some());
}

/// Memory is good even if a ring's addresses in it are not.
#[test]
fn a_ring_that_does_not_start_is_not_the_memorys_fault() {
    let mut lab = Lab::agreed();
    lab.ring_up(0);
    lab.refuse_after = Some(1);
    let steps = lab.ask(Id::SetMemTable, &table(&[region(0)]), 1);
    assert_eq!(reply_u64(Id::SetMemTable, &steps), 0);
    let told =
        |step: &Step<Fd>| matches!(step, Step::Warn(Notice { what: Matter::RingNotStarted { .. }, .. }));
    assert!(steps.iter().any(told), "{steps:?}");
}

#[test]
fn an_update_that_the_owner_refuses_leaves_the_addresses() {
    let mut lab = Lab::running();
    let mut moved = addr(0, false);
    moved[8] = 0x40;
    lab.refuse_after = Some(0);
    assert_eq!(reply_u64(Id::SetVringAddr, &lab.ask(Id::SetVringAddr, &moved, 0)), 1);
    let told = effects(lab.ask(Id::SetVringKick, &kick(0), 1));
    let [_, Effect::StartRing { config, .. }] = &told[..] else { panic!("{told:?}") };
    assert_eq!(config.desc_user, RING_0.desc_user);
}

#[test]
fn a_ring_that_cannot_be_stopped_ends_the_connection() {
    let mut lab = Lab::running();
    lab.refuse_after = Some(0);
    let steps = lab.send(Id::GetVringBase, &state(0, 0), 0);
    assert!(matches!(steps[..], [_, Step::Close(SessionError::StopFailed { index: 0, .. })]), "{steps:?}");
}

/// A session with packed rings agreed on.
fn packed() -> Lab {
    let mut lab = Lab::with(SessionConfig { features: FEATURES | virtio_feature::RING_PACKED, ..config() });
    lab.send(Id::SetProtocolFeatures, &protocol_feature::IMPLEMENTED.to_ne_bytes(), 0);
    let features = (FEATURES & !virtio_feature::LOG_ALL) | virtio_feature::RING_PACKED;
    lab.send(Id::SetFeatures, &features.to_ne_bytes(), 0);
    lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
    lab
}

/// vhost-user: Vring descriptor indices for packed virtqueues.
#[test]
fn the_base_of_a_packed_ring_has_32_bits_both_ways() {
    let mut lab = packed();
    lab.send(Id::SetVringNum, &state(0, 100), 0);
    lab.send(Id::SetVringBase, &state(0, 0x8007_8009), 0);
    lab.send(Id::SetVringAddr, &addr(0, false), 0);
    let told = effects(lab.send(Id::SetVringKick, &kick(0), 1));
    let [Effect::StartRing { config, .. }] = &told[..] else { panic!("{told:?}") };
    assert_eq!((config.base, config.size), (0x8007_8009, 100));
    lab.owner.bases[0] = 0x0011;
    let steps = lab.send(Id::GetVringBase, &state(0, 0), 0);
    assert_eq!(reply(Id::GetVringBase, &steps), state(0, 0x0011));
}

/// VIRTIO 1.3 §2.8.1: both wrap counters begin with 1. What was never said is not 0 then.
#[test]
fn a_packed_ring_begins_with_wrap_counters_of_1() {
    let mut lab = packed();
    assert_eq!(reply(Id::GetVringBase, &lab.send(Id::GetVringBase, &state(0, 0), 0)), state(0, 0x8000_8000));
    lab.send(Id::SetVringNum, &state(0, 256), 0);
    lab.send(Id::SetVringAddr, &addr(0, false), 0);
    let told = effects(lab.send(Id::SetVringKick, &kick(0), 1));
    let [Effect::StartRing { config, .. }] = &told[..] else { panic!("{told:?}") };
    assert_eq!(config.base, 0x8000_8000);
}

/// VIRTIO 1.3 §2.7, §2.8.10.1
#[test]
fn sizes_and_bases_are_those_of_the_ring_format() {
    let mut lab = packed();
    for size in [1, 3, 100, 32767, 32768] {
        assert_eq!(reply_u64(Id::SetVringNum, &lab.ask(Id::SetVringNum, &state(0, size), 0)), 0, "{size}");
    }
    for size in [0, 32769, 0x1_0000, u32::MAX] {
        assert_eq!(refusal(&lab.ask(Id::SetVringNum, &state(0, size), 0)), &Refusal::RingSize(size));
    }
    let mut lab = Lab::agreed();
    for size in [0, 3, 100] {
        assert_eq!(refusal(&lab.ask(Id::SetVringNum, &state(0, size), 0)), &Refusal::RingSize(size));
    }
    assert_eq!(
        refusal(&lab.ask(Id::SetVringBase, &state(0, 0x8000_8000), 0)),
        &Refusal::RingBase(0x8000_8000)
    );
}
