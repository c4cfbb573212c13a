//! Which sockets a port has on which NIC queues, and which pairs must be served by one worker. Pure arithmetic.
//!
//! With `K` queue pairs of a port, `Q` NIC queues and `d = gcd(K, Q)`, pair `k` has a socket on each NIC queue `q` with
//! `q ≡ k (mod d)`; each NIC queue then has `K / d` sockets of the port:
//!
//! ```text
//!   K = 4, Q = 2 (d = 2)      K = 1, Q = 2 (d = 1)      K = 2, Q = 4 (d = 2)
//!   q0: pairs 0, 2            q0: pair 0                q0: 0   q2: 0
//!   q1: pairs 1, 3            q1: pair 0                q1: 1   q3: 1
//! ```
//! FILL and COMPLETION belong to a NIC queue, so all its pairs are served by one worker. `G`, the greatest common divisor
//! of `Q` and every port's `K`, divides each `d`: pairs of one NIC queue are equal modulo `G`, and so make a group.
#![forbid(unsafe_code)]

use std::ops::Range;

/// Greatest common divisor; of 0 and `n`, `n`.
pub fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Sockets of one interface's ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// NIC queues that are used, from 0.
    pub queues: u32,
    /// Queue pairs of each port.
    pub pairs: Vec<u32>,
}

impl Topology {
    fn divisor(&self, port: usize) -> u32 {
        gcd(self.pairs[port], self.queues)
    }

    /// NIC queues on which a pair has a socket.
    pub fn queues_of(&self, port: usize, pair: u32) -> impl Iterator<Item = u32> + use<> {
        let step = self.divisor(port);
        (pair % step..self.queues).step_by(step as usize)
    }

    /// The NIC queue on which a pair sends: its pairs are spread over those they receive from.
    pub fn sends_on(&self, port: usize, pair: u32) -> u32 {
        let step = self.divisor(port);
        pair % step + step * ((pair / step) % (self.queues / step))
    }

    /// Pairs of a port with a socket on a NIC queue, in the order of their slots.
    pub fn pairs_on(&self, port: usize, queue: u32) -> impl Iterator<Item = u32> + use<> {
        let step = self.divisor(port);
        (queue % step..self.pairs[port]).step_by(step as usize)
    }

    /// The slots of a port's sockets: the same on each NIC queue. Slot 0 is the flood socket's.
    pub fn slots_of(&self, port: usize) -> Range<u32> {
        let count = |port: usize| self.pairs[port] / self.divisor(port);
        let first = 1 + (0..port).map(count).sum::<u32>();
        first..first + count(port)
    }

    /// Slots of a NIC queue, that of the flood socket included.
    pub fn slots(&self) -> u32 {
        self.pairs.len().checked_sub(1).map_or(1, |last| self.slots_of(last).end)
    }

    /// Groups of pairs that different workers may serve.
    pub fn groups(&self) -> u32 {
        self.pairs.iter().fold(self.queues, |so_far, pairs| gcd(so_far, *pairs))
    }

    /// The group of a pair, of any port; also that of a NIC queue, by its number.
    pub fn group_of(&self, pair: u32) -> u32 {
        pair % self.groups()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_pair_takes_part_in_every_queue() {
        let topology = Topology { queues: 4, pairs: vec![1, 2, 4, 8] };
        assert_eq!(topology.queues_of(0, 0).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(topology.queues_of(1, 1).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(topology.queues_of(2, 3).collect::<Vec<_>>(), [3]);
        assert_eq!(topology.pairs_on(3, 1).collect::<Vec<_>>(), [1, 5]);
        assert_eq!((topology.slots_of(0), topology.slots_of(3)), (1..2, 4..6));
        assert_eq!((topology.slots(), topology.groups()), (6, 1));
        assert_eq!(Topology { queues: 4, pairs: vec![2, 4] }.groups(), 2);
    }

    proptest! {
        #[test]
        fn pairs_and_queues_agree(queues in 1u32..17, pairs in prop::collection::vec(1u32..17, 1..6)) {
            let topology = Topology { queues, pairs: pairs.clone() };
            let mut next = 1;
            for (port, pairs) in pairs.iter().enumerate() {
                let slots = topology.slots_of(port);
                prop_assert_eq!(slots.start, next);
                next = slots.end;
                for queue in 0..queues {
                    let on: Vec<u32> = topology.pairs_on(port, queue).collect();
                    prop_assert_eq!(on.len(), slots.len());
                    for pair in on {
                        prop_assert!(pair < *pairs);
                        prop_assert!(topology.queues_of(port, pair).any(|q| q == queue));
                        // All that share a NIC queue are in its group.
                        prop_assert_eq!(topology.group_of(pair), topology.group_of(queue));
                    }
                }
                for pair in 0..*pairs {
                    let mine: Vec<u32> = topology.queues_of(port, pair).collect();
                    prop_assert!(!mine.is_empty() && mine.contains(&topology.sends_on(port, pair)));
                    prop_assert!(mine.iter().all(|q| topology.pairs_on(port, *q).any(|p| p == pair)));
                }
            }
            prop_assert_eq!(next, topology.slots());
        }
    }
}
