//! Some of a pair's lanes: a bit for each, there is one for a NIC queue at most.
#![forbid(unsafe_code)]

use ebpf_common::xdp::QUEUES_MAX;

/// Lanes that are still to be seen to.
#[derive(Clone, Copy, Debug, Default)]
pub struct LaneSet(u64);

const _: () = assert!(QUEUES_MAX <= u64::BITS, "a bit for each lane");

impl LaneSet {
    /// Adds a lane.
    #[inline]
    pub fn add(&mut self, lane: usize) {
        self.0 |= 1u64.wrapping_shl(lane as u32);
    }

    /// Takes the first lane out.
    #[inline]
    pub fn take(&mut self) -> Option<usize> {
        let lane = self.0.trailing_zeros();
        self.0 &= self.0.checked_sub(1)?;
        Some(lane as usize)
    }

    /// Whether none is left.
    #[inline]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_lane_comes_out_once() {
        let mut lanes = LaneSet::default();
        assert!(lanes.is_empty() && lanes.take().is_none());
        [63, 0, 5, 5].into_iter().for_each(|lane| lanes.add(lane));
        assert_eq!([(); 3].map(|()| lanes.take()), [Some(0), Some(5), Some(63)]);
        assert!(lanes.is_empty() && lanes.take().is_none());
    }
}
