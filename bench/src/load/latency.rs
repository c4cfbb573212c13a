//! `latency`: how long a packet takes through one port that echoes, or through two ports to the other end and back; one in
//! flight, or at a rate.
#![forbid(unsafe_code)]

use anyhow::{Result, bail, ensure};
use hdrhistogram::Histogram;
use serde::Serialize;

use super::lane::Piece;
use super::meter::Counted;
use super::port::Port;
use crate::driver::{Buffers, Ring, ticks};
use crate::interrupt;
use crate::packet::{self, Content};

/// Where a packet carries its number: behind what a device may look at, in the first line.
const NUMBER_AT: u64 = 40;
/// Packets whose time of sending is remembered.
const REMEMBERED: usize = 1 << 14;
/// Looks between two looks for a signal.
const INTERRUPTS_EVERY: u32 = 1024;
/// A packet that did not come within so many seconds is lost.
const LOST_AFTER_S: f64 = 0.1;
/// So many lost in a row, and it does not work at all.
const GIVE_UP: u32 = 20;
/// The longest that is told apart, ns.
const LONGEST_NS: u64 = 10_000_000_000;

/// Round trips, ns.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Percentiles {
    /// How many.
    pub packets: u64,
    /// Those that did not come back.
    pub lost: u64,
    /// Shortest.
    pub min_ns: u64,
    /// Half are not longer.
    pub p50_ns: u64,
    /// Nine tenths.
    pub p90_ns: u64,
    /// 99 of 100.
    pub p99_ns: u64,
    /// 999 of 1000.
    pub p999_ns: u64,
    /// Longest.
    pub max_ns: u64,
    /// Mean.
    pub mean_ns: f64,
}

/// What is measured.
pub struct Latency<R> {
    /// The port that sends and, if there is one, the port that answers.
    pub ports: Vec<Port<R>>,
    /// Packets per tick; `None`: one in flight.
    per_tick: Option<f64>,
    pauses: u32,
    ticks_per_second: f64,
    histogram: Histogram<u64>,
    sent: u64,
    /// Number of the next packet that must come.
    next: u64,
    sent_at: Vec<u64>,
    due: f64,
    paced: u64,
    lost: u64,
    lost_in_a_row: u32,
    stamp: Stamp,
}

/// How a packet carries its number: in a word of its first line, or as a numbered packet that can be checked as a whole.
struct Stamp {
    /// Room for a packet if it is to be checked.
    packet: Option<Vec<u8>>,
    checked: u64,
}

impl Stamp {
    fn write(&mut self, buffers: &Buffers, id: u16, number: u64) {
        match &mut self.packet {
            None => buffers.set_word(id, NUMBER_AT, number),
            Some(packet) => {
                packet::build(number, packet);
                buffers.write(id, packet);
            }
        }
    }

    fn read(&mut self, buffers: &Buffers, piece: Piece) -> Result<u64> {
        let Some(packet) = &mut self.packet else { return Ok(buffers.word(piece.used.id, NUMBER_AT)) };
        let len = piece.used.len as usize;
        ensure!(piece.more == 0 && len == packet.len(), "a packet of {len} bytes came back");
        buffers.read(piece.used.id, packet);
        self.checked += 1;
        match packet::look(packet) {
            Content::Ours(number) => Ok(number),
            other => bail!("what came back is {other:?}"),
        }
    }
}

impl<R: Ring> Latency<R> {
    /// Nothing measured yet. With `check`, packets of this length are looked into as a whole.
    pub fn new(
        ports: Vec<Port<R>>,
        per_second: Option<f64>,
        pauses: u32,
        ticks_per_second: f64,
        check: Option<usize>,
    ) -> Result<Self> {
        Ok(Self {
            stamp: Stamp { packet: check.map(|len| vec![0; len]), checked: 0 },
            ports,
            per_tick: per_second.map(|p| p / ticks_per_second),
            pauses,
            ticks_per_second,
            histogram: Histogram::new_with_bounds(1, LONGEST_NS, 3)?,
            sent: 0,
            next: 0,
            sent_at: vec![0; REMEMBERED],
            due: 0.0,
            paced: ticks(),
            lost: 0,
            lost_in_a_row: 0,
        })
    }

