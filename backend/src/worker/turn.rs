//! A pair's turn of the loop: bursts on both rings, their used entries, one notification for each burst.
//!
//! Nothing here sleeps, and nothing here is done per packet but by `net::rx` and `net::tx`. Not here: commands and
//! completions, which say when a ring is to be looked at (`pair`).
#![forbid(unsafe_code)]

use super::datapath::Shared;
use super::pair::Pair;
use super::{Direction, PairToken, What};
use crate::net::counters::PairCounters;
use crate::net::features;
use crate::net::rx::RxSettings;
use crate::net::tx::{self, End, TxSettings};
use crate::observe::trace;
use crate::reactor::Reactor;
use crate::virtq::Queue;
use std::time::Instant;

/// Frames after which used entries are published and the driver is notified.
const BURST: u32 = 64;
/// Bursts that one ring may take in a turn of the loop before the others have theirs.
const BURSTS_PER_TURN: u32 = 4;

impl Pair {
    /// Moves what there is to move, up to the turn's budget; what it sends goes to `peer`, if it is wired to one. Returns how many packets it is worth to wait
    /// for: what comes from an uplink that cannot be peeked at, or is looked at by the clock when much comes, is none.
    pub fn turn<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        shared: &mut Shared,
        now: Instant,
        mut peer: Option<&mut Pair>,
    ) -> u32 {
        self.queued = false;
        let sent = self.transmit(reactor, shared, now, peer.as_deref_mut());
        self.wake_uplink(reactor, Direction::Transmit);
        let received = self.receive(reactor, shared, now);
        if sent + received > 0 {
            self.worked(now);
        }
        if self.looks_ahead() {
            self.look_ahead(shared);
        }
        self.wake_uplink(reactor, Direction::Receive);
        if self.memory.poisoned() {
            self.fail_memory(reactor, shared);
        }
        if let Some(peer) = peer.filter(|peer| peer.memory.poisoned()) {
            peer.fail_memory(reactor, shared);
        }
        if self.pays_by_receiving() { sent + received } else { sent }
    }

    fn transmit<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        shared: &mut Shared,
        now: Instant,
        mut peer: Option<&mut Pair>,
    ) -> u32 {
        let mut moved = 0;
        let settings = TxSettings {
            features: self.features,
            header_len: features::header_len(self.features),
            enabled: self.tx.enabled,
        };
        let token = self.token(What::Call(Direction::Transmit));
        for _ in 0..BURSTS_PER_TURN {
            let Some(ring) = self.tx.ring.as_mut().filter(|ring| ring.runnable()) else { return moved };
            ring.ignore_kicks();
            if let Some(peer) = peer.as_deref_mut().filter(|peer| settings.enabled && peer.blocks()) {
                self.wait_for_peer(reactor, peer);
                return moved;
            }
            let queue = &mut ring.queue;
            let (memory, counters) = (&self.memory, &self.counters);
            let (used, end) = match peer.as_deref_mut() {
                None => tx::run(queue, memory, &mut *self.uplink, &mut shared.tx, settings, counters, BURST),
                Some(peer) => {
                    let mut far = peer.open(&mut shared.link);
                    let usual =
                        if settings.enabled { far.cross(queue, memory, &settings, counters) } else { 0 };
                    let sent = match BURST - usual {
                        0 => (0, End::Budget),
                        rest => tx::run(queue, memory, &mut far, &mut shared.tx, settings, counters, rest),
                    };
                    let done = far.close();
                    peer.delivered(reactor, shared, now, done);
                    (usual + sent.0, sent.1)
                }
            };
            moved += used;
            let call = finish_burst(queue, used, &self.counters);
            let mut full = false;
            let outcome = match end {
                End::Budget => Ok(()),
                End::Idle if ring.kick.is_some() => {
                    ring.await_look();
                    Ok(())
                }
                End::Parked(range) => {
                    ring.park(range);
                    self.counters.parks.add(1);
                    trace::park(self.key, Direction::Transmit, &range);
                    Ok(())
                }
                End::UplinkFull => {
                    match peer.as_deref_mut() {
                        Some(peer) if peer.blocks() => self.wait_for_peer(reactor, peer),
                        // Its ring goes on by itself, or has gone: soon.
                        Some(_) => {}
                        None => {
                            ring.pending = false;
                            if used > 0 {
                                self.found_room();
                            }
                            self.wait_writable(reactor);
                        }
                    }
                    full = true;
                    Ok(())
                }
                End::MemoryFault => {
                    self.fail_memory(reactor, shared);
                    return moved;
                }
                End::Broken(error) => Err(error),
                End::Idle | End::NoBuffers | End::UplinkDown(_) => Ok(()),
            };
            if call {
                self.tx.call.notify(reactor, token);
            }
            if let Err(error) = outcome {
                self.give_up(reactor, Direction::Transmit, error.to_string(), shared);
                return moved;
            }
            if full || used < BURST && self.tx.ring.as_ref().is_none_or(|ring| ring.kick.is_none()) {
                return moved; // a polled ring: the others first
            }
        }
        moved
    }

    fn receive<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        shared: &mut Shared,
        now: Instant,
    ) -> u32 {
        let mut moved = 0;
        if !self.rx.enabled {
            return moved;
        }
        let settings = RxSettings::new(self.features);
        let token = self.token(What::Call(Direction::Receive));
        for _ in 0..BURSTS_PER_TURN {
            if !self.frame_waits() {
                return moved;
            }
            let Some(ring) = self.rx.ring.as_mut().filter(|ring| ring.runnable()) else { return moved };
            ring.ignore_kicks();
            let queue = &mut ring.queue;
            let (used, end) = self.receiver.run(
                queue,
                &self.memory,
                &mut *self.uplink,
                &mut shared.rx,
                settings,
                &self.counters,
                BURST,
            );
            self.arrivals.add(used);
            moved += used;
            let call = finish_burst(queue, used, &self.counters);
            let outcome = match end {
                End::Budget => Ok(()),
                End::Idle => {
                    self.uplink_ran_dry(reactor, now);
                    Ok(())
                }
                End::NoBuffers if ring.kick.is_some() => {
                    ring.await_look();
                    Ok(())
                }
                End::Parked(range) => {
                    ring.park(range);
                    self.counters.parks.add(1);
                    trace::park(self.key, Direction::Receive, &range);
                    Ok(())
                }
                End::UplinkDown(why) => {
                    self.uplink_readable = false;
                    self.uplink_lost(reactor, why, shared);
                    Ok(())
                }
                End::MemoryFault => {
                    self.fail_memory(reactor, shared);
                    return moved;
                }
                End::Broken(error) => Err(error),
                End::NoBuffers | End::UplinkFull => Ok(()),
            };
            if call {
                self.rx.call.notify(reactor, token);
            }
            if let Err(error) = outcome {
                self.give_up(reactor, Direction::Receive, error.to_string(), shared);
                return moved;
            }
            if self.rx.ring.as_ref().is_none_or(|ring| ring.kick.is_none()) {
                return moved;
            }
        }
        moved
    }
}

/// Publishes a burst's used entries. True if the driver wants to be notified.
pub(super) fn finish_burst(queue: &mut Queue, used: u32, counters: &PairCounters) -> bool {
    if used == 0 {
        return false;
    }
    queue.publish();
    counters.bursts.add(1);
    let call = queue.needs_call();
    if call {
        counters.calls.add(1);
    }
    call
}
