//! Messages between workers: a queue for the content, IORING_OP_MSG_RING for the wake-up.
//!
//! A sender that is no worker (the control helper thread) rings an eventfd instead, which the receiving
//! reactor polls. Wake-ups are coalesced: one is under way at most until the receiver has looked.
#![forbid(unsafe_code)]

use super::Reactor;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

/// The receiving end, owned by one worker.
pub struct Mailbox<M> {
    receiver: Receiver<M>,
    sender: Sender<M>,
    ring_fd: RawFd,
    rung: Arc<AtomicBool>,
}

/// A sending end: cheap to clone, one for each worker that wants to send.
pub struct Postbox<M> {
    sender: Sender<M>,
    ring_fd: RawFd,
    rung: Arc<AtomicBool>,
}

impl<M> Clone for Postbox<M> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), ring_fd: self.ring_fd, rung: self.rung.clone() }
    }
}

impl<M> Mailbox<M> {
    /// A mailbox whose wake-ups arrive as [`super::Done::Mail`] at the reactor with this ring descriptor.
    pub fn new(ring_fd: RawFd) -> Self {
        let (sender, receiver) = channel();
        Self { receiver, sender, ring_fd, rung: Arc::new(AtomicBool::new(false)) }
    }

    /// A sending end for another worker.
    pub fn postbox(&self) -> Postbox<M> {
        Postbox { sender: self.sender.clone(), ring_fd: self.ring_fd, rung: self.rung.clone() }
    }

    /// Everything that has arrived so far. Call it on every wake-up.
    pub fn drain(&self) -> impl Iterator<Item = M> + '_ {
        // Clear first: a message put in after this rings again.
        self.rung.store(false, Ordering::SeqCst);
        self.receiver.try_iter()
    }
}

impl<M> Postbox<M> {
    /// Puts a message in and wakes the receiver through the sender's own ring.
    /// A receiver that has ended is not an error: its messages are dropped.
    pub fn send<T: Copy>(&self, reactor: &mut Reactor<T>, message: M) {
        if self.sender.send(message).is_ok() && !self.rung.swap(true, Ordering::SeqCst) {
            reactor.ring_mailbox(self.ring_fd);
        }
    }
}
