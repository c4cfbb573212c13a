//! Typed operations over one io_uring.
//!
//! Every operation in flight owns what the kernel may touch on its behalf (descriptor, buffer, address,
//! time); it is given back with the completion or freed after it, never before.

use super::message::{Incoming, Outgoing, UnixAddress};
use super::probe::{self, SetupError};
use io_uring::types::{CancelBuilder, Fd, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use slab::Slab;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// user_data of wake-ups that other workers send (MSG_RING).
const MAIL: u64 = u64::MAX;
/// user_data of wake-ups that this worker sends: the target's ring descriptor stands in the low half. Their
/// completions come only if they fail.
const WAKE: u64 = (u64::MAX - 1) << 32 | 1 << 31;
/// Set in the user_data of a request to cancel an operation; the rest is that operation's. MAIL and WAKE have it too.
const CANCEL: u64 = 1 << 31;
/// Generations stay below those of the numbers above, whatever bits are set beside them.
const GENERATION_MAX: u32 = 0x7fff_ffff;
/// Turns without a system call after which one is made all the same, lest anything waits for one that the kernel does not
/// announce.
const QUIET_TURNS: u32 = 4096;
/// How often a closing reactor looks for the completions of what it cancelled before it leaks the rest.
const DRAIN_ROUNDS: usize = 100;

/// Names one operation in flight. Stale names are harmless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpId(u64);

/// What an operation ended with.
pub enum Done {
    /// A connection was accepted.
    Accepted(io::Result<OwnedFd>),
    /// A connect attempt ended.
    Connected(io::Result<()>),
    /// Bytes and descriptors came in; zero bytes are the end of the stream.
    Received(io::Result<usize>, Box<Incoming>),
    /// Bytes of a message have left.
    Sent(io::Result<usize>, Box<Outgoing>),
    /// A descriptor is ready (poll events), or polling failed. `more` is false when it must be armed again.
    Ready(io::Result<u32>, bool),
    /// An eventfd was written.
    Signalled(io::Result<()>),
    /// A signal arrived through a signalfd.
    Signal(io::Result<libc::signalfd_siginfo>),
    /// A timer ran out (false: cancelled).
    Elapsed(bool),
    /// Pages are in memory, or why not.
    Populated(io::Result<()>),
    /// The kernel side of a socket's rings has been woken.
    Woken(io::Result<()>),
    /// An io-wq thread has come by.
    Nudged,
}

enum Body {
    Accept,
    Connect { _address: Box<UnixAddress> },
    Receive(Box<Incoming>),
    Send(Box<Outgoing>),
    Poll,
    Event,
    Wake,
    Signal(Box<libc::signalfd_siginfo>),
    Timer { _time: Box<Timespec> },
    Populate,
    Nudge,
}

struct InFlight<T> {
    token: T,
    generation: u32,
    body: Body,
    // Keeps the descriptor number valid until the kernel has taken the operation, and the file until its end.
    _fd: Option<Arc<OwnedFd>>,
}

/// One io_uring and its operations in flight. `T` is the owner's token: what an operation is for.
pub struct Reactor<T> {
    ring: IoUring,
    ops: Slab<InFlight<T>>,
    /// Entries that found the submission queue full, in order.
    backlog: VecDeque<squeue::Entry>,
    generation: u32,
    /// Turns since the last system call.
    quiet: u32,
    /// Operations whose cancellation came at the wrong moment.
    cancel_again: Vec<u64>,
}

impl<T: Copy> Reactor<T> {
    /// Sets up a ring for the calling thread; only this thread may use it (SINGLE_ISSUER).
    ///
    /// # Errors
    /// See [`SetupError`].
    pub fn new() -> Result<Self, SetupError> {
        Ok(Self {
            ring: probe::build()?,
            ops: Slab::with_capacity(64),
            backlog: VecDeque::new(),
            generation: 0,
            quiet: 0,
            cancel_again: Vec::new(),
        })
    }

    /// The ring's descriptor, for wake-ups from other workers.
    pub fn ring_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// Operations in flight.
    pub fn in_flight(&self) -> usize {
        self.ops.len()
    }

    /// Accepts one connection.
    pub fn accept(&mut self, listener: &Arc<OwnedFd>, token: T) -> OpId {
        let entry = opcode::Accept::new(Fd(listener.as_raw_fd()), std::ptr::null_mut(), std::ptr::null_mut())
            .flags(libc::SOCK_CLOEXEC)
            .build();
        self.start(entry, token, Body::Accept, Some(listener))
    }

    /// Connects a socket.
    pub fn connect(&mut self, socket: &Arc<OwnedFd>, address: Box<UnixAddress>, token: T) -> OpId {
        let entry =
            opcode::Connect::new(Fd(socket.as_raw_fd()), (&raw const address.address).cast(), address.len)
                .build();
        self.start(entry, token, Body::Connect { _address: address }, Some(socket))
    }

    /// Reads bytes and descriptors from a socket, once.
    pub fn receive(&mut self, socket: &Arc<OwnedFd>, mut buffer: Box<Incoming>, token: T) -> OpId {
        let entry = opcode::RecvMsg::new(Fd(socket.as_raw_fd()), buffer.prepare())
            .flags(libc::MSG_CMSG_CLOEXEC as u32)
            .build();
        self.start(entry, token, Body::Receive(buffer), Some(socket))
    }

    /// Sends (the rest of) a message, once. The owner goes on after a short send.
    pub fn send(&mut self, socket: &Arc<OwnedFd>, mut message: Box<Outgoing>, token: T) -> OpId {
        let entry = opcode::SendMsg::new(Fd(socket.as_raw_fd()), message.prepare())
            .flags(libc::MSG_NOSIGNAL as u32)
            .build();
        self.start(entry, token, Body::Send(message), Some(socket))
    }

    /// Reports every time the descriptor becomes ready for `events` (multishot, edge-triggered: each new
    /// wake-up of the file reports once, and once at the start if it is ready already).
    pub fn poll(&mut self, fd: &Arc<OwnedFd>, events: i16, token: T) -> OpId {
        let entry = opcode::PollAdd::new(Fd(fd.as_raw_fd()), events as u32).multi(true).build();
        self.start(entry, token, Body::Poll, Some(fd))
    }

    /// Reports once when the descriptor is ready for `events`.
    pub fn poll_once(&mut self, fd: &Arc<OwnedFd>, events: i16, token: T) -> OpId {
        let entry = opcode::PollAdd::new(Fd(fd.as_raw_fd()), events as u32).build();
        self.start(entry, token, Body::Poll, Some(fd))
    }

    /// Adds one to an eventfd. Never blocks the loop, whatever the eventfd's counter and flags are: a write
    /// that would block waits inside io_uring (PROTOCOL: a call eventfd preset to its maximum).
    ///
    /// `blocking`: the eventfd has no O_NONBLOCK. Then an io-wq worker makes the write at once (8 µs): io_uring
    /// would otherwise try it in this thread again and again before it gives it to one (209 µs; non-blocking: 0.7).
    pub fn signal_event(&mut self, eventfd: &Arc<OwnedFd>, blocking: bool, token: T) -> OpId {
        static ONE: u64 = 1;
        let mut entry = opcode::Write::new(Fd(eventfd.as_raw_fd()), (&raw const ONE).cast(), 8).build();
        if blocking {
            entry = entry.flags(squeue::Flags::ASYNC);
        }
        self.start(entry, token, Body::Event, Some(eventfd))
    }

    /// Wakes the kernel side of an AF_XDP socket's rings: by a send of nothing for TX, a receive of nothing for FILL. It never
    /// waits.
    pub fn wake_socket(&mut self, socket: &Arc<OwnedFd>, send: bool, token: T) -> OpId {
        let fd = Fd(socket.as_raw_fd());
        let entry = if send {
            opcode::Send::new(fd, std::ptr::null(), 0).flags(libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL).build()
        } else {
            opcode::Recv::new(fd, std::ptr::null_mut(), 0).flags(libc::MSG_DONTWAIT).build()
        };
        self.start(entry, token, Body::Wake, Some(socket))
    }

    /// Reads one signal from a signalfd.
    pub fn read_signal(&mut self, signalfd: &Arc<OwnedFd>, token: T) -> OpId {
        // SAFETY: all-zero bytes are a valid signalfd_siginfo.
        let mut info: Box<libc::signalfd_siginfo> = unsafe { Box::new(std::mem::zeroed()) };
        let size = size_of::<libc::signalfd_siginfo>() as u32;
        let entry = opcode::Read::new(Fd(signalfd.as_raw_fd()), (&raw mut *info).cast(), size).build();
        self.start(entry, token, Body::Signal(info), Some(signalfd))
    }

    /// Runs out after `after`.
    pub fn timer(&mut self, after: Duration, token: T) -> OpId {
        let time = Box::new(Timespec::from(after));
        let entry = opcode::Timeout::new(&raw const *time).build();
        self.start(entry, token, Body::Timer { _time: time }, None)
    }

    /// Brings the pages of an address range into memory, as writes to them would, on an io-wq thread (MADV_POPULATE_WRITE). It
    /// may take for ever, and cannot be cancelled.
    pub fn populate(&mut self, addr: u64, len: u64, token: T) -> OpId {
        let entry = opcode::Madvise::new(addr as *const _, len as i64, libc::MADV_POPULATE_WRITE).build();
        self.start(entry, token, Body::Populate, None)
    }

    /// Makes an io-wq thread look after the queue that populates wait in.
    pub fn nudge(&mut self, token: T) -> OpId {
        let entry = opcode::Nop::new().build().flags(squeue::Flags::ASYNC);
        self.start(entry, token, Body::Nudge, None)
    }

    /// How many io-wq threads may work for this ring at once.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_workers(&mut self, bounded: u32) -> io::Result<()> {
        self.ring.submitter().register_iowq_max_workers(&mut [bounded, 0])
    }

    /// Asks the kernel to end an operation. Its completion still comes, as a failure or as what it had
    /// reached; the owner must be ready for both.
    pub fn cancel(&mut self, op: OpId) {
        let entry = opcode::AsyncCancel::new(op.0).build().user_data(op.0 | CANCEL);
        self.push(&entry);
    }

    /// Asks again where a request met an operation in the hands of an io-wq worker. The worker may just have
    /// armed a poll for it and never look at the request; the next one finds the poll.
    fn cancel_again(&mut self) {
        for id in std::mem::take(&mut self.cancel_again) {
            let alive = self.ops.get((id & 0x7fff_ffff) as usize);
            if alive.is_some_and(|op| op.generation == (id >> 32) as u32) {
                self.cancel(OpId(id));
            }
        }
    }

    /// Wakes the worker with this ring (see [`super::mailbox`]).
    pub(super) fn ring_mailbox(&mut self, ring_fd: RawFd) {
        let entry = opcode::MsgRingData::new(Fd(ring_fd), 0, MAIL, None)
            .build()
            .flags(squeue::Flags::SKIP_SUCCESS)
            .user_data(WAKE | ring_fd as u64);
        self.push(&entry);
    }

    fn start(&mut self, entry: squeue::Entry, token: T, body: Body, fd: Option<&Arc<OwnedFd>>) -> OpId {
        self.generation = self.generation.wrapping_add(1) & GENERATION_MAX;
        let generation = self.generation;
        let key = self.ops.insert(InFlight { token, generation, body, _fd: fd.cloned() });
        // Bit 31 is clear in every operation's id, and set in MAIL and WAKE.
        let id = (u64::from(generation) << 32 | key as u64) & !CANCEL;
        self.push(&entry.user_data(id));
        OpId(id)
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: everything the entry points to is owned by `ops` (or static) until its completion.
        if !self.backlog.is_empty() || unsafe { self.ring.submission().push(entry) }.is_err() {
            self.backlog.push_back(entry.clone());
        }
    }

    /// Moves the backlog into the submission queue as far as there is room, handing it over as often as the kernel
    /// takes it. What stays (the kernel's back-pressure) goes in a later turn.
    fn push_backlog(&mut self) {
        while let Some(entry) = self.backlog.front() {
            // SAFETY: as in `push`.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                self.backlog.pop_front();
            } else if !matches!(self.ring.submit(), Ok(n) if n > 0) {
                return;
            }
        }
    }

    /// Hands new operations to the kernel and collects what has ended into `out`. Sleeps until something
    /// has ended if `wait` is set; otherwise makes a system call only if there is something to hand over,
    /// completions wait for this thread to ask, or it has made none for long.
    ///
    /// # Errors
    /// What `io_uring_enter` says, except interruption and back-pressure.
    pub fn turn(&mut self, wait: bool, out: &mut Vec<(T, Done)>, mail: &mut bool) -> io::Result<()> {
        self.push_backlog();
        let (pending, work) = {
            let sq = self.ring.submission();
            (sq.len(), sq.taskrun() || sq.cq_overflow())
        };
        let ready = !self.ring.completion().is_empty();
        let want = usize::from(wait && !ready && self.backlog.is_empty());
        self.quiet += 1;
        if pending > 0 || work || want > 0 || self.quiet >= QUIET_TURNS {
            self.quiet = 0;
            // SAFETY: the entries handed over are valid (see `push`); no argument is passed.
            let entered = unsafe {
                self.ring.submitter().enter::<libc::sigset_t>(
                    pending as u32,
                    want as u32,
                    1, // IORING_ENTER_GETEVENTS: run deferred completions
                    None,
                )
            };
            if let Err(error) = entered
                && !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN))
            {
                return Err(error);
            }
        }
        self.reap(out, mail);
        self.cancel_again();
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<(T, Done)>, mail: &mut bool) {
        let mut failed_wakes = Vec::new();
        for cqe in self.ring.completion() {
            let id = cqe.user_data();
            if id == MAIL {
                *mail = true;
                continue;
            }
            if id & !0x7fff_ffff == WAKE {
                // Any other error: the other worker has ended, and needs no waking.
                if matches!(-cqe.result(), libc::ENOMEM | libc::EOVERFLOW | libc::EAGAIN) {
                    failed_wakes.push((id & 0x7fff_ffff) as RawFd);
                }
                continue;
            }
            if id & CANCEL != 0 {
                if cqe.result() == -libc::EALREADY {
                    self.cancel_again.push(id & !CANCEL);
                }
                continue;
            }
            let key = (id & 0x7fff_ffff) as usize;
            let generation = (id >> 32) as u32;
            if self.ops.get(key).is_none_or(|op| op.generation != generation) {
                tracing::error!(id, "io_uring completion of an unknown operation");
                continue;
            }
            let more = cqueue::more(cqe.flags());
            let result = cqe.result();
            let outcome =
                if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result as u32) };
            if more {
                let op = &self.ops[key];
                // Only polls report more than once.
                out.push((op.token, Done::Ready(outcome, true)));
                continue;
            }
            let op = self.ops.remove(key);
            let done = match op.body {
                Body::Accept => Done::Accepted(accepted(outcome)),
                Body::Connect { .. } => Done::Connected(outcome.map(drop)),
                Body::Receive(buffer) => Done::Received(outcome.map(|n| n as usize), buffer),
                Body::Send(message) => Done::Sent(outcome.map(|n| n as usize), message),
                Body::Poll => Done::Ready(outcome, false),
                Body::Event => Done::Signalled(outcome.map(drop)),
                Body::Wake => Done::Woken(outcome.map(drop)),
                Body::Signal(info) => Done::Signal(outcome.map(|_| *info)),
                Body::Timer { .. } => Done::Elapsed(result == -libc::ETIME),
                Body::Populate => Done::Populated(outcome.map(drop)),
                Body::Nudge => Done::Nudged,
            };
            out.push((op.token, done));
        }
        // The mail is in the box; only the bell did not ring (no memory for the entry, mostly): again.
        for ring_fd in failed_wakes {
            tracing::debug!(ring_fd, "a wake-up failed and is repeated");
            self.ring_mailbox(ring_fd);
        }
    }
}

