//! No notification is lost: the code that asks and decides, run by loom in every order that the memory model allows, in both
//! directions; and that it takes the fences for that.
//!
//! Ring words are loom's atomics here, and a notification is a token; the rest is the code of the device. Both sides run it:
//! a driver does the same with its own words. Loops are cut short: the one that looks sleeps as soon as it may, which is
//! the dangerous case; how it comes to that is `worker::tests::dance`.
#![forbid(unsafe_code)]

use super::*;
use loom::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use loom::sync::{Condvar, Mutex};
use std::sync::Arc;

/// What both see.
struct Ring {
    /// What is new: `avail.idx` for kicks, `used.idx` for calls.
    index: AtomicU16,
    /// Of the one that sleeps.
    flags: AtomicU16,
    event: AtomicU16,
    event_idx: bool,
    /// Who has its fence.
    fences: Fences,
    /// Wakes the sleeper: an eventfd.
    notified: Mutex<bool>,
    bell: Condvar,
}

#[derive(Clone, Copy, PartialEq)]
enum Fences {
    Both,
    Sleeper,
    Speaker,
}

impl Ring {
    fn new(event_idx: bool, fences: Fences) -> Self {
        Self {
            index: AtomicU16::new(START),
            flags: AtomicU16::new(UNWANTED),
            // Passed already: the sleeper was awake.
            event: AtomicU16::new(START.wrapping_sub(1)),
            event_idx,
            fences,
            notified: Mutex::new(false),
            bell: Condvar::new(),
        }
    }

    fn notify(&self) {
        *self.notified.lock().unwrap() = true;
        self.bell.notify_one();
    }

    fn wait(&self) {
        let mut notified = self.notified.lock().unwrap();
        while !*notified {
            notified = self.bell.wait(notified).unwrap();
        }
        *notified = false;
    }
}

/// The side that sleeps, and the one that speaks. The former only stores, the latter only loads.
struct Side<'a>(&'a Ring, Fences);

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
        if self.0.fences == Fences::Both || self.0.fences == self.1 {
            loom::sync::atomic::fence(Ordering::SeqCst);
        }
    }
}

/// The index begins shortly before it wraps.
const START: u16 = u16::MAX;
/// How often a thread is interrupted, at most: that bounds the number of orders, not what loads may see.
const INTERRUPTIONS: usize = 3;

/// The one sees all that the other says, `count` times.
fn all_is_seen(event_idx: bool, fences: Fences, count: u16) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(INTERRUPTIONS);
    model.check(move || {
        let ring = Arc::new(Ring::new(event_idx, fences));
        let done = Arc::new(AtomicBool::new(false));
        let speaker = {
            let (ring, done) = (ring.clone(), done.clone());
            loom::thread::spawn(move || {
                let words = Side(&ring, Fences::Speaker);
                let mut old = START;
                for _ in 0..count {
                    let new = old.wrapping_add(1);
                    ring.index.store(new, Ordering::Release);
                    if is_wanted(&words, Some(old), new, 1) {
                        ring.notify();
                    }
                    old = new;
                }
                done.store(true, Ordering::Relaxed);
            })
        };
        let words = Side(&ring, Fences::Sleeper);
        let mut next = START;
        while next != START.wrapping_add(count) {
            // As `SplitQueue::enable_kicks`, after a look that found nothing, or without one.
            ask(&words, event_idx, next, false);
            let index = ring.index.load(Ordering::Acquire);
            if index == next {
                ring.wait();
            }
            // As `SplitQueue::disable_kicks`, and the look after it.
            if !event_idx {
                words.store_flags(UNWANTED);
            }
            next = ring.index.load(Ordering::Acquire);
        }
        speaker.join().unwrap();
    });
}

#[test]
fn flags_lose_nothing() {
    all_is_seen(false, Fences::Both, 2);
}

#[test]
fn events_lose_nothing() {
    all_is_seen(true, Fences::Both, 2);
}

/// loom finds the execution in which the one sleeps for ever.
#[test]
#[should_panic(expected = "deadlock")]
fn flags_need_the_fence_of_the_one_that_sleeps() {
    all_is_seen(false, Fences::Speaker, 1);
}

#[test]
#[should_panic(expected = "deadlock")]
fn flags_need_the_fence_of_the_one_that_speaks() {
    all_is_seen(false, Fences::Sleeper, 1);
}

#[test]
#[should_panic(expected = "deadlock")]
fn events_need_the_fence_of_the_one_that_sleeps() {
    all_is_seen(true, Fences::Speaker, 1);
}

#[test]
#[should_panic(expected = "deadlock")]
fn events_need_the_fence_of_the_one_that_speaks() {
    all_is_seen(true, Fences::Sleeper, 1);
}
