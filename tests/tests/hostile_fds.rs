//! What a front-end can do wrong with file descriptors: kinds, numbers, and eventfds that block.
//!
//! See `hostile_session.rs` for what each test asserts.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use lab::rawfront::{Arena, Front, Setup, Wire, flag, mem_reg, mem_table, msg, vring_addr};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const RING_FD_MESSAGES: [u32; 3] = [msg::SET_VRING_KICK, msg::SET_VRING_CALL, msg::SET_VRING_ERR];

/// Files of every kind but the right one, with a name for messages. Some would block whoever reads or writes.
fn files_of_every_kind() -> Result<Vec<(&'static str, OwnedFd)>> {
    let (pipe_read, pipe_write) = nix::unistd::pipe()?;
    let (socket, other) = UnixStream::pair()?;
    let disk = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR"))?;
    disk.set_len(16 * MIB)?;
    let signals = nix::sys::signalfd::SignalFd::new(&nix::sys::signal::SigSet::empty())?;
    let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::empty())?;
    let mut files: Vec<(&str, OwnedFd)> = vec![
        ("pipe, reading end", pipe_read),
        ("pipe, writing end", pipe_write),
        ("socket", socket.into()),
        ("other socket", other.into()),
        ("directory", File::open("/")?.into()),
        ("/dev/null", File::options().read(true).write(true).open("/dev/null")?.into()),
        ("/dev/zero", File::options().read(true).write(true).open("/dev/zero")?.into()),
        ("/proc file", File::open("/proc/self/status")?.into()),
        ("signalfd", signals.as_fd().try_clone_to_owned()?),
        ("epoll", epoll.0),
    ];
    // On tmpfs it would be as good as a memfd.
    if fcntl(&disk, FcntlArg::F_GET_SEALS).is_err() {
        files.push(("file on disk", disk.into()));
    }
    Ok(files)
}

#[test]
fn wrong_kinds_of_ring_fds() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut files = files_of_every_kind()?;
    files.push(("memfd", memfd_create("not an eventfd", MFdFlags::MFD_CLOEXEC)?));
    for request in RING_FD_MESSAGES {
        for (kind, file) in &files {
            let before = arena.complaints()?;
            let front = arena.bad_up()?;
            front
                .refused(request, &1u64.to_ne_bytes(), &[file.as_raw_fd()])
                .with_context(|| format!("{kind} in message {request}"))?;
            drop(front);
            arena.check_reported(before)?;
            // The same before anything else is set up, and without need_reply.
            let front = Front::connect(&arena.bad(), Setup::default())?;
            front.wire.tell(request, &0u64.to_ne_bytes(), &[file.as_raw_fd()])?;
            drop(front);
            arena.check_good().with_context(|| format!("{kind} in message {request}"))?;
        }
    }
    arena.check_all()
}

#[test]
fn wrong_kinds_of_memory_log_and_channel_fds() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut files = files_of_every_kind()?;
    files.push(("eventfd", OwnedFd::from(EventFd::new()?)));
    for (kind, file) in &files {
        let fd = [file.as_raw_fd()];
        let region = [0, MIB, 0x7f00_0000_0000, 0];
        let table = mem_table(&[region]);
        let log = [16 * MIB, 0].map(u64::to_ne_bytes).concat();
        let cases =
            [(msg::ADD_MEM_REG, mem_reg(region)), (msg::SET_MEM_TABLE, table), (msg::SET_LOG_BASE, log)];
        for (request, payload) in &cases {
            let before = arena.complaints()?;
            let front = arena.bad_negotiated()?;
            front.refused(*request, payload, &fd).with_context(|| format!("{kind} in message {request}"))?;
            drop(front);
            arena.check_reported(before)?;
            arena.check_good()?;
        }
        // A channel may be accepted until it is used; it must not hurt.
        let mut front = arena.bad_up()?;
        drop(front.wire.order(msg::SET_BACKEND_REQ_FD, &[], &fd));
        drop(front.prove_alive(32));
        arena.check_good()?;
    }
    arena.check_all()
}

