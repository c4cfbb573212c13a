//! The tap against the kernel: in a network namespace of its own, so no privilege is needed.

use super::tap::{Tap, TapError, TapQueue};
use super::testing::{in_namespace, skip};
use super::{FrameFormat, ReceiveError, SendError, Uplink, UplinkQueue};
use crate::memory::IoVecs;
use crate::net::features::OFFLOADS;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_net as vn;

/// The host's side of an interface: sees and sends whole Ethernet frames.
struct Host {
    socket: OwnedFd,
}

impl Host {
    fn new(name: &str) -> Self {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll).unwrap();
        let mut address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
            sll_ifindex: nix::net::if_::if_nametoindex(name).unwrap() as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: the address is a sockaddr_ll of that length.
        let bound = unsafe {
            libc::bind(socket.as_raw_fd(), (&raw mut address).cast(), size_of::<libc::sockaddr_ll>() as u32)
        };
        assert_eq!(bound, 0);
        Self { socket }
    }

    fn send(&self, frame: &[u8]) {
        assert_eq!(nix::unistd::write(&self.socket, frame).unwrap(), frame.len());
    }

    /// The next frame of our kind; others (the kernel's own IPv6) are passed over.
    fn receive(&self) -> Vec<u8> {
        let mut bytes = vec![0; 70_000];
        patiently(|| {
            let n = nix::unistd::read(&self.socket, &mut bytes).ok()?;
            is_ours(&bytes[..n]).then(|| bytes[..n].to_vec())
        })
    }
}

fn patiently<T>(mut what: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = what() {
            return found;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "nothing came");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// An Ethernet frame with an experimental EtherType.
fn frame(mark: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5];
    frame.resize(len, mark);
    frame
}

fn is_ours(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[0x88, 0xb5])
}

fn send(queue: &mut TapQueue, header: &[u8], frame: &[u8]) -> Result<(), SendError> {
    let mut iovecs = IoVecs::new();
    iovecs.push_own(header);
    let (front, back) = frame.split_at(frame.len() / 3);
    iovecs.push_own(front);
    iovecs.push_own(back);
    queue.send(iovecs.as_slice())
}

/// The next frame of our kind with its header of `header_len` bytes.
fn receive(queue: &mut TapQueue, header_len: usize) -> Vec<u8> {
    let (mut head, mut rest) = (vec![0; 40], vec![0; 70_000]);
    patiently(|| {
        let received = {
            let mut iovecs = IoVecs::new();
            iovecs.push_own_mut(&mut head);
            iovecs.push_own_mut(&mut rest);
            queue.receive(iovecs.as_slice())
        };
        let n = match received {
            Ok(n) => n,
            Err(ReceiveError::Empty) => return None,
            Err(error) => panic!("{error}"),
        };
        let mut bytes = head.clone();
        bytes.extend_from_slice(&rest);
        bytes.truncate(n);
        is_ours(&bytes[header_len..]).then_some(bytes)
    })
}

fn up(name: &str, queue_pairs: u16) -> Tap {
    let tap = Tap::open(name, queue_pairs, None).unwrap();
    tap.bring_up().unwrap();
    tap
}

#[test]
fn frames_cross_with_either_header() {
    in_namespace("uplink::tap_tests::frames_cross_with_either_header", || {
        let tap = up("t0", 1);
        assert_eq!(tap.describe(), "tap:t0");
        let host = Host::new("t0");
        let mut queue = tap.queues().remove(0);
        for header_len in [12, 10, 12] {
            tap.configure(FrameFormat { header_len, features: 0 }).unwrap();
            for len in [60, 1514] {
                send(&mut queue, &[0; 12][..header_len], &frame(len as u8, len)).unwrap();
                assert_eq!(host.receive(), frame(len as u8, len));
                host.send(&frame(7, len));
                let got = receive(&mut queue, header_len);
                assert_eq!(got.len(), header_len + len);
                assert_eq!(got[header_len..], frame(7, len));
                assert_eq!(got[..10], [0; 10], "no offload was asked for");
            }
            tap.announce(&frame(9, 60)).unwrap();
            assert_eq!(host.receive(), frame(9, 60));
        }
        assert!(matches!(queue.receive(IoVecs::new().as_slice()), Err(_) | Ok(0)));
    });
}

