//! Features, protocol features, number of queues; acknowledgements in general.

use super::*;

#[test]
fn questions_are_answered_from_the_configuration() {
    let mut lab = Lab::with(config());
    assert_eq!(reply_u64(Id::GetFeatures, &lab.send(Id::GetFeatures, &[], 0)), FEATURES);
    let offered = reply_u64(Id::GetProtocolFeatures, &lab.send(Id::GetProtocolFeatures, &[], 0));
    assert_eq!(offered, protocol_feature::IMPLEMENTED);
    assert_eq!(reply_u64(Id::GetQueueNum, &lab.send(Id::GetQueueNum, &[], 0)), 2);
    assert_eq!(reply_u64(Id::GetMaxMemSlots, &lab.send(Id::GetMaxMemSlots, &[], 0)), 4);
    assert_eq!(reply_u64(Id::GetStatus, &lab.send(Id::GetStatus, &[], 0)), 0);
}

#[test]
fn config_is_not_offered_without_a_configuration_space() {
    let mut lab = Lab::with(SessionConfig { config_space: None, ..config() });
    let offered = reply_u64(Id::GetProtocolFeatures, &lab.send(Id::GetProtocolFeatures, &[], 0));
    assert_eq!(offered, protocol_feature::IMPLEMENTED & !protocol_feature::CONFIG);
    let steps = lab.send(Id::GetConfig, &[0; 20], 0);
    assert_eq!(refusal(&steps), &Refusal::NotNegotiated(9));
}

#[test]
fn an_acknowledgement_needs_reply_ack_and_need_reply() {
    let mut lab = Lab::with(config());
    assert_eq!(lab.ask(Id::SetOwner, &[], 0), []);
    // REPLY_ACK counts for the message that agrees on it.
    let bits = protocol_feature::IMPLEMENTED.to_ne_bytes();
    assert_eq!(reply_u64(Id::SetProtocolFeatures, &lab.ask(Id::SetProtocolFeatures, &bits, 0)), 0);
    assert_eq!(reply_u64(Id::SetOwner, &lab.ask(Id::SetOwner, &[], 0)), 0);
    assert_eq!(lab.send(Id::SetOwner, &[], 0), []);
}

/// vhost-user: a message with its own reply gets no acknowledgement on top.
#[test]
fn a_question_with_need_reply_is_answered_once() {
    let mut lab = Lab::running();
    assert_eq!(reply_u64(Id::GetFeatures, &lab.ask(Id::GetFeatures, &[], 0)), FEATURES);
    assert_eq!(reply(Id::GetVringBase, &lab.ask(Id::GetVringBase, &state(0, 0), 0)), state(0, 0));
}

#[test]
fn feature_bits_not_offered_are_refused_or_end_the_connection() {
    let alien = (FEATURES | 1 << 34).to_ne_bytes();
    let mut lab = Lab::agreed();
    let steps = lab.ask(Id::SetFeatures, &alien, 0);
    assert_eq!(refusal(&steps), &Refusal::FeatureBits(1 << 34));
    assert_eq!(reply_u64(Id::SetFeatures, &steps), 1);
    assert_eq!(lab.session.features(), FEATURES & !virtio_feature::LOG_ALL);

    let why = Refusal::FeatureBits(1 << 34);
    let close = Step::Close(SessionError::Disagreement { name: "SET_FEATURES", why });
    assert_eq!(lab.send(Id::SetFeatures, &alien, 0), [close]);
    assert!(!lab.session.wants_input());
    assert_eq!(lab.send(Id::GetFeatures, &[], 0), [], "nothing after the end");
}

#[test]
fn protocol_feature_bits_not_offered_end_the_connection() {
    let mut lab = Lab::with(config());
    let steps = lab.ask(Id::SetProtocolFeatures, &protocol_feature::PRESETUP.to_ne_bytes(), 0);
    assert!(matches!(steps[..], [Step::Close(SessionError::Disagreement { .. })]), "{steps:?}");
}

