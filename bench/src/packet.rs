//! What is in the packets, and how one sees that they arrived whole. Pure.
//!
//! ```text
//!  virtio-net header   destination  source    type   sequence number   words made from it …   checksum
//!  12                  6            6         2      8                 8 × n, rest zero       8
//! ```
#![forbid(unsafe_code)]

/// The virtio-net header of a device with VERSION_1 (VIRTIO 1.3 §5.1.6).
pub const HEADER: usize = 12;
const ETHERNET: usize = 14;
/// IEEE's experimental EtherType.
const OURS: [u8; 2] = [0x88, 0xb5];
const IPV4: [u8; 2] = [0x08, 0x00];
/// The shortest frame that has sequence number and checksum, and that Ethernet allows.
pub const FRAME_MIN: usize = 60;
/// The longest one that every back-end takes without offloads.
pub const FRAME_MAX: usize = 1514;

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Writes header and frame number `seq`; as long as `packet` is.
pub fn build(seq: u64, packet: &mut [u8]) {
    packet[..HEADER].fill(0);
    let frame = &mut packet[HEADER..];
    frame[..6].copy_from_slice(&[0x02, 0, 0, 0, 0, 2]);
    frame[6..12].copy_from_slice(&[0x02, 0, 0, 0, 0, 1]);
    frame[12..14].copy_from_slice(&OURS);
    let body = &mut frame[ETHERNET..];
    let end = body.len() - 8;
    body[..8].copy_from_slice(&seq.to_le_bytes());
    let mut sum = mix(seq ^ 0x5eed);
    let mut words = body[8..end].chunks_exact_mut(8);
    for word in &mut words {
        let value = mix(sum ^ seq);
        word.copy_from_slice(&value.to_le_bytes());
        sum = sum.rotate_left(5) ^ value;
    }
    words.into_remainder().fill(0);
    body[end..].copy_from_slice(&sum.to_le_bytes());
}

/// Writes header and an IPv4 TCP segment that is to be cut into pieces for an MTU of 1500 (VIRTIO 1.3 §5.1.6.2); as long as
/// `packet` is.
pub fn build_tso(packet: &mut [u8]) {
    const NEEDS_CSUM: u8 = 1;
    const GSO_TCPV4: u8 = 1;
    let headers = ETHERNET as u16 + 40;
    packet.fill(0x5a);
    packet[..HEADER].fill(0);
    (packet[0], packet[1]) = (NEEDS_CSUM, GSO_TCPV4);
    // Length of headers, of a piece's payload, where the checksum starts and where it is from there.
    for (i, word) in [headers, 1448, ETHERNET as u16 + 20, 16].into_iter().enumerate() {
        packet[2 + 2 * i..][..2].copy_from_slice(&word.to_le_bytes());
    }
    let frame = &mut packet[HEADER..];
    frame[..ETHERNET].copy_from_slice(&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0]);
    let len = (frame.len() - ETHERNET) as u16;
    let mut ip = [0x45, 0, 0, 0, 0, 1, 0, 0, 64, 6, 0, 0, 198, 18, 0, 1, 198, 18, 0, 2];
    ip[2..4].copy_from_slice(&len.to_be_bytes());
    let sum =
        |bytes: &[u8]| -> u32 { bytes.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum() };
    let fold = |sum: u32| ((sum & 0xffff) + (sum >> 16)) as u16;
    let check = !fold(sum(&ip));
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    frame[ETHERNET..][..20].copy_from_slice(&ip);
    let tcp = &mut frame[ETHERNET + 20..][..20];
    tcp.copy_from_slice(&[0, 9, 0, 9, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    // Of the pseudo header; the rest is for whoever cuts it.
    let pseudo = fold(sum(&ip[12..20]) + 6 + u32::from(len - 20));
    tcp[16..18].copy_from_slice(&pseudo.to_be_bytes());
}

/// What a received packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// One of ours, whole.
    Ours(u64),
    /// A generator's (IPv4 with a right header checksum).
    Foreign,
    /// A hole's zeros where the frame or a part of it should be.
    Zeros,
    /// Neither whole nor zeros.
    Damaged,
}

/// Looks at a packet, header included.
pub fn look(packet: &[u8]) -> Content {
    if packet.len() < HEADER + ETHERNET {
        return Content::Damaged;
    }
    let frame = &packet[HEADER..];
    if frame.iter().all(|&b| b == 0) {
        return Content::Zeros;
    }
    let body = &frame[ETHERNET..];
    match [frame[12], frame[13]] {
        OURS if body.len() >= 16 => {
            let seq = u64::from_le_bytes(body[..8].try_into().expect("eight bytes"));
            let mut expected = [0; HEADER + FRAME_MAX];
            let Some(expected) = expected.get_mut(..packet.len()) else { return Content::Damaged };
            build(seq, expected);
            // Not the virtio-net header: the device has its own.
            if expected[HEADER..] == *frame {
                Content::Ours(seq)
            } else if body[8..].iter().all(|&b| b == 0) {
                Content::Zeros
            } else {
                Content::Damaged
            }
        }
        IPV4 if body.len() >= 20 => {
            let words = body[..20].chunks_exact(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])));
            let sum: u32 = words.sum();
            if (sum & 0xffff) + (sum >> 16) == 0xffff { Content::Foreign } else { Content::Damaged }
        }
        [0, 0] => Content::Zeros,
        _ => Content::Damaged,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_packets_are_told_from_holes_and_damage() {
        for frame in [FRAME_MIN, 64, 65, 1000, FRAME_MAX] {
            let mut packet = vec![0xee; HEADER + frame];
            build(77, &mut packet);
            assert_eq!(look(&packet), Content::Ours(77));
            for at in [HEADER + ETHERNET, HEADER + frame / 2, HEADER + frame - 1] {
                let mut bad = packet.clone();
                bad[at] ^= 0x10;
                assert_eq!(look(&bad), Content::Damaged, "{frame} {at}");
            }
            assert_eq!(look(&vec![0; HEADER + frame]), Content::Zeros);
        }
        assert_eq!(look(&[]), Content::Damaged);
    }

    #[test]
    fn a_generators_frame_is_known_by_its_checksum() {
        let mut packet = vec![0; HEADER + 64];
        packet[HEADER + 12..][..2].copy_from_slice(&IPV4);
        let ip = [0x45, 0, 0, 50, 0, 0, 0, 0, 64, 17, 0, 0, 198, 18, 0, 1, 198, 18, 0, 2];
        packet[HEADER + 14..][..20].copy_from_slice(&ip);
        let sum: u32 = ip.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
        let check = !((sum & 0xffff) + (sum >> 16)) as u16;
        packet[HEADER + 14 + 10..][..2].copy_from_slice(&check.to_be_bytes());
        assert_eq!(look(&packet), Content::Foreign);
        packet[HEADER + 14 + 3] ^= 1;
        assert_eq!(look(&packet), Content::Damaged);
    }
}
