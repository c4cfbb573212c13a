//! The tap uplink: created by name or inherited by descriptor, with vnet_hdr, single- or multi-queue.
//!
//! Lives here: how a tap is had, probed and set up. How frames move: `tap_queue`.
//! Not here: what a header means (`net::header`), which offloads the driver took (`net::features`).

pub use super::tap_queue::TapQueue;
use super::tap_steering::Steering;
use super::{Capabilities, FrameFormat, Uplink};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use virtio_bindings::virtio_net as vn;

const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;
const TUN_F_TSO_ECN: libc::c_ulong = 0x08;
const TUN_F_USO4: libc::c_ulong = 0x20;
const TUN_F_USO6: libc::c_ulong = 0x40;

/// Longest interface name, bytes (IFNAMSIZ less the final NUL).
pub const NAME_MAX: usize = libc::IFNAMSIZ - 1;

/// How long a tap that another process still has is waited for.
const BUSY_WAIT: Duration = Duration::from_secs(3);
/// The pause between two attempts.
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// Why a tap could not be had. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// /dev/net/tun does not open.
    #[error(
        "/dev/net/tun cannot be opened: {0}; load the tun module (`modprobe tun`) or give the process access to it"
    )]
    NoTun(io::Error),
    /// The interface may not be created or attached.
    #[error(
        "tap {0}: not permitted; run with CAP_NET_ADMIN, or create it for this user first: `ip tuntap add dev {0} \
         mode tap user NAME vnet_hdr{1}`, or pass an open tap with --uplink tap-fd:N"
    )]
    NotPermitted(String, &'static str),
    /// Another process has it.
    #[error("tap {0}: in use by another process; stop that process or use another name")]
    Busy(String),
    /// An interface of that name exists that is no tap, or one with other flags.
    #[error(
        "tap {0}: an interface of this name exists that is not a tap with the same queue mode; for {1} queue pair(s) create it with `ip tuntap add dev {0} mode tap vnet_hdr{2}`"
    )]
    WrongKind(String, u16, &'static str),
    /// An inherited descriptor is no tap.
    #[error("tap-fd:{0}: descriptor {0} is not an open tap ({1}); pass one that TUNSETIFF was called on")]
    NotATap(RawFd, io::Error),
    /// An inherited tap has no vnet_hdr.
    #[error("tap-fd:{0}: the tap was opened without IFF_VNET_HDR; open it with vnet_hdr on")]
    NoVnetHeader(RawFd),
    /// Inherited descriptors of several interfaces.
    #[error("the tap descriptors belong to different interfaces ({0}); pass queues of one multi-queue tap")]
    DifferentTaps(String),
    /// Some other call failed.
    #[error("tap {0}: {1}: {2}")]
    Call(String, &'static str, io::Error),
}

/// A tap device with its queues' descriptors.
pub struct Tap {
    description: String,
    name: String,
    queues: Vec<Arc<OwnedFd>>,
    multi_queue: bool,
    capabilities: Capabilities,
    header_len: AtomicUsize,
    /// As far as we know: others can change it, too.
    mtu: Arc<AtomicU16>,
    /// Of a multi-queue tap, where the kernel lets us.
    steering: Mutex<Option<Steering>>,
}

pub(super) fn ioctl(fd: &impl AsRawFd, request: libc::c_ulong, argument: libc::c_ulong) -> io::Result<()> {
    // SAFETY: used only with tun requests that take an integer by value, or a pointer to a live local.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request as _, argument) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn ifreq(name: &str) -> libc::ifreq {
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name[..NAME_MAX].iter_mut().zip(name.as_bytes()) {
        *to = *from as libc::c_char;
    }
    request
}

impl Tap {
    /// Creates the tap, or attaches to one that exists, with a descriptor for each queue pair.
    /// The interface is not persistent: it goes with the process unless it was created before.
    ///
    /// # Errors
    /// A [`TapError`] that says what to do.
    pub fn open(name: &str, queue_pairs: u16, mtu: Option<u16>) -> Result<Self, TapError> {
        let multi_queue = queue_pairs > 1;
        let multi_queue_word = if multi_queue { " multi_queue" } else { "" };
        let mut queues = Vec::new();
        for _ in 0..queue_pairs {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open("/dev/net/tun")
                .map_err(TapError::NoTun)?;
            let mut request = ifreq(name);
            let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
            let many = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
            request.ifr_ifru.ifru_flags = (flags | many) as libc::c_short;
            attach(&file, &mut request).map_err(|error| match error.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => TapError::NotPermitted(name.into(), multi_queue_word),
                Some(libc::EBUSY) => TapError::Busy(name.into()),
                Some(libc::EINVAL) => TapError::WrongKind(name.into(), queue_pairs, multi_queue_word),
                _ => TapError::Call(name.into(), "TUNSETIFF", error),
            })?;
            queues.push(Arc::new(OwnedFd::from(file)));
        }
        Self::build(format!("tap:{name}"), name.into(), queues, multi_queue, mtu)
    }

    /// Takes over open tap descriptors (libvirt, systemd): one for each queue pair, all of one interface.
    ///
    /// # Errors
    /// A [`TapError`] that says what to do.
    pub fn inherit(numbers: &[RawFd], mtu: Option<u16>) -> Result<Self, TapError> {
        let mut queues = Vec::new();
        let mut names = Vec::new();
        for &raw in numbers {
            let (fd, name) = take_over(raw)?;
            queues.push(Arc::new(fd));
            names.push(name);
        }
        let name = names.first().cloned().unwrap_or_default();
        if names.iter().any(|other| *other != name) {
            return Err(TapError::DifferentTaps(names.join(", ")));
        }
        let list = numbers.iter().map(RawFd::to_string).collect::<Vec<_>>().join(":");
        let multi_queue = queues.len() > 1;
        Self::build(format!("tap-fd:{list} ({name})"), name, queues, multi_queue, mtu)
    }

    fn build(
        description: String,
        name: String,
        queues: Vec<Arc<OwnedFd>>,
        multi_queue: bool,
        mtu: Option<u16>,
    ) -> Result<Self, TapError> {
        let Some(first) = queues.first() else {
            return Err(TapError::Call(name, "open", io::Error::from_raw_os_error(libc::EINVAL)));
        };
        let uso = ioctl(
            first,
            libc::TUNSETOFFLOAD as _,
            TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | TUN_F_USO4 | TUN_F_USO6,
        )
        .is_ok();
        let base = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
        let tso = uso || ioctl(first, libc::TUNSETOFFLOAD as _, base).is_ok();
        // Whoever opened an inherited tap may have limited it; without a limit no frame of a burst finds it full.
        let unlimited = libc::c_int::MAX;
        ioctl(first, libc::TUNSETSNDBUF as _, (&raw const unlimited) as libc::c_ulong)
            .map_err(|error| TapError::Call(name.clone(), "TUNSETSNDBUF", error))?;
        ioctl(first, libc::TUNSETOFFLOAD as _, 0)
            .map_err(|error| TapError::Call(name.clone(), "TUNSETOFFLOAD", error))?;
        let mut offloads = 1 << vn::VIRTIO_NET_F_CSUM
            | 1 << vn::VIRTIO_NET_F_HOST_TSO4
            | 1 << vn::VIRTIO_NET_F_HOST_TSO6
            | 1 << vn::VIRTIO_NET_F_HOST_ECN;
        if tso {
            offloads |= 1 << vn::VIRTIO_NET_F_GUEST_CSUM
                | 1 << vn::VIRTIO_NET_F_GUEST_TSO4
                | 1 << vn::VIRTIO_NET_F_GUEST_TSO6
                | 1 << vn::VIRTIO_NET_F_GUEST_ECN;
        }
        if uso {
            offloads |= 1 << vn::VIRTIO_NET_F_HOST_USO
                | 1 << vn::VIRTIO_NET_F_GUEST_USO4
                | 1 << vn::VIRTIO_NET_F_GUEST_USO6;
        }
        let mtu = interface_mtu(&name, mtu)
            .map_err(|error| TapError::Call(name.clone(), "setting its MTU", error))?;
        let capabilities = Capabilities { offloads, mtu };
        let tap = Self {
            description,
            name,
            queues,
            multi_queue,
            capabilities,
            header_len: AtomicUsize::new(12),
            mtu: Arc::new(AtomicU16::new(mtu)),
            steering: Mutex::new(None),
        };
        let format = FrameFormat { header_len: 12, features: 0 };
        tap.configure(format).map_err(|error| TapError::Call(tap.name.clone(), "TUNSETVNETHDRSZ", error))?;
        // Only the first queue takes part in the kernel's steering until the driver enables others.
        for queue in 1..tap.queues.len() {
            tap.set_queue_active(queue as u16, false)
                .map_err(|error| TapError::Call(tap.name.clone(), "TUNSETQUEUE", error))?;
        }
        if tap.multi_queue {
            *tap.steering() = Steering::start(&tap.queues[0], tap.queues.len() as u16, &tap.description);
        }
        Ok(tap)
    }

    fn steering(&self) -> MutexGuard<'_, Option<Steering>> {
        self.steering.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The steering program's counters; `None` without one.
    pub fn steering_stats(&self) -> Option<ebpf_common::tap::Stats> {
        self.steering().as_ref()?.stats().ok()
    }

    /// The queues, in the order of the queue pairs.
    pub fn queues(&self) -> Vec<TapQueue> {
        self.queues.iter().map(|fd| TapQueue::new(fd.clone(), self.mtu.clone(), &self.description)).collect()
    }

    /// Brings the interface up.
    ///
    /// # Errors
    /// What the kernel says (mostly missing CAP_NET_ADMIN).
    pub fn bring_up(&self) -> io::Result<()> {
        let socket = any_socket()?;
        let mut request = ifreq(&self.name);
        ioctl(&socket, libc::SIOCGIFFLAGS as _, (&raw mut request) as libc::c_ulong)?;
        // SAFETY: SIOCGIFFLAGS filled the flags member.
        let flags = unsafe { request.ifr_ifru.ifru_flags } | libc::IFF_UP as libc::c_short;
        request.ifr_ifru.ifru_flags = flags;
        ioctl(&socket, libc::SIOCSIFFLAGS as _, (&raw mut request) as libc::c_ulong)
    }
}