fn accepted(outcome: io::Result<u32>) -> io::Result<OwnedFd> {
    // SAFETY: a successful accept returns a new descriptor that nobody else owns.
    outcome.map(|fd| unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

impl<T> Drop for Reactor<T> {
    fn drop(&mut self) {
        // The kernel may still write into buffers of operations in flight: end them first.
        // (Populates of pages that do not come cannot be ended: no longer than this.)
        let patience = Timespec::new().nsec(100_000_000);
        let _ = self.ring.submitter().register_sync_cancel(Some(patience), CancelBuilder::any());
        let mut rounds = 0;
        while !self.ops.is_empty() && rounds < DRAIN_ROUNDS {
            rounds += 1;
            let time = Timespec::new().nsec(1_000_000);
            let args = io_uring::types::SubmitArgs::new().timespec(&time);
            let _ = self.ring.submitter().submit_with_args(1, &args);
            for cqe in self.ring.completion() {
                let key = (cqe.user_data() & 0x7fff_ffff) as usize;
                let internal = cqe.user_data() & 1 << 31 != 0;
                if !internal && !cqueue::more(cqe.flags()) && self.ops.contains(key) {
                    self.ops.remove(key);
                }
            }
        }
        // What is still alive keeps its memory for ever: a leak at the end is sound, a free is not.
        std::mem::forget(std::mem::take(&mut self.ops));
    }
}
