//! Frames for the steering tests.

pub(super) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
/// Don't-fragment; more fragments; a later fragment.
pub(super) const DF: u16 = 0x4000;
pub(super) const MF: u16 = 0x2000;
pub(super) const LATER: u16 = 100;

/// A flow: address numbers and ports of both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flow(pub(super) [u8; 2], pub(super) [u16; 2]);

impl Flow {
    pub(super) fn back(self) -> Self {
        Self([self.0[1], self.0[0]], [self.1[1], self.1[0]])
    }
}

pub(super) const FLOW: Flow = Flow([1, 2], [1234, 53]);

pub(super) fn ethernet(to: [u8; 6], tags: &[(u16, u16)], kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = to.to_vec();
    bytes.extend([2, 0, 0, 0, 0, 1]);
    for (kind, tag) in tags {
        bytes.extend([kind.to_be_bytes(), tag.to_be_bytes()].concat());
    }
    bytes.extend(kind.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// Ports, and something behind.
pub(super) fn segment(flow: Flow) -> Vec<u8> {
    let mut bytes = [flow.1[0].to_be_bytes(), flow.1[1].to_be_bytes()].concat();
    bytes.extend([0xa5; 16]);
    bytes
}

pub(super) fn ipv4(flow: Flow, protocol: u8, option_words: u8, fragment: u16) -> Vec<u8> {
    let mut bytes = vec![0x45 + option_words, 0, 0, 40, 0, 0];
    bytes.extend(fragment.to_be_bytes());
    bytes.extend([64, protocol, 0, 0, 10, 0, 0, flow.0[0], 10, 0, 0, flow.0[1]]);
    bytes.extend(vec![1; usize::from(option_words) * 4]);
    bytes.extend(segment(flow));
    bytes
}

/// Extension headers: number and content behind the first two bytes.
pub(super) fn ipv6(flow: Flow, chain: &[(u8, Vec<u8>)], protocol: u8) -> Vec<u8> {
    let first = chain.first().map_or(protocol, |header| header.0);
    let mut bytes = vec![0x60, 0, 0, 0, 0, 20, first, 64];
    for end in flow.0 {
        bytes.extend([0xfd, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, end]);
    }
    for (i, (number, content)) in chain.iter().enumerate() {
        let next = chain.get(i + 1).map_or(protocol, |header| header.0);
        let whole = content.len() + 2;
        let len = if *number == 51 { whole / 4 - 2 } else { whole / 8 - 1 };
        bytes.extend([next, len as u8]);
        bytes.extend(content);
    }
    bytes.extend(segment(flow));
    bytes
}

/// A hop-by-hop (0), routing (43) or destination (60) header of so many units behind the first.
pub(super) fn extension(number: u8, units: usize) -> (u8, Vec<u8>) {
    (number, vec![1; 6 + 8 * units])
}

/// An authentication header, whose length counts in fours.
pub(super) fn authentication() -> (u8, Vec<u8>) {
    (51, vec![2; 22])
}

/// A fragment header.
pub(super) fn fragment(offset_and_more: u16) -> (u8, Vec<u8>) {
    let mut bytes = offset_and_more.to_be_bytes().to_vec();
    bytes.extend([0; 4]);
    (44, bytes)
}

/// IP packets of all kinds that the programs tell apart: EtherType and packet.
pub(super) fn packets(flow: Flow) -> Vec<(u16, Vec<u8>)> {
    let mut found = Vec::new();
    for protocol in [TCP, UDP, 1, 132] {
        for words in [0, 1, 10] {
            for piece in [0, DF, MF, LATER, MF | LATER, 0x8000] {
                found.push((0x0800, ipv4(flow, protocol, words, piece)));
            }
        }
        let chains = [
            vec![],
            vec![extension(0, 0)],
            vec![extension(0, 1), extension(43, 2), extension(60, 0)],
            vec![authentication()],
            vec![extension(0, 0), authentication(), extension(60, 1)],
            vec![fragment(1)],
            vec![fragment(8)],
            vec![fragment(0)],
            vec![extension(0, 0), fragment(1), extension(60, 0)],
            vec![extension(60, 0); 6],
            vec![extension(60, 0); 7],
            vec![extension(60, 130); 3],
            vec![(50, vec![3; 14])],
            vec![(59, vec![3; 14])],
        ];
        found.extend(chains.map(|chain| (0x86dd, ipv6(flow, &chain, protocol))));
    }
    // Headers that are none.
    let mut bad = ipv4(flow, UDP, 0, 0);
    bad[0] = 0x44;
    found.push((0x0800, bad.clone()));
    bad[0] = 0x65;
    found.push((0x0800, bad));
    let mut bad = ipv6(flow, &[], UDP);
    bad[0] = 0x45;
    found.push((0x86dd, bad));
    found.push((0x0806, vec![0; 28]));
    found.push((0x88b5, vec![7; 46]));
    found.push((46, vec![7; 46]));
    found
}

/// Tags before the EtherType: none, one of each kind, priority only, two, three.
pub(super) fn tags() -> [&'static [(u16, u16)]; 7] {
    const Q: u16 = 0x8100;
    const AD: u16 = 0x88a8;
    [
        &[],
        &[(Q, 5)],
        &[(AD, 5)],
        &[(Q, 0xe000)],
        &[(Q, 0x6006)],
        &[(AD, 5), (Q, 6)],
        &[(AD, 5), (Q, 6), (Q, 7)],
    ]
}

/// All of them.
pub(super) fn all(to: [u8; 6], flow: Flow) -> Vec<Vec<u8>> {
    let packets = packets(flow);
    tags()
        .iter()
        .flat_map(|tags| packets.iter().map(|(kind, packet)| ethernet(to, tags, *kind, packet)))
        .collect()
}
