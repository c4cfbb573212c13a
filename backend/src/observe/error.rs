//! Why fault latency cannot be measured. Each text says what to do about it.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

/// Why nothing is measured. The program itself runs all the same.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// No rights.
    #[error(
        "{0} missing: run as root, or with systemd's AmbientCapabilities=CAP_BPF CAP_PERFMON CAP_SYSLOG and with \
         {pins} writable for this user",
        pins = crate::bpf::PIN_ROOT
    )]
    NotAllowed(String),
    /// Process ids here are not those that the kernel's programs see.
    #[error("this process runs in a PID namespace of its own: start it in the host's (docker: --pid=host)")]
    PidNamespace,
    /// The kernel does not describe its structures.
    #[error("this kernel has no type information in {btf}: it needs CONFIG_DEBUG_INFO_BTF", btf = super::kernel::BTF)]
    NoBtf,
    /// A structure is not what it is known to be.
    #[error("this kernel's {0} has no field {1}: a newer version of this program may know it")]
    NoField(&'static str, &'static str),
    /// The fallback does not know where to look.
    #[error(
        "this kernel lets no function be patched, and without CAP_SYSLOG /proc/kallsyms does not tell where \
         handle_userfault is: add it to AmbientCapabilities"
    )]
    NoSymbols,
    /// The kernel does not take the programs.
    #[error("the kernel refuses the programs: {0}")]
    Refused(String),
    /// No place for pins.
    #[error(transparent)]
    BpfFs(io::Error),
    /// A pin cannot be made.
    #[error("{0}: cannot be made: {1}")]
    Pin(PathBuf, String),
    /// Another process has the name.
    #[error("instance {instance} is that of process {pid}: give this one another --instance NAME")]
    InUse {
        /// The name.
        instance: String,
        /// Who has it.
        pid: u32,
    },
    /// Left behind by a version with other layouts.
    #[error(
        "{dir} was left by a version with other layouts: `vhost-user-net unload --instance {instance}` removes it",
        dir = crate::bpf::pin_dir(.0).display(), instance = .0
    )]
    OtherLayout(String),
}
