//! `tx`, `rx` and `both`: packets into devices and out of them, which have nothing to do with each other.
#![forbid(unsafe_code)]

use anyhow::Result;

use super::check::{Incoming, Outgoing};
use super::meter::{Counted, Idle};
use super::port::Port;
use crate::driver::{BURST_MAX, Ring, ticks};
use crate::interrupt;

/// Looks at the rings between two looks for a signal.
const INTERRUPTS_EVERY: u32 = 1024;
/// Who comes so late that he would have to send more packets at once does not send them at all.
const ARREARS_MAX: f64 = 1024.0;

/// What is to be done at each port.
#[derive(Clone, Copy, Debug)]
pub struct OpenLoad {
    /// Send.
    pub sends: bool,
    /// Receive.
    pub receives: bool,
    /// Pauses of the processor after a look that found nothing.
    pub pauses: u32,
}

/// A port with what is due there.
pub struct OpenPort<R> {
    /// The port.
    pub port: Port<R>,
    /// Packets to send per tick of the clock; `None`: all that the device takes.
    pub per_tick: Option<f64>,
    /// What is sent is numbered, and must stay as it is.
    pub outgoing: Option<Outgoing>,
    /// What comes is looked into.
    pub incoming: Option<Incoming>,
    /// Packets that the device has taken that count.
    pub sent: u64,
    /// Packets that came since then.
    pub received: u64,
    due: f64,
    /// Until when it was counted what is due.
    paced: u64,
}

impl<R> OpenPort<R> {
    /// Nothing is due yet.
    pub fn new(
        port: Port<R>,
        per_tick: Option<f64>,
        outgoing: Option<Outgoing>,
        incoming: Option<Incoming>,
    ) -> Self {
        Self { port, per_tick, outgoing, incoming, sent: 0, received: 0, due: 0.0, paced: ticks() }
    }

    /// What came before does not count.
    pub fn forget(&mut self) {
        (self.sent, self.received) = (0, 0);
    }

    /// Packets that were looked into.
    pub fn checked(&self) -> u64 {
        self.outgoing.as_ref().map_or(0, Outgoing::checked)
            + self.incoming.as_ref().map_or(0, Incoming::checked)
    }
}

/// Runs the load for so many ticks.
pub fn run<R: Ring>(
    load: OpenLoad,
    ports: &mut [OpenPort<R>],
    idle: &mut Idle,
    for_ticks: u64,
) -> Result<Counted> {
    // Without checks the loop has no trace of them.
    if ports.iter().any(|p| p.outgoing.is_some() || p.incoming.is_some()) {
        rounds::<R, true>(load, ports, idle, for_ticks)
    } else {
        rounds::<R, false>(load, ports, idle, for_ticks)
    }
}

fn rounds<R: Ring, const CHECK: bool>(
    load: OpenLoad,
    ports: &mut [OpenPort<R>],
    idle: &mut Idle,
    for_ticks: u64,
) -> Result<Counted> {
    let mut counted = Counted::default();
    let start = ticks();
    idle.cut(start);
    loop {
        for _ in 0..INTERRUPTS_EVERY {
            let mut now = 0;
            for port in &mut *ports {
                now = ticks();
                let mut found = false;
                if load.sends {
                    found |= port.transmit::<CHECK>(now, &mut counted)?;
                }
                if load.receives {
                    found |= port.receive::<CHECK>(&mut counted)?;
                }
                if found {
                    idle.something(now);
                } else {
                    idle.nothing(now);
                    (0..load.pauses).for_each(|_| std::hint::spin_loop());
                }
            }
            let took = now.wrapping_sub(start);
            if took >= for_ticks {
                counted.ticks = took;
                counted.idle_ticks = idle.cut(now);
                return Ok(counted);
            }
        }
        interrupt::check()?;
    }
}

impl<R: Ring> OpenPort<R> {
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
        self.sent += used as u64;
        let free = usize::from(sender.free());
        let count = match self.per_tick {
            None => free.min(BURST_MAX),
            Some(rate) => {
                self.due = (self.due + now.wrapping_sub(self.paced) as f64 * rate).min(ARREARS_MAX);
                self.paced = now;
                let count = (self.due as usize).min(free).min(BURST_MAX);
                self.due -= count as f64;
                count
            }
        };
        if count > 0 {
            sender.send(count, |buffers, id| {
                if CHECK && let Some(check) = outgoing {
                    check.goes(buffers, id);
                }
            });
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
        self.received += received.packets;
        Ok(received.buffers > 0)
    }
}
