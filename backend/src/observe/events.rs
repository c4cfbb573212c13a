//! Stalls that have ended, as the loop hears of them.
#![forbid(unsafe_code)]

use ebpf_common::faults::Event;

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
