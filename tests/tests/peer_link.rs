//! Two ports wired together, and what their guests see of each other: two raw front-ends on one process.
//!
//! Frames are checked byte by byte. What one side does wrong, or does not do at all, must not harm the other.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use lab::rawfront::{Backend, Desc, Front, PATIENCE, Ring, Setup, desc_flag, eventually, msg, state, virtio};
use std::path::PathBuf;

/// A process with two ports.
struct Wire {
    backend: Backend,
}

impl Wire {
    fn new() -> Result<Self> {
        Self::with("", "")
    }

    /// With more lines for each port.
    fn with(a: &str, b: &str) -> Result<Self> {
        let port = |name: &str, peer: &str, more: &str| {
            format!("[[port]]\nname = '{name}'\nsocket = '@/{name}.sock'\nuplink = 'peer:{peer}'\n{more}\n")
        };
        let backend = Backend::with_config(&[port("left", "right", a), port("right", "left", b)].concat())?;
        let wire = Self { backend };
        ensure!(eventually(PATIENCE, || wire.socket("right").exists()), "{}", wire.backend.log_text());
        Ok(wire)
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.backend.socket(name)
    }

    fn up(&self, name: &str) -> Result<Front> {
        self.up_with(name, Setup::default())
    }

    fn up_with(&self, name: &str, setup: Setup) -> Result<Front> {
        Front::up_with(&self.socket(name), setup).with_context(|| name.to_owned())
    }

    fn count(&self, port: &str, counter: &str) -> Result<u64> {
        Ok(self.backend.counters(port)?.get(counter).copied().unwrap_or(0))
    }

    /// Ends the process, which must have had no reason to complain unless told.
    fn end(mut self, complaints: bool) -> Result<()> {
        self.backend.check_alive()?;
        for port in ["left", "right"] {
            ensure!(complaints || self.backend.complaints(port)? == 0, "{}", self.backend.log_text());
        }
        let status = self.backend.terminate()?;
        ensure!(status.success(), "ended with {status}: {}", self.backend.log_text());
        Ok(())
    }
}

/// A frame that differs from all others, along the way too.
fn frame(number: u32, len: usize) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xb5];
    frame.extend(number.to_le_bytes());
    frame.extend((frame.len()..len).map(|i| (i as u32).wrapping_mul(7).wrapping_add(number * 31) as u8));
    frame
}

/// Gives all buffers that there is room for, and kicks.
fn offer_all(ring: &mut Ring) -> Result<()> {
    while ring.avail_idx.wrapping_sub(ring.seen) < ring.size {
        ring.queue_buffer()?;
    }
    Ok(ring.kick()?)
}

