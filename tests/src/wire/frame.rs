//! Frames: numbered UDP datagrams whose every byte follows from their number, and a check for anybody's IPv4/UDP.
//! Bytes in, bytes out; no sockets.
#![forbid(unsafe_code)]

use anyhow::{Result, ensure};

/// A unicast address that no interface of a lab has: a frame to it is dropped by the stack as early as any.
pub const FOREIGN_MAC: [u8; 6] = [0x02, 0, 0, 0, 0xfe, 0xed];
const SOURCE_MAC: [u8; 6] = [0x02, 0, 0, 0, 0xca, 0xfe];

const ETH: usize = 14;
const IP: usize = 20;
const UDP: usize = 8;
const NUMBER: usize = 8;
/// The smallest numbered frame: headers and the number.
pub const FRAME_MIN: usize = ETH + IP + UDP + NUMBER;
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const PROTOCOL_UDP: u8 = 17;
/// UDP destination port of numbered frames.
const PORT: u16 = 4242;

/// A numbered UDP datagram.
#[derive(Clone, Copy, Debug)]
pub struct Frame;

impl Frame {
    /// Frame `number` of `len` bytes (without FCS) to `destination`. `flow` selects the UDP source port, so that
    /// different flows may take different queues.
    ///
    /// # Panics
    /// If `len` is outside [`FRAME_MIN`]..=65535: a mistake of the test.
    pub fn numbered(number: u64, len: usize, flow: u16, destination: [u8; 6]) -> Vec<u8> {
        assert!((FRAME_MIN..=65535).contains(&len), "frame length {len}");
        let mut f = vec![0u8; len];
        f[0..6].copy_from_slice(&destination);
        f[6..12].copy_from_slice(&SOURCE_MAC);
        f[12..14].copy_from_slice(&ETHERTYPE_IPV4);
        let ip = &mut f[ETH..ETH + IP];
        ip[0] = 0x45;
        ip[2..4].copy_from_slice(&((len - ETH) as u16).to_be_bytes());
        ip[8] = 64;
        ip[9] = PROTOCOL_UDP;
        ip[12..16].copy_from_slice(&[198, 18, 0, 1]);
        ip[16..20].copy_from_slice(&[198, 18, 0, 2]);
        let sum = finish(sum16(ip, 0));
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        let udp = &mut f[ETH + IP..];
        udp[0..2].copy_from_slice(&(10_000 + flow).to_be_bytes());
        udp[2..4].copy_from_slice(&PORT.to_be_bytes());
        udp[4..6].copy_from_slice(&((len - ETH - IP) as u16).to_be_bytes());
        udp[8..16].copy_from_slice(&number.to_be_bytes());
        for (i, b) in udp[16..].iter_mut().enumerate() {
            *b = pattern(number, i);
        }
        let sum = udp_sum(&f);
        f[ETH + IP + 6..ETH + IP + 8].copy_from_slice(&sum.to_be_bytes());
        f
    }

    /// The same from `source`.
    pub fn from_to(number: u64, len: usize, flow: u16, source: [u8; 6], destination: [u8; 6]) -> Vec<u8> {
        let mut frame = Self::numbered(number, len, flow, destination);
        frame[6..12].copy_from_slice(&source);
        frame
    }

    /// The number of a frame that [`Frame::numbered`] made, if every byte behind the MAC addresses is right
    /// (a guest that sends it back swaps those). `None` if it is somebody else's frame.
    pub fn number(f: &[u8]) -> Option<Result<u64>> {
        if f.len() < FRAME_MIN || f[12..14] != ETHERTYPE_IPV4 || f[ETH + 9] != PROTOCOL_UDP {
            return None;
        }
        let port = |at: usize| u16::from_be_bytes([f[ETH + IP + at], f[ETH + IP + at + 1]]);
        if port(2) != PORT {
            return None;
        }
        let flow = port(0).wrapping_sub(10_000);
        let number = u64::from_be_bytes(f[ETH + IP + UDP..FRAME_MIN].try_into().unwrap_or([0; 8]));
        let expected = Frame::numbered(number, f.len(), flow, FOREIGN_MAC);
        Some(match (12..f.len()).find(|&i| f[i] != expected[i]) {
            None => Ok(number),
            Some(i) => Err(anyhow::anyhow!(
                "frame {number} of {} bytes differs at byte {i}: {:#04x} instead of {:#04x}",
                f.len(),
                f[i],
                expected[i]
            )),
        })
    }
}

