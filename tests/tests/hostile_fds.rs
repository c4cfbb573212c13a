//! What a front-end can do wrong with file descriptors: kinds, numbers, and files that change or block under us.
//!
//! See `hostile_session.rs` for what each test asserts.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use lab::rawfront::{
    Arena, BAD, Front, GOOD, Memory, PATIENCE, Setup, SilentFuse, Wire, eventually, flag, mem_reg, mem_table,
    msg, protocol, state, test_frame, virtio, vring_addr,
};
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const RING_FD_MESSAGES: [u32; 3] = [msg::SET_VRING_KICK, msg::SET_VRING_CALL, msg::SET_VRING_ERR];

/// Files of every kind but the right one, with a name for messages. Some would block whoever reads or writes.
fn files_of_every_kind() -> Result<Vec<(&'static str, OwnedFd)>> {
    let (pipe_read, pipe_write) = nix::unistd::pipe()?;
    let (socket, other) = UnixStream::pair()?;
    let disk = tempfile::tempfile_in("/var/tmp")?;
    disk.set_len(16 * MIB)?;
    let signals = nix::sys::signalfd::SignalFd::new(&nix::sys::signal::SigSet::empty())?;
    let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::empty())?;
    Ok(vec![
        ("pipe, reading end", pipe_read),
        ("pipe, writing end", pipe_write),
        ("socket", socket.into()),
        ("other socket", other.into()),
        ("file on disk", disk.into()),
        ("directory", File::open("/")?.into()),
        ("/dev/null", File::options().read(true).write(true).open("/dev/null")?.into()),
        ("/dev/zero", File::options().read(true).write(true).open("/dev/zero")?.into()),
        ("/proc file", File::open("/proc/self/status")?.into()),
        ("signalfd", signals.as_fd().try_clone_to_owned()?),
        ("epoll", epoll.0),
    ])
}

#[test]
fn wrong_kinds_of_ring_fds() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut files = files_of_every_kind()?;
    files.push(("memfd", memfd_create("not an eventfd", MFdFlags::MFD_CLOEXEC)?));
    for request in RING_FD_MESSAGES {
        for (kind, file) in &files {
            let before = arena.complaints();
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
            let before = arena.complaints();
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
    let before = arena.complaints();
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

#[test]
fn memory_that_cannot_be_written() -> Result<()> {
    let mut arena = Arena::new()?;
    let memfd = || memfd_create("sealed", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING);
    let sealed = File::from(memfd()?);
    sealed.set_len(MIB)?;
    fcntl(&sealed, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE))?;
    let writable = File::from(memfd()?);
    writable.set_len(MIB)?;
    let read_only = File::open(format!("/proc/self/fd/{}", writable.as_raw_fd()))?;
    let empty = File::from(memfd()?);
    for (case, file) in [("sealed", &sealed), ("read-only", &read_only), ("empty", &empty)] {
        let before = arena.complaints();
        let front = arena.bad_negotiated()?;
        front.refused(msg::ADD_MEM_REG, &mem_reg([0, MIB, 1 << 40, 0]), &[file.as_raw_fd()]).context(case)?;
        drop(front);
        arena.check_reported(before)?;
    }
    // Growing and shrinking forbidden is what careful VMMs do.
    let careful = File::from(memfd()?);
    let size = 4 * MIB;
    careful.set_len(size)?;
    fcntl(&careful, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW))?;
    let memory = Memory::of_file(careful, size);
    let mut front = Front::connect_with_memory(&arena.bad(), Setup::default(), memory)?;
    front.bring_up()?;
    front.prove_alive(64)?;
    drop(front);
    arena.check_all()
}

/// SIGBUS for whoever touches it: that port fails, the process lives.
#[test]
fn memory_that_is_truncated_under_us() -> Result<()> {
    let mut arena = Arena::new()?;
    let setup = Setup { ring_size: 1024, ..Setup::default() };
    let probe = Front::connect(&arena.bad(), setup.clone())?;
    let tx = &probe.rings[1];
    let cuts = [
        ("all of it", 0),
        ("from the descriptors on", tx.desc),
        ("behind the first descriptors", tx.desc + 4096),
        ("from the available ring on", tx.avail & !4095),
        ("behind the available index", (tx.avail & !4095) + 4096),
        ("from the end of the used ring on", (tx.used + 8 * 1024) & !4095),
        ("from the buffers on", tx.buffers),
    ];
    drop(probe);
    for (case, length) in cuts {
        let mut front = Front::up_with(&arena.bad(), setup.clone())?;
        front.prove_alive(64)?;
        let before = arena.complaints();
        for _ in 0..16 {
            front.tx().queue_frame(12, &test_frame())?;
        }
        // From here on nothing may be written: that would make the file grow again.
        front.memory.file().set_len(length)?;
        front.tx().kick()?;
        let noticed = || {
            let (ring, wire) = (&front.rings[1], &front.wire);
            arena.complaints() > before
                || ring.errors() > 0
                || ring.is_drained_within(Duration::ZERO)
                || wire.is_closed_within(Duration::ZERO)
        };
        ensure!(eventually(PATIENCE, noticed), "{case}: nothing was reported\n{}", arena.backend.log_text());
        arena.check_good().context(case)?;
        drop(front);
        arena.check_good().context(case)?;
    }
    arena.check_all()
}

