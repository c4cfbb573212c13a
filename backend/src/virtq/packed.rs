//! A packed virtqueue (VIRTIO 1.3 §2.8), device side: two places in one ring, used descriptors, and when to notify whom.
//!
//! ```text
//!         published        used              avail
//!  ───────────┼──────────────┼─────────────────┼───────────────────►  round the ring, wrap counters flip at its end
//!    guest    │  pushed, not │  popped, being  │  available if the
//!    sees it  │  yet visible │  worked on      │  flags say so
//! ```
//! From `published` to `avail` there are never more descriptors than the ring has, or the driver is broken.
//!
//! **Completion** is in the order of the ring, so each used descriptor takes the place of its chain's first one. The first of a batch
//! is kept back until [`PackedQueue::publish`], since the driver looks there first: it then sees the batch at once (§2.8.9).
//! Where buffers are only read and VIRTIO_F_IN_ORDER was negotiated, one used descriptor with the id of the last
//! chain stands for the whole batch (§2.8.8); DPDK's and Linux' drivers count that way.
//!
//! **Where a queue begins.** The base has both places (vhost-user: Vring descriptor indices for packed virtqueues). Ours are equal
//! when a queue is stopped. DPDK speaks of the available one only and leaves the upper half zero, which no ring begins
//! with; then the used place is the same. If they differ, chains were taken and never given back: they come again. A base from
//! before a crash is found out by the first look at the ring (`packed_resync`).
#![forbid(unsafe_code)]

use super::chain::{Chain, PackedWalkError};
use super::notify::{self, PackedWords};
use super::packed_resync::Ring;
use super::place::{self, Place};
use super::queue::{PopError, QueueConfig, QueueError};
use super::split::pop_error;
use crate::memory::packed_ring::{AVAIL, NEXT, PackedAccess, PackedView, USED, WRITE, Word};
use crate::memory::{GuestMemory, MissingRange};

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

/// Looks at a ring before its base is not believed: the driver may be making chains available at that moment.
const LOOKS: u32 = 8;

// `place` uses nothing of the crate, and has its own.
const _: () = assert!(AVAIL == place::AVAIL && USED == place::USED);

/// A used descriptor that is not in the ring yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kept {
    pub(super) slot: u32,
    pub(super) word: Word,
}

/// A packed virtqueue in guest memory.
#[derive(Debug)]
pub struct PackedQueue {
    pub(super) ring: PackedView,
    pub(super) avail: Place,
    pub(super) used: Place,
    published: Place,
    /// The first used descriptor since the last [`Self::publish`].
    pub(super) kept: Option<Kept>,
    /// Chains popped and pushed, free-running.
    pub(super) popped: u32,
    pub(super) pushed: u32,
    /// Descriptors that were popped, and that the guest has not seen used yet.
    pub(super) taken: u32,
    /// Chains in work of more than one descriptor: which (as `popped` counts), and how many descriptors. Oldest first.
    pub(super) long: VecDeque<(u32, u32)>,
    /// The used place at the last decision on a call; None before the first.
    decided: Option<Place>,
    /// Descriptors published since then.
    undecided: u32,
    /// The ring is wholly present, and was looked at once.
    ready: bool,
    synced: bool,
    resynced: bool,
    /// What the device event structure says about kicks, once we wrote it.
    kicks_enabled: Option<bool>,
    pub(super) config: QueueConfig,
    /// One used descriptor stands for a batch.
    pub(super) batch: bool,
    #[cfg(debug_assertions)]
    pub(super) ids: VecDeque<u16>,
}

impl PackedQueue {
    /// A queue that begins at `config.base`. Checks addresses and alignment; touches no guest memory.
    pub fn new(mem: &GuestMemory, config: &QueueConfig) -> Result<Self, QueueError> {
        let ring = PackedView::new(mem, &config.layout())?;
        let size = ring.size();
        let bad = QueueError::PackedBase { base: config.base, size: config.size };
        let avail = Place::parse(config.base as u16, size).ok_or(bad)?;
        let begin = match (config.base >> 16) as u16 {
            0 => avail,
            used => Place::parse(used, size).ok_or(bad)?,
        };
        Ok(Self {
            ring,
            avail: begin,
            used: begin,
            published: begin,
            kept: None,
            popped: 0,
            pushed: 0,
            taken: 0,
            long: VecDeque::with_capacity(size as usize / 2 + 1),
            decided: None,
            undecided: 0,
            ready: false,
            synced: false,
            resynced: begin != avail,
            kicks_enabled: None,
            config: *config,
            // Chains that are passed over count as written completely.
            batch: config.in_order && config.transmit,
            #[cfg(debug_assertions)]
            ids: VecDeque::new(),
        })
    }

