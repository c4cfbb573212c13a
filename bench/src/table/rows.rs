//! The rows of the table: what is measured, what it is called, what is to be reached. Pure.
#![forbid(unsafe_code)]

use crate::load::{Touch, Way};

/// What a row's numbers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Millions of packets per second.
    Mpps,
    /// Thousands of millions of bytes per second.
    GBs,
    /// Microseconds.
    Micros,
    /// CPUs: time per time.
    Cpus,
    /// KiB.
    KiB,
    /// Instructions per packet.
    Instructions,
    /// A share, 1 is all.
    Share,
}

impl Unit {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mpps => "Mpps",
            Self::GBs => "GB/s",
            Self::Micros => "us",
            Self::Cpus => "CPU",
            Self::KiB => "KiB",
            Self::Instructions => "instr.",
            Self::Share => "share",
        }
    }

    /// Whether more is better.
    pub fn more_is_better(self) -> bool {
        matches!(self, Self::Mpps | Self::GBs | Self::Share)
    }

    /// Digits behind the point.
    pub fn digits(self) -> usize {
        match self {
            Self::KiB | Self::Instructions => 0,
            Self::Cpus => 3,
            Self::Mpps | Self::GBs | Self::Micros | Self::Share => 2,
        }
    }
}

/// What is to be reached.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// Ours against DPDK, above 1 where ours is better.
    Ratio(f64),
    /// Ours against the raw limit.
    OfLimit(f64),
    /// Ours, at most.
    AtMost(f64),
    /// Ours, at least.
    AtLeast(f64),
    /// The row only informs.
    Nothing,
}

/// A row.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// For `--only` and JSON.
    pub id: &'static str,
    /// For people.
    pub title: &'static str,
    /// Unit of its numbers.
    pub unit: Unit,
    /// What is to be reached.
    pub goal: Goal,
    /// Packets were sent and received by our own driver as fast as it can, so that its idle share tells whose limit it is.
    pub paced_by_driver: bool,
}

/// One measurement, which gives a row or several.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Work {
    /// Our driver to a sink, from a source, or both.
    Open {
        /// Direction.
        way: Way,
        /// Ring.
        packed: bool,
        /// Frame length, bytes.
        frame: usize,
        /// What the driver writes.
        touch: Touch,
    },
    /// Our driver, closed loop between two ports.
    Loop {
        /// Ring.
        packed: bool,
        /// Frame length, bytes.
        frame: usize,
        /// From each port.
        in_flight: usize,
    },
    /// testpmd as the front-end: it sends to a sink, or receives from a source.
    TestpmdOpen(Way),
    /// testpmd as the front-end of two ports, so many bursts of 32 in flight from each.
    TestpmdLoop(u32),
    /// TSO frames from one port to another.
    Tso,
    /// Round trips between two ports.
    Latency,
    /// Few packets, and none.
    LowRate,
    /// Many ports in one process.
    Ports,
    /// 64 ports against one.
    Sharing,
}

const fn row(id: &'static str, title: &'static str, unit: Unit, goal: Goal, paced_by_driver: bool) -> Row {
    Row { id, title, unit, goal, paced_by_driver }
}

const fn rate(id: &'static str, title: &'static str, ratio: f64) -> Row {
    row(id, title, Unit::Mpps, Goal::Ratio(ratio), true)
}

/// Packets in flight of a closed loop.
pub const IN_FLIGHT: usize = 128;
/// Frames of a whole MTU, and the shortest.
const SHORT: usize = 64;
const LONG: usize = 1500;

