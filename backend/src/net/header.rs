//! The virtio-net header: our own copy, taken once, checked before anybody acts on it (VIRTIO 1.3 §5.1.6).
//! The guest may change its own while we look, so what is checked here is what goes to the uplink.
//! Which features are offered, and how a header reaches an uplink, is decided elsewhere.
#![forbid(unsafe_code)]

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::*;
use zerocopy::byteorder::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Length with VIRTIO_F_VERSION_1 or VIRTIO_NET_F_MRG_RXBUF, bytes.
pub const HDR_LEN: usize = 12;

/// Length without either (legacy: no `num_buffers`), bytes.
pub const HDR_LEN_LEGACY: usize = 10;

/// Shortest frame: an Ethernet header.
pub const FRAME_LEN_MIN: u64 = 14;

/// Longest frame: an IP packet of 65,535 bytes behind an Ethernet header with two VLAN tags
/// (§5.1.6.3.1 asks for receive buffers of 65,562 = 65,550 + 12 bytes, which is one tag less).
pub const FRAME_LEN_MAX: u64 = 14 + 4 + 4 + 65_535;

/// Bytes of a checksum field.
const CSUM_LEN: u64 = 2;

const FLAGS_KNOWN: u8 = (VIRTIO_NET_HDR_F_NEEDS_CSUM | VIRTIO_NET_HDR_F_DATA_VALID) as u8;
const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const GSO_ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;
const GSO_NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// `struct virtio_net_hdr`, little-endian (VERSION_1; legacy guests are those of little-endian machines).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct VirtioNetHdr {
    /// `VIRTIO_NET_HDR_F_…`.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_…`, with ECN as its highest bit.
    pub gso_type: u8,
    /// Bytes of headers in front of the payload that is to be cut; a hint.
    pub hdr_len: U16,
    /// Payload bytes of each segment.
    pub gso_size: U16,
    /// Where checksumming begins, bytes into the frame.
    pub csum_start: U16,
    /// Where the checksum goes, bytes from `csum_start`.
    pub csum_offset: U16,
    /// Receive buffers that this frame takes (mergeable receive buffers); absent in legacy headers.
    pub num_buffers: U16,
}

/// What is wrong with a header or the length of its frame. The guest's (or the uplink's) fault; the frame is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Shorter than an Ethernet header.
    #[error("frame of {0} bytes")]
    FrameTooShort(u64),
    /// Longer than [`FRAME_LEN_MAX`].
    #[error("frame of {0} bytes")]
    FrameTooLong(u64),
    /// A flag that no header sent to a device has.
    #[error("unknown header flags {0:#x}")]
    UnknownFlags(u8),
    /// A checksum is asked for without VIRTIO_NET_F_CSUM.
    #[error("checksum offload was not negotiated")]
    CsumNotNegotiated,
    /// The checksum lies outside the frame (CVE-2024-11614).
    #[error("checksum at {start}+{offset} in a frame of {frame_len} bytes")]
    CsumOutside {
        /// `csum_start`.
        start: u16,
        /// `csum_offset`.
        offset: u16,
        /// Bytes of the frame.
        frame_len: u64,
    },
    /// A kind of segmentation that was not negotiated, or does not exist.
    #[error("segmentation type {0:#x} was not negotiated or is unknown")]
    GsoType(u8),
    /// ECN without its feature, or with a type that is not TCP.
    #[error("ECN in segmentation type {0:#x} was not negotiated or makes no sense")]
    Ecn(u8),
    /// Segments of no payload.
    #[error("segments of size 0")]
    GsoSizeZero,
    /// Segmentation without a checksum to fill in (§5.1.6.2).
    #[error("segmentation without checksum offload")]
    GsoWithoutCsum,
    /// Headers longer than the frame.
    #[error("headers of {hdr_len} bytes in a frame of {frame_len}")]
    HdrLen {
        /// `hdr_len`.
        hdr_len: u16,
        /// Bytes of the frame.
        frame_len: u64,
    },
}

