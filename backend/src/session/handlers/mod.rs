//! One function per message, by topic. This file: what they have in common.
//!
//! A handler checks values, changes what is the session's own, and queues [`Todo`]s for what needs the owner. It
//! says how the message is to be answered; the engine in `session` answers when the last todo is done.
#![forbid(unsafe_code)]

pub(super) mod device;
pub(super) mod features;
pub(super) mod log;
pub(super) mod memory;
pub(super) mod net;
pub(super) mod postcopy;
pub(super) mod rings;

use zerocopy::FromBytes;

use super::effect::Effect;
use super::error::{Refusal, SessionError};
use super::postcopy::Step as PostcopyStep;
use super::state::RingAddresses;
use crate::memory::RegionSpec;

/// A message on its way through its handler.
pub(super) struct Call<F> {
    pub request: u32,
    pub name: &'static str,
    pub payload: Vec<u8>,
    pub fds: Vec<F>,
    /// The front-end waits for an acknowledgement, and REPLY_ACK allows one.
    pub wants_ack: bool,
}

impl<F> Call<F> {
    /// The payload, or its beginning, as `T`.
    pub fn body<T: FromBytes>(&self) -> Result<T, Fault> {
        match T::read_from_prefix(&self.payload) {
            Ok((body, _)) => Ok(body),
            Err(_) => Err(Refusal::PayloadSize { size: self.payload.len() }.into()),
        }
    }

    /// The one fd of a message that has exactly one.
    pub fn fd(&mut self) -> Result<F, Fault> {
        self.fds.pop().ok_or(Fault::Refuse(Refusal::FdCount { count: 0 }))
    }

    /// Refuse a change of meaning: by acknowledgement if there is one, else by closing, since a front-end that goes
    /// on in another belief than ours corrupts the guest.
    pub fn refuse_or_close(&self, why: Refusal) -> Fault {
        match self.wants_ack {
            true => Fault::Refuse(why),
            false => Fault::Close(SessionError::Disagreement { name: self.name, why }),
        }
    }
}

/// How a message is answered when all it asked for is done.
pub(super) enum Answer {
    /// By the general acknowledgement, if one is wanted.
    Ack,
    /// By this payload.
    Payload(Vec<u8>),
    /// GET_VRING_BASE of this ring.
    Base(u16),
    /// SET_LOG_BASE with this payload; with zeros if refused.
    Log(Vec<u8>),
    /// SET_MEM_TABLE or ADD_MEM_REG in postcopy: the regions, with our addresses in place of the front-end's.
    Mapped,
    /// POSTCOPY_ADVISE: nothing but the userfaultfd.
    Userfaultfd,
    /// This u64, whether asked for or not; 1 if refused.
    Code(u64),
}

/// Why a handler does not do what it was told.
pub(super) enum Fault {
    /// This message only.
    Refuse(Refusal),
    /// The connection is over.
    Close(SessionError),
}

impl From<Refusal> for Fault {
    fn from(why: Refusal) -> Self {
        Fault::Refuse(why)
    }
}

/// Something for the owner, as queued by handlers. Turned into an [`Effect`] when its turn comes, since what it
/// says may depend on the outcome of the one before.
pub(super) enum Todo<F> {
    MemTable(Vec<(RegionSpec, F)>),
    AddRegion(RegionSpec, F),
    /// A step of postcopy; what it changes is in `session::postcopy`.
    Postcopy(PostcopyStep),
    RemRegion(RegionSpec),
    LogBase {
        size: u64,
        offset: u64,
        fd: F,
    },
    Features(u64),
    /// If the ring has all it needs and does not run.
    Start(u16),
    /// If the ring runs.
    Stop(u16),
    /// If the ring runs; else the addresses are only noted.
    Update(u16, RingAddresses),
    /// If the ring runs.
    Enable(u16),
    Reset,
    /// An effect whose outcome changes nothing in the session.
    Simple(Effect<F>),
}
