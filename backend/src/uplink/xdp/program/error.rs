//! Why a program could not be attached, as sentences that say what to do.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

/// Why. The first field of each is the interface.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// No BPF file system.
    #[error("xdp:{0}: nothing can be pinned: {1}")]
    NoBpfFs(String, io::Error),
    /// Missing capabilities.
    #[error("xdp:{0}: {1}: not permitted; run with CAP_BPF, CAP_NET_ADMIN and CAP_NET_RAW, or as root")]
    NotPermitted(String, &'static str),
    /// The interface is not there (any more).
    #[error("xdp:{0}: no such interface; `ip link show` lists those of this network namespace")]
    NoInterface(String),
    /// Another process serves it.
    #[error(
        "xdp:{0}: served by process {1} (a number that may be of another PID namespace); stop that process, or use another interface"
    )]
    Served(String, u32),
    /// What is pinned is of another version of this program.
    #[error(
        "xdp:{0}: what is pinned in {1} has another layout ({2}); remove it first: `vhost-user-net unload {0}` (frames go to the host's stack from then on)"
    )]
    Layout(String, PathBuf, String),
    /// Somebody else's program.
    #[error(
        "xdp:{interface}: another XDP program is attached: number {id}, {name}, {mode} mode (`bpftool prog show id {id}`, `bpftool link show`); detach it (`ip link set dev {interface} xdp{} off`, or stop the process that holds its link), or say replace=on",
        if *mode == "skb" { "generic" } else { "drv" }
    )]
    Foreign {
        /// The interface.
        interface: String,
        /// The program's number.
        id: u32,
        /// Its name, or what is known of it.
        name: String,
        /// native, skb or hardware.
        mode: &'static str,
    },
    /// The driver takes no program.
    #[error(
        "xdp:{0}: the driver takes no program ({1}); use mode=auto or mode=skb. Common causes: a driver without XDP, an MTU \
         that is too large for it, too few queues (veth: the peer may not have more transmit queues than this end has \
         receive queues)"
    )]
    NoNative(String, io::Error),
    /// More than there may be.
    #[error(
        "xdp:{0}: {1} queues, {2} ports and {3} sockets for each queue: from 1 to {queues}, {ports} and {slots}",
        queues = ebpf_common::xdp::QUEUES_MAX,
        ports = ebpf_common::xdp::PORTS_MAX,
        slots = super::SLOTS_MAX
    )]
    Sizes(String, u32, u32, u32),
    /// The kernel refuses the program itself.
    #[error("xdp:{0}: the kernel does not load the program: {1}; Linux 5.19 or newer is needed")]
    Load(String, String),
    /// Some other call failed.
    #[error("xdp:{0}: {1}: {2}")]
    Call(String, &'static str, io::Error),
}

impl ProgramError {
    /// A call that failed, by what the kernel says.
    pub(super) fn call(interface: &str, what: &'static str, error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted(interface.into(), what),
            Some(libc::ENODEV) => Self::NoInterface(interface.into()),
            _ => Self::Call(interface.into(), what, error),
        }
    }
}
