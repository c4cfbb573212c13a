//! Postcopy that ends in the middle, in every phase and every way: nothing hangs, nothing leaks, and no page that has not
//! arrived becomes a page of zeros.
//!
//! See `hostile_session.rs` for what each test asserts beside that.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use lab::rawfront::{
    Arena, Away, BAD, Backend, Front, GOOD, Late, PAGE, PATIENCE, WireError, eventually, msg, protocol,
    state, test_frame,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Populates that are under way at least when the end comes.
const IN_FLIGHT: usize = 128;
/// Chains in each ring.
const CHAINS: usize = 200;

/// Where the end comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Advised,
    Listening,
    /// Our addresses are told, rings are started and kicked, but the acknowledgement has not come.
    AwaitingAck,
    /// Ring pages are missing, too: nothing else can be asked for.
    RingsMissing,
    /// Rings are there, buffers are not.
    BuffersMissing,
    /// END has been sent, and its answer is waited for.
    Draining,
}

const PHASES: [Phase; 6] = [
    Phase::Advised,
    Phase::Listening,
    Phase::AwaitingAck,
    Phase::RingsMissing,
    Phase::BuffersMissing,
    Phase::Draining,
];

/// How it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The connection, and with it the front-end's copy of the userfaultfd.
    HangUp,
    /// The userfaultfd first, as a front-end does that dies.
    CloseUserfaultfd,
    /// As QEMU stops a device.
    StopRings,
    Status0,
    ResetDevice,
    /// As QEMU gives up a migration.
    End,
}

const WAYS: [Way; 6] =
    [Way::HangUp, Way::CloseUserfaultfd, Way::StopRings, Way::Status0, Way::ResetDevice, Way::End];

fn connected(arena: &Arena) -> Result<Late> {
    let mut late = Late::connect(&arena.bad(), Late::setup(256))?;
    for _ in 0..CHAINS {
        late.front.tx().queue_frame(Front::HEADER_LEN, &test_frame())?;
        late.front.rx().queue_buffer()?;
    }
    Ok(late)
}

fn kick(late: &Late) -> Result<()> {
    Ok(late.front.rings.iter().try_for_each(|ring| ring.kick())?)
}

