//! A network name space for the whole measurement. Not here: what is in it.
#![forbid(unsafe_code)]

use std::fs;
use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns, unshare};

/// The calling thread's own network name space; dropping it takes the thread back. Processes and threads that it
/// starts meanwhile are inside. All interfaces in it vanish with the last of them.
#[derive(Debug)]
pub struct NetSpace {
    before: File,
}

const OWN_NETNS: &str = "/proc/thread-self/ns/net";

impl NetSpace {
    /// Makes a name space and moves the calling thread into it. Interfaces get no IPv6 (whose own packets would be
    /// in every count).
    pub fn enter() -> Result<Self> {
        let before = File::open(OWN_NETNS).context(OWN_NETNS)?;
        unshare(CloneFlags::CLONE_NEWNET).context("a network name space of our own (needs CAP_SYS_ADMIN)")?;
        let it = Self { before };
        let switch = "/proc/sys/net/ipv6/conf/default/disable_ipv6";
        if Path::new(switch).exists() {
            fs::write(switch, "1").context(switch)?;
        }
        Ok(it)
    }
}

impl Drop for NetSpace {
    fn drop(&mut self) {
        let _ = setns(&self.before, CloneFlags::CLONE_NEWNET);
    }
}
