//! A device as small as can be, both forms of a ring, and the driver's tests against it.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;

use super::*;
use crate::mapping::{Mapping, PAGE};
use crate::session::Place;

const SIZE: u16 = 8;
const PLACE: Place = Place { size: SIZE, desc: 0, avail: PAGE, used: 2 * PAGE };

const PLAIN: RingOptions = RingOptions { event_idx: false, in_order: false };
const IN_ORDER: RingOptions = RingOptions { in_order: true, ..PLAIN };

/// What a device does to a ring.
trait Device {
    /// The next buffer that the driver has made available: id, address, length, writable.
    fn pop(&mut self, memory: &Mapping) -> Option<Buffer>;
    /// Gives it back; shows it at once.
    fn push(&mut self, memory: &Mapping, id: u16, len: u32) {
        self.push_batch(memory, id, len, 1);
    }
    /// Gives back so many buffers by the last one (VIRTIO_F_IN_ORDER).
    fn push_batch(&mut self, memory: &Mapping, id: u16, len: u32, count: u16);
}

#[derive(Default)]
struct SplitDevice {
    seen: u16,
    used: u16,
}

impl Device for SplitDevice {
    fn pop(&mut self, memory: &Mapping) -> Option<Buffer> {
        if memory.load_u16(PLACE.avail + 2) == self.seen {
            return None;
        }
        let id = memory.load_u16(PLACE.avail + 4 + 2 * u64::from(self.seen % SIZE));
        self.seen = self.seen.wrapping_add(1);
        let at = PLACE.desc + 16 * u64::from(id);
        let address = u64::from(memory.load_u32(at)) | u64::from(memory.load_u32(at + 4)) << 32;
        let flags = memory.load_u16(at + 12);
        assert_eq!(flags & !2, 0);
        Some(Buffer { id, address, len: memory.load_u32(at + 8), write: flags & 2 != 0 })
    }

    fn push_batch(&mut self, memory: &Mapping, id: u16, len: u32, count: u16) {
        let at = PLACE.used + 4 + 8 * u64::from(self.used % SIZE);
        memory.store_u32(at, id.into());
        memory.store_u32(at + 4, len);
        self.used = self.used.wrapping_add(count);
        memory.store_u16(PLACE.used + 2, self.used);
    }
}

struct PackedDevice {
    next: (u16, bool),
    used: (u16, bool),
}

impl Default for PackedDevice {
    fn default() -> Self {
        Self { next: (0, true), used: (0, true) }
    }
}

fn step(at: &mut (u16, bool)) {
    at.0 += 1;
    if at.0 == SIZE {
        *at = (0, !at.1);
    }
}

impl Device for PackedDevice {
    fn pop(&mut self, memory: &Mapping) -> Option<Buffer> {
        let at = PLACE.desc + 16 * u64::from(self.next.0);
        let flags = memory.load_u16(at + 14);
        let (avail, used) = (flags >> 7 & 1 != 0, flags >> 15 != 0);
        if avail != self.next.1 || used == self.next.1 {
            return None;
        }
        step(&mut self.next);
        let address = u64::from(memory.load_u32(at)) | u64::from(memory.load_u32(at + 4)) << 32;
        let id = memory.load_u16(at + 12);
        Some(Buffer { id, address, len: memory.load_u32(at + 8), write: flags & 2 != 0 })
    }

    fn push_batch(&mut self, memory: &Mapping, id: u16, len: u32, count: u16) {
        let at = PLACE.desc + 16 * u64::from(self.used.0);
        // What stands there without the flag is not a length.
        memory.store_u32(at + 8, if len > 0 { len } else { 77 });
        memory.store_u16(at + 12, id);
        let wrote = if len > 0 { 2 } else { 0 };
        memory.store_u16(at + 14, wrote | if self.used.1 { 0x8080 } else { 0 });
        (0..count).for_each(|_| step(&mut self.used));
    }
}