/// Brings a front-end into a phase.
fn bring(arena: &Arena, phase: Phase) -> Result<Late> {
    let mut late = connected(arena)?;
    let rings = late.ring_pages();
    let all = matches!(phase, Phase::RingsMissing | Phase::AwaitingAck);
    late.depart(|page| !all && rings.contains(&page))?;
    late.advise()?;
    if phase == Phase::Advised {
        return Ok(late);
    }
    late.listen()?;
    if phase == Phase::Listening {
        return Ok(late);
    }
    late.tell_memory()?;
    if phase == Phase::AwaitingAck {
        late.front.start_rings()?;
        kick(&late)?;
        late.front.wire.ask(msg::GET_FEATURES, &[])?;
        std::thread::sleep(Duration::from_millis(30));
        ensure!(late.collect()? == 0, "touched before the acknowledgement: {:?}", late.asked());
        return Ok(late);
    }
    late.acknowledge()?;
    late.front.start_rings()?;
    kick(&late)?;
    let least = if phase == Phase::RingsMissing { rings.len() } else { IN_FLIGHT };
    let asked = eventually(PATIENCE, || late.collect().is_ok_and(|asked| asked >= least));
    ensure!(asked, "{:?} pages were asked for\n{}", late.collect(), arena.backend.summary(BAD)?);
    let waiting = eventually(PATIENCE, || arena.backend.waiting_for_pages().is_ok_and(|n| n >= least));
    let threads = arena.backend.waiting_for_pages()?;
    ensure!(waiting, "{threads} threads wait for pages");
    // One thread for each page. The kernel may report a fault again (io-wq wakes a thread that it takes for a free one): that
    // a page is reported twice is no sign that it was asked for twice.
    ensure!(threads <= late.collect()?, "{threads} threads wait for {} pages", late.asked().len());
    if phase == Phase::Draining {
        late.front.wire.tell(msg::POSTCOPY_END, &[], &[])?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(late)
}

fn end(mut late: Late, phase: Phase, way: Way) -> Result<Away> {
    let wire = &late.front.wire;
    let draining = phase == Phase::Draining;
    match way {
        Way::HangUp => {}
        Way::CloseUserfaultfd => late.faults = None,
        Way::StopRings | Way::Status0 | Way::ResetDevice if draining => {
            // It is taken up when END is through.
            let code = wire.reply_to(msg::POSTCOPY_END)?.u64()?;
            ensure!(code != 0, "END succeeded although pages are missing");
        }
        _ => {}
    }
    let wire = &late.front.wire;
    let start = Instant::now();
    match way {
        Way::HangUp | Way::CloseUserfaultfd => return Ok(late.hang_up()),
        Way::StopRings => {
            for ring in 0..2 {
                late.stop_ring(ring)?;
            }
        }
        Way::Status0 => wire.tell(msg::SET_STATUS, &0u64.to_ne_bytes(), &[])?,
        Way::ResetDevice => wire.tell(msg::RESET_DEVICE, &[], &[])?,
        Way::End => {
            if !draining {
                wire.tell(msg::POSTCOPY_END, &[], &[])?;
            }
            let code = wire.reply_to(msg::POSTCOPY_END)?.u64()?;
            let stuck = !matches!(phase, Phase::Advised | Phase::Listening);
            ensure!(code == u64::from(stuck), "END was answered with {code}");
        }
    }
    // It answers, whatever it did.
    wire.ask(msg::GET_FEATURES, &[])?;
    if way != Way::End {
        ensure!(start.elapsed() < Duration::from_secs(1), "{way:?} took {:?}", start.elapsed());
    }
    late.away().check_holes()?;
    // The device is started again, as a guest does, before the end.
    if matches!(way, Way::StopRings | Way::Status0 | Way::ResetDevice) && phase != Phase::Advised {
        late.front.start_rings()?;
        kick(&late)?;
        late.front.wire.ask(msg::GET_FEATURES, &[])?;
    }
    Ok(late.hang_up())
}

fn in_phase(phase: Phase) -> Result<()> {
    in_phase_of(Arena::new()?, phase)
}

fn in_phase_of(mut arena: Arena, phase: Phase) -> Result<()> {
    for way in WAYS {
        let here = || format!("{phase:?}, {way:?}\n{}", arena.backend.log_text());
        let late = bring(&arena, phase).with_context(here)?;
        let away = end(late, phase, way).with_context(here)?;
        // The next front-end is served when all is gone.
        let mut next = arena.bad_up().with_context(here)?;
        next.prove_alive(64).with_context(here)?;
        let idle = eventually(PATIENCE, || arena.backend.waiting_for_pages().is_ok_and(|n| n == 0));
        ensure!(idle, "{} threads wait for pages for ever", arena.backend.waiting_for_pages()?);
        away.check_holes().with_context(here)?;
        arena.check_good().with_context(|| format!("{phase:?}, {way:?}"))?;
    }
    arena.check_all()
}

#[test]
fn it_ends_when_advised() -> Result<()> {
    in_phase(Phase::Advised)
}

#[test]
fn it_ends_when_listening() -> Result<()> {
    in_phase(Phase::Listening)
}

#[test]
fn it_ends_before_the_acknowledgement() -> Result<()> {
    in_phase(Phase::AwaitingAck)
}

#[test]
fn it_ends_with_ring_pages_missing() -> Result<()> {
    in_phase(Phase::RingsMissing)
}

#[test]
fn it_ends_with_buffers_missing() -> Result<()> {
    in_phase(Phase::BuffersMissing)
}

#[test]
fn it_ends_while_draining() -> Result<()> {
    in_phase(Phase::Draining)
}

/// The rings of the port are on another thread than its control and its populates.
#[test]
fn it_ends_on_another_worker() -> Result<()> {
    let port = |name| format!("[[port]]\nname = '{name}'\nsocket = '@/{name}.sock'\nuplink = 'null'\n");
    for phase in [Phase::RingsMissing, Phase::BuffersMissing] {
        let config = format!("workers = 2\n{}{}", port(GOOD), port(BAD));
        in_phase_of(Arena::over(Backend::with_config(&config)?)?, phase)?;
    }
    Ok(())
}

/// A third port's frames flow all the while, on the same thread.
#[test]
fn another_port_moves_all_the_while() -> Result<()> {
    const THIRD: &str = "thirdport";
    let arena = Arena::over(Backend::with_null_ports(&[BAD, GOOD, THIRD], 1)?)?;
    let mut third = Front::up(&arena.backend.socket(THIRD))?;
    let over = AtomicBool::new(false);
    let (batches, worst) = std::thread::scope(|scope| -> Result<_> {
        let moving = scope.spawn(|| -> Result<_> {
            let (mut batches, mut worst) = (0u32, Duration::ZERO);
            while !over.load(Ordering::Relaxed) {
                worst = worst.max(third.prove_alive(32)?);
                batches += 1;
            }
            Ok((batches, worst))
        });
        let result = PHASES.into_iter().try_for_each(|phase| {
            for _ in 0..3 {
                let late = bring(&arena, phase)?;
                end(late, phase, Way::HangUp)?.check_holes()?;
            }
            Ok(())
        });
        over.store(true, Ordering::Relaxed);
        let moved = moving.join().map_err(|_| anyhow::anyhow!("the third port's front-end panicked"))?;
        result.and(moved)
    })?;
    println!("{batches} batches, the longest took {worst:?}");
    ensure!(batches > 100, "only {batches} batches");
    // Nobody else's page is waited for; the rest is the machine's business.
    ensure!(worst < Duration::from_secs(1), "the longest batch took {worst:?}");
    Ok(())
}

/// More pages are wanted than may be under way; all come by themselves, and nobody is woken. END wakes those under way, and
/// finds that the others need not be asked for.
#[test]
fn end_finds_what_came_while_it_waited_for_its_turn() -> Result<()> {
    let mut arena = Arena::new()?;
    for _ in 0..5 {
        let mut late = Late::connect(&arena.bad(), Late::setup(512))?;
        for _ in 0..500 {
            late.front.tx().queue_frame(Front::HEADER_LEN, &test_frame())?;
            late.front.rx().queue_buffer()?;
        }
        let rings = late.ring_pages();
        late.depart(|page| rings.contains(&page))?;
        late.arm()?;
        kick(&late)?;
        let asked = eventually(PATIENCE, || late.collect().is_ok_and(|asked| asked >= 300));
        ensure!(asked, "{:?} pages were asked for", late.collect());
        let base = std::mem::take(&mut late.base);
        late.deliver_all()?; // without an address to wake
        late.base = base;
        let drained = late.front.rings[1].is_drained_within(PATIENCE);
        ensure!(drained, "pages that came were not found\n{}", arena.backend.log_text());
        let start = Instant::now();
        ensure!(late.end()? == 0, "END failed\n{}", arena.backend.log_text());
        ensure!(start.elapsed() < Duration::from_millis(1500), "END took {:?}", start.elapsed());
        late.front.prove_alive(64)?;
        late.hang_up();
    }
    arena.check_all()
}

/// SIGTERM ends the process within a second (and some patience for a busy machine), whatever is under way, whether the
/// front-end has kept its copy of the userfaultfd or not.
#[test]
fn the_process_ends_in_every_phase() -> Result<()> {
    for phase in PHASES {
        for keep in [true, false] {
            let mut arena = Arena::new()?;
            let mut late = bring(&arena, phase)?;
            if !keep {
                late.faults = None;
            }
            let start = Instant::now();
            let status = arena.backend.terminate().with_context(|| format!("{phase:?}"))?;
            ensure!(status.success(), "{phase:?}: {status}\n{}", arena.backend.log_text());
            let took = start.elapsed();
            ensure!(took < Duration::from_secs(3), "{phase:?}: the end took {took:?}");
            late.away().check_holes().with_context(|| format!("{phase:?}, copy kept: {keep}"))?;
        }
    }
    Ok(())
}

/// The connection ends and SIGTERM comes at once: memory is on its way out, and nobody but the process itself knows the holes.
/// It sleeps until both are there, so that it learns of them in one turn of its loop; its rings are on the same thread or
/// on another.
#[test]
fn the_process_ends_in_the_middle_of_a_teardown() -> Result<()> {
    let port = |name| format!("[[port]]\nname = '{name}'\nsocket = '@/{name}.sock'\nuplink = 'null'\n");
    for phase in [Phase::RingsMissing, Phase::BuffersMissing, Phase::Draining] {
        // Twice, since what is under way where when it sleeps is chance.
        for workers in [1, 2, 1, 2] {
            let config = format!("workers = {workers}\n{}{}", port(GOOD), port(BAD));
            let mut arena = Arena::over(Backend::with_config(&config)?)?;
            let late = bring(&arena, phase)?;
            let process = Pid::from_raw(arena.backend.pid() as i32);
            kill(process, Signal::SIGSTOP)?;
            let away = late.hang_up();
            kill(process, Signal::SIGTERM)?;
            kill(process, Signal::SIGCONT)?;
            let status = arena.backend.terminate()?;
            let here = || format!("{phase:?}, {workers} workers, {status}\n{}", arena.backend.log_text());
            ensure!(status.success(), "{}", here());
            away.check_holes().with_context(here)?;
        }
    }
    Ok(())
}

/// END comes when everything has been placed, but nobody was woken: whoever waits looks again.
#[test]
fn end_wakes_whoever_waits_for_pages_that_are_there() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut late = bring(&arena, Phase::BuffersMissing)?;
    let base = std::mem::take(&mut late.base);
    late.deliver_all()?; // without an address to wake
    late.base = base;
    let start = Instant::now();
    ensure!(late.end()? == 0, "END failed\n{}", arena.backend.log_text());
    ensure!(start.elapsed() < Duration::from_millis(1500), "END took {:?}", start.elapsed());
    ensure!(late.front.tx().is_drained_within(PATIENCE), "TX stands still\n{}", arena.backend.log_text());
    // The rest of its life is as always.
    late.front.prove_alive(256)?;
    late.hang_up();
    arena.check_all()
}

