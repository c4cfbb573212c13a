//! Where a frame of a port goes, and whose an address is. Pure: frames and addresses in, decisions out.
//!
//! ```text
//!   from a port:  source checked ─► group address ──► wire, and local ports that want it
//!                     │             another port's ──► that port (both with local-switch=on)
//!                     └─ spoofed    any other ───────► wire
//! ```
//! Addresses are configured, or learned from what the guest sends. A learned one never takes an address from a port that
//! is at work, in whatever VLAN, nor the interface's own. Not here: the steering in the kernel, which follows this table (`nic`).
#![forbid(unsafe_code)]

use ebpf_common::xdp::{MacKey, VLAN_ANY, VLAN_NONE};
use std::collections::HashMap;

/// Addresses that are learned from one port at most.
pub const LEARNED_MAX: usize = 16;

/// A MAC address.
pub type Mac = [u8; 6];

/// What a port was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Its address; none: learned.
    pub mac: Option<Mac>,
    /// Only frames of this VLAN are the port's.
    pub vlan: Option<u16>,
    /// It wants broadcast and multicast.
    pub flood: bool,
    /// It reaches, and is reached by, other such ports of the interface directly.
    pub local_switch: bool,
    /// It sends with its own address only.
    pub anti_spoof: bool,
}

impl Rules {
    fn key(&self, mac: Mac) -> MacKey {
        MacKey { mac, vlan: self.vlan.unwrap_or(VLAN_ANY) }
    }

    /// Whether a group frame with this outer VLAN is for the port.
    pub fn wants_flood(&self, vlan: u16) -> bool {
        self.flood && self.vlan.is_none_or(|own| own == vlan)
    }
}

/// What is read of a frame's link header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// To whom.
    pub destination: Mac,
    /// From whom.
    pub source: Mac,
    /// The outer VLAN, or [`VLAN_NONE`].
    pub vlan: u16,
    /// VLAN tags; two are counted at most.
    pub tags: usize,
}

impl Link {
    /// Reads the link header; none in a frame that is too short for one.
    #[inline]
    pub fn of(frame: &[u8]) -> Option<Self> {
        let header = frame.get(..14)?;
        let mut link = Self {
            destination: header[..6].try_into().ok()?,
            source: header[6..12].try_into().ok()?,
            vlan: VLAN_NONE,
            tags: 0,
        };
        // Those that the XDP program knows, so that both see the same VLAN.
        let is_tag = |at: usize| matches!(frame.get(at..at + 2), Some([0x81, 0x00] | [0x88, 0xa8]));
        if is_tag(12) && frame.len() >= 18 {
            link.vlan = u16::from_be_bytes([frame[14], frame[15]]) & 0x0fff;
            link.tags = 1 + usize::from(is_tag(16) && frame.len() >= 22);
        }
        Some(link)
    }

    /// Whether it is to a group: broadcast or multicast.
    #[inline]
    pub fn is_group(&self) -> bool {
        self.destination[0] & 1 != 0
    }
}

/// Where a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Out of the interface.
    Wire,
    /// To a port of the same interface, and not out.
    Local(u32),
    /// Out, and to the ports of the same interface that want it.
    Both,
    /// Nowhere: its source is not the port's.
    Spoofed,
}

/// What became of an address that a guest sent with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Learned {
    /// It is the port's already.
    Known,
    /// It is the port's now.
    New(MacKey),
    /// Another port has it.
    Taken,
    /// The port has as many as it may.
    Full,
}

#[derive(Clone, Copy, Debug)]
struct Owner {
    port: u32,
    learned: bool,
}

/// Whose each address is.
#[derive(Debug, Default)]
pub struct Table {
    rules: Vec<Rules>,
    owners: HashMap<MacKey, Owner>,
    /// The interface's own address: the host's stack would lose what comes for it.
    host: Option<Mac>,
}

impl Table {
    /// The table of ports with these rules, configured addresses in it. `host` is never learned.
    pub fn new(rules: Vec<Rules>, host: Option<Mac>) -> Self {
        let mut owners = HashMap::new();
        for (port, rules) in (0..).zip(&rules) {
            if let Some(mac) = rules.mac {
                owners.insert(rules.key(mac), Owner { port, learned: false });
            }
        }
        Self { rules, owners, host }
    }

