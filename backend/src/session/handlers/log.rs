//! The dirty log (vhost-user: Migration). Switching it on is SET_FEATURES with LOG_ALL, ring by ring it is the log
//! flag of SET_VRING_ADDR; here is only where the log is.
#![forbid(unsafe_code)]

use super::{Answer, Call, Fault, Todo};
use crate::session::Session;
use crate::session::error::Refusal;
use crate::session::message::LogArea;

/// Comes again when the log grows, also while rings run and write to the old one.
///
/// The reply repeats the log description, 16 bytes. QEMU takes any length; newer versions of the `vhost` crate's
/// front-end wait for exactly these 16 (vhost #342), and hang on the empty reply that DPDK sends (vhost #217).
/// There is no room for an error: a log that cannot be used is answered by zeros, and the LOG_ALL that follows
/// is refused.
pub(in crate::session) fn set_log_base<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    let LogArea { size, offset } = call.body()?;
    if size == 0 || offset.checked_add(size).is_none() {
        return Err(Refusal::LogArea { size, offset }.into());
    }
    let fd = call.fd()?;
    session.todo.push_back(Todo::LogBase { size, offset, fd });
    Ok(Answer::Log(std::mem::take(&mut call.payload)))
}
