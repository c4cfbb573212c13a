//! The loop and a driver, every interleaving of them: no state in which chains wait, everybody sleeps, and no kick is under way.
//!
//! Steps are the loads and stores of both sides; each has a store buffer, as x86 has (loom sees to weaker orders:
//! `virtq::notify`). What the model leaves open, happens both ways: how long is polled, when a completion is seen, how many
//! chains a turn takes. Its steps and where they stand in the code: [`Step::Reap`] `Pair::completion`, [`Step::Look`] `Pair::look`,
//! [`Step::Work`] `Pair::transmit` with `Ring::ignore_kicks` and `Ring::await_look`, [`Step::Decide`] `Datapath::round_at`,
//! [`Step::Ask`] to [`Step::Recheck`] `Pair::cool` with `Ring::await_kick`, [`Step::Sleep`] `Reactor::turn`.
#![forbid(unsafe_code)]

use crate::virtq::notify::{UNWANTED, Words, is_wanted};
use std::collections::{HashSet, VecDeque};

/// Chains that the driver offers.
const CHAINS: u8 = 4;
/// Where the index begins: it wraps.
const START: u16 = u16::MAX - 1;

/// What the loop does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    Reap,
    Look,
    Work,
    Decide,
    Ask,
    Fence,
    Recheck,
    Sleep,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum DriverStep {
    Publish,
    Fence,
    Check,
    Done,
}

/// As `half::Watch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Watch {
    No,
    Look,
    Kick,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    step: Step,
    pending: bool,
    watch: Watch,
    next: u16,
    driver: DriverStep,
    offered: u8,
    /// Memory: what has left the store buffers.
    index: u16,
    flags: u16,
    event: u16,
    /// Stores on their way: the driver's to the index, the loop's to its word (flags or event).
    driver_stores: VecDeque<u16>,
    loop_stores: VecDeque<u16>,
    /// A kick has left a completion that nobody has seen.
    kicked: bool,
}

/// What is left out, to see that the model would notice.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Without {
    Nothing,
    LoopFence,
    DriverFence,
    Recheck,
    /// It sleeps without asking for kicks.
    Asking,
}

#[derive(Clone, Copy)]
struct Model {
    event_idx: bool,
    without: Without,
}

/// The driver's look at the device's words; the fence is a step of its own.
struct Seen<'a>(&'a State, bool);

impl Words for Seen<'_> {
    fn store_flags(&self, _flags: u16) {}
    fn store_event(&self, _event: u16) {}
    fn flags(&self) -> u16 {
        self.0.flags
    }
    fn event(&self) -> Option<u16> {
        self.1.then_some(self.0.event)
    }
    fn fence(&self) {}
}

impl Model {
    fn start(self) -> State {
        State {
            step: Step::Reap,
            pending: true,
            watch: Watch::No,
            next: START,
            driver: DriverStep::Publish,
            offered: 0,
            index: START,
            flags: UNWANTED,
            event: START.wrapping_sub(1),
            driver_stores: VecDeque::new(),
            loop_stores: VecDeque::new(),
            kicked: false,
        }
    }

    /// All states that one step of somebody leads to.
    fn after(self, state: &State) -> Vec<State> {
        let mut all = Vec::new();
        self.stores_land(state, &mut all);
        self.driver(state, &mut all);
        self.device(state, &mut all);
        all
    }

    fn stores_land(self, state: &State, all: &mut Vec<State>) {
        let mut landed = state.clone();
        if let Some(index) = landed.driver_stores.pop_front() {
            landed.index = index;
            all.push(landed);
        }
        let mut landed = state.clone();
        if let Some(word) = landed.loop_stores.pop_front() {
            if self.event_idx {
                landed.event = word
            } else {
                landed.flags = word
            }
            all.push(landed);
        }
    }

