//! Postcopy: ADVISE, LISTEN and END, each once for each queue pair, and the acknowledgement of our addresses.
//!
//! What the phases are, and how memory messages are answered in them, is in `session::postcopy`.
#![forbid(unsafe_code)]

use super::{Answer, Call, Fault, Todo};
use crate::session::Session;
use crate::session::error::{Matter, Refusal, SessionError};
use crate::session::message::RequestId as Id;
use crate::session::postcopy::{Phase, Step};

/// Asks for a userfaultfd. Comes again for each pair; QEMU keeps the last one, so all are the same.
pub(in crate::session) fn advise<F: 'static>(
    session: &mut Session<F>,
    _: &mut Call<F>,
) -> Result<Answer, Fault> {
    match session.postcopy.phase {
        Phase::Idle | Phase::Advised => {
            session.todo.push_back(Todo::Postcopy(Step::Advise));
            Ok(Answer::Userfaultfd)
        }
        phase => Err(Refusal::PostcopyPhase { phase }.into()),
    }
}

/// From here on, memory that comes has not arrived.
pub(in crate::session) fn listen<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    match session.postcopy.phase {
        Phase::Advised => session.todo.push_back(Todo::Postcopy(Step::Listen)),
        Phase::Listening => {}
        // Its sender waits for the code, so it is refused by that.
        phase => return refuse_by_code(session, call, Refusal::PostcopyPhase { phase }),
    }
    Ok(Answer::Code(0))
}

/// The migration is over, one way or the other. May come at any time.
pub(in crate::session) fn end<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    if session.postcopy.phase != Phase::Idle {
        session.todo.push_back(Todo::Postcopy(Step::End));
    } else if !session.postcopy.ended {
        session.warn(call, Matter::EndWithoutPostcopy);
    }
    Ok(Answer::Code(0))
}

/// Whether a memory message is QEMU's acknowledgement in postcopy: 8 bytes without fds.
pub(in crate::session) fn is_acknowledgement<F: 'static>(session: &Session<F>, call: &Call<F>) -> bool {
    session.postcopy.is_on() && call.payload.len() == size_of::<u64>() && call.fds.is_empty()
}

/// How a message is answered that is not obeyed: the sender of memory waits for an answer in postcopy, whatever it says.
pub(in crate::session) fn answer_to_refused<F: 'static>(session: &Session<F>, call: &Call<F>) -> Answer {
    let memory = [Id::SetMemTable, Id::AddMemReg].iter().any(|id| *id as u32 == call.request);
    match memory && !is_acknowledgement(session, call) {
        true => session.postcopy.answer_to_memory(),
        false => Answer::Ack,
    }
}

/// The front-end has taken our addresses in. QEMU says it by the number of the last memory message: SET_MEM_TABLE,
/// ADD_MEM_REG, REM_MEM_REG, or 0 if no slot has changed. It waits for no answer.
pub(in crate::session) fn acknowledged<F: 'static>(
    session: &mut Session<F>,
    call: &mut Call<F>,
) -> Result<Answer, Fault> {
    let value: u64 = call.body()?;
    if value != 0 {
        let why = Refusal::PostcopyAck(value);
        return Err(Fault::Close(SessionError::Disagreement { name: call.name, why }));
    }
    match session.postcopy.phase {
        Phase::Listening | Phase::AwaitingAck => {
            session.todo.push_back(Todo::Postcopy(Step::Arm));
            Ok(Answer::Ack)
        }
        // The guest restarts its device, or memory is unplugged: no slot was added, nothing new is to be armed.
        Phase::Armed if [Id::None as u32, Id::RemMemReg as u32].contains(&call.request) => Ok(Answer::Ack),
        phase => Err(Refusal::PostcopyPhase { phase }.into()),
    }
}

fn refuse_by_code<F: 'static>(
    session: &mut Session<F>,
    call: &Call<F>,
    why: Refusal,
) -> Result<Answer, Fault> {
    session.refused(call.request, call.name, why);
    Ok(Answer::Code(1))
}
