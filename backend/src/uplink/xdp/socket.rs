//! An AF_XDP socket: made, given its rings, bound to a NIC queue.
//!
//! ```text
//!   first socket of a NIC queue   UMEM, FILL, COMPLETION, RX     bind(flags)
//!   each further one              RX or TX                       bind(XDP_SHARED_UMEM, first)
//! ```
//! Order matters: memory and rings before bind, and the first socket before the others. Ring mappings are undone with the
//! ring's end, before the socket: a queue stays busy as long as one is left. Minimum kernel: Linux 5.10 for shared UMEM.
//! Not here: what the rings carry (`queue`), which sockets there are (`topology`).

use super::rings::{Consumer, Parts, Producer};
use super::umem::Umem;
use nix::sys::socket::{setsockopt, sockopt};
use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

/// Frames that one system call may send in copy mode (Linux 6.17; 32 without it).
const XDP_MAX_TX_SKB_BUDGET: libc::c_int = 9;
/// Bytes of frames that the kernel may hold for a socket in copy mode: more than its quota of them.
const SEND_BUFFER_BYTES: usize = 8 << 20;
/// How long a queue that another process still has is waited for: one that was killed keeps it for a moment.
const BUSY_WAIT: Duration = Duration::from_secs(3);
/// The pause between two attempts.
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// A received or sent frame, as in the kernel's rings.
pub type Descriptor = libc::xdp_desc;

/// A descriptor for a ring.
#[inline]
pub fn descriptor(addr: u64, len: u32) -> Descriptor {
    Descriptor { addr, len, options: 0 }
}

/// Whether frames are copied by the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroCopy {
    /// Not, if the driver can do without.
    #[default]
    Auto,
    /// Not; else an error.
    On,
    /// They are.
    Off,
}

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {error}")]
pub struct SocketError {
    /// The call, in words.
    pub step: &'static str,
    /// What the kernel says.
    pub error: io::Error,
}

impl SocketError {
    fn at(step: &'static str) -> impl Fn(io::Error) -> Self {
        move |error| Self { step, error }
    }
}

/// Counters of the kernel for one socket; those that are lost before they reach us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// Too long for a frame, or not for this socket.
    pub dropped: u64,
    /// Its RX ring was full.
    pub ring_full: u64,
    /// FILL was empty: it never should be.
    pub fill_empty: u64,
}

/// A socket without rings yet, or with them: its rings are handed out as it gets them.
#[derive(Debug)]
pub struct Socket {
    fd: Arc<OwnedFd>,
}

impl Socket {
    /// A new one.
    ///
    /// # Errors
    /// Mostly: CAP_NET_RAW is missing, or the kernel has no AF_XDP.
    pub fn new() -> Result<Self, SocketError> {
        // SAFETY: a plain system call that returns a new descriptor or -1.
        let raw = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if raw < 0 {
            return Err(SocketError::at("socket(AF_XDP)")(io::Error::last_os_error()));
        }
        // SAFETY: new, and nobody else's.
        Ok(Self { fd: Arc::new(unsafe { OwnedFd::from_raw_fd(raw) }) })
    }

    /// The descriptor, for polling and for the steering.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Registers the memory, and makes FILL and COMPLETION.
    ///
    /// # Errors
    /// Mostly: more memory is locked than the process may.
    pub fn register(
        &self,
        umem: &Arc<Umem>,
        fill: u32,
        completion: u32,
    ) -> Result<(Producer<u64>, Consumer<u64>), SocketError> {
        let (addr, len) = umem.area();
        // SAFETY: all-zero bytes are a valid xdp_umem_reg.
        let mut registration: libc::xdp_umem_reg = unsafe { std::mem::zeroed() };
        registration.addr = addr;
        registration.len = len;
        registration.chunk_size = umem.frame_size();
        self.set(libc::XDP_UMEM_REG, &registration).map_err(SocketError::at("registering frame memory"))?;
        let parts = self.ring(libc::XDP_UMEM_FILL_RING, fill, umem).map_err(SocketError::at("FILL ring"))?;
        // SAFETY: `ring` mapped it, its entries are addresses, and this is its only producer.
        let fill = unsafe { Producer::new(parts.0, parts.1) }.map_err(SocketError::at("FILL ring"))?;
        let at = SocketError::at("COMPLETION ring");
        let parts = self.ring(libc::XDP_UMEM_COMPLETION_RING, completion, umem).map_err(&at)?;
        // SAFETY: likewise, and this is its only consumer.
        let completion = unsafe { Consumer::new(parts.0, parts.1) }.map_err(&at)?;
        Ok((fill, completion))
    }

