//! A back-end with fewer rights than the test has: another user, without a capability, behind a seccomp filter.
//!
//! The only unsafe code here runs in the child between fork and exec: one prctl.

use anyhow::{Context, Result};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// Nobody, on every system.
const NOBODY: u32 = 65534;

/// What a back-end may do.
#[derive(Clone, Copy, Debug, Default)]
pub struct Confinement {
    /// It keeps CAP_SYS_PTRACE, and nothing else.
    pub ptrace: bool,
    /// userfaultfd(2) fails with this error number.
    pub filter: Option<u16>,
}

impl Confinement {
    /// A command that starts a program so. It runs as nobody, so what it needs is laid into a folder that is open to all.
    pub(super) fn command(self, program: &Path, folder: &Path) -> Result<Command> {
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o777))?;
        let copy = folder.join("vhost-user-net");
        std::fs::copy(program, &copy)?;
        let setpriv = crate::find_in_path("setpriv").context("there is no `setpriv` program")?;
        let mut command = Command::new(setpriv);
        command.args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"), "--clear-groups".into()]);
        if self.ptrace {
            command.args(["--inh-caps=+sys_ptrace", "--ambient-caps=+sys_ptrace"]);
        }
        command.arg(copy);
        if let Some(errno) = self.filter {
            // SAFETY: between fork and exec only a system call is made, which reads the filter from the stack.
            unsafe { command.pre_exec(move || refuse_userfaultfd(errno)) };
        }
        Ok(command)
    }
}

fn refuse_userfaultfd(errno: u16) -> io::Result<()> {
    let instruction = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut filter = [
        // The number of the call is the first word of `struct seccomp_data`.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_userfaultfd as u32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | u32::from(errno)),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its instructions outlive the call, which copies them.
    let done = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
