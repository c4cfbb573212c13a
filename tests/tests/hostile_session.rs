//! What a front-end can do wrong on the control socket: bytes, sizes, order, silence and storms.
//!
//! Each test abuses one port of a real back-end process while another port works, and asserts that the process
//! lives, the abuse is reported, the port can be used again, the other port goes on, and no fd is left behind.
#![forbid(unsafe_code)]

use anyhow::{Result, ensure};
use lab::rawfront::{Arena, BAD, Front, PATIENCE, Setup, Wire, WireError, flag, mem_reg, msg, state};
use nix::sys::eventfd::EventFd;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

const VERSION: u32 = flag::VERSION;
const NEED_REPLY: u32 = flag::VERSION | flag::NEED_REPLY;

#[test]
fn unknown_messages_are_refused_and_the_session_goes_on() -> Result<()> {
    let mut arena = Arena::new()?;
    let before = arena.complaints()?;
    let mut front = arena.bad_up()?;
    for request in [0, 26, 27, 33, 44, 99, 255, 0x8000_0000, u32::MAX] {
        for payload in [&[][..], &[0; 8], &[0xff; 40], &[0; 4096]] {
            ensure!(front.refused(request, payload, &[])?, "message {request} ended the connection");
            // Without need_reply there is nobody to tell, and nothing to close for.
            front.wire.tell(request, payload, &[])?;
        }
    }
    front.prove_alive(64)?;
    drop(front);
    arena.check_reported(before)?;
    arena.check_all()
}

#[test]
fn oversized_and_malformed_headers_end_the_connection() -> Result<()> {
    let mut arena = Arena::new()?;
    let good_size = state(0, 1);
    let cases: &[(&str, Vec<u8>)] = &[
        ("4 GiB", Wire::encode_sized(msg::GET_FEATURES, VERSION, u32::MAX, &[])),
        ("2 GiB", Wire::encode_sized(msg::SET_MEM_TABLE, VERSION, 1 << 31, &[])),
        ("1 MiB", Wire::encode_sized(msg::SET_MEM_TABLE, VERSION, 1 << 20, &[])),
        ("version 0", Wire::encode(msg::SET_VRING_NUM, 0, &good_size)),
        ("version 2", Wire::encode(msg::SET_VRING_NUM, 2, &good_size)),
        ("a reply", Wire::encode(msg::SET_VRING_NUM, VERSION | flag::REPLY, &good_size)),
    ];
    for (case, bytes) in cases {
        let before = arena.complaints()?;
        let front = arena.bad_up()?;
        front.wire.send_raw(bytes, &[])?;
        ensure!(front.wire.is_closed_within(PATIENCE), "{case}: the connection is still open");
        drop(front);
        arena.check_reported(before)?;
        arena.check_good()?;
    }
    arena.check_all()
}

/// Every message number with every length of payload and different numbers of fds.
#[test]
fn every_message_with_wrong_sizes_and_fds() -> Result<()> {
    let mut arena = Arena::new()?;
    let before = arena.complaints()?;
    let event = EventFd::new()?;
    let fds = [event.as_raw_fd(); 3];
    let mut connections = 0;
    for request in 0..=45 {
        let mut front = arena.bad_negotiated()?;
        for size in [0, 1, 4, 7, 8, 9, 12, 16, 20, 24, 32, 39, 40, 41, 256, 268, 4096] {
            for count in 0..=2 {
                let payload: Vec<u8> = (0..size).map(|i| (i * 37 + request) as u8).collect();
                let bytes = Wire::encode(request, NEED_REPLY, &payload);
                let sent = front.wire.send_raw(&bytes, &fds[..count]);
                // A question behind it shows whether the session goes on; it may have ended before it.
                let asked = sent.and_then(|()| front.wire.tell(msg::GET_FEATURES, &[], &[]));
                if asked.is_err() || !answers_get_features(&front.wire)? {
                    connections += 1;
                    front = arena.bad_negotiated()?;
                }
            }
        }
        arena.check_good()?;
    }
    println!("{connections} of the messages ended their connection");
    arena.check_reported(before)?;
    arena.check_all()
}

