//! The peer link: two ports of one process wired together, what one guest sends is what the other receives.
//!
//! Frames do not pass through here: they are copied from one guest's memory into the other's by the worker that serves both
//! (`worker::link`). Here is what the ports' control has to say about the link, and the little that comes from control itself
//! (announcements), which waits in an inbox that looks like any uplink.
//!
//! ```text
//!   port a: PeerPort ──announce──► Inbox of b ──► PeerQueue of b's first pair ──► receive path
//!           PeerPort ──set_mtu───► Wire: what each end takes ◄── read by the worker once a burst
//! ```

use super::{Capabilities, FrameFormat, ReceiveError, SendError, Uplink, UplinkQueue};
use crate::memory::{IoVec, scatter};
use crate::net::features::OFFLOADS;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Announcements that wait at one end at most; a front-end sends five.
const INBOX_MAX: usize = 32;
/// Longest virtio-net header, bytes.
const HEADER_MAX: usize = 12;

/// What one end of a link takes: told by its port's control, read by the worker.
#[derive(Debug)]
pub struct End {
    /// Largest layer-3 packet, bytes.
    mtu: AtomicU16,
    /// The same without a front-end.
    mtu_default: u16,
    header_len: AtomicUsize,
    /// Frames behind room for the longest header.
    inbox: Mutex<VecDeque<Vec<u8>>>,
    /// Readable while something is in the inbox.
    ready: Arc<OwnedFd>,
}

impl End {
    fn new(mtu: Option<u16>) -> io::Result<Arc<Self>> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let mtu = mtu.unwrap_or(u16::MAX);
        Ok(Arc::new(Self {
            mtu: AtomicU16::new(mtu),
            mtu_default: mtu,
            header_len: AtomicUsize::new(HEADER_MAX),
            inbox: Mutex::default(),
            ready: Arc::new(EventFd::from_flags(flags)?.into()),
        }))
    }

    fn inbox(&self) -> MutexGuard<'_, VecDeque<Vec<u8>>> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One port's side of a link.
pub struct PeerPort {
    name: String,
    /// Its own end.
    near: Arc<End>,
    far: Arc<End>,
}

/// What one queue pair receives from control through the link.
pub struct PeerQueue {
    near: Arc<End>,
    /// Only the first pair of a port receives announcements.
    ready: Vec<Arc<OwnedFd>>,
}

/// A port as one side of a link.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its queue pairs.
    pub pairs: u16,
    /// Its MTU, if it has one.
    pub mtu: Option<u16>,
}

/// Wires two ports. Returns each one's uplink with its queues.
///
/// # Errors
/// No descriptor is left.
pub fn wire(a: Side<'_>, b: Side<'_>) -> io::Result<[(PeerPort, Vec<PeerQueue>); 2]> {
    let (end_a, end_b) = (End::new(a.mtu)?, End::new(b.mtu)?);
    let side = |far_name: &str, near: &Arc<End>, far: &Arc<End>, pairs: u16| {
        let port = PeerPort { name: format!("peer:{far_name}"), near: near.clone(), far: far.clone() };
        let queues = (0..pairs).map(|pair| PeerQueue {
            near: near.clone(),
            ready: if pair == 0 { vec![near.ready.clone()] } else { Vec::new() },
        });
        (port, queues.collect())
    };
    Ok([side(b.name, &end_a, &end_b, a.pairs), side(a.name, &end_b, &end_a, b.pairs)])
}

