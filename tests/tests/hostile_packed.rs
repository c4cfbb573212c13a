//! What a guest can do wrong in packed rings, and a front-end in what it says about them. As `hostile_rings.rs`.
#![forbid(unsafe_code)]

use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use lab::rawfront::{
    Arena, BAD, Front, GOOD, Memory, PATIENCE, PackedRing, Place, Ring, Setup, desc_flag, eventually, msg,
    packed::{AVAIL, USED},
    state, test_frame, virtio, vring_addr,
};

const NEXT: u16 = desc_flag::NEXT;
const WRITE: u16 = desc_flag::WRITE;
const INDIRECT: u16 = desc_flag::INDIRECT;
/// Index of the ring that the guest sends with.
const TX: usize = 1;

/// What must become of a ring after something bad was put into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Odd, but it may be taken as it is: it comes back and the ring goes on.
    GoesOn,
    /// The chain is dropped and counted, and the ring goes on.
    Dropped,
    /// Nothing is available: the ring goes on when something is.
    Ignored,
    /// The ring stops, and that is reported; a new set-up revives it.
    Stops,
}

type Abuse = fn(&mut PackedRing, &Ring, &Memory) -> std::io::Result<()>;

/// A table in the buffer of slot 8: address, length, flags.
fn table(p: &mut PackedRing, r: &Ring, m: &Memory, entries: &[(u64, u32, u16)]) -> std::io::Result<()> {
    for (i, (addr, len, flags)) in (0u64..).zip(entries) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend([0xee, 0xee]);
        bytes.extend(flags.to_le_bytes());
        m.write(r.buffer(8) + 16 * i, &bytes)?;
    }
    p.offer(r, &[(r.buffer_guest(8), 16 * entries.len() as u32, INDIRECT)])
}

