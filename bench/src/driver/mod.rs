//! A driver of virtqueues that is made to be fast: it polls, works in bursts, and keeps out of the device's way.
//!
//! | file | what |
//! |---|---|
//! | `shared` | words and buffers in memory that the device shares; the only unsafe code |
//! | `split`, `packed` | the two forms of a ring (VIRTIO 1.3 §2.7, §2.8) |
//! | `layout` | where rings and buffers lie in guest memory |
//! | `model` | a small device that both are tested against |
//!
//! One descriptor per buffer, buffers named by a number below the ring's size. Descriptors are written anew for every
//! packet, as every driver does it. Pure but for the memory: no thread, no fd, no clock. Not here: packets and what is
//! measured (`load`).
#![deny(clippy::undocumented_unsafe_blocks)]

use std::sync::Arc;

use crate::mapping::Mapping;
use crate::session::Place;

mod layout;
#[cfg(test)]
mod model;
mod packed;
mod shared;
mod split;

pub use layout::{Layout, LayoutOptions, RINGS, RX, TX};
pub use packed::Packed;
pub use shared::{Buffers, LINE, ticks, ticks_per_second};
pub use split::Split;

/// Buffers that are taken back at once, at most.
pub const BURST_MAX: usize = 64;

/// A buffer that the device has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// Which one.
    pub id: u16,
    /// Bytes that the device says to have written.
    pub len: u32,
}

/// A buffer for the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Its number, below the ring's size; it must not be with the device.
    pub id: u16,
    /// Guest address.
    pub address: u64,
    /// Length, bytes.
    pub len: u32,
    /// The device writes it.
    pub write: bool,
}

/// What the device did wrong. The ring cannot be used any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// More was used than was available.
    #[error("the device has used {used} buffers, and had {in_flight}")]
    TooMany {
        /// Buffers used since the last look.
        used: u16,
        /// Buffers that the device had.
        in_flight: u16,
    },
    /// A buffer was used that the device does not have.
    #[error("the device has used buffer {0}, which it did not have")]
    NotHeld(u32),
}

/// What was negotiated about rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingOptions {
    /// VIRTIO_F_EVENT_IDX: notifications go by index.
    pub event_idx: bool,
    /// VIRTIO_F_IN_ORDER: one used entry may stand for several buffers, up to the one that it names. Buffers must be posted
    /// in the order of their numbers, starting with 0.
    pub in_order: bool,
}

/// The driver's side of one virtqueue.
pub trait Ring: Sized {
    /// Feature bits that it needs.
    const FEATURES: u64;
    /// Where an empty one goes on (vhost-user: VRING_BASE).
    const BASE: u32;

    /// An empty ring at a place, formatted. The device is told to send no calls.
    fn open(memory: &Arc<Mapping>, place: &Place, options: RingOptions) -> Self;

    /// Whether the next `n` buffers have been used. Reads one word that the device writes.
    fn ready(&self, n: u16) -> bool;

    /// Takes used buffers back, as many as there are and `into` has room for; returns how many.
    fn take(&mut self, into: &mut [Used]) -> Result<usize, RingError>;

    /// Asks for the memory that the next `n` [`Self::post`] will write.
    fn prepare(&self, n: u16);

    /// Puts a buffer into the ring; [`Self::expose`] shows it to the device, if the ring's form needs that.
    fn post(&mut self, buffer: Buffer);

    /// Shows the device what was posted; whether it wants to be notified.
    fn expose(&mut self) -> bool;

    /// Buffers that the device has.
    fn in_flight(&self) -> u16;
}
