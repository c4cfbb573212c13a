//! Frames as they pass an interface of a namespace (packet(7)).
#![forbid(unsafe_code)]

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Result;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::netns::NetNs;
use crate::wait::until;

const RECEIVE_TIMEOUT_MS: i64 = 50;
/// Frames that are kept.
const FRAMES_MAX: usize = 10_000;

/// Collects the frames of one interface that a filter wants, until it is dropped.
#[derive(Debug)]
pub struct Sniffer {
    frames: Arc<Mutex<Vec<Vec<u8>>>>,
    is_stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sniffer {
    /// Starts to collect.
    pub fn start(
        netns: &NetNs,
        interface: &str,
        wants: impl Fn(&[u8]) -> bool + Send + 'static,
    ) -> Result<Self> {
        let index = netns.index_of(interface)?;
        let all = netns.run(|| {
            let all =
                socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
            setsockopt(&all, sockopt::ReceiveTimeout, &TimeVal::milliseconds(RECEIVE_TIMEOUT_MS))?;
            Ok(all)
        })?;
        let frames = Arc::new(Mutex::new(Vec::new()));
        let is_stopped = Arc::new(AtomicBool::new(false));
        let (sink, stopped) = (Arc::clone(&frames), Arc::clone(&is_stopped));
        let thread = std::thread::spawn(move || {
            let mut frame = vec![0; 1 << 17];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((count, Some(from))) = recvfrom::<LinkAddr>(all.as_raw_fd(), &mut frame) else {
                    continue;
                };
                let mut kept = sink.lock().unwrap_or_else(PoisonError::into_inner);
                if from.ifindex() == index && kept.len() < FRAMES_MAX && wants(&frame[..count]) {
                    kept.push(frame[..count].to_vec());
                }
            }
        });
        Ok(Self { frames, is_stopped, thread: Some(thread) })
    }

    /// The frames so far.
    pub fn frames(&self) -> Vec<Vec<u8>> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for the first frame.
    pub fn wait(&self, what: &str, patience: Duration) -> Result<Vec<u8>> {
        until(what, patience, || Ok(self.frames().into_iter().next()))
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        self.is_stopped.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