    /// Makes the ring for received frames.
    ///
    /// # Errors
    /// No memory, mostly.
    pub fn receive_ring(&self, size: u32, umem: &Arc<Umem>) -> Result<Consumer<Descriptor>, SocketError> {
        let at = SocketError::at("RX ring");
        let parts = self.ring(libc::XDP_RX_RING, size, umem).map_err(&at)?;
        // SAFETY: `ring` mapped it, its entries are descriptors (integers), and this is its only consumer.
        unsafe { Consumer::new(parts.0, parts.1) }.map_err(&at)
    }

    /// Makes the ring for frames to be sent.
    ///
    /// # Errors
    /// No memory, mostly.
    pub fn send_ring(&self, size: u32, umem: &Arc<Umem>) -> Result<Producer<Descriptor>, SocketError> {
        let at = SocketError::at("TX ring");
        let parts = self.ring(libc::XDP_TX_RING, size, umem).map_err(&at)?;
        // Both only make it faster: without them the kernel takes fewer frames in one call.
        let budget = size.min(SEND_BUDGET_MAX) as libc::c_int;
        if let Err(error) = self.set(XDP_MAX_TX_SKB_BUDGET, &budget) {
            tracing::debug!(%error, "XDP_MAX_TX_SKB_BUDGET");
        }
        if setsockopt(&self.fd, sockopt::SndBufForce, &SEND_BUFFER_BYTES).is_err() {
            let _ = setsockopt(&self.fd, sockopt::SndBuf, &SEND_BUFFER_BYTES);
        }
        // SAFETY: `ring` mapped it, its entries are descriptors, and this is its only producer.
        unsafe { Producer::new(parts.0, parts.1) }.map_err(&at)
    }

