//! `vubench tx|rx|both|loop|latency`: a front-end with the burst driver on a back-end's sockets.
//!
//! | file | what |
//! |---|---|
//! | `args` | the command line |
//! | `port`, `lane` | a queue pair of ours on a port; one ring of it |
//! | `open` | `tx`, `rx`, `both` |
//! | `closed`, `latency` | `loop`, `latency` |
//! | `check` | looks into packets |
//! | `meter`, `result` | what is counted, what is said |
//!
//! Here: each load as a function, which the table of all rows calls, too.
#![forbid(unsafe_code)]

mod args;
mod check;
mod closed;
mod lane;
mod latency;
mod meter;
mod open;
mod port;
mod result;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::driver::{Packed, Ring, RingOptions, Split, ticks_per_second};
use crate::packet::{self, HEADER};
pub use args::{LatencyArgs, LoopArgs, OpenArgs, Setup};
use check::{Expect, Incoming, Outgoing};
use closed::{End, Loop};
pub use lane::Touch;
use latency::Latency;
use meter::Idle;
use open::{OpenLoad, OpenPort};
pub use port::guest_memory;
use port::{Port, PortOptions};
pub use result::{IDLE_MIN, Measured};

/// How long the clock is measured.
const CALIBRATION: Duration = Duration::from_millis(20);
/// Feature bits of offloads, which frames longer than an MTU need: CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4 (VIRTIO 1.3
/// §5.1.3).
const OFFLOADS: u64 = 1 | 1 << 1 | 1 << 7 | 1 << 11;

/// Which of the open loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To the device.
    Tx,
    /// From it.
    Rx,
    /// Both at once.
    Both,
}

impl Way {
    fn sends(self) -> bool {
        self != Self::Rx
    }

    fn receives(self) -> bool {
        self != Self::Tx
    }
}

impl Setup {
    fn port<R: Ring>(&self, socket: &Path, burst: u16) -> Result<Port<R>> {
        let options = PortOptions {
            ring_size: self.ring_size,
            ring: RingOptions { event_idx: self.event_idx, in_order: self.in_order },
            hugepages: self.hugepages,
            mergeable: !self.no_mergeable,
            features: if self.frame > packet::FRAME_MAX { OFFLOADS } else { 0 },
            frame: self.frame,
            receive_len: self.receive_len,
        };
        let mut port = Port::open(socket, &options).with_context(|| socket.display().to_string())?;
        port.sender.set_manner(burst, self.touch);
        port.receiver.set_manner(burst);
        Ok(port)
    }

    fn outgoing(&self, wanted: bool) -> Option<Outgoing> {
        (self.check && wanted).then(|| Outgoing::new(self.ring_size, HEADER + self.frame))
    }
}

/// Packets into all ports, or out of them, or both; `pps` has the rate of each port, if it has one.
pub fn run_open(
    setup: &Setup,
    sockets: &[impl AsRef<Path>],
    way: Way,
    pps: &[Option<f64>],
) -> Result<Measured> {
    if setup.packed {
        open::<Packed>(setup, sockets, way, pps)
    } else {
        open::<Split>(setup, sockets, way, pps)
    }
}

fn open<R: Ring>(
    setup: &Setup,
    sockets: &[impl AsRef<Path>],
    way: Way,
    pps: &[Option<f64>],
) -> Result<Measured> {
    let per_second = ticks_per_second(CALIBRATION);
    let mut ports = Vec::new();
    for (socket, pps) in sockets.iter().zip(pps) {
        let port = setup.port::<R>(socket.as_ref(), setup.burst)?;
        let incoming = (setup.check && way.receives()).then(|| Incoming::new(Expect::Anything));
        let rate = pps.map(|p| p / per_second);
        ports.push(OpenPort::new(port, rate, setup.outgoing(way.sends()), incoming));
    }
    let load = OpenLoad { sends: way.sends(), receives: way.receives(), pauses: setup.pauses };
    let mut idle = Idle::default();
    let mut warm = false;
    let mut measured = result::measure(setup, per_second, way.sends(), way.receives(), |ticks| {
        let counted = open::run(load, &mut ports, &mut idle, ticks)?;
        if !std::mem::replace(&mut warm, true) {
            ports.iter_mut().for_each(OpenPort::forget);
        }
        Ok(counted)
    })?;
    for port in &ports {
        port.port.check()?;
        measured.by_port.push(if way.sends() { port.sent } else { port.received });
        measured.kicks += port.port.kicks();
        measured.checked += port.checked();
    }
    ensure!(measured.tx_mpps != Some(0.0), "the back-end has taken no packet");
    ensure!(measured.rx_mpps != Some(0.0), "no packet came from the back-end");
    Ok(measured)
}