/// Skips replies up to the one to GET_FEATURES. `false`: the connection was closed.
fn answers_get_features(wire: &Wire) -> Result<bool> {
    loop {
        match wire.recv(PATIENCE) {
            Ok(reply) if reply.request == msg::GET_FEATURES => return Ok(true),
            Ok(_) => {}
            Err(WireError::Closed) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
}

#[test]
fn a_front_end_that_leaves_in_the_middle_of_a_message() -> Result<()> {
    let mut arena = Arena::new()?;
    let event = EventFd::new()?;
    let message = Wire::encode(msg::SET_VRING_KICK, VERSION, &0u64.to_ne_bytes());
    for length in 0..message.len() {
        let front = arena.bad_negotiated()?;
        if length > 0 {
            front.wire.send_raw(&message[..length], &[event.as_raw_fd()])?;
        }
        drop(front);
    }
    let region = Wire::encode(msg::ADD_MEM_REG, NEED_REPLY, &mem_reg([0, 1 << 20, 0, 0]));
    for length in [1, 11, 12, 13, region.len() - 1] {
        let front = arena.bad_up()?;
        front.wire.send_raw(&region[..length], &[front.memory.fd()])?;
        front.wire.socket().shutdown(std::net::Shutdown::Write)?;
        ensure!(front.wire.is_closed_within(PATIENCE), "{length} bytes, then the end: still open");
    }
    arena.check_all()
}

#[test]
fn a_whole_session_in_single_bytes() -> Result<()> {
    let mut arena = Arena::new()?;
    for piece in [1, 5, 11, 13] {
        let setup = Setup { piece, ..Setup::default() };
        let mut front = Front::up_with(&arena.bad(), setup)?;
        front.prove_alive(100)?;
        ensure!(front.stop_ring(1)? == 100, "base after 100 frames");
    }
    arena.check_all()
}

/// The kernel glues messages without fds to a following one that carries fds: they are the last one's.
#[test]
fn messages_glued_to_one_with_fds() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut front = arena.bad_negotiated()?;
    front.share_memory()?;
    for (index, ring) in front.rings.iter().enumerate() {
        let i = index as u32;
        let glued = [
            Wire::encode(msg::SET_VRING_NUM, VERSION, &state(i, ring.size.into())),
            Wire::encode(msg::SET_VRING_BASE, VERSION, &state(i, 0)),
            Wire::encode(msg::SET_VRING_ADDR, VERSION, &front.vring_addr(index)),
            Wire::encode(msg::SET_VRING_KICK, VERSION, &u64::from(i).to_ne_bytes()),
        ]
        .concat();
        front.wire.send_once(&glued, &[ring.kick.as_raw_fd()])?;
    }
    front.prove_alive(100)?;
    drop(front);
    arena.check_all()
}

#[test]
fn hundreds_of_messages_in_one_write() -> Result<()> {
    let mut arena = Arena::new()?;
    let front = arena.bad_up()?;
    // Far more than replies that may wait: the rest must be taken up when some of those have been read.
    let count = 500;
    front.wire.send_raw(&Wire::encode(msg::GET_FEATURES, VERSION, &[]).repeat(count), &[])?;
    for _ in 0..count {
        front.wire.reply_to(msg::GET_FEATURES)?;
    }
    drop(front);
    arena.check_all()
}

#[test]
fn fds_in_the_middle_of_a_message() -> Result<()> {
    let mut arena = Arena::new()?;
    let before = arena.complaints()?;
    let event = EventFd::new()?;
    for cut in [1, 11, 12, 19] {
        let front = arena.bad_up()?;
        let message = Wire::encode(msg::SET_VRING_CALL, VERSION, &0u64.to_ne_bytes());
        front.wire.send_once(&message[..cut], &[])?;
        // Let the first piece be read on its own.
        std::thread::sleep(Duration::from_millis(20));
        front.wire.send_once(&message[cut..], &[event.as_raw_fd()])?;
        ensure!(front.wire.is_closed_within(PATIENCE), "fds after {cut} bytes: still open");
    }
    arena.check_reported(before)?;
    arena.check_all()
}

#[test]
fn silence_in_the_middle_of_a_message_holds_up_nobody() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut front = arena.bad_up()?;
    let message = Wire::encode(msg::GET_FEATURES, VERSION, &[]);
    for cut in 1..message.len() {
        front.wire.send_once(&message[..cut], &[])?;
        arena.check_good()?;
        // Its own packets go on as well.
        front.prove_alive(64)?;
        front.wire.send_once(&message[cut..], &[])?;
        front.wire.reply_to(msg::GET_FEATURES)?;
    }
    drop(front);
    arena.check_all()
}

