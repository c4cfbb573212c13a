//! Postcopy over pages of 1 GiB: allowed, with a warning that tells the stall to expect.
//!
//! Such a page can rarely be had, and none is needed: a file of them can be made and mapped while there are none, and the
//! fault on a missing one is reported before the kernel looks for it. So the page never comes here, and all ends
//! without it. That a page of 2 MiB comes is `qemu_postcopy.rs`'s.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use lab::rawfront::{
    Arena, BAD, Desc, Front, Late, PATIENCE, Setup, desc_flag, eventually, mem_reg, mem_table, msg, protocol,
    test_frame,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
/// Where the guest and the front-end have the huge page.
const GUEST: u64 = 4 * GIB;
const USER: u64 = 0x7e00_0000_0000;

/// How it ends, with the page still missing.
#[derive(Clone, Copy, Debug)]
enum Way {
    End,
    Status0,
    HangUp,
}

/// One page of 1 GiB that does not exist; none if this kernel has no such pages.
fn huge_file() -> Option<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_1GB;
    let file = File::from(memfd_create("huge", flags).ok()?);
    file.set_len(GIB).ok()?;
    Some(file)
}

/// The ring's next chain, which lies in the huge page.
fn queue_far(late: &mut Late, ring: usize, flags: u16) -> Result<()> {
    let ring = &mut late.front.rings[ring];
    let head = ring.avail_idx % ring.size;
    let addr = GUEST + 700 * MIB + u64::from(head) * 4096;
    ring.set_desc(head, Desc { addr, len: 100, flags, next: 0 })?;
    Ok(ring.push(head)?)
}

/// Tells both regions; where the back-end has mapped the huge one.
fn tell(late: &mut Late, huge: &File) -> Result<u64> {
    let wire = &late.front.wire;
    let (rings, far) = (late.front.memory.region(), [GUEST, GIB, USER, 0]);
    let (near_fd, far_fd) = (late.front.memory.fd(), huge.as_raw_fd());
    let last = if late.front.has(protocol::CONFIGURE_MEM_SLOTS) {
        wire.tell(msg::ADD_MEM_REG, &mem_reg(rings), &[near_fd])?;
        wire.reply_to(msg::ADD_MEM_REG)?;
        wire.tell(msg::ADD_MEM_REG, &mem_reg(far), &[far_fd])?;
        wire.reply_to(msg::ADD_MEM_REG)?.payload
    } else {
        wire.tell(msg::SET_MEM_TABLE, &mem_table(&[rings, far]), &[near_fd, far_fd])?;
        wire.reply_to(msg::SET_MEM_TABLE)?.payload.split_off(32)
    };
    // Eight bytes of head or of the region before, then guest address, size, user address.
    let address = last.get(24..32).with_context(|| format!("an answer that ends in {last:?}"))?;
    Ok(u64::from_ne_bytes(address.try_into()?))
}

