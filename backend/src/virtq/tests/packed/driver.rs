//! A driver's side of a packed queue, over the file of the guest's memory. It does what Linux' does: buffer ids from a free list,
//! the first descriptor of a chain made available last, its own count of descriptors by id.

use super::super::super::{PackedQueue, QueueConfig};
use super::super::driver::{AVAIL, DESC, Driver, NEXT, USED, WRITE};
use crate::memory::GuestMemory;

pub const F_AVAIL: u16 = 1 << 7;
pub const F_USED: u16 = 1 << 15;
pub const DISABLE: u16 = 1;
pub const AT_DESCRIPTOR: u16 = 2;

/// A slot and the wrap counter there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    pub slot: u16,
    pub wrap: bool,
}

impl At {
    pub const START: Self = Self { slot: 0, wrap: true };

    pub fn off_wrap(self) -> u16 {
        self.slot | u16::from(self.wrap) << 15
    }

    pub fn go(&mut self, count: u16, size: u16) {
        for _ in 0..count {
            self.slot += 1;
            if self.slot == size {
                (self.slot, self.wrap) = (0, !self.wrap);
            }
        }
    }
}

pub struct PackedDriver {
    /// Memory and places; its ring functions are for split rings.
    pub base: Driver,
    pub next_avail: At,
    pub next_used: At,
    free_ids: Vec<u16>,
    /// Descriptors of each id that is out.
    out: Vec<Option<u16>>,
    /// Ids that are out, oldest first.
    order: std::collections::VecDeque<u16>,
    pub room: u16,
    /// Descriptors made available since the last look at the device's event structure.
    added: u16,
    in_order: bool,
}

impl PackedDriver {
    pub fn new(size: u16) -> Self {
        Self::with(Driver::new(size))
    }

    pub fn with(mut base: Driver) -> Self {
        let size = base.config.size;
        base.config.packed = true;
        base.config.base = 0x8000_8000;
        Self {
            base,
            next_avail: At::START,
            next_used: At::START,
            // Not in ring order, so that nothing depends on that.
            free_ids: (0..size).collect(),
            out: vec![None; size.into()],
            order: Default::default(),
            room: size,
            added: 0,
            in_order: false,
        }
    }

    /// As if the ring had been in use up to a place: all slots before it used in this round, the others in the one before.
    pub fn starting_at(size: u16, at: At) -> Self {
        let mut driver = Self::new(size);
        let place = u32::from(at.off_wrap());
        driver.base.config.base = place | place << 16;
        for slot in 0..size {
            let wrap = at.wrap == (slot < at.slot);
            driver.descriptor(slot, (0, 0, 0, if wrap { F_AVAIL | F_USED } else { 0 }));
        }
        (driver.next_avail, driver.next_used) = (at, at);
        driver
    }

    /// VIRTIO_F_IN_ORDER: ids are slots, and a used descriptor may stand for several chains.
    pub fn in_order(mut self) -> Self {
        self.in_order = true;
        (self.base.config.in_order, self.base.config.transmit) = (true, true);
        self
    }

    pub fn size(&self) -> u16 {
        self.base.config.size
    }

    pub fn config(&mut self) -> &mut QueueConfig {
        &mut self.base.config
    }

    pub fn mem(&self) -> &GuestMemory {
        &self.base.mem
    }

    pub fn queue(&self) -> PackedQueue {
        PackedQueue::new(&self.base.mem, &self.base.config).unwrap()
    }

    fn slot(&self, slot: u16) -> u64 {
        self.base.origin + DESC + 16 * u64::from(slot)
    }

    /// Writes a descriptor: address, length, id, flags.
    pub fn descriptor(&self, slot: u16, raw: (u64, u32, u16, u16)) {
        self.base.descriptor(self.base.origin + DESC, slot, raw);
    }

    pub fn flags(&self, slot: u16) -> u16 {
        self.base.get16(self.slot(slot) + 14)
    }

    pub fn set_flags(&self, slot: u16, flags: u16) {
        self.base.put16(self.slot(slot) + 14, flags);
    }

