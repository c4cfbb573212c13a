//! What a guest can do wrong in its rings, and a front-end in what it says about them.
//!
//! A bad chain or frame costs the guest that chain or frame, a bad index or address that ring, until it is set
//! up anew; the other port goes on in any case. See `hostile_session.rs` for how that is asserted.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use lab::rawfront::{
    Arena, BAD, Desc, Front, Memory, PATIENCE, Ring, Setup, desc_flag, eventually, msg, state, test_frame,
    vring_addr,
};
use std::time::Duration;

const NEXT: u16 = desc_flag::NEXT;
const WRITE: u16 = desc_flag::WRITE;
const INDIRECT: u16 = desc_flag::INDIRECT;

/// What must become of a ring after something bad was put into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Odd, but it may be taken as it is: it comes back and the ring goes on.
    GoesOn,
    /// The chain is dropped and counted, and the ring goes on.
    Dropped,
    /// The ring may stop, if that is reported; a new set-up revives it.
    MayStop,
}

type Abuse = fn(&mut Ring, &Memory) -> std::io::Result<()>;

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { addr, len, flags, next }
}

/// One descriptor at head 0, published.
fn one(ring: &mut Ring, d: Desc) -> std::io::Result<()> {
    ring.set_desc(0, d)?;
    ring.push(0)
}

/// A table of indirect descriptors in the buffer of descriptor 8.
fn indirect(ring: &mut Ring, memory: &Memory, table: &[Desc]) -> std::io::Result<()> {
    let bytes: Vec<u8> = table.iter().flat_map(Desc::bytes).collect();
    memory.write(ring.buffer(8), &bytes)?;
    one(ring, desc(ring.buffer_guest(8), bytes.len() as u32, INDIRECT, 0))
}

