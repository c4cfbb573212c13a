//! Postcopy messages in orders that make no sense, and memory that changes while pages are awaited.
//!
//! See `hostile_session.rs` for what each test asserts; and here, no page that has not arrived becomes one of zeros.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use lab::rawfront::{
    Arena, BAD, Front, Late, Memory, PAGE, PATIENCE, Setup, Wire, eventually, flag, mem_reg, mem_table, msg,
    protocol, test_frame,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Duration;

const MIB: u64 = 1 << 20;

fn table_setup() -> Setup {
    let setup = Late::setup(256);
    Setup { protocol: setup.protocol & !protocol::CONFIGURE_MEM_SLOTS, ..setup }
}

/// A front-end with 200 frames to send and as many buffers, all but its ring pages away.
fn laden(arena: &Arena, setup: Setup) -> Result<Late> {
    let mut late = Late::connect(&arena.bad(), setup)?;
    for _ in 0..200 {
        late.front.tx().queue_frame(Front::HEADER_LEN, &test_frame())?;
        late.front.rx().queue_buffer()?;
    }
    let rings = late.ring_pages();
    late.depart(|page| rings.contains(&page))?;
    Ok(late)
}

fn kick(late: &Late) -> Result<()> {
    Ok(late.front.rings.iter().try_for_each(|ring| ring.kick())?)
}

fn wait_for_asked(late: &mut Late, least: usize) -> Result<()> {
    let asked = eventually(PATIENCE, || late.collect().is_ok_and(|asked| asked >= least));
    ensure!(asked, "{:?} pages were asked for", late.collect());
    Ok(())
}

/// Nothing is asked for in a while.
fn expect_silence(late: &mut Late) -> Result<()> {
    late.front.wire.ask(msg::GET_FEATURES, &[])?;
    let before = late.collect()?;
    std::thread::sleep(Duration::from_millis(50));
    let after = late.collect()?;
    ensure!(after == before, "{} pages were asked for", after - before);
    Ok(())
}

fn drained(late: &mut Late) -> Result<()> {
    let drained = eventually(PATIENCE, || {
        late.deliver_asked().is_ok() && late.front.rings[1].used_idx().is_ok_and(|used| used == 200)
    });
    ensure!(drained, "TX stands still at {}", late.front.rings[1].used_idx()?);
    Ok(())
}

/// Messages that must not be obeyed: refused, or the end of the connection.
#[test]
fn messages_in_the_wrong_phase() -> Result<()> {
    let mut arena = Arena::new()?;
    type Steps = fn(&mut Late) -> Result<()>;
    let cases: &[(&str, bool, Steps)] = &[
        ("LISTEN without ADVISE", true, |late| {
            let code = late.front.wire.ask(msg::POSTCOPY_LISTEN, &[])?.u64()?;
            ensure!(code != 0, "obeyed");
            Ok(())
        }),
        ("END without anything", true, |late| {
            ensure!(late.end()? == 0);
            Ok(())
        }),
        ("END twice", true, |late| {
            late.advise()?;
            ensure!(late.end()? == 0 && late.end()? == 0);
            Ok(())
        }),
        ("END without LISTEN, then all again", true, |late| {
            late.advise()?;
            ensure!(late.end()? == 0);
            late.arm()?;
            kick(late)?;
            wait_for_asked(late, 128)
        }),
        ("ADVISE twice", true, |late| {
            late.advise()?;
            late.advise()
        }),
        ("ADVISE while listening", false, |late| {
            late.advise()?;
            late.listen()?;
            late.front.wire.tell(msg::POSTCOPY_ADVISE, &[], &[])?;
            ensure!(late.front.wire.is_closed_within(PATIENCE), "still open");
            Ok(())
        }),
        ("LISTEN while armed", true, |late| {
            late.arm()?;
            let code = late.front.wire.ask(msg::POSTCOPY_LISTEN, &[])?.u64()?;
            ensure!(code != 0, "obeyed");
            Ok(())
        }),
        ("never acknowledged", true, |late| {
            late.advise()?;
            late.listen()?;
            late.tell_memory()?;
            late.front.start_rings()?;
            kick(late)?;
            expect_silence(late)?;
            ensure!(late.asked().is_empty());
            Ok(())
        }),
        ("acknowledged before the table", true, |late| {
            late.advise()?;
            late.listen()?;
            late.acknowledge()?;
            late.tell_memory()?;
            late.front.start_rings()?;
            kick(late)?;
            expect_silence(late)?;
            ensure!(late.asked().is_empty());
            late.acknowledge()?;
            wait_for_asked(late, 128)
        }),
        ("acknowledged twice", true, |late| {
            late.arm()?;
            late.acknowledge()?;
            kick(late)?;
            wait_for_asked(late, 128)
        }),
        ("acknowledged with a number", false, |late| {
            late.advise()?;
            late.listen()?;
            late.tell_memory()?;
            late.front.wire.tell(msg::ADD_MEM_REG, &7u64.to_ne_bytes(), &[])?;
            ensure!(late.front.wire.is_closed_within(PATIENCE), "still open");
            Ok(())
        }),
        ("acknowledged without postcopy", true, |late| {
            let bytes = Wire::encode(msg::ADD_MEM_REG, flag::VERSION | flag::NEED_REPLY, &0u64.to_ne_bytes());
            late.front.wire.send_raw(&bytes, &[])?;
            let code = late.front.wire.reply_to(msg::ADD_MEM_REG)?.u64()?;
            ensure!(code != 0, "obeyed");
            Ok(())
        }),
        ("all of it a hundred times", true, |late| {
            for _ in 0..100 {
                late.advise()?;
                ensure!(late.front.wire.ask(msg::POSTCOPY_LISTEN, &[])?.u64()? == 0);
                ensure!(late.end()? == 0);
            }
            Ok(())
        }),
    ];
    for (case, open, steps) in cases {
        let mut late = laden(&arena, Late::setup(256))?;
        let done = steps(&mut late).and_then(|()| match open {
            true => late.front.wire.ask(msg::GET_FEATURES, &[]).map(drop).map_err(Into::into),
            false => Ok(()),
        });
        done.with_context(|| format!("{case}\n{}", arena.backend.log_text()))?;
        let away = late.hang_up();
        arena.check_good().context(*case)?;
        let mut next = arena.bad_up()?;
        next.prove_alive(64).context(*case)?;
        away.check_holes().context(*case)?;
    }
    arena.check_all()
}

