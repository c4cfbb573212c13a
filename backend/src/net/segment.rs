//! Segmentation in software: a large TCP or UDP frame cut into frames of its segment size, each with its own headers and a
//! complete checksum. For receivers that take no large frames; on our own copy. Pure.
#![forbid(unsafe_code)]

use super::checksum;
use super::header::VirtioNetHdr;
use std::ops::Range;
use virtio_bindings::virtio_net::*;

/// Segments of one frame at most: 64 KiB at Linux's smallest TCP segment (88 bytes) are fewer.
const SEGMENTS_MAX: usize = 1024;
const ETHER_LEN: usize = 14;
const TAG_LEN: usize = 4;
const TAGS_MAX: usize = 2;
const ETHERTYPE_VLAN: [u16; 2] = [0x8100, 0x88a8];
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const IPV6_LEN: usize = 40;
const TCP: u8 = 6;
const UDP: u8 = 17;
const TCP_FLAGS: usize = 13;
const FIN_PSH: u8 = 0x01 | 0x08;
const CWR: u8 = 0x80;

/// The segments of one frame. Its memory is used again.
#[derive(Debug, Default)]
pub struct Segments {
    bytes: Vec<u8>,
    frames: Vec<Range<usize>>,
}

impl Segments {
    /// The frames.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.frames.iter().map(|frame| &self.bytes[frame.clone()])
    }

    /// Cuts `frame`, of which `header` tells how. False: it is not what the header says, or has too many segments; there are
    /// none then.
    pub fn cut(&mut self, frame: &[u8], header: &VirtioNetHdr) -> bool {
        self.bytes.clear();
        self.frames.clear();
        let size = usize::from(header.gso_size.get());
        let Some(layout) = Layout::of(frame, header) else { return false };
        let payload = &frame[layout.payload..];
        if size == 0 || payload.is_empty() || payload.len().div_ceil(size) > SEGMENTS_MAX {
            return false;
        }
        let last = (payload.len() - 1) / size;
        for (index, part) in payload.chunks(size).enumerate() {
            let start = self.bytes.len();
            self.bytes.extend_from_slice(&frame[..layout.payload]);
            self.bytes.extend_from_slice(part);
            layout.finish(&mut self.bytes[start..], index, size, index == last);
            self.frames.push(start..self.bytes.len());
        }
        true
    }
}

/// Where the headers of a frame are, bytes from its beginning.
struct Layout {
    ip: usize,
    v6: bool,
    transport: usize,
    payload: usize,
    protocol: u8,
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

impl Layout {
    /// Reads a frame's headers; None if they are not those of a frame to be cut as the header says.
    fn of(frame: &[u8], header: &VirtioNetHdr) -> Option<Self> {
        let kind = u32::from(header.gso_type) & !VIRTIO_NET_HDR_GSO_ECN;
        let (protocol, checksum_at) = match kind {
            VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_TCPV6 => (TCP, 16),
            VIRTIO_NET_HDR_GSO_UDP_L4 => (UDP, 6),
            _ => return None,
        };
        let mut ip = ETHER_LEN;
        while ETHERTYPE_VLAN.contains(&be16(frame, ip - 2)?) && ip < ETHER_LEN + TAGS_MAX * TAG_LEN {
            ip += TAG_LEN;
        }
        let v6 = match be16(frame, ip - 2)? {
            ETHERTYPE_IPV4 if kind != VIRTIO_NET_HDR_GSO_TCPV6 => false,
            ETHERTYPE_IPV6 if kind != VIRTIO_NET_HDR_GSO_TCPV4 => true,
            _ => return None,
        };
        let transport = usize::from(header.csum_start.get());
        let fits = if v6 {
            // Extension headers, if any, stay as they are.
            transport >= ip + IPV6_LEN
        } else {
            let [first, protocol_there] = [*frame.get(ip)?, *frame.get(ip + 9)?];
            let len = usize::from(first & 0xf) * 4;
            let fragment = be16(frame, ip + 6)? & 0x3fff != 0;
            len >= 20 && transport == ip + len && protocol_there == protocol && !fragment
        };
        let len = if protocol == TCP { usize::from(*frame.get(transport + 12)? >> 4) * 4 } else { 8 };
        let payload = transport + len;
        let whole = payload <= frame.len() && (protocol == UDP || len >= 20);
        let fits = fits && whole && usize::from(header.csum_offset.get()) == checksum_at;
        fits.then_some(Self { ip, v6, transport, payload, protocol })
    }

