//! A virtual machine arrives at a port: its memory is told and acknowledged, its pages come as the link brings them.
#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use lab::rawfront::virtio;

use super::PAGE;
use super::deliver::{Client, Deliverer};
use super::findings::{Findings, Wrong};
use super::guest::Guest;
use super::layout::{RINGS, RX, TX};
use super::ring::Ring;
use super::run::Case;
use super::schedule::{Asker, Link, Schedule};
use super::session::{Session, Wishes};
use crate::packet::HEADER;
use crate::session::Events;

/// How long a back-end is watched for touching memory before it may.
const BEFORE_ACK: Duration = Duration::from_millis(20);

/// The machine, its rings not started yet.
pub struct Arrival {
    /// Its memory.
    pub guest: Arc<Guest>,
    /// Its eventfds.
    pub events: Arc<[Events; RINGS]>,
    /// The driver's side of its rings, as the source left them.
    pub rings: [Ring; RINGS],
    /// Its control connection.
    pub session: Session,
    /// Who brings its pages.
    pub deliverer: Deliverer,
}

impl Arrival {
    /// Brings a machine to the port at `socket`, over this link; the rest is as in `case`.
    pub fn at(socket: &Path, case: &Case, link: Link, findings: &Findings) -> Result<Self> {
        let layout = case.memory.layout(case.ring_size, case.buffers);
        let guest = Arc::new(Guest::new(case.memory, layout, case.frame)?);
        let posted = u64::from(case.ring_size);
        let send = if case.direction.sends() { posted } else { 0 };
        let receive = if case.direction.receives() { posted } else { 0 };
        let rings = [
            guest.source_ring(RX, receive, PAGE as u32),
            guest.source_ring(TX, send, (HEADER + case.frame) as u32),
        ];
        let mut schedule = Schedule::new(link, layout.pages(), layout.page);
        if case.rings_arrived {
            for page in layout.ring_pages() {
                guest.place(page)?;
                schedule.preset(page);
            }
        }
        let events = Arc::new([Events::new()?, Events::new()?]);
        let features = if case.mergeable { virtio::MRG_RXBUF } else { 0 };
        let session = Session::open(socket, Wishes { features, slots: case.slots }, &events)?;
        let uffd = session.advise()?;
        session.listen()?;
        let client = session.send_memory(&guest, uffd)?;
        check_untouched(&guest, &client, &mut schedule, findings)?;
        let deliverer = Deliverer::start(Arc::clone(&guest), client, schedule, findings.clone())?;
        session.acknowledge_memory()?;
        Ok(Self { guest, events, rings, session, deliverer })
    }
}

/// Before the acknowledgement, no fault may have been raised and no page filled.
fn check_untouched(
    guest: &Guest,
    client: &Client,
    schedule: &mut Schedule,
    findings: &Findings,
) -> Result<()> {
    std::thread::sleep(BEFORE_ACK);
    client.uffd.events(|event| {
        findings.add(Wrong::TouchedBeforeAck, || format!("{event:x?}"));
        // It must be answered all the same: nobody else will see it.
        if let Some(page) = client.page(event) {
            schedule.fault(page, Asker::BackEnd, 0);
        }
    })?;
    guest.check_holes(|page| schedule.is_here(page), Wrong::TouchedBeforeAck, findings)
}