/// As QEMU does when precopy was enough; then what it never does: LISTEN all the same, and a migration on the same connection.
#[test]
fn rings_that_start_after_advice_without_listen() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut late = Late::connect(&arena.bad(), Late::setup(256))?;
    late.advise()?;
    late.front.acknowledge_features()?;
    late.front.share_memory()?;
    late.front.start_rings()?;
    late.front.prove_alive(64)?;
    let said = |what| eventually(PATIENCE, || arena.backend.log_text().contains(what));
    ensure!(said("postcopy: not needed"), "{}", arena.backend.log_text());
    let code = late.front.wire.ask(msg::POSTCOPY_LISTEN, &[])?.u64()?;
    ensure!(code != 0, "LISTEN was obeyed although rings run");
    ensure!(late.end()? == 0);
    late.front.prove_alive(64)?;
    for ring in 0..2 {
        late.stop_ring(ring)?;
    }
    late.front.order(msg::REM_MEM_REG, &mem_reg(late.front.memory.region()), &[])?;
    late.front.lay_out_rings()?;
    late.arm()?;
    late.front.prove_alive(64)?;
    ensure!(late.end()? == 0);
    ensure!(said("postcopy: ended"), "{}", arena.backend.log_text());
    late.front.prove_alive(64)?;
    late.hang_up();
    arena.check_all()
}

/// The table comes again in each phase, as when a guest restarts its device: nothing is touched before the new
/// acknowledgement, and populates of the old mapping end without making pages.
#[test]
fn the_table_comes_again() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut late = laden(&arena, table_setup())?;
    late.advise()?;
    late.listen()?;
    for _ in 0..3 {
        late.tell_memory()?;
    }
    late.acknowledge()?;
    late.front.start_rings()?;
    kick(&late)?;
    wait_for_asked(&mut late, 128)?;
    for round in 0..5 {
        let before = late.base;
        // Faults of the old mapping that nobody has read yet go with it.
        late.collect()?;
        late.tell_memory()?;
        ensure!(late.base != before, "the same mapping");
        late.forget_asked();
        kick(&late)?;
        expect_silence(&mut late)?;
        ensure!(late.asked().is_empty(), "round {round}: touched before the acknowledgement");
        late.away().check_holes()?;
        late.acknowledge()?;
        wait_for_asked(&mut late, 128).with_context(|| arena.backend.log_text())?;
        arena.check_good()?;
    }
    drained(&mut late)?;
    late.deliver_all()?;
    ensure!(late.end()? == 0);
    late.front.prove_alive(64)?;
    late.hang_up();
    arena.check_all()
}

