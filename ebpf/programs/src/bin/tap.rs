//! Which queue of a multi-queue tap a frame goes to: a socket filter for TUNSETSTEERINGEBPF, whose result is the queue's index
//! among those that are attached. User space fills the table (`backend/src/uplink/tap_steering.rs`).
#![no_std]
#![no_main]
// Maps are called as bpftool shows them.
#![allow(non_upper_case_globals)]

use aya_ebpf::btf_maps::{Array, PerCpuArray};
use aya_ebpf::macros::{btf_map, socket_filter};
use aya_ebpf::programs::SkBuffContext;
use vhost_user_net_ebpf::{flow, frame};
use vhost_user_net_ebpf_common::tap::{Queues, Stats, TABLE_LEN};

#[btf_map]
static tap_queues: Array<Queues, 1> = Array::new();
#[btf_map]
static tap_stats: PerCpuArray<Stats, 1> = PerCpuArray::new();

/// The kernel takes the result modulo the number of attached queues, so no value is wrong.
#[socket_filter]
pub fn vun_tap(frame: SkBuffContext) -> i64 {
    let hash = flow::hash(&frame, frame::ethernet(&frame));
    if let Some(stats) = tap_stats.get_ptr_mut(0) {
        // SAFETY: this CPU's entry, which nobody else writes while we run.
        unsafe {
            match hash {
                Some(_) => (*stats).hits += 1,
                None => (*stats).misses += 1,
            }
        }
    }
    let (Some(hash), Some(queues)) = (hash, tap_queues.get(0)) else { return 0 };
    queues.table[hash as usize % TABLE_LEN].into()
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
