//! Many writes in one system call: a small io_uring of a tap queue's own, filled, handed over and emptied within
//! one burst.
//!
//! Each write has RWF_NOWAIT, so it ends while it is handed over: nothing is in flight when [`BurstRing::write`] returns,
//! and nothing here waits. (O_NONBLOCK alone does not do that: io_uring then waits for room by itself.) What it saves is the system call per frame; how much that is,
//! stands in bench/README.md. Not here: what becomes of a frame that was not sent.

use super::Burst;
use crate::memory::IoVec;
use io_uring::{IoUring, opcode, types};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

/// Frames handed over at once.
pub const FRAMES_MAX: usize = 64;
/// How often a system call that was interrupted, or found no memory, is repeated before the ring is given up.
const TRIES_MAX: u32 = 1000;

/// The ring of one queue.
pub struct BurstRing {
    ring: IoUring,
    results: [i32; FRAMES_MAX],
    _fd: Arc<OwnedFd>,
}

impl BurstRing {
    /// A ring for writes to `fd`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(fd: &Arc<OwnedFd>) -> io::Result<Self> {
        let ring = IoUring::new(FRAMES_MAX as u32)?;
        ring.submitter().register_files(&[fd.as_raw_fd()])?;
        Ok(Self { ring, results: [0; FRAMES_MAX], _fd: fd.clone() })
    }

    /// Writes the frames in their order, [`FRAMES_MAX`] at most; returns each one's result: bytes, or a negative error
    /// number.
    ///
    /// # Errors
    /// The ring cannot be used any more. Some of the frames may have been written, but none if this is the file's
    /// `Unsupported`.
    pub fn write(&mut self, burst: &Burst<'_>) -> io::Result<&[i32]> {
        let frames = burst.frames.len().min(FRAMES_MAX);
        {
            let mut queue = self.ring.submission();
            for (index, frame) in burst.iter().take(frames).enumerate() {
                let entry = opcode::Writev::new(types::Fixed(0), IoVec::as_raw(frame), frame.len() as u32)
                    .rw_flags(libc::RWF_NOWAIT)
                    .build()
                    .user_data(index as u64);
                // SAFETY: the list and the memory it names live as long as `burst`, and no write outlives this call:
                // RWF_NOWAIT makes each end as it is handed over, and all results are waited for below.
                if unsafe { queue.push(&entry) }.is_err() {
                    return Err(io::Error::from_raw_os_error(libc::EBUSY));
                }
            }
        }
        let mut ended = 0;
        let mut tries = 0;
        while ended < frames {
            // Waits for nothing: every write that was handed over has ended.
            if let Err(error) = self.ring.submit_and_wait(1) {
                let again = matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY));
                tries += 1;
                if !again || tries > TRIES_MAX {
                    return Err(error);
                }
            }
            for completion in self.ring.completion() {
                if let Some(slot) = self.results.get_mut(completion.user_data() as usize) {
                    *slot = completion.result();
                    ended += 1;
                }
            }
        }
        let results = &self.results[..frames];
        if !results.is_empty() && results.iter().all(|result| *result == -libc::EOPNOTSUPP) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(results)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::IoVecs;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn frames_keep_their_order_and_have_their_own_results() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mut ring = BurstRing::new(&Arc::new(ours.into())).unwrap();
        let header = [7; 12];
        let bodies: Vec<Vec<u8>> = (0..FRAMES_MAX as u8).map(|n| vec![n; 3 + usize::from(n)]).collect();
        let mut sent = 0;
        // More than the socket takes: the rest finds no room, and nothing waits.
        loop {
            let mut list = IoVecs::new();
            let mut frames = Vec::new();
            for body in &bodies {
                let start = list.len();
                assert!(list.push_own(&header) && list.push_own(body));
                frames.push(start..list.len());
            }
            let burst = Burst { buffers: list.as_slice(), frames: &frames };
            let results = ring.write(&burst).unwrap().to_vec();
            assert_eq!(results.len(), FRAMES_MAX);
            let full = results.iter().position(|result| *result == -libc::EAGAIN).unwrap_or(FRAMES_MAX);
            for (result, body) in results[..full].iter().zip(&bodies) {
                assert_eq!(*result as usize, header.len() + body.len());
            }
            assert!(results[full..].iter().all(|result| *result == -libc::EAGAIN));
            sent += full;
            if full < FRAMES_MAX {
                break;
            }
        }
        let mut buffer = [0; 100];
        for n in 0..sent {
            let len = theirs.recv(&mut buffer).unwrap();
            assert_eq!(buffer[..12], header);
            assert_eq!(buffer[12..len], bodies[n % FRAMES_MAX]);
        }
        assert!(theirs.recv(&mut buffer).is_err());
    }
}
