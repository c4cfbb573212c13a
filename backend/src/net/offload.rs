//! Whether a guest takes a frame as another guest sent it, or what has to be done first. Pure; on headers that were checked
//! against what their sender may ask for ([`super::header`]).
#![forbid(unsafe_code)]

use super::features::has;
use super::header::{FRAME_LEN_MIN, VirtioNetHdr};
use virtio_bindings::virtio_net::*;

/// Two VLAN tags, bytes.
const TAGS_LEN: u64 = 8;
const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;

/// What has to be done to a frame before its receiver may have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Nothing.
    AsIs,
    /// Its header says more than it may.
    Clean,
    /// Its checksum is to be filled in.
    Complete,
    /// It is to be cut into segments.
    Segment,
    /// It is longer than the receiver's MTU.
    TooLong,
}

/// What the receiver of frames takes.
#[derive(Clone, Copy, Debug)]
pub struct Taker {
    csum: bool,
    /// A bit for each segmentation type.
    gso: u32,
    ecn: bool,
    mtu: u16,
}

impl Taker {
    /// A receiver whose driver has acknowledged `features`, and whose layer-3 packets are `mtu` bytes long at most.
    pub fn new(features: u64, mtu: u16) -> Self {
        let csum = has(features, VIRTIO_NET_F_GUEST_CSUM);
        // Nothing tells which IP a UDP datagram is of, so both are wanted.
        let uso = has(features, VIRTIO_NET_F_GUEST_USO4) && has(features, VIRTIO_NET_F_GUEST_USO6);
        let takes = |yes: bool, kind: u32| if yes && csum { 1 << kind } else { 0 };
        let gso = takes(has(features, VIRTIO_NET_F_GUEST_TSO4), VIRTIO_NET_HDR_GSO_TCPV4)
            | takes(has(features, VIRTIO_NET_F_GUEST_TSO6), VIRTIO_NET_HDR_GSO_TCPV6)
            | takes(has(features, VIRTIO_NET_F_GUEST_UFO), VIRTIO_NET_HDR_GSO_UDP)
            | takes(uso, VIRTIO_NET_HDR_GSO_UDP_L4);
        Self { csum, gso, ecn: has(features, VIRTIO_NET_F_GUEST_ECN), mtu }
    }

    /// Whether a frame of `len` bytes (without header) may pass whose header begins with `start`, a little-endian number. The
    /// short form of [`Self::way`]: false means that one knows.
    #[inline(always)]
    pub fn passes(&self, start: u64, len: usize) -> bool {
        if start & 0xffff == 0 { len as u64 <= self.len_max() } else { self.passes_offloads(start, len) }
    }

    fn passes_offloads(&self, start: u64, len: usize) -> bool {
        let (flags, kind, size) = (start as u8, (start >> 8) as u8, (start >> 32) as u16);
        flags == NEEDS_CSUM
            && match kind {
                0 => self.csum && len as u64 <= self.len_max(),
                kind => kind & !ECN != 0 && self.takes(kind) && size <= self.mtu,
            }
    }

    /// Longest frame that is not to be cut, without header, bytes.
    #[inline(always)]
    pub fn len_max(&self) -> u64 {
        FRAME_LEN_MIN + TAGS_LEN + u64::from(self.mtu)
    }

    fn takes(&self, kind: u8) -> bool {
        self.gso.checked_shr(u32::from(kind & !ECN)).is_some_and(|gso| gso & 1 != 0)
            && (kind & ECN == 0 || self.ecn)
    }

    /// What has to be done to a frame of `len` bytes (without header).
    pub fn way(&self, header: &VirtioNetHdr, len: u64) -> Way {
        if header.gso_type != 0 {
            // Other flags than this were refused, or mean nothing.
            return match header.flags & NEEDS_CSUM != 0 && self.takes(header.gso_type) {
                _ if header.gso_size.get() > self.mtu => Way::TooLong,
                false => Way::Segment,
                true if header.flags != NEEDS_CSUM => Way::Clean,
                true => Way::AsIs,
            };
        }
        match header.flags {
            _ if len > self.len_max() => Way::TooLong,
            0 => Way::AsIs,
            flags if flags & NEEDS_CSUM == 0 => Way::Clean,
            _ if !self.csum => Way::Complete,
            NEEDS_CSUM => Way::AsIs,
            _ => Way::Clean,
        }
    }
}

