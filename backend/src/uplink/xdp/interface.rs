//! What is asked of a network interface: its number, MTU, address, receive queues, whether it is still there; and one frame sent
//! past the sockets.
//!
//! Not here: the program on it (`program`), its AF_XDP sockets (`socket`).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `ETHTOOL_GCHANNELS`: how many queues there are.
const ETHTOOL_GCHANNELS: u32 = 0x3c;
const SIOCETHTOOL: libc::c_ulong = 0x8946;

/// `struct ethtool_channels`.
#[repr(C)]
#[derive(Default)]
struct Channels {
    cmd: u32,
    max_rx: u32,
    max_tx: u32,
    max_other: u32,
    max_combined: u32,
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

/// An interface of this process's network namespace.
#[derive(Debug)]
pub struct Interface {
    name: String,
    index: u32,
    /// Any socket of the namespace, for questions.
    socket: OwnedFd,
    /// For [`Self::send`]; it receives nothing.
    packets: Option<OwnedFd>,
}

impl Interface {
    /// Looks an interface up.
    ///
    /// # Errors
    /// `ENODEV`: there is none of this name.
    pub fn named(name: &str) -> io::Result<Self> {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        let mut request = request(name);
        ioctl(&socket, libc::SIOCGIFINDEX as _, &mut request)?;
        // SAFETY: SIOCGIFINDEX filled in this member.
        let index = unsafe { request.ifr_ifru.ifru_ifindex } as u32;
        let packets = packet_socket(index).inspect_err(|error| tracing::debug!(%error, "packet socket")).ok();
        Ok(Self { name: name.into(), index, socket, packets })
    }

    /// Its name when it was looked up.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its number.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Its largest layer-3 packet, bytes.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn mtu(&self) -> io::Result<u32> {
        let mut request = request(&self.name);
        ioctl(&self.socket, libc::SIOCGIFMTU as _, &mut request)?;
        // SAFETY: SIOCGIFMTU filled in this member.
        Ok(unsafe { request.ifr_ifru.ifru_mtu } as u32)
    }

    /// Its own address; none if it is not one of Ethernet.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn mac(&self) -> io::Result<Option<[u8; 6]>> {
        let mut request = request(&self.name);
        ioctl(&self.socket, libc::SIOCGIFHWADDR as _, &mut request)?;
        // SAFETY: SIOCGIFHWADDR filled in this member.
        let address = unsafe { request.ifr_ifru.ifru_hwaddr };
        let mac = std::array::from_fn(|at| address.sa_data[at] as u8);
        Ok((address.sa_family == libc::ARPHRD_ETHER).then_some(mac))
    }

    /// Receive queues that its driver uses now; none if the driver does not tell.
    pub fn receive_queues(&self) -> Option<u32> {
        let mut channels = Channels { cmd: ETHTOOL_GCHANNELS, ..Channels::default() };
        let mut request = request(&self.name);
        request.ifr_ifru.ifru_data = (&raw mut channels).cast();
        ioctl(&self.socket, SIOCETHTOOL, &mut request).ok()?;
        // Drivers have queues for both ways, or for each way, or both kinds.
        Some(channels.combined + channels.rx).filter(|queues| *queues > 0)
    }

    /// Whether it is still there, under whatever name.
    pub fn exists(&self) -> bool {
        let mut request = request("");
        request.ifr_ifru.ifru_ifindex = self.index as libc::c_int;
        ioctl(&self.socket, libc::SIOCGIFNAME as _, &mut request).is_ok()
    }

    /// Sends one frame through the host's stack: it needs no TX ring of ours. Never sleeps.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        let Some(socket) = &self.packets else { return Err(io::ErrorKind::PermissionDenied.into()) };
        // SAFETY: the bytes are live; the kernel reads them.
        let sent =
            unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), libc::MSG_DONTWAIT) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

fn packet_socket(index: u32) -> io::Result<OwnedFd> {
    // Protocol 0: nothing is received.
    // SAFETY: a plain system call that returns a new descriptor or -1.
    let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: new, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: all-zero bytes are a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as _;
    address.sll_ifindex = index as libc::c_int;
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address is a live local of that length.
    match unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) } {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.as_bytes()) {
        *to = *from as libc::c_char;
    }
    request
}

fn ioctl(socket: &OwnedFd, what: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: these requests read and write one ifreq, and what its data pointer names; both outlive the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), what as _, std::ptr::from_mut(request)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uplink::netlab::{in_bpf_namespace, ip, veth};

    #[test]
    fn loopback_is_there_and_others_are_not() {
        let lo = Interface::named("lo").unwrap();
        assert!(lo.index() > 0 && lo.exists() && lo.mtu().unwrap() >= 1500);
        let error = Interface::named("no-such-if0").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
        assert_eq!(lo.mac().unwrap(), None);
    }

    #[test]
    fn addresses_are_those_that_the_kernel_shows() {
        in_bpf_namespace("uplink::xdp::interface::tests::addresses_are_those_that_the_kernel_shows", || {
            veth("one0", "other0", 1);
            ip("link set one0 address 02:00:00:fe:80:01");
            assert_eq!(Interface::named("one0").unwrap().mac().unwrap(), Some([2, 0, 0, 0xfe, 0x80, 1]));
        });
    }
}
