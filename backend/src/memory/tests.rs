//! Guest memory as a whole: what is refused, translation across regions, residency, truncated files.

use std::os::fd::OwnedFd;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::testing::{USER_BASE, contents, guest, map, memfd, spec};
use super::*;

fn refusal(file: impl Into<OwnedFd>, spec: RegionSpec) -> MapError {
    Mapping::new(file.into(), &spec).unwrap_err()
}

#[test]
fn only_tmpfs_and_hugetlbfs_files_are_mapped() {
    let region = spec(0, 0x1000, 0);
    let disk_or_proc = std::fs::File::open("/proc/self/maps").unwrap();
    assert_eq!(refusal(disk_or_proc, region), MapError::WrongKind);
    let (read_end, _write_end) = nix::unistd::pipe().unwrap();
    assert_eq!(refusal(read_end, region), MapError::WrongKind);
    assert_eq!(refusal(nix::sys::eventfd::EventFd::new().unwrap(), region), MapError::WrongKind);
    let directory = std::fs::File::open("/dev").unwrap();
    assert_eq!(refusal(directory, region), MapError::WrongKind);
    let sockets = std::os::unix::net::UnixStream::pair().unwrap();
    assert_eq!(refusal(sockets.0, region), MapError::WrongKind);
}

#[test]
fn a_region_must_fit_its_file_and_its_pages() {
    let file = || memfd(0x10000);
    assert_eq!(refusal(file(), spec(0, 0, 0)), MapError::Empty);
    assert_eq!(
        refusal(file(), spec(0, 0x10000, 0x1000)),
        MapError::FileTooSmall { file_size: 0x10000, needed: 0x11000 }
    );
    for bad in [spec(0, 0x1000, 0x800), spec(0, 0x1800, 0), spec(0x800, 0x1000, 0)] {
        assert!(matches!(refusal(file(), bad), MapError::Misaligned { .. }), "{bad:?}");
    }
    assert_eq!(refusal(file(), spec(0, 0x1000, u64::MAX - 0xfff)), MapError::Wraps);
    let at_the_end = RegionSpec { guest_phys: u64::MAX - 0xfff, ..spec(0, 0x1000, 0) };
    assert_eq!(refusal(file(), at_the_end), MapError::Wraps);
    let user_wraps = RegionSpec { user_addr: u64::MAX - 0xfff, ..spec(0, 0x1000, 0) };
    assert_eq!(refusal(file(), user_wraps), MapError::Wraps);
    assert!(matches!(refusal(file(), spec(0, 1 << 45, 0)), MapError::FileTooSmall { .. }));
    for too_large in [(1 << 45) + 0x1000, 1 << 62] {
        assert!(matches!(refusal(file(), spec(0, too_large, 0)), MapError::TooLarge { .. }));
    }
}

#[test]
fn a_read_only_file_is_refused() {
    let file = memfd(0x1000);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let read_only = std::fs::File::open(path).unwrap();
    assert!(matches!(refusal(read_only, spec(0, 0x1000, 0)), MapError::System { call: "mmap", .. }));
}

#[test]
fn a_refused_or_dropped_mapping_closes_its_fd_and_unmaps() {
    let file = memfd(0x4000);
    let inode = std::os::unix::fs::MetadataExt::ino(&file.metadata().unwrap());
    let holders = || {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| {
            std::fs::metadata(entry.ok()?.path()).ok().map(|m| std::os::unix::fs::MetadataExt::ino(&m))
        });
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let mapped = maps.lines().filter(|line| line.contains(&format!(" {inode} "))).count();
        (fds.filter(|i| *i == inode).count(), mapped)
    };
    assert_eq!(holders(), (1, 0));
    refusal(file.try_clone().unwrap(), spec(0, 0x8000, 0));
    refusal(file.try_clone().unwrap(), spec(0, 0x1000, 1));
    assert_eq!(holders(), (1, 0));
    let memory = GuestMemory::new(vec![map(&file, spec(0, 0x4000, 0))]).unwrap();
    let snapshot = memory.clone();
    drop(memory);
    assert_eq!(holders(), (2, 1));
    drop(snapshot);
    assert_eq!(holders(), (1, 0));
}