fn memory() -> Arc<Mapping> {
    Arc::new(Mapping::private(3 * PAGE).expect("map"))
}

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// Any order of posting, exposing, using (also out of order) and taking; queues say what must come where.
fn random_walk(memory: &Mapping, mut ring: impl Ring, mut device: impl Device) {
    for seed in 0..4 {
        let mut state = seed;
        let mut free: Vec<u16> = (0..SIZE).collect();
        let (mut staged, mut shown): (VecDeque<Buffer>, VecDeque<Buffer>) = Default::default();
        let (mut held, mut done): (Vec<u16>, VecDeque<Used>) = Default::default();
        let mut packets = 0u32;
        // At the end of each walk everything comes home.
        for turn in 0..4000 {
            let last = turn > 3900;
            match if last { 1 + random(&mut state) % 3 } else { random(&mut state) % 4 } {
                0 if !free.is_empty() => {
                    let id = free.swap_remove(random(&mut state) as usize % free.len());
                    packets += 1;
                    let buffer = Buffer {
                        id,
                        address: u64::from(packets) << 20 | 1 << 40,
                        len: packets,
                        write: packets.is_multiple_of(3),
                    };
                    ring.prepare(1);
                    ring.post(buffer);
                    staged.push_back(buffer);
                }
                1 => {
                    let any = !staged.is_empty();
                    // Nothing suppresses the device's notifications here.
                    assert_eq!(ring.expose(), any);
                    shown.append(&mut staged);
                }
                2 => {
                    if let Some(buffer) = device.pop(memory) {
                        assert_eq!(Some(buffer), shown.pop_front());
                        held.push(buffer.id);
                    } else {
                        assert!(shown.is_empty());
                    }
                    if !held.is_empty() && (last || random(&mut state).is_multiple_of(2)) {
                        let id = held.swap_remove(random(&mut state) as usize % held.len());
                        let len = random(&mut state) as u32 % 4;
                        device.push(memory, id, len);
                        done.push_back(Used { id, len });
                    }
                }
                _ => {
                    assert_eq!(ring.ready(1), !done.is_empty());
                    let want = done.len() as u16;
                    assert!(want == 0 || ring.ready(want));
                    assert!(want == SIZE || !ring.ready(want + 1));
                    let mut into = [Used::default(); 3];
                    let count = ring.take(&mut into).expect("legal");
                    assert_eq!(count, done.len().min(3));
                    for used in &into[..count] {
                        assert_eq!(Some(*used), done.pop_front());
                        free.push(used.id);
                    }
                }
            }
            let with_device = staged.len() + shown.len() + held.len() + done.len();
            assert_eq!(usize::from(ring.in_flight()), with_device);
        }
        assert_eq!(ring.in_flight(), 0, "seed {seed}");
        assert!(packets > 300, "{packets}");
    }
}

#[test]
fn any_order_split() {
    let memory = memory();
    random_walk(&memory, Split::open(&memory, &PLACE, PLAIN), SplitDevice::default());
}

#[test]
fn any_order_packed() {
    let memory = memory();
    random_walk(&memory, Packed::open(&memory, &PLACE, PLAIN), PackedDevice::default());
}

/// Batches of any length, taken in pieces of any length.
fn in_order_walk(memory: &Mapping, mut ring: impl Ring, mut device: impl Device) {
    let mut state = 7;
    let (mut next, mut popped, mut due) = (0u16, Vec::new(), VecDeque::new());
    for _ in 0..4000 {
        for _ in 0..random(&mut state) % 5 {
            if ring.in_flight() < SIZE {
                ring.post(buffer(next % SIZE));
                next += 1;
            }
        }
        ring.expose();
        while let Some(b) = device.pop(memory) {
            popped.push(b.id);
        }
        let count = random(&mut state) as usize % (popped.len() + 1);
        if count > 0 {
            let len = random(&mut state) as u32 % 4;
            device.push_batch(memory, popped[count - 1], len, count as u16);
            let lens = (1..=count).map(|i| if i == count { len } else { 0 });
            due.extend(popped.drain(..count).zip(lens).map(|(id, len)| Used { id, len }));
        }
        assert_eq!(ring.ready(1), !due.is_empty());
        let mut into = [Used::default(); 3];
        let taken = ring.take(&mut into).expect("legal");
        assert_eq!(taken, due.len().min(3));
        into[..taken].iter().for_each(|used| assert_eq!(Some(*used), due.pop_front()));
    }
    assert!(next > 1000, "{next}");
}

#[test]
fn in_order_split() {
    let memory = memory();
    in_order_walk(&memory, Split::open(&memory, &PLACE, IN_ORDER), SplitDevice::default());
}

#[test]
fn in_order_packed() {
    let memory = memory();
    in_order_walk(&memory, Packed::open(&memory, &PLACE, IN_ORDER), PackedDevice::default());
}

fn buffer(id: u16) -> Buffer {
    Buffer { id, address: PAGE, len: 64, write: false }
}

