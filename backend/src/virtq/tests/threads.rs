//! A driver in another thread, asleep whenever it may be: a lost kick or call shows as a standstill, a wrong order of stores as
//! wrong contents.

use std::sync::atomic::{Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::super::*;
use super::driver::*;

const ITEMS: u32 = 60_000;
/// Nobody sleeps that long with work waiting, unless a wake-up was lost.
const STANDSTILL: Duration = Duration::from_secs(20);
const BUFFERS: u64 = 0x5_0000;

fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

fn sleep(what: &str, item: u32) {
    let begun = Instant::now();
    thread::park_timeout(STANDSTILL);
    assert!(begun.elapsed() < STANDSTILL, "{what} was not woken at item {item}");
}

struct Guest {
    memory: GuestMemoryMmap<()>,
    size: u16,
    event_idx: bool,
}

impl Guest {
    fn store(&self, at: u64, value: u16, order: Ordering) {
        self.memory.store(value.to_le(), GuestAddress(at), order).unwrap();
    }

    fn load(&self, at: u64, order: Ordering) -> u16 {
        u16::from_le(self.memory.load(GuestAddress(at), order).unwrap())
    }

    /// Sends numbers, each in a buffer of its own, and checks that they come back one higher, in order.
    fn run(&self, device: &thread::Thread) {
        let size = u32::from(self.size);
        let (mut sent, mut received) = (0u32, 0u32);
        while received < ITEMS {
            let before = sent;
            // Bursts of changing length.
            let burst = 1 + sent % 7;
            while sent < ITEMS && sent - received < size && sent - before < burst {
                let slot = sent % size;
                let buffer = BUFFERS + u64::from(slot) * 64;
                self.memory.write_obj(sent.to_le(), GuestAddress(buffer)).unwrap();
                let mut raw = [0u8; 16];
                raw[..8].copy_from_slice(&buffer.to_le_bytes());
                raw[8..12].copy_from_slice(&4u32.to_le_bytes());
                raw[12] = WRITE as u8;
                self.memory.write_slice(&raw, GuestAddress(DESC + 16 * u64::from(slot))).unwrap();
                self.store(AVAIL + 4 + 2 * u64::from(slot), slot as u16, Ordering::Relaxed);
                sent += 1;
            }
            if sent != before {
                self.store(AVAIL + 2, sent as u16, Ordering::Release);
                fence(Ordering::SeqCst);
                let kick = if self.event_idx {
                    let event = self.load(USED + 4 + 8 * u64::from(self.size), Ordering::Relaxed);
                    passed(event, sent as u16, before as u16)
                } else {
                    self.load(USED, Ordering::Relaxed) & 1 == 0
                };
                if kick {
                    device.unpark();
                }
            }
            if !self.receive(&mut received) && (sent == ITEMS || sent - received == size) {
                // Nothing to do: ask for a call, look again, sleep.
                if self.event_idx {
                    self.store(AVAIL + 4 + 2 * u64::from(self.size), received as u16, Ordering::Relaxed);
                } else {
                    self.store(AVAIL, 0, Ordering::Relaxed);
                }
                fence(Ordering::SeqCst);
                if !self.receive(&mut received) {
                    sleep("the driver", received);
                }
                if !self.event_idx {
                    self.store(AVAIL, 1, Ordering::Relaxed);
                }
            }
        }
    }

    fn receive(&self, received: &mut u32) -> bool {
        let idx = self.load(USED + 2, Ordering::Acquire);
        let before = *received;
        while *received as u16 != idx {
            let slot = *received % u32::from(self.size);
            let element = USED + 4 + 8 * u64::from(slot);
            let id = u32::from_le(self.memory.read_obj(GuestAddress(element)).unwrap());
            assert_eq!(id, slot, "used element {received}");
            let value: u32 = self.memory.read_obj(GuestAddress(BUFFERS + u64::from(slot) * 64)).unwrap();
            assert_eq!(u32::from_le(value), *received + 1);
            *received += 1;
        }
        *received != before
    }
}

fn device(driver: &Driver, guest: &thread::Thread) {
    let mut queue = driver.queue();
    let mut chain = Chain::new();
    let mut done = 0;
    while done < ITEMS {
        queue.disable_kicks();
        let mut burst = 0;
        while burst < 32 && queue.pop(&driver.mem, &mut chain).unwrap() {
            let segment = chain.writable()[0];
            let mut bytes = [0; 4];
            driver.mem.read(segment.gpa, &mut bytes).unwrap();
            assert_eq!(u32::from_le_bytes(bytes), done, "chain {done}");
            done += 1;
            driver.mem.write(segment.gpa, &done.to_le_bytes()).unwrap();
            queue.push(chain.head(), 4);
            burst += 1;
        }
        queue.publish();
        if queue.needs_call() {
            guest.unpark();
        }
        if burst == 0 && !queue.enable_kicks().unwrap() {
            sleep("the device", done);
        }
    }
}

fn both(size: u16, event_idx: bool) {
    let mut driver = Driver::new(size);
    driver.config.event_idx = event_idx;
    let file = FileOffset::new(driver.file.try_clone().unwrap(), 0);
    let memory =
        GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEM_SIZE as usize, Some(file))]).unwrap();
    let guest = Guest { memory, size, event_idx };
    let guest_thread = thread::current();
    thread::scope(|scope| {
        let device = scope.spawn(|| device(&driver, &guest_thread));
        guest.run(device.thread());
        // The driver is done when all came back; the device may still be on its way out.
        device.thread().unpark();
    });
}

#[test]
fn no_wake_up_is_lost_with_event_idx() {
    for size in [2, 16, 256] {
        both(size, true);
    }
}

#[test]
fn no_wake_up_is_lost_with_flags() {
    for size in [2, 16, 256] {
        both(size, false);
    }
}
