//! ICMP echo from the host's side, with contents checked (RFC 792).

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::netns::NetNs;
use crate::wait::until;

const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
const ICMP_HEADER: usize = 8;
const RECEIVE_TIMEOUT_MS: i64 = 5;
/// Payload of ordinary pings in bytes.
const PAYLOAD: usize = 56;
/// Interval of ordinary pings.
const INTERVAL: Duration = Duration::from_millis(50);

/// What a series of pings saw.
#[derive(Debug, Clone, Default)]
pub struct PingReport {
    /// Requests that were sent.
    pub sent: u64,
    /// Requests that were answered, counted once each.
    pub answered: u64,
    /// Replies with other contents than the request.
    pub corrupted: u64,
    /// Longest time between two replies.
    pub longest_gap: Duration,
    /// Mean time from request to reply.
    pub mean_rtt: Duration,
}

/// Pings in the background until it is stopped or dropped.
#[derive(Debug)]
pub struct Pinger {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    report: Mutex<PingReport>,
    is_stopped: AtomicBool,
}

impl Pinger {
    /// Starts to ping `address` (an IPv4 address) from the namespace.
    pub fn start(netns: &NetNs, address: &str, interval: Duration) -> Result<Self> {
        Self::start_with(netns, address, interval, PAYLOAD, false)
    }

    fn start_with(
        netns: &NetNs,
        address: &str,
        interval: Duration,
        payload: usize,
        is_whole: bool,
    ) -> Result<Self> {
        let address: Ipv4Addr = address.parse().with_context(|| format!("no IPv4 address: {address}"))?;
        let socket = netns.run(|| open(is_whole))?;
        let shared = Arc::new(Shared::default());
        let inner = Arc::clone(&shared);
        let thread = std::thread::spawn(move || Series::new(socket, address, payload, &inner).run(interval));
        Ok(Self { shared, thread: Some(thread) })
    }

    /// What was seen so far.
    pub fn report(&self) -> PingReport {
        self.shared.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until `count` more requests were answered than now.
    pub fn wait_answers(&self, count: u64, patience: Duration) -> Result<()> {
        let wanted = self.report().answered + count;
        let seen = until("replies to ping", patience, || {
            if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                bail!("pinging has failed");
            }
            Ok((self.report().answered >= wanted).then_some(()))
        });
        seen.with_context(|| format!("{:?}", self.report()))
    }

    /// Ends and returns what was seen.
    pub fn stop(mut self) -> Result<PingReport> {
        self.shared.is_stopped.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(self.report())
    }
}

impl Drop for Pinger {
    fn drop(&mut self) {
        self.shared.is_stopped.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Pings until `count` requests were answered; fails if that does not happen, or if contents changed.
pub fn ping(netns: &NetNs, address: &str, count: u64, patience: Duration) -> Result<PingReport> {
    checked(Pinger::start(netns, address, INTERVAL)?, count, patience)
}

/// As [`ping`], with `payload` bytes of data (the packet is 28 bytes longer) that may not be fragmented.
pub fn ping_whole(netns: &NetNs, address: &str, payload: usize, patience: Duration) -> Result<PingReport> {
    checked(Pinger::start_with(netns, address, INTERVAL, payload, true)?, 3, patience)
}

fn checked(pinger: Pinger, count: u64, patience: Duration) -> Result<PingReport> {
    let waited = pinger.wait_answers(count, patience);
    let report = pinger.stop()?;
    waited?;
    if report.corrupted > 0 {
        bail!("{} replies came back changed", report.corrupted);
    }
    Ok(report)
}

/// An ICMP socket of the calling thread's namespace.
pub(crate) fn open(is_whole: bool) -> Result<OwnedFd> {
    let icmp = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp)?;
    setsockopt(&icmp, sockopt::ReceiveTimeout, &TimeVal::milliseconds(RECEIVE_TIMEOUT_MS))?;
    if is_whole {
        let value: libc::c_int = libc::IP_PMTUDISC_DO;
        // SAFETY: the option's value is an int on our stack, given with its length.
        let result = unsafe {
            libc::setsockopt(
                icmp.as_raw_fd(),
                libc::IPPROTO_IP,
                libc::IP_MTU_DISCOVER,
                (&raw const value).cast(),
                size_of_val(&value) as libc::socklen_t,
            )
        };
        Errno::result(result)?;
    }
    Ok(icmp)
}

/// The working part of a [`Pinger`].
struct Series<'a> {
    socket: OwnedFd,
    address: SockaddrIn,
    identifier: u16,
    payload: usize,
    shared: &'a Shared,
    /// Time of sending by sequence number; taken out by the reply.
    pending: Vec<Option<Instant>>,
    last_reply: Option<Instant>,
    rtt_sum: Duration,
}

