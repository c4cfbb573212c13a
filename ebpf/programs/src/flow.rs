//! Which flow a frame belongs to, as a number that is the same in both directions.
//!
//! IPv4 and IPv6: both addresses, and for TCP and UDP both ports. A fragment, the first one included, has no ports here, so
//! that all fragments of a datagram go one way; so does a header that is cut off before the ports.

use crate::frame::{Ethernet, Frame};

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const IPV4_LEN: u32 = 20;
const IPV6_LEN: u32 = 40;
/// IPv6 extension headers that are looked behind at most; behind more, addresses alone count.
const EXTENSIONS_MAX: usize = 6;

mod protocol {
    pub const HOP_BY_HOP: u8 = 0;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const AUTHENTICATION: u8 = 51;
    pub const DESTINATION: u8 = 60;
}

/// The hash of the frame's flow; `None` if it is no whole IPv4 or IPv6 header.
#[inline(always)]
pub fn hash(frame: &impl Frame, ethernet: Ethernet) -> Option<u32> {
    match ethernet.kind {
        ETH_P_IP => ipv4(frame, ethernet.offset),
        ETH_P_IPV6 => ipv6(frame, ethernet.offset),
        _ => None,
    }
}

#[inline(always)]
fn ipv4(frame: &impl Frame, offset: u32) -> Option<u32> {
    let header: [u8; IPV4_LEN as usize] = frame.bytes(offset)?;
    let len = u32::from(header[0] & 15) * 4;
    if header[0] >> 4 != 4 || len < IPV4_LEN {
        return None;
    }
    // More fragments, or not the first.
    let is_fragment = header[6] & 0x3f != 0 || header[7] != 0;
    let [source, destination] = [12, 16].map(|at| address4(&header, at));
    let ports = if is_fragment { [0, 0] } else { ports(frame, header[9], offset + len) };
    Some(mix(endpoint(source, ports[0]), endpoint(destination, ports[1])))
}

#[inline(always)]
fn address4(header: &[u8; IPV4_LEN as usize], at: usize) -> u64 {
    u64::from(u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]))
}

#[inline(always)]
fn ipv6(frame: &impl Frame, offset: u32) -> Option<u32> {
    let header: [u8; 8] = frame.bytes(offset)?;
    let addresses: [u8; 32] = frame.bytes(offset + 8)?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let half = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&addresses[at..at + 8]);
        u64::from_be_bytes(bytes)
    };
    let [source, destination] = [half(0) ^ spread(half(8)), half(16) ^ spread(half(24))];
    let ports = ports6(frame, header[6], offset + IPV6_LEN);
    Some(mix(endpoint(source, ports[0]), endpoint(destination, ports[1])))
}

/// The ports behind the extension headers.
#[inline(always)]
fn ports6(frame: &impl Frame, mut next: u8, mut offset: u32) -> [u16; 2] {
    for _ in 0..EXTENSIONS_MAX {
        let unit = match next {
            protocol::HOP_BY_HOP | protocol::ROUTING | protocol::DESTINATION => 8,
            protocol::AUTHENTICATION => 4,
            _ => break,
        };
        let Some([following, len]) = frame.bytes::<2>(offset) else { return [0, 0] };
        // The length does not count the first 8 bytes, which are two units of an authentication header.
        let units = u32::from(len) + if unit == 8 { 1 } else { 2 };
        offset += units * unit;
        next = following;
    }
    if next == protocol::FRAGMENT { [0, 0] } else { ports(frame, next, offset) }
}

#[inline(always)]
fn ports(frame: &impl Frame, protocol: u8, offset: u32) -> [u16; 2] {
    if protocol != protocol::TCP && protocol != protocol::UDP {
        return [0, 0];
    }
    match frame.bytes::<4>(offset) {
        Some([a, b, c, d]) => [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])],
        None => [0, 0],
    }
}

#[inline(always)]
fn endpoint(address: u64, port: u16) -> u64 {
    spread(address ^ (u64::from(port) << 48 | u64::from(port)))
}

/// Joins two endpoints in either order.
#[inline(always)]
fn mix(a: u64, b: u64) -> u32 {
    (spread(a.wrapping_add(b)) >> 32) as u32
}

/// Each bit of the result depends on each bit of the number.
#[inline(always)]
fn spread(mut x: u64) -> u64 {
    x = (x ^ x >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x = (x ^ x >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ x >> 32
}