#[test]
fn features_that_the_owner_refuses_are_not_agreed_on() {
    let mut lab = Lab::agreed();
    lab.refuse_after = Some(0);
    let steps = lab.ask(Id::SetFeatures, &(1u64 << 32).to_ne_bytes(), 0);
    assert_eq!(reply_u64(Id::SetFeatures, &steps), 1);
    assert_eq!(lab.session.features(), FEATURES & !virtio_feature::LOG_ALL);
    assert_eq!(lab.session.stats().refused_by_owner, 1);

    lab.refuse_after = Some(0);
    let steps = lab.send(Id::SetFeatures, &(1u64 << 32).to_ne_bytes(), 0);
    assert!(matches!(steps[..], [_, Step::Close(SessionError::Disagreement { .. })]), "{steps:?}");
}

#[test]
fn every_set_features_reaches_the_owner_also_while_rings_run() {
    let mut lab = Lab::running();
    let features = lab.session.features();
    for _ in 0..2 {
        let told = effects(lab.send(Id::SetFeatures, &features.to_ne_bytes(), 0));
        assert_eq!(told, [Effect::SetFeatures { features, log_all: false }]);
    }
}

#[test]
fn other_features_that_change_while_rings_run_are_reported() {
    let mut lab = Lab::running();
    let steps = lab.send(Id::SetFeatures, &(lab.session.features() & !(1 << 15)).to_ne_bytes(), 0);
    let Step::Warn(notice) = &steps[0] else { panic!("{steps:?}") };
    assert_eq!(notice.what, Matter::FeaturesChangedWhileRunning { bits: 1 << 15 });
    assert!(notice.to_string().starts_with("SET_FEATURES (2): "), "{notice}");
    assert_eq!(lab.session.stats().odd, 1);
}

#[test]
fn losing_protocol_features_enables_running_rings() {
    let mut lab = Lab::running();
    lab.send(Id::SetVringEnable, &state(1, 0), 0);
    let told = effects(lab.send(Id::SetFeatures, &(1u64 << 32).to_ne_bytes(), 0));
    assert!(told.contains(&Effect::EnableRing { index: 1, enabled: true }), "{told:?}");
}

#[test]
fn an_unknown_message_is_refused_and_the_connection_goes_on() {
    let mut lab = Lab::agreed();
    for id in [26, 27, 33, 44, 1000, u32::MAX] {
        let steps = lab.send_raw(id, PLAIN, &[1, 2, 3], 2);
        assert_eq!(refusal(&steps), &Refusal::Unknown);
        assert_eq!(steps.len(), 1);
        let steps = lab.send_raw(id, NEED_REPLY, &[], 0);
        let sent =
            steps.iter().find_map(|step| if let Step::Send(bytes) = step { Some(bytes) } else { None });
        assert_eq!(sent, Some(&[message(id, 5, &1u64.to_ne_bytes())].concat()));
    }
    assert_eq!(lab.session.stats().unknown, 12);
    assert_eq!(lab.session.stats().refused(), 12);
    assert_eq!(reply_u64(Id::GetFeatures, &lab.send(Id::GetFeatures, &[], 0)), FEATURES);
}

#[test]
fn messages_of_features_not_negotiated_are_refused() {
    let mut lab = Lab::with(config());
    lab.send(Id::SetProtocolFeatures, &protocol_feature::REPLY_ACK.to_ne_bytes(), 0);
    let u64_ = 1500u64.to_ne_bytes();
    let cases: [(Id, &[u8], u32, u32); 8] = [
        (Id::SetLogBase, &[1; 16], 1, 1),
        (Id::SendRarp, &u64_, 0, 2),
        (Id::NetSetMtu, &u64_, 0, 4),
        (Id::SetBackendReqFd, &[], 1, 5),
        (Id::ResetDevice, &[], 0, 13),
        (Id::AddMemReg, &[0; 40], 1, 15),
        (Id::RemMemReg, &[0; 40], 0, 15),
        (Id::SetStatus, &u64_, 0, 16),
    ];
    for (id, payload, fds, bit) in cases {
        let steps = lab.ask(id, payload, fds);
        assert_eq!(refusal(&steps), &Refusal::NotNegotiated(bit), "{id:?}");
        assert_eq!(reply_u64(id, &steps), 1, "{id:?}");
    }
    assert_eq!(lab.session.stats().not_negotiated, 8);
}
