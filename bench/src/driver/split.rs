//! A split virtqueue (VIRTIO 1.3 §2.7), the driver's side.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use super::shared::Words;
use super::{Buffer, LINE, Ring, RingError, RingOptions, Used};
use crate::mapping::Mapping;
use crate::session::Place;

const DESC_WRITE: u64 = 2;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;
/// Entries of a line.
const DESCS_PER_LINE: u16 = (LINE / 16) as u16;
const AVAIL_PER_LINE: u16 = (LINE / 2) as u16;

/// One ring.
#[derive(Debug)]
pub struct Split {
    size: u16,
    /// Address; length, flags, next.
    desc: Words<AtomicU64>,
    avail_idx: Words<AtomicU16>,
    avail: Words<AtomicU16>,
    used_event: Words<AtomicU16>,
    used_flags: Words<AtomicU16>,
    used_idx: Words<AtomicU16>,
    /// Id, length.
    used: Words<AtomicU32>,
    avail_event: Words<AtomicU16>,
    options: RingOptions,
    /// The used entry that stands for several buffers, as long as not all of them are taken: the last one.
    batch: Option<Used>,
    posted: u16,
    exposed: u16,
    taken: u16,
    /// Which buffers the device has.
    held: Box<[bool]>,
}

impl Split {
    #[inline(always)]
    fn device_index(&self) -> u16 {
        u16::from_le(self.used_idx.at(0).load(Ordering::Acquire))
    }
}

impl Split {
    /// The used entry that is due.
    #[inline(always)]
    fn entry(&self) -> Result<Used, RingError> {
        let at = 2 * usize::from(self.taken);
        let id = u32::from_le(self.used.at(at).load(Ordering::Relaxed));
        let len = u32::from_le(self.used.at(at + 1).load(Ordering::Relaxed));
        if id >= self.size.into() { Err(RingError::NotHeld(id)) } else { Ok(Used { id: id as u16, len }) }
    }

    /// The buffer that is due (VIRTIO 1.3 §2.7.9): entries of those before the one that is named are not written.
    fn next_in_order(&mut self) -> Result<Used, RingError> {
        let last = match self.batch {
            Some(last) => last,
            None => self.entry()?,
        };
        let due = self.taken & (self.size - 1);
        self.batch = (last.id != due).then_some(last);
        Ok(if last.id == due { last } else { Used { id: due, len: 0 } })
    }
}

impl Ring for Split {
    const FEATURES: u64 = 0;
    const BASE: u32 = 0;

    fn open(memory: &Arc<Mapping>, place: &Place, options: RingOptions) -> Self {
        let size = usize::from(place.size);
        let n = u64::from(place.size);
        let it = Self {
            size: place.size,
            desc: Words::new(memory, place.desc, 2 * size),
            avail_idx: Words::new(memory, place.avail + 2, 1),
            avail: Words::new(memory, place.avail + 4, size),
            used_event: Words::new(memory, place.avail + 4 + 2 * n, 1),
            used_flags: Words::new(memory, place.used, 1),
            used_idx: Words::new(memory, place.used + 2, 1),
            used: Words::new(memory, place.used + 4, 2 * size),
            avail_event: Words::new(memory, place.used + 4 + 8 * n, 1),
            options,
            batch: None,
            posted: 0,
            exposed: 0,
            taken: 0,
            held: vec![false; size].into(),
        };
        // With EVENT_IDX the flag has no meaning: an index that was just passed is reached last.
        let flags = if options.event_idx { 0 } else { AVAIL_NO_INTERRUPT };
        memory.store_u16(place.avail, flags);
        it.used_event.at(0).store(u16::MAX.to_le(), Ordering::Relaxed);
        it.used_idx.at(0).store(0, Ordering::Relaxed);
        it.avail_idx.at(0).store(0, Ordering::Release);
        it
    }

    #[inline(always)]
    fn ready(&self, n: u16) -> bool {
        self.device_index().wrapping_sub(self.taken) >= n
    }

    #[inline(always)]
    fn take(&mut self, into: &mut [Used]) -> Result<usize, RingError> {
        let used = self.device_index().wrapping_sub(self.taken);
        if used > self.in_flight() {
            return Err(RingError::TooMany { used, in_flight: self.in_flight() });
        }
        let count = usize::from(used).min(into.len());
        for entry in &mut into[..count] {
            *entry = if self.options.in_order { self.next_in_order()? } else { self.entry()? };
            match self.held.get_mut(usize::from(entry.id)) {
                Some(held) if *held => *held = false,
                _ => return Err(RingError::NotHeld(entry.id.into())),
            }
            self.taken = self.taken.wrapping_add(1);
        }
        if self.options.event_idx && count > 0 {
            self.used_event.at(0).store(self.taken.wrapping_sub(1).to_le(), Ordering::Relaxed);
        }
        Ok(count)
    }

    #[inline(always)]
    fn prepare(&self, n: u16) {
        // Descriptors lie in the order of buffers, which is nearly that of the ring.
        let mut at = 0;
        while at < n {
            self.desc.prefetch_write(2 * usize::from(self.posted.wrapping_add(at)));
            at += DESCS_PER_LINE;
        }
        self.avail.prefetch_write(self.posted.into());
        self.avail.prefetch_write(self.posted.wrapping_add(n.min(AVAIL_PER_LINE)).into());
    }

    #[inline(always)]
    fn post(&mut self, buffer: Buffer) {
        let at = 2 * usize::from(buffer.id);
        let flags = if buffer.write { DESC_WRITE } else { 0 };
        self.desc.at(at).store(buffer.address.to_le(), Ordering::Relaxed);
        self.desc.at(at + 1).store((u64::from(buffer.len) | flags << 32).to_le(), Ordering::Relaxed);
        self.avail.at(self.posted.into()).store(buffer.id.to_le(), Ordering::Relaxed);
        self.held[usize::from(buffer.id)] = true;
        self.posted = self.posted.wrapping_add(1);
        debug_assert!(self.in_flight() <= self.size);
    }

    #[inline(always)]
    fn expose(&mut self) -> bool {
        let (old, new) = (self.exposed, self.posted);
        if old == new {
            return false;
        }
        self.avail_idx.at(0).store(new.to_le(), Ordering::Release);
        self.exposed = new;
        // VIRTIO 1.3 §2.7.13.4.1: the index is visible before the device's wish is read.
        fence(Ordering::SeqCst);
        if self.options.event_idx {
            let event = u16::from_le(self.avail_event.at(0).load(Ordering::Relaxed));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            u16::from_le(self.used_flags.at(0).load(Ordering::Relaxed)) & USED_NO_NOTIFY == 0
        }
    }

    #[inline(always)]
    fn in_flight(&self) -> u16 {
        self.posted.wrapping_sub(self.taken)
    }
}