    /// Binds the first socket of a NIC queue.
    ///
    /// # Errors
    /// `EBUSY`: somebody else has the queue. `EINVAL`: there is no such queue. `EOPNOTSUPP`: no zero-copy.
    pub fn bind(&self, interface: u32, queue: u32, zero_copy: ZeroCopy) -> io::Result<()> {
        let copy = match zero_copy {
            ZeroCopy::Auto => 0,
            ZeroCopy::On => libc::XDP_ZEROCOPY,
            ZeroCopy::Off => libc::XDP_COPY,
        };
        let start = Instant::now();
        loop {
            match self.bind_with(interface, queue, copy | libc::XDP_USE_NEED_WAKEUP, 0) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && start.elapsed() < BUSY_WAIT => {
                    std::thread::sleep(BUSY_PAUSE);
                }
                other => return other,
            }
        }
    }

    /// Binds a further socket to the queue of a first one, whose memory, FILL and COMPLETION it shares.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn bind_shared(&self, interface: u32, queue: u32, first: &Socket) -> Result<(), SocketError> {
        self.bind_with(interface, queue, libc::XDP_SHARED_UMEM, first.fd.as_raw_fd() as u32)
            .map_err(SocketError::at("binding a further socket"))
    }

    fn bind_with(&self, interface: u32, queue: u32, flags: u16, shared: u32) -> io::Result<()> {
        // SAFETY: all-zero bytes are a valid sockaddr_xdp.
        let mut address: libc::sockaddr_xdp = unsafe { std::mem::zeroed() };
        address.sxdp_family = libc::AF_XDP as _;
        address.sxdp_flags = flags;
        address.sxdp_ifindex = interface;
        address.sxdp_queue_id = queue;
        address.sxdp_shared_umem_fd = shared;
        let len = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the address is a live local of that length.
        match unsafe { libc::bind(self.fd.as_raw_fd(), (&raw const address).cast(), len) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Whether the driver reads and writes the frames itself.
    pub fn is_zero_copy(&self) -> bool {
        // SAFETY: all-zero bytes are a valid xdp_options.
        let mut options: libc::xdp_options = unsafe { std::mem::zeroed() };
        self.get(libc::XDP_OPTIONS, &mut options).is_ok() && options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0
    }

    /// What the kernel has lost so far.
    pub fn losses(&self) -> Losses {
        // SAFETY: all-zero bytes are valid xdp_statistics.
        let mut statistics: libc::xdp_statistics = unsafe { std::mem::zeroed() };
        let _ = self.get(libc::XDP_STATISTICS, &mut statistics);
        Losses {
            dropped: statistics.rx_dropped,
            ring_full: statistics.rx_ring_full,
            fill_empty: statistics.rx_fill_ring_empty_descs,
        }
    }

    /// Makes a ring of `size` entries and maps it.
    fn ring(
        &self,
        option: libc::c_int,
        size: u32,
        umem: &Arc<Umem>,
    ) -> io::Result<(Parts, Box<dyn Any + Send>)> {
        self.set(option, &size)?;
        // SAFETY: all-zero bytes are valid xdp_mmap_offsets.
        let mut offsets: libc::xdp_mmap_offsets = unsafe { std::mem::zeroed() };
        self.get(libc::XDP_MMAP_OFFSETS, &mut offsets)?;
        let (offsets, page, entry) = match option {
            libc::XDP_RX_RING => (offsets.rx, libc::XDP_PGOFF_RX_RING, size_of::<Descriptor>()),
            libc::XDP_TX_RING => (offsets.tx, libc::XDP_PGOFF_TX_RING, size_of::<Descriptor>()),
            libc::XDP_UMEM_FILL_RING => (offsets.fr, libc::XDP_UMEM_PGOFF_FILL_RING as _, size_of::<u64>()),
            _ => (offsets.cr, libc::XDP_UMEM_PGOFF_COMPLETION_RING as _, size_of::<u64>()),
        };
        let len = offsets.desc as usize + size as usize * entry;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, self.fd.as_raw_fd(), page) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = Mapped { start, len, _umem: umem.clone() };
        let at = |offset: u64| start.cast::<u8>().wrapping_add(offset as usize);
        let index = |offset: u64| at(offset).cast_const().cast::<AtomicU32>();
        let parts = Parts {
            producer: index(offsets.producer),
            consumer: index(offsets.consumer),
            flags: index(offsets.flags),
            entries: at(offsets.desc),
            size,
        };
        Ok((parts, Box::new(memory)))
    }

    fn set<T>(&self, option: libc::c_int, value: &T) -> io::Result<()> {
        let len = size_of::<T>() as libc::socklen_t;
        // SAFETY: the value is live and of that length; the kernel reads it.
        let set = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_XDP,
                option,
                std::ptr::from_ref(value).cast(),
                len,
            )
        };
        if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn get<T>(&self, option: libc::c_int, value: &mut T) -> io::Result<()> {
        let mut len = size_of::<T>() as libc::socklen_t;
        // SAFETY: the value is live and of that length; the kernel fills it (with integers).
        let got = unsafe {
            let value = std::ptr::from_mut(value).cast();
            libc::getsockopt(self.fd.as_raw_fd(), libc::SOL_XDP, option, value, &raw mut len)
        };
        if got == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Frames that one wake-up may send: the loop has others to look after.
const SEND_BUDGET_MAX: u32 = 256;

/// A ring's mapping, and the frames its entries speak of.
struct Mapped {
    start: *mut libc::c_void,
    len: usize,
    _umem: Arc<Umem>,
}

// SAFETY: an address range, used by the ring's end alone.
unsafe impl Send for Mapped {}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: our own mapping; the ring's end that used it is being dropped.
        unsafe { libc::munmap(self.start, self.len) };
    }
}
