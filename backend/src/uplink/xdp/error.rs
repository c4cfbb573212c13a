//! Why an XDP uplink cannot be had: sentences for the operator, each with what to do.
#![forbid(unsafe_code)]

use super::program::ProgramError;
use super::socket::SocketError;
use std::io;

/// What is wrong, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum XdpError {
    /// No such interface.
    #[error("xdp:{0}: there is no interface {0}; create it first, or correct the name")]
    NoInterface(String),
    /// More queues than there are.
    #[error(
        "xdp:{0}: queues={1}, but the interface has {2}; use queues={2} or less, or give it more: `ethtool -L {0} combined {1}`"
    )]
    TooManyQueues(String, u32, u32),
    /// More queues than can be served.
    #[error(
        "xdp:{0}: its {1} receive queues are more than {2}, give it fewer: `ethtool -L {0} combined {2}`"
    )]
    ManyQueues(String, u32, u32),
    /// More ports than can be steered to.
    #[error("xdp:{0}: {1} ports are too many for one interface, use up to {2}")]
    TooManyPorts(String, usize, u32),
    /// More pairs than can be steered to.
    #[error(
        "xdp:{0}: its ports have {1} queue pairs for one receive queue, {2} are the most: use fewer, or more queues"
    )]
    TooManySockets(String, u32, u32),
    /// Frames would not fit.
    #[error("xdp:{0}: its MTU of {1} is too large for AF_XDP, {2} is the largest: `ip link set {0} mtu {2}`")]
    MtuTooLarge(String, u32, u32),
    /// A port wants a larger MTU than the interface has.
    #[error(
        "xdp:{0}: port {1} has mtu {2}, the interface {3}: lower the port's, or `ip link set {0} mtu {2}`"
    )]
    PortMtu(String, String, u16, u32),
    /// Capabilities.
    #[error("xdp:{0}: {1}: not permitted; run with CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF (or as root)")]
    NotPermitted(String, &'static str),
    /// No AF_XDP in this kernel.
    #[error("xdp:{0}: this kernel has no AF_XDP (CONFIG_XDP_SOCKETS); use a tap")]
    NoAfXdp(String),
    /// The driver cannot do zero-copy.
    #[error("xdp:{0}: its driver cannot do zero-copy ({1}); use zerocopy=auto or zerocopy=off")]
    NoZeroCopy(String, io::Error),
    /// Somebody else has the queue.
    #[error(
        "xdp:{0}: receive queue {1} is in use by another AF_XDP program; stop it, or use another interface"
    )]
    Busy(String, u32),
    /// The queue does not exist.
    #[error("xdp:{0}: it has no receive queue {1} that takes AF_XDP sockets; use queues={1} or less")]
    NoQueue(String, u32),
    /// Memory for frames.
    #[error("xdp:{0}: {1} KiB of memory for frames cannot be had: {2}")]
    Memory(String, u32, io::Error),
    /// Locked memory.
    #[error(
        "xdp:{0}: {1} KiB of memory for frames cannot be locked ({2}); raise the limit (`ulimit -l`, systemd LimitMEMLOCK=) or give CAP_IPC_LOCK"
    )]
    Locked(String, u32, io::Error),
    /// The program.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// Some other call failed.
    #[error("xdp:{0}: {1}: {2}")]
    Call(String, &'static str, io::Error),
}

impl XdpError {
    /// An interface that was not found.
    pub(super) fn no_interface(name: &str, error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENODEV) => Self::NoInterface(name.into()),
            _ => Self::Call(name.into(), "looking the interface up", error),
        }
    }

    /// A socket was not made.
    pub(super) fn socket(name: &str, SocketError { step, error }: SocketError) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted(name.into(), step),
            Some(libc::EAFNOSUPPORT) => Self::NoAfXdp(name.into()),
            _ => Self::Call(name.into(), step, error),
        }
    }

    /// `kib` of memory were not registered.
    pub(super) fn register(name: &str, kib: u32, error: SocketError) -> Self {
        match error.error.raw_os_error() {
            // ENOBUFS: more than RLIMIT_MEMLOCK.
            Some(libc::ENOBUFS | libc::ENOMEM) => Self::Locked(name.into(), kib, error.error),
            _ => Self::socket(name, error),
        }
    }

    /// The first socket of a queue was not bound.
    pub(super) fn bind(name: &str, queue: u32, error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EBUSY) => Self::Busy(name.into(), queue),
            Some(libc::EINVAL) => Self::NoQueue(name.into(), queue),
            Some(libc::EOPNOTSUPP | libc::EPROTONOSUPPORT) => Self::NoZeroCopy(name.into(), error),
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted(name.into(), "binding a socket"),
            _ => Self::Call(name.into(), "binding a socket", error),
        }
    }
}
