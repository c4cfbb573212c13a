//! A front-end whose memory arrives late: QEMU's part on the destination of a postcopy migration, step by step.
//!
//! The guest's memory is laid out first, then taken away ([`Late::depart`]): its pages become holes in the file, and
//! what they held arrives page by page ([`Late::deliver`]), or never.
#![forbid(unsafe_code)]

use super::{Faults, Front, Memory, Ring, Setup, mem_reg, mem_table, msg, protocol, state};
use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use std::collections::BTreeMap;
use std::path::Path;

/// Page size, bytes.
pub const PAGE: u64 = 4096;

/// What has not arrived of a memory. Outlives the front-end.
#[derive(Debug)]
pub struct Away {
    memory: Memory,
    /// By page number: what it holds.
    pages: BTreeMap<u64, Vec<u8>>,
}

/// See the module's header.
#[derive(Debug)]
pub struct Late {
    /// The front-end.
    pub front: Front,
    /// The back-end's userfaultfd, once advised.
    pub faults: Option<Faults>,
    /// Where the back-end has mapped the memory, once told.
    pub base: u64,
    away: Away,
    /// How often each page was asked for.
    asked: BTreeMap<u64, u32>,
}

impl Away {
    /// Which pages of the file are holes.
    fn holes(&self) -> Result<Vec<u64>> {
        let (file, end) = (self.memory.file(), self.memory.size);
        let mut holes = Vec::new();
        let mut at = 0;
        while at < end {
            let data = match lseek(file, at as i64, Whence::SeekData) {
                Ok(data) => (data as u64).min(end),
                Err(nix::errno::Errno::ENXIO) => end,
                Err(errno) => return Err(errno.into()),
            };
            holes.extend(at / PAGE..data / PAGE);
            if data >= end {
                break;
            }
            at = lseek(file, data as i64, Whence::SeekHole)? as u64;
        }
        Ok(holes)
    }

    /// Every page that has not been delivered is a hole still.
    pub fn check_holes(&self) -> Result<()> {
        let holes = self.holes()?;
        let filled: Vec<_> = self.pages.keys().filter(|page| holes.binary_search(page).is_err()).collect();
        ensure!(filled.is_empty(), "pages that have not arrived are no holes any more: {filled:?}");
        Ok(())
    }

    /// How many pages.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether everything has arrived.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

impl Late {
    /// What such a front-end wants: as usual, and PAGEFAULT.
    pub fn setup(ring_size: u16) -> Setup {
        let usual = Setup::default();
        Setup { ring_size, protocol: usual.protocol | protocol::PAGEFAULT, ..usual }
    }

    /// Connects and negotiates: what happens before the migration comes in. With MB of memory, all of it here.
    pub fn connect(path: &Path, setup: Setup) -> Result<Self> {
        let rings = 2 * u64::from(setup.queue_pairs);
        let size = (rings * Ring::footprint(setup.ring_size)).next_multiple_of(1 << 20) + (1 << 20);
        Self::connect_with_memory(path, setup, Memory::memfd(size)?)
    }

    /// The same, with memory that is given.
    pub fn connect_with_memory(path: &Path, setup: Setup, memory: Memory) -> Result<Self> {
        let mut front = Front::connect_with_memory(path, setup, memory)?;
        front.negotiate()?;
        ensure!(front.has(protocol::PAGEFAULT), "the back-end does not offer PAGEFAULT");
        let away = Away { memory: front.memory.clone(), pages: BTreeMap::new() };
        Ok(Self { front, faults: None, base: 0, away, asked: BTreeMap::new() })
    }

    /// Takes all pages away but those that `stay`; returns how many.
    pub fn depart(&mut self, stay: impl Fn(u64) -> bool) -> Result<usize> {
        let memory = &self.front.memory;
        let holes = self.away.holes()?;
        for page in (0..memory.size / PAGE).filter(|page| !stay(*page)) {
            // What was never written is away as it is.
            if holes.binary_search(&page).is_ok() {
                self.away.pages.insert(page, vec![0; PAGE as usize]);
                continue;
            }
            let bytes = memory.read(page * PAGE, PAGE as usize)?;
            self.away.pages.insert(page, bytes);
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(memory.file(), hole, (page * PAGE) as i64, PAGE as i64)?;
        }
        Ok(self.away.len())
    }

    /// The pages of descriptor tables, available and used rings.
    pub fn ring_pages(&self) -> Vec<u64> {
        let rings = self.front.rings.iter();
        rings.flat_map(|ring| ring.desc / PAGE..ring.buffers / PAGE).collect()
    }

    /// POSTCOPY_ADVISE.
    pub fn advise(&mut self) -> Result<()> {
        let reply = self.front.wire.ask(msg::POSTCOPY_ADVISE, &[]).context("ADVISE")?;
        let mut fds = reply.fds.into_iter();
        match (fds.next(), fds.next()) {
            (Some(fd), None) if reply.payload.is_empty() => self.faults = Some(Faults::received(fd)?),
            _ => bail!("ADVISE must be answered with one userfaultfd and nothing else"),
        }
        Ok(())
    }

