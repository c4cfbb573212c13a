//! QEMU's messages on the destination of a postcopy migration, in QEMU's order
//! (vhost-user: Migrating backend state; POSTCOPY messages).
#![forbid(unsafe_code)]

use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::rawfront::{Wire, mem_reg, mem_table, msg, protocol, state, virtio, vring_addr};

use super::deliver::{Client, Slot};
use super::driver::Events;
use super::guest::{BASE, Guest};
use super::layout::RINGS;
use super::ring::Place;
use super::uffd::Uffd;

/// How long a back-end may take for an answer that needs no page. A blocked one takes a burst of pages.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a front-end wants of a back-end beyond what every one has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wishes {
    /// Virtio features.
    pub features: u64,
    /// Memory is told slot by slot (CONFIGURE_MEM_SLOTS), or not at all.
    pub slots: bool,
}

/// A control connection with its negotiated state.
#[derive(Debug)]
pub struct Session {
    wire: Wire,
    features: u64,
    protocol: u64,
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
        let mut wire =
            Wire::connect(socket).with_context(|| format!("connecting to {}", socket.display()))?;
        wire.patience = patience;
        let offered = wire.ask(msg::GET_FEATURES, &[])?.u64()?;
        ensure!(offered & virtio::PROTOCOL_FEATURES != 0, "the back-end has no protocol features");
        ensure!(offered & virtio::VERSION_1 != 0, "the back-end does not offer VERSION_1");
        let features = offered & (wishes.features | virtio::PROTOCOL_FEATURES | virtio::VERSION_1);
        let offered = wire.ask(msg::GET_PROTOCOL_FEATURES, &[])?.u64()?;
        ensure!(
            offered & protocol::PAGEFAULT != 0,
            "the back-end does not offer PAGEFAULT (offers {offered:#x}): no postcopy"
        );
        let slots = if wishes.slots { protocol::CONFIGURE_MEM_SLOTS } else { 0 };
        ensure!(offered & slots == slots, "the back-end does not offer CONFIGURE_MEM_SLOTS");
        let wanted = protocol::MQ | protocol::REPLY_ACK | protocol::PAGEFAULT | protocol::STATUS | slots;
        let protocol = offered & wanted;
        wire.tell(msg::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[])?;
        let it = Self { wire, features, protocol };
        if it.has(protocol::MQ) {
            it.wire.ask(msg::GET_QUEUE_NUM, &[])?.u64()?;
        }
        it.wire.tell(msg::SET_OWNER, &[], &[])?;
        it.wire.ask(msg::GET_FEATURES, &[])?;
        for (i, ring) in events.iter().enumerate() {
            it.wire.tell(msg::SET_VRING_CALL, &(i as u64).to_ne_bytes(), &[ring.call.as_raw_fd()])?;
            it.wire.tell(msg::SET_VRING_ERR, &(i as u64).to_ne_bytes(), &[ring.err.as_raw_fd()])?;
        }
        it.enable_rings()?;
        Ok(it)
    }

    fn has(&self, feature: u64) -> bool {
        self.protocol & feature != 0
    }

    fn order(&self, request: u32, payload: &[u8], fds: &[RawFd]) -> Result<()> {
        if self.has(protocol::REPLY_ACK) {
            let ack = self.wire.order(request, payload, fds).with_context(|| format!("message {request}"))?;
            ensure!(ack == 0, "message {request} was refused ({ack})");
        } else {
            self.wire.tell(request, payload, fds)?;
        }
        Ok(())
    }

    fn enable_rings(&self) -> Result<()> {
        (0..RINGS as u32).try_for_each(|i| self.order(msg::SET_VRING_ENABLE, &state(i, 1), &[]))
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

    /// What QEMU sends before the memory table.
    pub fn begin(&self) -> Result<()> {
        self.enable_rings()?;
        self.wire.tell(msg::SET_FEATURES, &self.features.to_ne_bytes(), &[])?;
        self.set_status(0x8)
    }

    /// A message that has no payload and is always answered with 0.
    fn answered(&self, request: u32) -> Result<()> {
        let answer = self.wire.order(request, &[], &[])?;
        ensure!(answer == 0, "answered with {answer}");
        Ok(())
    }

    fn set_status(&self, status: u64) -> Result<()> {
        if self.has(protocol::STATUS) {
            self.wire.ask(msg::GET_STATUS, &[])?.u64()?;
            self.wire.tell(msg::SET_STATUS, &status.to_ne_bytes(), &[])?;
        }
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
    pub fn set_table(&self, guest: &Guest) -> Result<()> {
        let request = mem_table(&[[0, guest.map.len(), guest.map.address(), 0]]);
        self.wire.tell(msg::SET_MEM_TABLE, &request, &[guest.file.as_raw_fd()])?;
        self.ping().map(drop)
    }

    /// Configures and starts one ring.
    pub fn start_ring(
        &self,
        ring: usize,
        place: &Place,
        base: u16,
        user: u64,
        events: &Events,
    ) -> Result<()> {
        let i = ring as u32;
        let addresses = [user + place.desc, user + place.used, user + place.avail, 0];
        self.wire.tell(msg::SET_VRING_NUM, &state(i, place.size.into()), &[])?;
        self.wire.tell(msg::SET_VRING_BASE, &state(i, base.into()), &[])?;
        self.wire.tell(msg::SET_VRING_ADDR, &vring_addr(i, 0, addresses), &[])?;
        self.wire.tell(msg::SET_VRING_KICK, &u64::from(i).to_ne_bytes(), &[events.kick.as_raw_fd()])?;
        self.wire.tell(msg::SET_VRING_CALL, &u64::from(i).to_ne_bytes(), &[events.call.as_raw_fd()])?;
        Ok(())
    }

    /// All rings, where the source left them.
    pub fn start_rings(&self, guest: &Guest, events: &[Events; RINGS]) -> Result<()> {
        for (ring, events) in events.iter().enumerate() {
            self.start_ring(ring, &guest.layout.ring(ring), BASE, guest.map.address(), events)?;
        }
        Ok(())
    }

    /// DRIVER_OK. It waits for an answer, which a back-end may give only when its rings run.
    pub fn driver_ok(&self) -> Result<()> {
        self.set_status(0xf)
    }

    /// A message that only asks: how long until its answer.
    pub fn ping(&self) -> Result<Duration> {
        let start = std::time::Instant::now();
        self.wire.ask(msg::GET_FEATURES, &[]).context("GET_FEATURES")?.u64()?;
        Ok(start.elapsed())
    }

    /// GET_VRING_BASE: stops a ring; how long that took, and where it stopped.
    pub fn stop_ring(&self, ring: usize) -> Result<(Duration, u16)> {
        let start = std::time::Instant::now();
        let reply = self.wire.ask(msg::GET_VRING_BASE, &state(ring as u32, 0)).context("GET_VRING_BASE")?;
        let took = start.elapsed();
        let payload = reply.payload.as_slice();
        ensure!(payload.len() == 8, "GET_VRING_BASE was answered with {payload:?}");
        ensure!(payload[..4] == (ring as u32).to_ne_bytes(), "the answer is for another ring: {payload:?}");
        Ok((took, u16::from_ne_bytes([payload[4], payload[5]])))
    }

    /// From now on, no answer within this time is an error.
    pub fn set_patience(&mut self, patience: Duration) {
        self.wire.patience = patience;
    }

    /// POSTCOPY_END: all pages are here.
    pub fn end(&self) -> Result<()> {
        self.answered(msg::POSTCOPY_END).context("POSTCOPY_END")
    }

    /// The guest resets the device.
    pub fn reset_status(&self) -> Result<()> {
        if self.has(protocol::STATUS) {
            self.wire.tell(msg::SET_STATUS, &0u64.to_ne_bytes(), &[])?;
        }
        Ok(())
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