#[rustfmt::skip]
const CHAINS: &[(&str, Fate, Abuse)] = &[
    ("descriptor that is its own next", Fate::Dropped, |r, _| one(r, desc(r.buffer_guest(0), 80, NEXT, 0))),
    ("loop of two", Fate::Dropped, |r, _| {
        r.set_desc(1, desc(r.buffer_guest(1), 80, NEXT, 0))?;
        one(r, desc(r.buffer_guest(0), 80, NEXT, 1))
    }),
    ("loop through the whole table", Fate::Dropped, |r, _| {
        for i in 0..r.size {
            r.set_desc(i, desc(r.buffer_guest(i), 2, NEXT, (i + 1) % r.size))?;
        }
        r.push(0)
    }),
    ("chain as long as the ring", Fate::GoesOn, |r, _| {
        for i in 0..r.size {
            r.set_desc(i, desc(r.buffer_guest(i), 2, if i + 1 < r.size { NEXT } else { 0 }, i + 1))?;
        }
        r.push(0)
    }),
    ("next just beyond the table", Fate::Dropped, |r, _| one(r, desc(r.buffer_guest(0), 80, NEXT, r.size))),
    ("next far beyond the table", Fate::Dropped, |r, _| one(r, desc(r.buffer_guest(0), 80, NEXT, 0xffff))),
    ("length zero", Fate::Dropped, |r, _| one(r, desc(r.buffer_guest(0), 0, 0, 0))),
    ("length zero in the middle", Fate::GoesOn, |r, _| {
        r.set_desc(1, desc(r.buffer_guest(1), 0, NEXT, 2))?;
        r.set_desc(2, desc(r.buffer_guest(2), 60, 0, 0))?;
        one(r, desc(r.buffer_guest(0), 12, NEXT, 1))
    }),
    ("length zero at no address", Fate::Dropped, |r, _| one(r, desc(u64::MAX, 0, 0, 0))),
    ("address beyond memory", Fate::Dropped, |r, m| one(r, desc(m.guest + m.size, 80, 0, 0))),
    ("address far beyond memory", Fate::Dropped, |r, _| one(r, desc(1 << 46, 80, 0, 0))),
    ("last bytes beyond memory", Fate::Dropped, |r, m| one(r, desc(m.guest + m.size - 79, 80, 0, 0))),
    ("address that wraps", Fate::Dropped, |r, _| one(r, desc(u64::MAX - 10, 80, 0, 0))),
    ("frame beyond memory behind a good header", Fate::Dropped, |r, m| {
        r.set_desc(1, desc(m.guest + m.size - 1, 60, 0, 0))?;
        one(r, desc(r.buffer_guest(0), 12, NEXT, 1))
    }),
    ("4 GiB of length", Fate::Dropped, |r, _| one(r, desc(r.buffer_guest(0), u32::MAX, 0, 0))),
    ("many times 4 GiB of length", Fate::Dropped, |r, _| {
        for i in 0..r.size {
            let flags = if i + 1 < r.size { NEXT } else { 0 };
            r.set_desc(i, desc(r.buffer_guest(0), u32::MAX, flags, i + 1))?;
        }
        r.push(0)
    }),
    ("writable descriptor", Fate::Dropped, |r, _| one(r, desc(r.buffer_guest(0), 80, WRITE, 0))),
    ("readable after writable", Fate::Dropped, |r, _| {
        r.set_desc(1, desc(r.buffer_guest(1), 60, 0, 0))?;
        one(r, desc(r.buffer_guest(0), 12, NEXT | WRITE, 1))
    }),
    ("unknown descriptor flags", Fate::GoesOn, |r, _| one(r, desc(r.buffer_guest(0), 80, 0xfff8, 0))),
    ("indirect table of no bytes", Fate::Dropped, |r, _| one(r, desc(r.buffer_guest(8), 0, INDIRECT, 0))),
    ("indirect table of 15 bytes", Fate::Dropped, |r, _| one(r, desc(r.buffer_guest(8), 15, INDIRECT, 0))),
    ("indirect table of 17 bytes", Fate::Dropped, |r, _| one(r, desc(r.buffer_guest(8), 17, INDIRECT, 0))),
    ("indirect table of 4 GiB", Fate::Dropped, |r, _| one(r, desc(r.buffer_guest(8), 0xffff_fff0, INDIRECT, 0))),
    ("indirect table beyond memory", Fate::Dropped, |r, m| one(r, desc(m.guest + m.size, 32, INDIRECT, 0))),
    ("indirect table over the end of memory", Fate::Dropped, |r, m| {
        one(r, desc(m.guest + m.size - 16, 32, INDIRECT, 0))
    }),
    ("indirect with next", Fate::Dropped, |r, m| {
        m.write(r.buffer(8), &desc(r.buffer_guest(0), 80, 0, 0).bytes())?;
        r.set_desc(1, desc(r.buffer_guest(1), 60, 0, 0))?;
        one(r, desc(r.buffer_guest(8), 16, INDIRECT | NEXT, 1))
    }),
    ("indirect inside indirect", Fate::Dropped, |r, m| {
        let inner = desc(r.buffer_guest(8), 16, INDIRECT, 0);
        indirect(r, m, &[inner])
    }),
    ("loop inside an indirect table", Fate::Dropped, |r, m| {
        let (a, b) = (r.buffer_guest(1), r.buffer_guest(2));
        indirect(r, m, &[desc(a, 12, NEXT, 1), desc(b, 60, NEXT, 0)])
    }),
    ("next beyond an indirect table", Fate::Dropped, |r, m| {
        let a = r.buffer_guest(1);
        indirect(r, m, &[desc(a, 80, NEXT, 1)])
    }),
    ("long loop inside an indirect table", Fate::Dropped, |r, m| {
        let a = r.buffer_guest(1);
        let table: Vec<_> = (0..256).map(|i| desc(a, 1, NEXT, (i + 1) % 256)).collect();
        indirect(r, m, &table)
    }),
    ("head just beyond the ring", Fate::MayStop, |r, _| r.push(r.size)),
    ("head far beyond the ring", Fate::MayStop, |r, _| r.push(0xffff)),
    ("available index jumps one too far", Fate::MayStop, |r, _| {
        let index = r.avail_idx.wrapping_add(r.size + 1);
        r.publish(index)
    }),
    ("available index jumps by half", Fate::MayStop, |r, _| {
        let index = r.avail_idx.wrapping_add(0x8000);
        r.publish(index)
    }),
    ("available index goes back", Fate::MayStop, |r, _| {
        let index = r.avail_idx.wrapping_sub(1);
        r.publish(index)
    }),
];