    /// All addresses and whose they are.
    pub fn addresses(&self) -> impl Iterator<Item = (MacKey, u32)> + '_ {
        self.owners.iter().map(|(key, owner)| (*key, owner.port))
    }

    /// The port that frames to this address go to; the VLAN's own entry first.
    #[inline]
    pub fn owner(&self, mac: Mac, vlan: u16) -> Option<u32> {
        let find = |vlan| self.owners.get(&MacKey { mac, vlan });
        find(vlan).or_else(|| find(VLAN_ANY)).map(|owner| owner.port)
    }

    /// Where a frame of a port goes.
    #[inline]
    pub fn route(&self, port: u32, link: &Link) -> Route {
        let Some(rules) = self.rules.get(port as usize) else { return Route::Wire };
        if !may_send(rules, link) {
            return Route::Spoofed;
        }
        if !rules.local_switch {
            return Route::Wire;
        }
        if link.is_group() {
            return Route::Both;
        }
        match self.owner(link.destination, link.vlan) {
            Some(other) if other != port && self.rules[other as usize].local_switch => Route::Local(other),
            _ => Route::Wire,
        }
    }

    /// Notes that a port sends with an address. `is_live` tells which ports are at work: others lose learned addresses.
    pub fn learn(&mut self, port: u32, source: Mac, is_live: impl Fn(u32) -> bool) -> Learned {
        let Some(rules) = self.rules.get(port as usize) else { return Learned::Full };
        let key = rules.key(source);
        // An entry of just our VLAN would go before another's for any.
        for key in [key, MacKey { vlan: VLAN_ANY, ..key }] {
            match self.owners.get(&key) {
                Some(owner) if owner.port == port => return Learned::Known,
                Some(owner) if !owner.learned || is_live(owner.port) => return Learned::Taken,
                _ => {}
            }
        }
        // A group's, or nobody's: no frame can be for it. Or the host's.
        if source[0] & 1 != 0 || source == [0; 6] || self.host == Some(source) {
            return Learned::Taken;
        }
        if self.owners.values().filter(|owner| owner.learned && owner.port == port).count() >= LEARNED_MAX {
            return Learned::Full;
        }
        self.owners.insert(key, Owner { port, learned: true });
        Learned::New(key)
    }

    /// Drops what was learned from a port; returns it.
    pub fn forget(&mut self, port: u32) -> Vec<MacKey> {
        let is_its = |owner: &Owner| owner.learned && owner.port == port;
        let keys: Vec<_> =
            self.owners.iter().filter(|(_, owner)| is_its(owner)).map(|(key, _)| *key).collect();
        for key in &keys {
            self.owners.remove(key);
        }
        keys
    }
}