impl<'a> Series<'a> {
    fn new(socket: OwnedFd, address: Ipv4Addr, payload: usize, shared: &'a Shared) -> Self {
        static NEXT: AtomicU16 = AtomicU16::new(0x5600);
        Self {
            socket,
            address: SocketAddrV4::new(address, 0).into(),
            identifier: NEXT.fetch_add(1, Ordering::Relaxed),
            payload,
            shared,
            pending: vec![None; 1 << 16],
            last_reply: None,
            rtt_sum: Duration::ZERO,
        }
    }

    fn run(&mut self, interval: Duration) -> Result<()> {
        let mut sequence = 0u16;
        let mut next = Instant::now();
        while !self.shared.is_stopped.load(Ordering::Relaxed) {
            if Instant::now() >= next {
                next = Instant::now() + interval;
                let message = echo(ECHO_REQUEST, self.identifier, sequence, self.payload);
                match sendto(self.socket.as_raw_fd(), &message, &self.address, MsgFlags::empty()) {
                    Ok(_) => {
                        self.pending[usize::from(sequence)] = Some(Instant::now());
                        self.shared.report.lock().unwrap_or_else(PoisonError::into_inner).sent += 1;
                    }
                    // No route or neighbour yet, or an earlier packet was reported undeliverable: part of the trade.
                    Err(Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::ECONNREFUSED | Errno::ENOBUFS) => {}
                    Err(errno) => return Err(errno).context("sending a ping"),
                }
                sequence = sequence.wrapping_add(1);
            }
            self.receive()?;
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<()> {
        let mut packet = [0; 1 << 16];
        let count = match recv(self.socket.as_raw_fd(), &mut packet, MsgFlags::empty()) {
            Ok(count) => count,
            Err(Errno::EAGAIN | Errno::EINTR | Errno::EHOSTUNREACH) => return Ok(()),
            Err(errno) => return Err(errno).context("receiving a ping"),
        };
        let header = usize::from(packet[0] & 0xf) * 4;
        let Some(message) = packet.get(header..count).filter(|m| m.len() >= ICMP_HEADER) else {
            return Ok(());
        };
        let field = |at: usize| u16::from_be_bytes([message[at], message[at + 1]]);
        if message[0] != ECHO_REPLY || field(4) != self.identifier {
            return Ok(());
        }
        let sequence = field(6);
        let now = Instant::now();
        let is_intact = message == echo(ECHO_REPLY, self.identifier, sequence, self.payload);
        let mut report = self.shared.report.lock().unwrap_or_else(PoisonError::into_inner);
        if !is_intact {
            report.corrupted += 1;
        }
        if let Some(sent) = self.pending[usize::from(sequence)].take() {
            report.answered += 1;
            self.rtt_sum += now - sent;
            report.mean_rtt = self.rtt_sum / u32::try_from(report.answered).unwrap_or(u32::MAX);
        }
        if let Some(last) = self.last_reply.replace(now) {
            report.longest_gap = report.longest_gap.max(now - last);
        }
        Ok(())
    }
}

/// An echo message whose contents depend on its number.
fn echo(kind: u8, identifier: u16, sequence: u16, payload: usize) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0];
    message.extend(identifier.to_be_bytes());
    message.extend(sequence.to_be_bytes());
    message.extend((0..payload).map(|at| (at as u8).wrapping_mul(31).wrapping_add(sequence as u8)));
    let sum = checksum(&message).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    message
}

/// The Internet checksum (RFC 1071).
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pings_are_answered_with_their_contents() {
        let Ok(netns) = NetNs::new() else {
            eprintln!("skipped: no permission to make a network namespace");
            return;
        };
        let report = ping(&netns, "127.0.0.1", 3, Duration::from_secs(10)).unwrap();
        assert!(report.answered >= 3 && report.corrupted == 0);
        ping_whole(&netns, "127.0.0.1", 1000, Duration::from_secs(10)).unwrap();
    }

    #[test]
    fn checksum_of_a_message_with_its_checksum_is_zero() {
        assert_eq!(checksum(&echo(ECHO_REQUEST, 1, 2, 57)), 0);
    }
}
