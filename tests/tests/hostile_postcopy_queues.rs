//! Postcopy with several queue pairs and answers that are sent again (`postcopy-multiqueue = 'resend'`): what a hostile
//! front-end can make of it.
//!
//! With real QEMU it is in `qemu_postcopy_queues.rs`. See `hostile_session.rs` for what is asserted beside that.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use lab::rawfront::{
    Arena, BAD, Backend, Front, GOOD, Late, Memory, PATIENCE, Setup, eventually, mem_reg, msg, test_frame,
};
use std::os::fd::AsRawFd;
use std::time::Instant;

const MIB: u64 = 1 << 20;

/// A ring of the second pair is started again and again while hundreds of pages are waited for. Each start has all who wait
/// report again, which takes a thread of the process as long as there are waiters; nobody else waits for that thread.
#[test]
fn a_further_pair_that_starts_again_and_again() -> Result<()> {
    const STARTS: usize = 20_000;
    let port = |name| {
        format!(
            "[[port]]\nname = '{name}'\nsocket = '@/{name}.sock'\nuplink = 'null'\nqueue-pairs = 2\n\
             postcopy-multiqueue = 'resend'\n"
        )
    };
    let mut arena = Arena::over(Backend::with_config(&format!("{}{}", port(GOOD), port(BAD)))?)?;
    let setup = Setup { queue_pairs: 2, ..Late::setup(256) };
    let mut late = Late::connect(&arena.bad(), setup)?;
    for _ in 0..200 {
        late.front.tx().queue_frame(Front::HEADER_LEN, &test_frame())?;
        late.front.rx().queue_buffer()?;
    }
    let rings = late.ring_pages();
    late.depart(|page| rings.contains(&page))?;
    late.arm()?;
    late.front.rings.iter().try_for_each(|ring| ring.kick())?;
    let waiting = eventually(PATIENCE, || {
        late.collect().is_ok() && arena.backend.waiting_for_pages().is_ok_and(|n| n >= 128)
    });
    ensure!(waiting, "{} threads wait for pages", arena.backend.waiting_for_pages()?);
    let kick = late.front.rings[3].kick.as_raw_fd();
    for n in 0..STARTS {
        late.front.wire.tell(msg::SET_VRING_KICK, &3u64.to_ne_bytes(), &[kick])?;
        if n % 100 == 0 {
            late.front.wire.ask(msg::GET_FEATURES, &[])?;
            late.collect()?;
        }
    }
    late.front.wire.ask(msg::GET_FEATURES, &[])?;
    // Memory is mapped by that thread, too.
    let more = Memory::memfd(MIB)?;
    let slot = mem_reg([1 << 40, MIB, 1 << 41, 0]);
    let start = Instant::now();
    arena.good.order(msg::ADD_MEM_REG, &slot, &[more.fd()]).context("the other port's memory")?;
    println!("the other port's memory was mapped after {:?}", start.elapsed());
    arena.good.order(msg::REM_MEM_REG, &slot, &[])?;
    arena.check_good()?;
    late.away().check_holes()?;
    let done = eventually(PATIENCE, || {
        late.deliver_asked().is_ok() && late.front.rings[1].used_idx().is_ok_and(|used| used == 200)
    });
    ensure!(done, "TX stands still at {}: {}", late.front.rings[1].used_idx()?, arena.backend.summary(BAD)?);
    late.hang_up();
    arena.check_all()
}