#[test]
fn huge_pages_are_mapped_at_their_alignment() {
    const HUGE: u64 = 2 << 20;
    let Ok(fd) = memfd_create("huge", MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB) else {
        println!("skipped: no 2 MiB hugetlb memfd on this machine");
        return;
    };
    let file = std::fs::File::from(fd);
    file.set_len(4 * HUGE).unwrap();
    let mapping = map(&file, spec(0, 2 * HUGE, HUGE));
    assert_eq!(mapping.page_size(), HUGE);
    assert_eq!(mapping.host_addr() % HUGE, 0);
    assert!(matches!(refusal(file.try_clone().unwrap(), spec(0, HUGE, 4096)), MapError::Misaligned { .. }));
    assert!(matches!(refusal(file, spec(0, HUGE + 4096, 0)), MapError::Misaligned { .. }));
}

#[test]
fn overlapping_regions_are_refused() {
    let file = memfd(0x10000);
    let new = |specs: &[RegionSpec]| {
        GuestMemory::new(specs.iter().map(|s| map(&file, *s)).collect()).map(drop).unwrap_err()
    };
    assert_eq!(new(&[spec(0x1000, 0x2000, 0), spec(0x2000, 0x1000, 0)]), LayoutError::GuestOverlap(0x2000));
    assert_eq!(new(&[spec(0x1000, 0x1000, 0), spec(0x1000, 0x2000, 0)]), LayoutError::GuestOverlap(0x1000));
    let elsewhere = RegionSpec { guest_phys: 0x80_0000, ..spec(0x2000, 0x1000, 0) };
    assert_eq!(new(&[elsewhere, spec(0x1000, 0x2000, 0)]), LayoutError::UserOverlap(USER_BASE + 0x2000));
    let many: Vec<_> = (0..=MAX_REGIONS as u64).map(|i| spec(i * 0x1000, 0x1000, 0)).collect();
    assert_eq!(new(&many), LayoutError::TooMany(MAX_REGIONS + 1));
    GuestMemory::new(many[1..].iter().map(|s| map(&file, *s)).collect()).unwrap();
}

/// Guest 0x1000..0x3000 and 0x3000..0x5000 adjoin but lie the other way round in the file; 0x8000..0x9000 is alone.
fn three_regions() -> (GuestMemory, std::fs::File) {
    let file = memfd(0x10000);
    let maps = [spec(0x8000, 0x1000, 0x4000), spec(0x3000, 0x2000, 0), spec(0x1000, 0x2000, 0x2000)];
    (GuestMemory::new(maps.iter().map(|s| map(&file, *s)).collect()).unwrap(), file)
}

#[test]
fn copies_cross_adjacent_regions() {
    let (memory, file) = three_regions();
    let data: Vec<u8> = (0..0x1000).map(|i| (i % 251) as u8).collect();
    memory.write(0x2801, &data).unwrap();
    let mut back = vec![0; data.len()];
    memory.read(0x2801, &mut back).unwrap();
    assert_eq!(back, data);
    let bytes = contents(&file);
    assert_eq!(bytes[0x3801..0x4000], data[..0x7ff]);
    assert_eq!(bytes[..0x801], data[0x7ff..]);
}

