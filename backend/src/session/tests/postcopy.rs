//! Postcopy: phases, answers, and everything out of order. Real QEMU's order is in `replay`.

use super::*;
use crate::session::Phase;

/// Messages of a front-end that has sent ADVISE and LISTEN.
fn listening(resend: bool) -> Lab {
    let mut lab = Lab::with(SessionConfig { postcopy_resend: resend, ..config() });
    lab.send(Id::SetProtocolFeatures, &protocol_feature::IMPLEMENTED.to_ne_bytes(), 0);
    lab.send(Id::SetFeatures, &(FEATURES & !virtio_feature::LOG_ALL).to_ne_bytes(), 0);
    let steps = lab.send(Id::PostcopyAdvise, &[], 0);
    assert!(
        matches!(&steps[..], [Step::Effect(Effect::PostcopyAdvise), Step::SendUserfaultfd(_)]),
        "{steps:?}"
    );
    let steps = lab.send(Id::PostcopyListen, &[], 0);
    assert_eq!(reply_u64(Id::PostcopyListen, &steps), 0);
    assert_eq!(lab.session.postcopy(), Phase::Listening);
    lab
}

fn acknowledge(lab: &mut Lab, id: Id) -> Vec<Effect<Fd>> {
    effects(lab.send(id, &0u64.to_ne_bytes(), 0))
}

fn addresses(payload: &[u8]) -> Vec<u64> {
    payload.chunks_exact(32).map(|bytes| WireRegion::read_from_bytes(bytes).unwrap().user_addr).collect()
}

#[test]
fn a_table_is_answered_by_our_addresses_in_its_order() {
    let mut lab = listening(false);
    let steps = lab.send(Id::SetMemTable, &table(&[region(4), region(0)]), 2);
    let payload = reply(Id::SetMemTable, &steps);
    assert_eq!(payload.len(), 8 + 2 * 32);
    assert_eq!(addresses(&payload[8..]), [owner::host(&spec(4)), owner::host(&spec(0))]);
    assert_eq!(lab.session.postcopy(), Phase::AwaitingAck);
    assert_eq!(acknowledge(&mut lab, Id::SetMemTable), [Effect::PostcopyArm]);
    assert_eq!(lab.session.postcopy(), Phase::Armed);
    // The guest restarts its device: the same table again is answered again.
    let steps = lab.send(Id::SetMemTable, &table(&[region(4), region(0)]), 2);
    assert_eq!(reply(Id::SetMemTable, &steps), payload);
    assert_eq!(acknowledge(&mut lab, Id::SetMemTable), [Effect::PostcopyArm]);
}

/// One acknowledgement for all slots: by 37, by 38, or by 0 if none has changed.
#[test]
fn slots_are_answered_one_by_one_and_acknowledged_together() {
    for id in [Id::AddMemReg, Id::RemMemReg, Id::None] {
        let mut lab = listening(false);
        if id == Id::AddMemReg {
            for n in [1, 3] {
                let steps = lab.send(Id::AddMemReg, &slot(n), 1);
                assert_eq!(addresses(&reply(Id::AddMemReg, &steps)[8..]), [owner::host(&spec(n))]);
            }
            assert_eq!(lab.session.postcopy(), Phase::AwaitingAck);
        }
        assert_eq!(acknowledge(&mut lab, id), [Effect::PostcopyArm], "{id:?}");
        assert_eq!(lab.session.postcopy(), Phase::Armed);
    }
}

/// QEMU acknowledges whenever it starts the device, also when all slots are as they were (0), or fewer (38).
#[test]
fn an_acknowledgement_of_nothing_new_arms_nothing_and_is_no_mistake() {
    let mut lab = listening(false);
    lab.send(Id::AddMemReg, &slot(1), 1);
    assert_eq!(acknowledge(&mut lab, Id::AddMemReg), [Effect::PostcopyArm]);
    for id in [Id::None, Id::RemMemReg] {
        let steps = lab.send(id, &0u64.to_ne_bytes(), 0);
        assert!(steps.is_empty(), "{id:?}: {steps:?}");
        assert_eq!(lab.session.postcopy(), Phase::Armed);
    }
}