/// Bytes of the header in front of each frame, for these negotiated features.
#[inline]
pub fn header_len(features: u64) -> usize {
    if features & (bit(VIRTIO_F_VERSION_1) | bit(VIRTIO_NET_F_MRG_RXBUF)) != 0 {
        HDR_LEN
    } else {
        HDR_LEN_LEGACY
    }
}

/// Whether a frame of this length (without header) may pass.
#[inline]
pub fn check_frame_len(frame_len: u64) -> Result<(), HeaderError> {
    match frame_len {
        FRAME_LEN_MIN..=FRAME_LEN_MAX => Ok(()),
        ..FRAME_LEN_MIN => Err(HeaderError::FrameTooShort(frame_len)),
        _ => Err(HeaderError::FrameTooLong(frame_len)),
    }
}

impl VirtioNetHdr {
    /// The header in a copy of its bytes: 12, or 10 of a legacy guest. Bytes that are not there count as 0, those
    /// behind the header are not looked at.
    #[inline]
    pub fn parse(bytes: &[u8]) -> Self {
        let mut whole = [0; HDR_LEN];
        let len = bytes.len().min(HDR_LEN);
        whole[..len].copy_from_slice(&bytes[..len]);
        zerocopy::transmute!(whole)
    }

    /// The header as `len` bytes, 10 or 12 ([`header_len`]).
    #[inline]
    pub fn bytes(&self, len: usize) -> &[u8] {
        &self.as_bytes()[..len]
    }

    /// Checks a header that the driver sent in front of a frame of `frame_len` bytes, having acknowledged `features`
    /// (VIRTIO 1.3 §5.1.6.2). A header that passes may go to a tap as it is.
    #[inline]
    pub fn check(&self, frame_len: u64, features: u64) -> Result<(), HeaderError> {
        check_frame_len(frame_len)?;
        // Most frames ask for nothing.
        if self.flags == 0 && self.gso_type == GSO_NONE {
            return self.check_hdr_len(frame_len);
        }
        self.check_offloads(frame_len, features)
    }

    fn check_offloads(&self, frame_len: u64, features: u64) -> Result<(), HeaderError> {
        // DATA_VALID means nothing in this direction and is ignored (§5.1.6.2.2). Others would have to be ignored too, but
        // no driver sets them, RSC_INFO changes the meaning of the checksum fields, and what passes goes on as it is.
        if self.flags & !FLAGS_KNOWN != 0 {
            return Err(HeaderError::UnknownFlags(self.flags));
        }
        if self.flags & NEEDS_CSUM != 0 {
            if features & bit(VIRTIO_NET_F_CSUM) == 0 {
                return Err(HeaderError::CsumNotNegotiated);
            }
            let (start, offset) = (self.csum_start.get(), self.csum_offset.get());
            if u64::from(start) + u64::from(offset) + CSUM_LEN > frame_len {
                return Err(HeaderError::CsumOutside { start, offset, frame_len });
            }
        }
        if self.gso_type != GSO_NONE {
            self.check_gso(features)?;
        }
        self.check_hdr_len(frame_len)
    }

    fn check_gso(&self, features: u64) -> Result<(), HeaderError> {
        let kind = u32::from(self.gso_type & !GSO_ECN);
        let (feature, tcp) = match kind {
            VIRTIO_NET_HDR_GSO_TCPV4 => (VIRTIO_NET_F_HOST_TSO4, true),
            VIRTIO_NET_HDR_GSO_TCPV6 => (VIRTIO_NET_F_HOST_TSO6, true),
            VIRTIO_NET_HDR_GSO_UDP_L4 => (VIRTIO_NET_F_HOST_USO, false),
            VIRTIO_NET_HDR_GSO_UDP => (VIRTIO_NET_F_HOST_UFO, false),
            _ => return Err(HeaderError::GsoType(self.gso_type)),
        };
        if features & bit(feature) == 0 {
            return Err(HeaderError::GsoType(self.gso_type));
        }
        if self.gso_type & GSO_ECN != 0 && (!tcp || features & bit(VIRTIO_NET_F_HOST_ECN) == 0) {
            return Err(HeaderError::Ecn(self.gso_type));
        }
        if self.gso_size.get() == 0 {
            return Err(HeaderError::GsoSizeZero);
        }
        if self.flags & NEEDS_CSUM == 0 {
            return Err(HeaderError::GsoWithoutCsum);
        }
        Ok(())
    }

