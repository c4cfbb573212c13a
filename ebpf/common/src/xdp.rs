//! Steering of received frames to AF_XDP sockets.
//!
//! ```text
//!  frame ─► {destination MAC, VLAN} ─► mac_table ─► port ─► xdp_steer[queue × ports + port] {first, count}
//!                                                                     │ first + flow hash % count = slot
//!                                                  xsk_socks[queue × slots + slot] ◄──┘   slot 0: the flood socket
//! ```

use crate::plain;

/// `vlan` of a [`MacKey`] that takes frames with any tag or none.
pub const VLAN_ANY: u16 = 0xffff;
/// `vlan` of a [`MacKey`] for frames without a tag.
pub const VLAN_NONE: u16 = 0;
/// Slot of the socket that takes broadcast and multicast of its receive queue.
pub const FLOOD_SLOT: u32 = 0;
/// Ports of one interface at most.
pub const PORTS_MAX: u32 = 256;
/// Receive queues of one interface at most.
pub const QUEUES_MAX: u32 = 64;
/// Value in `mac_table` of an address whose port is not known at the moment: its frames are dropped and counted. A process
/// that takes over the maps of an earlier one puts it to all addresses, since ports may have other numbers now.
pub const NO_PORT: u32 = u32::MAX;
/// MAC addresses of one interface's ports at most.
pub const MACS_MAX: u32 = 4096;

/// Key of `mac_table`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MacKey {
    /// The address.
    pub mac: [u8; 6],
    /// The outer VLAN's number (host order), [`VLAN_NONE`] or [`VLAN_ANY`]. An exact match goes before `VLAN_ANY`.
    pub vlan: u16,
}

/// Value of `xdp_steer`: which sockets of a receive queue are a port's, and take part.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steer {
    /// The first slot.
    pub first: u32,
    /// Slots; 0: none takes part, frames are dropped and counted.
    pub count: u32,
}

/// The one entry of `xdp_config`. The first three fields stay where they are in all layouts.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// [`crate::LAYOUT`] of the program that made the maps.
    pub layout: u32,
    /// The process that serves the sockets; 0: none.
    pub pid: u32,
    /// When it was started, clock ticks after boot.
    pub start_time: u64,
    /// Receive queues that are served; frames of others that are for a port are dropped and counted.
    pub queues: u32,
    /// Ports for each queue in `xdp_steer`.
    pub ports: u32,
    /// Slots for each queue in `xsk_socks`.
    pub slots: u32,
    /// 0: broadcast and multicast go to the stack; 1: to the flood socket of their queue.
    pub flood: u16,
    /// 0: all addresses of `mac_table` are for any VLAN, so that one look is enough; 1: some are not.
    pub exact: u16,
}

/// The one entry, on each CPU, of `xdp_stats`: frames by what became of them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// To a port's socket.
    pub hits: u64,
    /// Of no port: to the stack.
    pub misses: u64,
    /// Broadcast and multicast to the flood socket.
    pub flooded: u64,
    /// Dropped: for a port, but no socket is there (the process is restarting, the port has no guest).
    pub drop_no_socket: u64,
    /// Dropped: for a port, but on a receive queue that is not served.
    pub drop_queue: u64,
    /// Shorter than an Ethernet header: to the stack.
    pub short: u64,
}

/// Value of `xdp_port_stats`, on each CPU; key is the port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortStats {
    /// To a socket of the port.
    pub hits: u64,
    /// Dropped, see [`Stats::drop_no_socket`].
    pub drop_no_socket: u64,
    /// Dropped, see [`Stats::drop_queue`].
    pub drop_queue: u64,
}

plain!(MacKey, Steer, Config, Stats, PortStats);
