//! What a packet costs in instructions: the receive or transmit path of a queue pair over a ring in a memfd, one
//! descriptor per packet, the null uplink, frames of 64 bytes, no kicks and no calls. To be counted by callgrind:
//!
//! ```text
//! packet-cost tx|rx PACKETS [all-arrived] [packed [in-order]]     valgrind --tool=callgrind --toggle-collect='packet_cost::device*' …
//! ```
//! Only `device` is the program's own; the driver beside it makes system calls. With `all-arrived` the memory is as in
//! postcopy when everything has come. The difference between N and 2 N packets, divided by N, is what one costs
//! (`cargo xtask bench packet-cost` does that, for two commits). Only the library's public interface as it was before
//! postcopy is used, so that this file can be built with that, too (`--cfg before_postcopy`, `--cfg before_queue`).
#![forbid(unsafe_code)]
#![allow(unexpected_cfgs)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_user_net::memory::{GuestMemory, Mapping, RegionSpec, ResidencyMap};
use vhost_user_net::net::counters::PairCounters;
use vhost_user_net::net::rx::{self, Receiver, RxSettings};
use vhost_user_net::net::tx::{self, TxSettings};
use vhost_user_net::uplink::UplinkQueue;
#[cfg(not(before_postcopy))]
use vhost_user_net::uplink::null::Null;
#[cfg(not(before_queue))]
use vhost_user_net::virtq::Queue;
use vhost_user_net::virtq::QueueConfig;
#[cfg(before_queue)]
use vhost_user_net::virtq::SplitQueue as Queue;
#[cfg(before_postcopy)]
use vhost_user_net::{
    memory::IoVec,
    uplink::{ReceiveError, SendError},
};

const SIZE: u16 = 256;
const BURST: u16 = 64;
const USER: u64 = 0x7f00_0000_0000;
const MEMORY: u64 = 4 << 20;
const DESC: u64 = 0;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const BUFFERS: u64 = 0x1_0000;
const HEADER: usize = 12;
const FRAME: usize = 64;
/// VIRTIO_F_VERSION_1.
const FEATURES: u64 = 1 << 32;

/// Takes every frame and has one for every buffer; touches none.
#[cfg(before_postcopy)]
struct Nothing;