/// Each message with no fd, one, two, nine, and as many as the kernel passes on.
#[test]
fn wrong_numbers_of_fds() -> Result<()> {
    let mut arena = Arena::new()?;
    let event = EventFd::new()?;
    let requests: Vec<u32> = (1..=25).chain(28..=43).collect();
    for count in [0, 1, 2, 3, 8, 9, 16, 253] {
        let fds = vec![event.as_raw_fd(); count];
        for request in &requests {
            let front = arena.bad_negotiated()?;
            let payload = match *request {
                msg::SET_MEM_TABLE => mem_table(&[[0, MIB, 0, 0], [MIB, MIB, MIB, 0]]),
                msg::SET_VRING_ADDR => vring_addr(0, 0, [0; 4]),
                msg::ADD_MEM_REG | msg::REM_MEM_REG => mem_reg([0, MIB, 0, 0]),
                msg::SET_LOG_BASE => vec![0; 16],
                _ => 0u64.to_ne_bytes().to_vec(),
            };
            let bytes = Wire::encode(*request, flag::VERSION | flag::NEED_REPLY, &payload);
            drop(front.wire.send_raw(&bytes, &fds));
            drop(front.wire.tell(msg::GET_FEATURES, &[], &fds));
            // Wait until both were looked at.
            drop(front.wire.recv(Duration::from_millis(20)));
        }
        arena.check_good().with_context(|| format!("{count} fds"))?;
    }
    arena.check_all()
}

/// Hundreds of rounds of abuse, then every fd is counted.
#[test]
fn no_fd_is_leaked_by_hundreds_of_abuses() -> Result<()> {
    let mut arena = Arena::new()?;
    let files = files_of_every_kind()?;
    for round in 0..300usize {
        let (_, file) = &files[round % files.len()];
        let front = if round % 3 == 0 { arena.bad_up()? } else { arena.bad_negotiated()? };
        let fds = vec![file.as_raw_fd(); 1 + round % 12];
        let request = [5, 6, 7, 12, 13, 14, 21, 32, 37, 38, 42, 1, 2, 200][round % 14];
        let message = Wire::encode(request, flag::VERSION, &[0; 8]);
        match round % 4 {
            // Whole, or begun and given up, or without waiting for anything.
            0 => drop(front.wire.send_raw(&message, &fds)),
            1 => drop(front.wire.send_once(&message[..7], &fds)),
            2 => {
                for _ in 0..20 {
                    drop(front.wire.send_raw(&message, &fds));
                }
            }
            _ => drop(front.wire.order(request, &[0; 8], &fds)),
        }
    }
    arena.check_all()
}

/// Plain writes to this call fd block. Nobody may wait for it, not even the port itself.
#[test]
fn a_call_eventfd_at_its_maximum() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut front = arena.bad_up()?;
    for index in 0..2usize {
        let call = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?;
        call.write(u64::MAX - 1)?;
        let payload = (index as u64).to_ne_bytes();
        front.wire.tell(msg::SET_VRING_CALL, &payload, &[call.as_raw_fd()])?;
        front.rings[index].call = call;
    }
    for _ in 0..20 {
        front.prove_alive(64).context("the port with the full call eventfd")?;
        arena.check_good()?;
    }
    ensure!(front.stop_ring(1)? == 20 * 64, "base");
    drop(front);
    arena.check_all()
}

/// The same for the error fd, with an error to report.
#[test]
fn an_error_eventfd_at_its_maximum() -> Result<()> {
    let mut arena = Arena::new()?;
    let before = arena.complaints()?;
    let mut front = arena.bad_up()?;
    let err = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?;
    err.write(u64::MAX - 1)?;
    front.wire.tell(msg::SET_VRING_ERR, &1u64.to_ne_bytes(), &[err.as_raw_fd()])?;
    let index = front.tx().avail_idx.wrapping_add(0x4000);
    front.tx().publish(index)?;
    front.tx().kick()?;
    arena.check_good()?;
    drop(front);
    arena.check_reported(before)?;
    arena.check_all()
}

