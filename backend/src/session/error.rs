//! What can be wrong with what a front-end sends, in three grades: a [`Refusal`] concerns one message and the
//! connection goes on; a [`Notice`] is its form for the log; a [`SessionError`] ends the connection.
//!
//! The rule: a message is refused where the front-end either learns of it (a non-zero acknowledgement) or loses no
//! more than what it asked for. The connection is closed where the stream cannot be trusted any more, where the
//! front-end waits for an answer that cannot be made, or where going on would corrupt the guest in silence.
#![forbid(unsafe_code)]

use super::postcopy::Phase;
use std::fmt;

/// Why this connection has to be closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The low two bits of the flags.
    #[error("message {request} has flags {flags:#x}: not protocol version 1")]
    Version {
        /// The message's number.
        request: u32,
        /// Its flags.
        flags: u32,
    },
    /// Replies come from us on this socket, not to us.
    #[error("message {request} is marked as a reply, but nothing was asked")]
    UnexpectedReply {
        /// The message's number.
        request: u32,
    },
    /// More payload than any message has.
    #[error("message {request} announces {size} bytes of payload")]
    Oversized {
        /// The message's number.
        request: u32,
        /// Bytes announced.
        size: u32,
    },
    /// More file descriptors in one read than any message has.
    #[error("{count} file descriptors came in one read")]
    TooManyFds {
        /// How many.
        count: usize,
    },
    /// File descriptors in the middle of a message.
    #[error("{count} file descriptors came where no message begins")]
    FdsWithoutMessage {
        /// How many.
        count: usize,
    },
    /// The owner read on although the session did not want input.
    #[error("{bytes} bytes wait to be handled: too many")]
    Flooded {
        /// How many bytes there would be.
        bytes: usize,
    },
    /// A refused message whose sender waits for a payload that cannot be made up.
    #[error("{name} cannot be answered: {why}")]
    Unanswerable {
        /// The message's name.
        name: &'static str,
        /// What is wrong with it.
        why: Refusal,
    },
    /// A refused message that changes what both sides mean, from a sender that waits for no acknowledgement.
    #[error("{name} is refused, and the front-end would not learn of it: {why}")]
    Disagreement {
        /// The message's name.
        name: &'static str,
        /// What is wrong with it.
        why: Refusal,
    },
    /// Rings write to guest memory, the front-end migrates it, and there is nowhere to log.
    #[error("the new dirty log cannot be used while rings run with LOG_ALL: {why}")]
    LogLost {
        /// The owner's reason.
        why: String,
    },
    /// A ring that the front-end believes stopped may still be written to.
    #[error("ring {index} cannot be stopped: {why}")]
    StopFailed {
        /// Which ring.
        index: u16,
        /// The owner's reason.
        why: String,
    },
}

/// Why one message was not obeyed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No row in the table.
    #[error("unknown message")]
    Unknown,
    /// A row whose handler belongs to a part that is not offered.
    #[error("{0} is not offered")]
    NotOffered(&'static str),
    /// The protocol feature (its bit) that the message belongs to was not negotiated.
    #[error("protocol feature bit {0} was not negotiated")]
    NotNegotiated(u32),
    /// Payload length against the table's rule.
    #[error("{size} bytes of payload do not fit this message")]
    PayloadSize {
        /// Bytes that came.
        size: usize,
    },
    /// Number of fds against the table's rule, or against the no-fd bit.
    #[error("{count} file descriptors do not fit this message")]
    FdCount {
        /// How many came.
        count: usize,
    },
    /// No such ring, or one of a queue pair that was not negotiated.
    #[error("ring index {index} is beyond the {rings} rings of this session")]
    RingIndex {
        /// Index that came.
        index: u64,
        /// How many rings there are.
        rings: u16,
    },
    /// VIRTIO 1.3 §2.7, §2.8.10.1: at most 32768, and a power of two if the ring is split.
    #[error("ring size {0} is not between 1 and 32768, or no power of two in a split ring")]
    RingSize(u32),
    /// Does not fit the 16 bits of a split ring's index.
    #[error("ring base {0:#x} is no index of a split ring")]
    RingBase(u32),
    /// Neither 0 nor 1.
    #[error("{0} is neither enable (1) nor disable (0)")]
    EnableValue(u32),
    /// The ring runs; it has to be stopped by GET_VRING_BASE first.
    #[error("ring {0} is running")]
    RingRunning(u16),
    /// Bits that were not offered.
    #[error("bits {0:#x} were not offered")]
    FeatureBits(u64),
    /// Logging is asked for, but the log was refused.
    #[error("logging is asked for, but the last SET_LOG_BASE was refused")]
    NoLog,
    /// Length zero, or beyond the end of the address space.
    #[error("a log of {size:#x} bytes at offset {offset:#x} is impossible")]
    LogArea {
        /// Bytes.
        size: u64,
        /// Offset in the file, bytes.
        offset: u64,
    },
    /// Table without a region.
    #[error("the table has no region")]
    EmptyTable,
    /// Two regions with the same guest or user address.
    #[error("two regions have the same address ({guest_phys:#x} in the guest)")]
    DuplicateRegion {
        /// Guest physical address of the second one.
        guest_phys: u64,
    },
    /// No memory slot left.
    #[error("all {0} memory slots are taken")]
    SlotsFull(u64),
    /// REM_MEM_REG of what is not there.
    #[error("no region is at {guest_phys:#x} with this size and user address")]
    UnknownRegion {
        /// Guest physical address asked for.
        guest_phys: u64,
    },
    /// Outside what VIRTIO allows or the uplink can carry.
    #[error("MTU {mtu} is not between {min} and {max}")]
    Mtu {
        /// Asked for, bytes.
        mtu: u64,
        /// Least, bytes.
        min: u16,
        /// Most, bytes.
        max: u16,
    },
    /// Outside the configuration space, or written.
    #[error("bytes {offset}..{end} of the configuration space cannot be {how}")]
    Config {
        /// First byte.
        offset: u32,
        /// First byte after.
        end: u64,
        /// "read" or "written".
        how: &'static str,
    },
    /// More than the eight bits of a device status.
    #[error("{0:#x} is no device status")]
    Status(u64),
    /// Postcopy messages in an order that makes no sense.
    #[error("it does not fit here: postcopy is {phase}")]
    PostcopyPhase {
        /// Where it is.
        phase: Phase,
    },
    /// QEMU's acknowledgement of our addresses, with something else than 0.
    #[error("the front-end could not use our addresses: {0:#x}")]
    PostcopyAck(u64),
    /// The owner could not do it.
    #[error("{0}")]
    Owner(String),
}