/// Memory hotplug while pages are awaited: other regions come, and the one with populates under way goes.
#[test]
fn slots_come_and_go_while_armed() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut late = laden(&arena, Late::setup(256))?;
    late.arm()?;
    kick(&late)?;
    wait_for_asked(&mut late, 128)?;
    let more = Memory::memfd(8 * MIB)?;
    let slot = |n: u64| [(n + 1) << 32, MIB, (n + 1) << 36, (n % 8) * MIB];
    for n in 0..128 {
        late.front.wire.tell(msg::ADD_MEM_REG, &mem_reg(slot(n)), &[more.fd()])?;
        let here = || format!("slot {n}\n{}", arena.backend.log_text());
        let reply = late.front.wire.reply_to(msg::ADD_MEM_REG).with_context(here)?;
        ensure!(reply.payload.len() == 40, "slot {n}: an answer of {} bytes", reply.payload.len());
    }
    // One acknowledgement for all; until then nothing new is asked for.
    late.acknowledge()?;
    for n in 0..128 {
        late.front.order(msg::REM_MEM_REG, &mem_reg(slot(n)), &[])?;
    }
    late.front.wire.tell(msg::REM_MEM_REG, &0u64.to_ne_bytes(), &[])?;
    late.front.wire.tell(0, &0u64.to_ne_bytes(), &[])?;
    late.away().check_holes()?;
    drained(&mut late).with_context(|| arena.backend.log_text())?;
    late.hang_up();
    // And the region of the rings itself.
    let mut late = laden(&arena, Late::setup(256))?;
    late.arm()?;
    kick(&late)?;
    wait_for_asked(&mut late, 128)?;
    late.front.order(msg::REM_MEM_REG, &mem_reg(late.front.memory.region()), &[])?;
    let gone = eventually(PATIENCE, || arena.backend.waiting_for_pages().is_ok_and(|n| n == 0));
    ensure!(gone, "populates of a region that was removed wait for ever");
    late.away().check_holes()?;
    ensure!(late.end()? == 0);
    late.hang_up();
    arena.check_all()
}

/// Memory that was there before LISTEN is as absent as what comes later.
#[test]
fn memory_that_is_mapped_already_at_listen() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut late = laden(&arena, table_setup())?;
    late.front.acknowledge_features()?;
    late.front.share_memory()?;
    late.advise()?;
    ensure!(late.front.wire.ask(msg::POSTCOPY_LISTEN, &[])?.u64()? == 0);
    late.front.start_rings()?;
    kick(&late)?;
    expect_silence(&mut late)?;
    late.acknowledge()?;
    // Our addresses were never told, so faults cannot be told apart; but they come, and the pages stay away.
    let asked = eventually(PATIENCE, || arena.backend.waiting_for_pages().is_ok_and(|n| n >= 128));
    ensure!(asked, "nothing is asked for\n{}", arena.backend.log_text());
    late.away().check_holes()?;
    // Pages that come by themselves are found.
    late.deliver_all()?;
    ensure!(late.end()? == 0);
    ensure!(late.front.rings[1].is_drained_within(PATIENCE), "TX stands still");
    late.front.prove_alive(64)?;
    late.hang_up();
    arena.check_all()
}

/// The file shrinks in mid-postcopy: what waits stays waiting, what is asked for then fails, and the port is reset
/// instead of asking again and again.
#[test]
fn a_memory_file_that_shrinks_while_pages_are_awaited() -> Result<()> {
    let mut arena = Arena::new()?;
    for waiting in [true, false] {
        let mut late = laden(&arena, Late::setup(256))?;
        let before = arena.complaints()?;
        if waiting {
            late.arm()?;
            kick(&late)?;
            wait_for_asked(&mut late, 128)?;
        } else {
            late.advise()?;
            late.listen()?;
            late.tell_memory()?;
        }
        // The rings stay; the second ring's buffers go.
        let end = late.front.rings[1].buffers;
        late.front.memory.file().set_len(end)?;
        if waiting {
            // Whoever waits looks again.
            let base = late.base;
            late.faults.as_ref().context("userfaultfd")?.wake(base, late.front.memory.size)?;
        } else {
            late.acknowledge()?;
            // It may be closed before the last message.
            let _ = late.front.start_rings().and_then(|()| kick(&late));
        }
        let closed = late.front.wire.is_closed_within(PATIENCE);
        ensure!(closed, "the port goes on without memory\n{}", arena.backend.log_text());
        // Threads that have waited go to rest first.
        std::thread::sleep(Duration::from_millis(300));
        let switches = arena.backend.wakeups()?;
        std::thread::sleep(Duration::from_millis(100));
        let switches = arena.backend.wakeups()? - switches;
        ensure!(switches < 200, "it spins: {switches} wake-ups");
        late.hang_up();
        arena.check_reported(before)?;
        arena.check_good()?;
    }
    arena.check_all()
}