/// Everything that needs something else first, before anything was negotiated.
#[test]
fn messages_out_of_order() -> Result<()> {
    let mut arena = Arena::new()?;
    let event = EventFd::new()?;
    let ring0 = 0u64.to_ne_bytes();
    let cases: Vec<(u32, Vec<u8>, bool)> = vec![
        (msg::SET_VRING_ADDR, lab::rawfront::vring_addr(0, 0, [0x1000, 0x2000, 0x3000, 0]), false),
        (msg::SET_VRING_NUM, state(0, 64), false),
        (msg::SET_VRING_BASE, state(0, 7), false),
        (msg::SET_VRING_KICK, ring0.to_vec(), true),
        (msg::SET_VRING_CALL, ring0.to_vec(), true),
        (msg::SET_VRING_ENABLE, state(0, 1), false),
        (msg::SET_VRING_ENABLE, state(1, 1), false),
        (msg::SET_VRING_KICK, 1u64.to_ne_bytes().to_vec(), true),
        (msg::GET_VRING_BASE, state(0, 0), false),
        (msg::GET_VRING_BASE, state(1, 0), false),
        (msg::REM_MEM_REG, mem_reg([0, 4096, 0, 0]), false),
        (msg::SET_STATUS, 0xfu64.to_ne_bytes().to_vec(), false),
        (msg::RESET_DEVICE, vec![], false),
        (msg::SEND_RARP, 0x0000_5634_1200_5452u64.to_ne_bytes().to_vec(), false),
        (msg::NET_SET_MTU, 1400u64.to_ne_bytes().to_vec(), false),
        (msg::RESET_OWNER, vec![], false),
        (msg::SET_LOG_BASE, vec![0; 16], true),
        (msg::SET_MEM_TABLE, state(1, 0), false),
    ];
    for (request, payload, with_fd) in &cases {
        for negotiated in [false, true] {
            let mut front = match negotiated {
                true => arena.bad_negotiated()?,
                false => Front::connect(&arena.bad(), Setup::default())?,
            };
            let fds: &[_] = if *with_fd { &[event.as_raw_fd()] } else { &[] };
            front.wire.tell(*request, payload, fds)?;
            let asked = front.wire.tell(msg::GET_FEATURES, &[], &[]);
            if asked.is_err() || !answers_get_features(&front.wire)? {
                continue;
            }
            // The session goes on: then it must come to a working device in the end.
            front.negotiate()?;
            front.acknowledge_features()?;
            front.share_memory()?;
            front.start_rings()?;
            front.prove_alive(64).map_err(|e| e.context(format!("after an early message {request}")))?;
        }
        arena.check_good()?;
    }
    arena.check_all()
}

#[test]
fn ring_numbers_and_values_beyond_the_limits() -> Result<()> {
    let mut arena = Arena::new()?;
    let event = EventFd::new()?;
    let event = [event.as_raw_fd()];
    let mut cases: Vec<(u32, Vec<u8>, bool)> = Vec::new();
    for index in [2, 3, 255, 256, 0x8000_0000, u32::MAX] {
        cases.push((msg::SET_VRING_NUM, state(index, 64), false));
        cases.push((msg::SET_VRING_BASE, state(index, 0), false));
        cases.push((msg::SET_VRING_ENABLE, state(index, 1), false));
        cases.push((
            msg::SET_VRING_ADDR,
            lab::rawfront::vring_addr(index, 0, [0x1000, 0x2000, 0x3000, 0]),
            false,
        ));
    }
    for index in [2u64, 255] {
        for request in [msg::SET_VRING_KICK, msg::SET_VRING_CALL, msg::SET_VRING_ERR] {
            cases.push((request, index.to_ne_bytes().to_vec(), true));
        }
    }
    for size in [0, 3, 63, 65, 32769, 65536, u32::MAX] {
        cases.push((msg::SET_VRING_NUM, state(0, size), false));
    }
    cases.push((msg::SET_VRING_BASE, state(0, 0x1_0000), false));
    cases.push((msg::SET_VRING_ENABLE, state(0, 2), false));
    for mtu in [0u64, 67, 65536, u64::MAX] {
        cases.push((msg::NET_SET_MTU, mtu.to_ne_bytes().to_vec(), false));
    }
    for (request, payload, with_fd) in &cases {
        let before = arena.complaints()?;
        let front = arena.bad_negotiated()?;
        front
            .refused(*request, payload, if *with_fd { &event } else { &[] })
            .map_err(|e| e.context(format!("message {request} {payload:?}")))?;
        drop(front);
        arena.check_reported(before)?;
    }
    arena.check_all()
}

