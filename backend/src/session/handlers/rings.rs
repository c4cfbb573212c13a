//! Rings (vhost-user: Ring states). A ring starts when the last of size, addresses, kick and memory has come, in
//! whatever order, and stops by GET_VRING_BASE; `state` has the picture.
#![forbid(unsafe_code)]

use super::{Answer, Call, Fault, Todo};
use crate::session::Session;
use crate::session::effect::Effect;
use crate::session::error::Refusal;
use crate::session::message::{
    RING_SIZE_MAX, VRING_ADDR_F_LOG, VRING_INDEX_MASK, VRING_NO_FD, VringAddr, VringState,
};
use crate::session::state::RingAddresses;

pub(in crate::session) fn set_vring_num<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    let VringState { index, num } = call.body()?;
    let index = session.ring_index(index.into())?;
    // VIRTIO 1.3 §2.7, §2.8.10.1
    let fits = num.is_power_of_two() || (session.agreed.packed() && num != 0);
    if !fits || num > RING_SIZE_MAX {
        return Err(Refusal::RingSize(num).into());
    }
    let ring = &mut session.rings[usize::from(index)];
    if ring.running && ring.size != Some(num as u16) {
        return Err(Refusal::RingRunning(index).into());
    }
    ring.size = Some(num as u16);
    session.todo.push_back(Todo::Start(index));
    Ok(Answer::Ack)
}

/// Split rings: a 16-bit index. Packed ones: two of 15 bits, each with its wrap counter (vhost-user: Vring descriptor
/// indices for packed virtqueues).
pub(in crate::session) fn set_vring_base<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    let VringState { index, num } = call.body()?;
    let index = session.ring_index(index.into())?;
    if num > u16::MAX.into() && !session.agreed.packed() {
        return Err(Refusal::RingBase(num).into());
    }
    let ring = &mut session.rings[usize::from(index)];
    if ring.running {
        return Err(Refusal::RingRunning(index).into());
    }
    ring.base = Some(num);
    Ok(Answer::Ack)
}

/// On a running ring this is how logging of its used ring goes on and off.
pub(in crate::session) fn set_vring_addr<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    let wire: VringAddr = call.body()?;
    let index = session.ring_index(wire.index.into())?;
    let addresses = RingAddresses {
        desc_user: wire.desc_user,
        avail_user: wire.avail_user,
        used_user: wire.used_user,
        log_used: (wire.flags & VRING_ADDR_F_LOG != 0).then_some(wire.log_guest),
    };
    session.todo.push_back(Todo::Update(index, addresses));
    session.todo.push_back(Todo::Start(index));
    Ok(Answer::Ack)
}

/// Stops the ring and tells where it stood. Of a stopped ring, where it would start: what SET_VRING_BASE said, or
/// where it was stopped. A kick that waited for the rest is dropped too: the ring needs a new one.
pub(in crate::session) fn get_vring_base<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    let VringState { index, .. } = call.body()?;
    let index = session.ring_index(index.into())?;
    session.rings[usize::from(index)].kick = None;
    session.todo.push_back(Todo::Stop(index));
    Ok(Answer::Base(index))
}

/// The message that starts a ring. On a running ring it means: go on with this eventfd instead. The ring is stopped
/// and started again where it stood, which also looks at it once, so no kick between the two eventfds is lost.
pub(in crate::session) fn set_vring_kick<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    let (index, fd) = vring_fd(session, call)?;
    session.rings[usize::from(index)].kick = Some(fd);
    session.todo.push_back(Todo::Stop(index));
    session.todo.push_back(Todo::Start(index));
    if session.cfg.postcopy_resend && session.postcopy.loses_faults(index) {
        session.todo.push_back(Todo::Simple(Effect::PostcopyWake));
    }
    Ok(Answer::Ack)
}

pub(in crate::session) fn set_vring_call<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    let (index, fd) = vring_fd(session, call)?;
    session.todo.push_back(Todo::Simple(Effect::SetCall { index, fd }));
    Ok(Answer::Ack)
}

pub(in crate::session) fn set_vring_err<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    let (index, fd) = vring_fd(session, call)?;
    session.todo.push_back(Todo::Simple(Effect::SetErr { index, fd }));
    Ok(Answer::Ack)
}

/// Comes early (before SET_FEATURES, before memory) and repeats. The owner hears of it while the ring runs; before,
/// it is noted for the start.
pub(in crate::session) fn set_vring_enable<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    let VringState { index, num } = call.body()?;
    let index = session.ring_index(index.into())?;
    if num > 1 {
        return Err(Refusal::EnableValue(num).into());
    }
    session.rings[usize::from(index)].enabled = num == 1;
    session.todo.push_back(Todo::Enable(index));
    Ok(Answer::Ack)
}

/// Index and fd of SET_VRING_KICK/CALL/ERR. The no-fd bit and the number of fds must agree.
fn vring_fd<F: 'static>(session: &Session<F>, call: &mut Call<F>) -> Result<(u16, Option<F>), Fault> {
    let value: u64 = call.body()?;
    let index = session.ring_index(value & VRING_INDEX_MASK)?;
    let expected = usize::from(value & VRING_NO_FD == 0);
    if call.fds.len() != expected {
        return Err(Refusal::FdCount { count: call.fds.len() }.into());
    }
    Ok((index, call.fds.pop()))
}
