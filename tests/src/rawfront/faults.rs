//! A back-end's userfaultfd in a front-end's hands: who waits for which page, and letting them look again.
//!
//! The only unsafe code here is one ioctl. Pages are placed by writing to the memory's file, as all of `rawfront` does.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

const EVENT_PAGEFAULT: u8 = 0x12;
/// `struct uffd_msg`: event at 0, a fault's address at 16.
const MESSAGE_LEN: usize = 32;

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

mod ioctl {
    use super::UffdioRange;
    // _IOR although the kernel reads it: see linux/userfaultfd.h.
    nix::ioctl_read!(wake, 0xaa, 0x02, UffdioRange);
}

/// The userfaultfd that came with the answer to POSTCOPY_ADVISE.
#[derive(Debug)]
pub struct Faults(OwnedFd);

impl Faults {
    /// QEMU makes it non-blocking, for both holders.
    pub fn received(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self(fd))
    }

    /// The addresses that somebody has begun to wait for since the last call.
    pub fn addresses(&self) -> io::Result<Vec<u64>> {
        let mut addresses = Vec::new();
        let mut bytes = [0u8; 64 * MESSAGE_LEN];
        loop {
            let read = match nix::unistd::read(&self.0, &mut bytes) {
                Ok(0) | Err(Errno::EAGAIN) => return Ok(addresses),
                Ok(n) => n,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            for message in bytes[..read].chunks_exact(MESSAGE_LEN) {
                if message[0] != EVENT_PAGEFAULT {
                    return Err(io::Error::other(format!("userfaultfd event {:#x}", message[0])));
                }
                let address = message[16..24].try_into().map_err(io::Error::other)?;
                addresses.push(u64::from_ne_bytes(address));
            }
        }
    }

    /// Lets those look again who wait for pages in a range of the back-end's addresses.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = UffdioRange { start, len };
        // SAFETY: `range` is what UFFDIO_WAKE takes and outlives the call; it changes no memory.
        unsafe { ioctl::wake(self.0.as_raw_fd(), &mut range) }?;
        Ok(())
    }
}
