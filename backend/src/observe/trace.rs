//! Static tracepoints (USDT): what happens to rings, for `bpftrace` and `perf` to stop at. One `nop` each while nobody looks.
//!
//! ```text
//! provider vhost_user_net
//!   ring_start  port pair direction base            a ring runs from this available index on
//!   ring_stop   port pair direction base            it has stopped there, for whatever reason
//!   park        port pair direction gpa len         it waits for missing guest memory
//!   resume      port pair direction                 that has come, or been replaced: it goes on
//!   phase       port phase                          a migration's phase of the port (see `Phase`)
//!   handover    port step                           the port goes to another process (see `Handover`)
//! ```
//! direction: 0 receive (towards the guest), 1 transmit. All are whole numbers. Names and arguments are an interface: they may be
//! added to, not changed.
//!
//! Each point stands in a function that is not inlined, so that there is one place to stop at.

use crate::memory::MissingRange;
use crate::worker::{Direction, PairKey};
use probe::probe;

/// Where a port is in a migration: argument `phase`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Phase {
    /// Writes to guest memory are not logged, and all of it is there.
    Normal = 0,
    /// Writes are logged: the source of a migration.
    Logging = 1,
    /// The front-end has said that memory will be missing (POSTCOPY_ADVISE).
    Advised = 2,
    /// Memory is missing (POSTCOPY_LISTEN).
    Listening = 3,
    /// All of it has come (POSTCOPY_END).
    Ended = 4,
}

/// How far a port's way to another process is: argument `step`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Handover {
    /// Its rings are stopped for it.
    Stopped = 0,
    /// All it takes has been sent.
    Sent = 1,
    /// It has been taken over.
    Taken = 2,
    /// It stays where it was.
    Failed = 3,
}

fn number(direction: Direction) -> u32 {
    match direction {
        Direction::Receive => 0,
        Direction::Transmit => 1,
    }
}

/// A ring runs.
#[inline(never)]
pub fn ring_start(key: PairKey, direction: Direction, base: u32) {
    probe!(vhost_user_net, ring_start, key.port, key.pair, number(direction), base);
}

/// A ring has stopped.
#[inline(never)]
pub fn ring_stop(key: PairKey, direction: Direction, base: u32) {
    probe!(vhost_user_net, ring_stop, key.port, key.pair, number(direction), base);
}

/// A ring waits for guest memory.
#[inline(never)]
pub fn park(key: PairKey, direction: Direction, missing: &MissingRange) {
    probe!(vhost_user_net, park, key.port, key.pair, number(direction), missing.gpa, missing.len);
}

/// A ring that waited goes on.
#[inline(never)]
pub fn resume(key: PairKey, direction: Direction) {
    probe!(vhost_user_net, resume, key.port, key.pair, number(direction));
}

/// A port enters a phase of a migration.
#[inline(never)]
pub fn phase(port: u16, phase: Phase) {
    probe!(vhost_user_net, phase, port, phase as u32);
}

/// A port is on its way to another process.
#[inline(never)]
pub fn handover(port: u16, step: Handover) {
    probe!(vhost_user_net, handover, port, step as u32);
}

/// Keeps a point that nothing comes by yet in the program: what would be left of it is a note that leads nowhere.
#[used]
static HANDOVER: fn(u16, Handover) = handover;
