//! The XDP program of an interface: attached by a pinned link, its maps pinned beside it, so that a restart of this process
//! finds both at work.
//!
//! ```text
//!  /sys/fs/bpf/vhost-user-net/xdp-IFACE/ {link, xdp_config, mac_table, xdp_steer, xsk_socks, xdp_stats, xdp_port_stats}
//! ```
//!
//! The link outlives the process. Until the next one has set its sockets, frames for known addresses are dropped and counted;
//! they never reach the host's stack. A restart changes nothing at the interface where program and sizes are the same; another
//! program, or other sizes, take the place of the present ones in one step of the kernel.
//!
//! Here: what the uplink uses. How it is attached: `attach`; what is pinned: `pins`; errors: `error`. Not here: sockets,
//! and which address belongs to which port. All calls may sleep.
#![forbid(unsafe_code)]

mod attach;
mod error;
mod pins;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use attach::OBJECT;
pub use error::ProgramError;
pub use pins::{Pinned, list, unload};

use crate::bpf::io_error;
use crate::bpf::sys::Link;
use aya::maps::{Array, HashMap, MapData, MapError, PerCpuArray, XskMap};
use ebpf_common::xdp::{Config, MacKey, NO_PORT, PORTS_MAX, PortStats, QUEUES_MAX, Stats, Steer, VLAN_ANY};
use nix::fcntl::Flock;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Slots of a receive queue at most.
pub const SLOTS_MAX: u32 = 1024;

/// Where the program shall run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// In the driver, or where that is not possible in the kernel's generic code.
    #[default]
    Auto,
    /// In the driver.
    Native,
    /// In the kernel's generic code.
    Skb,
}

/// What is attached where.
#[derive(Clone, Debug)]
pub struct Options {
    /// The interface's name.
    pub interface: String,
    /// And its number in this network namespace.
    pub index: u32,
    /// Where the program shall run.
    pub mode: Mode,
    /// Receive queues that are served, from the first on.
    pub queues: u32,
    /// Ports, with numbers below this one.
    pub ports: u32,
    /// Sockets for each queue; the first is the flood socket.
    pub slots: u32,
    /// Whether broadcast and multicast go to the flood socket of their queue, and not to the stack.
    pub flood: bool,
    /// Whether a program of somebody else's may be replaced.
    pub replace: bool,
}

/// The program of an interface, with its maps. It stays attached when this is dropped, see [`unload`].
pub struct XdpProgram {
    mode: Mode,
    was_pinned: bool,
    maps: Mutex<Maps>,
    sizes: Sizes,
    /// Open as long as we serve; the pin holds it anyway.
    _link: Link,
    /// Tells others, also those who do not see this process, that we serve.
    _held: Flock<File>,
}

/// How many of each there are in the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sizes {
    queues: u32,
    ports: u32,
    slots: u32,
}

struct Maps {
    config: Array<MapData, Config>,
    macs: HashMap<MapData, MacKey, u32>,
    steer: Array<MapData, Steer>,
    sockets: XskMap<MapData>,
    stats: PerCpuArray<MapData, Stats>,
    port_stats: PerCpuArray<MapData, PortStats>,
}

impl XdpProgram {
    /// Attaches the program, or takes over what an earlier process has left pinned: then all addresses are still known but
    /// have no port (their frames are dropped and counted), and no slot takes part, until they are set again.
    ///
    /// # Errors
    /// A [`ProgramError`] that says what to do.
    pub fn attach(options: &Options) -> Result<Self, ProgramError> {
        attach::attach(options)
    }

    /// Where it runs: native or skb.
    pub fn attached_mode(&self) -> Mode {
        self.mode
    }

    /// Whether an earlier process had attached it.
    pub fn was_pinned(&self) -> bool {
        self.was_pinned
    }

    fn maps(&self) -> MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a bound AF_XDP socket into a queue's slot, or takes out the one that is there.
    ///
    /// # Errors
    /// No such queue or slot, or what the kernel says.
    pub fn set_socket(&self, queue: u32, slot: u32, socket: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let index = index(queue, self.sizes.queues, slot, self.sizes.slots)?;
        let sockets = &mut self.maps().sockets;
        match socket {
            Some(socket) => sockets.set(index, socket.as_raw_fd(), 0).map_err(io_error),
            None => absent_is_fine(sockets.unset(index)),
        }
    }

