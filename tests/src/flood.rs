//! Numbered ICMP echoes, whose every byte follows from their number, to the guest and back, and what the guest's pktgen sends by itself. On both, a page of zeros or a byte of another packet is seen.
#![forbid(unsafe_code)]

use std::net::SocketAddrV4;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockaddrIn, recv, sendto, setsockopt, sockopt};

use crate::netns::NetNs;
use crate::ping;
use crate::qemu::{GUEST_IP, Qemu};
use crate::wait::until;
use crate::wire::{Capture, Link, check_udp};

const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
const ICMP_HEADER: usize = 8;
const RECEIVE_BUFFER: usize = 16 << 20;
/// Where pktgen's datagrams go: nobody listens, they are captured.
const PKTGEN_PORT: u16 = 4343;
/// The first bytes of pktgen's payload.
const PKTGEN_MAGIC: [u8; 4] = 0xbe9b_e955_u32.to_be_bytes();
/// Headers in front of a UDP payload.
const HEADERS: usize = 14 + 20 + 8;
const RECEIVE_TIMEOUT: Duration = Duration::from_millis(20);
const NUMBER_LEN: usize = 8;
const CAPTURE_BYTES: usize = 64 << 20;

/// What came of numbered packets.
#[derive(Debug, Clone, Default)]
pub struct FloodReport {
    /// Packets sent; 0 if the guest sends.
    pub sent: u64,
    /// Packets that arrived.
    pub arrived: u64,
    /// Numbers that were left out between the lowest and the highest: lost, or still on their way.
    pub missing: u64,
    /// Numbers not above an earlier one: sent twice, or overtaken.
    pub disordered: u64,
    /// Packets that were not as they were sent, and the first such.
    pub corrupt: u64,
    /// What was wrong with the first of them.
    pub first_corrupt: Option<String>,
    /// The longest time without a packet.
    pub longest_gap: Duration,
}

impl FloodReport {
    /// Fails if a packet was not as it was sent, or none came.
    pub fn check(&self) -> Result<()> {
        ensure!(self.corrupt == 0, "{} corrupt packets: {:?}", self.corrupt, self.first_corrupt);
        ensure!(self.disordered == 0, "{} packets out of order or doubled: {self:?}", self.disordered);
        ensure!(self.arrived > 0, "nothing has arrived: {self:?}");
        Ok(())
    }
}

/// The moments at which packets arrived, in steps of [`Rate::STEP`], for a rate over time.
#[derive(Debug, Clone, Default)]
pub struct Rate {
    started: Option<Instant>,
    steps: Vec<u32>,
}

impl Rate {
    /// Length of a step.
    pub const STEP: Duration = Duration::from_millis(10);

    fn count(&mut self, now: Instant) {
        let started = *self.started.get_or_insert(now);
        let step = ((now - started).as_nanos() / Self::STEP.as_nanos()) as usize;
        if self.steps.len() <= step {
            self.steps.resize(step + 1, 0);
        }
        self.steps[step] += 1;
    }

    /// Packets per second between two moments.
    pub fn between(&self, from: Instant, to: Instant) -> f64 {
        let Some(started) = self.started else { return 0.0 };
        let step =
            |at: Instant| (at.saturating_duration_since(started).as_nanos() / Self::STEP.as_nanos()) as usize;
        let range = step(from).min(self.steps.len())..step(to).min(self.steps.len());
        let count: u32 = self.steps[range].iter().sum();
        f64::from(count) / to.saturating_duration_since(from).as_secs_f64().max(1e-3)
    }
}

#[derive(Debug, Default)]
struct Seen {
    report: FloodReport,
    highest: Option<u64>,
    lowest: u64,
    last: Option<Instant>,
    rate: Rate,
}

