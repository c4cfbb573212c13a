//! Resets, status, MTU, announcements, configuration space, the back-end's channel.

use super::*;

/// QEMU 7.2 sets status 0 and asks for the bases afterwards.
#[test]
fn status_zero_stops_rings_and_keeps_their_bases() {
    let mut lab = Lab::running();
    (lab.owner.bases[0], lab.owner.bases[1]) = (66, 71);
    let told = effects(lab.send(Id::SetStatus, &0u64.to_ne_bytes(), 0));
    assert_eq!(told, [Effect::StopRing { index: 0 }, Effect::StopRing { index: 1 }, Effect::Reset]);
    for (index, base) in [(0, 66), (1, 71)] {
        let steps = lab.send(Id::GetVringBase, &state(index, 0), 0);
        assert_eq!(reply(Id::GetVringBase, &steps), state(index, base));
    }
    assert_eq!(effects(lab.send(Id::SetStatus, &0u64.to_ne_bytes(), 0)), [], "nothing left to stop");
    assert_eq!(lab.session.regions().len(), 1, "memory stays");
    assert!(lab.session.rings().next().unwrap().enabled);
}

#[test]
fn status_is_kept_and_told() {
    let mut lab = Lab::agreed();
    for status in [0x8u64, 0xf, 0x80] {
        assert_eq!(reply_u64(Id::SetStatus, &lab.ask(Id::SetStatus, &status.to_ne_bytes(), 0)), 0);
        assert_eq!(reply_u64(Id::GetStatus, &lab.send(Id::GetStatus, &[], 0)), status);
    }
    let steps = lab.ask(Id::SetStatus, &0x100u64.to_ne_bytes(), 0);
    assert_eq!(refusal(&steps), &Refusal::Status(0x100));
    assert_eq!(lab.session.status(), 0x80);
}

/// QEMU sends neither memory nor error fds again after RESET_DEVICE.
#[test]
fn reset_device_forgets_rings_but_not_memory() {
    let mut lab = Lab::running();
    lab.send(Id::SetStatus, &0xfu64.to_ne_bytes(), 0);
    let steps = lab.ask(Id::ResetDevice, &[], 0);
    assert_eq!(reply_u64(Id::ResetDevice, &steps), 0);
    assert_eq!(effects(steps), [Effect::StopRing { index: 0 }, Effect::StopRing { index: 1 }, Effect::Reset]);
    assert_eq!(lab.session.regions().len(), 1);
    assert_eq!(lab.session.status(), 0);
    let ring = lab.session.rings().next().unwrap();
    assert_eq!(ring, RingView { index: 0, size: None, base: 0, enabled: false, running: false });
    lab.send(Id::SetVringKick, &0u64.to_ne_bytes(), 1);
    assert!(lab.owner.rings[0].is_none(), "size and addresses are needed again");
}

#[test]
fn reset_owner_disables_and_stops() {
    let mut lab = Lab::running();
    let told = effects(lab.send(Id::ResetOwner, &[], 0));
    assert_eq!(told.last(), Some(&Effect::Reset));
    assert!(lab.session.rings().all(|ring| !ring.running && !ring.enabled));
}

#[test]
fn mtu_is_held_to_its_limits() {
    let mut lab = Lab::agreed();
    for mtu in [68u64, 1400, 9000] {
        let steps = lab.ask(Id::NetSetMtu, &mtu.to_ne_bytes(), 0);
        assert_eq!(reply_u64(Id::NetSetMtu, &steps), 0);
        assert_eq!(effects(steps), [Effect::SetMtu(mtu as u16)]);
    }
    for mtu in [0u64, 67, 9001, 65536 + 1400, u64::MAX] {
        let steps = lab.ask(Id::NetSetMtu, &mtu.to_ne_bytes(), 0);
        assert_eq!(refusal(&steps), &Refusal::Mtu { mtu, min: 68, max: 9000 });
    }
    lab.refuse_after = Some(0);
    assert_eq!(reply_u64(Id::NetSetMtu, &lab.ask(Id::NetSetMtu, &1400u64.to_ne_bytes(), 0)), 1);
}

/// The address is in memory order, and comes before memory.
#[test]
fn announcements_carry_the_mac_address() {
    let mut lab = Lab::agreed();
    let told = effects(lab.send(Id::SendRarp, &[0x52, 0x54, 0, 0x12, 0x34, 0x56, 0, 0], 0));
    assert_eq!(told, [Effect::SendRarp([0x52, 0x54, 0, 0x12, 0x34, 0x56])]);
}

#[test]
fn the_backends_channel_is_one_fd() {
    let mut lab = Lab::agreed();
    let steps = lab.ask(Id::SetBackendReqFd, &[], 1);
    assert_eq!(reply_u64(Id::SetBackendReqFd, &steps), 0);
    assert_eq!(effects(steps), [Effect::SetBackendChannel(Fd(0))]);
    for fds in [0, 2] {
        let steps = lab.ask(Id::SetBackendReqFd, &[], fds);
        assert_eq!(refusal(&steps), &Refusal::FdCount { count: fds as usize });
    }
}

fn config_request(offset: u32, size: u32, bytes: usize) -> Vec<u8> {
    let mut payload = [offset.to_ne_bytes(), size.to_ne_bytes(), [0; 4]].concat();
    payload.resize(12 + bytes, 0);
    payload
}

#[test]
fn the_configuration_space_is_read_in_parts() {
    let mut lab = Lab::agreed();
    let steps = lab.send(Id::GetConfig, &config_request(6, 4, 4), 0);
    assert_eq!(reply(Id::GetConfig, &steps)[12..], [6, 7, 8, 9]);
    let steps = lab.send(Id::GetConfig, &config_request(0, 12, 12), 0);
    assert_eq!(reply(Id::GetConfig, &steps).len(), 24);
}

/// vhost-user: GET_CONFIG. An error is an empty payload.
#[test]
fn what_is_outside_the_configuration_space_is_answered_by_nothing() {
    let mut lab = Lab::agreed();
    for payload in [config_request(10, 4, 4), config_request(u32::MAX, u32::MAX, 4), config_request(0, 4, 8)]
    {
        let steps = lab.send(Id::GetConfig, &payload, 0);
        assert!(reply(Id::GetConfig, &steps).is_empty());
        assert!(matches!(refusal(&steps), Refusal::Config { how: "read", .. }));
    }
    let steps = lab.ask(Id::SetConfig, &config_request(0, 4, 4), 0);
    assert_eq!(refusal(&steps), &Refusal::Config { offset: 0, end: 4, how: "written" });
}
