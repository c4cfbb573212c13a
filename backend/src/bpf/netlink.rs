//! Which XDP programs an interface has, and taking away one that no link holds: rtnetlink, as far as that needs it.
#![forbid(unsafe_code)]

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};
use std::io;
use std::os::fd::AsRawFd;

const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_FD: u16 = 1;
const IFLA_XDP_FLAGS: u16 = 3;
const IFLA_XDP_DRV_PROG_ID: u16 = 5;
const IFLA_XDP_SKB_PROG_ID: u16 = 6;
const IFLA_XDP_HW_PROG_ID: u16 = 7;
const HEADER_LEN: usize = 16;
const IFINFO_LEN: usize = 16;
/// Longest answer, bytes: one interface with all its attributes.
const ANSWER_MAX: usize = 64 << 10;

/// Where a program runs: before the kernel has a packet of its own, or after.
pub const XDP_FLAGS_SKB_MODE: u32 = 2;
/// See there.
pub const XDP_FLAGS_DRV_MODE: u32 = 4;

/// Numbers of the programs of an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// In the driver.
    pub native: Option<u32>,
    /// In the kernel's generic code.
    pub skb: Option<u32>,
    /// In the network card.
    pub hardware: Option<u32>,
}

impl Attached {
    /// The first there is, with the mode's name and flag; cards' own programs have none that we could use.
    pub fn any(&self) -> Option<(u32, &'static str, u32)> {
        let native = self.native.map(|id| (id, "native", XDP_FLAGS_DRV_MODE));
        let skb = self.skb.map(|id| (id, "skb", XDP_FLAGS_SKB_MODE));
        native.or(skb).or(self.hardware.map(|id| (id, "hardware", 0)))
    }
}

/// Asks for the programs of an interface of this network namespace.
///
/// # Errors
/// What the kernel says; ENODEV: no such interface.
pub fn attached(index: u32) -> io::Result<Attached> {
    let answer = ask(RTM_GETLINK, NLM_F_REQUEST, index, &[])?;
    let mut found = Attached::default();
    let Some(body) = answer.get(HEADER_LEN + IFINFO_LEN..) else { return Ok(found) };
    for (kind, value) in attributes(body) {
        if kind != IFLA_XDP {
            continue;
        }
        for (kind, value) in attributes(value) {
            let Ok(id) = value.try_into().map(u32::from_ne_bytes) else { continue };
            let place = match kind {
                IFLA_XDP_DRV_PROG_ID => &mut found.native,
                IFLA_XDP_SKB_PROG_ID => &mut found.skb,
                IFLA_XDP_HW_PROG_ID => &mut found.hardware,
                _ => continue,
            };
            *place = Some(id).filter(|id| *id != 0);
        }
    }
    Ok(found)
}

/// Takes away the program that was attached without a link in this mode.
///
/// # Errors
/// What the kernel says; EBUSY: a link holds it.
pub fn detach(index: u32, mode_flag: u32) -> io::Result<()> {
    set(index, -1, mode_flag)
}

fn set(index: u32, program: i32, mode_flag: u32) -> io::Result<()> {
    let mut nested = Vec::new();
    put(&mut nested, IFLA_XDP_FD, &program.to_ne_bytes());
    put(&mut nested, IFLA_XDP_FLAGS, &mode_flag.to_ne_bytes());
    let mut body = Vec::new();
    put(&mut body, IFLA_XDP | NLA_F_NESTED, &nested);
    ask(RTM_SETLINK, NLM_F_REQUEST | NLM_F_ACK, index, &body).map(drop)
}

/// One request and its answer, which is a link's description or the acknowledgement.
fn ask(kind: u16, flags: u16, index: u32, body: &[u8]) -> io::Result<Vec<u8>> {
    let mut request = Vec::new();
    request.extend(((HEADER_LEN + IFINFO_LEN + body.len()) as u32).to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend(flags.to_ne_bytes());
    // Sequence and sender: one question on a socket of its own needs neither.
    request.extend([0; 8]);
    // struct ifinfomsg: family and type, index, flags, changes.
    request.extend([0; 4]);
    request.extend(index.to_ne_bytes());
    request.extend([0; 8]);
    request.extend(body);
    let socket =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    sendto(socket.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = vec![0; ANSWER_MAX];
    let len = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    answer.truncate(len);
    let field = |at: usize| answer.get(at..at + 2).map(|b| u16::from_ne_bytes([b[0], b[1]]));
    match field(4) {
        Some(RTM_NEWLINK) => Ok(answer),
        Some(NLMSG_ERROR) => {
            let code = answer.get(HEADER_LEN..HEADER_LEN + 4).and_then(|b| b.try_into().ok());
            match code.map_or(-libc::EPROTO, i32::from_ne_bytes) {
                0 => Ok(answer),
                code => Err(io::Error::from_raw_os_error(-code)),
            }
        }
        _ => Err(io::Error::from_raw_os_error(libc::EPROTO)),
    }
}

fn put(to: &mut Vec<u8>, kind: u16, value: &[u8]) {
    to.extend((4 + value.len() as u16).to_ne_bytes());
    to.extend(kind.to_ne_bytes());
    to.extend(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

/// Attributes one after the other, up to the first that is cut off.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes([*bytes.first()?, *bytes.get(1)?]));
        let kind = u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]) & NLA_TYPE_MASK;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

#[cfg(test)]
pub(crate) mod testing {
    /// Attaches a program without a link, as ip(8) does.
    pub(crate) fn attach(
        index: u32,
        program: std::os::fd::BorrowedFd<'_>,
        mode_flag: u32,
    ) -> std::io::Result<()> {
        super::set(index, std::os::fd::AsRawFd::as_raw_fd(&program), mode_flag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_has_no_program_and_no_other_interface_is_there() {
        let index = nix::net::if_::if_nametoindex("lo").unwrap();
        assert_eq!(attached(index).unwrap().any(), None);
        assert_eq!(attached(u32::MAX >> 1).unwrap_err().raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn attributes_that_are_cut_off_end_the_list() {
        let mut bytes = Vec::new();
        put(&mut bytes, 7, &[1, 2, 3]);
        put(&mut bytes, 8 | NLA_F_NESTED, &[]);
        let found: Vec<_> = attributes(&bytes).collect();
        assert_eq!(found, [(7, &[1, 2, 3][..]), (8, &[][..])]);
        for len in 0..bytes.len() {
            assert!(attributes(&bytes[..len]).count() < 2 || len > 8);
        }
        assert_eq!(attributes(&[0, 0, 0, 0]).count(), 0, "a length less than its own head");
    }
}
