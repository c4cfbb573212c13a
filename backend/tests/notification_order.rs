//! No notification is lost: the code that asks and decides, run by loom in every order that the memory model allows; and that it
//! takes the fences for that. A program of its own, since loom's threads take SIGBUS for
//! themselves, which tests of the library provoke.
//!
//! Ring words are loom's atomics here, and a notification is a token; the rest is the code of the device. Both sides run it:
//! a driver does the same with its own words, and calls are kicks the other way round. Loops are cut short: the one that
//! looks sleeps as soon as it may, which is the dangerous case; how it comes to that is `worker::tests::dance`.
#![forbid(unsafe_code)]

#[path = "../src/virtq/notify.rs"]
mod notify;
#[path = "../src/virtq/place.rs"]
#[allow(dead_code)]
mod place;

use loom::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use loom::sync::{Condvar, Mutex};
use notify::{EVENT_DISABLE, PackedWords, UNWANTED, Words, ask, ask_packed, is_wanted, is_wanted_packed};
use place::Place;
use std::sync::Arc;

/// The index begins shortly before it wraps.
const START: u16 = u16::MAX;
/// Slots of the packed ring.
const SLOTS: usize = 2;
/// How often a thread is interrupted, at most: that bounds the number of orders, not what loads may see.
const INTERRUPTIONS: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Format {
    Split,
    Packed,
}

/// Who has its fence.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fences {
    Both,
    Sleeper,
    Speaker,
}

/// What both see.
struct Ring {
    format: Format,
    event_idx: bool,
    fences: Fences,
    /// What is new: `avail.idx` for kicks, `used.idx` for calls.
    index: AtomicU16,
    /// What is new, on a packed ring: the descriptors' flags.
    slots: [AtomicU16; SLOTS],
    /// What the sleeper says.
    flags: AtomicU16,
    event: AtomicU16,
    packed_event: AtomicU32,
    /// Wakes the sleeper: an eventfd.
    notified: Mutex<bool>,
    bell: Condvar,
}

/// The side that sleeps, and the one that speaks. The former only stores, the latter only loads.
struct Side<'a>(&'a Ring, Fences);

impl Side<'_> {
    fn full_fence(&self) {
        if self.0.fences == Fences::Both || self.0.fences == self.1 {
            loom::sync::atomic::fence(Ordering::SeqCst);
        }
    }
}

impl Words for Side<'_> {
    fn store_flags(&self, flags: u16) {
        self.0.flags.store(flags, Ordering::Relaxed);
    }
    fn store_event(&self, event: u16) {
        self.0.event.store(event, Ordering::Relaxed);
    }
    fn flags(&self) -> u16 {
        self.0.flags.load(Ordering::Relaxed)
    }
    fn event(&self) -> Option<u16> {
        self.0.event_idx.then(|| self.0.event.load(Ordering::Relaxed))
    }
    fn fence(&self) {
        self.full_fence();
    }
}

impl PackedWords for Side<'_> {
    fn store_event(&self, off_wrap: u16, flags: u16) {
        let event = u32::from(off_wrap) | u32::from(flags) << 16;
        self.0.packed_event.store(event, Ordering::Relaxed);
    }
    fn event(&self) -> (u16, u16) {
        let event = self.0.packed_event.load(Ordering::Relaxed);
        (event as u16, (event >> 16) as u16)
    }
    fn fence(&self) {
        self.full_fence();
    }
}

/// The place of the `number`th descriptor, from 0.
fn place(number: u16) -> Place {
    let place = Place { slot: 0, wrap: true };
    (0..number).fold(place, |place, _| place.forth(1, SLOTS as u32))
}

impl Ring {
    /// The sleeper is awake, and wants no notification.
    fn new(format: Format, event_idx: bool, fences: Fences) -> Self {
        Self {
            format,
            event_idx,
            fences,
            index: AtomicU16::new(START),
            slots: std::array::from_fn(|_| AtomicU16::new(0)),
            flags: AtomicU16::new(UNWANTED),
            event: AtomicU16::new(START.wrapping_sub(1)),
            packed_event: AtomicU32::new(u32::from(EVENT_DISABLE) << 16),
            notified: Mutex::new(false),
            bell: Condvar::new(),
        }
    }

