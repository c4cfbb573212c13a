//! The XDP uplink: AF_XDP sockets on an interface, which any number of ports share.
//!
//! ```text
//!           guest A          guest B                each pair: RX and TX ring of its socket(s), an inbox
//!          ┌───┴───┐        ┌───┴───┐
//!        pair 0  pair 1   pair 0  pair 1   ◄─────── inbox: broadcasts, frames of local ports
//!          │ ╲     │ ╲      │       │
//!   NIC queue 0: memory, FILL, COMPLETION           all pairs of a NIC queue are served by one worker
//!          │       NIC queue 1: …
//!   XDP program: MAC (VLAN) ─► port, flow hash ─► socket; broadcast ─► the queue's first socket; else ─► stack
//! ```
//! One copy each way, between guest memory and frame memory. What the guest's driver leaves to the device (checksums) is
//! done here, in our copy; segmentation is not offered. Not here: the program itself (`ebpf/`).

mod error;
mod frames;
mod inbox;
mod interface;
mod lane_set;
mod nic;
mod nic_queue;
mod outgoing;
mod pace;
mod port;
pub mod program;
mod queue;
mod rings;
mod socket;
mod switch;
mod topology;
mod umem;

pub use error::XdpError;
pub use nic::{Nic, NicOptions, PortOptions};
pub use port::XdpPort;
pub use queue::XdpQueue;
pub use socket::ZeroCopy;
pub use switch::Rules;

/// Opens an interface for all its ports: each port's uplink with a queue for each of its pairs, in order.
///
/// # Errors
/// An [`XdpError`] that says what to do.
pub fn open(
    interface: &str,
    options: &NicOptions,
    ports: &[PortOptions],
) -> Result<Vec<(XdpPort, Vec<XdpQueue>)>, XdpError> {
    let (nic, parts) = Nic::open(interface, options, ports)?;
    tracing::info!("xdp:{interface}: {}", nic.describe());
    let ports = nic.ports.clone();
    Ok(ports
        .iter()
        .zip(parts)
        .map(|(port, pairs)| {
            let queues = (0..)
                .zip(pairs)
                .map(|(pair, parts)| XdpQueue::new(nic.clone(), port.clone(), pair, parts))
                .collect();
            (XdpPort::new(nic.clone(), port.clone()), queues)
        })
        .collect())
}