#[test]
fn bad_chains_and_indices_on_the_transmit_ring() -> Result<()> {
    let mut arena = Arena::new()?;
    for (case, fate, abuse) in CHAINS {
        let mut front = arena.bad_up()?;
        front.prove_alive(40).with_context(|| format!("before: {case}"))?;
        let before = arena.complaints()?;
        let memory = front.memory.clone();
        let tx = front.tx();
        abuse(tx, &memory)?;
        tx.kick()?;
        match fate {
            Fate::GoesOn | Fate::Dropped => {
                ensure!(tx.is_drained_within(PATIENCE), "{case}: the chain does not come back");
                front.prove_alive(100).with_context(|| format!("after: {case}"))?;
            }
            Fate::MayStop => {
                let stopped = eventually(PATIENCE, || {
                    tx.errors() > 0 || arena.complaints().is_ok_and(|now| now > before)
                });
                ensure!(stopped, "{case}: nothing was reported\n{}", arena.backend.log_text());
                revive_tx(&mut front).with_context(|| format!("after: {case}"))?;
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

/// Stops the TX ring and starts it afresh, on the same connection, as a driver does that resets its device.
fn revive_tx(front: &mut Front) -> Result<()> {
    for index in 0..front.rings.len() {
        front.stop_ring(index)?;
    }
    front.set_status(0)?;
    front.lay_out_rings()?;
    front.start_rings()?;
    for index in 0..front.rings.len() {
        front.order(msg::SET_VRING_ENABLE, &state(index as u32, 1), &[])?;
    }
    front.prove_alive(100)?;
    Ok(())
}

/// A 12-byte virtio-net header and a frame (VIRTIO 1.3 §5.1.6).
fn packet(flags: u8, gso_type: u8, words: [u16; 4], frame: &[u8]) -> Vec<u8> {
    let mut bytes = vec![flags, gso_type];
    // hdr_len, gso_size, csum_start, csum_offset
    words.iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
    bytes.extend_from_slice(&[0, 0]);
    bytes.extend_from_slice(frame);
    bytes
}

/// Frames that must be dropped alone: the ring and its other frames go on.
#[test]
fn bad_frames_and_headers() -> Result<()> {
    let mut arena = Arena::new()?;
    let before = arena.complaints()?;
    let mut front = arena.bad_up()?;
    let frame = test_frame();
    let len = frame.len() as u16;
    let mut cases: Vec<(String, Vec<u8>)> = Vec::new();
    for short in 1..12 + 14 {
        cases.push((format!("{short} bytes in all"), vec![0; short]));
    }
    // CVE-2024-11614: an offset that leads outside of the frame.
    for (start, offset) in
        [(len, 0), (len - 1, 0), (0, len), (0xffff, 0), (0, 0xffff), (0xffff, 0xffff), (34, len - 35)]
    {
        cases.push((format!("csum {start}+{offset}"), packet(1, 0, [0, 0, start, offset], &frame)));
    }
    for gso_type in [2, 6, 7, 0x40, 0x7f, 0x80, 0xff, 1, 4, 3, 5] {
        for gso_size in [0, 1, 1448, 0xffff] {
            cases.push((
                format!("gso {gso_type}/{gso_size}"),
                packet(1, gso_type, [54, gso_size, 34, 16], &frame),
            ));
            cases.push((
                format!("gso {gso_type}/{gso_size} without csum"),
                packet(0, gso_type, [0xffff, gso_size, 0xffff, 0xffff], &frame),
            ));
        }
    }
    for flags in [2, 4, 8, 0xf0, 0xff] {
        cases.push((format!("flags {flags:#x}"), packet(flags, 0, [0, 0, 0, 0], &frame)));
    }
    for (case, bytes) in &cases {
        let tx = front.tx();
        tx.queue_bytes(bytes)?;
        tx.kick()?;
        ensure!(tx.is_drained_within(PATIENCE), "{case}: the frame does not come back");
    }
    front.prove_alive(100)?;
    drop(front);
    arena.check_reported(before)?;
    arena.check_all()
}

#[test]
fn frames_longer_than_allowed() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut front = arena.bad_up()?;
    let size = front.tx().size;
    for descriptors in [16, 17, size - 1] {
        let tx = front.tx();
        for i in 0..descriptors {
            let flags = if i + 1 < descriptors { NEXT } else { 0 };
            tx.set_desc(i, desc(tx.buffer_guest(i), Ring::BUFFER_LEN as u32, flags, i + 1))?;
        }
        tx.push(0)?;
        tx.kick()?;
        ensure!(tx.is_drained_within(PATIENCE), "{descriptors} × 4 KiB do not come back");
        front.prove_alive(100)?;
    }
    // One descriptor over all of memory.
    let end = front.memory.size;
    one(front.tx(), desc(0, end as u32, 0, 0))?;
    front.tx().kick()?;
    ensure!(front.tx().is_drained_within(PATIENCE), "all of memory does not come back");
    front.prove_alive(100)?;
    drop(front);
    arena.check_all()
}

/// The guest writes to its header and descriptors while we read them.
#[test]
fn a_driver_that_changes_chains_under_us() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut front = arena.bad_up()?;
    let memory = front.memory.clone();
    let (table, buffers) = (front.tx().desc, front.tx().buffers);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut seed = 1u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let noise = seed.to_le_bytes();
                let place = (seed >> 33) % 128;
                drop(memory.write(table + place * 8, &noise));
                drop(memory.write(buffers + (place % 64) * 4096 + place % 12, &noise));
            }
        });
        let mut result = Ok(());
        for _ in 0..2000 {
            result = front.tx().queue_frame(12, &test_frame()).and_then(|()| front.tx().kick());
            if result.is_err() {
                break;
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        result
    })?;
    arena.check_good()?;
    revive_tx(&mut front)?;
    drop(front);
    arena.check_all()
}

