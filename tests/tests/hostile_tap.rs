//! What a guest can do wrong while frames arrive from a tap: the receive ring, and memory that the kernel itself
//! writes to and reads from.
//!
//! See `hostile_session.rs` for what each test asserts. Each has taps in a network namespace of its own.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use lab::NetNs;
use lab::rawfront::{
    Arena, BAD, Backend, Desc, Front, GOOD, Memory, PATIENCE, Ring, Setup, desc_flag, eventually, test_frame,
};
use std::net::UdpSocket;

const NEXT: u16 = desc_flag::NEXT;
const WRITE: u16 = desc_flag::WRITE;
const INDIRECT: u16 = desc_flag::INDIRECT;
/// What the datagrams say.
const MARK: &[u8] = b"frames from the host to the guest";

/// Two taps, and a socket whose datagrams go to the bad port's guest.
struct Taps {
    netns: NetNs,
    to_bad: UdpSocket,
    to_good: UdpSocket,
}

impl Taps {
    fn new() -> Result<Self> {
        let netns = NetNs::new()?;
        let mut sockets = Vec::new();
        for (tap, net) in [("bad0", 1), ("good0", 2)] {
            netns.add_tap(tap, false, Some(&format!("10.9.{net}.1/24")))?;
            // No guest answers ARP here.
            netns.ip(&format!("neigh add 10.9.{net}.2 lladdr 02:00:00:00:00:0{net} dev {tap}"))?;
            let socket = netns.run(|| {
                let socket = UdpSocket::bind(("0.0.0.0", 0))?;
                socket.connect((format!("10.9.{net}.2"), 9))?;
                Ok(socket)
            })?;
            sockets.push(socket);
        }
        let mut sockets = sockets.into_iter();
        let mut next = || sockets.next().context("a socket for each tap");
        Ok(Self { netns, to_bad: next()?, to_good: next()? })
    }

    fn arena(&self) -> Result<Arena> {
        let port = |name, tap| {
            format!("[[port]]\nname = '{name}'\nsocket = '@/{name}.sock'\nuplink = 'tap:{tap}'\n")
        };
        let config = format!("{}{}", port(BAD, "bad0"), port(GOOD, "good0"));
        let backend = self.netns.run(|| Backend::with_config(&config))?;
        Arena::over(backend)
    }
}

/// Runs a test with taps, or says why not.
fn with_taps(name: &str, body: impl FnOnce(&Taps) -> Result<()>) -> Result<()> {
    match Taps::new() {
        Ok(taps) => body(&taps),
        Err(why) => {
            lab::skip(name, &format!("{why:#}"));
            Ok(())
        }
    }
}

/// Sends datagrams until the guest has received `count` of them in fresh buffers.
fn receive(front: &mut Front, from: &UdpSocket, count: usize) -> Result<()> {
    let mut received = 0;
    let rx = front.rx();
    while rx.avail_idx.wrapping_sub(rx.seen) < rx.size / 2 {
        rx.queue_buffer()?;
    }
    rx.kick()?;
    let arrived = eventually(PATIENCE, || {
        // The tap may be down or full for a moment: what is lost is sent again.
        let _ = from.send(MARK);
        let frames = rx.take_received().unwrap_or_default();
        for frame in &frames {
            received += usize::from(frame.windows(MARK.len()).any(|part| part == MARK));
            let _ = rx.queue_buffer().and_then(|()| rx.kick());
        }
        received >= count
    });
    ensure!(arrived, "{received} of {count} datagrams came through");
    Ok(())
}

#[test]
fn datagrams_reach_the_guest() -> Result<()> {
    with_taps("datagrams_reach_the_guest", |taps| {
        let mut arena = taps.arena()?;
        for _ in 0..3 {
            let mut front = arena.bad_up()?;
            receive(&mut front, &taps.to_bad, 300)?;
            front.prove_alive(100)?;
        }
        receive(&mut arena.good, &taps.to_good, 100)?;
        arena.check_all()
    })
}

type Abuse = fn(&mut Ring, &Memory) -> std::io::Result<()>;

fn one(ring: &mut Ring, addr: u64, len: u32, flags: u16, next: u16) -> std::io::Result<()> {
    ring.set_desc(0, Desc { addr, len, flags, next })?;
    ring.push(0)
}

