//! A veth pair of one queue in the calling thread's name space.
#![forbid(unsafe_code)]

use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::wire::Link;

/// Where the contender attaches.
const NEAR: &str = "bench0";
/// The outside: where frames come out, and where the generator puts them in.
const FAR: &str = "far0";

/// Both ends, up, without addresses. Dropping it takes them away, whoever uses them.
pub struct Veth {
    /// The contender's end.
    pub near: Link,
    /// The outside.
    pub far: Link,
}

impl Veth {
    /// Makes them.
    pub fn new() -> Result<Self> {
        // One queue: with more, frames of a guest would leave on another queue than they come back on.
        let queues = "numtxqueues 1 numrxqueues 1";
        ip(&format!("link add {NEAR} {queues} type veth peer name {FAR} {queues}"))?;
        let it = Self { near: Link::named(NEAR), far: Link::named(FAR) };
        it.near.set_up()?;
        it.far.set_up()?;
        Ok(it)
    }
}

impl Drop for Veth {
    fn drop(&mut self) {
        let _ = ip(&format!("link delete {NEAR}"));
    }
}

fn ip(arguments: &str) -> Result<()> {
    let program = lab::find_in_path("ip").context("there is no `ip` program; install iproute2")?;
    let done = Command::new(program).args(arguments.split_whitespace()).output()?;
    ensure!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr).trim());
    Ok(())
}