#[test]
fn ring_addresses_that_cannot_be() -> Result<()> {
    let mut arena = Arena::new()?;
    let probe = Front::connect(&arena.bad(), Setup::default())?;
    let (user, size) = (probe.memory.user, probe.memory.size);
    let (d, a, u) = (user + probe.rings[1].desc, user + probe.rings[1].avail, user + probe.rings[1].used);
    drop(probe);
    let cases: &[(&str, [u64; 3])] = &[
        ("descriptors below memory", [user - 0x1000, u, a]),
        ("descriptors at 0", [0, u, a]),
        ("descriptors behind memory", [user + size, u, a]),
        ("descriptors over the end", [user + size - 16 * 63, u, a]),
        ("descriptors at the end of the address space", [u64::MAX - 15, u, a]),
        ("used ring over the end", [d, user + size - 64, a]),
        ("used ring that wraps", [d, u64::MAX - 3, a]),
        ("available ring behind memory", [d, u, user + size]),
        ("available ring over the end", [d, u, user + size - 4]),
        ("descriptors misaligned", [d + 8, u, a]),
        ("used ring misaligned", [d, u + 2, a]),
        ("available ring misaligned", [d, u, a + 1]),
    ];
    for (case, [d, u, a]) in cases {
        let before = arena.complaints()?;
        let mut front = arena.bad_negotiated()?;
        front.share_memory()?;
        front.start_ring(0, 0)?;
        // The first of these may end the connection; what follows may then fail.
        drop(start_tx_at(&front, [*d, *u, *a]));
        front.tx().queue_frame(12, &test_frame())?;
        front.tx().kick()?;
        arena.check_good().with_context(|| (*case).to_owned())?;
        ensure!(front.tx().used_idx()? == 0, "{case}: a frame was used");
        drop(front);
        arena.check_reported(before).with_context(|| (*case).to_owned())?;
    }
    arena.check_all()
}