    /// Forgets what was measured.
    pub fn clear(&mut self) {
        self.histogram.reset();
        self.lost = 0;
    }

    /// Packets that were looked into.
    pub fn checked(&self) -> u64 {
        self.stamp.checked
    }

    /// What was measured.
    pub fn percentiles(&self) -> Percentiles {
        let h = &self.histogram;
        Percentiles {
            packets: h.len(),
            lost: self.lost,
            min_ns: h.min(),
            p50_ns: h.value_at_quantile(0.5),
            p90_ns: h.value_at_quantile(0.9),
            p99_ns: h.value_at_quantile(0.99),
            p999_ns: h.value_at_quantile(0.999),
            max_ns: h.max(),
            mean_ns: h.mean(),
        }
    }

    /// Runs for so many ticks.
    pub fn run(&mut self, for_ticks: u64) -> Result<Counted> {
        let start = ticks();
        let lost_after = (LOST_AFTER_S * self.ticks_per_second) as u64;
        loop {
            for _ in 0..INTERRUPTS_EVERY {
                let now = ticks();
                if self.may_send(now) {
                    self.send(now);
                }
                if self.ports.len() > 1 {
                    self.answer()?;
                }
                if !self.receive()? {
                    (0..self.pauses).for_each(|_| std::hint::spin_loop());
                }
                let took = now.wrapping_sub(start);
                if took >= for_ticks {
                    return Ok(Counted { ticks: took, ..Counted::default() });
                }
            }
            let oldest = self.sent_at[self.next as usize % REMEMBERED];
            if self.next < self.sent && ticks().wrapping_sub(oldest) > lost_after {
                self.lost += self.sent - self.next;
                self.next = self.sent;
                self.lost_in_a_row += 1;
                ensure!(self.lost_in_a_row < GIVE_UP, "nothing comes back: is there an echo, or a peer?");
            }
            interrupt::check()?;
        }
    }

    fn may_send(&mut self, now: u64) -> bool {
        let Some(rate) = self.per_tick else { return self.next == self.sent };
        self.due = (self.due + now.wrapping_sub(self.paced) as f64 * rate).min(64.0);
        self.paced = now;
        self.due >= 1.0 && self.sent - self.next < REMEMBERED as u64
    }

    fn send(&mut self, now: u64) {
        let sender = &mut self.ports[0].sender;
        if sender.free() == 0 {
            return;
        }
        let number = self.sent;
        self.sent_at[number as usize % REMEMBERED] = now;
        let stamp = &mut self.stamp;
        sender.send(1, |buffers, id| stamp.write(buffers, id, number));
        self.sent += 1;
        self.due -= 1.0;
    }

    /// The other end sends back what came.
    fn answer(&mut self) -> Result<()> {
        let Port { sender, receiver, .. } = &mut self.ports[1];
        let stamp = &mut self.stamp;
        receiver.receive(|buffers, piece| {
            if piece.first {
                let number = stamp.read(buffers, piece)?;
                if sender.free() > 0 {
                    sender.send(1, |buffers, id| stamp.write(buffers, id, number));
                }
            }
            Ok(())
        })?;
        sender.reclaim(|_, _| Ok(()))?;
        Ok(())
    }

    /// True if something came.
    fn receive(&mut self) -> Result<bool> {
        let Self { ports, histogram, sent, next, sent_at, lost, lost_in_a_row, stamp, .. } = self;
        let Port { sender, receiver, .. } = &mut ports[0];
        let to_ns = 1e9 / self.ticks_per_second;
        let received = receiver.receive(|buffers, piece| {
            if !piece.first {
                return Ok(());
            }
            let now = ticks();
            let number = stamp.read(buffers, piece)?;
            ensure!(number < *sent, "packet {number} came back, and only {sent} were sent");
            // Older ones were counted as lost.
            if number >= *next {
                *lost += number - *next;
                *next = number + 1;
                let took = now.wrapping_sub(sent_at[number as usize % REMEMBERED]) as f64 * to_ns;
                histogram.saturating_record(took as u64);
                *lost_in_a_row = 0;
            }
            Ok(())
        })?;
        sender.reclaim(|_, _| Ok(()))?;
        Ok(received.buffers > 0)
    }
}
