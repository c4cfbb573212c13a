//! Giving up real memory with real populates under way: they end, and the file gets no page.

use super::uffd::Userfaultfd;
use crate::memory::Mapping;
use crate::memory::testing::{memfd, spec};
use crate::reactor::{Done, Reactor};
use crate::uplink::testing::skip;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

const POPULATES: u64 = 128;

/// Bytes of a message of userfaultfd; the address of a fault stands at 16.
const MESSAGE: usize = 32;

struct Rig {
    file: File,
    mapping: Mapping,
    uffd: Userfaultfd,
    reactor: Reactor<u64>,
    results: Vec<(u64, std::io::Result<()>)>,
}

impl Rig {
    /// Memory of which each page is being populated, and none has come.
    fn new(name: &str, file: std::io::Result<File>, page: u64) -> Option<Self> {
        let uffd = Userfaultfd::new().map_err(|error| skip(name, &error.to_string())).ok()?;
        let file = file.map_err(|error| skip(name, &error.to_string())).ok()?;
        let fd = file.try_clone().unwrap();
        let mapping = match Mapping::new(fd.into(), &spec(0, POPULATES * page, 0)) {
            Ok(mapping) => mapping,
            Err(error) => {
                skip(name, &error.to_string());
                return None;
            }
        };
        assert_eq!(mapping.page_size(), page);
        uffd.register(&mapping).unwrap();
        let mut reactor = Reactor::new().unwrap();
        reactor.set_workers(POPULATES as u32 + 8).unwrap();
        for n in 0..POPULATES {
            reactor.populate(mapping.host_addr() + n * page, page, n);
        }
        let mut rig = Self { file, mapping, uffd, reactor, results: Vec::new() };
        let mut faults = Vec::new();
        rig.turn_until(|rig| {
            let mut bytes = [0; 64 * MESSAGE];
            let read = nix::unistd::read(rig.uffd.as_fd(), &mut bytes).unwrap_or(0);
            for message in bytes[..read].chunks_exact(MESSAGE) {
                faults.push(u64::from_ne_bytes(message[16..24].try_into().unwrap()));
            }
            faults.len() as u64 == POPULATES
        });
        faults.sort_unstable();
        faults.dedup();
        assert_eq!((faults.len() as u64, rig.results.len()), (POPULATES, 0));
        Some(rig)
    }

    fn turn_until(&mut self, mut what: impl FnMut(&mut Self) -> bool) {
        let began = Instant::now();
        let (mut done, mut mail) = (Vec::new(), false);
        while !what(self) {
            self.reactor.turn(false, &mut done, &mut mail).unwrap();
            for (token, done) in done.drain(..) {
                let Done::Populated(result) = done else { panic!("no populate") };
                self.results.push((token, result));
            }
            assert!(began.elapsed() < Duration::from_secs(20), "{} have ended", self.results.len());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn blocks(&self) -> u64 {
        self.file.metadata().unwrap().blocks()
    }

    fn give_up(mut self) {
        let before = self.blocks();
        self.uffd.give_up(&self.mapping).unwrap();
        self.turn_until(|rig| rig.results.len() as u64 == POPULATES);
        let ended: Vec<_> = self.results.iter().filter(|(_, result)| result.is_ok()).collect();
        assert!(ended.is_empty(), "{ended:?}");
        // In the order of a port: memory first, then the userfaultfd.
        drop(self.mapping);
        drop(self.uffd);
        assert_eq!(self.file.metadata().unwrap().blocks(), before, "pages were made");
    }
}

fn shmem() -> std::io::Result<File> {
    Ok(memfd(POPULATES * 0x1000))
}

fn hugetlb() -> std::io::Result<File> {
    let file = File::from(memfd_create(
        "huge",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
    )?);
    file.set_len(POPULATES << 21)?;
    Ok(file)
}

#[test]
fn holes_stay_holes_when_memory_is_given_up() {
    if let Some(rig) = Rig::new("holes_stay_holes_when_memory_is_given_up", shmem(), 0x1000) {
        assert_eq!(rig.blocks(), 0);
        rig.give_up();
    }
}

#[test]
fn huge_holes_stay_holes_when_memory_is_given_up() {
    if let Some(rig) = Rig::new("huge_holes_stay_holes_when_memory_is_given_up", hugetlb(), 2 << 20) {
        assert_eq!(rig.blocks(), 0);
        rig.give_up();
    }
}

/// Some pages come before the end, others after it: only those that came are there.
#[test]
fn pages_that_came_stay_and_their_populates_succeed() {
    let Some(mut rig) = Rig::new("pages_that_came_stay_and_their_populates_succeed", shmem(), 0x1000) else {
        return;
    };
    for n in 0..10 {
        rig.file.write_all_at(&[7; 0x1000], n * 0x1000).unwrap();
    }
    // Nobody but END wakes them.
    rig.uffd.wake(&rig.mapping).unwrap();
    rig.turn_until(|rig| rig.results.len() == 10);
    assert!(rig.results.iter().all(|(page, result)| *page < 10 && result.is_ok()), "{:?}", rig.results);
    rig.give_up_rest(10);
}

impl Rig {
    fn give_up_rest(mut self, came: u64) {
        let ended = std::mem::take(&mut self.results);
        assert_eq!(ended.len() as u64, came);
        self.uffd.give_up(&self.mapping).unwrap();
        self.turn_until(|rig| rig.results.len() as u64 == POPULATES - came);
        assert!(self.results.iter().all(|(page, result)| *page >= came && result.is_err()));
        assert_eq!(self.blocks(), came * 8);
    }
}

/// Closing a reactor does not wait for pages that never come.
#[test]
fn a_reactor_ends_with_populates_under_way() {
    let Some(rig) = Rig::new("a_reactor_ends_with_populates_under_way", shmem(), 0x1000) else { return };
    let Rig { file, mapping, uffd, reactor, .. } = rig;
    let began = Instant::now();
    drop(reactor);
    let took = began.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    uffd.give_up(&mapping).unwrap();
    assert_eq!(file.metadata().unwrap().blocks(), 0);
}