impl Seen {
    fn number(&mut self, number: Result<u64>) {
        let now = Instant::now();
        let report = &mut self.report;
        report.arrived += 1;
        if let Some(last) = self.last.replace(now) {
            report.longest_gap = report.longest_gap.max(now - last);
        }
        self.rate.count(now);
        match number {
            Err(why) => {
                report.corrupt += 1;
                report.first_corrupt.get_or_insert(format!("{why:#}"));
            }
            Ok(number) => {
                if self.highest.is_none() {
                    self.lowest = number;
                }
                match self.highest {
                    Some(highest) if number <= highest => report.disordered += 1,
                    _ => self.highest = Some(number),
                }
                let span = self.highest.map_or(0, |highest| highest + 1 - self.lowest);
                report.missing = span.saturating_sub(report.arrived - report.corrupt - report.disordered);
            }
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    seen: Mutex<Seen>,
    is_stopped: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn runs(&self) -> bool {
        !self.is_stopped.load(Ordering::Relaxed)
    }
}

/// Packets that arrive, until it is stopped or dropped.
#[derive(Debug)]
pub struct Flood {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Flood {
    /// Sends `per_second` ICMP echo requests with `bytes` of data, which the guest's kernel sends back.
    pub fn echoed(netns: &NetNs, bytes: usize, per_second: u64) -> Result<Self> {
        static NEXT: AtomicU16 = AtomicU16::new(0x6600);
        let identifier = NEXT.fetch_add(1, Ordering::Relaxed);
        let socket = netns.run(|| ping::open(false))?;
        setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
        let guest: SockaddrIn = SocketAddrV4::new(GUEST_IP.parse()?, 0).into();
        let shared = Arc::new(Shared::default());
        let (sender, out) = (Arc::clone(&shared), socket.try_clone()?);
        let sending = std::thread::spawn(move || {
            let started = Instant::now();
            let mut number = 0u64;
            while sender.runs() {
                let due = (started.elapsed().as_nanos() as u64 * per_second) / 1_000_000_000;
                while number < due {
                    // A full queue, or no neighbour yet: this number is lost.
                    let request = echo(ECHO_REQUEST, identifier, number, bytes);
                    let _ = sendto(out.as_raw_fd(), &request, &guest, MsgFlags::MSG_DONTWAIT);
                    number += 1;
                }
                sender.lock().report.sent = number;
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        });
        let receiver = Arc::clone(&shared);
        let receiving = std::thread::spawn(move || {
            let mut packet = vec![0; 1 << 16];
            while receiver.runs() {
                match recv(socket.as_raw_fd(), &mut packet, MsgFlags::empty()) {
                    Ok(count) => {
                        if let Some(number) = echo_number(&packet[..count], identifier, bytes) {
                            receiver.lock().number(number);
                        }
                    }
                    Err(Errno::EAGAIN | Errno::EINTR | Errno::EHOSTUNREACH) => {}
                    Err(errno) => return Err(errno).context("receiving echoes"),
                }
            }
            Ok(())
        });
        Ok(Self { shared, threads: vec![sending, receiving] })
    }

    /// Lets the guest's pktgen send `per_second` datagrams (0: as fast as it can) in frames of `bytes`, and captures them at
    /// an interface of the namespace. Checksums are computed in the guest unless its device has `csum`.
    pub fn generated(
        netns: &NetNs,
        guest: &mut Qemu,
        interface: &str,
        bytes: usize,
        per_second: u64,
    ) -> Result<Self> {
        let mac = netns.mac(interface)?;
        let host = crate::qemu::HOST_IP;
        let mut commands = format!(
            "echo add_device eth0 >/proc/net/pktgen/kpktgend_0; for c in 'count 0' 'pkt_size {bytes}' 'dst {host}' \
             'dst_mac {mac}' 'udp_dst_min {PKTGEN_PORT}' 'udp_dst_max {PKTGEN_PORT}' 'flag UDPCSUM'"
        );
        if per_second > 0 {
            commands.push_str(&format!(" 'ratep {per_second}'"));
        }
        commands.push_str(
            "; do echo \"$c\" >/proc/net/pktgen/eth0; done; (echo start >/proc/net/pktgen/pgctrl) &",
        );
        let mut capture = netns.run(|| Capture::start(&Link::named(interface), CAPTURE_BYTES))?;
        guest.run(&commands)?;
        let shared = Arc::new(Shared::default());
        let receiver = Arc::clone(&shared);
        let receiving = std::thread::spawn(move || {
            while receiver.runs() {
                if let Some(frame) = capture.next(RECEIVE_TIMEOUT)?
                    && let Some(number) = pktgen_number(frame, bytes)
                {
                    receiver.lock().number(number);
                }
            }
            ensure!(capture.lost()? == 0, "the capture lost frames: the test's own fault");
            Ok(())
        });
        Ok(Self { shared, threads: vec![receiving] })
    }

    /// Ends pktgen in the guest, which takes the guest's time from other commands.
    pub fn quiet(guest: &mut Qemu) -> Result<()> {
        guest.run("echo stop >/proc/net/pktgen/pgctrl").map(drop)
    }

    /// What was seen so far.
    pub fn report(&self) -> FloodReport {
        self.shared.lock().report.clone()
    }

    /// When packets came.
    pub fn rate(&self) -> Rate {
        self.shared.lock().rate.clone()
    }

    /// Waits until `count` more packets came than now.
    pub fn wait_arrivals(&self, count: u64, patience: Duration) -> Result<()> {
        let wanted = self.report().arrived + count;
        until("packets of a flood", patience, || {
            ensure!(self.threads.iter().all(|thread| !thread.is_finished()), "the flood has failed");
            Ok((self.report().arrived >= wanted).then_some(()))
        })
        .with_context(|| format!("{:?}", self.report()))
    }

    /// Ends and returns what was seen.
    pub fn stop(mut self) -> Result<FloodReport> {
        self.shared.is_stopped.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(self.report())
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.shared.is_stopped.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// An ICMP echo whose every byte follows from its number.
fn echo(kind: u8, identifier: u16, number: u64, bytes: usize) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0];
    message.extend(identifier.to_be_bytes());
    message.extend((number as u16).to_be_bytes());
    message.extend(number.to_be_bytes());
    message.extend((NUMBER_LEN..bytes.max(NUMBER_LEN)).map(|at| pattern(number, at)));
    let sum = ping::checksum(&message).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    message
}

/// Never zero: a hole's zeros are no packet's bytes.
fn pattern(number: u64, at: usize) -> u8 {
    let word = (number ^ at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (word >> 56) as u8 | 1
}

/// The number of an echo, if it is as it was sent. `None` if it is no reply to us.
fn echo_number(packet: &[u8], identifier: u16, bytes: usize) -> Option<Result<u64>> {
    let message = packet.get(usize::from(packet.first()? & 0xf) * 4..)?;
    let number = message.get(ICMP_HEADER..ICMP_HEADER + NUMBER_LEN)?;
    if message[0] != ECHO_REPLY || message[4..6] != identifier.to_be_bytes() {
        return None;
    }
    let number = u64::from_be_bytes(number.try_into().ok()?);
    let sent = echo(ECHO_REPLY, identifier, number, bytes);
    Some(match message == sent {
        true => Ok(number),
        false => {
            let at =
                message.iter().zip(&sent).position(|(a, b)| a != b).unwrap_or(sent.len().min(message.len()));
            Err(anyhow::anyhow!(
                "echo {number} of {} bytes has {:02x?} at {at}",
                message.len(),
                message.get(at)
            ))
        }
    })
}

/// The number of one of pktgen's frames, if its lengths and checksums are right. `None` if it is somebody else's.
fn pktgen_number(frame: &[u8], bytes: usize) -> Option<Result<u64>> {
    // A hole's zeros would be nobody's frame; every frame that comes from a guest has an ethertype.
    if frame.len() >= 14 && frame[12..14] == [0, 0] {
        return Some(Err(anyhow::anyhow!(
            "a frame of {} bytes without a type: {:02x?}",
            frame.len(),
            &frame[..14]
        )));
    }
    let is_mine = frame.len() > HEADERS && frame[12..14] == [8, 0] && frame[23] == 17;
    if !is_mine || u16::from_be_bytes([frame[36], frame[37]]) != PKTGEN_PORT {
        return None;
    }
    Some((|| {
        ensure!(frame.len() == bytes, "a frame of {} bytes instead of {bytes}", frame.len());
        check_udp(frame)?;
        let payload = &frame[HEADERS..];
        ensure!(payload[..4] == PKTGEN_MAGIC, "no magic number: {:02x?}", &payload[..8]);
        Ok(u64::from(u32::from_be_bytes(payload[4..8].try_into()?)))
    })())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_echoes_are_found() {
        let mut packet = vec![0x45; 20];
        packet.extend(echo(ECHO_REPLY, 9, 77, 300));
        assert_eq!(echo_number(&packet, 9, 300).unwrap().unwrap(), 77);
        assert!(echo_number(&packet, 8, 300).is_none());
        // Type, identifier and the upper bytes of the number are what a reply is recognised by, or zero.
        for at in 20 + ICMP_HEADER + 7..packet.len() {
            let mut changed = packet.clone();
            changed[at] = 0;
            assert!(echo_number(&changed, 9, 300).unwrap().is_err(), "byte {at}");
        }
        assert!(echo_number(&packet[..packet.len() - 1], 9, 300).unwrap().is_err());
    }

    #[test]
    fn gaps_and_repetitions_are_counted() {
        let mut seen = Seen::default();
        for number in [5, 6, 8, 8, 9] {
            seen.number(Ok(number));
        }
        let report = &seen.report;
        assert_eq!((report.arrived, report.missing, report.disordered), (5, 1, 1));
        assert!(seen.report.check().is_err());
    }
}
