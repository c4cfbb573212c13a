//! What the programs shall do, written a second time: over slices, by the documents (IEEE 802.1Q, RFC 791, RFC 8200).

/// What a frame is, seen from its beginning.
pub(super) struct Seen<'a> {
    /// The outer tag's VLAN; `None` if a tag begins and is cut off.
    pub(super) vlan: Option<u16>,
    kind: u16,
    payload: &'a [u8],
}

pub(super) const NO_VLAN: u16 = 0;
/// The programs read no header that begins later.
const LATEST: usize = 2048;

pub(super) fn see(frame: &[u8]) -> Seen<'_> {
    let number = |at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().unwrap()));
    let mut vlans = Vec::new();
    let mut at = 12;
    loop {
        match number(at) {
            Some(0x8100 | 0x88a8) if vlans.len() < 2 => {
                let (Some(tag), Some(_)) = (number(at + 2), number(at + 4)) else {
                    return Seen { vlan: vlans.first().copied(), kind: 0, payload: &[] };
                };
                vlans.push(tag % 4096);
                at += 4;
            }
            kind => {
                let payload = frame.get(at + 2..).unwrap_or_default();
                let vlan = Some(vlans.first().copied().unwrap_or(NO_VLAN));
                return Seen { vlan, kind: kind.unwrap_or(0), payload };
            }
        }
    }
}

/// One end of a flow.
type End = (Vec<u8>, u16);

/// The ends of the frame's flow.
pub(super) fn ends(frame: &[u8]) -> Option<[End; 2]> {
    let seen = see(frame);
    let before = frame.len() - seen.payload.len();
    match seen.kind {
        0x0800 => v4(seen.payload, before),
        0x86dd => v6(seen.payload, before),
        _ => None,
    }
}

fn v4(packet: &[u8], before: usize) -> Option<[End; 2]> {
    let header = packet.get(..20)?;
    let len = usize::from(header[0] % 16) * 4;
    if header[0] / 16 != 4 || len < 20 {
        return None;
    }
    let fragment = u16::from_be_bytes([header[6], header[7]]);
    let is_whole = fragment & 0x2000 == 0 && fragment & 0x1fff == 0;
    let ports = if is_whole { ports(packet, header[9], len, before) } else { [0; 2] };
    Some([(header[12..16].to_vec(), ports[0]), (header[16..20].to_vec(), ports[1])])
}

fn v6(packet: &[u8], before: usize) -> Option<[End; 2]> {
    let header = packet.get(..40).filter(|header| header[0] / 16 == 6)?;
    let ports = v6_ports(packet, header[6], 40, before, 6);
    Some([(header[8..24].to_vec(), ports[0]), (header[24..40].to_vec(), ports[1])])
}

fn v6_ports(packet: &[u8], number: u8, at: usize, before: usize, headers_left: usize) -> [u16; 2] {
    let (unit, first) = match number {
        0 | 43 | 60 => (8, 1),
        51 => (4, 2),
        _ => return ports(packet, number, at, before),
    };
    if headers_left == 0 {
        return [0; 2];
    }
    match packet.get(at..at + 2).filter(|_| before + at <= LATEST) {
        Some(&[next, len]) => {
            v6_ports(packet, next, at + (usize::from(len) + first) * unit, before, headers_left - 1)
        }
        _ => [0; 2],
    }
}

fn ports(packet: &[u8], protocol: u8, at: usize, before: usize) -> [u16; 2] {
    match packet.get(at..at + 4).filter(|_| [6, 17].contains(&protocol) && before + at <= LATEST) {
        Some(&[a, b, c, d]) => [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])],
        _ => [0; 2],
    }
}

/// The flow's number.
pub(super) fn hash(frame: &[u8]) -> Option<u32> {
    let [one, other] = ends(frame)?.map(|(address, port)| {
        let number = match address.len() {
            4 => u64::from(u32::from_be_bytes(address.try_into().unwrap())),
            _ => {
                let number = u128::from_be_bytes(address.try_into().unwrap());
                (number >> 64) as u64 ^ spread(number as u64)
            }
        };
        spread(number ^ u64::from(port) ^ u64::from(port) << 48)
    });
    Some((spread(one.wrapping_add(other)) >> 32) as u32)
}

fn spread(number: u64) -> u64 {
    let round = |x: u64| (x ^ x >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let x = round(round(number));
    x ^ x >> 32
}
