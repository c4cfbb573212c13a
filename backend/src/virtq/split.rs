//! A split virtqueue, device side: indices, used elements, and when to notify whom.
//!
//! ```text
//!        published      next_used        next_avail       avail_cached
//!  ──────────┼──────────────┼─────────────────┼────────────────┼──────►  free-running u16
//!   guest    │  pushed, not │  popped, being  │  known to be   │  perhaps more
//!   sees it  │  yet visible │  worked on      │  available     │  in avail.idx
//! ```
//! `avail.idx - published` is never above the queue size, or the driver is broken.
//!
//! **Where a queue begins.** `QueueConfig::base` counts available chains; the used index is not sent. As chains are completed in
//! order, both are equal in a queue that was stopped properly. After a crash they are not: the base may be that of an
//! orderly stop long ago, or count chains that were taken but never given back. What the guest saw is `used.idx`, so the
//! first look at the ring (not the set-up: memory may not have arrived then) takes both indices from there, as DPDK and
//! libvhost-user do; [`SplitQueue::resynced`] tells. The guest owns that field, but can harm only its own ring with it.
#![forbid(unsafe_code)]

use super::chain::{Chain, WalkError};
use super::notify::{self, Words};
use super::queue::{PopError, QueueConfig, QueueError};
use crate::memory::GuestMemory;
use crate::memory::ring::{RingAccess, RingView};
use std::sync::atomic::{Ordering, fence};

/// A free-running 16-bit index in a word of its own.
///
/// Compilers load short fields that lie side by side at once, or a short field with its neighbour. A load that is wider than
/// a store it meets waits until that has left the store buffer, behind all earlier ones: to guest memory, some 100 ns each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Index(u32);

impl Index {
    #[inline]
    pub(super) fn get(self) -> u16 {
        self.0 as u16
    }
}

impl From<u16> for Index {
    #[inline]
    fn from(index: u16) -> Self {
        Self(index.into())
    }
}

/// A split virtqueue in guest memory.
#[derive(Debug)]
pub struct SplitQueue {
    pub(super) ring: RingView,
    pub(super) next_avail: Index,
    pub(super) avail_cached: Index,
    pub(super) next_used: Index,
    published: Index,
    /// The used index at the last decision on a call; None before the first.
    decided: Option<u16>,
    /// Chains published since then.
    undecided: u32,
    synced: bool,
    /// What `used.flags` says about kicks, once we wrote it.
    kicks_enabled: Option<bool>,
    pub(super) config: QueueConfig,
    resynced: bool,
    #[cfg(debug_assertions)]
    pub(super) in_work: std::collections::VecDeque<u16>,
}

impl SplitQueue {
    /// A queue that begins at `config.base`. Checks addresses and alignment; touches no guest memory.
    pub fn new(mem: &GuestMemory, config: &QueueConfig) -> Result<Self, QueueError> {
        Ok(Self {
            ring: RingView::new(mem, &config.layout())?,
            next_avail: Index::from(config.base as u16),
            avail_cached: Index::from(config.base as u16),
            next_used: Index::from(config.base as u16),
            published: Index::from(config.base as u16),
            decided: None,
            undecided: 0,
            synced: false,
            kicks_enabled: None,
            config: *config,
            resynced: false,
            #[cfg(debug_assertions)]
            in_work: std::collections::VecDeque::new(),
        })
    }

    /// Goes on with the same ring in a new snapshot: another memory table, log or residency. On an error the queue keeps
    /// the old one.
    pub fn remap(&mut self, mem: &GuestMemory) -> Result<(), QueueError> {
        let mut ring = RingView::new(mem, &self.config.layout())?;
        if self.next_avail.get() != self.published.get() && ring.access().is_err() {
            return Err(QueueError::Busy);
        }
        self.ring = ring;
        // The next chain is taken after another look at the ring, which finds out whether it is present.
        self.avail_cached = self.next_avail;
        self.kicks_enabled = None;
        Ok(())
    }

