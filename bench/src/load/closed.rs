//! `loop`: so many packets in flight, each sent as soon as one has come back. Through one port that echoes, or in both
//! directions between two ports that the back-end connects.
#![forbid(unsafe_code)]

use anyhow::{Result, ensure};

use super::check::{Incoming, Outgoing};
use super::meter::{Counted, Idle};
use super::port::Port;
use crate::driver::{BURST_MAX, Ring, ticks};
use crate::interrupt;

/// Rounds between two looks for a signal.
const INTERRUPTS_EVERY: u32 = 1024;
/// If nothing came for so many seconds, what is in flight is lost.
const LOST_AFTER_S: f64 = 0.05;
/// A loop whose packets were lost so often in a row does not work at all.
const GIVE_UP: u32 = 20;

/// One end of the loop.
pub struct End<R> {
    /// The port.
    pub port: Port<R>,
    /// What is sent from it is numbered.
    pub outgoing: Option<Outgoing>,
    /// What comes to it must be whole and in order.
    pub incoming: Option<Incoming>,
    /// Packets that came to it since the beginning.
    pub received: u64,
    /// Packets sent from here that did not come to the other end.
    in_flight: usize,
}

impl<R> End<R> {
    /// Nothing was sent.
    pub fn new(port: Port<R>, outgoing: Option<Outgoing>, incoming: Option<Incoming>) -> Self {
        Self { port, outgoing, incoming, received: 0, in_flight: 0 }
    }
}

/// The loop.
pub struct Loop<R> {
    /// One end, which is its own other end, or two.
    pub ends: Vec<End<R>>,
    /// How many of the ends send.
    senders: usize,
    /// Packets in flight from each of them.
    window: usize,
    pauses: u32,
    idle: Idle,
    lost_after: u64,
    moved: u64,
    lost_in_a_row: u32,
}

impl<R: Ring> Loop<R> {
    /// With so many packets in flight from each of the first `senders` ends.
    pub fn new(ends: Vec<End<R>>, senders: usize, window: usize, pauses: u32, ticks_per_second: f64) -> Self {
        let lost_after = (LOST_AFTER_S * ticks_per_second) as u64;
        Self {
            ends,
            senders,
            window,
            pauses,
            idle: Idle::default(),
            lost_after,
            moved: ticks(),
            lost_in_a_row: 0,
        }
    }

    /// Runs for so many ticks.
    pub fn run(&mut self, for_ticks: u64) -> Result<Counted> {
        if self.ends.iter().any(|e| e.outgoing.is_some()) {
            self.rounds::<true>(for_ticks)
        } else {
            self.rounds::<false>(for_ticks)
        }
    }

    fn rounds<const CHECK: bool>(&mut self, for_ticks: u64) -> Result<Counted> {
        let mut counted = Counted::default();
        let start = ticks();
        self.idle.cut(start);
        loop {
            for _ in 0..INTERRUPTS_EVERY {
                let now = ticks();
                let mut found = false;
                for i in 0..self.ends.len() {
                    found |= self.turn::<CHECK>(i, &mut counted)?;
                }
                if found {
                    self.idle.something(now);
                    self.moved = now;
                } else {
                    self.idle.nothing(now);
                    (0..self.pauses).for_each(|_| std::hint::spin_loop());
                }
                let took = now.wrapping_sub(start);
                if took >= for_ticks {
                    counted.ticks = took;
                    counted.idle_ticks = self.idle.cut(now);
                    return Ok(counted);
                }
            }
            self.look_for_lost(&mut counted)?;
            interrupt::check()?;
        }
    }

    /// One end receives, takes back what was sent, and sends what may be in flight.
    #[inline(always)]
    fn turn<const CHECK: bool>(&mut self, i: usize, counted: &mut Counted) -> Result<bool> {
        let End { port, outgoing, incoming, received: all, .. } = &mut self.ends[i];
        let received = port.receiver.receive(|buffers, piece| match incoming {
            Some(check) if CHECK => check.piece(buffers, piece),
            _ => Ok(()),
        })?;
        let used = port.sender.reclaim(|buffers, used| match outgoing {
            Some(check) if CHECK => check.came_back(buffers, used),
            _ => Ok(()),
        })?;
        counted.received += received.packets;
        counted.received_bytes += received.bytes;
        counted.sent += used as u64;
        *all += received.packets;
        if received.packets > 0 {
            self.lost_in_a_row = 0;
            let other = self.ends.len() - 1 - i;
            let in_flight = &mut self.ends[other].in_flight;
            *in_flight = in_flight.saturating_sub(received.packets as usize);
        }
        let End { port, outgoing, in_flight, .. } = &mut self.ends[i];
        let window = if i < self.senders { self.window } else { 0 };
        let room = window.saturating_sub(*in_flight);
        let count = room.min(port.sender.free().into()).min(BURST_MAX);
        if count > 0 {
            port.sender.send(count, |buffers, id| {
                if CHECK && let Some(check) = outgoing {
                    check.goes(buffers, id);
                }
            });
            *in_flight += count;
        }
        Ok(received.buffers > 0 || used > 0 || count > 0)
    }

    fn look_for_lost(&mut self, counted: &mut Counted) -> Result<()> {
        let now = ticks();
        if now.wrapping_sub(self.moved) < self.lost_after {
            return Ok(());
        }
        for end in &mut self.ends {
            counted.lost += std::mem::take(&mut end.in_flight) as u64;
        }
        self.moved = now;
        self.lost_in_a_row += 1;
        ensure!(self.lost_in_a_row < GIVE_UP, "nothing comes back: is there an echo, or a peer?");
        Ok(())
    }
}