#[test]
fn every_pair_says_it_and_only_the_first_counts() {
    let mut lab = listening(false);
    let steps = lab.send(Id::PostcopyListen, &[], 0);
    assert_eq!(reply_u64(Id::PostcopyListen, &steps), 0);
    assert!(effects(steps).is_empty());
    lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
    acknowledge(&mut lab, Id::SetMemTable);
    let steps = lab.send(Id::PostcopyEnd, &[], 0);
    assert_eq!(reply_u64(Id::PostcopyEnd, &steps), 0);
    assert_eq!(effects(steps), [Effect::PostcopyEnd]);
    let steps = lab.ask(Id::PostcopyEnd, &[], 0);
    assert_eq!(reply_u64(Id::PostcopyEnd, &steps), 0, "one reply, whether asked for or not");
    assert_eq!(steps.len(), 1, "{steps:?}");
    assert_eq!(lab.session.postcopy(), Phase::Idle);
    // Memory is ordinary again.
    let steps = lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
    assert!(matches!(steps[..], [Step::Effect(Effect::SetMemTable { postcopy: false, .. })]), "{steps:?}");
}

#[test]
fn the_end_may_come_at_any_time() {
    for before in 0..4 {
        let mut lab = Lab::agreed();
        if before > 0 {
            lab.send(Id::PostcopyAdvise, &[], 0);
        }
        if before > 1 {
            lab.send(Id::PostcopyListen, &[], 0);
        }
        if before > 2 {
            lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
        }
        let steps = lab.send(Id::PostcopyEnd, &[], 0);
        assert_eq!(reply_u64(Id::PostcopyEnd, &steps), 0);
        assert_eq!(effects(steps).len(), usize::from(before > 0));
        assert_eq!(lab.session.postcopy(), Phase::Idle);
    }
}

/// QEMU, when precopy was enough: neither LISTEN nor END follow the advice. The first ring that starts ends it, once, whether by
/// its own message or by memory that comes last.
#[test]
fn a_ring_that_starts_without_listen_ends_it() {
    for memory_last in [false, true] {
        let mut lab = Lab::agreed();
        for _pair in 0..2 {
            lab.send(Id::PostcopyAdvise, &[], 0);
        }
        if memory_last {
            for index in 0..4 {
                assert!(effects(lab.ring_up(index)).is_empty());
                assert_eq!(lab.session.postcopy(), Phase::Advised, "ring {index} does not run yet");
            }
        }
        let mut told = effects(lab.send(Id::SetMemTable, &table(&[region(0)]), 1));
        if !memory_last {
            assert_eq!(lab.session.postcopy(), Phase::Advised, "memory alone says nothing");
            told = effects(lab.ring_up(0));
        }
        let first = told.iter().position(|effect| matches!(effect, Effect::StartRing { .. }));
        let ends: Vec<_> = (0..told.len()).filter(|at| matches!(told[*at], Effect::PostcopyEnd)).collect();
        assert_eq!(ends, [first.unwrap() + 1], "{told:?}");
        assert_eq!(lab.session.postcopy(), Phase::Idle);
        // Memory is ordinary memory, and rings come and go.
        lab.send(Id::GetVringBase, &state(0, 0), 0);
        assert!(!effects(lab.ring_up(0)).contains(&Effect::PostcopyEnd));
        let steps = lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
        assert!(
            matches!(steps[..], [Step::Effect(Effect::SetMemTable { postcopy: false, .. })]),
            "{steps:?}"
        );
        // A front-end that says END all the same is answered, and it is no mistake.
        let steps = lab.send(Id::PostcopyEnd, &[], 0);
        assert_eq!((reply_u64(Id::PostcopyEnd, &steps), steps.len()), (0, 1), "{steps:?}");
        // LISTEN is too late: the ring has touched what has not arrived.
        let steps = lab.send(Id::PostcopyListen, &[], 0);
        assert_eq!(refusal(&steps), &Refusal::PostcopyPhase { phase: Phase::Idle });
        // Another migration to here is another beginning.
        lab.send(Id::PostcopyAdvise, &[], 0);
        let steps = lab.send(Id::PostcopyListen, &[], 0);
        assert_eq!((reply_u64(Id::PostcopyListen, &steps), lab.session.postcopy()), (0, Phase::Listening));
    }
}

