//! Memory table, memory slots, dirty log.

use super::*;

#[test]
fn a_table_pairs_regions_with_fds_in_order() {
    let mut lab = Lab::agreed();
    let steps = lab.ask(Id::SetMemTable, &table(&[region(0), region(4)]), 2);
    assert_eq!(reply_u64(Id::SetMemTable, &steps), 0);
    let regions = vec![(spec(0), Fd(0)), (spec(4), Fd(1))];
    assert_eq!(effects(steps), [Effect::SetMemTable { regions, postcopy: false }]);
    assert_eq!(lab.session.regions(), [spec(0), spec(4)]);
}

/// Memory hotplug without slots: the whole table again, with rings running.
#[test]
fn a_second_table_replaces_the_first_under_running_rings() {
    let mut lab = Lab::running();
    let told = effects(lab.send(Id::SetMemTable, &table(&[region(0), region(4)]), 2));
    assert!(matches!(told[..], [Effect::SetMemTable { .. }]), "{told:?}");
    assert_eq!(lab.session.regions().len(), 2);
}

#[test]
fn a_table_that_the_owner_refuses_leaves_the_old_one() {
    let mut lab = Lab::running();
    lab.refuse_after = Some(0);
    let steps = lab.ask(Id::SetMemTable, &table(&[region(5)]), 1);
    assert_eq!(reply_u64(Id::SetMemTable, &steps), 1);
    assert_eq!(lab.session.regions(), [spec(0)]);
}

#[test]
fn tables_that_contradict_themselves_are_refused() {
    let mut lab = Lab::agreed();
    let two = table(&[region(0), region(1)]);
    let mut head_lies = two.clone();
    head_lies[0] = 1;
    let mut same_user = region(1);
    same_user.user_addr = region(0).user_addr;
    let nine: Vec<_> = (0..9).map(region).collect();
    let cases: [(&[u8], u32, Refusal); 8] = [
        (&two, 1, Refusal::FdCount { count: 1 }),
        (&two, 3, Refusal::FdCount { count: 3 }),
        (&head_lies, 2, Refusal::PayloadSize { size: 72 }),
        (&two[..71], 2, Refusal::PayloadSize { size: 71 }),
        (&table(&[]), 0, Refusal::EmptyTable),
        (&table(&nine), 8, Refusal::PayloadSize { size: 8 + 9 * 32 }),
        (&table(&[region(3), region(3)]), 2, Refusal::DuplicateRegion { guest_phys: 3 << 30 }),
        (&table(&[region(0), same_user]), 2, Refusal::DuplicateRegion { guest_phys: 1 << 30 }),
    ];
    for (payload, fds, why) in cases {
        let steps = lab.ask(Id::SetMemTable, payload, fds);
        assert_eq!(refusal(&steps), &why);
        assert_eq!(reply_u64(Id::SetMemTable, &steps), 1);
    }
    assert!(lab.session.regions().is_empty());
}

#[test]
fn slots_are_added_and_removed_one_by_one() {
    let mut lab = Lab::agreed();
    let steps = lab.ask(Id::AddMemReg, &slot(0), 1);
    assert_eq!(reply_u64(Id::AddMemReg, &steps), 0);
    assert_eq!(effects(steps), [Effect::AddMemReg { region: spec(0), fd: Fd(0), postcopy: false }]);
    lab.send(Id::AddMemReg, &slot(1), 1);
    let steps = lab.ask(Id::RemMemReg, &slot(0), 0);
    assert_eq!(reply_u64(Id::RemMemReg, &steps), 0);
    assert_eq!(effects(steps), [Effect::RemMemReg { region: spec(0) }]);
    assert_eq!(lab.session.regions(), [spec(1)]);
}

/// Older front-ends send an fd with REM_MEM_REG, and not always the offset that they added the region with.
#[test]
fn a_removal_may_bring_an_fd_and_another_offset() {
    let mut lab = Lab::agreed();
    lab.send(Id::AddMemReg, &slot(0), 1);
    let mut other = region(0);
    other.mmap_offset = 4096;
    let payload = SingleRegion { padding: 9, region: other };
    let told = effects(lab.send(Id::RemMemReg, payload.as_bytes(), 1));
    assert_eq!(told, [Effect::RemMemReg { region: spec(0) }], "the region as it was added");
}

