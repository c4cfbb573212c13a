//! Frames for a pair that did not come by its own sockets: copies of broadcasts, and what local ports send it.
//!
//! Bounded, with a place for each frame that is made beforehand. Writers (workers of any pair, control) take turns by a
//! lock, for a burst; the reader, the pair's worker, takes none. An eventfd wakes it; like a kick it is polled, never
//! read.
//!
//! ```text
//!   slot  [ frame ........ ]        head ─► reader    tail ─► writers
//! ```

use nix::sys::eventfd::{EfdFlags, EventFd};
use std::cell::UnsafeCell;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Frames that wait for one pair at most; further ones are dropped and counted.
pub const INBOX_FRAMES: u32 = 256;

/// The writers' end.
pub struct Inbox {
    /// All slots, one after the other.
    memory: Box<[UnsafeCell<u8>]>,
    slot_bytes: usize,
    lens: Box<[AtomicU32]>,
    tail: AtomicU32,
    head: AtomicU32,
    writers: Mutex<()>,
    event: Arc<OwnedFd>,
    /// The reader has been woken and has not found the end yet.
    rung: AtomicBool,
    /// Frames that found no place.
    lost: AtomicU64,
}

// SAFETY: a slot between head and tail is the reader's, any other the writers', of whom the lock lets in one; the
// indices hand slots over by release and acquire.
unsafe impl Sync for Inbox {}
// SAFETY: nothing in it belongs to a thread.
unsafe impl Send for Inbox {}

/// The reader's end; there is one.
pub struct Reader {
    inbox: Arc<Inbox>,
    head: u32,
    /// The tail when it was last looked at.
    tail: u32,
}

impl Inbox {
    /// An inbox for frames of up to `frame_max` bytes, and its reader.
    ///
    /// # Errors
    /// No eventfd to be had.
    pub fn new(frame_max: usize) -> io::Result<(Arc<Self>, Reader)> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let slot_bytes = frame_max.next_multiple_of(64);
        // In one piece, which the kernel zeroes on first use: a pair that needs no inbox has no memory in it.
        let memory = vec![0u8; slot_bytes * INBOX_FRAMES as usize].into_boxed_slice();
        // SAFETY: UnsafeCell<u8> is laid out like u8, and the box is ours.
        let memory = unsafe { Box::from_raw(Box::into_raw(memory) as *mut [UnsafeCell<u8>]) };
        let inbox = Arc::new(Self {
            memory,
            slot_bytes,
            lens: (0..INBOX_FRAMES).map(|_| AtomicU32::new(0)).collect(),
            tail: AtomicU32::new(0),
            head: AtomicU32::new(0),
            writers: Mutex::new(()),
            event: Arc::new(event.into()),
            rung: AtomicBool::new(false),
            lost: AtomicU64::new(0),
        });
        Ok((inbox.clone(), Reader { inbox, head: 0, tail: 0 }))
    }

    /// The eventfd that is written when frames wait; poll it, do not read it.
    pub fn event(&self) -> &Arc<OwnedFd> {
        &self.event
    }

    /// Lets the caller put frames in; others wait until the writer is dropped, which wakes the reader.
    pub fn write(&self) -> Writer<'_> {
        let lock = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
        let tail = self.tail.load(Ordering::Relaxed);
        Writer { inbox: self, tail, _lock: lock }
    }

    /// The slot of an index: its length's place, and its first byte.
    fn slot(&self, index: u32) -> (&AtomicU32, *mut u8) {
        let slot = (index % INBOX_FRAMES) as usize;
        let memory = self.memory.as_ptr().cast::<u8>().cast_mut();
        (&self.lens[slot], memory.wrapping_add(slot * self.slot_bytes))
    }
}

const _: () = assert!(INBOX_FRAMES.is_power_of_two(), "indices wrap");

/// A writer's turn.
pub struct Writer<'a> {
    inbox: &'a Inbox,
    tail: u32,
    _lock: MutexGuard<'a, ()>,
}

impl Writer<'_> {
    /// Puts a copy of a frame in. False if there is no place for it; that is counted.
    pub fn push(&mut self, frame: &[u8]) -> bool {
        let full = self.tail.wrapping_sub(self.inbox.head.load(Ordering::Acquire)) >= INBOX_FRAMES;
        if full || frame.len() > self.inbox.slot_bytes {
            self.inbox.lost.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        let (len, bytes) = self.inbox.slot(self.tail);
        // SAFETY: not between head and tail, and this is the only writer: nobody else looks at the slot, and the frame
        // fits into it.
        unsafe { std::ptr::copy_nonoverlapping(frame.as_ptr(), bytes, frame.len()) };
        len.store(frame.len() as u32, Ordering::Relaxed);
        self.tail = self.tail.wrapping_add(1);
        true
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        if self.tail == self.inbox.tail.load(Ordering::Relaxed) {
            return;
        }
        // The reader clears `rung` before it looks at the tail once more: one of the two sees the other's.
        self.inbox.tail.store(self.tail, Ordering::SeqCst);
        if !self.inbox.rung.swap(true, Ordering::SeqCst) {
            // The counter only wakes the loop, which never reads it; full is as good as written.
            let _ = nix::unistd::write(&*self.inbox.event, &1u64.to_ne_bytes());
        }
    }
}

