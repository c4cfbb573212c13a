//! The text form of an XDP uplink: `INTERFACE[,queues=N][,mode=M][,zerocopy=Z][,replace[=F]][,mac=A][,vlan=N][,flood=F]
//! [,local-switch=F][,anti-spoof=F]`, where the first four are about the interface and hold for all ports on it.
//!
//! Here: syntax, and what ports of one interface may not say differently. Opening it is the work of `uplink/xdp`.
#![forbid(unsafe_code)]

use super::uplink_spec::{MAX_IFNAME_LEN, is_interface_name};
use crate::uplink::xdp::ZeroCopy;
use crate::uplink::xdp::program::Mode;
use ebpf_common::xdp::QUEUES_MAX;
use std::fmt;
use std::str::FromStr;

/// The highest VLAN number.
const VLAN_MAX: u16 = 4094;

/// An XDP uplink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XdpSpec {
    /// The interface.
    pub interface: String,
    /// Its receive queues to use; all by default.
    pub queues: Option<u32>,
    /// Where its program is attached.
    pub mode: Option<Mode>,
    /// Whether the kernel copies frames.
    pub zero_copy: Option<ZeroCopy>,
    /// Take the place of a program that is there.
    pub replace: bool,
    /// The port's address, where it is not the device's.
    pub mac: Option<[u8; 6]>,
    /// Only frames of this VLAN are the port's.
    pub vlan: Option<u16>,
    /// The port wants broadcast and multicast.
    pub flood: bool,
    /// It reaches, and is reached by, other such ports of the interface directly.
    pub local_switch: bool,
    /// It sends with its own address only.
    pub anti_spoof: bool,
}

/// What is wrong with the text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum XdpProblem {
    /// Not a name that the kernel takes.
    #[error(
        "interface '{0}' after xdp: is not usable, take 1 to {MAX_IFNAME_LEN} characters without blank, '/', ':', '%' or ','"
    )]
    Interface(String),
    /// An unknown option.
    #[error(
        "xdp option '{0}' is unknown, use queues=, mode=, zerocopy=, replace, mac=, vlan=, flood=, local-switch= or anti-spoof="
    )]
    Option(String),
    /// A value that an option does not have.
    #[error("xdp option {0}={1} is not possible, use {2}")]
    Value(&'static str, String, String),
    /// An option that was given before.
    #[error("xdp option {0} is given twice, keep one")]
    Twice(&'static str),
}

impl XdpSpec {
    /// An interface with everything as it is by default.
    pub fn new(interface: &str) -> Self {
        Self {
            interface: interface.into(),
            queues: None,
            mode: None,
            zero_copy: None,
            replace: false,
            mac: None,
            vlan: None,
            flood: true,
            local_switch: false,
            anti_spoof: false,
        }
    }

    /// What two ports of one interface say differently, if they do.
    pub fn conflict(&self, other: &Self) -> Option<&'static str> {
        fn differ<T: PartialEq>(one: Option<T>, other: Option<T>) -> bool {
            matches!((one, other), (Some(one), Some(other)) if one != other)
        }
        let found = [
            ("queues", differ(self.queues, other.queues)),
            ("mode", differ(self.mode, other.mode)),
            ("zerocopy", differ(self.zero_copy, other.zero_copy)),
        ];
        found.into_iter().find(|(_, differs)| *differs).map(|(name, _)| name)
    }
}

fn mode_words() -> [(&'static str, Mode); 3] {
    [("auto", Mode::Auto), ("native", Mode::Native), ("skb", Mode::Skb)]
}

fn copy_words() -> [(&'static str, ZeroCopy); 3] {
    [("auto", ZeroCopy::Auto), ("on", ZeroCopy::On), ("off", ZeroCopy::Off)]
}

const SWITCH: [(&str, bool); 2] = [("on", true), ("off", false)];

/// One of some words.
fn word<T: Copy>(name: &'static str, value: &str, words: &[(&'static str, T)]) -> Result<T, XdpProblem> {
    let found = words.iter().find(|(word, _)| *word == value).map(|(_, meaning)| *meaning);
    found.ok_or_else(|| {
        let list = words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
        XdpProblem::Value(name, value.into(), list)
    })
}

fn number(name: &'static str, value: &str, max: u32) -> Result<u32, XdpProblem> {
    let found = value.parse().ok().filter(|number| (1..=max).contains(number));
    found.ok_or_else(|| XdpProblem::Value(name, value.into(), format!("a number from 1 to {max}")))
}

impl FromStr for XdpSpec {
    type Err = XdpProblem;

