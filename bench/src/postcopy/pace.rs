//! A fixed rate of packets: how many are due, and what is lost if they find no room. Pure: time goes in.
//!
//! Packets go in small groups, one each [`TICK_NS`]. A guest that has no room drops what is due: *lost*. A sender that comes
//! late itself must not count that against the back-end: what exceeds [`GROUPS_AT_ONCE`] is *skipped*, as if it had never
//! been due.
#![forbid(unsafe_code)]

/// From one group to the next.
pub const TICK_NS: u64 = 64_000;
/// So many groups are sent at once, when the sender comes late.
const GROUPS_AT_ONCE: u64 = 2;

/// What to do now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// Packets to send.
    pub send: u64,
    /// Packets that find no room.
    pub lost: u64,
    /// Packets that this program was too late for.
    pub skipped: u64,
}

/// A rate since a moment.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    per_second: u64,
    start_ns: u64,
    accounted: u64,
}

impl Pace {
    /// From now on.
    pub fn new(per_second: u64, now_ns: u64) -> Self {
        Self { per_second, start_ns: now_ns, accounted: 0 }
    }

    /// What is due now, where there is room for `room` packets.
    pub fn due(&mut self, now_ns: u64, room: u64) -> Due {
        let passed = u128::from(now_ns.saturating_sub(self.start_ns));
        let all = (passed * u128::from(self.per_second) / 1_000_000_000) as u64;
        let due = all.saturating_sub(self.accounted);
        self.accounted += due;
        let most = (GROUPS_AT_ONCE * TICK_NS * self.per_second / 1_000_000_000).max(1);
        let now = due.min(most);
        let send = now.min(room);
        Due { send, lost: now - send, skipped: due - now }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_has_as_many_packets_as_it_should() {
        let mut pace = Pace::new(500_000, 7);
        let sent: u64 = (1..=15_625).map(|tick| pace.due(7 + tick * TICK_NS, 256).send).sum();
        assert_eq!(sent, 500_000);
    }

    #[test]
    fn no_room_is_loss_and_lateness_is_not() {
        let mut pace = Pace::new(500_000, 0);
        assert_eq!(pace.due(TICK_NS, 256), Due { send: 32, lost: 0, skipped: 0 });
        assert_eq!(pace.due(2 * TICK_NS, 10), Due { send: 10, lost: 22, skipped: 0 });
        assert_eq!(pace.due(3 * TICK_NS, 0), Due { send: 0, lost: 32, skipped: 0 });
        assert_eq!(pace.due(13 * TICK_NS, 256), Due { send: 64, lost: 0, skipped: 256 });
        assert_eq!(pace.due(13 * TICK_NS, 256), Due::default());
    }
}