    /// Goes on with the same ring in a new snapshot: another memory table, log or residency. On an error the queue keeps
    /// the old one.
    pub fn remap(&mut self, mem: &GuestMemory) -> Result<(), QueueError> {
        let mut ring = PackedView::new(mem, &self.config.layout())?;
        if self.avail != self.published && ring.access().is_err() {
            return Err(QueueError::Busy);
        }
        self.ring = ring;
        // The next look finds out whether it is present.
        self.ready = false;
        self.kicks_enabled = None;
        Ok(())
    }

    /// SET_VRING_ADDR with another log address, or with the log flag on or off. A packed ring is logged where it is, as
    /// long as the memory has a log.
    pub fn set_log_used(&mut self, log_used: Option<u64>) {
        self.config.log_used = log_used;
    }

    /// Entries.
    #[inline]
    pub fn size(&self) -> u16 {
        self.ring.size() as u16
    }

    /// The configuration, with the base of the beginning.
    pub fn config(&self) -> &QueueConfig {
        &self.config
    }

    /// True if the queue did not begin at the base: its halves differed, or the ring said something else.
    pub fn resynced(&self) -> bool {
        self.resynced
    }

    /// Before a use of the ring: whether all its pages are present. One predictable branch.
    #[inline(always)]
    pub(super) fn look(&mut self) -> Result<(), MissingRange> {
        if self.ready { Ok(()) } else { self.prepare() }
    }

    #[cold]
    fn prepare(&mut self) -> Result<(), MissingRange> {
        let ring = Ring(self.ring.access()?);
        if !std::mem::replace(&mut self.synced, true)
            && !self.batch
            && !(0..LOOKS).any(|_| ring.may_stand_at(self.avail))
            && let Some(place) = ring.place()
        {
            (self.avail, self.used, self.published) = (place, place, place);
            self.resynced = true;
        }
        self.ready = true;
        Ok(())
    }

    /// Both places for GET_VRING_BASE: that of the first chain the guest has not been given back. Publish before; chains
    /// in work are given up and come again.
    #[inline]
    pub fn base(&self) -> u32 {
        let place = u32::from(self.published.off_wrap());
        place | place << 16
    }

    /// Chains popped and not pushed yet.
    #[inline]
    pub fn in_flight(&self) -> u16 {
        self.popped.wrapping_sub(self.pushed) as u16
    }

    /// Chains that can be popped: only whether there is one, since nothing in the ring counts them.
    #[inline]
    pub fn available(&mut self) -> Result<u16, QueueError> {
        self.look()?;
        let ring = self.ring.access_known();
        Ok(ring.word(self.avail.slot).matches(AVAIL | USED, self.avail.available()).into())
    }

    /// Whether a look at the ring would find a chain, or that the ring is missing. One load; cheap enough to be asked again
    /// and again.
    #[inline]
    pub fn may_have_more(&mut self) -> bool {
        self.available().map_or(true, |count| count > 0)
    }

    /// Takes the next chain. False: there is none.
    #[inline]
    pub fn pop(&mut self, mem: &GuestMemory, chain: &mut Chain) -> Result<bool, PopError> {
        self.look().map_err(PopError::Missing)?;
        let ring = self.ring.access_known();
        let first = ring.word(self.avail.slot);
        if !first.matches(AVAIL | USED, self.avail.available()) {
            return Ok(false);
        }
        let room = ring.size() - self.taken;
        if room == 0 {
            return Err(self.overrun());
        }
        let walk = chain.walk_packed(ring, mem, &self.config, self.avail.slot, first, room);
        let (count, result) = match walk {
            Ok(count) => (count, Ok(true)),
            Err(PackedWalkError::Bad(count, why)) => (count, Err(PopError::Bad { head: chain.head(), why })),
            Err(PackedWalkError::Missing(missing)) => return Err(PopError::Missing(missing)),
            Err(PackedWalkError::Overrun) => return Err(self.overrun()),
        };
        if count > 1 {
            self.long.push_back((self.popped, count));
        }
        self.avail = self.avail.forth(count, self.ring.size());
        self.popped = self.popped.wrapping_add(1);
        self.taken += count;
        #[cfg(debug_assertions)]
        self.ids.push_back(chain.head());
        result
    }

    #[cold]
    fn overrun(&self) -> PopError {
        pop_error(QueueError::Overrun { taken: self.taken as u16, size: self.size() })
    }

