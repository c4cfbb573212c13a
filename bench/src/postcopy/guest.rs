//! Guest memory on the destination: what the source has, what has arrived, and whether it stayed whole.
//!
//! The memory is a memfd of holes. Pages are placed in this program's own mapping by UFFDIO_COPY, whole and at
//! once, as QEMU does; the driver, which stands for the guest's CPU, uses that mapping too and waits for
//! missing pages like anybody else.

use std::fs::File;
use std::io;

use anyhow::{Context, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::fstat;
use serde::Serialize;

use super::PAGE;
use super::findings::{Findings, Wrong};
use super::layout::{Layout, RINGS, RX, TX, fill};
use super::ring::Ring;
use super::uffd::Uffd;
use crate::mapping::{Mapping, pages_with_content};
use crate::packet::{self, HEADER};

/// Both ring indices when the destination takes over: soon to wrap, and never what a page of zeros says.
pub const BASE: u16 = 65_300;

/// What guest memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// A memfd, in small pages
    #[default]
    Memfd,
    /// A file in /dev/shm
    Shm,
    /// A memfd of hugepages of 2 MiB
    Hugetlb,
}

impl Backing {
    /// Where things lie in such memory: buffers of a small page each, or 32 to a hugepage.
    pub fn layout(self, ring_size: u16, buffers: u64) -> Layout {
        match self {
            Self::Memfd | Self::Shm => Layout::small(ring_size, buffers),
            Self::Hugetlb => Layout { ring_size, buffers, page: 2 << 20, stride: 64 << 10 },
        }
    }

    fn file(self) -> Result<File> {
        let flags = MFdFlags::MFD_CLOEXEC;
        Ok(match self {
            Self::Memfd => memfd_create("guest", flags)?.into(),
            Self::Shm => tempfile::tempfile_in("/dev/shm")?,
            Self::Hugetlb => {
                memfd_create("guest", flags | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB)?.into()
            }
        })
    }
}

/// Memory of one virtual machine.
#[derive(Debug)]
pub struct Guest {
    /// Where things are.
    pub layout: Layout,
    /// The destination's memory, to be shared with the back-end.
    pub file: File,
    /// This program's mapping of it.
    pub map: Mapping,
    /// The source's memory: everything is here from the start.
    source: Mapping,
    uffd: Uffd,
}

impl Guest {
    /// Memory of which nothing has arrived. The source's rings are formatted and its TX buffers have packets.
    pub fn new(backing: Backing, layout: Layout, frame: usize) -> Result<Self> {
        let len = layout.bytes();
        let file = backing.file().with_context(|| format!("guest memory ({backing:?})"))?;
        file.set_len(len)?;
        let map = Mapping::of_file(&file, len)?;
        let uffd = Uffd::new().context("a userfaultfd for our own mapping")?;
        uffd.register(map.address(), len).context("registering our own mapping")?;
        let source = Mapping::private(len)?;
        let mut bytes = [0; PAGE as usize];
        for page in layout.first_buffer() / PAGE..len / PAGE {
            fill(page, &mut bytes);
            source.write(page * PAGE, &bytes);
        }
        let mut bytes = vec![0; HEADER + frame];
        for number in 0..layout.buffers {
            packet::build(number, &mut bytes);
            source.write(layout.buffer(TX, number), &bytes);
        }
        Ok(Self { layout, file, map, source, uffd })
    }

    /// The driver's side of both rings, as the source left them: `posted` buffers are with the device.
    pub fn source_ring(&self, ring: usize, posted: u64, len: u32) -> Ring {
        let mut it = Ring::new(self.layout.ring(ring), BASE);
        it.format(&self.source);
        for number in 0..posted.min(it.room()) {
            it.publish(&self.source, self.layout.buffer(ring, number), len, ring == RX);
        }
        it.expose(&self.source);
        it
    }

    /// The userfaultfd of our own mapping.
    pub fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// A page arrives. `false`: it had content already.
    pub fn place(&self, page: u64) -> io::Result<bool> {
        let size = self.layout.page;
        let (to, from) = (self.map.pointer(page * size, size), self.source.pointer(page * size, size));
        // SAFETY: `to` is a page of `map`, which is registered with this userfaultfd and only reached through raw
        // pointers; `from` is a page of the source's mapping.
        unsafe { self.uffd.place(to as u64, from, size) }
    }

    /// Lets a driver go on that waits for a page that will never come: it then reads zeros. For the end only, when
    /// the memory has been checked.
    pub fn give_up(&self) {
        let _ = self.uffd.unregister(self.map.address(), self.map.len());
    }

    /// Everything arrives, and nobody waits for anything in this program's mapping any more.
    pub fn arrive(&self) -> Result<()> {
        for page in 0..self.layout.pages() {
            self.place(page)?;
        }
        self.give_up();
        Ok(())
    }

    /// Checks that pages which did not come are holes still; if not, that is `wrong`.
    pub fn check_holes(
        &self,
        is_here: impl Fn(u64) -> bool,
        wrong: Wrong,
        findings: &Findings,
    ) -> Result<()> {
        if self.layout.page != PAGE {
            // Which pages of a hugetlbfs file there are cannot be asked, only how many.
            let have = fstat(&self.file)?.st_blocks as u64 * 512 / self.layout.page;
            let came = (0..self.layout.pages()).filter(|page| is_here(*page)).count() as u64;
            if have != came {
                findings.add(wrong, || format!("{came} pages came, and {have} have content"));
            }
            return Ok(());
        }
        let content = pages_with_content(&self.file, self.map.len());
        for (page, content) in content.context("looking for content in guest memory")?.into_iter().enumerate()
        {
            if content && !is_here(page as u64) {
                findings.add(wrong, || format!("page {page} did not come and has content"));
            }
        }
        Ok(())
    }

    /// Checks that pages which came are what they were, behind the longest packet of each ring.
    pub fn check_pages(&self, is_here: impl Fn(u64) -> bool, longest: [usize; RINGS], findings: &Findings) {
        let (mut now, mut then) = ([0; PAGE as usize], [0; PAGE as usize]);
        for (ring, &from) in longest.iter().enumerate() {
            for number in 0..self.layout.buffers {
                let at = self.layout.buffer(ring, number);
                if !is_here(at / self.layout.page) {
                    continue;
                }
                self.map.read(at, &mut now);
                self.source.read(at, &mut then);
                if now[from..] != then[from..] {
                    let zeros = now[from..].iter().all(|&b| b == 0);
                    let what = if zeros { "zeros" } else { "something else" };
                    findings.add(Wrong::PageChanged, || {
                        format!("buffer {number} of ring {ring} has {what} from byte {from} on")
                    });
                }
            }
        }
    }
}