#[cfg(before_postcopy)]
impl UplinkQueue for Nothing {
    fn readable(&self) -> Option<&Arc<OwnedFd>> {
        None
    }
    fn send(&mut self, _frame: &[IoVec<'_>]) -> Result<(), SendError> {
        Ok(())
    }
    fn receive(&mut self, _buffers: &[IoVec<'_>]) -> Result<usize, ReceiveError> {
        Ok(HEADER + FRAME)
    }
}

#[cfg(before_postcopy)]
fn uplink() -> Box<dyn UplinkQueue> {
    Box::new(Nothing)
}

/// The real null uplink: drops, and makes frames.
#[cfg(not(before_postcopy))]
fn uplink() -> Box<dyn UplinkQueue> {
    let made = Null::new(Some(FRAME as u16)).queues(1).expect("an uplink");
    Box::new(made.into_iter().next().expect("one"))
}

struct Device {
    queue: Queue,
    memory: GuestMemory,
    uplink: Box<dyn UplinkQueue>,
    receiver: Receiver,
    tx: tx::Scratch,
    rx: rx::Scratch,
    counters: PairCounters,
    receives: bool,
}

/// One burst, as a turn of the loop does it.
#[inline(never)]
fn device(it: &mut Device) -> u32 {
    let Device { queue, memory, uplink, receiver, counters, .. } = it;
    let budget = u32::from(BURST);
    let (used, _end) = if it.receives {
        let settings = RxSettings::new(FEATURES);
        receiver.run(queue, memory, &mut **uplink, &mut it.rx, settings, counters, budget)
    } else {
        let settings = TxSettings { features: FEATURES, header_len: HEADER, enabled: true };
        tx::run(queue, memory, &mut **uplink, &mut it.tx, settings, counters, budget)
    };
    queue.publish();
    std::hint::black_box(queue.needs_call());
    used
}

fn main() {
    let mut args = std::env::args().skip(1);
    let direction = args.next().unwrap_or_default();
    let packets: u64 = args.next().and_then(|n| n.parse().ok()).unwrap_or(0);
    let words: Vec<String> = args.collect();
    let [arrived, packed, in_order] =
        ["all-arrived", "packed", "in-order"].map(|word| words.iter().any(|given| given == word));
    assert!(
        ["tx", "rx"].contains(&direction.as_str()) && packets > 0,
        "packet-cost tx|rx PACKETS [all-arrived] [packed [in-order]]"
    );
    let receives = direction == "rx";

    let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).expect("memfd"));
    file.set_len(MEMORY).expect("length");
    let write = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at).expect("guest memory");
    // Available in a packed ring, in a round with this wrap counter.
    let offer = |first: u16, wrap: bool| {
        for i in (first..).take(BURST.into()).map(u64::from) {
            let len = if receives { 2048u32 } else { (HEADER + FRAME) as u32 };
            let mut descriptor = (BUFFERS + i * 4096).to_le_bytes().to_vec();
            descriptor.extend(len.to_le_bytes());
            descriptor.extend((i as u16).to_le_bytes());
            descriptor
                .extend((if receives { 2 } else { 0 } | if wrap { 0x80 } else { 0x8000u16 }).to_le_bytes());
            write(DESC + 16 * i, &descriptor);
        }
    };
    for i in 0..u64::from(if packed { 0 } else { SIZE }) {
        let len = if receives { 2048u32 } else { (HEADER + FRAME) as u32 };
        let mut descriptor = (BUFFERS + i * 4096).to_le_bytes().to_vec();
        descriptor.extend(len.to_le_bytes());
        descriptor.extend((if receives { 2u16 } else { 0 }).to_le_bytes());
        descriptor.extend([0; 2]);
        write(DESC + 16 * i, &descriptor);
        write(AVAIL + 4 + 2 * i, &(i as u16).to_le_bytes());
    }
    // No calls.
    write(AVAIL + if packed { 2 } else { 0 }, &1u16.to_le_bytes());

    let spec = RegionSpec { guest_phys: 0, size: MEMORY, user_addr: USER, mmap_offset: 0 };
    let fd: OwnedFd = file.try_clone().expect("a second descriptor").into();
    let mapping = Arc::new(Mapping::new(fd, &spec).expect("map"));
    let mut memory = GuestMemory::new(vec![mapping]).expect("memory");
    if arrived {
        let map = ResidencyMap::new(MEMORY, 4096);
        map.set_present(0..MEMORY);
        memory = memory.with_residency(&[Some(Arc::new(map))]);
    }
    let config = QueueConfig {
        #[cfg(not(before_queue))]
        packed,
        #[cfg(not(before_queue))]
        in_order,
        #[cfg(not(before_queue))]
        transmit: !receives,
        size: SIZE,
        #[cfg(not(before_queue))]
        base: if packed { 0x8000_8000 } else { 0 },
        #[cfg(before_queue)]
        base: 0,
        desc_user: USER + DESC,
        avail_user: USER + AVAIL,
        used_user: USER + USED,
        log_used: None,
        event_idx: false,
        indirect: false,
    };
    let mut queue = Queue::new(&memory, &config).expect("ring");
    queue.disable_kicks();
    let mut it = Device {
        queue,
        memory,
        uplink: uplink(),
        receiver: Receiver::default(),
        tx: tx::Scratch::default(),
        rx: rx::Scratch::default(),
        counters: PairCounters::default(),
        receives,
    };
    let mut index = 0u16;
    let mut done = 0;
    while done < packets {
        if packed {
            offer(index % SIZE, (index / SIZE).is_multiple_of(2));
        }
        index = index.wrapping_add(BURST);
        if !packed {
            write(AVAIL + 2, &index.to_le_bytes());
        }
        let used = device(&mut it);
        assert_eq!(used, u32::from(BURST), "a burst was not used");
        done += u64::from(used);
    }
}
