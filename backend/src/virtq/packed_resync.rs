//! Where a packed ring stands, by what is in it. Only the flags of its descriptors tell, as there is no `used.idx`.
//!
//! A back-end that died was not asked for its base, and QEMU then says the one it said at the last start; the guest is elsewhere
//! by now. As chains complete in ring order, a ring looks like this, from the place where it stands, once round:
//!
//! ```text
//!   place                                end
//!  ───┼───────────────────────────────────┼──────────────────────────────────┼───  = place, in the next round
//!     │ available: AVAIL = wrap ≠ USED    │ used before: AVAIL = USED ≠ wrap │
//! ```
//! Of a used chain of several descriptors the first is used, and the others are as the driver left them; the first keeps its
//! NEXT flag here, so they can be told from chains that are available. Other back-ends drop it.
//!
//! So the base is believed if such a ring can stand there ([`Ring::may_stand_at`]), which holds for every base that is true; if it
//! cannot, and there is exactly one place where it can ([`Ring::place`]), that is taken. Rings in which one used descriptor
//! stands for many do not tell, and are not looked at.
#![forbid(unsafe_code)]

use super::place::Place;
use crate::memory::packed_ring::{AVAIL, NEXT, PackedAccess, USED, Word};

/// What a descriptor is, of either round.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Available(bool),
    Used(bool),
}

impl Kind {
    fn of(word: Word) -> Self {
        let wrap = word.has(AVAIL);
        if word.has(USED) == wrap { Self::Used(wrap) } else { Self::Available(wrap) }
    }
}

/// What follows from the place on.
#[derive(Clone, Copy)]
enum Stretch {
    Available,
    /// The first that is not.
    End,
    /// A list that is not available yet, since a driver writes its first descriptor last; whether it goes on.
    Begun(bool),
    /// Used in the round before.
    Before,
}

/// A ring that no other device works on.
#[derive(Clone, Copy)]
pub(super) struct Ring<'a>(pub(super) PackedAccess<'a>);

impl Ring<'_> {
    fn size(self) -> u32 {
        self.0.size()
    }

    fn at(self, place: Place) -> (Kind, bool) {
        let word = self.0.word(place.slot);
        (Kind::of(word), word.has(NEXT))
    }

    /// Whether a ring that completes in order can stand at `place`.
    pub(super) fn may_stand_at(self, place: Place) -> bool {
        let mut stretch = Stretch::Available;
        // The list that is available goes on; the next may be the rest of a used chain.
        let (mut inside, mut rest) = (false, true);
        let mut at = place;
        for _ in 0..self.size() {
            let (kind, next) = self.at(at);
            let available = kind == Kind::Available(at.wrap);
            let wrap = at.wrap;
            at = at.forth(1, self.size());
            stretch = match stretch {
                Stretch::Available if available => {
                    inside = next;
                    continue;
                }
                Stretch::Available if inside => return false,
                Stretch::Available => Stretch::End,
                Stretch::End | Stretch::Begun(true) if available => {
                    stretch = Stretch::Begun(next);
                    continue;
                }
                _ => Stretch::Before,
            };
            match kind {
                Kind::Used(used) if used != wrap => rest = true,
                Kind::Available(old) if old != wrap && rest => rest = next,
                _ => return false,
            }
        }
        true
    }

    /// The one place where the ring can stand if used chains have kept their NEXT flags; `None` if there are several or none.
    pub(super) fn place(self) -> Option<Place> {
        let size = self.size();
        let mut found = None;
        let mut any_used = false;
        for slot in 0..size {
            // Where chains that are used end, and others begin.
            let (Kind::Used(wrap), mut next) = self.at(Place { slot, wrap: false }) else { continue };
            any_used = true;
            let mut behind = Place { slot, wrap }.forth(1, size);
            for _ in 1..size {
                if !next {
                    break;
                }
                let (kind, more) = self.at(behind);
                if kind != Kind::Available(behind.wrap) {
                    return None;
                }
                next = more;
                behind = behind.forth(1, size);
            }
            if self.at(behind).0 != Kind::Used(behind.wrap) && found.replace(behind).is_some() {
                return None;
            }
        }
        if !any_used {
            // All is available, as in most receive rings: where the round changes. Among lists, the last of one that was used
            // looks like one that is not.
            for slot in 0..size {
                let (Kind::Available(wrap), false) = self.at(Place { slot, wrap: false }) else {
                    return None;
                };
                let here = Place { slot, wrap };
                let before = here.back(1, size);
                if self.at(before).0 != Kind::Available(before.wrap) && found.replace(here).is_some() {
                    return None;
                }
            }
        }
        found.filter(|place| self.may_stand_at(*place))
    }
}