/// Sends frames one ring full after the other and receives them at the other end, whole and in order.
fn stream(from: &mut Front, to: &mut Front, lens: impl Iterator<Item = usize>) -> Result<()> {
    let mut lens = lens.enumerate().peekable();
    let mut expected = std::collections::VecDeque::new();
    offer_all(to.rx())?;
    let done = |expected: &std::collections::VecDeque<Vec<u8>>, more: bool| expected.is_empty() && !more;
    let ok = eventually(PATIENCE * 3, || {
        let mut step = || -> Result<bool> {
            // No more than there are buffers for: a test that is not scheduled for a while must not lose frames.
            let tx = from.tx();
            while expected.len() < tx.size.into()
                && tx.avail_idx.wrapping_sub(tx.used_idx()?) < tx.size
                && let Some((number, len)) = lens.next()
            {
                let frame = frame(number as u32, len);
                tx.queue_frame(Front::HEADER_LEN, &frame)?;
                expected.push_back(frame);
            }
            tx.kick()?;
            for got in to.rx().take_received()? {
                let wanted = expected.pop_front().context("a frame that nobody sent")?;
                ensure!(got[Front::HEADER_LEN..] == wanted, "a frame of {} bytes is changed", wanted.len());
                ensure!(got[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "its header: {:?}", &got[..12]);
            }
            offer_all(to.rx())?;
            Ok(done(&expected, lens.peek().is_some()))
        };
        step().unwrap_or_else(|error| panic!("{error:#}"))
    });
    ensure!(ok, "{} frames never came", expected.len());
    Ok(())
}

/// Rings go round many times, in both directions, with frames of all lengths.
#[test]
fn frames_arrive_whole_and_in_order_in_both_directions() -> Result<()> {
    let wire = Wire::new()?;
    let (mut a, mut b) = (wire.up("left")?, wire.up("right")?);
    stream(&mut a, &mut b, (0..1000).map(|i| 60 + i * 3))?;
    stream(&mut b, &mut a, (0..1000).map(|i| 60 + i))?;
    ensure!(wire.count("left", "tx_packets")? == 1000 && wire.count("right", "rx_packets")? == 1000);
    ensure!(wire.count("right", "tx_packets")? == 1000 && wire.count("left", "rx_packets")? == 1000);
    wire.end(false)
}

fn large(mergeable: bool) -> Setup {
    let more = virtio::GUEST_TSO4 | if mergeable { virtio::MRG_RXBUF } else { 0 };
    Setup { features: Setup::default().features & !virtio::MRG_RXBUF | more, ..Setup::default() }
}

/// A TCP frame of 64 KiB to be cut into segments of 1448 bytes, in 17 descriptors. Returns its body.
fn send_large(front: &mut Front) -> Result<Vec<u8>> {
    let body = frame(1, 65_550);
    let mut bytes = vec![1, 1, 66, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
    bytes.extend_from_slice(&body);
    let memory = front.memory.clone();
    let tx = front.tx();
    let parts: Vec<_> = bytes.chunks(4096).collect();
    for (i, part) in parts.iter().enumerate() {
        let i = i as u16;
        memory.write(tx.buffer(i), part)?;
        let flags = if usize::from(i) + 1 < parts.len() { desc_flag::NEXT } else { 0 };
        tx.set_desc(i, Desc { addr: tx.buffer_guest(i), len: part.len() as u32, flags, next: i + 1 })?;
    }
    tx.push(0)?;
    tx.kick()?;
    ensure!(tx.is_drained_within(PATIENCE), "the large frame is not taken");
    Ok(body)
}

#[test]
fn a_64_kib_frame_crosses_in_one_piece() -> Result<()> {
    let wire = Wire::new()?;
    let (mut a, mut b) = (wire.up("left")?, wire.up_with("right", large(true))?);
    offer_all(b.rx())?;
    let body = send_large(&mut a)?;
    let parts = b.rx().take_received()?;
    ensure!(parts.len() == 17, "{} buffers", parts.len());
    ensure!(parts[0][..12] == [1, 1, 66, 0, 0xa8, 5, 34, 0, 16, 0, 17, 0], "{:?}", &parts[0][..12]);
    ensure!(parts.concat()[12..] == body, "the frame is changed");
    wire.end(false)
}

/// One buffer must hold it all, and 4 KiB do not; small frames behind it pass.
#[test]
fn without_mergeable_buffers_a_large_frame_is_dropped_and_counted() -> Result<()> {
    let wire = Wire::new()?;
    let (mut a, mut b) = (wire.up("left")?, wire.up_with("right", large(false))?);
    offer_all(b.rx())?;
    send_large(&mut a)?;
    ensure!(wire.count("right", "rx_dropped_too_long")? == 1);
    stream(&mut a, &mut b, (0..200).map(|i| 60 + i * 10))?;
    wire.end(false)
}

/// The receiver takes no large frames, but this is no TCP inside: it cannot be cut, either.
#[test]
fn an_offload_that_cannot_be_resolved_is_counted() -> Result<()> {
    let wire = Wire::new()?;
    let (mut a, mut b) = (wire.up("left")?, wire.up("right")?);
    offer_all(b.rx())?;
    send_large(&mut a)?;
    ensure!(wire.count("right", "rx_dropped_offload")? == 1);
    stream(&mut a, &mut b, (0..100).map(|_| 60))?;
    wire.end(false)
}

#[test]
fn the_sender_waits_for_buffers_and_loses_nothing() -> Result<()> {
    let wire = Wire::new()?;
    let (mut a, mut b) = (wire.up("left")?, wire.up("right")?);
    for number in 0..40 {
        b.rx().queue_buffer()?;
        if number % 4 == 0 {
            b.rx().kick()?;
        }
    }
    b.rx().kick()?;
    let mut got = Vec::new();
    for round in 0..30u32 {
        for i in 0..2 {
            a.tx().queue_frame(Front::HEADER_LEN, &frame(2 * round + i, 100))?;
        }
        a.tx().kick()?;
        ensure!(a.tx().is_drained_within(PATIENCE));
        got.extend(b.rx().take_received()?);
        b.rx().queue_buffer()?;
        b.rx().queue_buffer()?;
        b.rx().kick()?;
    }
    let expected: Vec<_> = (0..60).map(|number| frame(number, 100)).collect();
    let got: Vec<_> = got.iter().map(|frame| frame[12..].to_vec()).collect();
    ensure!(got == expected, "{} of 60 frames", got.len());
    wire.end(false)
}

/// A guest that takes nothing must not stop the other, nor hold its control socket.
#[test]
fn a_guest_without_buffers_does_not_stop_its_peer() -> Result<()> {
    let wire = Wire::new()?;
    let (mut a, mut b) = (wire.up("left")?, wire.up("right")?);
    a.prove_alive(5000)?;
    ensure!(wire.count("right", "rx_dropped_no_buffers")? == 5000);
    // What it sends itself arrives, and once it has buffers it receives.
    stream(&mut b, &mut a, (0..200).map(|_| 60))?;
    stream(&mut a, &mut b, (0..200).map(|_| 60))?;
    wire.end(false)
}

#[test]
fn a_port_without_a_front_end_takes_and_loses_what_is_sent_to_it() -> Result<()> {
    let wire = Wire::new()?;
    let mut a = wire.up("left")?;
    a.prove_alive(1000)?;
    ensure!(wire.count("right", "rx_dropped_no_ring")? == 1000);
    let mut b = wire.up("right")?;
    stream(&mut a, &mut b, (0..200).map(|_| 1000))?;
    drop(b);
    a.prove_alive(1000)?;
    let mut b = wire.up("right")?;
    stream(&mut a, &mut b, (0..200).map(|_| 1000))?;
    wire.end(false)
}

/// Rings stop, memory goes and comes, front-ends leave, while the other side sends all it can.
#[test]
fn either_side_may_be_taken_down_while_the_other_floods() -> Result<()> {
    for victim in ["left", "right"] {
        let wire = Wire::new()?;
        let flooder = if victim == "left" { "right" } else { "left" };
        let mut flood = wire.up(flooder)?;
        for round in 0..12 {
            let mut front = wire.up(victim)?;
            offer_all(front.rx())?;
            for i in 0..32 {
                flood.tx().queue_frame(Front::HEADER_LEN, &frame(i, 1500))?;
            }
            flood.tx().kick()?;
            match round % 4 {
                0 => drop(front),
                1 => {
                    front.stop_ring(0)?;
                    front.stop_ring(1)?;
                }
                2 => front.order(msg::SET_VRING_ENABLE, &state(0, 0), &[])?,
                _ => {
                    // Shorter than what is written to: it is the victim's own fault.
                    front.memory.file().set_len(4096)?;
                }
            }
            ensure!(flood.tx().is_drained_within(PATIENCE), "round {round}: the other side stands still");
        }
        let mut front = wire.up(victim)?;
        stream(&mut flood, &mut front, (0..200).map(|_| 800))?;
        stream(&mut front, &mut flood, (0..200).map(|_| 800))?;
        ensure!(wire.backend.complaints(flooder)? == 0, "{}", wire.backend.log_text());
        wire.end(true)?;
    }
    Ok(())
}

type Abuse = fn(&mut Ring, u64) -> std::io::Result<()>;

fn one(ring: &mut Ring, addr: u64, len: u32, flags: u16, next: u16) -> std::io::Result<()> {
    ring.set_desc(1, Desc { addr, len, flags, next })?;
    ring.push(1)
}

/// What a guest can put into its receive ring, given the size of its memory.
#[rustfmt::skip]
const ABUSES: &[(&str, Abuse)] = &[
    ("loop", |r, _| one(r, r.buffer_guest(1), 80, desc_flag::NEXT | desc_flag::WRITE, 1)),
    ("beyond memory", |r, end| one(r, end, 4096, desc_flag::WRITE, 0)),
    ("over the end of memory", |r, end| one(r, end - 50, 4096, desc_flag::WRITE, 0)),
    ("address that wraps", |r, _| one(r, u64::MAX - 10, 4096, desc_flag::WRITE, 0)),
    ("4 GiB", |r, _| one(r, r.buffer_guest(1), u32::MAX, desc_flag::WRITE, 0)),
    ("readable", |r, _| one(r, r.buffer_guest(1), 4096, 0, 0)),
    ("too short for a header", |r, _| one(r, r.buffer_guest(1), 11, desc_flag::WRITE, 0)),
    ("too short for a frame", |r, _| one(r, r.buffer_guest(1), 40, desc_flag::WRITE, 0)),
    ("nothing", |r, _| one(r, r.buffer_guest(1), 0, desc_flag::WRITE, 0)),
    ("indirect table beyond memory", |r, end| one(r, end, 32, desc_flag::INDIRECT, 0)),
    ("head beyond the table", |r, _| r.push(9999)),
    ("index that jumps", |r, _| { r.avail_idx = r.avail_idx.wrapping_add(30_000); r.publish(r.avail_idx) }),
];

/// A bad receive ring costs its own guest frames, or the ring; the sender sees nothing of it.
#[test]
fn a_hostile_receive_ring_harms_its_own_port_only() -> Result<()> {
    let wire = Wire::new()?;
    let mut a = wire.up("left")?;
    for (case, abuse) in ABUSES {
        let mut b = wire.up("right")?;
        b.rx().queue_buffer()?;
        let end = b.memory.guest + b.memory.size;
        abuse(b.rx(), end).context(*case)?;
        b.rx().kick()?;
        a.prove_alive(50).context(*case)?;
        let received = b.rx().take_used().unwrap_or_default();
        // The buffer before it is used if the ring is looked at at all.
        ensure!(received.first().is_none_or(|(_, len)| *len == 72), "{case}: {received:?}");
        drop(b);
    }
    ensure!(wire.backend.complaints("left")? == 0, "{}", wire.backend.log_text());
    let mut b = wire.up("right")?;
    stream(&mut a, &mut b, (0..200).map(|_| 60))?;
    wire.end(true)
}

/// The dirty log has every page that a peer's frames were written to, and no other.
#[test]
fn writes_of_the_peer_are_logged() -> Result<()> {
    let wire = Wire::new()?;
    let (mut a, mut b) = (wire.up("left")?, wire.up("right")?);
    let log = lab::rawfront::Memory::memfd(4096)?;
    let payload = [4096u64.to_ne_bytes(), 0u64.to_ne_bytes()].concat();
    b.wire.tell(msg::SET_LOG_BASE, &payload, &[log.fd()])?;
    b.wire.reply_to(msg::SET_LOG_BASE)?;
    b.features |= virtio::LOG_ALL;
    b.wire.tell(msg::SET_FEATURES, &b.features.to_ne_bytes(), &[])?;
    b.wire.ask(msg::GET_FEATURES, &[])?;
    offer_all(b.rx())?;
    a.tx().queue_frame(Front::HEADER_LEN, &frame(1, 1000))?;
    a.tx().kick()?;
    ensure!(eventually(PATIENCE, || b.rx().used_idx().is_ok_and(|used| used == 1)), "no frame");
    let page = b.rx().buffer_guest(0) / 4096;
    let bits = log.read(0, 4096)?;
    ensure!(bits[page as usize / 8] & 1 << (page % 8) != 0, "page {page} is not logged");
    wire.end(false)
}

#[test]
fn announcements_reach_the_peer() -> Result<()> {
    let wire = Wire::new()?;
    let (a, mut b) = (wire.up("left")?, wire.up("right")?);
    offer_all(b.rx())?;
    let mac = [0x52, 0x54, 0, 1, 2, 3, 0, 0];
    a.order(msg::SEND_RARP, &mac, &[])?;
    ensure!(eventually(PATIENCE, || b.rx().used_idx().is_ok_and(|used| used == 1)), "no announcement");
    let got = b.rx().take_received()?;
    ensure!(got[0].len() == 72 && got[0][24..26] == [0x80, 0x35] && got[0][18..24] == mac[..6], "{got:?}");
    wire.end(false)
}

/// Of two MTUs the smaller one holds for both.
#[test]
fn mtus_agree() -> Result<()> {
    let wire = Wire::with("mtu = 1400", "mtu = 1300")?;
    let is_said = || wire.backend.log_text().contains("its MTU is 1300, as that of right");
    ensure!(eventually(PATIENCE, is_said), "{}", wire.backend.log_text());
    let (mut a, mut b) = (wire.up("left")?, wire.up("right")?);
    offer_all(b.rx())?;
    for len in [1322, 1323] {
        a.tx().queue_frame(Front::HEADER_LEN, &frame(1, len))?;
    }
    a.tx().kick()?;
    ensure!(a.tx().is_drained_within(PATIENCE));
    ensure!(b.rx().used_idx()? == 1 && wire.count("right", "rx_dropped_mtu")? == 1);
    wire.end(false)
}

/// Both ports' pairs are served by one worker, whatever their numbers and that of the workers.
#[test]
fn any_number_of_pairs_and_workers() -> Result<()> {
    let port = |name: &str, peer: &str, pairs| {
        format!(
            "[[port]]\nname = '{name}'\nsocket = '@/{name}.sock'\nuplink = 'peer:{peer}'\nqueue-pairs = {pairs}\n"
        )
    };
    let ports = [
        "workers = 3\n",
        &port("x", "right", 1).replace("peer:right", "null"),
        &port("left", "right", 4),
        &port("right", "left", 2),
    ];
    let wire = Wire { backend: Backend::with_config(&ports.concat())? };
    ensure!(eventually(PATIENCE, || wire.socket("right").exists()), "{}", wire.backend.log_text());
    let setup = |queue_pairs| Setup { queue_pairs, ..Setup::default() };
    let (mut a, mut b) = (wire.up_with("left", setup(4))?, wire.up_with("right", setup(2))?);
    for pair in [0, 2] {
        offer_all(&mut b.rings[pair])?;
    }
    for pair in 0..4 {
        let tx = &mut a.rings[2 * pair + 1];
        for number in 0..10 {
            tx.queue_frame(Front::HEADER_LEN, &frame(100 * pair as u32 + number, 200))?;
        }
        tx.kick()?;
        ensure!(tx.is_drained_within(PATIENCE), "pair {pair}");
    }
    let mut numbers = Vec::new();
    for ring in [0, 2] {
        for got in b.rings[ring].take_received()? {
            numbers.push(u32::from_le_bytes([got[26], got[27], got[28], got[29]]));
        }
    }
    numbers.sort_unstable();
    let expected: Vec<_> = (0..4).flat_map(|pair| (0..10).map(move |number| 100 * pair + number)).collect();
    ensure!(numbers == expected, "{numbers:?}");
    wire.end(false)
}