/// Attaches a descriptor to the interface. A process that was killed keeps its tap for a moment: the kernel ends its
/// io_uring operations in the background. So a busy tap is waited for, before the loop and for a bounded time.
fn attach(file: &std::fs::File, request: &mut libc::ifreq) -> io::Result<()> {
    let start = std::time::Instant::now();
    loop {
        match ioctl(file, libc::TUNSETIFF as _, (&raw mut *request) as libc::c_ulong) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && start.elapsed() < BUSY_WAIT => {
                std::thread::sleep(BUSY_PAUSE);
            }
            other => return other,
        }
    }
}

/// Takes over one descriptor of an open tap; returns it with the interface's name.
fn take_over(raw: RawFd) -> Result<(OwnedFd, String), TapError> {
    use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
    // SAFETY: F_GETFD only asks whether the number is an open descriptor.
    if raw < 0 || unsafe { libc::fcntl(raw, libc::F_GETFD) } == -1 {
        return Err(TapError::NotATap(raw, io::Error::from_raw_os_error(libc::EBADF)));
    }
    let mut request = ifreq("");
    ioctl(&raw, libc::TUNGETIFF as _, (&raw mut request) as libc::c_ulong)
        .map_err(|error| TapError::NotATap(raw, error))?;
    // SAFETY: TUNGETIFF filled the flags member.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    if flags & libc::IFF_TAP == 0 {
        return Err(TapError::NotATap(raw, io::Error::other("it is a tun, not a tap")));
    }
    if flags & libc::IFF_VNET_HDR == 0 {
        return Err(TapError::NoVnetHeader(raw));
    }
    // SAFETY: the number is an open tap, was passed to this process for this purpose on its command line, and the
    // configuration names each number once, so nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    let bytes: Vec<u8> = request.ifr_name.iter().map(|c| *c as u8).take_while(|c| *c != 0).collect();
    let name = String::from_utf8_lossy(&bytes).into_owned();
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
        .and_then(|_| fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)))
        .map_err(|error| TapError::Call(name.clone(), "fcntl", error.into()))?;
    Ok((fd, name))
}