/// Whether a port may send a frame with this source.
#[inline]
pub fn may_send(rules: &Rules, link: &Link) -> bool {
    !rules.anti_spoof || (rules.mac == Some(link.source) && rules.vlan.is_none_or(|own| own == link.vlan))
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Mac = [2, 0, 0, 0, 0, 0xa];
    const B: Mac = [2, 0, 0, 0, 0, 0xb];
    const C: Mac = [2, 0, 0, 0, 0, 0xc];
    const ALL: Mac = [0xff; 6];
    const RULES: Rules = Rules { mac: None, vlan: None, flood: true, local_switch: true, anti_spoof: false };

    fn link(destination: Mac, source: Mac, vlan: u16) -> Link {
        Link { destination, source, vlan, tags: 0 }
    }

    fn frame(types: &[u16]) -> Vec<u8> {
        let mut frame = [A, B].concat();
        types.iter().for_each(|t| frame.extend_from_slice(&t.to_be_bytes()));
        frame
    }

    #[test]
    fn link_headers_of_any_length() {
        let plain = Link::of(&frame(&[0x0800])).unwrap();
        assert_eq!(plain, Link { destination: A, source: B, vlan: 0, tags: 0 });
        let tagged = Link::of(&frame(&[0x8100, 0xe064, 0x0800])).unwrap();
        assert_eq!((tagged.vlan, tagged.tags), (100, 1), "priority bits are no part of the number");
        let stacked = Link::of(&frame(&[0x88a8, 7, 0x8100, 8, 0x0800])).unwrap();
        assert_eq!((stacked.vlan, stacked.tags), (7, 2));
        let cut = Link::of(&frame(&[0x8100, 5])).unwrap();
        assert_eq!((cut.vlan, cut.tags), (0, 0), "no room for the tag and a type");
        let other = Link::of(&frame(&[0x9100, 7, 0x0800])).unwrap();
        assert_eq!((other.vlan, other.tags), (VLAN_NONE, 0), "no tag to the program either");
        for len in 0..14 {
            assert_eq!(Link::of(&vec![0xff; len]), None);
        }
    }

    #[test]
    fn local_frames_stay_if_both_want_it() {
        let off = Rules { local_switch: false, ..RULES };
        let with = |mac, rules: Rules| Rules { mac: Some(mac), ..rules };
        let table = Table::new(vec![with(A, RULES), with(B, RULES), with(C, off)], None);
        assert_eq!(table.route(0, &link(B, A, 0)), Route::Local(1));
        assert_eq!(table.route(0, &link(A, A, 0)), Route::Wire, "to itself");
        assert_eq!(table.route(0, &link(C, A, 0)), Route::Wire, "the other does not want it");
        assert_eq!(table.route(2, &link(A, C, 0)), Route::Wire);
        assert_eq!(table.route(0, &link(ALL, A, 0)), Route::Both);
        assert_eq!(table.route(2, &link(ALL, C, 0)), Route::Wire);
        assert_eq!(table.route(0, &link([2, 9, 9, 9, 9, 9], A, 0)), Route::Wire);
    }

    #[test]
    fn the_exact_vlan_goes_first() {
        let vlan = |vlan| Rules { mac: Some(A), vlan, ..RULES };
        let table = Table::new(vec![vlan(None), vlan(Some(5)), Rules { mac: Some(B), ..RULES }], None);
        assert_eq!(table.owner(A, 5), Some(1));
        assert_eq!(table.owner(A, 6), Some(0));
        assert_eq!(table.owner(A, VLAN_NONE), Some(0));
        assert!(vlan(Some(5)).wants_flood(5) && !vlan(Some(5)).wants_flood(0) && vlan(None).wants_flood(5));
    }

    #[test]
    fn spoofed_sources_go_nowhere() {
        let strict = Rules { mac: Some(A), vlan: Some(3), anti_spoof: true, ..RULES };
        let table = Table::new(vec![strict], None);
        assert_eq!(table.route(0, &link(B, A, 3)), Route::Wire);
        assert_eq!(table.route(0, &link(B, C, 3)), Route::Spoofed);
        assert_eq!(table.route(0, &link(ALL, C, 3)), Route::Spoofed);
        assert_eq!(table.route(0, &link(B, A, 4)), Route::Spoofed, "another VLAN");
    }

    #[test]
    fn learning_is_bounded_and_takes_nothing_from_who_is_at_work() {
        let mut table = Table::new(vec![RULES, RULES, Rules { mac: Some(C), ..RULES }], None);
        let key = |mac| MacKey { mac, vlan: VLAN_ANY };
        assert_eq!(table.learn(0, A, |_| true), Learned::New(key(A)));
        assert_eq!(table.learn(0, A, |_| true), Learned::Known);
        assert_eq!(table.learn(1, A, |_| true), Learned::Taken);
        assert_eq!(table.learn(1, C, |_| false), Learned::Taken, "configured");
        assert_eq!(table.learn(1, ALL, |_| true), Learned::Taken);
        assert_eq!(table.learn(1, [0; 6], |_| true), Learned::Taken);
        assert_eq!(table.learn(1, A, |port| port == 1), Learned::New(key(A)), "port 0 has no guest any more");
        for i in 0..LEARNED_MAX as u8 - 1 {
            assert!(matches!(table.learn(1, [2, 1, 0, 0, 0, i], |_| true), Learned::New(_)));
        }
        assert_eq!(table.learn(1, [2, 2, 0, 0, 0, 0], |_| true), Learned::Full);
        assert_eq!(table.forget(1).len(), LEARNED_MAX);
        assert_eq!(table.addresses().collect::<Vec<_>>(), [(key(C), 2)], "what is configured stays");
    }

    #[test]
    fn an_address_for_any_vlan_is_its_owners_in_each() {
        let bound = Rules { vlan: Some(5), ..RULES };
        let mut table = Table::new(vec![Rules { mac: Some(A), ..RULES }, RULES, bound], None);
        assert_eq!(table.learn(2, A, |_| false), Learned::Taken, "configured");
        assert!(matches!(table.learn(1, B, |_| true), Learned::New(_)));
        assert_eq!(table.learn(2, B, |_| true), Learned::Taken, "of a port at work");
        assert_eq!((table.owner(A, 5), table.owner(B, 5)), (Some(0), Some(1)));
        let key = MacKey { mac: B, vlan: 5 };
        assert_eq!(table.learn(2, B, |_| false), Learned::New(key), "port 1 has no guest any more");
        assert_eq!(table.learn(2, C, |_| true), Learned::New(MacKey { mac: C, vlan: 5 }));
        assert_eq!(table.learn(2, C, |_| true), Learned::Known);
    }

    #[test]
    fn the_interfaces_own_address_is_not_learned() {
        let bound = Rules { vlan: Some(5), ..RULES };
        let mut table = Table::new(vec![RULES, bound], Some(A));
        for port in 0..2 {
            assert_eq!(table.learn(port, A, |_| false), Learned::Taken);
            assert!(matches!(table.learn(port, [2, 0, 0, 0, 0, port as u8], |_| false), Learned::New(_)));
        }
        assert_eq!((table.owner(A, 0), table.owner(A, 5)), (None, None));
        let told = Table::new(vec![Rules { mac: Some(A), ..RULES }], Some(A));
        assert_eq!(told.owner(A, 0), Some(0), "who configures it wants it");
    }
}
