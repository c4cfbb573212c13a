//! A packed virtqueue (VIRTIO 1.3 §2.8), the driver's side.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};

use super::shared::Words;
use super::{Buffer, LINE, Ring, RingError, RingOptions, Used};
use crate::mapping::Mapping;
use crate::session::Place;

const DESC_WRITE: u16 = 1 << 1;
const DESC_AVAIL: u16 = 1 << 7;
const DESC_USED: u16 = 1 << 15;
/// Event suppression flags (VIRTIO 1.3 §2.8.14).
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;
const EVENT_WRAP: u16 = 1 << 15;
const DESCS_PER_LINE: u16 = (LINE / 16) as u16;
/// VIRTIO_F_RING_PACKED.
const FEATURE: u64 = 1 << 34;

/// A place in the ring: index, and wrap counter as a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct At {
    index: u16,
    wrap: bool,
}

impl At {
    #[inline(always)]
    fn forward(self, n: u16, size: u16) -> Self {
        let index = self.index + n;
        if index >= size { Self { index: index - size, wrap: !self.wrap } } else { Self { index, ..self } }
    }
}

/// One ring.
#[derive(Debug)]
pub struct Packed {
    size: u16,
    /// Address; length, id, flags.
    desc: Words<AtomicU64>,
    /// Offset and wrap counter; flags.
    device_event: Words<AtomicU16>,
    posted: At,
    taken: At,
    in_flight: u16,
    /// The second word of the first descriptor that the device has not been shown. The others behind it are written; it
    /// cannot see them before this one.
    first: Option<(u16, u64)>,
    in_order: bool,
    /// The used descriptor that stands for several buffers, as long as not all of them are taken: the last one.
    batch: Option<Used>,
    /// Descriptors since the last [`Ring::expose`].
    added: u16,
    /// Which buffers the device has.
    held: Box<[bool]>,
}

impl Packed {
    /// The second word of a descriptor if it is used when the driver comes there with this wrap counter.
    #[inline(always)]
    fn used_at(&self, at: At) -> Option<u64> {
        let word = u64::from_le(self.desc.at(2 * usize::from(at.index) + 1).load(Ordering::Acquire));
        let flags = (word >> 48) as u16;
        let both = if at.wrap { DESC_AVAIL | DESC_USED } else { 0 };
        (flags & (DESC_AVAIL | DESC_USED) == both).then_some(word)
    }
}

impl Packed {
    /// The buffer that is due, if it is used.
    #[inline(always)]
    fn next(&mut self) -> Option<Used> {
        if !self.in_order {
            return self.used_at(self.taken).map(used_of);
        }
        // VIRTIO 1.3 §2.8.8: descriptors of those before the one that is named are not written.
        let last = self.batch.or_else(|| self.used_at(self.taken).map(used_of))?;
        let due = self.taken.index;
        self.batch = (last.id != due).then_some(last);
        Some(if last.id == due { last } else { Used { id: due, len: 0 } })
    }
}

/// A used descriptor's second word. VIRTIO 1.3 §2.8.5: without the flag there is no length.
#[inline(always)]
fn used_of(word: u64) -> Used {
    let wrote = (word >> 48) as u16 & DESC_WRITE != 0;
    Used { id: (word >> 32) as u16, len: if wrote { word as u32 } else { 0 } }
}

impl Ring for Packed {
    const FEATURES: u64 = FEATURE;
    /// Index 0 and wrap counter 1, of both sides.
    const BASE: u32 = 0x8000_8000;

    /// With EVENT_IDX or without, this driver wants no call.
    fn open(memory: &Arc<Mapping>, place: &Place, options: RingOptions) -> Self {
        let size = place.size;
        assert!(size.is_power_of_two() && size < EVENT_WRAP, "a ring of {size} descriptors");
        memory.store_u16(place.avail, 0);
        memory.store_u16(place.avail + 2, EVENT_DISABLE);
        let start = At { index: 0, wrap: true };
        let it = Self {
            size,
            desc: Words::new(memory, place.desc, 2 * usize::from(size)),
            device_event: Words::new(memory, place.used, 2),
            posted: start,
            taken: start,
            in_flight: 0,
            first: None,
            in_order: options.in_order,
            batch: None,
            added: 0,
            held: vec![false; size.into()].into(),
        };
        (0..2 * usize::from(size)).for_each(|i| it.desc.at(i).store(0, Ordering::Release));
        it
    }