fn start_tx_at(front: &Front, [desc, used, avail]: [u64; 3]) -> Result<()> {
    use std::os::fd::AsRawFd;
    let ring = &front.rings[1];
    front.wire.tell(msg::SET_VRING_NUM, &state(1, ring.size.into()), &[])?;
    front.wire.tell(msg::SET_VRING_BASE, &state(1, 0), &[])?;
    front.wire.tell(msg::SET_VRING_ADDR, &vring_addr(1, 0, [desc, used, avail, 0]), &[])?;
    front.wire.tell(msg::SET_VRING_KICK, &1u64.to_ne_bytes(), &[ring.kick.as_raw_fd()])?;
    Ok(())
}

/// VIRTIO 1.3 §2.7: any power of two up to 32768 is a ring's size.
#[test]
fn every_legal_ring_size_works() -> Result<()> {
    let mut arena = Arena::new()?;
    for ring_size in (1..16).map(|shift| 1u16 << shift) {
        let setup = Setup { ring_size, ..Setup::default() };
        let mut front = Front::up_with(&arena.bad(), setup)?;
        front.prove_alive(100).with_context(|| format!("ring size {ring_size}"))?;
    }
    arena.check_all()
}

/// Indices of 16 bits run over; a base that is not 0 is taken up.
#[test]
fn indices_wrap_and_bases_are_kept() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut front = arena.bad_up()?;
    for (base, count) in [(0u16, 300), (65_500, 300), (65_535, 40), (7, 40)] {
        for index in 0..2 {
            front.stop_ring(index)?;
        }
        front.lay_out_rings()?;
        let memory = front.memory.clone();
        for ring in &mut front.rings {
            memory.write(ring.avail + 2, &base.to_le_bytes())?;
            memory.write(ring.used + 2, &base.to_le_bytes())?;
            (ring.avail_idx, ring.seen) = (base, base);
        }
        for index in 0..2 {
            front.start_ring(index, base.into())?;
            front.order(msg::SET_VRING_ENABLE, &state(index as u32, 1), &[])?;
        }
        front.prove_alive(count)?;
        ensure!(
            front.stop_ring(1)? == u32::from(base.wrapping_add(count as u16)),
            "base after {base}+{count}"
        );
        for index in 0..2 {
            front.start_ring(index, front.rings[index].avail_idx.into())?;
        }
        front.prove_alive(40)?;
    }
    drop(front);
    arena.check_all()
}

/// vhost-user: Ring states. A frame that was queued before the ring was ready is sent without another kick
/// (vhost #343, #374, #375; cloud-hypervisor #8759).
#[test]
fn no_kick_is_lost_while_a_ring_is_stopped_or_disabled() -> Result<()> {
    let mut arena = Arena::new()?;
    let mut front = arena.bad_negotiated()?;
    front.share_memory()?;
    // Queued before the start, never kicked.
    front.tx().queue_frame(12, &test_frame())?;
    front.start_rings()?;
    ensure!(front.tx().is_drained_within(PATIENCE), "a frame from before the start");
    // Disabled: frames are discarded, not held (vhost-user: Ring states).
    front.order(msg::SET_VRING_ENABLE, &state(1, 0), &[])?;
    front.tx().queue_frame(12, &test_frame())?;
    front.tx().kick()?;
    ensure!(front.tx().is_drained_within(PATIENCE), "a frame on a disabled ring is not discarded");
    front.order(msg::SET_VRING_ENABLE, &state(1, 1), &[])?;
    front.prove_alive(32)?;
    // Stopped: nothing may be used after the reply.
    front.stop_ring(1)?;
    let used = front.tx().used_idx()?;
    front.tx().queue_frame(12, &test_frame())?;
    front.tx().kick()?;
    std::thread::sleep(Duration::from_millis(50));
    ensure!(front.tx().used_idx()? == used, "a stopped ring was used");
    front.start_ring(1, used.into())?;
    ensure!(front.tx().is_drained_within(PATIENCE), "a frame from while the ring was stopped");
    drop(front);
    ensure!(arena.backend.complaints(BAD)? == 0, "{}", arena.backend.log_text());
    arena.check_all()
}