#[rustfmt::skip]
const CHAINS: &[(&str, Fate, Abuse)] = &[
    ("chain as long as the ring", Fate::GoesOn, |p, r, _| {
        let parts: Vec<_> = (0..r.size).map(|i| (r.buffer_guest(i), 2, 0)).collect();
        p.offer(r, &parts)
    }),
    ("list without an end", Fate::Stops, |p, r, _| {
        (0..r.size).try_for_each(|i| p.write(r, i, (r.buffer_guest(i), 2, i, NEXT | AVAIL)))
    }),
    ("list without an end in both rounds", Fate::Stops, |p, r, _| {
        (0..r.size).try_for_each(|i| p.write(r, i, (r.buffer_guest(i), 2, i, NEXT | if i < 5 { AVAIL } else { USED })))
    }),
    ("id of no buffer", Fate::GoesOn, |p, r, _| {
        p.offer(r, &[(r.buffer_guest(0), 80, 0)])?;
        p.write(r, 0, (r.buffer_guest(0), 80, 0xffff, AVAIL))
    }),
    ("the same id twice", Fate::GoesOn, |p, r, _| {
        p.offer(r, &[(r.buffer_guest(0), 80, 0)])?;
        p.offer(r, &[(r.buffer_guest(0), 80, 0)])?;
        p.write(r, 1, (r.buffer_guest(0), 80, 0, AVAIL))
    }),
    ("available in the other round", Fate::Ignored, |p, r, _| p.write(r, 0, (r.buffer_guest(0), 80, 0, USED))),
    ("used already", Fate::Ignored, |p, r, _| p.write(r, 0, (r.buffer_guest(0), 80, 0, USED | AVAIL))),
    ("a hole before what is available", Fate::Ignored, |p, r, _| p.write(r, 1, (r.buffer_guest(0), 80, 0, AVAIL))),
    ("unknown flags", Fate::GoesOn, |p, r, _| p.offer(r, &[(r.buffer_guest(0), 80, 0x7f78)])),
    ("length zero", Fate::Dropped, |p, r, _| p.offer(r, &[(r.buffer_guest(0), 0, 0)])),
    ("length zero in the middle", Fate::Dropped, |p, r, _| {
        p.offer(r, &[(r.buffer_guest(0), 12, 0), (r.buffer_guest(1), 0, 0), (r.buffer_guest(2), 60, 0)])
    }),
    ("address beyond memory", Fate::Dropped, |p, r, m| p.offer(r, &[(m.guest + m.size, 80, 0)])),
    ("last bytes beyond memory", Fate::Dropped, |p, r, m| p.offer(r, &[(m.guest + m.size - 79, 80, 0)])),
    ("address that wraps", Fate::Dropped, |p, r, _| p.offer(r, &[(u64::MAX - 10, 80, 0)])),
    ("4 GiB of length", Fate::Dropped, |p, r, _| p.offer(r, &[(r.buffer_guest(0), u32::MAX, 0)])),
    ("many times 4 GiB of length", Fate::Dropped, |p, r, _| {
        let parts: Vec<_> = (0..r.size).map(|_| (r.buffer_guest(0), u32::MAX, 0)).collect();
        p.offer(r, &parts)
    }),
    ("writable descriptor", Fate::Dropped, |p, r, _| p.offer(r, &[(r.buffer_guest(0), 80, WRITE)])),
    ("readable after writable", Fate::Dropped, |p, r, _| {
        p.offer(r, &[(r.buffer_guest(0), 12, WRITE), (r.buffer_guest(1), 60, 0)])
    }),
    ("table", Fate::GoesOn, |p, r, m| table(p, r, m, &[(r.buffer_guest(0), 12, 0), (r.buffer_guest(1), 60, 0)])),
    ("table of no bytes", Fate::Dropped, |p, r, _| p.offer(r, &[(r.buffer_guest(8), 0, INDIRECT)])),
    ("table of 15 bytes", Fate::Dropped, |p, r, _| p.offer(r, &[(r.buffer_guest(8), 15, INDIRECT)])),
    ("table of 17 bytes", Fate::Dropped, |p, r, _| p.offer(r, &[(r.buffer_guest(8), 17, INDIRECT)])),
    ("table of 4 GiB", Fate::Dropped, |p, r, _| p.offer(r, &[(r.buffer_guest(8), 0xffff_fff0, INDIRECT)])),
    ("table beyond memory", Fate::Dropped, |p, r, m| p.offer(r, &[(m.guest + m.size, 32, INDIRECT)])),
    ("table over the end of memory", Fate::Dropped, |p, r, m| p.offer(r, &[(m.guest + m.size - 16, 32, INDIRECT)])),
    ("table of more than a chain may have", Fate::Dropped, |p, r, m| {
        let at = r.buffer_guest(1);
        table(p, r, m, &vec![(at, 1, 0); 1025])
    }),
    ("table and more behind", Fate::Dropped, |p, r, m| {
        m.write(r.buffer(8), &[0; 16])?;
        p.offer(r, &[(r.buffer_guest(8), 16, INDIRECT), (r.buffer_guest(0), 60, 0)])
    }),
    ("table behind something else", Fate::Dropped, |p, r, m| {
        m.write(r.buffer(8), &[0; 16])?;
        p.offer(r, &[(r.buffer_guest(0), 60, 0), (r.buffer_guest(8), 16, INDIRECT)])
    }),
    ("table that says it is one in itself", Fate::GoesOn, |p, r, m| {
        let at = r.buffer_guest(1);
        table(p, r, m, &[(at, 80, INDIRECT | NEXT)])
    }),
    ("events nobody knows", Fate::GoesOn, |p, r, m| {
        m.write(r.avail, &[0xff; 4])?;
        p.offer(r, &[(r.buffer_guest(0), 80, 0)])
    }),
];

fn setup(ring_size: u16) -> Setup {
    let plain = Setup::default();
    Setup { ring_size, features: plain.features | virtio::RING_PACKED, ..plain }
}

/// A front-end with packed rings, up to their start.
fn negotiated(arena: &Arena, ring_size: u16) -> Result<Front> {
    let mut front = Front::connect(&arena.bad(), setup(ring_size))?;
    front.negotiate()?;
    ensure!(front.features & virtio::RING_PACKED != 0, "packed rings are not offered");
    front.acknowledge_features()?;
    front.share_memory()?;
    Ok(front)
}

/// Starts both rings at a place; the driver of the second one.
fn start(front: &Front, at: Place) -> Result<PackedRing> {
    let drivers = [0, TX].map(|index| -> Result<_> {
        let driver = PackedRing::new(front, index, at)?;
        front.start_ring(index, at.base())?;
        front.order(msg::SET_VRING_ENABLE, &state(index as u32, 1), &[])?;
        Ok(driver)
    });
    let [rx, tx] = drivers;
    rx?;
    tx
}