/// The whole way of a migration that succeeds, twice over one connection.
#[test]
fn a_migration_that_succeeds() -> Result<()> {
    for slots in [true, false] {
        let mut arena = Arena::new()?;
        let mut setup = Late::setup(256);
        if !slots {
            setup.protocol &= !protocol::CONFIGURE_MEM_SLOTS;
        }
        let mut late = Late::connect(&arena.bad(), setup)?;
        for _ in 0..CHAINS {
            late.front.tx().queue_frame(Front::HEADER_LEN, &test_frame())?;
        }
        let all = late.depart(|_| false)?;
        late.arm()?;
        kick(&late)?;
        let drained = eventually(PATIENCE, || {
            late.deliver_asked().is_ok() && late.front.rings[1].used_idx().is_ok_and(|i| i == CHAINS as u16)
        });
        ensure!(drained, "TX stands still\n{}", arena.backend.log_text());
        let asked = late.asked().len();
        ensure!(asked < all, "all pages were asked for, not only those that were needed");
        late.away().check_holes()?;
        late.deliver_all()?;
        ensure!(late.end()? == 0);
        late.front.prove_alive(256)?;
        let log = arena.backend.log_text();
        ensure!(log.contains("postcopy: ended"), "{log}");
        ensure!(log.contains(&format!(" {asked} pages asked for")), "{asked} pages were asked for: {log}");
        late.hang_up();
        arena.check_all()?;
    }
    Ok(())
}