    fn from_str(text: &str) -> Result<Self, XdpProblem> {
        let mut parts = text.split(',');
        let interface = parts.next().unwrap_or("");
        if !is_interface_name(interface) {
            return Err(XdpProblem::Interface(interface.into()));
        }
        let mut spec = Self::new(interface);
        let mut seen: Vec<&'static str> = Vec::new();
        for part in parts {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            let name = match name {
                "queues" => {
                    spec.queues = Some(number("queues", value, QUEUES_MAX)?);
                    "queues"
                }
                "mode" => {
                    spec.mode = Some(word("mode", value, &mode_words())?);
                    "mode"
                }
                "zerocopy" => {
                    spec.zero_copy = Some(word("zerocopy", value, &copy_words())?);
                    "zerocopy"
                }
                "replace" => {
                    spec.replace = part == "replace" || word("replace", value, &SWITCH)?;
                    "replace"
                }
                "mac" => {
                    let mac = super::mac(value).map_err(|problem| {
                        XdpProblem::Value("mac", value.into(), format!("an address ({problem})"))
                    })?;
                    spec.mac = Some(mac);
                    "mac"
                }
                "vlan" => {
                    spec.vlan = Some(number("vlan", value, VLAN_MAX.into())? as u16);
                    "vlan"
                }
                "flood" => {
                    spec.flood = word("flood", value, &SWITCH)?;
                    "flood"
                }
                "local-switch" => {
                    spec.local_switch = word("local-switch", value, &SWITCH)?;
                    "local-switch"
                }
                "anti-spoof" => {
                    spec.anti_spoof = word("anti-spoof", value, &SWITCH)?;
                    "anti-spoof"
                }
                _ => return Err(XdpProblem::Option(part.into())),
            };
            if seen.contains(&name) {
                return Err(XdpProblem::Twice(name));
            }
            seen.push(name);
        }
        Ok(spec)
    }
}

impl fmt::Display for XdpSpec {
    /// What was said, in its order of definition; what is as by default is left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn name<T: PartialEq>(words: &[(&'static str, T)], value: &T) -> &'static str {
            words.iter().find(|(_, meaning)| meaning == value).map_or("", |(word, _)| word)
        }
        write!(f, "{}", self.interface)?;
        if let Some(queues) = self.queues {
            write!(f, ",queues={queues}")?;
        }
        if let Some(mode) = &self.mode {
            write!(f, ",mode={}", name(&mode_words(), mode))?;
        }
        if let Some(zero_copy) = &self.zero_copy {
            write!(f, ",zerocopy={}", name(&copy_words(), zero_copy))?;
        }
        if self.replace {
            write!(f, ",replace")?;
        }
        if let Some([a, b, c, d, e, g]) = self.mac {
            write!(f, ",mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")?;
        }
        if let Some(vlan) = self.vlan {
            write!(f, ",vlan={vlan}")?;
        }
        for (name, value, default) in [
            ("flood", self.flood, true),
            ("local-switch", self.local_switch, false),
            ("anti-spoof", self.anti_spoof, false),
        ] {
            if value != default {
                write!(f, ",{name}={}", if value { "on" } else { "off" })?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_come_back() {
        for text in [
            "eth0",
            "eth0,queues=4,mode=skb,zerocopy=on,replace,mac=52:54:00:12:34:56,vlan=100,flood=off,local-switch=on,anti-spoof=on",
            "veth1,mode=auto,zerocopy=auto",
        ] {
            assert_eq!(text.parse::<XdpSpec>().unwrap().to_string(), text);
        }
        let spec: XdpSpec = "e,anti-spoof=off,local-switch=on,flood=on".parse().unwrap();
        assert_eq!(spec, XdpSpec { local_switch: true, ..XdpSpec::new("e") });
    }

    #[test]
    fn each_mistake_has_its_sentence() {
        for (text, sentence) in [
            (
                "",
                "interface '' after xdp: is not usable, take 1 to 15 characters without blank, '/', ':', '%' or ','",
            ),
            (
                "e,fast",
                "xdp option 'fast' is unknown, use queues=, mode=, zerocopy=, replace, mac=, vlan=, flood=, local-switch= or anti-spoof=",
            ),
            ("e,replace=1", "xdp option replace=1 is not possible, use on, off"),
            ("e,queues=0", "xdp option queues=0 is not possible, use a number from 1 to 64"),
            ("e,queues=65", "xdp option queues=65 is not possible, use a number from 1 to 64"),
            ("e,mode=fast", "xdp option mode=fast is not possible, use auto, native, skb"),
            ("e,zerocopy=1", "xdp option zerocopy=1 is not possible, use auto, on, off"),
            ("e,vlan=4095", "xdp option vlan=4095 is not possible, use a number from 1 to 4094"),
            ("e,flood=", "xdp option flood= is not possible, use on, off"),
            (
                "e,mac=1:2",
                "xdp option mac=1:2 is not possible, use an address (mac '1:2' is not an address, write it as six hexadecimal bytes: 52:54:00:12:34:56)",
            ),
            ("e,vlan=1,vlan=1", "xdp option vlan is given twice, keep one"),
        ] {
            assert_eq!(text.parse::<XdpSpec>().unwrap_err().to_string(), sentence);
        }
    }

    #[test]
    fn ports_of_an_interface_agree() {
        let spec = |text: &str| text.parse::<XdpSpec>().unwrap();
        assert_eq!(spec("e,queues=2").conflict(&spec("e,queues=4")), Some("queues"));
        assert_eq!(spec("e,mode=skb").conflict(&spec("e,mode=auto")), Some("mode"));
        assert_eq!(spec("e,zerocopy=on").conflict(&spec("e,zerocopy=off")), Some("zerocopy"));
        assert_eq!(spec("e,queues=2,vlan=1").conflict(&spec("e,flood=off,replace")), None);
    }
}
