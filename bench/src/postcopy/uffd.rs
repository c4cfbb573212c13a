//! userfaultfd as QEMU uses it: on its own mapping to place pages, and a back-end's to read faults and wake.
//!
//! Only what the front-end (and the tests' back-end) needs. Not here: which page comes when (`schedule`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

const UFFD_API: u64 = 0xaa;
const MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
/// `struct uffd_msg`: event at 0, a fault's address at 16.
const MESSAGE_LEN: usize = 32;
/// Faults taken by one read.
const MESSAGES: usize = 64;

#[repr(C)]
pub struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
pub struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
pub struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
pub struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

mod ioctl {
    use super::{UffdioApi, UffdioCopy, UffdioRange, UffdioRegister};
    nix::ioctl_readwrite!(api, 0xaa, 0x3f, UffdioApi);
    nix::ioctl_readwrite!(register, 0xaa, 0x00, UffdioRegister);
    // _IOR although the kernel reads them: see linux/userfaultfd.h.
    nix::ioctl_read!(unregister, 0xaa, 0x01, UffdioRange);
    nix::ioctl_read!(wake, 0xaa, 0x02, UffdioRange);
    nix::ioctl_readwrite!(copy, 0xaa, 0x03, UffdioCopy);
}

/// What a userfaultfd told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Somebody waits for the page at this address.
    Fault(u64),
    /// Anything else; only a back-end that asked for more features gets such events.
    Other(u8),
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// A new one, which does not block. It is for loads and stores only, not for system calls on missing pages, and
    /// so needs no privilege.
    pub fn new() -> io::Result<Self> {
        const USER_MODE_ONLY: libc::c_int = 1;
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: the system call takes one number and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this fd for us; nothing else owns it.
        let it = Self(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        let mut api = UffdioApi { api: UFFD_API, features: 0, ioctls: 0 };
        // SAFETY: `api` is what UFFDIO_API takes and outlives the call.
        unsafe { ioctl::api(it.0.as_raw_fd(), &mut api) }?;
        Ok(it)
    }

    /// One that a back-end has sent. QEMU makes it non-blocking, for both of them.
    pub fn received(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self(fd))
    }

    /// From now on, whoever touches a missing page of this process's memory there waits.
    pub fn register(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = UffdioRegister { range: UffdioRange { start, len }, mode: MODE_MISSING, ioctls: 0 };
        // SAFETY: `range` is what UFFDIO_REGISTER takes and outlives the call; the kernel checks the addresses.
        unsafe { ioctl::register(self.0.as_raw_fd(), &mut range) }?;
        Ok(())
    }

    /// Ends that. Whoever waits goes on, with a page of zeros.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = UffdioRange { start, len };
        // SAFETY: as for `register`.
        unsafe { ioctl::unregister(self.0.as_raw_fd(), &mut range) }?;
        Ok(())
    }

    /// Places one page of `len` bytes, at once and whole. `false`: there was a page already (EEXIST).
    ///
    /// # Safety
    /// `to` must be a page of a mapping that nothing reaches by reference, registered with this userfaultfd, and
    /// `from` readable for `len` bytes.
    pub unsafe fn place(&self, to: u64, from: *const u8, len: u64) -> io::Result<bool> {
        loop {
            let mut copy = UffdioCopy { dst: to, src: from as u64, len, mode: 0, copy: 0 };
            // SAFETY: `copy` is what UFFDIO_COPY takes; the caller vouches for both addresses.
            match unsafe { ioctl::copy(self.0.as_raw_fd(), &mut copy) } {
                Ok(_) => return Ok(true),
                Err(Errno::EEXIST) => return Ok(false),
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Lets those go on that wait for a page at an address of the userfaultfd's owner.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = UffdioRange { start, len };
        // SAFETY: as for `register`; nothing is changed in any memory.
        unsafe { ioctl::wake(self.0.as_raw_fd(), &mut range) }?;
        Ok(())
    }

    /// Takes the events that are there, some at a time; returns when there are none left.
    pub fn events(&self, mut each: impl FnMut(Event)) -> io::Result<()> {
        let mut bytes = [0u8; MESSAGES * MESSAGE_LEN];
        loop {
            let read = match nix::unistd::read(&self.0, &mut bytes) {
                Ok(0) | Err(Errno::EAGAIN) => return Ok(()),
                Ok(n) => n,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            for message in bytes[..read].chunks_exact(MESSAGE_LEN) {
                each(match message[0] {
                    EVENT_PAGEFAULT => {
                        let address = message[16..24].try_into().expect("eight bytes");
                        Event::Fault(u64::from_ne_bytes(address))
                    }
                    other => Event::Other(other),
                });
            }
        }
    }

    /// Another fd for the same userfaultfd.
    #[cfg(test)]
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