    #[inline]
    fn check_hdr_len(&self, frame_len: u64) -> Result<(), HeaderError> {
        let hdr_len = self.hdr_len.get();
        if u64::from(hdr_len) > frame_len {
            return Err(HeaderError::HdrLen { hdr_len, frame_len });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: u64 = bit(VIRTIO_NET_F_CSUM)
        | bit(VIRTIO_NET_F_HOST_TSO4)
        | bit(VIRTIO_NET_F_HOST_TSO6)
        | bit(VIRTIO_NET_F_HOST_ECN)
        | bit(VIRTIO_NET_F_HOST_UFO)
        | bit(VIRTIO_NET_F_HOST_USO);

    fn tso(gso_type: u32) -> VirtioNetHdr {
        VirtioNetHdr {
            flags: NEEDS_CSUM,
            gso_type: gso_type as u8,
            hdr_len: 54.into(),
            gso_size: 1448.into(),
            csum_start: 34.into(),
            csum_offset: 16.into(),
            num_buffers: 0.into(),
        }
    }

    #[test]
    fn fields_are_where_the_spec_puts_them() {
        let bytes = [1, 4, 0x36, 0, 0xa8, 5, 34, 0, 16, 0, 2, 0];
        let header = VirtioNetHdr::parse(&bytes);
        assert_eq!(header, VirtioNetHdr { num_buffers: 2.into(), ..tso(VIRTIO_NET_HDR_GSO_TCPV6) });
        assert_eq!(header.bytes(HDR_LEN), bytes);
        let legacy = VirtioNetHdr::parse(&bytes[..10]);
        assert_eq!(legacy, tso(VIRTIO_NET_HDR_GSO_TCPV6));
        assert_eq!(legacy.bytes(HDR_LEN_LEGACY), &bytes[..10]);
        assert_eq!(VirtioNetHdr::parse(&[]), VirtioNetHdr::default());
        assert_eq!(VirtioNetHdr::parse(&[bytes.as_slice(), &[7; 9]].concat()), header);
    }

    #[test]
    fn length_depends_on_two_features() {
        assert_eq!(header_len(0), 10);
        assert_eq!(header_len(bit(VIRTIO_F_VERSION_1)), 12);
        assert_eq!(header_len(bit(VIRTIO_NET_F_MRG_RXBUF)), 12);
    }

    #[test]
    fn frame_lengths_have_limits() {
        let header = VirtioNetHdr::default();
        assert_eq!(header.check(13, ALL), Err(HeaderError::FrameTooShort(13)));
        assert_eq!(header.check(14, 0), Ok(()));
        assert_eq!(header.check(FRAME_LEN_MAX, 0), Ok(()));
        assert_eq!(header.check(FRAME_LEN_MAX + 1, ALL), Err(HeaderError::FrameTooLong(FRAME_LEN_MAX + 1)));
    }

    #[test]
    fn cve_2024_11614_csum_start_out_of_bounds() {
        let at = |start: u16, offset: u16| {
            VirtioNetHdr {
                csum_start: start.into(),
                csum_offset: offset.into(),
                ..tso(VIRTIO_NET_HDR_GSO_NONE)
            }
            .check(100, ALL)
        };
        assert_eq!(at(34, 64), Ok(()));
        assert_eq!(at(98, 0), Ok(()));
        for (start, offset) in [(34, 65), (99, 0), (100, 0), (0, 99), (u16::MAX, 0), (u16::MAX, u16::MAX)] {
            assert_eq!(at(start, offset), Err(HeaderError::CsumOutside { start, offset, frame_len: 100 }));
        }
    }

    #[test]
    fn only_what_was_negotiated() {
        let kinds = [
            (VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_F_HOST_TSO4),
            (VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_F_HOST_TSO6),
            (VIRTIO_NET_HDR_GSO_UDP, VIRTIO_NET_F_HOST_UFO),
            (VIRTIO_NET_HDR_GSO_UDP_L4, VIRTIO_NET_F_HOST_USO),
        ];
        for (kind, feature) in kinds {
            let only = bit(feature) | bit(VIRTIO_NET_F_CSUM);
            assert_eq!(tso(kind).check(9000, only), Ok(()));
            assert_eq!(tso(kind).check(9000, ALL & !bit(feature)), Err(HeaderError::GsoType(kind as u8)));
            assert_eq!(tso(kind).check(9000, bit(feature)), Err(HeaderError::CsumNotNegotiated));
            let ecn = tso(kind | VIRTIO_NET_HDR_GSO_ECN);
            let tcp = matches!(kind, VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_TCPV6);
            assert_eq!(ecn.check(9000, only), Err(HeaderError::Ecn(ecn.gso_type)));
            assert_eq!(ecn.check(9000, ALL).is_ok(), tcp);
        }
        assert_eq!(tso(2).check(9000, !0), Err(HeaderError::GsoType(2)));
        assert_eq!(tso(VIRTIO_NET_HDR_GSO_ECN).check(9000, !0), Err(HeaderError::GsoType(0x80)));
        let unknown = VirtioNetHdr { flags: 0x10, ..Default::default() };
        assert_eq!(unknown.check(60, !0), Err(HeaderError::UnknownFlags(0x10)));
    }

    #[test]
    fn segmentation_needs_a_size_and_a_checksum() {
        let header = tso(VIRTIO_NET_HDR_GSO_TCPV4);
        let no_size = VirtioNetHdr { gso_size: 0.into(), ..header };
        assert_eq!(no_size.check(9000, ALL), Err(HeaderError::GsoSizeZero));
        let no_csum = VirtioNetHdr { flags: 0, ..header };
        assert_eq!(no_csum.check(9000, ALL), Err(HeaderError::GsoWithoutCsum));
        let long = VirtioNetHdr { hdr_len: 61.into(), ..header };
        assert_eq!(long.check(60, ALL), Err(HeaderError::HdrLen { hdr_len: 61, frame_len: 60 }));
        let plain = VirtioNetHdr { hdr_len: 61.into(), ..Default::default() };
        assert_eq!(plain.check(60, ALL), Err(HeaderError::HdrLen { hdr_len: 61, frame_len: 60 }));
    }

    proptest! {
        #[test]
        fn whatever_passes_is_within_frame_and_features(bytes in any::<[u8; 12]>(), frame_len in 0u64..70_000, features: u64) {
            let header = VirtioNetHdr::parse(&bytes);
            if header.check(frame_len, features).is_ok() {
                prop_assert!((FRAME_LEN_MIN..=FRAME_LEN_MAX).contains(&frame_len));
                prop_assert!(u64::from(header.hdr_len.get()) <= frame_len);
                if header.flags & NEEDS_CSUM != 0 {
                    let end = u64::from(header.csum_start.get()) + u64::from(header.csum_offset.get()) + 2;
                    prop_assert!(end <= frame_len && features & 1 != 0);
                }
                if header.gso_type != 0 {
                    prop_assert!(header.gso_size.get() != 0 && header.flags & NEEDS_CSUM != 0);
                }
            }
        }
    }
}