/// A ring that cannot be started has touched nothing.
#[test]
fn a_ring_that_does_not_start_ends_nothing() {
    let mut lab = Lab::agreed();
    lab.send(Id::PostcopyAdvise, &[], 0);
    lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
    lab.refuse_after = Some(0);
    let told = effects(lab.ring_up(0));
    assert!(matches!(told[..], [Effect::StartRing { .. }]), "{told:?}");
    assert_eq!(lab.session.postcopy(), Phase::Advised);
    // After LISTEN rings start and end nothing.
    let mut lab = listening(false);
    lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
    acknowledge(&mut lab, Id::SetMemTable);
    assert!(!effects(lab.ring_up(0)).contains(&Effect::PostcopyEnd));
    assert_eq!(lab.session.postcopy(), Phase::Armed);
}

/// An owner that cannot end it well has still ended it: the front-end learns it, and another migration may come.
#[test]
fn a_bad_end_is_told() {
    let mut lab = listening(false);
    lab.refuse_after = Some(0);
    let steps = lab.send(Id::PostcopyEnd, &[], 0);
    assert_eq!(reply_u64(Id::PostcopyEnd, &steps), 1);
    assert_eq!(lab.session.postcopy(), Phase::Idle);
}

#[test]
fn a_userfaultfd_that_cannot_be_had_is_a_reply_without_one() {
    let mut lab = Lab::agreed();
    lab.refuse_after = Some(0);
    let steps = lab.send(Id::PostcopyAdvise, &[], 0);
    assert!(reply(Id::PostcopyAdvise, &steps).is_empty());
    assert_eq!(lab.session.postcopy(), Phase::Idle);
}

#[test]
fn orders_that_make_no_sense_are_refused() {
    let mut lab = Lab::agreed();
    let steps = lab.send(Id::PostcopyListen, &[], 0);
    assert_eq!(refusal(&steps), &Refusal::PostcopyPhase { phase: Phase::Idle });
    assert_eq!(reply_u64(Id::PostcopyListen, &steps), 1);
    let mut lab = listening(false);
    lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
    acknowledge(&mut lab, Id::SetMemTable);
    // QEMU does so after slots that were only removed, and when nothing has changed.
    for id in [Id::RemMemReg, Id::None] {
        assert_eq!(lab.send(id, &0u64.to_ne_bytes(), 0), [], "acknowledged again");
    }
    let again = lab.send(Id::SetMemTable, &0u64.to_ne_bytes(), 0);
    assert_eq!(
        refusal(&again),
        &Refusal::PostcopyPhase { phase: Phase::Armed },
        "a table acknowledged twice"
    );
    // Advice in the middle: its sender would get a userfaultfd that its faults do not come to.
    let advice = lab.send(Id::PostcopyAdvise, &[], 0);
    assert!(matches!(advice[..], [Step::Close(SessionError::Unanswerable { .. })]), "{advice:?}");
    let mut lab = listening(false);
    lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
    let bad = lab.send(Id::SetMemTable, &1u64.to_ne_bytes(), 0);
    assert!(matches!(bad[..], [Step::Close(SessionError::Disagreement { .. })]), "{bad:?}");
}

/// In postcopy the sender of memory reads an answer, also if it asked for no acknowledgement: an empty one tells it.
#[test]
fn memory_that_is_malformed_is_answered_too() {
    let mut lab = listening(false);
    lab.send(Id::AddMemReg, &slot(0), 1);
    let cases: [(Id, Vec<u8>, u32); 4] = [
        (Id::AddMemReg, slot(0), 1),
        (Id::AddMemReg, slot(5), 0),
        (Id::SetMemTable, table(&[region(1)]), 0),
        (Id::SetMemTable, vec![0; 9], 0),
    ];
    for (id, payload, fds) in cases {
        let steps = lab.send(id, &payload, fds);
        let empty = crate::session::message::encode_reply(id as u32, &[]);
        assert!(steps.contains(&Step::Send(empty)), "{id:?} {fds}: {steps:?}");
    }
}