/// The peer shares O_NONBLOCK with us and can clear it, and it can read the kick before we do.
#[test]
fn a_kick_eventfd_that_the_front_end_drains_itself() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut front = arena.bad_up()?;
    let kick = &front.rings[1].kick;
    for _ in 0..5000 {
        fcntl(kick, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        kick.write(1)?;
        // Empty again if the back-end was quicker.
        let _ = kick.read();
        fcntl(kick, FcntlArg::F_SETFL(OFlag::empty()))?;
    }
    arena.check_good()?;
    front.prove_alive(64)?;
    drop(front);
    arena.check_all()
}

#[test]
fn a_storm_of_kicks() -> Result<()> {
    let mut arena = Arena::new()?;
    let front = arena.bad_up()?;
    let (stop, kick) = (AtomicBool::new(false), &front.rings[1].kick);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = kick.write(1);
            }
        });
        let result = (0..20).try_for_each(|_| arena.check_good().map(drop));
        stop.store(true, Ordering::Relaxed);
        result
    })?;
    drop(front);
    // A semaphore that is readable for ever: each read takes one of it.
    let front = arena.bad_up()?;
    let endless = EventFd::from_value_and_flags(0, EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_CLOEXEC)?;
    endless.write(u64::MAX - 1)?;
    front.stop_ring(1)?;
    front.wire.tell(msg::SET_VRING_KICK, &1u64.to_ne_bytes(), &[endless.as_raw_fd()])?;
    for _ in 0..20 {
        arena.check_good()?;
    }
    ensure!(front.wire.ask(msg::GET_FEATURES, &[]).is_ok());
    drop(front);
    arena.check_all()
}

/// Each of our notifications is a kick to ourselves.
#[test]
fn kick_and_call_are_one_eventfd() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut front = arena.bad_up()?;
    let kick = front.rings[1].kick.as_raw_fd();
    front.wire.tell(msg::SET_VRING_CALL, &1u64.to_ne_bytes(), &[kick])?;
    front.wire.tell(msg::SET_VRING_ERR, &1u64.to_ne_bytes(), &[kick])?;
    front.prove_alive(64)?;
    arena.check_good()?;
    drop(front);
    arena.check_all()
}

/// A full socket as the back-end's channel to the front-end.
#[test]
fn a_back_channel_that_nobody_reads() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut front = arena.bad_up()?;
    let (ours, theirs) = UnixStream::pair()?;
    theirs.set_nonblocking(true)?;
    while std::io::Write::write(&mut &theirs, &[0; 4096]).is_ok() {}
    theirs.set_nonblocking(false)?;
    drop(front.wire.order(msg::SET_BACKEND_REQ_FD, &[], &[theirs.as_raw_fd()]));
    front.prove_alive(64)?;
    arena.check_good()?;
    drop((front, ours, theirs));
    arena.check_all()
}

/// fds in messages that nobody has read yet, over and over, up to what the kernel allows.
#[test]
fn fds_in_messages_behind_a_message_in_pieces() -> Result<()> {
    let mut arena = Arena::new()?;
    let event = EventFd::new()?;
    let fds: Vec<RawFd> = vec![event.as_raw_fd(); 8];
    let front = arena.bad_up()?;
    front.wire.socket().set_write_timeout(Some(Duration::from_millis(300)))?;
    for _ in 0..200 {
        let table = Wire::encode(msg::SET_MEM_TABLE, flag::VERSION, &mem_table(&[[0, MIB, 0, 0]; 8]));
        if front.wire.send_once(&table, &fds).is_err() {
            break;
        }
    }
    arena.check_good()?;
    drop(front);
    arena.check_all()
}
