//! Counters of one queue pair. Written by the worker that serves the pair, read by anyone.
//!
//! One writer, so a plain load and store pair is enough: no locked instruction per packet.
#![forbid(unsafe_code)]

use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};

/// One counter with a single writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the worker that owns the pair calls this.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }
    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters of one queue pair; `rx` is towards the guest, `tx` from it.
        #[derive(Debug, Default)]
        pub struct PairCounters { $($(#[$doc])* pub $name: Counter,)* }

        /// The values of [`PairCounters`] at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct PairCounts { $($(#[$doc])* pub $name: u64,)* }

        impl PairCounters {
            /// The values now.
            pub fn read(&self) -> PairCounts {
                PairCounts { $($name: self.$name.get(),)* }
            }
        }

        impl PairCounts {
            /// Adds another pair's values.
            pub fn add(&mut self, other: &PairCounts) {
                $(self.$name += other.$name;)*
            }
            /// Each counter with its name, in the order of their definition.
            pub fn each(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

counters! {
    /// Frames given to the guest.
    rx_packets,
    /// Bytes of those frames, without the virtio-net header.
    rx_bytes,
    /// Frames dropped because the guest's buffers were too small for them.
    rx_dropped_too_long,
    /// Frames dropped because the ring stopped while they waited for buffers.
    rx_dropped_stopped,
    /// Frames of the peer dropped because the receive ring did not run, or was not enabled.
    rx_dropped_no_ring,
    /// Frames of the peer dropped because the guest had given no buffers for a while.
    rx_dropped_no_buffers,
    /// Frames of the peer dropped because they were longer than the MTU.
    rx_dropped_mtu,
    /// Frames of the peer dropped because the guest takes no such offload, and it could not be done in software.
    rx_dropped_offload,
    /// Frames of the peer whose checksum was filled in, or that were cut into segments, in software.
    rx_software_offload,
    /// Frames dropped because the inbox was full: copies of broadcasts, and what local ports sent.
    rx_dropped_inbox,
    /// Frames that came by the inbox; they count as received, too.
    rx_inbox,
    /// Chains refused on the receive ring: malformed or too small for the header.
    rx_bad_chains,
    /// Frames taken from the guest and sent.
    tx_packets,
    /// Bytes of those frames, without the virtio-net header.
    tx_bytes,
    /// Frames dropped: chain malformed.
    tx_bad_chains,
    /// Frames dropped: virtio-net header refused (CVE-2024-11614 and its like).
    tx_bad_header,
    /// Frames dropped: shorter than an Ethernet header or longer than allowed.
    tx_bad_length,
    /// Frames dropped: the uplink refused them.
    tx_rejected,
    /// Frames dropped: the uplink was down.
    tx_dropped_down,
    /// Frames dropped: their source address is not the port's.
    tx_spoofed,
    /// Bursts with a source address that was not learned: another port has it, or there are too many.
    tx_unlearned,
    /// Frames that local ports were given; they count as sent, too.
    tx_local,
    /// Frames discarded on a ring that was started but disabled.
    tx_discarded_disabled,
    /// Notifications from the driver.
    kicks,
    /// Notifications to the driver.
    calls,
    /// Bursts that moved at least one frame.
    bursts,
    /// Times a ring had to wait for missing guest memory.
    parks,
    /// Rings that had to be given up (bad index, bad address).
    rings_broken,
}