    /// Which slots of a queue take a port's frames.
    ///
    /// # Errors
    /// No such queue, port or slot, or what the kernel says.
    pub fn set_steer(&self, queue: u32, port: u32, steer: Steer) -> io::Result<()> {
        let index = index(queue, self.sizes.queues, port, self.sizes.ports)?;
        if steer.first.checked_add(steer.count).is_none_or(|end| end > self.sizes.slots) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.maps().steer.set(index, steer, 0).map_err(io_error)
    }

    /// Gives an address to a port, or forgets it: then its frames go to the stack.
    ///
    /// # Errors
    /// No such port, or what the kernel says (E2BIG: too many addresses).
    pub fn set_mac(&self, key: MacKey, port: Option<u32>) -> io::Result<()> {
        if port.is_some_and(|port| port >= self.sizes.ports) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let Maps { config, macs, .. } = &mut *self.maps();
        if port.is_some() && key.vlan != VLAN_ANY {
            look_exactly(config)?;
        }
        match port {
            Some(port) => macs.insert(key, port, 0).map_err(io_error),
            None => absent_is_fine(macs.remove(&key)),
        }
    }

    /// Forgets the addresses that an earlier process had set and that this one has not set again. To be called once all
    /// ports have theirs. Returns how many.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn forget_old_macs(&self) -> io::Result<usize> {
        let macs = &mut self.maps().macs;
        let old: Vec<MacKey> =
            macs.iter().flatten().filter(|(_, port)| *port == NO_PORT).map(|e| e.0).collect();
        for key in &old {
            absent_is_fine(macs.remove(key))?;
        }
        Ok(old.len())
    }

    /// The counters, over all CPUs.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn stats(&self) -> io::Result<Stats> {
        pins::sum_stats(&self.maps().stats)
    }

    /// A port's counters, over all CPUs.
    ///
    /// # Errors
    /// No such port, or what the kernel says.
    pub fn port_stats(&self, port: u32) -> io::Result<PortStats> {
        let mut sum = PortStats::default();
        for cpu in self.maps().port_stats.get(&port, 0).map_err(io_error)?.iter() {
            sum.hits += cpu.hits;
            sum.drop_no_socket += cpu.drop_no_socket;
            sum.drop_queue += cpu.drop_queue;
        }
        Ok(sum)
    }
}

impl Drop for XdpProgram {
    /// Nobody serves any more. (Of a process that was killed, the number tells.)
    fn drop(&mut self) {
        let config = &mut self.maps().config;
        if let Ok(present) = config.get(&0, 0) {
            let _ = config.set(0, Config { pid: 0, start_time: 0, ..present }, 0);
        }
    }
}

impl Options {
    fn sizes(&self) -> Result<Sizes, ProgramError> {
        let Self { queues, ports, slots, .. } = *self;
        let is_possible = |count: u32, max: u32| (1..=max).contains(&count);
        if is_possible(queues, QUEUES_MAX) && is_possible(ports, PORTS_MAX) && is_possible(slots, SLOTS_MAX) {
            return Ok(Sizes { queues, ports, slots });
        }
        Err(ProgramError::Sizes(self.interface.clone(), queues, ports, slots))
    }
}

/// From now on the program looks for addresses in just the VLAN of a frame, too.
fn look_exactly(config: &mut Array<MapData, Config>) -> io::Result<()> {
    let present = config.get(&0, 0).map_err(io_error)?;
    if present.exact == 0 {
        config.set(0, Config { exact: 1, ..present }, 0).map_err(io_error)?;
    }
    Ok(())
}

/// Where in a table of `columns` for each of `rows` an entry is.
fn index(row: u32, rows: u32, column: u32, columns: u32) -> io::Result<u32> {
    if row >= rows || column >= columns {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(row * columns + column)
}

fn absent_is_fine(result: Result<(), MapError>) -> io::Result<()> {
    match result.map_err(io_error) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}