#[test]
fn slots_have_a_limit_and_no_duplicates() {
    let mut lab = Lab::agreed();
    for n in 0..4 {
        assert_eq!(reply_u64(Id::AddMemReg, &lab.ask(Id::AddMemReg, &slot(n), 1)), 0);
    }
    let steps = lab.ask(Id::AddMemReg, &slot(4), 1);
    assert_eq!(refusal(&steps), &Refusal::SlotsFull(4));
    lab.send(Id::RemMemReg, &slot(3), 0);
    let steps = lab.ask(Id::AddMemReg, &slot(2), 1);
    assert_eq!(refusal(&steps), &Refusal::DuplicateRegion { guest_phys: 2 << 30 });
    let steps = lab.ask(Id::RemMemReg, &slot(3), 0);
    assert_eq!(refusal(&steps), &Refusal::UnknownRegion { guest_phys: 3 << 30 });
    for fds in [0, 2] {
        let steps = lab.ask(Id::AddMemReg, &slot(3), fds);
        assert_eq!(refusal(&steps), &Refusal::FdCount { count: fds as usize });
    }
}

#[test]
fn a_slot_that_the_owner_refuses_is_not_taken() {
    let mut lab = Lab::agreed();
    lab.refuse_after = Some(0);
    assert_eq!(reply_u64(Id::AddMemReg, &lab.ask(Id::AddMemReg, &slot(0), 1)), 1);
    assert!(lab.session.regions().is_empty());
    assert_eq!(reply_u64(Id::AddMemReg, &lab.ask(Id::AddMemReg, &slot(0), 1)), 0);
}

fn log(size: u64, offset: u64) -> Vec<u8> {
    [size.to_ne_bytes(), offset.to_ne_bytes()].concat()
}

fn log_all(lab: &Lab, on: bool) -> [u8; 8] {
    let features = lab.session.features() & !virtio_feature::LOG_ALL;
    (features | if on { virtio_feature::LOG_ALL } else { 0 }).to_ne_bytes()
}

/// vhost #342 and #217: front-ends differ in how many bytes of reply they wait for. 16 suits all that are correct.
#[test]
fn vhost_342_217_set_log_base_replies_with_the_whole_log_description() {
    let mut lab = Lab::running();
    for flags in [PLAIN, NEED_REPLY] {
        let steps = lab.send_raw(Id::SetLogBase as u32, flags, &log(0x2000, 0x1000), 1);
        assert_eq!(reply(Id::SetLogBase, &steps), log(0x2000, 0x1000));
    }
    assert_eq!(lab.session.log(), LogState::Present);
}

/// cloud-hypervisor #8918: after a migration that failed, the next one has to log again.
#[test]
fn cloud_hypervisor_8918_a_second_migration_logs_again() {
    let mut lab = Lab::running();
    for migration in 0..2 {
        let told = effects(lab.send(Id::SetLogBase, &log(0x2000, 0), 1));
        assert!(
            matches!(told[..], [Effect::SetLogBase { size: 0x2000, offset: 0, .. }]),
            "{migration}: {told:?}"
        );
        let told = effects(lab.ask(Id::SetFeatures, &log_all(&lab, true), 0));
        assert!(matches!(told[..], [Effect::SetFeatures { log_all: true, .. }]), "{migration}: {told:?}");
        let told = effects(lab.ask(Id::SetVringAddr, &addr(0, true), 0));
        let [Effect::UpdateRing { index: 0, config }] = told[..] else { panic!("{migration}: {told:?}") };
        assert_eq!(config.log_used, Some(0x2000));

        let told = effects(lab.send(Id::SetFeatures, &log_all(&lab, false), 0));
        assert!(matches!(told[..], [Effect::SetFeatures { log_all: false, .. }]), "{migration}: {told:?}");
        let told = effects(lab.send(Id::SetVringAddr, &addr(0, false), 0));
        let [Effect::UpdateRing { config, .. }] = told[..] else { panic!("{migration}: {told:?}") };
        assert_eq!(config.log_used, None);
    }
}

#[test]
fn the_log_grows_while_it_is_in_use() {
    let mut lab = Lab::running();
    lab.send(Id::SetLogBase, &log(0x2000, 0), 1);
    lab.ask(Id::SetFeatures, &log_all(&lab, true), 0);
    let steps = lab.send(Id::SetLogBase, &log(0x4000, 0), 1);
    assert_eq!(reply(Id::SetLogBase, &steps), log(0x4000, 0));
    assert!(matches!(effects(steps)[..], [Effect::SetLogBase { size: 0x4000, .. }]));
}