fn any_socket() -> io::Result<OwnedFd> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    Ok(socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?)
}

/// Reads the interface's MTU, after setting it where one is given.
fn interface_mtu(name: &str, set: Option<u16>) -> io::Result<u16> {
    let socket = any_socket()?;
    let mut request = ifreq(name);
    if let Some(mtu) = set {
        request.ifr_ifru.ifru_mtu = mtu.into();
        ioctl(&socket, libc::SIOCSIFMTU as _, (&raw mut request) as libc::c_ulong)?;
    }
    ioctl(&socket, libc::SIOCGIFMTU as _, (&raw mut request) as libc::c_ulong)?;
    // SAFETY: SIOCGIFMTU filled the MTU member.
    Ok(u16::try_from(unsafe { request.ifr_ifru.ifru_mtu }).unwrap_or(u16::MAX))
}

impl Uplink for Tap {
    fn describe(&self) -> &str {
        &self.description
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn configure(&self, format: FrameFormat) -> io::Result<()> {
        let has = |bit: u32| format.features & (1 << bit) != 0;
        let mut flags = 0;
        if has(vn::VIRTIO_NET_F_GUEST_CSUM) {
            flags |= TUN_F_CSUM;
            for (bit, flag) in [
                (vn::VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
                (vn::VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
                (vn::VIRTIO_NET_F_GUEST_USO4, TUN_F_USO4),
                (vn::VIRTIO_NET_F_GUEST_USO6, TUN_F_USO6),
            ] {
                flags |= if has(bit) { flag } else { 0 };
            }
            // TUN_F_TSO_ECN only refines TSO; alone the kernel refuses it.
            if has(vn::VIRTIO_NET_F_GUEST_ECN) && flags & (TUN_F_TSO4 | TUN_F_TSO6) != 0 {
                flags |= TUN_F_TSO_ECN;
            }
        }
        // USO needs both halves or none (the kernel refuses one alone).
        if flags & (TUN_F_USO4 | TUN_F_USO6) != TUN_F_USO4 | TUN_F_USO6 {
            flags &= !(TUN_F_USO4 | TUN_F_USO6);
        }
        let little_endian: libc::c_int = 1;
        let header_len = format.header_len as libc::c_int;
        let first = &self.queues[0];
        ioctl(first, libc::TUNSETVNETHDRSZ as _, (&raw const header_len) as libc::c_ulong)?;
        ioctl(first, libc::TUNSETVNETLE as _, (&raw const little_endian) as libc::c_ulong)?;
        ioctl(first, libc::TUNSETOFFLOAD as _, flags)?;
        self.header_len.store(format.header_len, Ordering::Relaxed);
        Ok(())
    }

    fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        let mtu = interface_mtu(&self.name, Some(mtu))?;
        self.mtu.store(mtu, Ordering::Relaxed);
        Ok(())
    }

    fn set_queue_active(&self, queue: u16, active: bool) -> io::Result<()> {
        // The first queue stays: a tap without queues drops what the host sends without a trace.
        let Some(fd) = self.queues.get(usize::from(queue)).filter(|_| self.multi_queue && queue > 0) else {
            return Ok(());
        };
        let mut request = ifreq("");
        let flag = if active { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = flag as libc::c_short;
        let mut steering = self.steering();
        match ioctl(fd, libc::TUNSETQUEUE as _, (&raw mut request) as libc::c_ulong) {
            // It was in that state already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            Ok(()) => steering.as_mut().map_or(Ok(()), |steering| steering.set(queue, active)),
            other => other,
        }
    }

    fn announce(&self, frame: &[u8]) -> io::Result<()> {
        let mut bytes = vec![0; self.header_len.load(Ordering::Relaxed)];
        bytes.extend_from_slice(frame);
        nix::unistd::write(&self.queues[0], &bytes)?;
        Ok(())
    }
}
