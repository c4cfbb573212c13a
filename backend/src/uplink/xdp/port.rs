//! A port's share of an interface, as control sees it.
//!
//! Not here: its queues at work (`queue`), what it shares with other ports (`nic`).
#![forbid(unsafe_code)]

use super::nic::{Nic, PortState};
use super::switch::Link;
use crate::uplink::{Capabilities, FrameFormat, Uplink};
use std::borrow::Cow;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use virtio_bindings::virtio_net as vn;

/// One port of an interface.
pub struct XdpPort {
    nic: Arc<Nic>,
    port: Arc<PortState>,
    description: String,
}

impl XdpPort {
    pub(super) fn new(nic: Arc<Nic>, port: Arc<PortState>) -> Self {
        let description = format!("xdp:{}", nic.interface.name());
        Self { nic, port, description }
    }

    /// The group of a pair: pairs of one group, of whichever port of the interface, must be served by one worker.
    pub fn group_of(&self, pair: u16) -> u32 {
        self.nic.topology.group_of(pair.into())
    }
}

impl Uplink for XdpPort {
    fn describe(&self) -> &str {
        &self.description
    }

    fn capabilities(&self) -> Capabilities {
        // Checksums are completed in our copy of a frame. Nothing is segmented, and what arrives is passed on as it is.
        Capabilities { offloads: 1 << vn::VIRTIO_NET_F_CSUM, mtu: self.nic.mtu }
    }

    fn configure(&self, format: FrameFormat) -> io::Result<()> {
        self.port.header_len.store(format.header_len, Ordering::Relaxed);
        Ok(())
    }

    fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        // The interface is not this port's alone.
        if mtu <= self.nic.mtu {
            return Ok(());
        }
        Err(io::Error::other(format!("the interface's MTU is {}", self.nic.mtu)))
    }

    fn set_queue_active(&self, queue: u16, active: bool) -> io::Result<()> {
        self.nic.set_active(&self.port, queue, active)
    }

    fn announce(&self, frame: &[u8]) -> io::Result<()> {
        let frame = &*in_vlan(frame, self.port.rules.vlan);
        // Past our TX rings, which belong to the workers.
        self.nic.interface.send(frame)?;
        let Some(link) = Link::of(frame) else { return Ok(()) };
        if self.port.rules.mac.is_none() {
            self.nic.learn(&self.port, link.source);
        }
        if self.port.rules.local_switch {
            self.nic.flood_local(self.port.index, &link, frame, 0);
        }
        Ok(())
    }

    fn front_end_left(&self) {
        self.port.stale.store(true, Ordering::Relaxed);
    }

    fn report(&self) -> String {
        self.nic.report(&self.port)
    }
}

/// An untagged frame as one of the port's VLAN, if it has one: its guest would tag it.
fn in_vlan(frame: &[u8], vlan: Option<u16>) -> Cow<'_, [u8]> {
    match (vlan, frame.split_at_checked(12)) {
        (Some(vlan), Some((addresses, rest))) => {
            let [high, low] = vlan.to_be_bytes();
            [addresses, &[0x81, 0x00, high, low], rest].concat().into()
        }
        _ => frame.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_are_in_the_ports_vlan() {
        let frame = crate::net::rarp::frame([2, 0, 0, 0, 0, 7]);
        assert_eq!(*in_vlan(&frame, None), frame);
        let tagged = in_vlan(&frame, Some(0x123));
        assert_eq!(
            (&tagged[..12], &tagged[12..16], &tagged[16..]),
            (&frame[..12], &[0x81, 0, 1, 0x23][..], &frame[12..])
        );
        let (plain, link) = (Link::of(&frame).unwrap(), Link::of(&tagged).unwrap());
        assert_eq!(link, Link { vlan: 0x123, tags: 1, ..plain });
        assert_eq!(*in_vlan(&frame[..11], Some(1)), frame[..11]);
    }
}