/// What the driver must not believe.
fn false_ids(memory: &Mapping, mut ring: impl Ring, mut device: impl Device) {
    let mut into = [Used::default(); 8];
    (0..2).for_each(|id| ring.post(buffer(id)));
    ring.expose();
    device.push(memory, 1, 0);
    assert_eq!(ring.take(&mut into), Ok(1));
    device.push(memory, 1, 0);
    assert_eq!(ring.take(&mut into), Err(RingError::NotHeld(1)));
}

#[test]
fn a_buffer_that_is_used_twice_is_an_error() {
    let memory = memory();
    false_ids(&memory, Split::open(&memory, &PLACE, PLAIN), SplitDevice::default());
    let memory = self::memory();
    false_ids(&memory, Packed::open(&memory, &PLACE, PLAIN), PackedDevice::default());
}

#[test]
fn more_used_than_available_is_an_error() {
    let memory = memory();
    let mut ring = Split::open(&memory, &PLACE, PLAIN);
    ring.post(buffer(0));
    ring.expose();
    memory.store_u16(PLACE.used + 2, 2);
    let error = Err(RingError::TooMany { used: 2, in_flight: 1 });
    assert_eq!(ring.take(&mut [Used::default(); 8]), error);
}

#[test]
fn nothing_is_seen_before_the_first_of_a_burst() {
    let memory = memory();
    let (mut ring, mut device) = (Packed::open(&memory, &PLACE, PLAIN), PackedDevice::default());
    (0..3).for_each(|id| ring.post(buffer(id)));
    assert_eq!(device.pop(&memory), None);
    ring.expose();
    (0..3).for_each(|id| assert_eq!(device.pop(&memory).map(|b| b.id), Some(id)));
}

#[test]
fn a_device_that_wants_no_kick_gets_none() {
    let memory = memory();
    let mut ring = Split::open(&memory, &PLACE, PLAIN);
    memory.store_u16(PLACE.used, 1);
    ring.post(buffer(0));
    assert!(!ring.expose());
    assert_eq!(memory.load_u16(PLACE.avail), 1, "and sends no call");

    let memory = self::memory();
    let mut ring = Packed::open(&memory, &PLACE, PLAIN);
    memory.store_u16(PLACE.used + 2, 1);
    ring.post(buffer(0));
    assert!(!ring.expose());
    assert_eq!(memory.load_u16(PLACE.avail + 2), 1);
}

#[test]
fn kicks_by_index_split() {
    let memory = memory();
    let (mut ring, mut device) =
        (Split::open(&memory, &PLACE, RingOptions { event_idx: true, ..PLAIN }), SplitDevice::default());
    let avail_event = PLACE.used + 4 + 8 * u64::from(SIZE);
    memory.store_u16(avail_event, 2);
    let mut wanted = Vec::new();
    for id in 0..5 {
        ring.post(buffer(id));
        wanted.push(ring.expose());
    }
    // When the entry with index 2 becomes available.
    assert_eq!(wanted, [false, false, true, false, false]);
    device.push(&memory, 0, 0);
    ring.take(&mut [Used::default(); 8]).expect("legal");
    assert_eq!(memory.load_u16(PLACE.avail + 4 + 2 * u64::from(SIZE)), 0, "an index that is passed");
}

#[test]
fn kicks_by_index_packed() {
    let memory = memory();
    let (mut ring, mut device) = (Packed::open(&memory, &PLACE, PLAIN), PackedDevice::default());
    memory.store_u16(PLACE.used + 2, 2);
    let mut into = [Used::default(); 8];
    let mut turn = |event: u16, count: u16, wanted: bool| {
        memory.store_u16(PLACE.used, event);
        (0..count).for_each(|id| ring.post(buffer(id)));
        assert_eq!(ring.expose(), wanted, "{event:#x} {count}");
        while let Some(b) = device.pop(&memory) {
            device.push(&memory, b.id, 0);
        }
        assert_eq!(ring.take(&mut into), Ok(count.into()));
    };
    let wrap = 0x8000;
    turn(wrap, 1, true); // 0
    turn(3 | wrap, 2, false); // 1, 2
    turn(3 | wrap, 4, true); // 3 to 6
    turn(0, 1, false); // 7; the event is the next place, in the next round
    turn(0, 3, true); // 0 to 2 of the second round
    turn(7, 5, true); // 3 to 7
    turn(wrap, 8, true); // the third round
}