fn stall_and_end(arena: &mut Arena, slots: bool, way: Way, huge: &File) -> Result<()> {
    let mut setup: Setup = Late::setup(64);
    if !slots {
        setup.protocol &= !protocol::CONFIGURE_MEM_SLOTS;
    }
    let mut late = Late::connect(&arena.bad(), setup)?;
    // One frame that can be sent, one in the page, one behind it; and a buffer in the page.
    late.front.tx().queue_frame(Front::HEADER_LEN, &test_frame())?;
    queue_far(&mut late, 1, 0)?;
    late.front.tx().queue_frame(Front::HEADER_LEN, &test_frame())?;
    queue_far(&mut late, 0, desc_flag::WRITE)?;
    late.advise()?;
    late.listen()?;
    let base = tell(&mut late, huge)?;
    ensure!(base != 0 && base.is_multiple_of(GIB), "mapped at {base:#x}");
    late.front.wire.ask(msg::GET_FEATURES, &[])?;
    let faults = late.faults.as_ref().context("userfaultfd")?.addresses()?;
    ensure!(faults.is_empty(), "touched before the acknowledgement: {faults:#x?}");
    late.acknowledge()?;
    late.front.start_rings()?;
    late.front.rings.iter().try_for_each(|ring| ring.kick())?;

    let mut asked = Vec::new();
    let parked = eventually(PATIENCE, || {
        let faults = late.faults.as_ref().and_then(|faults| faults.addresses().ok());
        asked.extend(faults.unwrap_or_default().into_iter().filter(|at| *at >= base && *at < base + GIB));
        !asked.is_empty() && arena.backend.waiting_for_pages().is_ok_and(|n| n > 0)
    });
    ensure!(parked, "the page is not asked for: {asked:#x?}");
    ensure!(asked.iter().all(|at| *at == base), "asked for {asked:#x?} instead of {base:#x}");
    // Once for both rings (of the other memory nothing is missing).
    let waiting = arena.backend.waiting_for_pages()?;
    ensure!(waiting <= 1, "{waiting} threads wait for one page");
    let stalled = eventually(PATIENCE, || {
        arena
            .backend
            .summary(BAD)
            .is_ok_and(|line| line.contains("stalled=") && line.contains("memory at 0x100000000"))
    });
    ensure!(stalled, "no stall is shown: {}", arena.backend.summary(BAD)?);
    let used = late.front.rings[1].used_idx()?;
    ensure!(used == 1, "{used} frames were sent instead of the one before the page");
    // The control socket and the other port go on, and so do both rings' stops.
    let start = Instant::now();
    late.front.wire.ask(msg::GET_FEATURES, &[])?;
    arena.check_good()?;
    let bases = [late.stop_ring(0)?, late.stop_ring(1)?];
    ensure!(bases == [0, 1], "the rings stopped at {bases:?}");
    for (index, base) in [(0, 0), (1, 1)] {
        late.front.start_ring(index, base)?;
    }
    late.front.set_status(0xf)?;
    late.front.rings.iter().try_for_each(|ring| ring.kick())?;
    late.front.wire.ask(msg::GET_FEATURES, &[])?;
    ensure!(start.elapsed() < Duration::from_secs(3), "answers took {:?}", start.elapsed());

    match way {
        Way::End => ensure!(late.end()? != 0, "END succeeded although the page is missing"),
        Way::Status0 => {
            late.front.wire.tell(msg::SET_STATUS, &0u64.to_ne_bytes(), &[])?;
            late.front.wire.ask(msg::GET_FEATURES, &[])?;
        }
        Way::HangUp => {}
    }
    late.hang_up();
    let mut next = arena.bad_up()?;
    next.prove_alive(64)?;
    let gone = eventually(PATIENCE, || arena.backend.waiting_for_pages().is_ok_and(|n| n == 0));
    ensure!(gone, "somebody waits for the page for ever");
    Ok(())
}

#[test]
fn pages_of_1_gib() -> Result<()> {
    let Some(huge) = huge_file() else {
        lab::skip("pages_of_1_gib", "this kernel has no pages of 1 GiB");
        return Ok(());
    };
    let mut arena = Arena::new()?;
    for (slots, way) in
        [(true, Way::End), (false, Way::End), (true, Way::Status0), (false, Way::HangUp), (true, Way::HangUp)]
    {
        let done = stall_and_end(&mut arena, slots, way, &huge);
        done.with_context(|| format!("slots {slots}, {way:?}\n{}", arena.backend.log_text()))?;
        // Where such pages can be had, none was made.
        ensure!(huge.metadata()?.blocks() == 0, "slots {slots}, {way:?}: the hole was filled");
    }
    let log = arena.backend.log_text();
    let warning = log.lines().find(|line| line.contains("WARN") && line.contains("pages of 1 GiB"));
    let warning = warning.with_context(|| format!("no warning\n{log}"))?;
    let told = ["0x100000000", "0.9 s at 10 Gbit/s", "8.6 s at 1 Gbit/s", BAD];
    ensure!(told.iter().all(|part| warning.contains(part)), "the warning: {warning}");
    arena.check_all()
}