#[test]
fn bad_chains_on_a_packed_transmit_ring() -> Result<()> {
    let mut arena = Arena::new()?;
    for (case, fate, abuse) in CHAINS {
        let front = negotiated(&arena, 64)?;
        let mut driver = start(&front, Place::START)?;
        let ring = &front.rings[TX];
        // Once round: whatever follows begins in slot 0 again.
        driver.prove_alive(ring, 128).with_context(|| format!("before: {case}"))?;
        let before = arena.complaints()?;
        let place = driver.next;
        abuse(&mut driver, ring, &front.memory)?;
        ring.kick()?;
        match fate {
            Fate::GoesOn | Fate::Dropped | Fate::Ignored => {
                ensure!(driver.is_drained_within(ring, PATIENCE), "{case}: the chain does not come back");
                if *fate == Fate::Ignored {
                    arena.check_good()?;
                    driver = PackedRing::new(&front, TX, place)?;
                }
                driver.prove_alive(ring, 200).with_context(|| format!("after: {case}"))?;
            }
            Fate::Stops => {
                let stopped = eventually(PATIENCE, || {
                    ring.errors() > 0 && arena.complaints().is_ok_and(|now| now > before)
                });
                ensure!(stopped, "{case}: nothing was reported\n{}", arena.backend.log_text());
                for index in [0, TX] {
                    front.stop_ring(index)?;
                }
                let mut driver = start(&front, Place::START)?;
                driver.prove_alive(ring, 100).with_context(|| format!("after: {case}"))?;
            }
        }
        arena.check_good().with_context(|| (*case).to_owned())?;
        drop(front);
        if *fate == Fate::Dropped {
            arena.check_reported(before).with_context(|| (*case).to_owned())?;
        }
    }
    arena.check_all()
}

/// The guest writes to its header and descriptors while we read them.
#[test]
fn a_packed_driver_that_changes_everything_under_us() -> Result<()> {
    let mut arena = Arena::new()?;
    let front = negotiated(&arena, 64)?;
    let mut driver = start(&front, Place::START)?;
    let (memory, ring) = (front.memory.clone(), &front.rings[TX]);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut seed = 1u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let noise = seed.to_le_bytes();
                let place = (seed >> 33) % 128;
                drop(memory.write(ring.desc + place * 8, &noise));
                drop(memory.write(ring.desc + (place % 64) * 16 + 14, &noise[..2]));
                drop(memory.write(ring.buffers + (place % 64) * 4096 + place % 12, &noise));
            }
        });
        let mut result = Ok(());
        for _ in 0..2000 {
            result = driver.queue_frame(ring, &test_frame()).and_then(|()| ring.kick());
            if result.is_err() {
                break;
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        result
    })?;
    arena.check_good()?;
    for index in [0, TX] {
        front.stop_ring(index)?;
    }
    start(&front, Place::START)?.prove_alive(ring, 100)?;
    drop(front);
    arena.check_all()
}

/// VIRTIO 1.3 §2.8.10.1: any size up to 32768.
#[test]
fn packed_rings_of_any_size_begin_anywhere() -> Result<()> {
    let mut arena = Arena::new()?;
    for ring_size in [1, 2, 3, 5, 63, 100, 255, 257, 1000, 32767, 32768] {
        let front = negotiated(&arena, ring_size)?;
        for at in [
            Place::START,
            Place { slot: ring_size - 1, wrap: false },
            Place { slot: ring_size / 2, wrap: true },
        ] {
            let mut driver = start(&front, at)?;
            let ring = &front.rings[TX];
            driver.prove_alive(ring, 210).with_context(|| format!("{ring_size} entries, {at:?}"))?;
            front.stop_ring(0)?;
            let base = front.stop_ring(TX)?;
            ensure!(base == driver.used.base(), "base {base:#x} after {:?}", driver.used);
        }
    }
    ensure!(arena.backend.complaints(BAD)? == 0, "{}", arena.backend.log_text());
    arena.check_all()
}

/// vhost-user: Vring descriptor indices for packed virtqueues.
#[test]
fn bases_of_packed_rings() -> Result<()> {
    let mut arena = Arena::new()?;
    // Without SET_VRING_BASE a ring begins at its beginning.
    let front = negotiated(&arena, 64)?;
    let mut driver = PackedRing::new(&front, TX, Place::START)?;
    start_tx_at(&front, 64, None, front.vring_addr(TX))?;
    driver.prove_alive(&front.rings[TX], 100)?;
    // DPDK's front-end tells half of it.
    let at = Place { slot: 9, wrap: false };
    for base in [at.base(), at.base() & 0xffff, at.base() & 0xffff_0000 | 11] {
        front.stop_ring(TX)?;
        let mut driver = PackedRing::new(&front, TX, at)?;
        start_tx_at(&front, 64, Some(base), front.vring_addr(TX))?;
        driver.prove_alive(&front.rings[TX], 100).with_context(|| format!("base {base:#x}"))?;
    }
    // Refused, before and after a ring runs.
    front.stop_ring(TX)?;
    drop(front);
    for base in [64, 0x8000_0000 | 0x8040, 0x0040_0000, 0xffff_ffff] {
        let before = arena.complaints()?;
        let front = negotiated(&arena, 64)?;
        drop(start_tx_at(&front, 64, Some(base), front.vring_addr(TX)));
        arena.check_good()?;
        drop(front);
        arena.check_reported(before).with_context(|| format!("base {base:#x}"))?;
    }
    arena.check_all()
}

