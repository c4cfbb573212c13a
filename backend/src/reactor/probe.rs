//! Ring set-up: which flags this kernel takes, which operations it has, and what to tell the operator
//! where io_uring cannot be had.
#![forbid(unsafe_code)]

use io_uring::{IoUring, Probe, opcode};
use std::io;

/// Submission queue entries of a worker's ring. More operations than this may be in flight; it only bounds
/// how many are handed to the kernel at once.
pub const SQ_ENTRIES: u32 = 256;
/// Completion queue entries of a worker's ring. The kernel keeps what does not fit (IORING_FEAT_NODROP).
pub const CQ_ENTRIES: u32 = 1024;
/// The oldest kernel that has every operation used here (MSG_RING: 5.18) and IORING_SETUP_TASKRUN_FLAG (5.19).
pub const MINIMUM_KERNEL: &str = "5.19";

/// Why a ring could not be made. The text is what the operator reads.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// `io_uring_setup` is not permitted.
    #[error(
        "io_uring is disabled for this process: set `sysctl kernel.io_uring_disabled=0`, or join the group in \
         kernel.io_uring_group, or allow io_uring_setup in the container's seccomp profile ({0})"
    )]
    NotPermitted(io::Error),
    /// The kernel has no io_uring at all.
    #[error("this kernel has no io_uring: Linux {MINIMUM_KERNEL} or newer is needed ({0})")]
    NoKernelSupport(io::Error),
    /// The kernel lacks an operation.
    #[error("this kernel's io_uring lacks {0}: Linux {MINIMUM_KERNEL} or newer is needed")]
    MissingOperation(&'static str),
    /// Not enough lockable memory or another resource.
    #[error("io_uring cannot be set up: {0}; raise RLIMIT_MEMLOCK (`ulimit -l`, systemd LimitMEMLOCK=)")]
    NoMemory(io::Error),
    /// Anything else the kernel said.
    #[error("io_uring cannot be set up: {0}")]
    Other(io::Error),
}

fn classify(error: io::Error) -> SetupError {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => SetupError::NotPermitted(error),
        Some(libc::ENOSYS) => SetupError::NoKernelSupport(error),
        Some(libc::ENOMEM) => SetupError::NoMemory(error),
        _ => SetupError::Other(error),
    }
}

/// Makes a ring with the best flags that this kernel takes and checks that it has every operation.
///
/// # Errors
/// A [`SetupError`] that says what to do.
pub fn build() -> Result<IoUring, SetupError> {
    // SINGLE_ISSUER and DEFER_TASKRUN (6.1) let completions run only when the loop asks for them.
    // COOP_TASKRUN (5.19) at least spares the inter-processor interrupts.
    let ring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_cqsize(CQ_ENTRIES)
        .build(SQ_ENTRIES)
        .or_else(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => IoUring::builder()
                .setup_coop_taskrun()
                .setup_taskrun_flag()
                .setup_cqsize(CQ_ENTRIES)
                .build(SQ_ENTRIES),
            _ => Err(error),
        })
        .map_err(|error| match error.raw_os_error() {
            // Flags of 5.19 refused: an older kernel.
            Some(libc::EINVAL) => SetupError::NoKernelSupport(error),
            _ => classify(error),
        })?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).map_err(classify)?;
    let needed = [
        (opcode::Accept::CODE, "ACCEPT"),
        (opcode::AsyncCancel::CODE, "ASYNC_CANCEL"),
        (opcode::Connect::CODE, "CONNECT"),
        (opcode::MsgRingData::CODE, "MSG_RING"),
        (opcode::PollAdd::CODE, "POLL_ADD"),
        (opcode::Read::CODE, "READ"),
        (opcode::Recv::CODE, "RECV"),
        (opcode::RecvMsg::CODE, "RECVMSG"),
        (opcode::Send::CODE, "SEND"),
        (opcode::SendMsg::CODE, "SENDMSG"),
        (opcode::Timeout::CODE, "TIMEOUT"),
        (opcode::Write::CODE, "WRITE"),
    ];
    for (code, name) in needed {
        if !probe.is_supported(code) {
            return Err(SetupError::MissingOperation(name));
        }
    }
    Ok(ring)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_name_the_remedy() {
        let text = classify(io::Error::from_raw_os_error(libc::EPERM)).to_string();
        assert!(text.contains("kernel.io_uring_disabled"), "{text}");
        let text = classify(io::Error::from_raw_os_error(libc::ENOSYS)).to_string();
        assert!(text.contains(MINIMUM_KERNEL), "{text}");
        let text = classify(io::Error::from_raw_os_error(libc::ENOMEM)).to_string();
        assert!(text.contains("RLIMIT_MEMLOCK"), "{text}");
    }
}