    /// The speaker says something for the `number`th time, from 0, and notifies if that is wanted.
    fn say(&self, number: u16) {
        let words = Side(self, Fences::Speaker);
        let wanted = match self.format {
            Format::Split => {
                let old = START.wrapping_add(number);
                let new = old.wrapping_add(1);
                self.index.store(new, Ordering::Release);
                is_wanted(&words, Some(old), new, 1)
            }
            Format::Packed => {
                let place = place(number);
                self.slots[place.slot as usize].store(place.available(), Ordering::Release);
                is_wanted_packed(&words, self.event_idx, SLOTS as u32, Some(place), 1)
            }
        };
        if wanted {
            *self.notified.lock().unwrap() = true;
            self.bell.notify_one();
        }
    }

    /// How much was said, of which `seen` was seen. As the queues look.
    fn look(&self, seen: u16) -> u16 {
        match self.format {
            Format::Split => self.index.load(Ordering::Acquire).wrapping_sub(START),
            Format::Packed => {
                let place = place(seen);
                let flags = self.slots[place.slot as usize].load(Ordering::Acquire);
                seen + u16::from(flags == place.available())
            }
        }
    }

    /// The sleeper has seen so much: asks, and sleeps if there is no more. As `enable_kicks` and `disable_kicks` do.
    fn sleep(&self, seen: u16) {
        let words = Side(self, Fences::Sleeper);
        match self.format {
            Format::Split => ask(&words, self.event_idx, START.wrapping_add(seen), false),
            Format::Packed => ask_packed(&words, self.event_idx, place(seen)),
        }
        if self.look(seen) == seen {
            let mut notified = self.notified.lock().unwrap();
            while !*notified {
                notified = self.bell.wait(notified).unwrap();
            }
            *notified = false;
        }
        match self.format {
            Format::Split if self.event_idx => {}
            Format::Split => words.store_flags(UNWANTED),
            Format::Packed => PackedWords::store_event(&words, 0, EVENT_DISABLE),
        }
    }
}

/// The one sees all that the other says, `count` times.
fn all_is_seen(format: Format, event_idx: bool, fences: Fences, count: u16) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(INTERRUPTIONS);
    model.check(move || {
        let ring = Arc::new(Ring::new(format, event_idx, fences));
        let speaker = {
            let ring = ring.clone();
            loom::thread::spawn(move || (0..count).for_each(|number| ring.say(number)))
        };
        let mut seen = 0;
        while seen < count {
            ring.sleep(seen);
            seen = ring.look(seen);
        }
        speaker.join().unwrap();
    });
}

#[test]
fn flags_lose_nothing() {
    all_is_seen(Format::Split, false, Fences::Both, 2);
}

#[test]
fn events_lose_nothing() {
    all_is_seen(Format::Split, true, Fences::Both, 2);
}

#[test]
fn packed_flags_lose_nothing() {
    all_is_seen(Format::Packed, false, Fences::Both, 2);
}

#[test]
fn packed_events_lose_nothing() {
    all_is_seen(Format::Packed, true, Fences::Both, 2);
}

/// loom finds the execution in which the one sleeps for ever.
#[test]
fn both_need_their_fences() {
    for format in [Format::Split, Format::Packed] {
        for event_idx in [false, true] {
            for fences in [Fences::Sleeper, Fences::Speaker] {
                let lost = std::panic::catch_unwind(|| all_is_seen(format, event_idx, fences, 1));
                let why = *lost.expect_err("a lost notification").downcast::<String>().expect("a text");
                assert!(why.contains("deadlock"), "{format:?}, {event_idx}, {fences:?}: {why}");
            }
        }
    }
}