fn pattern(number: u64, i: usize) -> u8 {
    (number.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left((i % 61) as u32) as u8)
        .wrapping_add((i / 61) as u8)
}

/// What [`check_udp`] found in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Udp {
    /// Ports.
    pub source: u16,
    /// Ports.
    pub destination: u16,
    /// Bytes behind the UDP header.
    pub payload: usize,
}

/// Checks an Ethernet frame with IPv4 and UDP whoever made it: lengths, the IP checksum, and the UDP checksum unless
/// it is zero (none was computed).
pub fn check_udp(f: &[u8]) -> Result<Udp> {
    ensure!(f.len() >= ETH + IP + UDP, "frame of {} bytes", f.len());
    ensure!(f[12..14] == ETHERTYPE_IPV4, "ethertype {:02x}{:02x}", f[12], f[13]);
    let ip = &f[ETH..ETH + IP];
    ensure!(ip[0] == 0x45, "IP version and header length {:#x}", ip[0]);
    ensure!(ip[9] == PROTOCOL_UDP, "IP protocol {}", ip[9]);
    let total = u16::from_be_bytes([ip[2], ip[3]]) as usize;
    ensure!(total == f.len() - ETH, "IP length {total} in a frame of {} bytes", f.len());
    ensure!(finish(sum16(ip, 0)) == 0, "bad IP checksum");
    let udp = &f[ETH + IP..];
    let word = |at: usize| u16::from_be_bytes([udp[at], udp[at + 1]]);
    ensure!(word(4) as usize == udp.len(), "UDP length {} of {}", word(4), udp.len());
    if word(6) != 0 {
        ensure!(finish(udp_raw_sum(f)) == 0, "bad UDP checksum");
    }
    Ok(Udp { source: word(0), destination: word(2), payload: udp.len() - UDP })
}

fn udp_raw_sum(f: &[u8]) -> u32 {
    let udp = &f[ETH + IP..];
    let pseudo = sum16(&f[ETH + 12..ETH + 20], u32::from(PROTOCOL_UDP) + udp.len() as u32);
    sum16(udp, pseudo)
}

/// The UDP checksum of a frame whose checksum field is zero.
fn udp_sum(f: &[u8]) -> u16 {
    match finish(udp_raw_sum(f)) {
        0 => 0xffff,
        s => s,
    }
}

fn sum16(data: &[u8], start: u32) -> u32 {
    let mut sum = start;
    for pair in data.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    sum
}

fn finish(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbered_frames_are_valid_and_recognised() {
        for (n, len) in [(0, FRAME_MIN), (1, 64), (2, 65), (u64::MAX, 1500), (7, 9000)] {
            let mut f = Frame::numbered(n, len, 3, FOREIGN_MAC);
            assert_eq!(f.len(), len);
            let udp = check_udp(&f).expect("valid");
            assert_eq!((udp.source, udp.destination), (10_003, PORT));
            f[0..12].fill(0xee);
            assert_eq!(Frame::number(&f).expect("ours").expect("intact"), n);
        }
    }

    #[test]
    fn every_changed_byte_is_found() {
        let f = Frame::numbered(99, 64, 0, FOREIGN_MAC);
        for i in 12..f.len() {
            let mut g = f.clone();
            g[i] ^= 0x40;
            let found = !matches!(Frame::number(&g), Some(Ok(99)));
            assert!(found, "byte {i}");
        }
        assert!(Frame::number(&f[..f.len() - 1]).is_some_and(|r| r.is_err()));
    }

    #[test]
    fn checksums_are_checked() {
        let mut f = Frame::numbered(5, 100, 0, FOREIGN_MAC);
        f[90] ^= 1;
        assert!(check_udp(&f).is_err());
        f[ETH + IP + 6..ETH + IP + 8].fill(0);
        assert!(check_udp(&f).is_ok(), "no UDP checksum");
        f[ETH + 8] = 63;
        assert!(check_udp(&f).is_err(), "IP checksum");
    }
}