#[rustfmt::skip]
const CHAINS: &[(&str, Abuse)] = &[
    ("readable descriptor", |r, _| one(r, r.buffer_guest(0), 2048, 0, 0)),
    ("loop", |r, _| one(r, r.buffer_guest(0), 1, WRITE | NEXT, 0)),
    ("next beyond the table", |r, _| one(r, r.buffer_guest(0), 2048, WRITE | NEXT, r.size)),
    ("length zero", |r, _| one(r, r.buffer_guest(0), 0, WRITE, 0)),
    ("no room for the header", |r, _| one(r, r.buffer_guest(0), 11, WRITE, 0)),
    ("room for the header only", |r, _| one(r, r.buffer_guest(0), 12, WRITE, 0)),
    ("beyond memory", |r, m| one(r, m.guest + m.size, 2048, WRITE, 0)),
    ("over the end of memory", |r, m| one(r, m.guest + m.size - 20, 2048, WRITE, 0)),
    ("address that wraps", |r, _| one(r, u64::MAX - 100, 2048, WRITE, 0)),
    ("4 GiB of length", |r, _| one(r, r.buffer_guest(0), u32::MAX, WRITE, 0)),
    ("writable, then readable", |r, _| {
        r.set_desc(1, Desc { addr: r.buffer_guest(1), len: 2048, flags: 0, next: 0 })?;
        one(r, r.buffer_guest(0), 12, WRITE | NEXT, 1)
    }),
    ("indirect inside indirect", |r, m| {
        let inner = Desc { addr: r.buffer_guest(8), len: 16, flags: INDIRECT, next: 0 };
        m.write(r.buffer(8), &inner.bytes())?;
        one(r, r.buffer_guest(8), 16, INDIRECT, 0)
    }),
    ("indirect table beyond memory", |r, m| one(r, m.guest + m.size, 64, INDIRECT, 0)),
    ("head beyond the ring", |r, _| r.push(0x7fff)),
    ("available index jumps", |r, _| r.publish(r.avail_idx.wrapping_add(0x5000))),
    ("buffer over its own ring", |r, m| one(r, m.guest + r.desc, 4096, WRITE, 0)),
    ("buffer over the used ring", |r, m| one(r, m.guest + (r.used & !63), 2048, WRITE, 0)),
];

#[test]
fn bad_chains_on_the_receive_ring() -> Result<()> {
    with_taps("bad_chains_on_the_receive_ring", |taps| {
        let mut arena = taps.arena()?;
        for (case, abuse) in CHAINS {
            let mut front = arena.bad_up()?;
            let memory = front.memory.clone();
            abuse(front.rx(), &memory)?;
            front.rx().kick()?;
            for _ in 0..50 {
                let _ = taps.to_bad.send(MARK);
            }
            // Its transmit ring, and the other port in both directions.
            front.prove_alive(100).with_context(|| format!("transmit beside: {case}"))?;
            arena.check_good().with_context(|| (*case).to_owned())?;
            receive(&mut arena.good, &taps.to_good, 20).with_context(|| (*case).to_owned())?;
            drop(front);
            let mut next = arena.bad_up()?;
            receive(&mut next, &taps.to_bad, 20)
                .with_context(|| format!("the next front-end after: {case}"))?;
        }
        arena.check_all()
    })
}

/// The kernel writes to buffers that are gone (EFAULT), we read rings that are gone (SIGBUS).
#[test]
fn memory_is_truncated_while_frames_arrive() -> Result<()> {
    with_taps("memory_is_truncated_while_frames_arrive", |taps| {
        let mut arena = taps.arena()?;
        let probe = Front::connect(&arena.bad(), Setup::default())?;
        let (rx_buffers, tx_buffers) = (probe.rings[0].buffers, probe.rings[1].buffers);
        drop(probe);
        for (case, length) in [
            ("all", 0),
            ("from the receive buffers on", rx_buffers),
            ("from the transmit buffers on", tx_buffers),
        ] {
            let mut front = arena.bad_up()?;
            receive(&mut front, &taps.to_bad, 20)?;
            for _ in 0..8 {
                front.rx().queue_buffer()?;
                front.tx().queue_frame(Front::HEADER_LEN, &test_frame())?;
            }
            front.memory.file().set_len(length)?;
            front.rx().kick()?;
            front.tx().kick()?;
            for _ in 0..50 {
                let _ = taps.to_bad.send(MARK);
            }
            arena.check_good().context(case)?;
            receive(&mut arena.good, &taps.to_good, 20).context(case)?;
            drop(front);
            let mut next = arena.bad_up()?;
            receive(&mut next, &taps.to_bad, 20)
                .with_context(|| format!("the next front-end after: {case}"))?;
        }
        arena.check_all()
    })
}

/// Frames arrive all the time while front-ends come and go.
#[test]
fn front_ends_come_and_go_under_traffic() -> Result<()> {
    with_taps("front_ends_come_and_go_under_traffic", |taps| {
        let mut arena = taps.arena()?;
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = taps.to_bad.send(MARK);
                }
            });
            let result = (0..100).try_for_each(|round| {
                let mut front = arena.bad_up()?;
                for _ in 0..32 {
                    front.rx().queue_buffer()?;
                }
                front.rx().kick()?;
                if round % 2 == 0 {
                    let used = |front: &mut Front| front.rx().used_idx().unwrap_or(0);
                    ensure!(eventually(PATIENCE, || used(&mut front) > 0), "round {round}: nothing arrives");
                    let base = front.stop_ring(0)?;
                    // vhost-user: nothing may be written to guest memory after the reply.
                    let after = used(&mut front);
                    ensure!(base == u32::from(after), "round {round}: base {base}, used {after}");
                    std::thread::sleep(std::time::Duration::from_millis(2));
                    ensure!(used(&mut front) == after, "round {round}: a stopped ring was used");
                }
                anyhow::Ok(())
            });
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            result
        })?;
        arena.check_all()
    })
}
