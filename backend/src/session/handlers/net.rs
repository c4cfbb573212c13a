//! What only a network device has: MTU, announcements, configuration space; and the channel back to the front-end.
#![forbid(unsafe_code)]

use zerocopy::IntoBytes;

use super::{Answer, Call, Fault, Todo};
use crate::session::Session;
use crate::session::effect::Effect;
use crate::session::error::Refusal;
use crate::session::message::ConfigHead;

/// Least MTU of a device (VIRTIO 1.3 §5.1.4.1), bytes.
pub const MTU_MIN: u16 = 68;

/// The first six bytes in memory are the MAC address. May come before SET_MEM_TABLE, and comes about five times.
pub(in crate::session) fn send_rarp<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    let mac: [u8; 6] = call.body()?;
    session.todo.push_back(Todo::Simple(Effect::SendRarp(mac)));
    Ok(Answer::Ack)
}

pub(in crate::session) fn net_set_mtu<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    let mtu: u64 = call.body()?;
    let max = session.cfg.mtu_max;
    match u16::try_from(mtu) {
        Ok(bytes) if (MTU_MIN..=max).contains(&bytes) => {
            session.todo.push_back(Todo::Simple(Effect::SetMtu(bytes)));
            Ok(Answer::Ack)
        }
        _ => Err(Refusal::Mtu { mtu, min: MTU_MIN, max }.into()),
    }
}

pub(in crate::session) fn set_backend_req_fd<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    let fd = call.fd()?;
    session.todo.push_back(Todo::Simple(Effect::SetBackendChannel(fd)));
    Ok(Answer::Ack)
}

/// vhost-user: an error is answered by an empty payload.
pub(in crate::session) fn get_config<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    let head: ConfigHead = call.body()?;
    let space = session.cfg.config_space.as_ref().map_or(&[][..], |space| space.bytes());
    let start = head.offset as usize;
    let end = start.saturating_add(head.size as usize);
    let asked = call.payload.len() - size_of::<ConfigHead>();
    match space.get(start..end) {
        Some(bytes) if head.size as usize == asked => {
            let mut payload = head.as_bytes().to_vec();
            payload.extend_from_slice(bytes);
            Ok(Answer::Payload(payload))
        }
        _ => {
            let why = Refusal::Config { offset: head.offset, end: end as u64, how: "read" };
            session.refused(call.request, call.name, why);
            Ok(Answer::Payload(Vec::new()))
        }
    }
}

/// Nothing of a modern network device's configuration space can be written (VIRTIO 1.3 §5.1.4).
pub(in crate::session) fn set_config<F: 'static>(
    _: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    let ConfigHead { offset, size, .. } = call.body()?;
    Err(Refusal::Config { offset, end: u64::from(offset) + u64::from(size), how: "written" }.into())
}
