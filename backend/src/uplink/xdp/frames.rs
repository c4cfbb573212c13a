//! Who has which frame of a NIC queue's memory. Pure arithmetic, no memory.
//!
//! ```text
//!   frame  0 ………………………………… receive ………………………………… │ socket 1's │ socket 2's │ …
//!          FILL ─► kernel ─► an RX ring ─► us ─► FILL   free ─► TX ring ─► kernel ─► COMPLETION ─► free
//! ```
//! Receive frames go round between FILL and the sockets' RX rings. There are as many as all RX rings can hold, with what
//! their readers have at hand, and a reserve on top: so FILL never runs dry, however many sockets stand still. Each
//! sending socket has frames of its own: one that is not served by the device cannot use up what another needs.
#![forbid(unsafe_code)]

/// How many frames there are, and whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quotas {
    /// Frames that are in FILL even if every socket holds all it can.
    pub reserve: u32,
    /// Sockets that receive.
    pub receivers: u32,
    /// Frames that each of these can hold: its RX ring and what its reader has at hand.
    pub per_receiver: u32,
    /// Sockets that send.
    pub senders: u32,
    /// Frames of each of these.
    pub per_sender: u32,
}

impl Quotas {
    /// Frames for receiving.
    pub fn receive(&self) -> u32 {
        self.reserve + self.receivers * self.per_receiver
    }

    /// Frames for sending.
    pub fn send(&self) -> u32 {
        self.senders * self.per_sender
    }

    /// All frames.
    pub fn total(&self) -> u32 {
        self.receive() + self.send()
    }
}

/// The free frames for sending, by socket. Receive frames need no account: the rings hold them.
#[derive(Debug)]
pub struct Frames {
    quotas: Quotas,
    free: Vec<Vec<u32>>,
}

impl Frames {
    /// All free.
    pub fn new(quotas: Quotas) -> Self {
        let first = |sender: u32| quotas.receive() + sender * quotas.per_sender;
        // The lowest is taken first: what was used last is still in the cache.
        let free = (0..quotas.senders).map(|s| (first(s)..first(s + 1)).rev().collect()).collect();
        Self { quotas, free }
    }

    /// Moves up to `want` free frames of a sender to `to`.
    #[inline]
    pub fn take(&mut self, sender: u32, want: usize, to: &mut Vec<u32>) {
        let Some(free) = self.free.get_mut(sender as usize) else { return };
        let rest = free.len() - want.min(free.len());
        to.extend(free.drain(rest..));
    }

    /// Free frames of a sender.
    #[inline]
    pub fn free(&self, sender: u32) -> usize {
        self.free.get(sender as usize).map_or(0, Vec::len)
    }

    /// A frame was sent. False if it is no frame for sending, or free already: a mistake of ours or the kernel's.
    #[inline]
    pub fn give_back(&mut self, frame: u32) -> bool {
        let Some(index) = frame.checked_sub(self.quotas.receive()) else { return false };
        let sender = index / self.quotas.per_sender.max(1);
        match self.free.get_mut(sender as usize) {
            // More than there are cannot be free.
            Some(free) if free.len() < self.quotas.per_sender as usize => {
                free.push(frame);
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const QUOTAS: Quotas = Quotas { reserve: 4, receivers: 3, per_receiver: 5, senders: 3, per_sender: 7 };

    #[test]
    fn each_sender_has_its_own() {
        let mut frames = Frames::new(QUOTAS);
        let mut all = BTreeSet::new();
        for sender in 0..3 {
            let mut got = Vec::new();
            frames.take(sender, 100, &mut got);
            assert_eq!(got.len(), 7);
            assert_eq!(frames.free(sender), 0);
            all.extend(got);
        }
        assert_eq!(all, (QUOTAS.receive()..QUOTAS.total()).collect());
        assert!(!frames.give_back(0) && !frames.give_back(QUOTAS.receive() - 1), "frames for receiving");
        assert!(!frames.give_back(QUOTAS.total()), "no frame at all");
    }

    proptest! {
        /// Whatever is taken and given back in any order, no frame is lost, doubled or another's.
        #[test]
        fn no_frame_is_lost(ops in prop::collection::vec((0u32..3, 0usize..9, any::<bool>(), any::<u8>()), 0..200)) {
            let mut frames = Frames::new(QUOTAS);
            let mut out: Vec<Vec<u32>> = vec![Vec::new(); 3];
            for (sender, count, take, pick) in ops {
                let held = &mut out[sender as usize];
                if take {
                    frames.take(sender, count, held);
                } else {
                    for _ in 0..count.min(held.len()) {
                        let frame = held.swap_remove(pick as usize % held.len());
                        prop_assert!(frames.give_back(frame));
                    }
                }
                for (sender, held) in out.iter().enumerate() {
                    prop_assert_eq!(held.len() + frames.free(sender as u32), 7);
                    let first = QUOTAS.receive() + 7 * sender as u32;
                    prop_assert!(held.iter().all(|frame| (first..first + 7).contains(frame)));
                    prop_assert_eq!(held.iter().collect::<BTreeSet<_>>().len(), held.len());
                }
            }
        }
    }
}
