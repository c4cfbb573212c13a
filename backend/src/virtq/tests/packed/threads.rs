//! A driver in another thread, asleep whenever it may be: a lost kick or call shows as a standstill, a wrong order of stores as
//! wrong contents.

use std::sync::atomic::{Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::super::super::*;
use super::super::driver::{AVAIL, DESC, MEM_SIZE, NEXT, USED, WRITE};
use super::driver::*;

const ITEMS: u32 = 60_000;
/// Nobody sleeps that long with work waiting, unless a wake-up was lost.
const STANDSTILL: Duration = Duration::from_secs(20);
const BUFFERS: u64 = 0x5_0000;

fn sleep(what: &str, item: u32) {
    let begun = Instant::now();
    thread::park_timeout(STANDSTILL);
    assert!(begun.elapsed() < STANDSTILL, "{what} was not woken at item {item}");
}

struct Guest {
    memory: GuestMemoryMmap<()>,
    size: u16,
    event_idx: bool,
    in_order: bool,
    next_avail: At,
    next_used: At,
    added: u16,
    room: u16,
}

impl Guest {
    fn store(&self, at: u64, value: u16, order: Ordering) {
        self.memory.store(value.to_le(), GuestAddress(at), order).unwrap();
    }

    fn load(&self, at: u64, order: Ordering) -> u16 {
        u16::from_le(self.memory.load(GuestAddress(at), order).unwrap())
    }

    fn flags(&self, slot: u16) -> u64 {
        DESC + 16 * u64::from(slot) + 14
    }

    /// Every third item has a descriptor more, which nothing is written to.
    fn descriptors(item: u32) -> u16 {
        if item.is_multiple_of(3) { 2 } else { 1 }
    }

    /// Its number in a buffer; the id is the slot of its first descriptor.
    fn send(&mut self, item: u32) {
        let count = Self::descriptors(item);
        let head = self.next_avail;
        let buffer = BUFFERS + u64::from(head.slot) * 64;
        self.memory.write_obj(item.to_le(), GuestAddress(buffer)).unwrap();
        let mut head_flags = 0;
        for i in 0..count {
            let At { slot, wrap } = self.next_avail;
            let flags = WRITE | if i + 1 < count { NEXT } else { 0 } | if wrap { F_AVAIL } else { F_USED };
            let at = DESC + 16 * u64::from(slot);
            self.memory.write_obj((buffer + u64::from(i) * 8).to_le(), GuestAddress(at)).unwrap();
            self.memory.write_obj(4u32.to_le(), GuestAddress(at + 8)).unwrap();
            self.memory.write_obj(head.slot.to_le(), GuestAddress(at + 12)).unwrap();
            if i == 0 {
                head_flags = flags;
            } else {
                self.store(self.flags(slot), flags, Ordering::Relaxed);
            }
            self.next_avail.go(1, self.size);
        }
        self.store(self.flags(head.slot), head_flags, Ordering::Release);
        self.added += count;
        self.room -= count;
    }

    fn kick(&mut self, device: &thread::Thread) {
        fence(Ordering::SeqCst);
        let event: u32 = self.memory.load(GuestAddress(USED), Ordering::Relaxed).unwrap();
        let event = u32::from_le(event);
        let (off_wrap, flags) = (event as u16, (event >> 16) as u16);
        let new = self.next_avail.slot;
        let old = new.wrapping_sub(std::mem::take(&mut self.added));
        let kick = if flags == AT_DESCRIPTOR {
            let mut at = off_wrap & 0x7fff;
            if (off_wrap >> 15 != 0) != self.next_avail.wrap {
                at = at.wrapping_sub(self.size);
            }
            new.wrapping_sub(at).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            flags != DISABLE
        };
        if kick {
            device.unpark();
        }
    }

    /// Sends numbers, each in a buffer of its own, and checks that they come back one higher, in order.
    fn run(mut self, device: &thread::Thread) {
        let (mut sent, mut received) = (0u32, 0u32);
        self.store(AVAIL + 2, DISABLE, Ordering::Relaxed);
        while received < ITEMS {
            let before = sent;
            // Bursts of changing length.
            let burst = 1 + sent % 7;
            while sent < ITEMS && self.room >= Self::descriptors(sent) && sent - before < burst {
                self.send(sent);
                sent += 1;
            }
            if sent != before {
                self.kick(device);
            }
            if !self.receive(&mut received) && (sent == ITEMS || self.room < Self::descriptors(sent)) {
                // Nothing to do: ask for a call, look again, sleep.
                if self.event_idx {
                    self.store(AVAIL, self.next_used.off_wrap(), Ordering::Relaxed);
                    self.store(AVAIL + 2, AT_DESCRIPTOR, Ordering::Release);
                } else {
                    self.store(AVAIL + 2, 0, Ordering::Relaxed);
                }
                fence(Ordering::SeqCst);
                if !self.receive(&mut received) {
                    sleep("the driver", received);
                }
                self.store(AVAIL + 2, DISABLE, Ordering::Relaxed);
            }
        }
    }

    fn receive(&mut self, received: &mut u32) -> bool {
        let before = *received;
        loop {
            let At { slot, wrap } = self.next_used;
            let flags = self.load(self.flags(slot), Ordering::Acquire);
            if (flags & F_AVAIL != 0) != wrap || (flags & F_USED != 0) != wrap {
                return *received != before;
            }
            let last = self.load(DESC + 16 * u64::from(slot) + 12, Ordering::Relaxed);
            loop {
                let slot = self.next_used.slot;
                let value: u32 = self.memory.read_obj(GuestAddress(BUFFERS + u64::from(slot) * 64)).unwrap();
                assert_eq!(u32::from_le(value), *received + 1);
                let count = Self::descriptors(*received);
                *received += 1;
                self.room += count;
                self.next_used.go(count, self.size);
                if slot == last {
                    break;
                }
                assert!(self.in_order, "used descriptor {received} is of {last}");
            }
        }
    }
}

fn device(driver: &PackedDriver, guest: &thread::Thread) {
    let mut queue = driver.queue();
    let mut chain = Chain::new();
    let mut done = 0;
    while done < ITEMS {
        queue.disable_kicks();
        let mut burst = Vec::new();
        // Both ways of taking chains.
        let mut singles = [Single::default(); 8];
        let count = queue.pop_singles(Access::Writable, &mut singles).unwrap();
        burst.extend(singles[..count].iter().map(|single| (single.head, single.gpa)));
        while burst.len() < 32 && queue.pop(&driver.base.mem, &mut chain).unwrap() {
            burst.push((chain.head(), chain.writable()[0].gpa));
        }
        for (_, gpa) in &burst {
            let mut bytes = [0; 4];
            driver.base.mem.read(*gpa, &mut bytes).unwrap();
            assert_eq!(u32::from_le_bytes(bytes), done, "chain {done}");
            done += 1;
            driver.base.mem.write(*gpa, &done.to_le_bytes()).unwrap();
        }
        let len = if driver.base.config.transmit { 0 } else { 4 };
        match done % 2 {
            0 => queue.push_all(burst.iter().map(|(id, _)| (*id, len))),
            _ => burst.iter().for_each(|(id, _)| queue.push(*id, len)),
        }
        queue.publish();
        if queue.needs_call() {
            guest.unpark();
        }
        if burst.is_empty() && !queue.enable_kicks().unwrap() {
            sleep("the device", done);
        }
    }
}

fn both(size: u16, event_idx: bool, in_order: bool) {
    let mut driver = PackedDriver::new(size);
    if in_order {
        driver = driver.in_order();
    }
    driver.config().event_idx = event_idx;
    let file = FileOffset::new(driver.base.file.try_clone().unwrap(), 0);
    let memory =
        GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEM_SIZE as usize, Some(file))]).unwrap();
    let (next_avail, next_used) = (At::START, At::START);
    let guest = Guest { memory, size, event_idx, in_order, next_avail, next_used, added: 0, room: size };
    let guest_thread = thread::current();
    thread::scope(|scope| {
        let device = scope.spawn(|| device(&driver, &guest_thread));
        let waker = device.thread().clone();
        guest.run(&waker);
        // The driver is done when all came back; the device may still be on its way out.
        waker.unpark();
    });
}

#[test]
fn no_wake_up_is_lost_with_event_idx() {
    for size in [2, 3, 16, 255] {
        both(size, true, false);
    }
}

#[test]
fn no_wake_up_is_lost_with_flags() {
    for size in [2, 3, 16, 255] {
        both(size, false, false);
    }
}

#[test]
fn no_wake_up_is_lost_in_order() {
    for size in [2, 255] {
        both(size, true, true);
        both(size, false, true);
    }
}