impl Reader {
    /// The writers' end.
    pub fn inbox(&self) -> &Arc<Inbox> {
        &self.inbox
    }

    /// Frames that wait, as far as is known.
    #[inline]
    pub fn known(&self) -> usize {
        self.tail.wrapping_sub(self.head) as usize
    }

    /// The `index`-th of the frames that are known to wait.
    #[inline]
    pub fn frame(&self, index: usize) -> Option<&[u8]> {
        if index >= self.known() {
            return None;
        }
        let (len, bytes) = self.inbox.slot(self.head.wrapping_add(index as u32));
        // SAFETY: between head and tail: the reader's, of whom there is one, who pops by `&mut self` only; and written that
        // far.
        Some(unsafe { std::slice::from_raw_parts(bytes, len.load(Ordering::Relaxed) as usize) })
    }

    /// Whether none waits. If so, the next writer wakes the reader again.
    #[inline]
    pub fn is_empty(&mut self) -> bool {
        if self.head != self.tail {
            return false;
        }
        self.tail = self.inbox.tail.load(Ordering::Acquire);
        if self.head != self.tail {
            return false;
        }
        if self.inbox.rung.load(Ordering::Relaxed) {
            self.inbox.rung.store(false, Ordering::SeqCst);
            self.tail = self.inbox.tail.load(Ordering::SeqCst);
        }
        self.head == self.tail
    }

    /// Is through with the first `n` frames.
    #[inline]
    pub fn pop(&mut self, n: usize) {
        self.head = self.head.wrapping_add(n.min(self.known()) as u32);
        self.inbox.head.store(self.head, Ordering::Release);
    }

    /// Drops all that waits; returns how many frames that were.
    pub fn clear(&mut self) -> u64 {
        let mut count = 0;
        while !self.is_empty() {
            count += u64::from(self.tail.wrapping_sub(self.head));
            self.head = self.tail;
            self.inbox.head.store(self.head, Ordering::Release);
        }
        count
    }

    /// Frames that found no place since the last time this was asked.
    #[inline]
    pub fn take_lost(&self) -> u64 {
        match self.inbox.lost.load(Ordering::Relaxed) {
            0 => 0,
            _ => self.inbox.lost.swap(0, Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(inbox: &Inbox) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        let mut polled = [PollFd::new(inbox.event.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut polled, PollTimeout::ZERO).unwrap() == 1;
        if ready {
            nix::unistd::read(&*inbox.event, &mut [0; 8]).unwrap();
        }
        ready
    }

    #[test]
    fn frames_come_out_in_order() {
        let (inbox, mut reader) = Inbox::new(100).unwrap();
        assert!(reader.is_empty() && reader.frame(0).is_none() && !waits(&inbox));
        {
            let mut writer = inbox.write();
            assert!(writer.push(&[1; 60]) && writer.push(&[2; 100]));
            assert!(!writer.push(&[3; 200]), "too long");
            assert!(!waits(&inbox), "not before the burst is over");
        }
        assert!(waits(&inbox) && !reader.is_empty());
        assert_eq!((reader.frame(0).unwrap(), reader.frame(1).unwrap()), (&[1; 60][..], &[2; 100][..]));
        assert!(reader.frame(2).is_none());
        reader.pop(1);
        assert_eq!(reader.frame(0).unwrap(), [2; 100]);
        reader.pop(9);
        assert!(reader.is_empty() && reader.frame(0).is_none());
        assert_eq!((reader.take_lost(), reader.take_lost()), (1, 0));
    }

    #[test]
    fn it_is_bounded_and_wakes_once() {
        let (inbox, mut reader) = Inbox::new(64).unwrap();
        for round in 0..3 {
            for _ in 0..INBOX_FRAMES {
                assert!(inbox.write().push(&[round; 64]));
            }
            assert!(!inbox.write().push(&[9; 64]));
            assert!(waits(&inbox) && !waits(&inbox));
            assert_eq!(reader.clear(), u64::from(INBOX_FRAMES));
            assert_eq!(reader.take_lost(), 1);
        }
        assert!(inbox.write().push(&[1]));
        assert!(waits(&inbox), "the reader has found the end: it is woken again");
    }

    /// The reader sleeps on the eventfd alone: a lost wake-up would hang this.
    #[test]
    fn no_wake_up_is_lost() {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        const FRAMES: u64 = 20_000;
        let (inbox, mut reader) = Inbox::new(16).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut sent = 0;
                    while sent < FRAMES {
                        let pushed = inbox.write().push(&[7; 16]);
                        sent += u64::from(pushed);
                        if !pushed {
                            std::thread::yield_now();
                        }
                    }
                });
            }
            let mut got = 0;
            while got < 2 * FRAMES {
                if !reader.is_empty() {
                    let known = reader.known();
                    reader.pop(known);
                    got += known as u64;
                    continue;
                }
                let mut polled = [PollFd::new(inbox.event.as_fd(), PollFlags::POLLIN)];
                assert_eq!(poll(&mut polled, PollTimeout::from(10_000u16)).unwrap(), 1, "after {got} frames");
                nix::unistd::read(&*inbox.event, &mut [0; 8]).unwrap();
            }
        });
    }
}