    fn driver(self, state: &State, all: &mut Vec<State>) {
        let mut next = state.clone();
        let new = START.wrapping_add(state.offered.into());
        match state.driver {
            DriverStep::Publish => {
                next.offered += 1;
                next.driver_stores.push_back(new.wrapping_add(1));
                next.driver = DriverStep::Fence;
            }
            DriverStep::Fence if self.without == Without::DriverFence || state.driver_stores.is_empty() => {
                next.driver = DriverStep::Check;
            }
            DriverStep::Check => {
                next.kicked |= is_wanted(&Seen(state, self.event_idx), Some(new.wrapping_sub(1)), new, 1);
                next.driver = if state.offered == CHAINS { DriverStep::Done } else { DriverStep::Publish };
            }
            DriverStep::Fence | DriverStep::Done => return,
        }
        all.push(next);
    }

    fn device(self, state: &State, all: &mut Vec<State>) {
        let mut to = |change: &dyn Fn(&mut State)| {
            let mut next = state.clone();
            change(&mut next);
            all.push(next);
        };
        match state.step {
            Step::Reap => {
                to(&|next| next.step = Step::Look);
                if state.kicked {
                    to(&|next| (next.kicked, next.pending, next.step) = (false, true, Step::Look));
                }
            }
            Step::Look => to(&|next| {
                if state.watch == Watch::Look && !state.pending {
                    next.pending = state.index != state.next;
                }
                next.step = if next.pending { Step::Work } else { Step::Decide };
            }),
            // One chain, all that are seen, or the budget without its end.
            Step::Work => {
                let seen = state.index.wrapping_sub(state.next);
                for taken in 0..=seen {
                    to(&|next| {
                        if state.watch == Watch::Kick && !self.event_idx {
                            next.loop_stores.push_back(UNWANTED);
                        }
                        next.next = state.next.wrapping_add(taken);
                        let dry = taken == seen;
                        (next.pending, next.watch) = (!dry, if dry { Watch::Look } else { Watch::No });
                        next.step = Step::Decide;
                    });
                }
            }
            Step::Decide => {
                to(&|next| next.step = Step::Reap);
                if state.watch == Watch::Look && !state.pending {
                    let asks = self.without != Without::Asking;
                    to(&|next| next.step = if asks { Step::Ask } else { Step::Sleep });
                } else if !state.pending {
                    to(&|next| next.step = Step::Sleep);
                }
            }
            Step::Ask => to(&|next| {
                next.loop_stores.push_back(if self.event_idx { state.next } else { 0 });
                next.step = Step::Fence;
            }),
            Step::Fence if self.without == Without::LoopFence || state.loop_stores.is_empty() => {
                to(&|next| next.step = Step::Recheck);
            }
            Step::Fence => {}
            Step::Recheck => {
                let pending = self.without != Without::Recheck && state.index != state.next;
                to(&|next| (next.pending, next.watch, next.step) = (pending, Watch::Kick, Step::Reap));
                if !pending {
                    to(&|next| (next.watch, next.step) = (Watch::Kick, Step::Sleep));
                }
            }
            Step::Sleep if state.kicked => to(&|next| next.step = Step::Reap),
            Step::Sleep => {}
        }
    }

    /// Chains wait, and nobody will ever do anything.
    fn is_stuck(self, state: &State) -> bool {
        self.after(state).is_empty() && state.next != START.wrapping_add(CHAINS.into())
    }

    /// Walks all states; returns how many there are, and one that is stuck.
    fn explore(self) -> (usize, Option<State>) {
        let start = self.start();
        let mut known = HashSet::from([start.clone()]);
        let mut waiting = vec![start];
        while let Some(state) = waiting.pop() {
            if self.is_stuck(&state) {
                return (known.len(), Some(state));
            }
            for next in self.after(&state) {
                if known.insert(next.clone()) {
                    waiting.push(next);
                }
            }
        }
        (known.len(), None)
    }
}

#[test]
fn nobody_sleeps_while_chains_wait() {
    for event_idx in [false, true] {
        let (states, stuck) = Model { event_idx, without: Without::Nothing }.explore();
        assert_eq!(stuck, None);
        assert!(states > 1000, "{states}");
    }
}

#[test]
fn each_part_is_needed() {
    for event_idx in [false, true] {
        for without in [Without::LoopFence, Without::DriverFence, Without::Recheck, Without::Asking] {
            let (_, stuck) = Model { event_idx, without }.explore();
            assert!(stuck.is_some(), "without {}", without as u8);
        }
    }
}
