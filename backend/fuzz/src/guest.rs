//! Guest memory that a fuzzer writes as it likes, and what has to hold of the chains that are taken from it. For the targets
//! `rings` and `packed`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_user_net::memory::{
    AccessError, DirtyLog, GuestMemory, IoVec, IoVecStorage, Mapping, RegionSpec, ResidencyMap,
};
use vhost_user_net::net::header::VirtioNetHdr;
use vhost_user_net::virtq::{Chain, MAX_CHAIN};

pub const REGION: u64 = 0x8000;
pub const MEM_SIZE: u64 = 2 * REGION;
pub const USER: u64 = 0x7f00_0000_0000;
pub const DESC: u64 = 0x1000;
pub const AVAIL: u64 = 0x2000;
pub const USED: u64 = 0x3000;
pub const LOG_SIZE: u64 = 0x1000;

/// The fuzzer's bytes.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    pub fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    pub fn word(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes([self.byte()?, self.byte()?]))
    }

    pub fn bytes(&mut self, n: usize) -> &[u8] {
        let (taken, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

pub fn memfd(size: u64) -> File {
    let file = File::from(memfd_create("fuzz", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file
}

/// Guest 0..REGION lies behind REGION..2·REGION in the file: adjacent in the guest, not in our address space.
pub struct Guest {
    pub file: File,
    pub memory: GuestMemory,
    pub residency: Arc<ResidencyMap>,
}

impl Guest {
    pub fn new() -> Self {
        let file = memfd(MEM_SIZE);
        let map = |at: u64| {
            let spec =
                RegionSpec { guest_phys: at, size: REGION, user_addr: USER + at, mmap_offset: REGION - at };
            Arc::new(Mapping::new(file.try_clone().unwrap().into(), &spec).unwrap())
        };
        let memory = GuestMemory::new(vec![map(0), map(REGION)]).unwrap();
        Self { file, memory, residency: Arc::new(ResidencyMap::new(REGION, 0x1000)) }
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        for (i, byte) in bytes.iter().enumerate() {
            let at = (at + i as u64) % MEM_SIZE;
            self.file.write_all_at(&[*byte], (at + REGION) % MEM_SIZE).unwrap();
        }
    }
}

/// Memory as another snapshot has it: bit 0 of `what` with a log, bit 1 with pages that may be missing.
pub fn snapshot(guest: &Guest, what: u8) -> GuestMemory {
    let log = (what & 1 != 0).then(|| Arc::new(DirtyLog::new(memfd(LOG_SIZE).into(), LOG_SIZE, 0).unwrap()));
    let maps = [(what & 2 != 0).then(|| guest.residency.clone()), None];
    guest.memory.with_log(log).with_residency(&maps)
}

/// What has to hold of a chain.
pub fn check(chain: &Chain, memory: &GuestMemory, storage: &mut IoVecStorage) {
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
