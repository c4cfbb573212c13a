//! What is asked of an interface of the calling thread's name space: up, queue length, MTU, counters.
//! Not here: sockets (`packet`).

use std::fs;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Counters of an interface as the stack sees them: what a back-end writes to a tap is *received*.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets that came from the tap's user.
    pub rx_packets: u64,
    /// Bytes that came from the tap's user.
    pub rx_bytes: u64,
    /// Came from the user but were not accepted.
    pub rx_dropped: u64,
    /// Packets that the tap's user took.
    pub tx_packets: u64,
    /// Not taken: the tap's queue was full.
    pub tx_dropped: u64,
}

/// An interface of the calling thread's name space.
#[derive(Clone, Debug)]
pub struct Link {
    name: String,
}

impl Link {
    /// Names an interface; it need not exist yet.
    pub fn named(name: &str) -> Self {
        Self { name: name.into() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Brings it up.
    pub fn set_up(&self) -> Result<()> {
        let mut request = self.request()?;
        self.ioctl(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: SIOCGIFFLAGS has filled in this member of the union.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
        self.ioctl(libc::SIOCSIFFLAGS, &mut request)
    }

    /// Sets the MTU in bytes.
    pub fn set_mtu(&self, bytes: u16) -> Result<()> {
        let mut request = self.request()?;
        request.ifr_ifru.ifru_mtu = bytes.into();
        self.ioctl(libc::SIOCSIFMTU, &mut request)
    }

    /// Sets how many packets wait for the tap's user (`txqueuelen`) at most.
    pub fn set_queue_len(&self, packets: u32) -> Result<()> {
        let mut request = self.request()?;
        request.ifr_ifru.ifru_metric = packets as libc::c_int;
        self.ioctl(libc::SIOCSIFTXQLEN, &mut request)
    }

    /// Lets the stack compute checksums itself instead of leaving them to the interface's driver, or not
    /// (`ethtool -K NAME tx off`): what a virtual interface sends has none otherwise.
    pub fn set_checksum_offload(&self, on: bool) -> Result<()> {
        const SIOCETHTOOL: libc::Ioctl = 0x8946;
        const ETHTOOL_STXCSUM: u32 = 0x17;
        let mut value = [ETHTOOL_STXCSUM, u32::from(on)];
        let mut request = self.request()?;
        request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
        self.ioctl(SIOCETHTOOL, &mut request)
    }

    /// Interface index.
    pub fn index(&self) -> Result<i32> {
        let mut request = self.request()?;
        self.ioctl(libc::SIOCGIFINDEX, &mut request)?;
        // SAFETY: SIOCGIFINDEX has filled in this member of the union.
        Ok(unsafe { request.ifr_ifru.ifru_ifindex })
    }

    /// Whether it exists.
    pub fn exists(&self) -> bool {
        self.index().is_ok()
    }

    /// Counters now.
    pub fn counters(&self) -> Result<Counters> {
        let text = fs::read_to_string("/proc/thread-self/net/dev")?;
        parse_counters(&text, &self.name).with_context(|| format!("no interface {}", self.name))
    }

    fn request(&self) -> Result<libc::ifreq> {
        // SAFETY: ifreq is plain data; all zeroes is a valid value of each of its members.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if self.name.len() >= request.ifr_name.len() {
            bail!("interface name {:?} is too long", self.name);
        }
        for (to, from) in request.ifr_name.iter_mut().zip(self.name.bytes()) {
            *to = from as libc::c_char;
        }
        Ok(request)
    }

    fn ioctl(&self, what: libc::Ioctl, request: &mut libc::ifreq) -> Result<()> {
        let s = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        // SAFETY: these requests read and write one ifreq, and what it may point to, which outlive the call.
        let r = unsafe { libc::ioctl(s.as_raw_fd(), what, request as *mut libc::ifreq) };
        if r < 0 {
            let e = std::io::Error::last_os_error();
            return Err(e).with_context(|| format!("interface {}: ioctl {what:#x}", self.name));
        }
        Ok(())
    }
}

fn parse_counters(text: &str, name: &str) -> Option<Counters> {
    let line = text.lines().find_map(|l| l.trim_start().strip_prefix(name)?.strip_prefix(':'))?;
    let f: Vec<u64> = line.split_whitespace().filter_map(|x| x.parse().ok()).collect();
    Some(Counters {
        rx_bytes: *f.first()?,
        rx_packets: *f.get(1)?,
        rx_dropped: *f.get(3)?,
        tx_packets: *f.get(9)?,
        tx_dropped: *f.get(11)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_parsed() {
        let text = "Inter-|   Receive
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       0       0    0    0    0     0          0         0        0       0    0    0    0     0       0          0
  tap0: 2092672   32698    0    4    0     0          0         0      516       6    0    2    0     0       0          0
";
        let expected =
            Counters { rx_packets: 32698, rx_bytes: 2_092_672, rx_dropped: 4, tx_packets: 6, tx_dropped: 2 };
        assert_eq!(parse_counters(text, "tap0"), Some(expected));
        assert_eq!(parse_counters(text, "tap"), None);
    }
}
