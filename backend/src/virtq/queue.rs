//! A virtqueue of either format: what its owner sees. How each works is in `split` and `packed`.
#![forbid(unsafe_code)]

use super::burst::{Access, Single};
use super::chain::{Chain, ChainError};
use super::lookahead::Purpose;
use super::packed::PackedQueue;
use super::split::SplitQueue;
use crate::memory::ring::{RingError, RingLayout};
use crate::memory::{GuestMemory, MissingRange};

/// What the front-end said about a ring. Addresses in the front-end's user addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// VIRTIO_F_RING_PACKED was negotiated.
    pub packed: bool,
    /// Entries, up to 32768 (SET_VRING_NUM); a power of two if the ring is split.
    pub size: u16,
    /// Where to begin (SET_VRING_BASE). Split: index of the first chain to process. Packed: available index with wrap
    /// counter in bits 0-15, used index with wrap counter in bits 16-31 (vhost-user: Vring descriptor indices).
    pub base: u32,
    /// Descriptor table or ring (SET_VRING_ADDR).
    pub desc_user: u64,
    /// Available ring; packed: driver event suppression structure.
    pub avail_user: u64,
    /// Used ring; packed: device event suppression structure.
    pub used_user: u64,
    /// Guest-physical address for logging used-ring writes, if VHOST_VRING_F_LOG is set.
    pub log_used: Option<u64>,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// VIRTIO_F_IN_ORDER was negotiated.
    pub in_order: bool,
    /// It is a transmit ring: its buffers are only read.
    pub transmit: bool,
}

impl QueueConfig {
    /// Where the ring's memory is.
    pub fn layout(&self) -> RingLayout {
        RingLayout {
            packed: self.packed,
            size: self.size,
            desc_user: self.desc_user,
            avail_user: self.avail_user,
            used_user: self.used_user,
            log_used: self.log_used,
            event_idx: self.event_idx,
        }
    }
}

/// Why a ring cannot be used (any more, or yet).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// Size or addresses are wrong.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The available index is further ahead than the queue is long, or went back.
    #[error("available index {idx} with {next} next and {used} used of {size}")]
    AvailJump {
        /// What the guest wrote.
        idx: u16,
        /// The first chain not taken yet.
        next: u16,
        /// Chains that the guest saw completed.
        used: u16,
        /// Entries of the queue.
        size: u16,
    },
    /// An available entry names a descriptor outside the table.
    #[error("available entry {head} in a queue of {size}")]
    BadHead {
        /// What the guest wrote.
        head: u16,
        /// Entries of the queue.
        size: u16,
    },
    /// The base is not in the ring.
    #[error("base {base:#x} in a packed queue of {size}")]
    PackedBase {
        /// What the front-end said.
        base: u32,
        /// Entries of the queue.
        size: u16,
    },
    /// Descriptors were made available in places that the driver was not given back.
    #[error("descriptors available beyond the {size} of the queue, of which {taken} are in work")]
    Overrun {
        /// Descriptors in work.
        taken: u16,
        /// Entries of the queue.
        size: u16,
    },
    /// The ring itself has not arrived: park.
    #[error(transparent)]
    Missing(#[from] MissingRange),
    /// Memory of which pages may be missing was given to a queue with chains in work.
    #[error("the memory table was replaced while chains were in work")]
    Busy,
}

/// Why no chain was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PopError {
    /// The chain is malformed. It counts as popped: give it back with `push(head, 0)`.
    #[error("chain {head}: {why}")]
    Bad {
        /// Its first descriptor.
        head: u16,
        /// What is wrong with it.
        why: ChainError,
    },
    /// Descriptors have not arrived. Nothing was taken: park, then pop again.
    #[error(transparent)]
    Missing(MissingRange),
    /// The ring cannot be used.
    #[error(transparent)]
    Broken(QueueError),
}

/// A virtqueue, device side. Each method does the same for both formats.
#[derive(Debug)]
pub enum Queue {
    /// VIRTIO 1.3 §2.7.
    Split(SplitQueue),
    /// VIRTIO 1.3 §2.8.
    Packed(PackedQueue),
}

/// Calls the same method of whichever queue it is.
macro_rules! forward {
    ($self:ident.$method:ident($($arg:expr),*)) => {
        match $self {
            Self::Split(queue) => queue.$method($($arg),*),
            Self::Packed(queue) => queue.$method($($arg),*),
        }
    };
}

impl Queue {
    /// A queue that begins at `config.base`. Checks addresses and alignment; touches no guest memory.
    pub fn new(mem: &GuestMemory, config: &QueueConfig) -> Result<Self, QueueError> {
        if config.packed {
            PackedQueue::new(mem, config).map(Self::Packed)
        } else {
            SplitQueue::new(mem, config).map(Self::Split)
        }
    }

    /// Goes on with the same ring in a new snapshot: another memory table, log or residency. On an error the queue keeps
    /// the old one.
    #[inline]
    pub fn remap(&mut self, mem: &GuestMemory) -> Result<(), QueueError> {
        forward!(self.remap(mem))
    }

