//! Drives a split queue in guest memory that the fuzzer writes as it likes, while chains are taken, used and given back.
//!
//! The input: a few bytes of configuration, then operations of one byte each with their operands. What has to hold: no panic, no
//! access outside (the sanitizer and the SIGBUS handler would tell), indices in step with what was taken and given back,
//! segments that are sound, and buffers that are either wholly in guest memory or refused.
#![no_main]

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_user_net::memory::{
    AccessError, DirtyLog, GuestMemory, IoVec, IoVecStorage, Mapping, RegionSpec, ResidencyMap,
};
use vhost_user_net::net::header::VirtioNetHdr;
use vhost_user_net::virtq::{Chain, MAX_CHAIN, PopError, QueueConfig, QueueError, SplitQueue};

const REGION: u64 = 0x8000;
const MEM_SIZE: u64 = 2 * REGION;
const USER: u64 = 0x7f00_0000_0000;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const LOG_SIZE: u64 = 0x1000;

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn word(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes([self.byte()?, self.byte()?]))
    }

    fn bytes(&mut self, n: usize) -> &[u8] {
        let (taken, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

fn memfd(size: u64) -> File {
    let file = File::from(memfd_create("fuzz", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file
}

/// Guest 0..REGION lies behind REGION..2·REGION in the file: adjacent in the guest, not in our address space.
struct Guest {
    file: File,
    memory: GuestMemory,
    residency: Arc<ResidencyMap>,
}

impl Guest {
    fn new() -> Self {
        let file = memfd(MEM_SIZE);
        let map = |at: u64| {
            let spec =
                RegionSpec { guest_phys: at, size: REGION, user_addr: USER + at, mmap_offset: REGION - at };
            Arc::new(Mapping::new(file.try_clone().unwrap().into(), &spec).unwrap())
        };
        let memory = GuestMemory::new(vec![map(0), map(REGION)]).unwrap();
        Self { file, memory, residency: Arc::new(ResidencyMap::new(REGION, 0x1000)) }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        for (i, byte) in bytes.iter().enumerate() {
            let at = (at + i as u64) % MEM_SIZE;
            self.file.write_all_at(&[*byte], (at + REGION) % MEM_SIZE).unwrap();
        }
    }

    fn get16(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.file.read_exact_at(&mut bytes, (at + REGION) % MEM_SIZE).unwrap();
        u16::from_le_bytes(bytes)
    }
}

fn run(mut input: Input<'_>) -> Option<()> {
    let guest = Guest::new();
    let mut memory = guest.memory.clone();
    let flags = input.byte()?;
    let mut config = QueueConfig {
        size: 1 << (input.byte()? % 9),
        base: input.word()?,
        desc_user: USER + DESC,
        avail_user: USER + AVAIL,
        used_user: USER + USED,
        log_used: (flags & 1 != 0).then_some(USED),
        event_idx: flags & 2 != 0,
        indirect: flags & 4 != 0,
    };
    if flags & 8 != 0 {
        config.size = input.word()?;
        config.desc_user = USER.wrapping_add(u64::from(input.word()?));
        config.avail_user = USER.wrapping_add(u64::from(input.word()?));
        config.used_user = USER.wrapping_add(u64::from(input.word()?) << 4);
    }
    let mut queue = SplitQueue::new(&memory, &config).ok()?;
    let mut chain = Chain::new();
    let mut storage = IoVecStorage::default();
    let mut in_work = VecDeque::new();
    while let Some(op) = input.byte() {
        match op % 16 {
            // The guest writes: anywhere, a descriptor, a chain made available.
            0 => {
                let (at, len) = (input.word()?, input.byte()?);
                guest.put(at.into(), input.bytes(usize::from(len % 64)));
            }
            1 | 2 => {
                let index = u64::from(input.byte()?);
                let (addr, len, rest) = (input.word()?, input.word()?, input.word()?);
                let mut raw = [0; 16];
                raw[..2].copy_from_slice(&addr.to_le_bytes());
                raw[8..10].copy_from_slice(&len.to_le_bytes());
                raw[12] = (rest & 7) as u8;
                raw[14] = (rest >> 8) as u8;
                let table = if op % 16 == 1 { DESC } else { 0x4008 };
                guest.put(table + index * 16, &raw);
            }
            3 | 4 => {
                let idx = guest.get16(AVAIL + 2);
                let head = u16::from(input.byte()?);
                guest.put(AVAIL + 4 + 2 * u64::from(idx % config.size), &head.to_le_bytes());
                guest.put(AVAIL + 2, &idx.wrapping_add(1).to_le_bytes());
            }
            // The device.
            5..=8 => match queue.pop(&memory, &mut chain) {
                Ok(true) => {
                    check(&chain, &memory, &mut storage);
                    in_work.push_back(chain.head());
                }
                Err(PopError::Bad { head, .. }) => in_work.push_back(head),
                Ok(false) | Err(PopError::Missing(_) | PopError::Broken(_)) => {}
            },
            9 => {
                let n = u16::from(input.byte()?).min(in_work.len() as u16);
                queue.unpop(n);
                in_work.truncate(in_work.len() - usize::from(n));
            }
            10 => {
                for _ in 0..input.byte()? {
                    let Some(head) = in_work.pop_front() else { break };
                    queue.push(head, 1);
                }
            }
            11 => {
                queue.publish();
                queue.needs_call();
            }
            12 => {
                let _ = queue.enable_kicks();
            }
            13 => queue.disable_kicks(),
            // The front-end: another snapshot.
            14 => {
                let what = input.byte()?;
                let log = (what & 1 != 0)
                    .then(|| Arc::new(DirtyLog::new(memfd(LOG_SIZE).into(), LOG_SIZE, 0).unwrap()));
                let maps = [(what & 2 != 0).then(|| guest.residency.clone()), None];
                let next = guest.memory.with_log(log).with_residency(&maps);
                match queue.remap(&next) {
                    Ok(()) => memory = next,
                    Err(QueueError::Busy) => assert!(!in_work.is_empty() || what & 2 != 0),
                    Err(error) => panic!("{error}: the ring was there before"),
                }
                queue.set_log_used((what & 4 != 0).then_some(USED));
            }
            _ => {
                let page = u64::from(input.byte()?) * 0x1000;
                guest.residency.set_present(page..page + 1);
            }
        }
        assert_eq!(usize::from(queue.in_flight()), in_work.len());
        assert!(queue.in_flight() <= config.size);
        if let Ok(available) = queue.available() {
            assert!(available <= config.size);
        }
    }
    Some(())
}

fn check(chain: &Chain, memory: &GuestMemory, storage: &mut IoVecStorage) {
    let segments = || chain.readable().iter().chain(chain.writable());
    assert!(segments().count() <= MAX_CHAIN && segments().all(|segment| segment.len > 0));
    let total: u64 = segments().map(|segment| u64::from(segment.len)).sum();
    assert_eq!(total, chain.readable_len() + chain.writable_len());
    let list = storage.begin();
    for segment in segments() {
        let before = list.len();
        let inside = segment.gpa.checked_add(segment.len.into()).is_some_and(|end| end <= MEM_SIZE);
        match memory.push_iovecs(segment.gpa, segment.len, list) {
            Ok(()) => {
                let pieces = list.as_slice()[before..].iter().map(IoVec::len).sum::<usize>();
                assert!(inside && pieces == segment.len as usize);
            }
            Err(AccessError::OutOfRange { .. }) => assert!(!inside && list.len() == before),
            Err(AccessError::Missing(missing)) => {
                assert!(missing.gpa < segment.gpa + u64::from(segment.len));
                assert!(missing.gpa + missing.len > segment.gpa && list.len() == before);
            }
            Err(AccessError::Full) => assert_eq!(list.len(), before),
        }
    }
    let mut header = [0; 12];
    if let Some(first) = chain.readable().first()
        && memory.read(first.gpa, &mut header).is_ok()
    {
        let _ = VirtioNetHdr::parse(&header).check(chain.readable_len().saturating_sub(12), u64::MAX);
    }
}

fuzz_target!(|data: &[u8]| {
    let _ = run(Input(data));
});
