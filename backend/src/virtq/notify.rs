//! Who notifies whom: the order of stores and loads by which no notification is lost, and the decision (VIRTIO 1.3 §2.7.7,
//! §2.7.10; packed rings: §2.8.10, §2.8.14). Driver and device do the same, each with the other's words, in both directions:
//!
//! ```text
//!   one that wants to sleep                     one that has something to say
//!     store: I want to be notified                store: the index of what is new
//!     ── full fence ──                            ── full fence ──
//!     load:  the index; new? then do not sleep    load:  is a notification wanted? then notify
//! ```
//! Each loads what the other has stored. Without the fences both loads may come before both stores: the one sleeps, the other
//! does not notify. Processors do that (x86 too), so code that keeps the order in the source alone fails rarely, and for
//! ever. `tests/notification_order.rs` shows it under loom; it is
//! compiled with this file, so nothing of the crate is used here. (On a packed ring, a descriptor's flags are the index.)
#![forbid(unsafe_code)]

use super::place::Place;

/// "Do not notify me": NO_NOTIFY of the used ring's flags, NO_INTERRUPT of the available ring's.
pub(crate) const UNWANTED: u16 = 1;

/// The words of a ring by which its two sides tell each other when to notify, as one side sees them.
pub(crate) trait Words {
    /// Our flags.
    fn store_flags(&self, flags: u16);
    /// Our event index.
    fn store_event(&self, event: u16);
    /// The other side's flags.
    fn flags(&self) -> u16;
    /// The other side's event index; None without EVENT_IDX.
    fn event(&self) -> Option<u16>;
    /// A full fence.
    fn fence(&self);
}

/// Asks to be notified when index `next` is passed. `already`: the flags say so. Look at the index once more after this, and
/// only then sleep.
#[inline(always)]
pub(crate) fn ask(words: &impl Words, event_idx: bool, next: u16, already: bool) {
    if event_idx {
        words.store_event(next);
    } else if !already {
        words.store_flags(0);
    }
    words.fence();
}

/// After the index went from `old` to `new` by `count` (a u16 may have wrapped): whether the other side wants to be notified.
/// `old` is the index at the last such decision; None before the first.
#[inline(always)]
pub(crate) fn is_wanted(words: &impl Words, old: Option<u16>, new: u16, count: u32) -> bool {
    words.fence();
    match (words.event(), old) {
        (None, _) => words.flags() & UNWANTED == 0,
        // Nobody knows what was announced before us: the first time always notifies.
        (Some(_), None) => true,
        // Round the clock once: every event was passed.
        (Some(_), Some(_)) if count > u32::from(u16::MAX) => true,
        (Some(event), Some(old)) => event_passed(event, new, old),
    }
}

/// Flags of a packed ring's event suppression structure (§2.8.14): notify always, never, or at the place beside them.
pub(crate) const EVENT_ENABLE: u16 = 0;
pub(crate) const EVENT_DISABLE: u16 = 1;
pub(crate) const EVENT_DESC: u16 = 2;
/// The other bits are reserved.
const EVENT_MASK: u16 = 3;

/// The event suppression structures of a packed ring, as one side sees them. Each is one word, so that its halves are never seen
/// apart.
pub(crate) trait PackedWords {
    /// Ours: place and flags.
    fn store_event(&self, off_wrap: u16, flags: u16);
    /// The other side's.
    fn event(&self) -> (u16, u16);
    /// A full fence.
    fn fence(&self);
}

/// As [`ask`], on a packed ring: to be notified when the descriptor at `next` has been written.
#[inline(always)]
pub(crate) fn ask_packed(words: &impl PackedWords, event_idx: bool, next: Place) {
    words.store_event(next.off_wrap(), if event_idx { EVENT_DESC } else { EVENT_ENABLE });
    words.fence();
}

/// As [`is_wanted`], on a packed ring of `size` slots, of which `count` have been written from `old` on.
#[inline(always)]
pub(crate) fn is_wanted_packed(
    words: &impl PackedWords,
    event_idx: bool,
    size: u32,
    old: Option<Place>,
    count: u32,
) -> bool {
    words.fence();
    let (off_wrap, flags) = words.event();
    match flags & EVENT_MASK {
        EVENT_DISABLE => false,
        EVENT_DESC if event_idx => match (Place::parse(off_wrap, size), old) {
            // Twice round: every event was passed.
            (Some(event), Some(old)) if count < 2 * size => old.until(event, size) < count,
            // Nobody knows what was announced before us: the first time always notifies.
            _ => true,
        },
        _ => true,
    }
}

/// `vring_need_event`: whether `event` is among the indices `old .. new` that were just passed (§2.7.10.1).
#[inline(always)]
fn event_passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