/// SET_LOG_BASE cannot tell an error, so the LOG_ALL after it does.
#[test]
fn a_migration_with_an_unusable_log_fails_loudly() {
    let mut lab = Lab::running();
    lab.refuse_after = Some(0);
    let steps = lab.send(Id::SetLogBase, &log(0x2000, 0), 1);
    assert_eq!(reply(Id::SetLogBase, &steps), [0; 16]);
    assert_eq!(lab.session.log(), LogState::Refused);
    let steps = lab.ask(Id::SetFeatures, &log_all(&lab, true), 0);
    assert_eq!(refusal(&steps), &Refusal::NoLog);
    assert_eq!(reply_u64(Id::SetFeatures, &steps), 1);
    // A good one later is believed.
    lab.send(Id::SetLogBase, &log(0x2000, 0), 1);
    assert_eq!(reply_u64(Id::SetFeatures, &lab.ask(Id::SetFeatures, &log_all(&lab, true), 0)), 0);
}

#[test]
fn a_bigger_log_that_is_unusable_ends_the_connection_in_mid_migration() {
    let mut lab = Lab::running();
    lab.send(Id::SetLogBase, &log(0x2000, 0), 1);
    lab.ask(Id::SetFeatures, &log_all(&lab, true), 0);
    lab.refuse_after = Some(0);
    let steps = lab.send(Id::SetLogBase, &log(0x4000, 0), 1);
    assert!(matches!(steps[..], [_, Step::Close(SessionError::LogLost { .. })]), "{steps:?}");
}

#[test]
fn a_used_ring_that_cannot_be_logged_is_never_silent() {
    let mut lab = Lab::running();
    lab.send(Id::SetLogBase, &log(0x2000, 0), 1);
    lab.ask(Id::SetFeatures, &log_all(&lab, true), 0);
    lab.refuse_after = Some(0);
    let steps = lab.ask(Id::SetVringAddr, &addr(0, true), 0);
    assert_eq!(reply_u64(Id::SetVringAddr, &steps), 1);
    lab.refuse_after = Some(0);
    let steps = lab.send(Id::SetVringAddr, &addr(0, true), 0);
    assert!(matches!(steps[..], [_, Step::Close(SessionError::Disagreement { .. })]), "{steps:?}");
}

#[test]
fn an_impossible_log_ends_the_connection() {
    for (payload, fds) in [(log(0, 0), 1), (log(u64::MAX, 1), 1), (log(4096, 0), 0), (log(4096, 0), 2)] {
        let mut lab = Lab::running();
        let steps = lab.send(Id::SetLogBase, &payload, fds);
        assert!(matches!(steps[..], [Step::Close(SessionError::Unanswerable { .. })]), "{steps:?}");
    }
}

/// QEMU starts a device in the middle of a migration with LOG_ALL first and SET_LOG_BASE last.
#[test]
fn a_device_started_in_mid_migration_waits_for_its_log() {
    let mut lab = Lab::agreed();
    assert_eq!(reply_u64(Id::SetFeatures, &lab.ask(Id::SetFeatures, &log_all(&lab, true), 0)), 0);
    lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
    let steps = lab.ring_up(0);
    let waits = |step: &Step<Fd>| {
        matches!(step, Step::Warn(Notice { what: Matter::RingWaitsForLog { index: 0 }, .. }))
    };
    assert!(steps.iter().any(waits), "{steps:?}");
    assert!(lab.owner.rings[0].is_none());
    let told = effects(lab.send(Id::SetLogBase, &log(0x2000, 0), 1));
    assert!(matches!(told[..], [Effect::SetLogBase { .. }, Effect::StartRing { index: 0, .. }]), "{told:?}");
}

#[test]
fn a_ring_that_waits_for_a_log_starts_when_logging_is_given_up() {
    let mut lab = Lab::agreed();
    lab.send(Id::SetFeatures, &log_all(&lab, true), 0);
    lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
    lab.ring_up(1);
    let told = effects(lab.send(Id::SetFeatures, &log_all(&lab, false), 0));
    assert!(matches!(told[..], [Effect::SetFeatures { .. }, Effect::StartRing { index: 1, .. }]), "{told:?}");
}

#[test]
fn log_all_on_running_rings_without_a_log_is_reported() {
    let mut lab = Lab::running();
    let steps = lab.ask(Id::SetFeatures, &log_all(&lab, true), 0);
    assert!(matches!(&steps[0], Step::Warn(Notice { what: Matter::LoggingWithoutLog, .. })), "{steps:?}");
    assert_eq!(reply_u64(Id::SetFeatures, &steps), 0);
}