impl VirtioNetHdr {
    /// The header without flags that a sender has no say about: DATA_VALID is for a device that has looked.
    pub fn cleaned(self) -> Self {
        let flags = self.flags & NEEDS_CSUM;
        if flags == 0 && self.gso_type == 0 { Self::default() } else { Self { flags, ..self } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn bit(feature: u32) -> u64 {
        1 << feature
    }
    const ALL: u64 = bit(VIRTIO_NET_F_GUEST_CSUM)
        | bit(VIRTIO_NET_F_GUEST_TSO4)
        | bit(VIRTIO_NET_F_GUEST_TSO6)
        | bit(VIRTIO_NET_F_GUEST_ECN)
        | bit(VIRTIO_NET_F_GUEST_USO4)
        | bit(VIRTIO_NET_F_GUEST_USO6);

    fn header(flags: u8, gso_type: u8) -> VirtioNetHdr {
        VirtioNetHdr { flags, gso_type, gso_size: 1448.into(), ..Default::default() }
    }

    fn way(features: u64, flags: u8, gso_type: u8) -> Way {
        Taker::new(features, 1500).way(&header(flags, gso_type), 1000)
    }

    #[test]
    fn what_was_acknowledged_passes() {
        assert_eq!(way(0, 0, 0), Way::AsIs);
        assert_eq!((way(ALL, 1, 0), way(0, 1, 0)), (Way::AsIs, Way::Complete));
        for (kind, feature) in
            [(1, VIRTIO_NET_F_GUEST_TSO4), (4, VIRTIO_NET_F_GUEST_TSO6), (5, VIRTIO_NET_F_GUEST_USO6)]
        {
            assert_eq!(way(ALL, 1, kind), Way::AsIs);
            assert_eq!(way(ALL & !bit(feature), 1, kind), Way::Segment);
            assert_eq!(way(ALL & !bit(VIRTIO_NET_F_GUEST_CSUM), 1, kind), Way::Segment);
        }
        assert_eq!(way(ALL, 1, 0x81), Way::AsIs);
        assert_eq!(way(ALL & !bit(VIRTIO_NET_F_GUEST_ECN), 1, 0x81), Way::Segment);
        assert_eq!(way(ALL, 1, 0x7f), Way::Segment);
    }

    /// VIRTIO 1.3 §5.1.6.4.1: DATA_VALID is said of packets that were looked at.
    #[test]
    fn nobody_vouches_for_a_checksum_to_another_guest() {
        assert_eq!((way(ALL, 2, 0), way(ALL, 3, 0), way(ALL, 3, 1)), (Way::Clean, Way::Clean, Way::Clean));
        assert_eq!(header(2, 0).cleaned(), VirtioNetHdr::default());
        assert_eq!(header(3, 1).cleaned(), header(1, 1));
    }

    #[test]
    fn mtus_are_kept() {
        let taker = Taker::new(ALL, 1400);
        let plain = VirtioNetHdr::default();
        assert_eq!((taker.way(&plain, 1422), taker.way(&plain, 1423)), (Way::AsIs, Way::TooLong));
        assert_eq!(taker.way(&header(1, 1), 60_000), Way::TooLong);
        assert_eq!(Taker::new(ALL, 1448).way(&header(1, 1), 60_000), Way::AsIs);
    }

    proptest! {
        /// The short form never lets pass what the long one would not.
        #[test]
        fn both_forms_agree(bytes in any::<[u8; 12]>(), features: u64, mtu: u16, len in 14u64..70_000) {
            let taker = Taker::new(features, mtu);
            let header = VirtioNetHdr::parse(&bytes);
            let start = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            if taker.passes(start, len as usize) {
                prop_assert_eq!(taker.way(&header, len), Way::AsIs);
            }
            let plain = u64::from(header.hdr_len.get()) << 16;
            prop_assert_eq!(taker.passes(plain, len as usize), len <= 22 + u64::from(mtu));
        }
    }
}
