//! A port of a back-end with a queue pair of ours on it: memory, session, rings that run.
#![forbid(unsafe_code)]

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use lab::rawfront::{protocol, virtio};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::lane::{Receiver, Sender};
use crate::driver::{Buffers, Layout, LayoutOptions, RINGS, RX, Ring, RingOptions, TX};
use crate::mapping::{Mapping, PAGE};
use crate::packet::{self, HEADER};
use crate::session::{Events, Session, Wishes};

/// A hugepage, bytes.
const HUGEPAGE: u64 = 2 << 20;
/// Feature bits (VIRTIO 1.3 §6).
const EVENT_IDX: u64 = 1 << 29;
const IN_ORDER: u64 = 1 << 35;

/// What the driver is to be like.
#[derive(Clone, Debug)]
pub struct PortOptions {
    /// Entries of each ring.
    pub ring_size: u16,
    /// Notifications by index, and order.
    pub ring: RingOptions,
    /// Guest memory in hugepages.
    pub hugepages: bool,
    /// Mergeable receive buffers.
    pub mergeable: bool,
    /// More virtio features, taken where they are offered.
    pub features: u64,
    /// Length of frames that are sent, bytes.
    pub frame: usize,
    /// Length of receive buffers, bytes, header included.
    pub receive_len: u32,
}

/// A running queue pair.
pub struct Port<R> {
    /// To the device.
    pub sender: Sender<R>,
    /// From the device.
    pub receiver: Receiver<R>,
    /// Its control connection.
    pub session: Session,
}

impl<R: Ring> Port<R> {
    /// Connects to the back-end at `socket` and starts both rings. All receive buffers are with the device.
    pub fn open(socket: &Path, options: &PortOptions) -> Result<Self> {
        let layout = Layout::new(LayoutOptions {
            ring_size: options.ring_size,
            buffer_len: [options.receive_len, (HEADER + options.frame) as u32],
        });
        let (file, memory) = guest_memory(layout.bytes(), options.hugepages)?;
        let (len, memory) = (memory.len(), Arc::new(memory));
        let places = [layout.ring(RX), layout.ring(TX)];
        let buffers =
            [RX, TX].map(|r| Buffers::new(&memory, layout.buffers(r), layout.stride(r), options.ring_size));

        let events: [Events; RINGS] = [Events::new()?, Events::new()?];
        let mut wishes = Wishes { features: options.features, ..Wishes::default() };
        wishes.protocol |= protocol::MTU;
        wishes.features |= if options.mergeable { virtio::MRG_RXBUF } else { 0 };
        wishes.features_needed |= if options.ring.event_idx { EVENT_IDX } else { 0 };
        wishes.features_needed |= if options.ring.in_order { IN_ORDER } else { 0 };
        wishes.features_needed |= R::FEATURES;
        let session = Session::open(socket, wishes, &events)?;
        let features = session.features();
        session.begin()?;
        session.set_table(&file, len, memory.address()).context("the memory table")?;
        let rings = places.map(|p| R::open(&memory, &p, options.ring));

        let [rx_buffers, tx_buffers] = buffers;
        let [rx_ring, tx_ring] = rings;
        let mut bytes = vec![0; HEADER + options.frame];
        for id in 0..options.ring_size {
            if options.frame > packet::FRAME_MAX {
                packet::build_tso(&mut bytes);
            } else {
                packet::build(id.into(), &mut bytes);
            }
            tx_buffers.write(id, &bytes);
            // Touched once, so that no page is missing later.
            rx_buffers.write(id, &vec![0; rx_buffers.len() as usize]);
        }
        for (i, (place, events)) in places.iter().zip(&events).enumerate() {
            session.start_ring(i, place, R::BASE, memory.address(), events)?;
        }
        session.driver_ok()?;
        let [rx_events, tx_events] = events;
        let sender = Sender::new(tx_ring, tx_buffers, tx_events, options.ring_size, bytes.len() as u32);
        let mergeable = features & virtio::MRG_RXBUF != 0;
        let receiver = Receiver::new(rx_ring, rx_buffers, rx_events, options.ring_size, mergeable)?;
        Ok(Self { sender, receiver, session })
    }

    /// Notifications that the device wanted.
    pub fn kicks(&self) -> u64 {
        self.sender.kicks() + self.receiver.kicks()
    }

    /// Fails if the device has signalled an error, or does not answer any more.
    pub fn check(&self) -> Result<()> {
        let broken = self.sender.errors() + self.receiver.errors();
        ensure!(broken == 0, "the back-end has signalled that a ring is broken");
        self.session.ping().context("the back-end does not answer any more").map(drop)
    }
}

/// New guest memory of at least so many bytes, as a file and mapped.
pub fn guest_memory(len: u64, huge: bool) -> Result<(File, Mapping)> {
    let (flags, page) = if huge {
        (MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB, HUGEPAGE)
    } else {
        (MFdFlags::empty(), PAGE)
    };
    let file: File = memfd_create("guest", flags | MFdFlags::MFD_CLOEXEC).context("guest memory")?.into();
    let len = len.next_multiple_of(page);
    file.set_len(len)?;
    let mapping = Mapping::of_file(&file, len)?;
    Ok((file, mapping))
}
