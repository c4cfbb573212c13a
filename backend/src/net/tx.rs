//! The transmit path: frames from the guest's ring to the uplink.
//!
//! The header is our own checked copy, since the guest can change its own while we look; the frame itself is
//! not copied: its pages are the iovecs. Frames complete in ring order.
#![forbid(unsafe_code)]

use super::counters::PairCounters;
use super::header::VirtioNetHdr;
use crate::memory::{AccessError, GuestMemory, IoVecs, MAX_IOVECS, MissingRange};
use crate::uplink::{SendError, UplinkQueue};
use crate::virtq::{Chain, PopError, QueueError, SplitQueue};

/// Shortest frame taken from a guest: an Ethernet header, bytes.
pub const FRAME_MIN: u64 = 14;
/// Longest frame taken from a guest: a 64 KiB packet with Ethernet header and two VLAN tags, bytes.
pub const FRAME_MAX: u64 = 65_535 + 14 + 8;
/// Bytes of frames after which a burst ends: large frames must not make other queues wait.
pub const BURST_BYTES: u64 = 512 << 10;
/// Longest virtio-net header, bytes.
pub const HEADER_MAX: usize = 12;

/// Why a run over a ring ended.
#[derive(Debug)]
pub enum End {
    /// The ring is empty (transmit), or no frame waits (receive).
    Idle,
    /// The budget is used up: there may be more.
    Budget,
    /// No room at the uplink: go on when it is writable.
    UplinkFull,
    /// No buffers for a frame (receive): go on when the guest kicks.
    NoBuffers,
    /// Guest memory is missing: go on when it has arrived.
    Parked(MissingRange),
    /// The uplink cannot receive: the text says why.
    UplinkDown(String),
    /// The ring cannot be used any more.
    Broken(QueueError),
    /// Guest memory is gone.
    MemoryFault,
}

/// What the driver has acknowledged, as far as the transmit path cares.
#[derive(Clone, Copy, Debug)]
pub struct TxSettings {
    /// Acknowledged virtio features.
    pub features: u64,
    /// Bytes of virtio-net header before each frame.
    pub header_len: usize,
    /// True if the ring is enabled; frames on a disabled ring are discarded (vhost-user: Ring states).
    pub enabled: bool,
}

/// Moves up to `budget` frames from the ring to the uplink. Used entries are pushed but not published: the
/// caller publishes and notifies once for the burst. Returns how many chains were used and why it ended.
pub fn run(
    ring: &mut SplitQueue,
    memory: &GuestMemory,
    uplink: &mut dyn UplinkQueue,
    chain: &mut Chain,
    settings: TxSettings,
    counters: &PairCounters,
    budget: u32,
) -> (u32, End) {
    let mut used = 0;
    let (mut packets, mut bytes) = (0, 0);
    let end = loop {
        if used >= budget || bytes >= BURST_BYTES {
            break End::Budget;
        }
        match ring.pop(memory, chain) {
            Ok(true) => {}
            Ok(false) => break End::Idle,
            Err(PopError::Bad { head, why }) => {
                tracing::debug!(head, %why, "transmit chain refused");
                counters.tx_bad_chains.add(1);
                ring.push(head, 0);
                used += 1;
                continue;
            }
            Err(PopError::Missing(range)) => break End::Parked(range),
            Err(PopError::Broken(error)) => break End::Broken(error),
        }
        if !settings.enabled {
            counters.tx_discarded_disabled.add(1);
            ring.push(chain.head(), 0);
            used += 1;
            continue;
        }
        match send(memory, uplink, chain, settings) {
            Ok(len) => {
                packets += 1;
                bytes += len;
            }
            Err(Refusal::Header) => counters.tx_bad_header.add(1),
            Err(Refusal::Length) => counters.tx_bad_length.add(1),
            Err(Refusal::Memory(AccessError::Missing(range))) => {
                ring.unpop(1);
                break End::Parked(range);
            }
            Err(Refusal::Memory(_)) => counters.tx_bad_chains.add(1),
            Err(Refusal::Uplink(SendError::Full)) => {
                ring.unpop(1);
                break End::UplinkFull;
            }
            Err(Refusal::Uplink(SendError::MemoryFault)) => {
                ring.unpop(1);
                break End::MemoryFault;
            }
            Err(Refusal::Uplink(SendError::Rejected(error))) => {
                tracing::debug!(%error, "frame refused by the uplink");
                counters.tx_rejected.add(1);
            }
            Err(Refusal::Uplink(SendError::Down(_))) => counters.tx_dropped_down.add(1),
        }
        ring.push(chain.head(), 0);
        used += 1;
    };
    counters.tx_packets.add(packets);
    counters.tx_bytes.add(bytes);
    (used, end)
}

enum Refusal {
    Header,
    Length,
    Memory(AccessError),
    Uplink(SendError),
}

impl From<AccessError> for Refusal {
    fn from(error: AccessError) -> Self {
        Self::Memory(error)
    }
}

/// Sends one chain's frame; returns its length in bytes without the header.
#[inline]
fn send(
    memory: &GuestMemory,
    uplink: &mut dyn UplinkQueue,
    chain: &Chain,
    settings: TxSettings,
) -> Result<u64, Refusal> {
    let header_len = settings.header_len;
    let frame_len = chain.readable_len().wrapping_sub(header_len as u64);
    // A chain shorter than the header wraps round to a huge length.
    if !(FRAME_MIN..=FRAME_MAX).contains(&frame_len) {
        return Err(Refusal::Length);
    }
    // ANY_LAYOUT: the header may share a descriptor with the frame, or be spread over several.
    let mut header = [0; HEADER_MAX];
    let mut segments = chain.readable().iter();
    let mut have = 0;
    let mut rest = (0, 0);
    while have < header_len {
        let Some(segment) = segments.next() else { return Err(Refusal::Length) };
        let take = (header_len - have).min(segment.len as usize);
        memory.read(segment.gpa, &mut header[have..have + take])?;
        have += take;
        rest = (segment.gpa + take as u64, segment.len - take as u32);
    }
    let parsed = VirtioNetHdr::parse(&header[..header_len]);
    if parsed.check(frame_len, settings.features).is_err() {
        return Err(Refusal::Header);
    }
    // num_buffers has no meaning on transmit (VIRTIO 1.3 §5.1.6.2): what the guest wrote there stays here.
    header[10..].fill(0);
    let mut iovecs = IoVecs::new();
    iovecs.push_own(&header[..header_len]);
    if rest.1 > 0 {
        memory.push_iovecs(rest.0, rest.1, &mut iovecs)?;
    }
    for segment in segments {
        memory.push_iovecs(segment.gpa, segment.len, &mut iovecs)?;
    }
    // More than a call takes, the header included: the kernel would refuse it (EINVAL).
    if iovecs.len() > MAX_IOVECS {
        return Err(Refusal::Memory(AccessError::Full));
    }
    uplink.send(iovecs.as_slice()).map_err(Refusal::Uplink)?;
    Ok(frame_len)
}