/// Every measurement with its rows, in the table's order.
pub fn all() -> Vec<(Work, Vec<Row>)> {
    let open = |way, packed, frame| Work::Open { way, packed, frame, touch: Touch::None };
    let closed = |packed, frame| Work::Loop { packed, frame, in_flight: IN_FLIGHT };
    let touched = Work::Open { way: Way::Tx, packed: false, frame: SHORT, touch: Touch::First };
    vec![
        (open(Way::Tx, false, SHORT), vec![rate("tx-split", "guest -> null, 64 B, split", 1.2)]),
        (open(Way::Tx, true, SHORT), vec![rate("tx-packed", "guest -> null, 64 B, packed", 1.0)]),
        (open(Way::Tx, false, LONG), vec![rate("tx-1500", "guest -> null, 1500 B, split", 1.6)]),
        (
            touched,
            vec![row("tx-touch", "guest -> null, 64 B, each written anew", Unit::Mpps, Goal::Nothing, true)],
        ),
        (open(Way::Rx, false, SHORT), vec![rate("rx-split", "null -> guest, 64 B, split", 2.5)]),
        (open(Way::Rx, true, SHORT), vec![rate("rx-packed", "null -> guest, 64 B, packed", 1.3)]),
        (open(Way::Rx, false, LONG), vec![rate("rx-1500", "null -> guest, 1500 B, split", 2.0)]),
        (open(Way::Both, false, SHORT), vec![rate("both", "both ways in one port, 64 B, split", 1.5)]),
        (closed(false, SHORT), vec![rate("peer-split", "peer loop, 128 in flight, 64 B, split", 2.0)]),
        (closed(true, SHORT), vec![rate("peer-packed", "peer loop, 128 in flight, 64 B, packed", 1.5)]),
        (closed(false, LONG), vec![rate("peer-1500", "peer loop, 128 in flight, 1500 B, split", 2.0)]),
        (
            Work::TestpmdLoop(1),
            vec![row(
                "pmd-peer-32",
                "peer loop of testpmd, 32 in flight",
                Unit::Mpps,
                Goal::Ratio(1.2),
                false,
            )],
        ),
        (
            Work::TestpmdLoop(6),
            vec![row(
                "pmd-peer-192",
                "peer loop of testpmd, 192 in flight",
                Unit::Mpps,
                Goal::Ratio(1.0),
                false,
            )],
        ),
        (
            Work::TestpmdOpen(Way::Tx),
            vec![row("pmd-tx", "guest (testpmd) -> null, 64 B", Unit::Mpps, Goal::Nothing, false)],
        ),
        (
            Work::TestpmdOpen(Way::Rx),
            vec![row("pmd-rx", "null -> guest (testpmd), 64 B", Unit::Mpps, Goal::Nothing, false)],
        ),
        (Work::Tso, vec![row("tso", "64 KiB TSO frames by peer link", Unit::GBs, Goal::OfLimit(0.8), false)]),
        (
            Work::Latency,
            vec![
                row("latency-p50", "round trip by peer link, p50", Unit::Micros, Goal::Ratio(1.0), false),
                row("latency-p99", "round trip by peer link, p99", Unit::Micros, Goal::Ratio(1.0), false),
            ],
        ),
        (
            Work::LowRate,
            vec![
                row("cpu-10k", "CPU at 10,000 packets/s", Unit::Cpus, Goal::AtMost(0.15), false),
                row("cpu-idle", "CPU when idle", Unit::Cpus, Goal::AtMost(0.0005), false),
            ],
        ),
        (
            Work::Sharing,
            vec![
                row(
                    "share-64",
                    "rate of 64 ports together, of one port's",
                    Unit::Share,
                    Goal::AtLeast(0.9),
                    false,
                ),
                row(
                    "share-even",
                    "64 ports at full rate: slowest, of their mean",
                    Unit::Share,
                    Goal::Nothing,
                    false,
                ),
                row(
                    "share-greedy",
                    "beside one greedy port: slowest of 15 at 20,000/s, of its due",
                    Unit::Share,
                    Goal::Nothing,
                    false,
                ),
            ],
        ),
        (
            Work::Ports,
            vec![
                row(
                    "port-memory",
                    "memory per additional idle port (1 to 256)",
                    Unit::KiB,
                    Goal::AtMost(128.0),
                    false,
                ),
                row("port-cpu", "CPU of 256 idle ports", Unit::Cpus, Goal::AtMost(0.0005), false),
            ],
        ),
    ]
}

/// Rows that other measurements give.
pub const INSTRUCTIONS: [Row; 2] = [
    row(
        "instr-tx",
        "instructions per packet, guest -> null, split",
        Unit::Instructions,
        Goal::AtMost(160.0),
        false,
    ),
    row(
        "instr-rx",
        "instructions per packet, null -> guest, split",
        Unit::Instructions,
        Goal::AtMost(180.0),
        false,
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_has_its_own_name() {
        let mut ids: Vec<_> =
            all().into_iter().flat_map(|(_, rows)| rows).chain(INSTRUCTIONS).map(|r| r.id).collect();
        let count = ids.len();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), count);
    }
}