    /// SET_VRING_ADDR with another log address, or with the log flag on or off. Takes effect if the memory has a log.
    pub fn set_log_used(&mut self, log_used: Option<u64>) {
        self.config.log_used = log_used;
        self.ring.set_log_used(log_used);
    }

    /// Entries.
    #[inline]
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// The configuration, with the base of the beginning.
    pub fn config(&self) -> &QueueConfig {
        &self.config
    }

    /// True if `used.idx` differed from the base at the first look, and both indices were taken from there.
    pub fn resynced(&self) -> bool {
        self.resynced
    }

    /// Index of the first chain the guest has not been given back, for GET_VRING_BASE. Publish before; chains in work are
    /// given up and come again.
    #[inline]
    pub fn base(&self) -> u16 {
        self.published.get()
    }

    /// Chains popped and not pushed yet.
    #[inline]
    pub fn in_flight(&self) -> u16 {
        self.next_avail.get().wrapping_sub(self.next_used.get())
    }

    /// Chains that can be popped. Looks at `avail.idx` only when all it knew of are popped.
    #[inline]
    pub fn available(&mut self) -> Result<u16, QueueError> {
        if self.avail_cached.get() == self.next_avail.get() {
            self.refill()?;
        }
        Ok(self.avail_cached.get().wrapping_sub(self.next_avail.get()))
    }

    /// Takes the next chain. False: there is none.
    #[inline]
    pub fn pop(&mut self, mem: &GuestMemory, chain: &mut Chain) -> Result<bool, PopError> {
        if self.avail_cached.get() == self.next_avail.get() {
            self.refill().map_err(pop_error)?;
            if self.avail_cached.get() == self.next_avail.get() {
                return Ok(false);
            }
        }
        // Chains are known of, so the ring was present when they were looked for.
        let ring = self.ring.access_known();
        let head = ring.avail_head(self.next_avail.get());
        let Some(first) = ring.descriptor(head) else {
            let size = ring.size();
            return Err(PopError::Broken(QueueError::BadHead { head, size }));
        };
        let result = match chain.walk(ring, mem, self.config.indirect, head, first) {
            Ok(()) => Ok(true),
            Err(WalkError::Bad(why)) => Err(PopError::Bad { head, why }),
            Err(WalkError::Missing(missing)) => return Err(PopError::Missing(missing)),
        };
        self.next_avail = Index::from(self.next_avail.get().wrapping_add(1));
        #[cfg(debug_assertions)]
        self.in_work.push_back(head);
        result
    }

    /// Gives back the last `n` chains popped, as if they had not been: for receive buffers that were not needed.
    #[inline]
    pub fn unpop(&mut self, n: u16) {
        assert!(n <= self.in_flight(), "more chains given back than were taken");
        self.next_avail = Index::from(self.next_avail.get().wrapping_sub(n));
        #[cfg(debug_assertions)]
        self.in_work.truncate(self.in_work.len() - usize::from(n));
    }

    /// Completes the oldest chain in work, `head`, into which `len` bytes were written. Visible with
    /// [`Self::publish`].
    #[inline]
    pub fn push(&mut self, head: u16, len: u32) {
        debug_assert_ne!(self.in_flight(), 0, "a chain completed that was not taken");
        #[cfg(debug_assertions)]
        assert_eq!(self.in_work.pop_front(), Some(head), "chains must be completed in ring order");
        // A chain was taken, so the ring is present; `remap` sees to it that it stays so.
        self.ring.access_known().write_used(self.next_used.get(), u32::from(head), len);
        self.next_used = Index::from(self.next_used.get().wrapping_add(1));
    }

    /// Makes all that was pushed visible to the guest, and logs it.
    #[inline]
    pub fn publish(&mut self) {
        if self.published.get() == self.next_used.get() {
            return;
        }
        self.ring.access_known().store_used_idx(self.published.get(), self.next_used.get());
        self.undecided += u32::from(self.next_used.get().wrapping_sub(self.published.get()));
        self.published = self.next_used;
    }

