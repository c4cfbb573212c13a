//! Files whose owner does not answer, from a FUSE file system that the front-end serves itself.
//!
//! See `hostile_session.rs` for what each test asserts.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use lab::rawfront::{Arena, BAD, Front, GOOD, SilentFuse, Wire, flag, mem_reg, mem_table, msg};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

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
        let before = arena.complaints()?;
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
