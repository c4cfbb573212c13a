//! Guest memory on the destination: what the source has, what has arrived, and whether it stayed whole.
//!
//! The memory is a memfd of holes. Pages are placed in this program's own mapping by UFFDIO_COPY, whole and at
//! once, as QEMU does; the driver, which stands for the guest's CPU, uses that mapping too and waits for
//! missing pages like anybody else.

use std::fs::File;
use std::io;

use anyhow::{Context, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::PAGE;
use super::findings::{Findings, Wrong};
use super::layout::{Layout, RINGS, RX, TX, fill};
use super::mapping::{Mapping, pages_with_content};
use super::packet::{self, HEADER};
use super::ring::Ring;
use super::uffd::Uffd;

/// Both ring indices when the destination takes over: soon to wrap, and never what a page of zeros says.
pub const BASE: u16 = 65_300;

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
    pub fn new(layout: Layout, frame: usize) -> Result<Self> {
        let len = layout.bytes();
        let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(len)?;
        let map = Mapping::of_file(&file, len)?;
        let uffd = Uffd::new().context("a userfaultfd for our own mapping")?;
        uffd.register(map.address(), len).context("registering our own mapping")?;
        let source = Mapping::private(len)?;
        let mut bytes = [0; PAGE as usize];
        for page in layout.ring_pages().end..len / PAGE {
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

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.map.len() / PAGE
    }

    /// The userfaultfd of our own mapping.
    pub fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// A page arrives. `false`: it had content already.
    pub fn place(&self, page: u64) -> io::Result<bool> {
        let (to, from) = (self.map.pointer(page * PAGE, PAGE), self.source.pointer(page * PAGE, PAGE));
        // SAFETY: `to` is a page of `map`, which is registered with this userfaultfd and only reached through raw
        // pointers; `from` is a page of the source's mapping.
        unsafe { self.uffd.place(to as u64, from) }
    }

    /// Lets a driver go on that waits for a page that will never come: it then reads zeros. For the end only, when
    /// the memory has been checked.
    pub fn give_up(&self) {
        let _ = self.uffd.unregister(self.map.address(), self.map.len());
    }

    /// Which pages have content.
    pub fn content(&self) -> Result<Vec<bool>> {
        pages_with_content(&self.file, self.map.len()).context("looking for content in guest memory")
    }

    /// Checks that pages which did not come are holes still.
    pub fn check_holes(&self, is_here: impl Fn(u64) -> bool, findings: &Findings) -> Result<()> {
        for (page, content) in self.content()?.into_iter().enumerate() {
            if content && !is_here(page as u64) {
                findings.add(Wrong::HoleGone, || format!("page {page} never came and has content"));
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
                if !is_here(at / PAGE) {
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
