//! `tx`, `rx` and `both`: packets into the device and out of it, which have nothing to do with each other.
#![forbid(unsafe_code)]

use anyhow::Result;

use super::check::{Incoming, Outgoing};
use super::meter::{Counted, Idle};
use super::port::Port;
use crate::driver::{BURST_MAX, ticks};
use crate::interrupt;

/// Looks at the rings between two looks for a signal.
const INTERRUPTS_EVERY: u32 = 1024;
/// Who comes so late that he would have to send so many packets at once does not send them at all.
const ARREARS_MAX: f64 = 1024.0;

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub struct OpenLoad {
    /// Send.
    pub sends: bool,
    /// Receive.
    pub receives: bool,
    /// Packets to send per tick of the clock; `None`: all that the device takes.
    pub per_tick: Option<f64>,
    /// Pauses of the processor after a look that found nothing.
    pub pauses: u32,
}

/// The load at work.
pub struct Open<'a> {
    load: OpenLoad,
    port: &'a mut Port,
    idle: Idle,
    due: f64,
    /// Until when it was counted what is due.
    paced: u64,
    outgoing: Option<Outgoing>,
    incoming: Option<Incoming>,
}

impl<'a> Open<'a> {
    /// On this port; with the checks that are given.
    pub fn new(
        load: OpenLoad,
        port: &'a mut Port,
        outgoing: Option<Outgoing>,
        incoming: Option<Incoming>,
    ) -> Self {
        Self { load, port, idle: Idle::default(), due: 0.0, paced: ticks(), outgoing, incoming }
    }

    /// Runs for so many ticks.
    pub fn run(&mut self, for_ticks: u64, ticks_per_second: f64) -> Result<Counted> {
        let start = ticks();
        self.idle.cut(start);
        let mut counted = Counted::default();
        // Without checks the loop has no trace of them.
        if self.outgoing.is_some() || self.incoming.is_some() {
            self.rounds::<true>(start, for_ticks, &mut counted)?;
        } else {
            self.rounds::<false>(start, for_ticks, &mut counted)?;
        }
        let end = ticks();
        let took = end - start;
        counted.seconds = took as f64 / ticks_per_second;
        counted.idle_share = self.idle.cut(end) as f64 / took as f64;
        Ok(counted)
    }

    /// What the checks have found, and how much they have looked at.
    pub fn checked(&self) -> (u64, u64) {
        (
            self.outgoing.as_ref().map_or(0, Outgoing::checked),
            self.incoming.as_ref().map_or(0, Incoming::checked),
        )
    }

    fn rounds<const CHECK: bool>(&mut self, start: u64, for_ticks: u64, counted: &mut Counted) -> Result<()> {
        loop {
            for _ in 0..INTERRUPTS_EVERY {
                let now = ticks();
                let mut found = false;
                if self.load.sends {
                    found |= self.transmit::<CHECK>(now, counted)?;
                }
                if self.load.receives {
                    found |= self.receive::<CHECK>(counted)?;
                }
                if found {
                    self.idle.something(now);
                } else {
                    self.idle.nothing(now);
                    (0..self.load.pauses).for_each(|_| std::hint::spin_loop());
                }
                if now.wrapping_sub(start) >= for_ticks {
                    return Ok(());
                }
            }
            interrupt::check()?;
        }
    }

    /// Takes back what was used, and sends as much again, or what is due. False if there was nothing to do.
    #[inline(always)]
    fn transmit<const CHECK: bool>(&mut self, now: u64, counted: &mut Counted) -> Result<bool> {
        let sender = &mut self.port.sender;
        let outgoing = &mut self.outgoing;
        let used = sender.reclaim(|buffers, used| match outgoing {
            Some(check) if CHECK => check.came_back(buffers, used),
            _ => Ok(()),
        })?;
        counted.sent += used as u64;
        let free = usize::from(sender.free());
        let count = match self.load.per_tick {
            None => free.min(BURST_MAX),
            Some(rate) => {
                self.due = (self.due + now.wrapping_sub(self.paced) as f64 * rate).min(ARREARS_MAX);
                self.paced = now;
                (self.due as usize).min(free).min(BURST_MAX)
            }
        };
        if count > 0 {
            sender.send(count, |buffers, id| {
                if CHECK && let Some(check) = outgoing {
                    check.goes(buffers, id);
                }
            });
            self.due = (self.due - count as f64).max(0.0);
        }
        Ok(used > 0 || count > 0)
    }

    #[inline(always)]
    fn receive<const CHECK: bool>(&mut self, counted: &mut Counted) -> Result<bool> {
        let incoming = &mut self.incoming;
        let received = self.port.receiver.receive(|buffers, piece| match incoming {
            Some(check) if CHECK => check.piece(buffers, piece),
            _ => Ok(()),
        })?;
        counted.received += received.packets;
        counted.received_bytes += received.bytes;
        Ok(received.buffers > 0)
    }
}
