//! QEMU's messages on the destination of a postcopy migration, in QEMU's order
//! (vhost-user: Migrating backend state; POSTCOPY messages).
#![forbid(unsafe_code)]

use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::rawfront::{mem_reg, mem_table, msg, protocol};

use super::deliver::{Client, Slot};
use super::guest::{BASE, Guest};
use super::layout::RINGS;
use super::uffd::Uffd;
use crate::session::{self, Events, PATIENCE};

/// What this front-end wants of a back-end beyond what every one has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wishes {
    /// Virtio features.
    pub features: u64,
    /// Memory is told slot by slot (CONFIGURE_MEM_SLOTS), or not at all.
    pub slots: bool,
}

/// A control connection that can do postcopy.
#[derive(Debug)]
pub struct Session {
    base: session::Session,
}

impl Deref for Session {
    type Target = session::Session;

    fn deref(&self) -> &session::Session {
        &self.base
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut session::Session {
        &mut self.base
    }
}

impl Session {
    /// Connects and does all that QEMU does before the migration comes in.
    pub fn open(socket: &Path, wishes: Wishes, events: &[Events; RINGS]) -> Result<Self> {
        Self::open_within(socket, wishes, events, PATIENCE)
    }

    /// As [`Self::open`], for a back-end that may be stuck.
    pub fn open_within(
        socket: &Path,
        wishes: Wishes,
        events: &[Events; RINGS],
        patience: Duration,
    ) -> Result<Self> {
        let slots = if wishes.slots { protocol::CONFIGURE_MEM_SLOTS } else { 0 };
        let wishes = session::Wishes {
            features: wishes.features,
            protocol_needed: protocol::PAGEFAULT | slots,
            patience,
            ..session::Wishes::default()
        };
        let base = session::Session::open(socket, wishes, events).context(if slots == 0 {
            "postcopy needs PAGEFAULT"
        } else {
            "postcopy with slots needs PAGEFAULT and CONFIGURE_MEM_SLOTS"
        })?;
        Ok(Self { base })
    }

    /// POSTCOPY_ADVISE: the back-end's userfaultfd.
    pub fn advise(&self) -> Result<Uffd> {
        let reply = self.wire.ask(msg::POSTCOPY_ADVISE, &[]).context("POSTCOPY_ADVISE")?;
        ensure!(reply.payload.is_empty(), "ADVISE was answered with {} bytes", reply.payload.len());
        let mut fds = reply.fds.into_iter();
        match (fds.next(), fds.next()) {
            (Some(fd), None) => Ok(Uffd::received(fd)?),
            _ => bail!("ADVISE must be answered with one userfaultfd"),
        }
    }

    /// POSTCOPY_LISTEN, and what QEMU sends between that and the memory table.
    pub fn listen(&self) -> Result<()> {
        self.answered(msg::POSTCOPY_LISTEN).context("POSTCOPY_LISTEN")?;
        self.begin()
    }

    /// A message that has no payload and is always answered with 0.
    fn answered(&self, request: u32) -> Result<()> {
        let answer = self.wire.order(request, &[], &[])?;
        ensure!(answer == 0, "answered with {answer}");
        Ok(())
    }

    /// The memory table, or its slots, first two steps: the back-end says where it has mapped the memory. Nothing may
    /// touch it before [`Self::acknowledge_memory`].
    pub fn send_memory(&self, guest: &Guest, uffd: Uffd) -> Result<Client> {
        let slots = if self.has(protocol::CONFIGURE_MEM_SLOTS) {
            self.add_slots(guest)?
        } else {
            vec![Slot { at: 0, len: guest.map.len(), base: self.send_table(guest)? }]
        };
        let page = guest.layout.page;
        for slot in &slots {
            let base = slot.base;
            ensure!(base % page == 0 && base != 0, "the back-end's address {base:#x} is no page's");
        }
        Ok(Client { uffd, slots, page })
    }

    /// Rings and buffers in a slot each.
    fn add_slots(&self, guest: &Guest) -> Result<Vec<Slot>> {
        let first = guest.layout.first_buffer();
        let pieces = [(0, first), (first, guest.map.len() - first)];
        let mut slots = Vec::new();
        for (at, len) in pieces {
            let request = mem_reg([at, len, guest.map.address() + at, at]);
            self.wire.tell(msg::ADD_MEM_REG, &request, &[guest.file.as_raw_fd()])?;
            let reply = self.wire.reply_to(msg::ADD_MEM_REG).context("a slot's answer")?;
            slots.push(Slot { at, len, base: mapped_at(&request, &reply.payload)? });
        }
        Ok(slots)
    }

    /// Returns the back-end's address of the memory.
    fn send_table(&self, guest: &Guest) -> Result<u64> {
        let ours = [0, guest.map.len(), guest.map.address(), 0];
        let request = mem_table(&[ours]);
        self.wire.tell(msg::SET_MEM_TABLE, &request, &[guest.file.as_raw_fd()])?;
        let reply = self.wire.reply_to(msg::SET_MEM_TABLE).context("the table's answer")?;
        mapped_at(&request, &reply.payload)
    }

    /// The last step: from here on the back-end may fault. QEMU sends 8 bytes, not an empty message, and one message
    /// for all slots.
    pub fn acknowledge_memory(&self) -> Result<()> {
        let slots = self.has(protocol::CONFIGURE_MEM_SLOTS);
        let request = if slots { msg::ADD_MEM_REG } else { msg::SET_MEM_TABLE };
        Ok(self.wire.tell(request, &0u64.to_ne_bytes(), &[])?)
    }

    /// The memory table of a machine that has all its memory.
    pub fn set_whole_table(&self, guest: &Guest) -> Result<()> {
        self.set_table(&guest.file, guest.map.len(), guest.map.address())
    }

    /// All rings, where the source left them.
    pub fn start_rings(&self, guest: &Guest, events: &[Events; RINGS]) -> Result<()> {
        for (ring, events) in events.iter().enumerate() {
            self.start_ring(ring, &guest.layout.ring(ring), BASE.into(), guest.map.address(), events)?;
        }
        Ok(())
    }

    /// POSTCOPY_END: all pages are here.
    pub fn end(&self) -> Result<()> {
        self.answered(msg::POSTCOPY_END).context("POSTCOPY_END")
    }
}

/// The back-end's address in its answer to a table of one region, or to a slot; nothing else may differ.
fn mapped_at(request: &[u8], answer: &[u8]) -> Result<u64> {
    ensure!(answer.len() == request.len(), "an answer of {} bytes", answer.len());
    // Header of 8, guest address, size, then the user address, which is the back-end's now.
    let place = 8 + 16..8 + 24;
    let mut expected = request.to_vec();
    expected[place.clone()].copy_from_slice(&answer[place.clone()]);
    ensure!(answer == expected, "another table came back: {answer:x?}");
    Ok(u64::from_ne_bytes(answer[place].try_into().expect("eight bytes")))
}
