//! Which AF_XDP socket a received frame goes to, by destination MAC address, VLAN and flow: see the drawing in
//! `common/src/xdp.rs`. What is for no port of ours goes to the stack.
//!
//! A frame for one of our addresses never goes to the stack: while nobody serves the sockets it is dropped and counted.
#![no_std]
#![no_main]
// Maps are called as bpftool shows them.
#![allow(non_upper_case_globals)]

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT};
use aya_ebpf::btf_maps::{Array, HashMap, PerCpuArray, XskMap};
use aya_ebpf::macros::{btf_map, xdp};
use aya_ebpf::programs::XdpContext;
use vhost_user_net_ebpf::flow;
use vhost_user_net_ebpf::frame::{Frame, ethernet};
use vhost_user_net_ebpf_common::xdp::{
    Config, FLOOD_SLOT, MACS_MAX, MacKey, PortStats, Stats, Steer, VLAN_ANY, VLAN_NONE,
};

/// As many as user space says when it makes the map.
const BY_LOADER: usize = 1;

#[btf_map]
static xdp_config: Array<Config, 1> = Array::new();
#[btf_map]
static mac_table: HashMap<MacKey, u32, { MACS_MAX as usize }> = HashMap::new();
#[btf_map]
static xdp_steer: Array<Steer, BY_LOADER> = Array::new();
#[btf_map]
static xsk_socks: XskMap<BY_LOADER> = XskMap::new();
#[btf_map]
static xdp_stats: PerCpuArray<Stats, 1> = PerCpuArray::new();
#[btf_map]
static xdp_port_stats: PerCpuArray<PortStats, BY_LOADER> = PerCpuArray::new();

/// What becomes of a frame.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Hit,
    NoSocket,
    Queue,
}

#[xdp(frags)]
pub fn vun_xdp(frame: XdpContext) -> u32 {
    let (Some(config), Some(stats)) = (xdp_config.get(0), xdp_stats.get_ptr_mut(0)) else { return XDP_PASS };
    // SAFETY: this CPU's entry, which nobody else writes while we run.
    let stats = unsafe { &mut *stats };
    let (Some(mac), Some(_)) = (frame.bytes::<6>(0), frame.bytes::<14>(0)) else {
        stats.short += 1;
        return XDP_PASS;
    };
    // SAFETY: the context is valid while we run.
    let queue = unsafe { (*frame.ctx).rx_queue_index };
    if mac[0] & 1 != 0 {
        if config.flood == 0 {
            stats.misses += 1;
            return XDP_PASS;
        }
        let fate = flood(config, queue);
        match fate {
            Fate::Hit => stats.flooded += 1,
            Fate::NoSocket => stats.drop_no_socket += 1,
            Fate::Queue => stats.drop_queue += 1,
        }
        return verdict(fate);
    }
    let ethernet = ethernet(&frame);
    let vlan = if ethernet.is_cut_off { VLAN_ANY } else { ethernet.vlan.unwrap_or(VLAN_NONE) };
    let Some(port) = port_of(config, mac, vlan) else {
        stats.misses += 1;
        return XDP_PASS;
    };
    let fate = steer(&frame, config, queue, port, ethernet);
    match fate {
        Fate::Hit => stats.hits += 1,
        Fate::NoSocket => stats.drop_no_socket += 1,
        Fate::Queue => stats.drop_queue += 1,
    }
    if let Some(stats) = xdp_port_stats.get_ptr_mut(port) {
        // SAFETY: as above.
        unsafe {
            match fate {
                Fate::Hit => (*stats).hits += 1,
                Fate::NoSocket => (*stats).drop_no_socket += 1,
                Fate::Queue => (*stats).drop_queue += 1,
            }
        }
    }
    verdict(fate)
}

#[inline(always)]
fn verdict(fate: Fate) -> u32 {
    if fate == Fate::Hit { XDP_REDIRECT } else { XDP_DROP }
}

/// The port of an address, as it is written for this VLAN or else for any.
#[inline(always)]
fn port_of(config: &Config, mac: [u8; 6], vlan: u16) -> Option<u32> {
    // SAFETY: the value is copied at once; an entry that is removed meanwhile is memory of the map still.
    unsafe {
        let exact = if config.exact == 0 { None } else { mac_table.get(MacKey { mac, vlan }).copied() };
        exact.or_else(|| mac_table.get(MacKey { mac, vlan: VLAN_ANY }).copied())
    }
}

#[inline(always)]
fn flood(config: &Config, queue: u32) -> Fate {
    if queue >= config.queues {
        return Fate::Queue;
    }
    redirect(config, queue, FLOOD_SLOT)
}

#[inline(always)]
fn steer(
    frame: &XdpContext,
    config: &Config,
    queue: u32,
    port: u32,
    ethernet: vhost_user_net_ebpf::frame::Ethernet,
) -> Fate {
    if queue >= config.queues {
        return Fate::Queue;
    }
    if port >= config.ports {
        return Fate::NoSocket;
    }
    let Some(steer) = xdp_steer.get(queue * config.ports + port) else { return Fate::NoSocket };
    let Steer { first, count } = *steer;
    let slot = match count {
        0 => return Fate::NoSocket,
        1 => first,
        // A frame without a flow goes to the first.
        _ => first + flow::hash(frame, ethernet).unwrap_or(0) % count,
    };
    redirect(config, queue, slot)
}

/// Hands the frame to a socket, if one is there. A socket whose ring is full drops it, and counts that itself.
#[inline(always)]
fn redirect(config: &Config, queue: u32, slot: u32) -> Fate {
    if slot >= config.slots {
        return Fate::NoSocket;
    }
    match xsk_socks.redirect(queue * config.slots + slot, XDP_DROP.into()) {
        Ok(_) => Fate::Hit,
        Err(_) => Fate::NoSocket,
    }
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
