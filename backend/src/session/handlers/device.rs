//! The device as a whole: owner, resets, status.
//!
//! No reset forgets guest memory, the log, call or error fds: QEMU sends none of them again afterwards.
#![forbid(unsafe_code)]

use zerocopy::IntoBytes;

use super::{Answer, Call, Fault, Todo};
use crate::session::Session;
use crate::session::error::Refusal;

/// Marks the start of a session; nothing depends on it.
pub(in crate::session) fn set_owner<F: 'static>(
    _: &mut Session<F>,
    _: &mut Call<F>,
) -> Result<Answer, Fault> {
    Ok(Answer::Ack)
}

/// Deprecated, since back-ends disagree on it. By the specification's advice it disables all rings, and no more.
pub(in crate::session) fn reset_owner<F: 'static>(
    session: &mut Session<F>,
    _: &mut Call<F>,
) -> Result<Answer, Fault> {
    session.stop_all();
    for ring in &mut session.rings {
        ring.enabled = false;
    }
    session.todo.push_back(Todo::Reset);
    Ok(Answer::Ack)
}

/// Everything about rings goes back to the beginning, and the status to 0; who owns the device stays.
pub(in crate::session) fn reset_device<F: 'static>(
    session: &mut Session<F>,
    _: &mut Call<F>,
) -> Result<Answer, Fault> {
    session.stop_all();
    session.forget_rings = true;
    session.agreed.status = 0;
    session.todo.push_back(Todo::Reset);
    Ok(Answer::Ack)
}

/// Zero resets the device: running rings stop. QEMU 7.2 asks for their bases *after* that, so these stay, as do the
/// sizes, addresses and enables; a ring needs a new kick to run again.
pub(in crate::session) fn set_status<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    let value: u64 = call.body()?;
    session.agreed.status = u8::try_from(value).map_err(|_| Refusal::Status(value))?;
    if value == 0 {
        let any = session.rings.iter().any(|ring| ring.running);
        session.stop_all();
        if any {
            session.todo.push_back(Todo::Reset);
        }
    }
    Ok(Answer::Ack)
}

pub(in crate::session) fn get_status<F: 'static>(
    session: &mut Session<F>,
    _: &mut Call<F>,
) -> Result<Answer, Fault> {
    Ok(Answer::Payload(u64::from(session.agreed.status).as_bytes().to_vec()))
}
