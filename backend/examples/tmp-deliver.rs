use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_user_net::memory::{GuestMemory, IoVecs, Mapping, RegionSpec};
use vhost_user_net::net::counters::PairCounters;
use vhost_user_net::net::deliver;
use vhost_user_net::net::rx::RxSettings;
use vhost_user_net::uplink::Burst;
use vhost_user_net::virtq::{Queue, QueueConfig};
const SIZE: u16 = 256;
const BURST: u16 = 64;
const USER: u64 = 0x7f00_0000_0000;
#[inline(never)]
fn device(queue: &mut Queue, memory: &GuestMemory, scratch: &mut deliver::Scratch, settings: RxSettings, counters: &PairCounters, burst: &Burst<'_>) -> u32 {
    let d = deliver::run(queue, memory, scratch, settings, counters, burst);
    queue.publish();
    std::hint::black_box(queue.needs_call());
    d.used
}
fn main() {
    let n: u64 = std::env::args().nth(1).unwrap().parse().unwrap();
    let len: usize = std::env::args().nth(2).unwrap().parse().unwrap();
    let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(4 << 20).unwrap();
    let write = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at).unwrap();
    for i in 0..u64::from(SIZE) {
        let mut d = (0x1_0000u64 + i * 4096).to_le_bytes().to_vec();
        d.extend(2048u32.to_le_bytes()); d.extend(2u16.to_le_bytes()); d.extend([0; 2]);
        write(16 * i, &d);
        write(0x2000 + 4 + 2 * i, &(i as u16).to_le_bytes());
    }
    write(0x2000, &1u16.to_le_bytes());
    let spec = RegionSpec { guest_phys: 0, size: 4 << 20, user_addr: USER, mmap_offset: 0 };
    let fd: OwnedFd = file.try_clone().unwrap().into();
    let memory = GuestMemory::new(vec![Arc::new(Mapping::new(fd, &spec).unwrap())]).unwrap();
    let config = QueueConfig { size: SIZE, base: 0, desc_user: USER, avail_user: USER + 0x2000, used_user: USER + 0x3000, log_used: None, event_idx: false, indirect: false };
    let mut queue = Queue::new(&memory, &config).unwrap();
    queue.disable_kicks();
    let mut scratch = deliver::Scratch::default();
    let counters = PairCounters::default();
    let header = [0u8; 12];
    let body = vec![7u8; len];
    let mut bufs = IoVecs::new();
    let mut ranges = Vec::new();
    for i in 0..64 { bufs.push_own(&header); bufs.push_own(&body); ranges.push(2*i..2*i+2); }
    let burst = Burst { buffers: bufs.as_slice(), frames: &ranges };
    let mut index = 0u16; let mut done = 0;
    while done < n {
        index = index.wrapping_add(BURST);
        write(0x2000 + 2, &index.to_le_bytes());
        let used = device(&mut queue, &memory, &mut scratch, RxSettings::new(1 << 32), &counters, &burst);
        assert_eq!(used, 64);
        done += 64;
    }
}