/// A stream of noise, and noise behind a legal session.
#[test]
fn noise() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let event = EventFd::new()?;
    for round in 0..200 {
        let front = Front::connect(&arena.bad(), Setup::default())?;
        let mut bytes = Vec::new();
        for _ in 0..1 + next() % 8 {
            // Mostly right headers, or the first check would end every round.
            let (request, flags) = ((next() % 46) as u32, [1, 1, 9, 9, 5, 0][(next() % 6) as usize]);
            let payload: Vec<u8> = (0..next() % 64).map(|_| next() as u8).collect();
            bytes.extend(Wire::encode(request, flags, &payload));
        }
        let fds = [event.as_raw_fd(), front.memory.fd()];
        // The back-end may close while we still send.
        drop(front.wire.send_raw(&bytes, &fds[..(next() % 3) as usize]));
        if round % 20 == 0 {
            arena.check_good()?;
        }
    }
    arena.check_all()
}

/// Questions without end, answers never read: the back-end must neither grow nor wait.
#[test]
fn a_front_end_that_never_reads_its_replies() -> Result<()> {
    let mut arena = Arena::new()?;
    let before = arena.backend.rss_anon_kib()?;
    let front = arena.bad_up()?;
    front.wire.socket().set_write_timeout(Some(Duration::from_millis(300)))?;
    let burst = Wire::encode(msg::GET_FEATURES, VERSION, &[]).repeat(256);
    let mut bytes = 0usize;
    while bytes < 64 << 20 {
        match front.wire.send_once(&burst, &[]) {
            Ok(sent) => bytes += sent,
            Err(_) => break,
        }
    }
    arena.check_good()?;
    let grown = arena.backend.rss_anon_kib()?.saturating_sub(before);
    ensure!(grown < 4096, "{grown} KiB more after {bytes} bytes of questions");
    drop(front);
    arena.check_all()
}

#[test]
fn connections_come_and_go_by_the_hundred() -> Result<()> {
    let mut arena = Arena::new()?;
    let socket = arena.bad();
    let storm = |arena: &mut Arena| -> Result<()> {
        for round in 0..500 {
            let stream = UnixStream::connect(&socket)?;
            match round % 4 {
                0 => drop(stream),
                1 => drop(Wire::from_stream(stream).tell(msg::GET_FEATURES, &[], &[])),
                2 => drop(Wire::from_stream(stream).ask(msg::GET_FEATURES, &[])?),
                _ => {
                    drop(stream);
                    let mut front = arena.bad_up()?;
                    front.prove_alive(8)?;
                }
            }
        }
        arena.check_all()
    };
    storm(&mut arena)?;
    let before = arena.backend.rss_anon_kib()?;
    storm(&mut arena)?;
    let grown = arena.backend.rss_anon_kib()?.saturating_sub(before);
    ensure!(grown <= 512, "{grown} KiB more after 500 connections");
    Ok(())
}

/// QEMU's live update opens a second connection while the first lives. The first must not suffer, whatever the
/// back-end does with the second; and once the first is gone, the port is free.
#[test]
fn a_second_connection_while_the_first_lives() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut first = arena.bad_up()?;
    first.prove_alive(64)?;
    let idle: Vec<_> = (0..8).map(|_| UnixStream::connect(arena.bad())).collect::<std::io::Result<_>>()?;
    let asking = Wire::connect(&arena.bad())?;
    // It may be served, refused or left waiting.
    drop(asking.tell(msg::GET_FEATURES, &[], &[]));
    first.prove_alive(256)?;
    ensure!(first.wire.ask(msg::GET_FEATURES, &[]).is_ok(), "the first connection's session is gone");
    arena.check_good()?;
    drop((first, idle, asking));
    arena.check_all()
}

#[test]
fn sigterm_ends_the_process_cleanly_with_front_ends_connected() -> Result<()> {
    let mut arena = Arena::new()?;
    let half = Wire::connect(&arena.bad())?;
    half.send_once(&[1, 0, 0], &[])?;
    let status = arena.backend.terminate()?;
    ensure!(status.success(), "{status}");
    ensure!(!arena.backend.socket(BAD).exists(), "the socket's file is left behind");
    Ok(())
}
