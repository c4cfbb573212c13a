//! Opens a tap device. Not here: its interface settings (`link`), the loops that use it.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, bail};

/// Length of `struct virtio_net_hdr_v1`, which stands before each frame with [`TapOptions::vnet_hdr`].
pub const VNET_HDR_LEN: usize = 12;

/// How to open a tap.
#[derive(Clone, Copy, Debug, Default)]
pub struct TapOptions {
    /// Each frame has a virtio-net header of [`VNET_HDR_LEN`] bytes.
    pub vnet_hdr: bool,
    /// The device may have several queues (each open adds one).
    pub multi_queue: bool,
    /// Reads and writes answer EAGAIN instead of waiting.
    pub nonblocking: bool,
    /// The device stays when it is closed, until its name space ends.
    pub persistent: bool,
}

/// Creates the tap `name`, or attaches to it.
pub fn open_tap(name: &str, options: TapOptions) -> Result<File> {
    let flags = if options.nonblocking { libc::O_NONBLOCK } else { 0 };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open("/dev/net/tun")
        .context("opening /dev/net/tun")?;
    // SAFETY: ifreq is plain data; all zeroes is a valid value of each of its members.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        bail!("interface name {name:?} is too long");
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let mut kind = libc::IFF_TAP | libc::IFF_NO_PI;
    if options.vnet_hdr {
        kind |= libc::IFF_VNET_HDR;
    }
    if options.multi_queue {
        kind |= libc::IFF_MULTI_QUEUE;
    }
    request.ifr_ifru.ifru_flags = kind as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) }, name, "TUNSETIFF")?;
    if options.vnet_hdr {
        let len = VNET_HDR_LEN as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which outlives the call.
        let r = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &len) };
        check(r, name, "TUNSETVNETHDRSZ")?;
    }
    if options.persistent {
        // SAFETY: TUNSETPERSIST takes its argument by value.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST, 1) }, name, "TUNSETPERSIST")?;
    }
    Ok(file)
}

fn check(result: libc::c_int, name: &str, what: &str) -> Result<()> {
    if result < 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| format!("tap {name}: {what}"));
    }
    Ok(())
}
