//! To be written.
#![no_std]
#![no_main]
#![allow(non_upper_case_globals)]

use aya_ebpf::btf_maps::{Array, XskMap};
use aya_ebpf::macros::{btf_map, xdp};
use aya_ebpf::programs::XdpContext;
use vhost_user_net_ebpf_common::xdp::Config;

#[btf_map]
static xdp_config: Array<Config, 1> = Array::new();
#[btf_map]
static xsk_socks: XskMap<16> = XskMap::new();

#[xdp(frags)]
fn vun_xdp(_: XdpContext) -> u32 {
    let Some(c) = xdp_config.get(0) else { return 2};
    c.flood
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