/// Ports whose rings run, and that nothing is done with. They go with this.
pub struct Held {
    _ports: Vec<Port<Split>>,
}

/// Connects to all these, and does nothing.
pub fn hold(setup: &Setup, sockets: &[impl AsRef<Path>]) -> Result<Held> {
    let ports = sockets.iter().map(|s| setup.port(s.as_ref(), setup.burst)).collect::<Result<_>>()?;
    Ok(Held { _ports: ports })
}

/// So many packets in flight from each port, or from the first only (`one_way`); one that echoes or two that are connected.
pub fn run_closed(
    setup: &Setup,
    sockets: &[impl AsRef<Path>],
    in_flight: usize,
    one_way: bool,
) -> Result<Measured> {
    if setup.packed {
        closed::<Packed>(setup, sockets, in_flight, one_way)
    } else {
        closed::<Split>(setup, sockets, in_flight, one_way)
    }
}

fn closed<R: Ring>(
    setup: &Setup,
    sockets: &[impl AsRef<Path>],
    in_flight: usize,
    one_way: bool,
) -> Result<Measured> {
    // A burst that is a large part of what is in flight would be waited for in vain.
    let burst = (in_flight / 4).clamp(1, setup.burst.into()) as u16;
    let mut ends = Vec::new();
    for socket in sockets {
        let incoming = setup.check.then(|| Incoming::new(Expect::Ours(setup.frame)));
        ends.push(End::new(setup.port::<R>(socket.as_ref(), burst)?, setup.outgoing(true), incoming));
    }
    let per_second = ticks_per_second(CALIBRATION);
    let senders = if one_way { 1 } else { ends.len() };
    let mut it = Loop::new(ends, senders, in_flight, setup.pauses, per_second);
    let mut measured = result::measure(setup, per_second, true, true, |ticks| it.run(ticks))?;
    if setup.check {
        // What is late is not lost: gaps in the numbers tell.
        measured.lost = it.ends.iter().filter_map(|e| e.incoming.as_ref()).map(Incoming::lost).sum();
    }
    for end in &it.ends {
        end.port.check()?;
        measured.by_port.push(end.received);
        measured.kicks += end.port.kicks();
        measured.checked += end.outgoing.as_ref().map_or(0, Outgoing::checked);
        measured.checked += end.incoming.as_ref().map_or(0, Incoming::checked);
    }
    ensure!(measured.rx_mpps != Some(0.0), "no packet came back");
    Ok(measured)
}

/// Round trips, one in flight or at a rate.
pub fn run_latency(setup: &Setup, sockets: &[impl AsRef<Path>], pps: Option<f64>) -> Result<Measured> {
    if setup.packed { latency::<Packed>(setup, sockets, pps) } else { latency::<Split>(setup, sockets, pps) }
}

fn latency<R: Ring>(setup: &Setup, sockets: &[impl AsRef<Path>], pps: Option<f64>) -> Result<Measured> {
    let ports: Vec<_> = sockets.iter().map(|s| setup.port::<R>(s.as_ref(), 1)).collect::<Result<_>>()?;
    let per_second = ticks_per_second(CALIBRATION);
    let check = setup.check.then_some(HEADER + setup.frame);
    let mut it = Latency::new(ports, pps, setup.pauses, per_second, check)?;
    let mut warm = false;
    let mut measured = result::measure(setup, per_second, false, false, |ticks| {
        let counted = it.run(ticks)?;
        if !std::mem::replace(&mut warm, true) {
            it.clear();
        }
        Ok(counted)
    })?;
    let round_trip = it.percentiles();
    for port in &it.ports {
        port.check()?;
        measured.kicks += port.kicks();
    }
    measured.checked = it.checked();
    measured.lost = round_trip.lost;
    measured.round_trip = Some(round_trip);
    ensure!(round_trip.packets > 0, "no packet came back");
    Ok(measured)
}
