//! What a back-end did that it must not do. Anybody who notices adds to it, from any thread.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

/// Kinds of wrong behaviour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wrong {
    /// A fault, or a page filled, between the memory table and its acknowledgement.
    TouchedBeforeAck,
    /// A page had content when ours came: the back-end put a page of zeros into the guest.
    FilledHole,
    /// A page that never came has content.
    HoleGone,
    /// A page that came is not what it was, outside of what packets wrote.
    PageChanged,
    /// A packet that was received has zeros where its content should be.
    ZeroPacket,
    /// A packet that was received is damaged.
    DamagedPacket,
    /// Packets came in another order than they were sent.
    PacketOrder,
    /// The used ring is out of order, or its index is wrong.
    RingOrder,
    /// All pages have come, and the ring stands still.
    NotAwake,
    /// A fault at an address that is in no table, or an event that nobody asked for.
    StrangeEvent,
    /// A page was delivered twice: a fault of this program.
    DeliveredTwice,
    /// The ring went on after GET_VRING_BASE was answered, or the base is not where it stopped.
    FalseBase,
}

/// What was found, by kind: how often, and the first one in words.
pub type Summary = BTreeMap<Wrong, (u64, String)>;

/// A list that threads share.
#[derive(Clone, Debug, Default)]
pub struct Findings(Arc<Mutex<Summary>>);

impl Findings {
    /// Adds one.
    pub fn add(&self, wrong: Wrong, text: impl FnOnce() -> String) {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.entry(wrong).or_insert_with(|| (0, text())).0 += 1;
    }

    /// All of them.
    pub fn summary(&self) -> Summary {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// As text, one line each.
pub fn lines(summary: &Summary) -> Vec<String> {
    summary.iter().map(|(wrong, (count, first))| format!("{wrong:?} × {count}, first: {first}")).collect()
}