#[test]
fn what_is_outside_is_refused_whole() {
    let (memory, file) = three_regions();
    let out = |gpa, len| AccessError::OutOfRange { gpa, len };
    assert_eq!(memory.write(0x4fff, &[1, 2]), Err(out(0x4fff, 2)));
    assert_eq!(memory.write(0, &[1]), Err(out(0, 1)));
    assert_eq!(memory.read(0x9000, &mut [0]), Err(out(0x9000, 1)));
    assert_eq!(memory.read(u64::MAX, &mut [0; 9]), Err(out(u64::MAX, 9)));
    assert_eq!(memory.check(0x8000, 0x1001), Err(out(0x8000, 0x1001)));
    assert_eq!(memory.check(0x1000, 0x4000), Ok(()));
    assert_eq!(memory.check(0x1000, u32::MAX), Err(out(0x1000, u64::from(u32::MAX))));
    assert_eq!(GuestMemory::empty().check(0, 1), Err(out(0, 1)));
    assert!(
        contents(&file).iter().all(|b| *b == 0),
        "nothing may be written before the whole range is known"
    );
}

#[test]
fn iovecs_are_split_between_regions_and_all_or_nothing() {
    let (memory, _file) = three_regions();
    let mut list = IoVecs::new();
    memory.push_iovecs(0x2000, 0x2800, &mut list).unwrap();
    let lens: Vec<usize> = list.as_slice().iter().map(IoVec::len).collect();
    assert_eq!(lens, [0x1000, 0x1800]);
    assert_eq!(list.total_len(), 0x2800);
    assert!(memory.push_iovecs(0x4000, 0x1001, &mut list).is_err());
    assert_eq!(list.len(), 2);
    while list.room() > 1 {
        memory.push_iovecs(0x8000, 1, &mut list).unwrap();
    }
    assert_eq!(memory.push_iovecs(0x2fff, 2, &mut list), Err(AccessError::Full));
    assert_eq!(list.len(), IOVECS_CAPACITY - 1);
    memory.push_iovecs(0x8000, 1, &mut list).unwrap();
    assert_eq!(memory.push_iovecs(0x8000, 1, &mut list), Err(AccessError::Full));
}

#[test]
fn iovecs_know_whether_they_may_be_written() {
    let (memory, _file) = guest(0x1000);
    let mut scratch = [0; 12];
    let mut list = IoVecs::new();
    assert!(list.push_own_mut(&mut scratch));
    memory.push_iovecs(0, 100, &mut list).unwrap();
    assert_eq!(list.as_writable().map(<[_]>::len), Some(2));
    assert!(list.push_own(&[1, 2, 3]));
    assert!(list.as_writable().is_none());
    list.clear();
    assert!(list.as_writable().is_some());
}

#[test]
fn storage_of_iovecs_is_used_again() {
    let (memory, _file) = guest(0x1000);
    let mut storage = IoVecStorage::default();
    for round in 1..4u32 {
        let header = [0; 12];
        let list = storage.begin();
        assert!(list.is_empty());
        list.push_own(&header);
        memory.push_iovecs(0, round, list).unwrap();
        assert_eq!(list.total_len(), 12 + u64::from(round));
    }
}

#[test]
fn many_regions_are_found_by_bisection() {
    let file = memfd(0x1000);
    let maps = (0..100u64).map(|i| map(&file, spec(0x10_0000 + i * 0x3000, 0x1000, 0))).collect();
    let memory = GuestMemory::new(maps).unwrap();
    for i in 0..100 {
        let start = 0x10_0000 + i * 0x3000;
        assert!(memory.check(start, 0x1000).is_ok());
        assert!(memory.check(start + 0xfff, 1).is_ok());
        assert!(memory.check(start + 0x1000, 1).is_err());
        assert!(memory.check(start - 1, 1).is_err());
    }
}

