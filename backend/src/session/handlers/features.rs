//! Features, protocol features, number of queue pairs.
#![forbid(unsafe_code)]

use zerocopy::IntoBytes;

use super::{Answer, Call, Fault, Todo};
use crate::session::Session;
use crate::session::error::{Matter, Refusal};
use crate::session::message::virtio_feature::LOG_ALL;
use crate::session::state::LogState;

pub(in crate::session) fn get_features<F: 'static>(
    session: &mut Session<F>,
    _: &mut Call<F>,
) -> Result<Answer, Fault> {
    Ok(Answer::Payload(session.cfg.features.as_bytes().to_vec()))
}

/// May come again at any time, also while rings run: that is how LOG_ALL goes on and off.
///
/// Bits that were not offered are refused; a front-end that waits for no acknowledgement would go on with another
/// header layout or ring layout than ours, so its connection is closed. The same holds for LOG_ALL after a log that
/// could not be used: without an error a migration would lose pages.
pub(in crate::session) fn set_features<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    let features: u64 = call.body()?;
    let foreign = features & !session.cfg.features;
    if foreign != 0 {
        return Err(call.refuse_or_close(Refusal::FeatureBits(foreign)));
    }
    let running = session.rings.iter().any(|ring| ring.running);
    if features & LOG_ALL != 0 {
        match session.agreed.log {
            LogState::Refused => return Err(call.refuse_or_close(Refusal::NoLog)),
            LogState::None if running => session.warn(call, Matter::LoggingWithoutLog),
            LogState::None | LogState::Present => {}
        }
    }
    let changed = (features ^ session.agreed.features) & !LOG_ALL;
    if running && changed != 0 {
        session.warn(call, Matter::FeaturesChangedWhileRunning { bits: changed });
    }
    session.todo.push_back(Todo::Features(features));
    Ok(Answer::Ack)
}

pub(in crate::session) fn get_protocol_features<F: 'static>(
    session: &mut Session<F>,
    _: &mut Call<F>,
) -> Result<Answer, Fault> {
    Ok(Answer::Payload(session.cfg.protocol_features.as_bytes().to_vec()))
}

/// Repeats for each queue pair. The last one counts, and it may itself ask for the acknowledgement it introduces.
pub(in crate::session) fn set_protocol_features<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    let bits: u64 = call.body()?;
    let foreign = bits & !session.cfg.protocol_features;
    if foreign != 0 {
        return Err(call.refuse_or_close(Refusal::FeatureBits(foreign)));
    }
    session.agreed.protocol_features = bits;
    Ok(Answer::Ack)
}

/// Queue pairs, not rings: QEMU compares the answer with its `queues=`.
pub(in crate::session) fn get_queue_num<F: 'static>(
    session: &mut Session<F>,
    _: &mut Call<F>,
) -> Result<Answer, Fault> {
    Ok(Answer::Payload(u64::from(session.cfg.queue_pairs).as_bytes().to_vec()))
}
