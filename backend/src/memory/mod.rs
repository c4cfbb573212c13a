//! Guest memory: the one place that owns pointers into a guest (rule 2 of the design).
//!
//! ```text
//!   fd ──► Mapping ──┐                    ┌─ read / write    copies of a few bytes, volatile
//!   fd ──► Mapping ──┼──► GuestMemory ────┼─ push_iovecs     buffers for the kernel
//!   fd ──► DirtyLog ─┘    (snapshot)      └─ RingView        a queue's rings; PackedView for packed ones
//!                             │
//!                      ResidencyMap: is the page here? (None = yes, one predictable branch)
//! ```
//!
//! Everything handed out is a copy, an [`IoVec`] that only the kernel follows, or a bounds-checked element
//! access of [`ring::RingView`] or [`packed_ring::PackedView`]. A page that another process still has to supply is never touched: the caller
//! gets a [`MissingRange`] and parks. What is *not* here: virtqueue logic (`virtq`), the protocol's view of the
//! memory table (`session`), and who supplies missing pages.
//!
//! Guest memory changes while we look at it, so no `&[u8]` into it exists. Loads and stores are volatile or
//! atomic; every field is read once into our own copy.

mod copy;
mod dirty;
mod error;
mod guest;
mod hint;
mod iovec;
pub mod layout;
mod mapping;
mod moves;
mod nearby;
pub mod packed_ring;
mod residency;
pub mod ring;
mod ring_parts;
pub mod sigbus;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod transfer;

pub use dirty::{DirtyLog, LOG_PAGE_SIZE};
pub use error::{AccessError, LayoutError, MapError, MissingRange};
pub use guest::{GuestMemory, MAX_REGIONS};
pub use iovec::{IOVECS_CAPACITY, IoVec, IoVecStorage, IoVecs, MAX_IOVECS, gather, scatter, scatter_each};
pub use layout::RegionSpec;
pub use mapping::Mapping;
pub use nearby::Nearby;
pub use residency::ResidencyMap;
pub use transfer::{Place, Source};
