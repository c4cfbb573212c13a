//! Which virtio features a port offers, and what the acknowledged ones mean for its frames.
//!
//! Only what the uplink was probed to do is offered.
#![forbid(unsafe_code)]

use crate::uplink::{Capabilities, FrameFormat};
use virtio_bindings::{virtio_config as vc, virtio_net as vn, virtio_ring as vr};

/// vhost-user: F_LOG_ALL, dirty logging of everything the device writes.
pub const F_LOG_ALL: u64 = 1 << 26;
/// vhost-user: F_PROTOCOL_FEATURES.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// VIRTIO_F_ANY_LAYOUT, implied by VERSION_1.
pub const F_ANY_LAYOUT: u64 = 1 << 27;

const fn bit(n: u32) -> u64 {
    1 << n
}

/// Every offload feature an uplink may be able to honour.
pub const OFFLOADS: u64 = bit(vn::VIRTIO_NET_F_CSUM)
    | bit(vn::VIRTIO_NET_F_GUEST_CSUM)
    | bit(vn::VIRTIO_NET_F_GUEST_TSO4)
    | bit(vn::VIRTIO_NET_F_GUEST_TSO6)
    | bit(vn::VIRTIO_NET_F_GUEST_ECN)
    | bit(vn::VIRTIO_NET_F_GUEST_USO4)
    | bit(vn::VIRTIO_NET_F_GUEST_USO6)
    | bit(vn::VIRTIO_NET_F_HOST_TSO4)
    | bit(vn::VIRTIO_NET_F_HOST_TSO6)
    | bit(vn::VIRTIO_NET_F_HOST_ECN)
    | bit(vn::VIRTIO_NET_F_HOST_USO);

/// Features that decide on the header's length.
pub const HEADER_FEATURES: u64 = bit(vc::VIRTIO_F_VERSION_1) | bit(vn::VIRTIO_NET_F_MRG_RXBUF);

/// Features that make the device hand over frames larger than the MTU.
const LARGE_RECEIVE: u64 = bit(vn::VIRTIO_NET_F_GUEST_TSO4)
    | bit(vn::VIRTIO_NET_F_GUEST_TSO6)
    | bit(vn::VIRTIO_NET_F_GUEST_UFO)
    | bit(vn::VIRTIO_NET_F_GUEST_USO4)
    | bit(vn::VIRTIO_NET_F_GUEST_USO6);

/// What a port offers on an uplink with these capabilities.
pub fn offered(uplink: &Capabilities, queue_pairs: u16) -> u64 {
    let mut features = (uplink.offloads & OFFLOADS)
        | bit(vn::VIRTIO_NET_F_MRG_RXBUF)
        | bit(vn::VIRTIO_NET_F_MTU)
        | bit(vn::VIRTIO_NET_F_STATUS)
        // The control queue is the VMM's; it asks us for leave to offer what it does there.
        | bit(vn::VIRTIO_NET_F_CTRL_VQ)
        | bit(vn::VIRTIO_NET_F_CTRL_RX)
        | bit(vn::VIRTIO_NET_F_CTRL_RX_EXTRA)
        | bit(vn::VIRTIO_NET_F_CTRL_VLAN)
        | bit(vn::VIRTIO_NET_F_CTRL_MAC_ADDR)
        | bit(vn::VIRTIO_NET_F_GUEST_ANNOUNCE)
        | bit(vr::VIRTIO_RING_F_INDIRECT_DESC)
        | bit(vr::VIRTIO_RING_F_EVENT_IDX)
        | bit(vc::VIRTIO_F_VERSION_1)
        // QEMU asks for these two with packed=on and in_order=on only. A guest that has them can migrate to where they are
        // offered, and nowhere else.
        | bit(vc::VIRTIO_F_RING_PACKED)
        | bit(vc::VIRTIO_F_IN_ORDER)
        | F_ANY_LAYOUT
        | F_LOG_ALL
        | F_PROTOCOL_FEATURES;
    if queue_pairs > 1 {
        features |= bit(vn::VIRTIO_NET_F_MQ);
    }
    features
}

/// True if `feature` (a bit number) is in `features`.
#[inline]
pub fn has(features: u64, feature: u32) -> bool {
    features & bit(feature) != 0
}

/// Length of the virtio-net header, bytes (VIRTIO 1.3 §5.1.6.1): `num_buffers` is there with VERSION_1 or
/// MRG_RXBUF.
pub fn header_len(features: u64) -> usize {
    if has(features, vc::VIRTIO_F_VERSION_1) || has(features, vn::VIRTIO_NET_F_MRG_RXBUF) { 12 } else { 10 }
}

/// True if received frames may be larger than the MTU.
pub fn large_receive(features: u64) -> bool {
    features & LARGE_RECEIVE != 0
}

/// How frames look on the uplink once these features are acknowledged.
pub fn frame_format(features: u64) -> FrameFormat {
    FrameFormat { header_len: header_len(features), features }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offers_only_what_the_uplink_can() {
        let none = offered(&Capabilities { offloads: 0, mtu: 1500 }, 1);
        assert_eq!(none & OFFLOADS, 0);
        assert!(!has(none, vn::VIRTIO_NET_F_MQ));
        let all = offered(&Capabilities { offloads: u64::MAX, mtu: 1500 }, 4);
        assert_eq!(all & OFFLOADS, OFFLOADS);
        assert!(has(all, vn::VIRTIO_NET_F_MQ));
        assert!(has(none, vc::VIRTIO_F_RING_PACKED) && has(none, vc::VIRTIO_F_IN_ORDER));
    }

    /// VIRTIO 1.3 §5.1.6.1
    #[test]
    fn header_length_follows_version_1_and_mergeable() {
        assert_eq!(header_len(0), 10);
        assert_eq!(header_len(bit(vn::VIRTIO_NET_F_MRG_RXBUF)), 12);
        assert_eq!(header_len(bit(vc::VIRTIO_F_VERSION_1)), 12);
    }
}