#[test]
fn packed_ring_addresses_and_sizes_that_cannot_be() -> Result<()> {
    let mut arena = Arena::new()?;
    let probe = Front::connect(&arena.bad(), setup(64))?;
    let (user, end) = (probe.memory.user, probe.memory.user + probe.memory.size);
    let (d, a, u) = (user + probe.rings[TX].desc, user + probe.rings[TX].avail, user + probe.rings[TX].used);
    drop(probe);
    let cases: &[(&str, u32, [u64; 3])] = &[
        ("no entries", 0, [d, u, a]),
        ("too many entries", 32769, [d, u, a]),
        ("descriptors behind memory", 64, [end, u, a]),
        ("descriptors over the end", 64, [end - 16 * 63, u, a]),
        ("descriptors at the end of the address space", 64, [u64::MAX - 15, u, a]),
        ("device events over the end", 64, [d, end - 2, a]),
        ("device events that wrap", 64, [d, u64::MAX - 3, a]),
        ("driver events behind memory", 64, [d, u, end]),
        ("descriptors misaligned", 64, [d + 8, u, a]),
        ("device events misaligned", 64, [d, u + 2, a]),
        ("driver events misaligned", 64, [d, u, a + 2]),
    ];
    for (case, size, [d, u, a]) in cases {
        let before = arena.complaints()?;
        let front = negotiated(&arena, 64)?;
        let mut driver = PackedRing::new(&front, TX, Place::START)?;
        drop(start_tx_at(&front, *size, None, vring_addr(1, 0, [*d, *u, *a, 0])));
        driver.queue_frame(&front.rings[TX], &test_frame())?;
        front.rings[TX].kick()?;
        arena.check_good().with_context(|| (*case).to_owned())?;
        ensure!(driver.take_used(&front.rings[TX])?.is_empty(), "{case}: a frame was used");
        drop(front);
        arena.check_reported(before).with_context(|| (*case).to_owned())?;
    }
    arena.check_all()
}

fn start_tx_at(front: &Front, size: u32, base: Option<u32>, addresses: Vec<u8>) -> Result<()> {
    front.wire.tell(msg::SET_VRING_NUM, &state(1, size), &[])?;
    if let Some(base) = base {
        front.wire.tell(msg::SET_VRING_BASE, &state(1, base), &[])?;
    }
    front.wire.tell(msg::SET_VRING_ADDR, &addresses, &[])?;
    front.wire.tell(msg::SET_VRING_KICK, &1u64.to_ne_bytes(), &[front.rings[TX].kick.as_raw_fd()])?;
    Ok(())
}

/// vhost-user: Ring states. As with split rings, no kick is needed for what is there at the start, and a stopped ring is
/// left alone.
#[test]
fn no_kick_is_lost_while_a_packed_ring_is_stopped_or_disabled() -> Result<()> {
    let mut arena = Arena::new()?;
    let front = negotiated(&arena, 64)?;
    let ring = &front.rings[TX];
    let mut driver = PackedRing::new(&front, TX, Place::START)?;
    driver.queue_frame(ring, &test_frame())?;
    front.start_ring(TX, driver.used.base())?;
    ensure!(driver.is_drained_within(ring, PATIENCE), "a frame from before the start");
    front.order(msg::SET_VRING_ENABLE, &state(1, 0), &[])?;
    driver.queue_frame(ring, &test_frame())?;
    ring.kick()?;
    ensure!(driver.is_drained_within(ring, PATIENCE), "a frame on a disabled ring is not discarded");
    front.order(msg::SET_VRING_ENABLE, &state(1, 1), &[])?;
    driver.prove_alive(ring, 32)?;
    let base = front.stop_ring(TX)?;
    driver.queue_frame(ring, &test_frame())?;
    ring.kick()?;
    std::thread::sleep(std::time::Duration::from_millis(50));
    ensure!(driver.take_used(ring)?.is_empty(), "a stopped ring was used");
    front.start_ring(TX, base)?;
    ensure!(driver.is_drained_within(ring, PATIENCE), "a frame from while the ring was stopped");
    drop(front);
    ensure!([BAD, GOOD].iter().all(|port| arena.backend.complaints(port).is_ok_and(|n| n == 0)));
    arena.check_all()
}
