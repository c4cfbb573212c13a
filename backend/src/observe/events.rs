//! Stalls that have ended, as the loop hears of them: the kernel's ring buffer, and sums for the log.
#![forbid(unsafe_code)]

use super::load::EventRing;
use ebpf_common::faults::Event;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Events that are taken in one turn of the loop.
const EVENTS_PER_TURN: usize = 64;

/// The ring buffer's end at the loop.
pub struct Events {
    ring: EventRing,
    fd: Arc<OwnedFd>,
    pending: bool,
}

impl Events {
    /// Takes the ring buffer over.
    ///
    /// # Errors
    /// No descriptor to be had.
    pub fn new(ring: EventRing) -> io::Result<Self> {
        let fd = Arc::new(ring.as_fd().try_clone_to_owned()?);
        Ok(Self { ring, fd, pending: true })
    }

    /// Readable when there are events; poll it, do not read it.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// There may be events.
    pub fn wake(&mut self) {
        self.pending = true;
    }

    /// Takes some events, without waiting. Call again if [`Self::has_more`] afterwards.
    pub fn take(&mut self, mut each: impl FnMut(Event)) {
        if !self.pending {
            return;
        }
        for _ in 0..EVENTS_PER_TURN {
            let Some(bytes) = self.ring.next() else {
                self.pending = false;
                return;
            };
            if let Some(event) = decode(&bytes) {
                each(event);
            }
        }
    }

    /// Whether events were left for the next turn.
    pub fn has_more(&self) -> bool {
        self.pending
    }
}

/// Stalls of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// How many.
    pub stalls: u64,
    /// How long together.
    pub slept: Duration,
    /// The longest.
    pub longest: Duration,
}

impl Totals {
    /// Adds an event.
    pub fn add(&mut self, event: &Event) {
        self.stalls += u64::from(event.part == 1);
        self.slept += Duration::from_nanos(event.slept_ns);
        self.longest = self.longest.max(Duration::from_nanos(event.duration_ns));
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stalls, slept, longest } = self;
        write!(f, "stalls={stalls} stalled_us={} stall_us_max={}", slept.as_micros(), longest.as_micros())
    }
}

/// Reads an event of the ring buffer. None: it is not one of this layout.
pub fn decode(bytes: &[u8]) -> Option<Event> {
    if bytes.len() != size_of::<Event>() {
        return None;
    }
    let (longs, words) = bytes.split_at(4 * size_of::<u64>());
    let mut longs = longs.chunks_exact(8).filter_map(|bytes| bytes.try_into().ok()).map(u64::from_ne_bytes);
    let mut words = words.chunks_exact(4).filter_map(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes);
    Some(Event {
        start_ns: longs.next()?,
        duration_ns: longs.next()?,
        slept_ns: longs.next()?,
        address: longs.next()?,
        tid: words.next()?,
        port: words.next()?,
        kind: words.next()?,
        context: words.next()?,
        source: words.next()?,
        part: words.next()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_and_summed_up() {
        let mut bytes = Vec::new();
        for long in [1_u64, 5_000_000, 2_000_000, 0x1000] {
            bytes.extend(long.to_ne_bytes());
        }
        for word in [7_u32, 1, 2, 3, 0, 2] {
            bytes.extend(word.to_ne_bytes());
        }
        let event = decode(&bytes).unwrap();
        assert_eq!((event.address, event.tid, event.context, event.part), (0x1000, 7, 3, 2));
        let mut totals = Totals::default();
        totals.add(&Event { part: 1, slept_ns: 3_000_000, duration_ns: 3_000_000, ..event });
        totals.add(&event);
        assert_eq!(totals.to_string(), "stalls=1 stalled_us=5000 stall_us_max=5000");
        assert_eq!(decode(&bytes[1..]), None);
    }
}
