//! What a pair keeps for each of its two rings: the ring while it runs, and the descriptors that outlive it.
//!
//! Not here: when to look at a ring (`pair`).
#![forbid(unsafe_code)]

use super::PairToken;
use super::ahead::Told;
use crate::memory::MissingRange;
use crate::reactor::{OpId, Reactor};
use crate::virtq::{Queue, QueueError};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// How the next chain of a ring is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Watch {
    /// Something else comes first: work that is known of, memory, room at the uplink. The driver need not kick.
    No,
    /// Its pair is hot: we look again and again. The driver need not kick.
    Look,
    /// The driver has been asked to kick.
    Kick,
}

/// A started ring and its notifications.
pub(super) struct Ring {
    pub(super) queue: Queue,
    pub(super) kick: Option<Arc<OwnedFd>>,
    pub(super) kick_poll: Option<OpId>,
    /// Look at it in the next turn.
    pub(super) pending: bool,
    pub(super) watch: Watch,
    /// It waits for this guest memory (postcopy).
    pub(super) parked: Option<MissingRange>,
    /// Chains may have come whose pages are missing: look at them before their turn comes (postcopy).
    pub(super) look_ahead: bool,
    /// How far that was done.
    pub(super) told: Told,
    /// The last look ended before the chains, since the ring or a table has not arrived (postcopy).
    pub(super) blind: bool,
}

impl Ring {
    /// True if a turn has something to do with it.
    pub(super) fn runnable(&self) -> bool {
        self.pending && self.parked.is_none()
    }

    /// While we look at the ring anyway, the driver need not kick.
    pub(super) fn ignore_kicks(&mut self) {
        if std::mem::replace(&mut self.watch, Watch::No) == Watch::Kick {
            self.queue.disable_kicks();
        }
    }

    /// There is nothing to do: we look again and again from now on, until [`Self::await_kick`].
    pub(super) fn await_look(&mut self) {
        self.pending = false;
        self.watch = Watch::Look;
    }

    /// True if that is what it waits for.
    pub(super) fn awaits_look(&self) -> bool {
        self.watch == Watch::Look && !self.pending && self.parked.is_none()
    }

    /// There is nothing to do, and soon nobody looks: asks the driver to kick, and looks once more after that; a lost
    /// wake-up otherwise.
    pub(super) fn await_kick(&mut self) -> Result<(), QueueError> {
        self.pending = self.queue.enable_kicks()?;
        self.watch = Watch::Kick;
        Ok(())
    }

    /// Looks again, parked or not: memory is new, or the ring was not looked at for a while. True if it was parked.
    pub(super) fn look_again(&mut self) -> bool {
        self.told = Told::default();
        self.go_on()
    }

    /// Looks again: more of the memory has arrived. True if it was parked.
    pub(super) fn go_on(&mut self) -> bool {
        self.pending = true;
        self.look_ahead = true;
        self.parked.take().is_some()
    }

    /// It cannot go on before this has arrived.
    pub(super) fn park(&mut self, range: MissingRange) {
        self.parked = Some(range);
        self.look_ahead = true;
    }
}

/// What stays of a ring between its lives.
#[derive(Default)]
pub(super) struct Half {
    pub(super) ring: Option<Ring>,
    pub(super) enabled: bool,
    /// The base it stopped at: a front-end may ask after the ring was given up.
    pub(super) last_base: u32,
    pub(super) call: Notifier,
    pub(super) error: Notifier,
    /// Tells completions of the kick's poll from those of earlier ones.
    pub(super) epoch: u32,
}

/// An eventfd of the front-end that is written to. One write is in flight at most, whatever the eventfd's state
/// is: one that is full makes only that write wait, inside io_uring.
#[derive(Default)]
pub(super) struct Notifier {
    fd: Option<Arc<OwnedFd>>,
    /// A write to it may wait.
    blocking: bool,
    write: Option<OpId>,
    /// It was to be written while a write was in flight.
    again: bool,
    epoch: u32,
}

impl Notifier {
    /// Tells completions of a write to this eventfd from those of earlier ones.
    pub(super) fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Writes to another eventfd from now on, or to none. A write that still waits at the old one is cancelled,
    /// or a peer that keeps changing full eventfds would fill our ring.
    pub(super) fn replace<T: Copy>(&mut self, reactor: &mut Reactor<T>, fd: Option<Arc<OwnedFd>>) {
        if let Some(write) = self.write.take() {
            reactor.cancel(write);
        }
        self.again = false;
        self.epoch = self.epoch.wrapping_add(1);
        // The peer can change this at any time; it then only harms the speed of its own port.
        let flags = fd.as_ref().map(|fd| fcntl(fd, FcntlArg::F_GETFL).unwrap_or(0));
        self.blocking = flags.is_some_and(|flags| flags & OFlag::O_NONBLOCK.bits() == 0);
        self.fd = fd;
    }

    /// Notifies, unless a write is under way: then once more when it is through.
    pub(super) fn notify<T: Copy + From<PairToken>>(&mut self, reactor: &mut Reactor<T>, token: PairToken) {
        let Some(fd) = &self.fd else { return };
        if self.write.is_some() {
            self.again = true;
        } else {
            self.write = Some(reactor.signal_event(fd, self.blocking, token.into()));
        }
    }

    /// The write has ended.
    pub(super) fn done<T: Copy + From<PairToken>>(
        &mut self,
        reactor: &mut Reactor<T>,
        token: PairToken,
        result: &std::io::Result<()>,
    ) {
        self.write = None;
        let again = std::mem::take(&mut self.again);
        match result {
            Ok(()) if again => self.notify(reactor, token),
            Ok(()) => {}
            // Full and non-blocking: whoever reads it is notified as it is. Anything else is the peer's fault.
            Err(error) => tracing::debug!(%error, "eventfd of the front-end"),
        }
    }
}