#[test]
fn without_pagefault_none_of_it_is_obeyed() {
    let mut lab = Lab::with(config());
    for id in [Id::PostcopyAdvise, Id::PostcopyListen, Id::PostcopyEnd] {
        let steps = lab.send(id, &[], 0);
        assert_eq!(refusal(&steps), &Refusal::NotNegotiated(8), "{id:?}");
    }
}

/// For each further pair, where QEMU reads an answer that it has not asked for; never for the first one of a device
/// that starts again.
#[test]
fn answers_are_sent_again_for_further_pairs() {
    for (status, slots) in [(true, false), (true, true), (false, false), (false, true)] {
        let mut lab = listening(true);
        if !status {
            let bits = protocol_feature::IMPLEMENTED & !protocol_feature::STATUS;
            lab.send(Id::SetProtocolFeatures, &bits.to_ne_bytes(), 0);
        }
        let features = (FEATURES & !virtio_feature::LOG_ALL).to_ne_bytes();
        let first = lab.send(Id::SetFeatures, &features, 0);
        assert!(!first.iter().any(|step| matches!(step, Step::Send(_))), "the first pair");
        let id = if slots { Id::AddMemReg } else { Id::SetMemTable };
        let answered: Vec<Vec<u8>> = match slots {
            true => [0, 2].map(|n| reply(id, &lab.send(id, &slot(n), 1))).to_vec(),
            false => vec![reply(id, &lab.send(id, &table(&[region(0), region(2)]), 2))],
        };
        acknowledge(&mut lab, id);
        for index in 0..2 {
            lab.ring_up(index);
        }
        for _further_pair in 0..3 {
            let mut steps = lab.send(Id::SetFeatures, &features, 0);
            if status {
                assert!(!steps.iter().any(|step| matches!(step, Step::Send(_))), "{steps:?}");
                steps = lab.send(Id::GetStatus, &[], 0);
                let Step::Send(answer) = steps.remove(0) else { panic!("{steps:?}") };
                assert_eq!(answer[0], Id::GetStatus as u8);
            }
            let again: Vec<Vec<u8>> = steps
                .iter()
                .filter_map(|step| match step {
                    Step::Send(bytes) => Some(reply(id, &[Step::Send(bytes.clone())])),
                    _ => None,
                })
                .collect();
            assert_eq!(again, answered);
            let steps = lab.send(Id::GetStatus, &[], 0);
            assert_eq!(steps.len(), 1, "once a pair: {steps:?}");
        }
        // The guest restarts its device in mid-migration: QEMU tells all pairs their table again, but no slot.
        for index in 0..2 {
            lab.send(Id::GetVringBase, &state(index, 0), 0);
        }
        let steps = lab.send(Id::SetFeatures, &features, 0);
        assert!(!steps.iter().any(|step| matches!(step, Step::Send(_))), "{steps:?}");
        for index in 0..2 {
            lab.ring_up(index);
        }
        let mut steps = lab.send(Id::SetFeatures, &features, 0);
        if status {
            steps = lab.send(Id::GetStatus, &[], 0);
            steps.remove(0);
        }
        let again = steps.iter().filter(|step| matches!(step, Step::Send(_))).count();
        assert_eq!(again, usize::from(!slots), "{steps:?}");
    }
}

/// Reports that a further pair of QEMU's had no use for are made again when it has.
#[test]
fn faults_are_reported_again_when_a_further_pair_starts() {
    for resend in [true, false] {
        let mut lab = listening(resend);
        lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
        acknowledge(&mut lab, Id::SetMemTable);
        for index in 0..4 {
            let woken = effects(lab.ring_up(index)).contains(&Effect::PostcopyWake);
            assert_eq!(woken, resend && index >= 2, "ring {index}");
        }
    }
}