#[test]
fn a_missing_page_is_named_and_not_touched() {
    let (memory, _file) = three_regions();
    let map = std::sync::Arc::new(ResidencyMap::new(0x2000, 0x1000));
    // Region order is that of the table given: [1] is 0x3000..0x5000.
    let memory = memory.with_residency(&[None, Some(map.clone())]);
    let missing = |gpa, len| AccessError::Missing(MissingRange { gpa, len });
    assert_eq!(memory.read(0x2ffe, &mut [0; 4]), Err(missing(0x3000, 0x1000)));
    assert_eq!(memory.check(0x3800, 0x1000), Err(missing(0x3000, 0x2000)));
    let mut list = IoVecs::new();
    assert_eq!(memory.push_iovecs(0x2000, 0x1001, &mut list), Err(missing(0x3000, 0x1000)));
    assert!(list.is_empty());
    assert_eq!(memory.write(0x2fff, &[9, 9]), Err(missing(0x3000, 0x1000)));
    let mut byte = [0];
    memory.read(0x2fff, &mut byte).unwrap();
    assert_eq!(byte, [0], "half a write");
    map.set_present(0..0x1000);
    memory.write(0x2fff, &[9, 9]).unwrap();
    assert_eq!(memory.check(0x3800, 0x1000), Err(missing(0x4000, 0x1000)));
    assert_eq!(memory.check(0x1000, 0x2000), Ok(()));
    assert_eq!(memory.with_residency(&[]).check(0x1000, 0x4000), Ok(()));
}

#[test]
fn writes_are_logged_by_guest_page() {
    let (memory, _file) = three_regions();
    let log_file = memfd(0x1000);
    let log = DirtyLog::new(log_file.try_clone().unwrap().into(), 0x1000, 0).unwrap();
    let logged = memory.with_log(Some(std::sync::Arc::new(log)));
    memory.write(0x8000, &[1]).unwrap();
    logged.write(0x2fff, &[1, 2]).unwrap();
    logged.mark_written(0x8800, 1);
    logged.mark_written(0x1000, 0);
    let _ = logged.write(0x4fff, &[1, 2]);
    let bytes = contents(&log_file);
    assert_eq!(bytes[0], 1 << 2 | 1 << 3);
    assert_eq!(bytes[1], 1);
    assert!(logged.with_log(None).log().is_none());
}

#[test]
fn a_file_truncated_under_us_poisons_its_mapping_only() {
    let (victim, file) = guest(0x4000);
    let (bystander, _other) = guest(0x4000);
    victim.write(0, &[7; 0x4000]).unwrap();
    assert!(!victim.poisoned());
    file.set_len(0x1000).unwrap();
    let mut bytes = [1; 16];
    victim.read(0x800, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 16]);
    assert!(!victim.poisoned(), "the first page is still there");
    victim.read(0x2ff8, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 16]);
    victim.write(0x3ff0, &bytes).unwrap();
    assert!(victim.poisoned());
    assert!(!bystander.poisoned());
    drop(victim);
    // The slot may be used again, and begins clean.
    let (next, _file) = guest(0x1000);
    assert!(!next.poisoned());
}

#[test]
fn truncation_is_survived_by_all_threads_at_once() {
    let (victim, file) = guest(64 * 0x1000);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let victim = victim.clone();
            scope.spawn(move || {
                for turn in 0..2000u64 {
                    let gpa = (turn * 7 + thread) % 64 * 0x1000;
                    victim.write(gpa, &turn.to_le_bytes()).unwrap();
                    // Mappings come and go while others fault.
                    if turn % 50 == 0 {
                        drop(guest(0x2000));
                    }
                }
            });
        }
        for _ in 0..20 {
            file.set_len(0).unwrap();
            std::thread::yield_now();
            file.set_len(64 * 0x1000).unwrap();
        }
        file.set_len(0).unwrap();
    });
    victim.write(0, &[1]).unwrap();
    assert!(victim.poisoned());
}

#[test]
fn a_truncated_hugetlb_file_poisons_too() {
    const HUGE: u64 = 2 << 20;
    let Ok(fd) = memfd_create("huge", MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB) else {
        println!("skipped: no 2 MiB hugetlb memfd on this machine");
        return;
    };
    let file = std::fs::File::from(fd);
    file.set_len(HUGE).unwrap();
    let memory = GuestMemory::new(vec![map(&file, spec(0, HUGE, 0))]).unwrap();
    file.set_len(0).unwrap();
    memory.write(0x12345, &[1]).unwrap();
    assert!(memory.poisoned());
}