    /// Makes a copy of the headers, with a part of the payload behind, a frame of its own.
    fn finish(&self, frame: &mut [u8], index: usize, size: usize, last: bool) {
        let Self { ip, transport, .. } = *self;
        let len = frame.len();
        // No part is longer than the whole, which is shorter than 64 KiB and some.
        if self.v6 {
            put16(frame, ip + 4, (len - ip - IPV6_LEN) as u16);
        } else {
            put16(frame, ip + 2, (len - ip) as u16);
            let id = u16::from_be_bytes([frame[ip + 4], frame[ip + 5]]).wrapping_add(index as u16);
            put16(frame, ip + 4, id);
            put16(frame, ip + 10, 0);
            let sum = !checksum::sum(&frame[ip..transport]);
            frame[ip + 10..ip + 12].copy_from_slice(&sum.to_ne_bytes());
        }
        let checksum_at = match self.protocol {
            TCP => {
                let at = transport + 4;
                let seq = u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]);
                let seq = seq.wrapping_add((index * size) as u32);
                frame[at..at + 4].copy_from_slice(&seq.to_be_bytes());
                if !last {
                    frame[transport + TCP_FLAGS] &= !FIN_PSH;
                }
                if index > 0 {
                    frame[transport + TCP_FLAGS] &= !CWR;
                }
                16
            }
            _ => {
                put16(frame, transport + 4, (len - transport) as u16);
                6
            }
        };
        let pseudo = self.pseudo(frame);
        frame[transport + checksum_at..][..2].copy_from_slice(&pseudo.to_ne_bytes());
        checksum::complete(frame, transport, checksum_at);
    }

    /// The sum of the pseudo-header (RFC 9293 §3.1, RFC 8200 §8.1).
    fn pseudo(&self, frame: &[u8]) -> u16 {
        let len = (frame.len() - self.transport) as u32;
        let mut bytes = [0; IPV6_LEN];
        let addresses = if self.v6 { &frame[self.ip + 8..][..32] } else { &frame[self.ip + 12..][..8] };
        bytes[..addresses.len()].copy_from_slice(addresses);
        bytes[32..36].copy_from_slice(&len.to_be_bytes());
        bytes[39] = self.protocol;
        checksum::sum(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::checksum::tests::oracle;

    /// A frame with these headers whose payload is `len` bytes; and how it is to be cut.
    fn large(v6: bool, tcp: bool, tags: usize, len: usize, size: u16) -> (Vec<u8>, VirtioNetHdr) {
        let mut frame = vec![2; 12];
        (0..tags).for_each(|_| frame.extend([0x81, 0, 0, 5]));
        frame.extend(if v6 { [0x86, 0xdd] } else { [8, 0] });
        let ip = frame.len();
        if v6 {
            frame.extend([0x60, 0, 0, 0, 0, 0, if tcp { TCP } else { UDP }, 64]);
            frame.extend((0..32).map(|i| i * 7));
        } else {
            frame.extend([0x45, 0, 0, 0, 0xff, 0xff, 0x40, 0, 64, if tcp { TCP } else { UDP }, 0, 0]);
            frame.extend([10, 0, 0, 1, 10, 0, 0, 2]);
        }
        let transport = frame.len();
        if tcp {
            frame.extend([
                0, 80, 1, 2, 0xff, 0xff, 0xff, 0, 0, 0, 0, 1, 0x60, 0x99, 0xff, 0xff, 0, 0, 0, 0, 1, 1, 1, 0,
            ]);
        } else {
            frame.extend([0, 80, 1, 2, 0, 0, 0, 0]);
        }
        frame.extend((0..len).map(|i| (i * 13) as u8));
        assert!(ip < transport);
        let gso_type = match (v6, tcp) {
            (_, false) => VIRTIO_NET_HDR_GSO_UDP_L4,
            (false, true) => VIRTIO_NET_HDR_GSO_TCPV4,
            (true, true) => VIRTIO_NET_HDR_GSO_TCPV6,
        };
        let header = VirtioNetHdr {
            flags: 1,
            gso_type: gso_type as u8,
            gso_size: size.into(),
            csum_start: (transport as u16).into(),
            csum_offset: if tcp { 16 } else { 6 }.into(),
            ..Default::default()
        };
        (frame, header)
    }

    /// Sums as a receiver does: all words, the carry added.
    fn total(parts: &[&[u8]]) -> u16 {
        oracle(&parts.concat())
    }

    #[test]
    fn segments_are_frames_that_a_receiver_takes() {
        for (v6, tcp) in [(false, true), (true, true), (false, false), (true, false)] {
            for tags in 0..3 {
                let (frame, header) = large(v6, tcp, tags, 3500, 1001);
                let mut segments = Segments::default();
                assert!(segments.cut(&frame, &header));
                let (ip, transport) = (14 + 4 * tags, usize::from(header.csum_start.get()));
                let payload_at = transport + if tcp { 24 } else { 8 };
                let mut payload = Vec::new();
                for (index, segment) in segments.iter().enumerate() {
                    assert_eq!(segment[..ip], frame[..ip]);
                    let len = segment.len();
                    let mut pseudo = if v6 {
                        assert_eq!(be16(segment, ip + 4), Some((len - ip - 40) as u16));
                        segment[ip + 8..ip + 40].to_vec()
                    } else {
                        assert_eq!(be16(segment, ip + 2), Some((len - ip) as u16));
                        assert_eq!(be16(segment, ip + 4), Some(0xffff_u16.wrapping_add(index as u16)));
                        assert_eq!(total(&[&segment[ip..transport]]), 0xffff);
                        segment[ip + 12..ip + 20].to_vec()
                    };
                    pseudo.extend([0, if tcp { TCP } else { UDP }]);
                    pseudo.extend(((len - transport) as u16).to_be_bytes());
                    assert_eq!(total(&[&pseudo, &segment[transport..]]), 0xffff, "{v6} {tcp} {index}");
                    if tcp {
                        let seq = u32::from_be_bytes(segment[transport + 4..][..4].try_into().unwrap());
                        assert_eq!(seq, 0xffff_ff00_u32.wrapping_add(index as u32 * 1001));
                        let flags = segment[transport + TCP_FLAGS];
                        assert_eq!(flags, [0x90, 0x10, 0x10, 0x19][index]);
                    } else {
                        assert_eq!(be16(segment, transport + 4), Some((len - transport) as u16));
                    }
                    payload.extend_from_slice(&segment[payload_at..]);
                }
                assert_eq!(segments.iter().len(), 4);
                assert_eq!(payload, frame[payload_at..]);
            }
        }
    }

    #[test]
    fn what_is_not_as_the_header_says_is_not_cut() {
        let (frame, header) = large(false, true, 0, 3000, 1000);
        let no = |frame: &[u8], header: VirtioNetHdr| assert!(!Segments::default().cut(frame, &header));
        no(&frame, VirtioNetHdr { csum_start: 35.into(), ..header });
        no(&frame, VirtioNetHdr { csum_offset: 6.into(), ..header });
        no(&frame, VirtioNetHdr { gso_type: VIRTIO_NET_HDR_GSO_TCPV6 as u8, ..header });
        no(&frame, VirtioNetHdr { gso_type: VIRTIO_NET_HDR_GSO_UDP_L4 as u8, ..header });
        no(&frame, VirtioNetHdr { gso_type: VIRTIO_NET_HDR_GSO_UDP as u8, ..header });
        no(&frame, VirtioNetHdr { gso_size: 1.into(), ..header });
        no(&frame, VirtioNetHdr { gso_size: 0.into(), ..header });
        no(&frame, VirtioNetHdr { csum_start: u16::MAX.into(), ..header });
        for cut in 0..58 {
            no(&frame[..cut], header);
        }
        let mut fragment = frame.clone();
        fragment[20] = 0x20;
        no(&fragment, header);
        let mut small = frame.clone();
        small[34 + 12] = 0x10; // a TCP header of 4 bytes
        no(&small, header);
        small[34 + 12] = 0xf0;
        no(&small[..80], header);
        no(&[0x81, 0].repeat(40), header);
    }
}