    /// POSTCOPY_LISTEN, and what follows it before the memory.
    pub fn listen(&mut self) -> Result<()> {
        let code = self.front.wire.ask(msg::POSTCOPY_LISTEN, &[]).context("LISTEN")?.u64()?;
        ensure!(code == 0, "LISTEN was answered with {code}");
        self.front.acknowledge_features()
    }

    /// Tells the memory, and takes the back-end's address.
    pub fn tell_memory(&mut self) -> Result<()> {
        let (region, fd) = (self.front.memory.region(), [self.front.memory.fd()]);
        let slots = self.front.has(protocol::CONFIGURE_MEM_SLOTS);
        let (request, payload) = match slots {
            true => (msg::ADD_MEM_REG, mem_reg(region)),
            false => (msg::SET_MEM_TABLE, mem_table(&[region])),
        };
        self.front.wire.tell(request, &payload, &fd)?;
        let reply = self.front.wire.reply_to(request)?.payload;
        ensure!(reply.len() == payload.len(), "an answer of {} bytes", reply.len());
        // Both begin with 8 bytes, then guest address, size, user address.
        self.base = u64::from_ne_bytes(reply[24..32].try_into()?);
        ensure!(self.base != 0 && self.base.is_multiple_of(PAGE), "mapped at {:#x}", self.base);
        Ok(())
    }

    /// The back-end may ask for pages from now on.
    pub fn acknowledge(&self) -> Result<()> {
        let slots = self.front.has(protocol::CONFIGURE_MEM_SLOTS);
        let request = if slots { msg::ADD_MEM_REG } else { msg::SET_MEM_TABLE };
        Ok(self.front.wire.tell(request, &0u64.to_ne_bytes(), &[])?)
    }

    /// POSTCOPY_END; what it was answered with.
    pub fn end(&self) -> Result<u64> {
        Ok(self.front.wire.ask(msg::POSTCOPY_END, &[]).context("END")?.u64()?)
    }

    /// From ADVISE to running rings.
    pub fn arm(&mut self) -> Result<()> {
        self.advise()?;
        self.listen()?;
        self.tell_memory()?;
        self.acknowledge()?;
        self.front.start_rings()
    }

    /// Takes what was asked for since the last call; returns how many pages were ever asked for.
    pub fn collect(&mut self) -> Result<usize> {
        let Some(faults) = &self.faults else { return Ok(0) };
        for address in faults.addresses()? {
            let page = address.checked_sub(self.base).map(|offset| offset / PAGE);
            let page = page.filter(|page| *page < self.front.memory.size / PAGE);
            let page = page.with_context(|| format!("a fault at {address:#x}, which is no guest memory"))?;
            *self.asked.entry(page).or_default() += 1;
        }
        Ok(self.asked.len())
    }

    /// From now on pages count as asked for when they are asked for again.
    pub fn forget_asked(&mut self) {
        self.asked.clear();
    }

    /// How often each page was asked for.
    pub fn asked(&self) -> &BTreeMap<u64, u32> {
        &self.asked
    }

    /// Lets a page come.
    pub fn deliver(&mut self, page: u64) -> Result<()> {
        if let Some(bytes) = self.away.pages.remove(&page) {
            self.front.memory.write(page * PAGE, &bytes)?;
        }
        match &self.faults {
            Some(faults) if self.base != 0 => Ok(faults.wake(self.base + page * PAGE, PAGE)?),
            _ => Ok(()),
        }
    }

    /// Lets all pages come that were asked for and are away; returns how many.
    pub fn deliver_asked(&mut self) -> Result<usize> {
        self.collect()?;
        let pages: Vec<u64> =
            self.asked.keys().filter(|page| self.away.pages.contains_key(page)).copied().collect();
        pages.iter().try_for_each(|page| self.deliver(*page))?;
        Ok(pages.len())
    }

    /// Lets everything come.
    pub fn deliver_all(&mut self) -> Result<()> {
        let pages: Vec<u64> = self.away.pages.keys().copied().collect();
        pages.into_iter().try_for_each(|page| self.deliver(page))
    }

    /// What has not come.
    pub fn away(&self) -> &Away {
        &self.away
    }

    /// Hangs up, and closes its copy of the userfaultfd; what has not come stays to be looked at.
    pub fn hang_up(self) -> Away {
        self.away
    }

    /// Stops a ring; its base.
    pub fn stop_ring(&self, ring: u32) -> Result<u32> {
        let reply = self.front.wire.ask(msg::GET_VRING_BASE, &state(ring, 0))?;
        Ok(u32::from_ne_bytes(reply.payload.get(4..8).context("a base")?.try_into()?))
    }
}
