//! Pages that have come without being asked for, found in bulk: by SEEK_DATA on the memory's file.
//!
//! On shmem a page that has been placed is data, and a hole is a page that has not. On hugetlbfs SEEK_DATA calls everything
//! data, and mincore(2) knows only what we have mapped ourselves: there only populates tell. (mincore is no use on shmem either:
//! of a file of another owner that we may not write it calls every page present.) So: shmem only, and only if this kernel
//! behaves so on a file of our own. Calls here may sleep: control helper thread.
#![forbid(unsafe_code)]

use crate::memory::{Mapping, ResidencyMap};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, ftruncate, lseek, sysconf};
use std::io;
use std::os::fd::AsFd;
use std::sync::LazyLock;

/// Runs of data that one scan takes in: the thread has other work, too.
const RUNS_MAX: usize = 4096;

/// Marks what of the region has come, from `from` on (bytes from its start). Returns where to go on, or None at the end.
pub fn scan(mapping: &Mapping, map: &ResidencyMap, from: u64) -> Option<u64> {
    let spec = mapping.spec();
    if !usable(mapping) || from >= spec.size {
        return None;
    }
    let mut at = from;
    for _ in 0..RUNS_MAX {
        // What is known to be there need not be looked at.
        let missing = map.next_missing(at)?;
        let start = seek(mapping, missing, Whence::SeekData).filter(|start| *start < spec.size)?;
        if map.first_missing(start..start + 1).is_none() {
            // Known already: the kernel would walk over all of it, page by page, to find its end.
            at = start;
            continue;
        }
        let end = seek(mapping, start, Whence::SeekHole)?.min(spec.size);
        map.set_present(start..end);
        at = end;
        if at >= spec.size {
            return None;
        }
    }
    Some(at)
}

/// Whether one page of the region, at `offset` from its start, has come. None: it cannot be told.
pub fn is_present(mapping: &Mapping, offset: u64) -> Option<bool> {
    usable(mapping).then(|| seek(mapping, offset, Whence::SeekData) == Some(offset))
}

fn usable(mapping: &Mapping) -> bool {
    static WORKS: LazyLock<bool> = LazyLock::new(|| self_test().unwrap_or(false));
    mapping.page_size() == base_page_size() && *WORKS
}

/// Seeks in the mapping's file, by offsets from the region's start. The file position means nothing to anybody: memory files
/// are mapped, not read.
fn seek(mapping: &Mapping, offset: u64, whence: Whence) -> Option<u64> {
    let base = mapping.spec().mmap_offset;
    let at = i64::try_from(base.checked_add(offset)?).ok()?;
    let found = lseek(mapping.file(), at, whence).ok()?;
    u64::try_from(found).ok()?.checked_sub(base)
}

fn base_page_size() -> u64 {
    sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|size| size.try_into().ok())
        .unwrap_or(4096)
}

/// Two holes and a page between them, on a file of our own.
fn self_test() -> io::Result<bool> {
    let page = base_page_size() as i64;
    let file = memfd_create("presence", MFdFlags::MFD_CLOEXEC)?;
    ftruncate(&file, 3 * page)?;
    nix::sys::uio::pwrite(file.as_fd(), &[1], page)?;
    let data = lseek(&file, 0, Whence::SeekData)?;
    let hole = lseek(&file, page, Whence::SeekHole)?;
    let none = lseek(&file, 2 * page, Whence::SeekData);
    Ok(data == page && hole == 2 * page && none == Err(Errno::ENXIO))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::testing::{map, memfd, spec};
    use std::os::unix::fs::FileExt;

    #[test]
    fn pages_that_were_written_elsewhere_are_found() {
        let file = memfd(0x20_0000);
        let mapping = map(&file, spec(0, 0x10_0000, 0x4000));
        let known = ResidencyMap::new(0x10_0000, 0x1000);
        assert_eq!(scan(&mapping, &known, 0), None);
        assert_eq!(known.first_missing(0..u64::MAX), Some(0..0x10_0000));
        // The region begins at 0x4000 of the file; what lies before and behind it is none of its pages.
        for page in [0u64, 3, 4, 5, 20, 0x103, 0x104] {
            file.write_all_at(&[1], page * 0x1000).unwrap();
        }
        assert_eq!(scan(&mapping, &known, 0), None);
        assert_eq!(known.first_missing(0..u64::MAX), Some(0x2000..0x1_0000));
        assert_eq!(known.first_missing(0x1_1000..u64::MAX), Some(0x1_1000..0xf_f000));
        assert_eq!((is_present(&mapping, 0x1000), is_present(&mapping, 0x2000)), (Some(true), Some(false)));
    }

    #[test]
    fn a_long_scan_goes_on_where_it_was() {
        let pages = 4 * RUNS_MAX as u64;
        let file = memfd(pages * 0x1000);
        let mapping = map(&file, spec(0, pages * 0x1000, 0));
        let known = ResidencyMap::new(pages * 0x1000, 0x1000);
        (0..pages).step_by(2).for_each(|page| file.write_all_at(&[1], page * 0x1000).unwrap());
        let mut from = Some(0);
        let mut scans = 0;
        while let Some(at) = from {
            from = scan(&mapping, &known, at);
            scans += 1;
        }
        assert_eq!(scans, 3);
        for page in 0..pages {
            let missing = known.first_missing(page * 0x1000..page * 0x1000 + 1).is_some();
            assert_eq!(missing, page % 2 == 1);
        }
    }
}