#[test]
fn offloads_are_probed_and_taken() {
    in_namespace("uplink::tap_tests::offloads_are_probed_and_taken", || {
        let tap = up("t0", 1);
        let host = Host::new("t0");
        let offloads = tap.capabilities().offloads;
        let base =
            1 << vn::VIRTIO_NET_F_CSUM | 1 << vn::VIRTIO_NET_F_HOST_TSO4 | 1 << vn::VIRTIO_NET_F_GUEST_TSO6;
        assert_eq!(offloads & base, base);
        assert_eq!(offloads & !OFFLOADS, 0);
        // Every subset is accepted, sensible or not: a driver may acknowledge what it likes.
        let guest: Vec<u64> = (0..64).filter(|bit| OFFLOADS & 1 << bit != 0).collect();
        for subset in 0..1u64 << guest.len() {
            let features = guest.iter().enumerate().filter(|(i, _)| subset & 1 << i != 0);
            let features = features.map(|(_, bit)| 1 << bit).sum::<u64>() & offloads;
            tap.configure(FrameFormat { header_len: 12, features }).unwrap();
        }
        // A large frame with segmentation crosses whole.
        let mut queue = tap.queues().remove(0);
        let mut tcp = frame(0, 14);
        tcp[12..14].copy_from_slice(&[8, 0]);
        let ip = [0x45, 0, 0xea, 0x88, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        tcp.extend(ip);
        tcp.extend([0x30, 0x39, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.resize(14 + 60_040, 0x5a);
        let gso = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
        send(&mut queue, &gso, &tcp).unwrap();
        let mut bytes = vec![0; 70_000];
        let n = patiently(|| {
            let n = nix::unistd::read(&host.socket, &mut bytes).ok()?;
            (n > 50_000).then_some(n)
        });
        assert_eq!(n, tcp.len());
        assert!(bytes[54..n] == tcp[54..]);
        // A header that the kernel finds bad is the frame's fault, not the tap's.
        let bad = [1, 1, 54, 0, 0xa8, 5, 0xff, 0xff, 16, 0, 0, 0];
        assert!(matches!(send(&mut queue, &bad, &tcp), Err(SendError::Rejected(_))));
    });
}

#[test]
fn queues_join_and_leave_the_steering() {
    in_namespace("uplink::tap_tests::queues_join_and_leave_the_steering", || {
        let tap = up("t0", 4);
        let mut queues = tap.queues();
        assert_eq!(queues.len(), 4);
        // A queue that has not joined may send all the same.
        send(&mut queues[3], &[0; 12], &frame(1, 60)).unwrap();
        let host = Host::new("t0");
        // Which queues get frames of many flows.
        let mut spread = || {
            for port in 0..200u16 {
                host.send(&udp(port));
            }
            let mut got = [0; 4];
            let mut bytes = [0; 2000];
            patiently(|| {
                for (queue, got) in queues.iter_mut().zip(&mut got) {
                    let mut iovecs = IoVecs::new();
                    iovecs.push_own_mut(&mut bytes);
                    if let Ok(len) = queue.receive(iovecs.as_slice()) {
                        *got += usize::from(len == 12 + udp(0).len());
                    }
                }
                (got.iter().sum::<usize>() == 200).then_some(())
            });
            got.map(|frames| frames > 0)
        };
        assert_eq!(spread(), [true, false, false, false], "only the first has joined");
        for _ in 0..2 {
            tap.set_queue_active(3, true).unwrap();
        }
        assert_eq!(spread(), [true, false, false, true]);
        tap.set_queue_active(1, true).unwrap();
        for _ in 0..2 {
            tap.set_queue_active(3, false).unwrap();
        }
        assert_eq!(spread(), [true, true, false, false]);
        tap.set_queue_active(0, false).unwrap();
        tap.set_queue_active(17, true).unwrap();
        assert_eq!(spread(), [true, true, false, false], "the first stays");
    });
}

/// A UDP packet from this port.
fn udp(port: u16) -> Vec<u8> {
    let mut bytes = frame(0, 14);
    bytes[12..14].copy_from_slice(&[8, 0]);
    bytes.extend([0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes.extend(port.to_be_bytes());
    bytes.extend([0, 53, 0, 20, 0, 0]);
    bytes.resize(60, 0);
    bytes
}

#[test]
fn the_mtu_is_read_and_set() {
    in_namespace("uplink::tap_tests::the_mtu_is_read_and_set", || {
        assert_eq!(up("t0", 1).capabilities().mtu, 1500);
        let tap = Tap::open("t1", 1, Some(9000)).unwrap();
        assert_eq!(tap.capabilities().mtu, 9000);
        tap.set_mtu(1400).unwrap();
        let path = "/proc/self/net/dev";
        assert!(std::fs::read_to_string(path).unwrap().contains("t1:"));
        assert!(tap.set_mtu(10).is_err(), "the kernel says no");
        assert!(matches!(Tap::open("t2", 1, Some(10)), Err(TapError::Call(..))));
    });
}

#[test]
fn an_open_tap_is_inherited() {
    in_namespace("uplink::tap_tests::an_open_tap_is_inherited", || {
        let original = up("t0", 2);
        let raw: Vec<_> = original
            .queues()
            .iter()
            .map(|queue| queue.readable()[0].try_clone().unwrap().into_raw_fd())
            .collect();
        original.set_queue_active(1, true).unwrap();
        drop(original);
        let tap = Tap::inherit(&raw, None).unwrap();
        assert_eq!(tap.describe(), format!("tap-fd:{}:{} (t0)", raw[0], raw[1]));
        let host = Host::new("t0");
        send(&mut tap.queues()[0], &[0; 12], &frame(1, 60)).unwrap();
        assert_eq!(host.receive(), frame(1, 60));
        assert!(matches!(tap.queues()[0].receive(&[]), Err(_) | Ok(0)), "it does not block");
    });
}

#[test]
fn what_is_no_tap_is_not_inherited() {
    let (read, _write) = nix::unistd::pipe().unwrap();
    let text = Tap::inherit(&[read.as_raw_fd()], None).map(drop).unwrap_err().to_string();
    assert!(text.contains("is not an open tap"), "{text}");
    assert!(nix::fcntl::fcntl(&read, nix::fcntl::FcntlArg::F_GETFD).is_ok(), "and left open");
    for closed in [-1, 1_000_000] {
        assert!(matches!(Tap::inherit(&[closed], None), Err(TapError::NotATap(..))));
    }
    assert!(Tap::inherit(&[], None).is_err());
}

#[test]
fn refusals_say_what_to_do() {
    in_namespace("uplink::tap_tests::refusals_say_what_to_do", || {
        let why = |name: &str, pairs| Tap::open(name, pairs, None).map(drop).unwrap_err();
        let text = why("lo", 1).to_string();
        assert!(text.contains("not a tap") && text.contains("ip tuntap add dev lo"), "{text}");
        let _one = up("t0", 1);
        let began = Instant::now();
        let error = why("t0", 1);
        assert!(matches!(error, TapError::Busy(_)) && began.elapsed() > Duration::from_secs(1));
        assert!(matches!(why("t0", 2), TapError::WrongKind(..)));
        let text = why("t0", 2).to_string();
        assert!(text.contains("multi_queue"), "{text}");
    });
}

#[test]
fn without_permission_the_text_says_what_to_do() {
    // Capabilities belong to threads: this one has none, whoever runs the test.
    let refusal = std::thread::spawn(|| {
        drop_capabilities();
        Tap::open("vun-refused", 4, None).map(drop).unwrap_err()
    });
    let error = refusal.join().unwrap();
    if let TapError::NoTun(error) = error {
        return skip("a tap without permission", &format!("/dev/net/tun: {error}"));
    }
    assert!(matches!(error, TapError::NotPermitted(..)), "{error}");
    let text = error.to_string();
    assert!(text.contains("CAP_NET_ADMIN") && text.contains("vnet_hdr multi_queue"), "{text}");
}

fn drop_capabilities() {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let none = [0u32; 6];
    // SAFETY: version 3 of the header for the calling thread, and two sets of three words.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    assert_eq!(result, 0);
}

#[test]
fn an_interface_that_is_deleted_is_down() {
    in_namespace("uplink::tap_tests::an_interface_that_is_deleted_is_down", || {
        let tap = up("t0", 1);
        let mut queue = tap.queues().remove(0);
        assert!(matches!(queue.receive(&[]), Err(ReceiveError::Empty) | Ok(0)));
        let deleted = Command::new("ip").args(["link", "delete", "t0"]).status();
        if !deleted.is_ok_and(|status| status.success()) {
            return skip("a deleted tap", "no ip(8)");
        }
        let mut bytes = [0; 100];
        let mut iovecs = IoVecs::new();
        iovecs.push_own_mut(&mut bytes);
        assert!(matches!(queue.receive(iovecs.as_slice()), Err(ReceiveError::Down(_))));
        assert!(matches!(send(&mut queue, &[0; 12], &frame(1, 60)), Err(SendError::Down(_))));
        assert!(tap.announce(&frame(1, 60)).is_err_and(|error| error.kind() != io::ErrorKind::WouldBlock));
    });
}
