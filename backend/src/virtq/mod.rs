//! Split and packed virtqueues (VIRTIO 1.3 §2.7, §2.8) as pure state machines over `memory`'s rings: indices, descriptor chains,
//! notification suppression both ways. No fd and no thread in here: who was kicked, and who makes a call, is
//! decided by the owner. Buffers are guest-physical segments; `memory` turns them into something usable.
//!
//! Chains are completed in ring order. vhost-user has one base index per ring, which cannot describe holes.
#![forbid(unsafe_code)]

mod burst;
mod chain;
mod lookahead;
pub(crate) mod notify;
mod packed;
mod packed_burst;
mod packed_resync;
pub(crate) mod place;
mod queue;
mod split;
#[cfg(test)]
pub(crate) mod tests;

pub use crate::memory::ring::RingError;
pub use burst::{Access, Single};
pub use chain::{Chain, ChainError, MAX_CHAIN, Segment};
pub use lookahead::Purpose;
pub use packed::PackedQueue;
pub use queue::{PopError, Queue, QueueConfig, QueueError};
pub use split::SplitQueue;