    #[inline(always)]
    fn ready(&self, n: u16) -> bool {
        if self.in_order {
            // Only the first descriptor of a batch is written.
            let last = self.batch.or_else(|| self.used_at(self.taken).map(used_of));
            let len = last.map(|l| (l.id.wrapping_sub(self.taken.index) & (self.size - 1)) + 1);
            return n == 0 || len >= Some(n);
        }
        // Buffers are used one by one in the ring's order.
        self.used_at(self.taken.forward(n.saturating_sub(1), self.size)).is_some()
    }

    #[inline(always)]
    fn take(&mut self, into: &mut [Used]) -> Result<usize, RingError> {
        let mut count = 0;
        for entry in into {
            if self.in_flight == 0 {
                break;
            }
            let Some(used) = self.next() else { break };
            match self.held.get_mut(usize::from(used.id)) {
                Some(held) if *held => *held = false,
                _ => return Err(RingError::NotHeld(used.id.into())),
            }
            *entry = used;
            self.taken = self.taken.forward(1, self.size);
            self.in_flight -= 1;
            count += 1;
        }
        Ok(count)
    }

    #[inline(always)]
    fn prepare(&self, n: u16) {
        let mut at = 0;
        while at < n {
            // The index wraps with the ring.
            self.desc.prefetch_write(2 * usize::from(self.posted.index + at));
            at += DESCS_PER_LINE;
        }
    }

    #[inline(always)]
    fn post(&mut self, buffer: Buffer) {
        let at = self.posted;
        let place = 2 * usize::from(at.index);
        let available = if at.wrap { DESC_AVAIL } else { DESC_USED };
        let flags = available | if buffer.write { DESC_WRITE } else { 0 };
        let word = u64::from(buffer.len) | u64::from(buffer.id) << 32 | u64::from(flags) << 48;
        self.desc.at(place).store(buffer.address.to_le(), Ordering::Relaxed);
        if self.first.is_some() {
            self.desc.at(place + 1).store(word.to_le(), Ordering::Relaxed);
        } else {
            self.first = Some((at.index, word));
        }
        self.held[usize::from(buffer.id)] = true;
        self.posted = at.forward(1, self.size);
        self.in_flight += 1;
        self.added += 1;
        debug_assert!(self.in_flight <= self.size);
    }

    #[inline(always)]
    fn expose(&mut self) -> bool {
        let Some((index, word)) = self.first.take() else { return false };
        let added = std::mem::take(&mut self.added);
        self.desc.at(2 * usize::from(index) + 1).store(word.to_le(), Ordering::Release);
        // VIRTIO 1.3 §2.8.21.3.1: descriptors are visible before the device's wish is read.
        fence(Ordering::SeqCst);
        match u16::from_le(self.device_event.at(1).load(Ordering::Relaxed)) {
            EVENT_DISABLE => false,
            EVENT_DESC => {
                let event = u16::from_le(self.device_event.at(0).load(Ordering::Relaxed));
                self.passes(event, added)
            }
            _ => true,
        }
    }

    #[inline(always)]
    fn in_flight(&self) -> u16 {
        self.in_flight
    }
}

impl Packed {
    /// Whether a place (offset and wrap counter) was passed by the last `added` descriptors.
    fn passes(&self, event: u16, added: u16) -> bool {
        let mut offset = event & !EVENT_WRAP;
        if (event & EVENT_WRAP != 0) != self.posted.wrap {
            offset = offset.wrapping_sub(self.size);
        }
        self.posted.index.wrapping_sub(offset).wrapping_sub(1) < added
    }
}