/// Something refused or odd, for the owner to log (with a rate limit).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The message's number.
    pub request: u32,
    /// The message's name; "message" if it is unknown.
    pub name: &'static str,
    /// What is the matter.
    pub what: Matter,
}

/// What a [`Notice`] is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Matter {
    /// The message was not obeyed.
    Refused(Refusal),
    /// The message was obeyed, but a ring that it made ready did not start.
    RingNotStarted {
        /// Which ring.
        index: u16,
        /// The owner's reason.
        why: String,
    },
    /// LOG_ALL came while rings ran without a log.
    LoggingWithoutLog,
    /// A ring with everything else it needs waits for the dirty log.
    RingWaitsForLog {
        /// Which ring.
        index: u16,
    },
    /// POSTCOPY_END without a postcopy migration.
    EndWithoutPostcopy,
    /// Features other than LOG_ALL changed while rings ran.
    FeaturesChangedWhileRunning {
        /// The bits that changed.
        bits: u64,
    },
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}): ", self.name, self.request)?;
        match &self.what {
            Matter::Refused(why) => write!(f, "refused: {why}"),
            Matter::RingNotStarted { index, why } => write!(f, "ring {index} does not start: {why}"),
            Matter::LoggingWithoutLog => {
                write!(f, "rings run with LOG_ALL but no log: their writes are not logged until SET_LOG_BASE")
            }
            Matter::RingWaitsForLog { index } => {
                write!(f, "ring {index} does not start before SET_LOG_BASE, since LOG_ALL is set")
            }
            Matter::EndWithoutPostcopy => write!(f, "there is no postcopy migration to end"),
            Matter::FeaturesChangedWhileRunning { bits } => {
                write!(f, "feature bits {bits:#x} changed while rings run; these keep their old ones")
            }
        }
    }
}

/// Counters of one session. They only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionStats {
    /// Whole messages taken up.
    pub messages: u64,
    /// Replies and acknowledgements sent.
    pub replies: u64,
    /// Effects handed to the owner.
    pub effects: u64,
    /// Refused: unknown message numbers.
    pub unknown: u64,
    /// Refused: known messages of parts not offered or not negotiated.
    pub not_negotiated: u64,
    /// Refused: wrong payload length.
    pub bad_size: u64,
    /// Refused: wrong number of fds.
    pub bad_fds: u64,
    /// Refused: a value or an order that makes no sense.
    pub bad_value: u64,
    /// Refused by the owner.
    pub refused_by_owner: u64,
    /// Odd, but obeyed.
    pub odd: u64,
}

impl SessionStats {
    /// All messages that were refused, whatever the cause.
    pub fn refused(&self) -> u64 {
        self.unknown
            + self.not_negotiated
            + self.bad_size
            + self.bad_fds
            + self.bad_value
            + self.refused_by_owner
    }

    pub(super) fn count_refusal(&mut self, why: &Refusal) {
        let counter = match why {
            Refusal::Unknown => &mut self.unknown,
            Refusal::NotOffered(_) | Refusal::NotNegotiated(_) => &mut self.not_negotiated,
            Refusal::PayloadSize { .. } => &mut self.bad_size,
            Refusal::FdCount { .. } => &mut self.bad_fds,
            Refusal::Owner(_) => &mut self.refused_by_owner,
            _ => &mut self.bad_value,
        };
        *counter += 1;
    }
}