/// The same in the middle of traffic, again and again.
#[test]
fn memory_that_comes_and_goes_under_traffic() -> Result<()> {
    let mut arena = Arena::new()?;
    for _ in 0..10 {
        let mut front = arena.bad_up()?;
        let (memory, stop) = (front.memory.clone(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    drop(memory.file().set_len(0));
                    drop(memory.file().set_len(memory.size));
                }
            });
            let mut result = Ok(());
            for _ in 0..300 {
                let tx = front.tx();
                result = tx.queue_frame(12, &test_frame()).and_then(|()| tx.kick());
                if result.is_err() {
                    break;
                }
            }
            stop.store(true, Ordering::Relaxed);
            result
        })?;
        arena.check_good()?;
    }
    arena.check_all()
}

/// The dirty log is memory of the front-end as well.
#[test]
fn a_dirty_log_that_is_truncated_under_us() -> Result<()> {
    let mut arena = Arena::new()?;
    let setup = Setup { features: Setup::default().features | virtio::LOG_ALL, ..Setup::default() };
    let mut front = Front::connect(&arena.bad(), setup)?;
    front.negotiate()?;
    let log = Memory::memfd(MIB)?;
    let payload = [MIB, 0].map(u64::to_ne_bytes).concat();
    ensure!(front.has(protocol::LOG_SHMFD));
    front.wire.tell(msg::SET_LOG_BASE, &payload, &[log.fd()])?;
    // QEMU wants a reply whatever the flags; its content is not specified.
    front.wire.reply_to(msg::SET_LOG_BASE)?;
    ensure!(front.features & virtio::LOG_ALL != 0, "LOG_ALL is not offered");
    front.acknowledge_features()?;
    front.share_memory()?;
    for index in 0..2 {
        let (ring, user) = (&front.rings[index], front.memory.user);
        let addr = [user + ring.desc, user + ring.used, user + ring.avail, ring.used];
        let i = index as u32;
        front.wire.tell(msg::SET_VRING_NUM, &state(i, ring.size.into()), &[])?;
        front.wire.tell(msg::SET_VRING_BASE, &state(i, 0), &[])?;
        front.wire.tell(msg::SET_VRING_ADDR, &vring_addr(i, 1, addr), &[])?;
        front.wire.tell(msg::SET_VRING_KICK, &u64::from(i).to_ne_bytes(), &[ring.kick.as_raw_fd()])?;
    }
    front.prove_alive(64)?;
    let used_page = front.tx().used / 4096;
    let logged = || log.read(used_page / 8, 1).is_ok_and(|b| b[0] & (1 << (used_page % 8)) != 0);
    ensure!(eventually(PATIENCE, logged), "the used ring's page is not in the log");
    log.file().set_len(0)?;
    for _ in 0..16 {
        front.tx().queue_frame(12, &test_frame())?;
        front.tx().kick()?;
        arena.check_good()?;
    }
    drop(front);
    arena.check_all()
}

/// Mapping and unmapping what is large takes long; other ports' packets flow meanwhile.
#[test]
fn a_front_end_with_64_gib_of_memory() -> Result<()> {
    let mut arena = Arena::new()?;
    let (bad, stop) = (arena.bad(), AtomicBool::new(false));
    let good = &mut arena.good;
    let (worst, abuse) = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut worst = Duration::ZERO;
            while !stop.load(Ordering::Relaxed) {
                worst = worst.max(good.prove_alive(32)?);
            }
            anyhow::Ok(worst)
        });
        let abuse = (0..10).try_for_each(|_| {
            let memory = Memory::memfd(64 << 30)?;
            let mut front = Front::connect_with_memory(&bad, Setup::default(), memory)?;
            front.bring_up()?;
            front.prove_alive(64)?;
            anyhow::Ok(())
        });
        stop.store(true, Ordering::Relaxed);
        (watch.join(), abuse)
    });
    abuse?;
    let worst = worst.map_err(|_| anyhow::anyhow!("the watching thread panicked"))??;
    println!("longest wait of the other port: {worst:?}");
    ensure!(worst < Duration::from_secs(1), "the other port had to wait for {worst:?}");
    arena.check_all()
}