    /// Decides whether the guest wants a call for what was published since the last decision
    /// (VIRTIO 1.3 §2.7.7.2, §2.7.10).
    #[inline]
    pub fn needs_call(&mut self) -> bool {
        if self.undecided == 0 {
            return false;
        }
        let new = self.published.get();
        let old = self.decided.replace(new);
        let count = std::mem::take(&mut self.undecided);
        let Ok(ring) = self.ring.access() else {
            return true;
        };
        notify::is_wanted(&ring, old, new, count)
    }

    /// Whether a look at the ring would find chains, or find out what is wrong with it. One load; cheap enough to be asked
    /// again and again.
    #[inline]
    pub fn may_have_more(&mut self) -> bool {
        let known = self.avail_cached.get();
        known != self.next_avail.get() || self.ring.access().map_or(true, |ring| ring.avail_idx() != known)
    }

    /// Asks the guest not to kick, while we look at the ring anyway. With EVENT_IDX there is nothing to say: it kicks
    /// once more at most.
    #[inline]
    pub fn disable_kicks(&mut self) {
        if self.kicks_enabled == Some(false) {
            return;
        }
        if !self.config.event_idx {
            let Ok(ring) = self.ring.access() else {
                return;
            };
            ring.store_used_flags(notify::UNWANTED);
        }
        self.kicks_enabled = Some(false);
    }

    /// Asks the guest to kick at the next chain it makes available, before we stop looking. True: there are chains to
    /// pop already, do not stop (VIRTIO 1.3 §2.7.10.1).
    #[inline]
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        self.sync()?;
        let next = self.next_avail.get();
        let ring = self.ring.access()?;
        notify::ask(&ring, self.config.event_idx, next, self.kicks_enabled == Some(true));
        self.kicks_enabled = Some(true);
        self.refill()?;
        Ok(self.avail_cached.get() != self.next_avail.get())
    }

    /// Looks at `avail.idx`.
    pub(super) fn refill(&mut self) -> Result<(), QueueError> {
        self.sync()?;
        let idx = self.ring.access()?.avail_idx();
        let size = self.ring.size();
        let taken = self.next_avail.get().wrapping_sub(self.published.get());
        // A driver has `size` chains out at most, those we have taken included.
        if idx.wrapping_sub(self.next_avail.get()) > size.saturating_sub(taken) {
            let (next, used) = (self.next_avail.get(), self.published.get());
            return Err(QueueError::AvailJump { idx, next, used, size });
        }
        self.avail_cached = Index::from(idx);
        Ok(())
    }

    /// Before the first look at the ring: begin where the guest was left.
    #[inline]
    fn sync(&mut self) -> Result<(), QueueError> {
        if self.synced {
            return Ok(());
        }
        let used = self.ring.access()?.used_idx();
        self.synced = true;
        if used != self.config.base as u16 {
            self.resynced = true;
            let used = Index::from(used);
            (self.next_avail, self.avail_cached, self.next_used, self.published) = (used, used, used, used);
        }
        Ok(())
    }
}

#[cold]
pub(super) fn pop_error(error: QueueError) -> PopError {
    match error {
        QueueError::Missing(missing) => PopError::Missing(missing),
        other => PopError::Broken(other),
    }
}

/// The device's side.
impl Words for RingAccess<'_> {
    #[inline(always)]
    fn store_flags(&self, flags: u16) {
        self.store_used_flags(flags);
    }
    #[inline(always)]
    fn store_event(&self, event: u16) {
        self.store_avail_event(event);
    }
    #[inline(always)]
    fn flags(&self) -> u16 {
        self.avail_flags()
    }
    #[inline(always)]
    fn event(&self) -> Option<u16> {
        self.used_event()
    }
    #[inline(always)]
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}