/// A page that never comes: the port waits, everybody can see for how long, and it can be reset.
#[test]
fn a_page_that_never_comes() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut late = bring(&arena, Phase::BuffersMissing)?;
    let stalled = eventually(PATIENCE, || {
        arena
            .backend
            .summary(BAD)
            .is_ok_and(|line| line.contains("stalled=1.") && line.contains("queue pair 0"))
    });
    ensure!(stalled, "no stall is shown: {}", arena.backend.summary(BAD)?);
    arena.check_good()?;
    let start = Instant::now();
    let bases = [late.stop_ring(0)?, late.stop_ring(1)?];
    ensure!(
        bases == [0, 0] && start.elapsed() < Duration::from_secs(1),
        "{bases:?} after {:?}",
        start.elapsed()
    );
    let line = arena.backend.summary(BAD)?;
    ensure!(!line.contains("stalled"), "a ring that was stopped stalls: {line}");
    // It starts again where it was, and goes on when the pages come after all.
    late.front.start_rings()?;
    kick(&late)?;
    let drained = eventually(PATIENCE, || {
        late.deliver_asked().is_ok() && late.front.rings[1].used_idx().is_ok_and(|i| i == CHAINS as u16)
    });
    ensure!(drained, "TX stands still\n{}", arena.backend.log_text());
    late.hang_up();
    arena.check_all()
}

/// A front-end that cannot be waited for: it is closed while a stop is asked for, in one write.
#[test]
fn a_message_behind_end_waits_for_it_and_no_longer() -> Result<()> {
    let mut arena = Arena::new()?;
    let late = bring(&arena, Phase::Draining)?;
    late.front.wire.tell(msg::GET_VRING_BASE, &state(1, 0), &[])?;
    let early = late.front.wire.recv(Duration::from_millis(100));
    ensure!(matches!(early, Err(WireError::Timeout(_))), "{early:?} came at once");
    arena.check_good()?;
    ensure!(late.front.wire.reply_to(msg::POSTCOPY_END)?.u64()? != 0);
    late.front.wire.reply_to(msg::GET_VRING_BASE)?;
    let away = late.hang_up();
    arena.check_all()?;
    away.check_holes()?;
    ensure!(away.len() as u64 * PAGE > 0);
    Ok(())
}