/// A file whose owner answers everything but reads: it looks like memory until it is touched.
#[test]
fn memory_on_fuse() -> Result<()> {
    let fuse = match SilentFuse::mount() {
        Ok(fuse) => fuse,
        Err(why) => {
            lab::skip("memory_on_fuse", &format!("{why:#}"));
            return Ok(());
        }
    };
    let mut arena = Arena::new()?;
    let file = fuse.open()?;
    let region = [0, MIB, 1 << 40, 0];
    for (request, payload) in
        [(msg::ADD_MEM_REG, mem_reg(region)), (msg::SET_MEM_TABLE, mem_table(&[region]))]
    {
        let before = arena.complaints();
        let front = arena.bad_negotiated()?;
        front.refused(request, &payload, &[file.as_raw_fd()])?;
        drop(front);
        arena.check_reported(before)?;
        arena.check_good()?;
    }
    arena.check_all()?;
    fuse.abort();
    Ok(())
}

/// A file whose owner answers nothing at all: fstat, fstatfs and close wait for ever. Packets of other ports flow,
/// and other ports' control sockets are served.
#[test]
fn fds_whose_owner_never_answers() -> Result<()> {
    let region = [0, MIB, 1 << 40, 0];
    let zero = 0u64.to_ne_bytes().to_vec();
    let cases: [(u32, Vec<u8>); 7] = [
        (msg::ADD_MEM_REG, mem_reg(region)),
        (msg::SET_MEM_TABLE, mem_table(&[region])),
        (msg::SET_LOG_BASE, [MIB, 0].map(u64::to_ne_bytes).concat()),
        (msg::SET_VRING_KICK, zero.clone()),
        (msg::SET_VRING_CALL, zero.clone()),
        (msg::SET_BACKEND_REQ_FD, vec![]),
        (msg::GET_FEATURES, vec![]),
    ];
    let mut failures = Vec::new();
    for (request, payload) in &cases {
        let fuse = match SilentFuse::mount() {
            Ok(fuse) => fuse,
            Err(why) => {
                lab::skip("fds_whose_owner_never_answers", &format!("{why:#}"));
                return Ok(());
            }
        };
        let mut arena = Arena::new()?;
        let file = fuse.open()?;
        let front = arena.bad_negotiated()?;
        let silence = fuse.fall_silent();
        let bytes = Wire::encode(*request, flag::VERSION | flag::NEED_REPLY, payload);
        front.wire.send_raw(&bytes, &[file.as_raw_fd()])?;
        std::thread::sleep(Duration::from_millis(50));
        let result = check_both_halves(&mut arena, front);
        // Lets go of everything that waits; our own close would wait as well.
        fuse.abort();
        drop(file);
        drop(silence);
        let result = result.and_then(|()| arena.check_all().context("after the owner's end"));
        failures.extend(result.err().map(|why| format!("message {request}: {why:#}")));
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

/// The same in great number: they must not use up the descriptors that other ports need.
#[test]
fn hundreds_of_fds_whose_owner_never_answers() -> Result<()> {
    const FDS_MAX: usize = 128;
    let fuse = match SilentFuse::mount() {
        Ok(fuse) => fuse,
        Err(why) => {
            lab::skip("hundreds_of_fds_whose_owner_never_answers", &format!("{why:#}"));
            return Ok(());
        }
    };
    let mut arena = Arena::new()?;
    let before = arena.backend.fds()?;
    let file = fuse.open()?;
    let fds = [file.as_raw_fd(); 8];
    let silence = fuse.fall_silent();
    let message = Wire::encode(msg::SET_MEM_TABLE, flag::VERSION, &mem_table(&[[0, MIB, 0, 0]; 8]));
    let mut connections = Vec::new();
    for _ in 0..20 {
        let wire = Wire::connect(&arena.bad())?;
        // Closed at some point, or not accepted any more.
        for _ in 0..10 {
            let _ = wire.send_once(&message, &fds);
        }
        // Kept for now: fds in a queue that nobody reads would be flushed by our own close.
        connections.push(wire);
        if connections.len() > 1 {
            connections[connections.len() - 2].socket().shutdown(std::net::Shutdown::Both)?;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let result = check_good_beside(&mut arena);
    let most = arena.backend.fds()?;
    fuse.abort();
    drop((connections, file, silence));
    println!("{most} fds of the back-end were open, {before} before");
    result?;
    ensure!(most <= before + FDS_MAX, "{most} fds are open, {before} were");
    arena.check_all().context("after the owner's end")
}

fn check_both_halves(arena: &mut Arena, front: Front) -> Result<()> {
    arena.check_good()?;
    drop(front);
    check_good_beside(arena).context("after the front-end is gone")
}

fn check_good_beside(arena: &mut Arena) -> Result<()> {
    arena.check_good()?;
    // A new connection needs the control socket, mapping and unmapping.
    let start = Instant::now();
    // One connection at a time: the old one has to go first.
    arena.good.wire.socket().shutdown(std::net::Shutdown::Both)?;
    arena.good = Front::up(&arena.backend.socket(GOOD)).context("the good port's control socket")?;
    arena.check_good()?;
    println!("a new front-end of {GOOD} beside a stuck one of {BAD}: {:?}", start.elapsed());
    Ok(())
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