/// Memory that cannot be awaited is refused at once, and the reason is said.
#[test]
fn memory_of_the_wrong_kind() -> Result<()> {
    let mut arena = Arena::new()?;
    let folder = std::env::current_exe()?.parent().context("folder")?.to_owned();
    let disk = tempfile::tempfile_in(folder)?;
    disk.set_len(4 * MIB)?;
    if nix::sys::statfs::fstatfs(&disk)?.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC {
        lab::skip("memory_of_the_wrong_kind", "the target folder is on tmpfs");
        return Ok(());
    }
    let short = File::from(memfd_create("short", MFdFlags::MFD_CLOEXEC)?);
    short.set_len(MIB)?;
    let cases = [("a file on a disk", disk, "memfd"), ("a short file", short, "")];
    for (case, file, why) in cases {
        for slots in [true, false] {
            let mut setup = Late::setup(64);
            if !slots {
                setup.protocol &= !protocol::CONFIGURE_MEM_SLOTS;
            }
            let mut late = Late::connect(&arena.bad(), setup)?;
            late.advise()?;
            late.listen()?;
            let region = [0, 4 * MIB, 1 << 40, 0];
            let (request, payload) = match slots {
                true => (msg::ADD_MEM_REG, mem_reg(region)),
                false => (msg::SET_MEM_TABLE, mem_table(&[region])),
            };
            late.front.wire.tell(request, &payload, &[file.as_raw_fd()])?;
            let reply = late.front.wire.reply_to(request)?;
            ensure!(reply.payload.is_empty(), "{case}: accepted");
            // The log's reader may lag behind.
            let said = eventually(PATIENCE, || {
                let log = arena.backend.log_text();
                log.contains(BAD) && log.contains("memory region at 0x0") && log.contains(why)
            });
            ensure!(said, "{case}: no reason is given\n{}", arena.backend.log_text());
            // It may try again with something better.
            late.tell_memory()?;
            late.hang_up();
        }
    }
    arena.check_all()
}

/// Descriptors that ask for everything: whatever a guest names, looks stay short and the other port does not notice.
#[test]
fn a_guest_that_names_everything() -> Result<()> {
    use lab::rawfront::{Desc, desc_flag};
    let mut arena = Arena::new()?;
    const SIZE: u16 = 1024;
    for case in ["long segments", "long chains", "indirect tables", "loops"] {
        let memory = Memory::memfd(256 * MIB)?;
        let mut late = Late::connect_with_memory(&arena.bad(), Late::setup(SIZE), memory)?;
        let far = 64 * MIB;
        for ring in 0..2 {
            let ring = &mut late.front.rings[ring];
            let write = if ring.desc == 0 { desc_flag::WRITE } else { 0 };
            for i in 0..SIZE {
                let page = far + u64::from(i) * 32 * PAGE;
                let desc = match case {
                    "long segments" => Desc { addr: page, len: u32::MAX - 4095, flags: write, next: 0 },
                    "long chains" => {
                        let next = if i + 1 < SIZE { desc_flag::NEXT } else { 0 };
                        Desc { addr: page, len: 17 * 4096, flags: write | next, next: i + 1 }
                    }
                    "loops" => {
                        Desc { addr: page, len: 1, flags: write | desc_flag::NEXT, next: (i + 1) % SIZE }
                    }
                    _ => Desc { addr: page, len: 65535 * 16, flags: desc_flag::INDIRECT, next: 0 },
                };
                ring.set_desc(i, desc)?;
            }
            for i in 0..SIZE {
                ring.push(if case == "long chains" { 0 } else { i })?;
            }
        }
        let rings = late.ring_pages();
        late.depart(|page| page * PAGE < far || rings.contains(&page))?;
        late.arm()?;
        for _ in 0..200 {
            kick(&late)?;
            late.front.wire.ask(msg::GET_FEATURES, &[])?;
        }
        let worst = arena.check_good().context(case)?;
        ensure!(worst < Duration::from_secs(1), "{case}: the other port waited for {worst:?}");
        late.deliver_asked()?;
        kick(&late)?;
        arena.check_good().context(case)?;
        late.away().check_holes().context(case)?;
        late.hang_up();
        let mut next = arena.bad_up()?;
        next.prove_alive(64)?;
    }
    arena.check_all()
}