    /// Makes a chain of parts (address, length, flags) available and returns its id; none if there is no room.
    pub fn offer(&mut self, parts: &[(u64, u32, u16)]) -> Option<u16> {
        let count = parts.len() as u16;
        if count == 0 || count > self.room {
            return None;
        }
        let id = if self.in_order { self.next_avail.slot } else { self.free_ids.pop()? };
        let head = self.next_avail;
        let mut head_flags = 0;
        for (i, (addr, len, flags)) in parts.iter().enumerate() {
            let At { slot, wrap } = self.next_avail;
            let last = i + 1 == parts.len();
            let flags = flags | if last { 0 } else { NEXT } | if wrap { F_AVAIL } else { F_USED };
            // Only the last one needs the id (§2.8.6).
            let id = if last { id } else { 0xdead };
            if i == 0 {
                head_flags = flags;
                self.base.put(self.slot(slot), &addr.to_le_bytes());
                self.base.put(self.slot(slot) + 8, &len.to_le_bytes());
                self.base.put16(self.slot(slot) + 12, id);
            } else {
                self.descriptor(slot, (*addr, *len, id, flags));
            }
            let size = self.size();
            self.next_avail.go(1, size);
        }
        self.set_flags(head.slot, head_flags);
        self.out[usize::from(id)] = Some(count);
        self.order.push_back(id);
        self.room -= count;
        self.added += count;
        Some(id)
    }

    /// A chain in a table at `table`.
    pub fn offer_table(&mut self, table: u64, parts: &[(u64, u32, u16)]) -> Option<u16> {
        if self.room == 0 {
            return None;
        }
        for (i, (addr, len, flags)) in (0..).zip(parts) {
            // Ids, NEXT, and wrap bits mean nothing there (§2.8.7).
            self.base.descriptor(table, i, (*addr, *len, 0xbeef, flags | F_AVAIL | (i % 2)));
        }
        self.offer(&[(table, 16 * parts.len() as u32, super::super::driver::INDIRECT | WRITE)])
    }

    /// Takes what the device has given back: id and length of each chain; `None` for the length of one passed over.
    pub fn take_used(&mut self) -> Vec<(u16, Option<u32>)> {
        let mut taken = Vec::new();
        loop {
            let At { slot, wrap } = self.next_used;
            let flags = self.flags(slot);
            if (flags & F_AVAIL != 0) != wrap || (flags & F_USED != 0) != wrap {
                return taken;
            }
            let [a, b, c, d, e, f] = self.base.get(self.slot(slot) + 8);
            let (len, id) = (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f]));
            assert_eq!(flags & WRITE != 0, len != 0, "slot {slot}");
            assert!(
                usize::from(id) < self.out.len() && self.out[usize::from(id)].is_some(),
                "id {id} is not out"
            );
            loop {
                let oldest = if self.in_order { self.order[0] } else { id };
                self.order.retain(|known| *known != oldest);
                let count = self.out[usize::from(oldest)].take().unwrap();
                let size = self.size();
                self.next_used.go(count, size);
                self.room += count;
                if !self.in_order {
                    self.free_ids.insert(0, oldest);
                }
                taken.push((oldest, (oldest == id).then_some(len)));
                if oldest == id {
                    break;
                }
            }
        }
    }

    /// Whether a driver kicks now, for all that was made available since it was asked the last time.
    pub fn wants_to_kick(&mut self) -> bool {
        let [a, b, c, d] = self.base.get(self.base.origin + USED);
        let (off_wrap, flags) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
        let new = self.next_avail.slot;
        let old = new.wrapping_sub(std::mem::take(&mut self.added));
        if flags != AT_DESCRIPTOR {
            return flags != DISABLE;
        }
        let mut event = off_wrap & 0x7fff;
        if (off_wrap >> 15 != 0) != self.next_avail.wrap {
            event = event.wrapping_sub(self.size());
        }
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// Says when a call is wanted.
    pub fn set_event(&self, off_wrap: u16, flags: u16) {
        self.base.put16(self.base.origin + AVAIL, off_wrap);
        self.base.put16(self.base.origin + AVAIL + 2, flags);
    }

    /// What the device says about kicks: offset and wrap counter, flags.
    pub fn device_event(&self) -> (u16, u16) {
        (self.base.get16(self.base.origin + USED), self.base.get16(self.base.origin + USED + 2))
    }
}
