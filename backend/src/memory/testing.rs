//! Memory files for unit tests.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::{GuestMemory, Mapping, RegionSpec};

/// A memfd of `size` bytes.
pub(crate) fn memfd(size: u64) -> File {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    let file = File::from(nix::sys::memfd::memfd_create("guest", flags).unwrap());
    file.set_len(size).unwrap();
    file
}

/// All that is in a file.
pub(crate) fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// A region that starts `at` in the guest and at `USER_BASE + at` in the front-end.
pub(crate) fn spec(at: u64, size: u64, mmap_offset: u64) -> RegionSpec {
    RegionSpec { guest_phys: at, size, user_addr: USER_BASE + at, mmap_offset }
}

pub(crate) const USER_BASE: u64 = 0x7f00_0000_0000;

/// One mapping of `file`.
pub(crate) fn map(file: &File, spec: RegionSpec) -> Arc<Mapping> {
    Arc::new(Mapping::new(file.try_clone().unwrap().into(), &spec).unwrap())
}

/// Guest memory of `size` bytes at guest address 0, and its file.
pub(crate) fn guest(size: u64) -> (GuestMemory, File) {
    let file = memfd(size);
    let mapping = map(&file, spec(0, size, 0));
    (GuestMemory::new(vec![mapping]).unwrap(), file)
}