    /// Gives back the last `n` chains popped, as if they had not been: for receive buffers that were not needed.
    #[inline]
    pub fn unpop(&mut self, n: u16) {
        assert!(n <= self.in_flight(), "more chains given back than were taken");
        let first = self.popped.wrapping_sub(n.into());
        let mut count = u32::from(n);
        while let Some((which, descriptors)) = self.long.back()
            && which.wrapping_sub(first) < u32::from(n)
        {
            count += descriptors - 1;
            self.long.pop_back();
        }
        self.avail = self.avail.back(count, self.ring.size());
        self.popped = first;
        self.taken -= count;
        #[cfg(debug_assertions)]
        self.ids.truncate(self.ids.len() - usize::from(n));
    }

    /// Completes the oldest chain in work, with id `head`, into which `len` bytes were written. Visible with
    /// [`Self::publish`].
    #[inline]
    pub fn push(&mut self, head: u16, len: u32) {
        debug_assert_ne!(self.in_flight(), 0, "a chain completed that was not taken");
        #[cfg(debug_assertions)]
        assert_eq!(self.ids.pop_front(), Some(head), "chains must be completed in ring order");
        let count = self.length_of_oldest();
        // NEXT says nothing to drivers here (§2.8.6). Whoever looks at a stopped ring can tell by it that the slots
        // behind are the rest of this chain.
        let next = if count > 1 { NEXT } else { 0 };
        let write = if len == 0 { 0 } else { WRITE };
        let word = Word::new(len, head, self.used.used() | write | next);
        match &mut self.kept {
            None => self.kept = Some(Kept { slot: self.used.slot, word }),
            Some(kept) if self.batch => kept.word = kept.word.with_id(head),
            // A chain was taken, so the ring is present; `remap` sees to it that it stays so.
            Some(_) => self.ring.access_known().store(self.used.slot, word),
        }
        self.used = self.used.forth(count, self.ring.size());
        self.pushed = self.pushed.wrapping_add(1);
    }

    /// Descriptors of the oldest chain in work.
    #[inline]
    fn length_of_oldest(&mut self) -> u32 {
        match self.long.front() {
            Some((which, count)) if *which == self.pushed => {
                let count = *count;
                self.long.pop_front();
                count
            }
            _ => 1,
        }
    }

    /// Makes all that was pushed visible to the guest, and logs it.
    #[inline]
    pub fn publish(&mut self) {
        let Some(kept) = self.kept.take() else { return };
        let ring = self.ring.access_known();
        ring.store(kept.slot, kept.word);
        let count = self.published.until(self.used, ring.size());
        ring.log_slots(self.published.slot, count);
        self.taken -= count;
        self.undecided = self.undecided.saturating_add(count);
        self.published = self.used;
    }

    /// Decides whether the guest wants a call for what was published since the last decision (§2.8.10).
    #[inline]
    pub fn needs_call(&mut self) -> bool {
        if self.undecided == 0 {
            return false;
        }
        let new = self.published;
        let old = self.decided.replace(new);
        let count = std::mem::take(&mut self.undecided);
        if self.look().is_err() {
            return true;
        }
        let ring = self.ring.access_known();
        notify::is_wanted_packed(&ring, self.config.event_idx, ring.size(), old, count)
    }

    /// Asks the guest not to kick, while we look at the ring anyway.
    #[inline]
    pub fn disable_kicks(&mut self) {
        if self.kicks_enabled == Some(false) || self.look().is_err() {
            return;
        }
        let ring = self.ring.access_known();
        ring.store_device_event(0, notify::EVENT_DISABLE);
        self.kicks_enabled = Some(false);
    }

    /// Asks the guest to kick at the next chain it makes available, before we stop looking. True: there are chains to
    /// pop already, do not stop (§2.8.21.2).
    #[inline]
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        self.look()?;
        let ring = self.ring.access_known();
        notify::ask_packed(&ring, self.config.event_idx, self.avail);
        self.kicks_enabled = Some(true);
        self.available().map(|count| count > 0)
    }

    /// Counts the chains taken, free-running: names the first that nobody has taken.
    #[inline]
    pub fn first_waiting(&self) -> u16 {
        self.popped as u16
    }
}

/// The device's side.
impl PackedWords for PackedAccess<'_> {
    #[inline(always)]
    fn store_event(&self, off_wrap: u16, flags: u16) {
        self.store_device_event(off_wrap, flags);
    }
    #[inline(always)]
    fn event(&self) -> (u16, u16) {
        self.driver_event()
    }
    #[inline(always)]
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}
