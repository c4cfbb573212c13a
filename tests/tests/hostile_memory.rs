//! What a front-end can do wrong with guest memory and the dirty log: regions that cannot be, and files that shrink
//! under us.
//!
//! See `hostile_session.rs` for what each test asserts.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use lab::rawfront::{
    Arena, Front, Memory, PATIENCE, Setup, eventually, mem_reg, mem_table, msg, protocol, state, test_frame,
    virtio, vring_addr,
};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const MIB: u64 = 1 << 20;

#[test]
fn memory_regions_that_cannot_be() -> Result<()> {
    let mut arena = Arena::new()?;
    const M: u64 = 1 << 20;
    let file = Memory::memfd(4 * M)?;
    let fd = file.fd();
    let tables: &[(&str, Vec<[u64; 4]>)] = &[
        ("no region", vec![]),
        ("empty region", vec![[0, 0, M, 0]]),
        ("guest ranges overlap", vec![[0, 2 * M, 16 * M, 0], [M, M, 32 * M, 2 * M]]),
        ("same guest address", vec![[0, M, 16 * M, 0], [0, M, 32 * M, M]]),
        ("user ranges overlap", vec![[0, 2 * M, 16 * M, 0], [8 * M, M, 17 * M, 2 * M]]),
        ("guest range wraps", vec![[u64::MAX - M + 2, M, 16 * M, 0]]),
        ("user range wraps", vec![[0, M, u64::MAX - M + 2, 0]]),
        ("offset and size wrap", vec![[0, M, 16 * M, u64::MAX - M + 2]]),
        ("longer than its file", vec![[0, 4 * M + 4096, 16 * M, 0]]),
        ("ends behind its file", vec![[0, 2 * M, 16 * M, 3 * M]]),
        ("begins behind its file", vec![[0, M, 16 * M, 4 * M]]),
        ("as large as the address space", vec![[0, u64::MAX, 16 * M, 0]]),
        ("half the address space", vec![[0, 1 << 63, 16 * M, 0]]),
        ("second one is bad", vec![[0, M, 16 * M, 0], [8 * M, M, 32 * M, 4 * M]]),
        ("nine regions", (0..9).map(|i| [i * M, 4096, (16 + i) * M, 0]).collect()),
    ];
    for (case, regions) in tables {
        let before = arena.complaints()?;
        let front = arena.bad_negotiated()?;
        let fds = vec![fd; regions.len().max(1)];
        front.refused(msg::SET_MEM_TABLE, &mem_table(regions), &fds).context(*case)?;
        drop(front);
        arena.check_reported(before).context(*case)?;
        // The same as a memory slot, where the table has one region only.
        if let [region] = regions[..] {
            let front = arena.bad_negotiated()?;
            ensure!(front.has(protocol::CONFIGURE_MEM_SLOTS));
            front.refused(msg::ADD_MEM_REG, &mem_reg(region), &[fd]).context(*case)?;
        }
        arena.check_good().context(*case)?;
    }
    // Slots without end, then one that overlaps.
    let front = arena.bad_negotiated()?;
    let slots = front.wire.ask(msg::GET_MAX_MEM_SLOTS, &[])?.u64()?;
    for slot in 0..slots {
        let region = [slot * 16 * M, M, (1 << 40) + slot * 16 * M, 0];
        front.order(msg::ADD_MEM_REG, &mem_reg(region), &[fd]).with_context(|| format!("slot {slot}"))?;
    }
    front.refused(msg::ADD_MEM_REG, &mem_reg([slots * 16 * M, M, 1 << 50, 0]), &[fd])?;
    drop(front);
    let front = arena.bad_negotiated()?;
    front.order(msg::ADD_MEM_REG, &mem_reg([0, M, 1 << 40, 0]), &[fd])?;
    front.refused(msg::ADD_MEM_REG, &mem_reg([M / 2, M, 1 << 41, 0]), &[fd])?;
    drop(front);
    let front = arena.bad_negotiated()?;
    front.refused(msg::REM_MEM_REG, &mem_reg([0, M, 1 << 40, 0]), &[])?;
    drop(front);
    arena.check_all()
}

/// Memory is taken away, or replaced by less, while rings in it run.
#[test]
fn memory_that_goes_away_under_running_rings() -> Result<()> {
    let mut arena = Arena::new()?;
    for replace in [false, true] {
        let mut front = arena.bad_up()?;
        front.prove_alive(64)?;
        let region = front.memory.region();
        // Whether this is allowed is the back-end's choice; what matters is what happens next.
        let taken = if replace {
            let other = Memory::memfd(1 << 20)?;
            let far = [1 << 40, 1 << 20, 1 << 45, 0];
            front.wire.order(msg::SET_MEM_TABLE, &mem_table(&[far]), &[other.fd()])
        } else {
            front.wire.order(msg::REM_MEM_REG, &mem_reg(region), &[])
        };
        for _ in 0..32 {
            front.tx().queue_frame(12, &test_frame())?;
            front.tx().kick()?;
        }
        arena.check_good().with_context(|| format!("replace {replace}: {taken:?}"))?;
        drop(front);
        arena.check_good()?;
    }
    arena.check_all()
}

/// The same region under rings that run: QEMU does this at every memory hotplug.
#[test]
fn the_memory_table_is_sent_again_under_running_rings() -> Result<()> {
    let mut arena = Arena::new()?;
    let setup =
        Setup { protocol: Setup::default().protocol & !protocol::CONFIGURE_MEM_SLOTS, ..Setup::default() };
    let mut front = Front::up_with(&arena.bad(), setup)?;
    let more = Memory::memfd(8 << 20)?;
    for round in 0..50u64 {
        let mut regions = vec![front.memory.region()];
        let mut fds = vec![front.memory.fd()];
        if round % 2 == 0 {
            regions.push([1 << 32, 8 << 20, 1 << 46, 0]);
            fds.push(more.fd());
        }
        front.order(msg::SET_MEM_TABLE, &mem_table(&regions), &fds)?;
        front.prove_alive(32).with_context(|| format!("round {round}"))?;
    }
    drop(front);
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
        let before = arena.complaints()?;
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
        let before = arena.complaints()?;
        for _ in 0..16 {
            front.tx().queue_frame(12, &test_frame())?;
        }
        // From here on nothing may be written: that would make the file grow again.
        front.memory.file().set_len(length)?;
        front.tx().kick()?;
        let noticed = || {
            let (ring, wire) = (&front.rings[1], &front.wire);
            arena.complaints().is_ok_and(|now| now > before)
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