impl Uplink for PeerPort {
    fn describe(&self) -> &str {
        &self.name
    }
    /// Everything: what the other guest does not take is done in software on the way.
    fn capabilities(&self) -> Capabilities {
        Capabilities { offloads: OFFLOADS, mtu: self.near.mtu_default }
    }
    fn configure(&self, format: FrameFormat) -> io::Result<()> {
        self.near.header_len.store(format.header_len.min(HEADER_MAX), Ordering::Relaxed);
        Ok(())
    }
    fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        self.near.mtu.store(mtu, Ordering::Relaxed);
        Ok(())
    }
    fn set_queue_active(&self, _queue: u16, _active: bool) -> io::Result<()> {
        Ok(())
    }
    fn announce(&self, frame: &[u8]) -> io::Result<()> {
        let mut inbox = self.far.inbox();
        if inbox.len() < INBOX_MAX {
            inbox.push_back([&[0; HEADER_MAX], frame].concat());
            // Full is readable, too.
            let _ = nix::unistd::write(&*self.far.ready, &1u64.to_ne_bytes());
        }
        Ok(())
    }
    fn front_end_left(&self) {
        self.near.mtu.store(self.near.mtu_default, Ordering::Relaxed);
    }
}

impl UplinkQueue for PeerQueue {
    fn readable(&self) -> &[Arc<OwnedFd>] {
        &self.ready
    }
    fn writable(&self) -> Option<&Arc<OwnedFd>> {
        None
    }
    fn mtu(&self) -> u16 {
        self.near.mtu.load(Ordering::Relaxed)
    }
    /// Nobody sends here: the worker knows the other end.
    fn send(&mut self, _frame: &[IoVec<'_>]) -> Result<(), SendError> {
        Err(SendError::Down(io::ErrorKind::NotConnected.into()))
    }
    fn receive(&mut self, buffers: &[IoVec<'_>]) -> Result<usize, ReceiveError> {
        let mut inbox = self.near.inbox();
        let Some(frame) = inbox.pop_front() else {
            let _ = nix::unistd::read(&*self.near.ready, &mut [0; 8]);
            return Err(ReceiveError::Empty);
        };
        let frame = &frame[HEADER_MAX - self.near.header_len.load(Ordering::Relaxed)..];
        // SAFETY: buffers that are received into are guest memory, or ours and borrowed mutably.
        unsafe { scatter(buffers, frame) };
        Ok(frame.len())
    }
    fn discard(&mut self) -> u64 {
        if self.ready.is_empty() {
            return 0;
        }
        let _ = nix::unistd::read(&*self.near.ready, &mut [0; 8]);
        let mut inbox = self.near.inbox();
        let count = inbox.len();
        inbox.clear();
        count as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::IoVecs;

    fn receive(queue: &mut PeerQueue) -> Option<Vec<u8>> {
        let mut buffer = [0xaa; 200];
        let mut list = IoVecs::new();
        list.push_own_mut(&mut buffer);
        let len = queue.receive(list.as_slice());
        drop(list);
        let len = len.ok()?;
        Some(buffer[..len].to_vec())
    }

    fn link() -> [(PeerPort, Vec<PeerQueue>); 2] {
        let side = |name, pairs, mtu| Side { name, pairs, mtu };
        wire(side("a", 2, Some(1400)), side("b", 1, None)).unwrap()
    }

    #[test]
    fn announcements_cross_and_are_bounded() {
        let [(a, mut of_a), (b, mut of_b)] = link();
        assert_eq!((a.describe(), b.describe()), ("peer:b", "peer:a"));
        b.configure(FrameFormat { header_len: 10, features: 0 }).unwrap();
        a.announce(&[1; 60]).unwrap();
        assert_eq!(receive(&mut of_b[0]), Some([vec![0; 10], vec![1; 60]].concat()));
        assert_eq!((receive(&mut of_b[0]), receive(&mut of_a[0])), (None, None));
        (0..100).for_each(|_| b.announce(&[2; 60]).unwrap());
        assert_eq!((of_a[1].discard(), of_a[0].discard()), (0, INBOX_MAX as u64));
        assert!(of_a[1].readable().is_empty());
    }

    #[test]
    fn an_mtu_lasts_as_long_as_its_front_end() {
        let [(a, of_a), (b, of_b)] = link();
        assert_eq!((a.capabilities().mtu, b.capabilities().mtu), (1400, u16::MAX));
        b.set_mtu(1300).unwrap();
        assert_eq!((of_a[0].mtu(), of_b[0].mtu()), (1400, 1300));
        b.front_end_left();
        assert_eq!(of_b[0].mtu(), u16::MAX);
    }
}