    /// SET_VRING_ADDR with another log address, or with the log flag on or off. Takes effect if the memory has a log.
    #[inline]
    pub fn set_log_used(&mut self, log_used: Option<u64>) {
        forward!(self.set_log_used(log_used))
    }

    /// Entries.
    #[inline]
    pub fn size(&self) -> u16 {
        forward!(self.size())
    }

    /// The configuration, with the base of the beginning.
    #[inline]
    pub fn config(&self) -> &QueueConfig {
        forward!(self.config())
    }

    /// True if the ring itself said at the first look that it was elsewhere than at the base.
    #[inline]
    pub fn resynced(&self) -> bool {
        forward!(self.resynced())
    }

    /// Place of the first chain the guest has not been given back, for GET_VRING_BASE, as in [`QueueConfig::base`]. Publish
    /// before; chains in work are given up and come again.
    #[inline]
    pub fn base(&self) -> u32 {
        match self {
            Self::Split(queue) => queue.base().into(),
            Self::Packed(queue) => queue.base(),
        }
    }

    /// Chains popped and not pushed yet.
    #[inline]
    pub fn in_flight(&self) -> u16 {
        forward!(self.in_flight())
    }

    /// Chains that can be popped. Looks at the ring only when all it knew of are popped.
    #[inline]
    pub fn available(&mut self) -> Result<u16, QueueError> {
        forward!(self.available())
    }

    /// Whether more chains may be there than were taken: a load, for a look that is repeated often. True, too, if only a
    /// closer look can tell.
    #[inline]
    pub fn may_have_more(&mut self) -> bool {
        forward!(self.may_have_more())
    }

    /// Takes the next chain. False: there is none.
    #[inline]
    pub fn pop(&mut self, mem: &GuestMemory, chain: &mut Chain) -> Result<bool, PopError> {
        forward!(self.pop(mem, chain))
    }

    /// Takes chains of one direct descriptor off the ring, up to the first chain of another shape or as many as there is room
    /// for in `out`, and returns how many. 0: [`Self::pop`] knows what the next one is, or that there is none.
    ///
    /// # Errors
    /// The ring is missing or broken, as [`Self::available`] says.
    #[inline]
    pub fn pop_singles(&mut self, access: Access, out: &mut [Single]) -> Result<usize, QueueError> {
        forward!(self.pop_singles(access, out))
    }

    /// Gives back the last `n` chains popped, as if they had not been: for receive buffers that were not needed.
    #[inline]
    pub fn unpop(&mut self, n: u16) {
        forward!(self.unpop(n))
    }

    /// Completes the oldest chain in work, `head`, into which `len` bytes were written. Visible with
    /// [`Self::publish`].
    #[inline]
    pub fn push(&mut self, head: u16, len: u32) {
        forward!(self.push(head, len))
    }

    /// Completes the oldest chains in work, each given by its head and the bytes that were written into it.
    #[inline]
    pub fn push_all(&mut self, chains: impl Iterator<Item = (u16, u32)>) {
        forward!(self.push_all(chains))
    }

    /// Makes all that was pushed visible to the guest, and logs it.
    #[inline]
    pub fn publish(&mut self) {
        forward!(self.publish())
    }

    /// Decides whether the guest wants a call for what was published since the last decision.
    #[inline]
    pub fn needs_call(&mut self) -> bool {
        forward!(self.needs_call())
    }

    /// Asks the guest not to kick, while we look at the ring anyway.
    #[inline]
    pub fn disable_kicks(&mut self) {
        forward!(self.disable_kicks())
    }

    /// Asks the guest to kick at the next chain it makes available, before we stop looking. True: there are chains to
    /// pop already, do not stop.
    #[inline]
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        forward!(self.enable_kicks())
    }

    /// Counts the chains taken, free-running: names the first that nobody has taken.
    #[inline]
    pub fn first_waiting(&self) -> u16 {
        forward!(self.first_waiting())
    }

    /// Asks the CPU for the used elements that the next `n` chains will get.
    #[inline]
    pub fn prefetch_used(&mut self, n: u16) {
        forward!(self.prefetch_used(n))
    }

    /// Asks the CPU for the first lines of the buffer of the chain that is `ahead` places behind the next.
    #[inline]
    pub fn prefetch_buffer(&mut self, mem: &GuestMemory, ahead: u16) {
        forward!(self.prefetch_buffer(mem, ahead))
    }

    /// Calls `visit` with what is missing of the ring, or else of the first `chains_max` chains that wait in it, less the
    /// first `skip`. `chain` is scratch space. Returns the index behind the last chain that was looked at, counted as
    /// [`Self::first_waiting`] does.
    pub fn look_ahead(
        &mut self,
        mem: &GuestMemory,
        skip: u16,
        chains_max: u16,
        chain: &mut Chain,
        visit: impl FnMut(MissingRange, Purpose),
    ) -> u16 {
        forward!(self.look_ahead(mem, skip, chains_max, chain, visit))
    }
}
