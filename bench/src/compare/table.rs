//! What the numbers say: rows, ratios, verdicts, as text and as JSON.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use anyhow::Result;
use serde::Serialize;

use super::idle::Idle;
use super::sides::Side;
use super::spread;
use crate::report::{self, Spread};

/// Columns, as `Side::name` calls them.
const NAMES: [&str; 4] = ["bare", "bare-uring", "dpdk", "ours"];
/// To reach: DPDK's rate, or CPU time, in every row.
const RATIO_MIN: f64 = 1.0;
/// To reach: so little more than the bare loop per packet, in ns.
const ABOVE_BARE_NS_MAX: f64 = 50.0;
/// To reach: resident memory of one port besides guest memory, in KiB.
const RESIDENT_KIB_MAX: u64 = 12 * 1024;
/// "No measurable CPU": so many µs per second, for all ports together.
const IDLE_CPU_US_PER_S_MAX: f64 = 10.0;

/// A row: what is measured, with the frame length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    /// Guest to tap, as many as possible.
    Transmit(usize),
    /// Tap to guest, as many as possible.
    Receive(usize),
    /// Tap to guest at a fixed rate: CPU time per packet.
    ReceiveCpu(usize),
}

/// One side's numbers of one round.
#[derive(Clone, Copy, Debug)]
pub struct Cell {
    /// Millions of packets per second.
    pub mpps: f64,
    /// CPU time per packet, ns.
    pub cpu_ns: f64,
    /// CPU time per time.
    pub cpu_share: f64,
    /// Share of packets lost between tap and guest.
    pub lost: f64,
}

#[derive(Serialize)]
struct SideNumbers {
    mpps: Spread,
    cpu_ns_per_packet: Spread,
    cpu_share: Spread,
    lost: Spread,
}

#[derive(Serialize)]
struct Row {
    row: String,
    bytes: usize,
    unit: &'static str,
    sides: BTreeMap<&'static str, SideNumbers>,
    /// Ours against DPDK; above 1 is better whatever the unit.
    ratio_to_dpdk: Option<f64>,
    /// Ours minus the bare loop, ns per packet.
    above_bare_ns: Option<f64>,
    verdict: String,
}

/// Everything that was measured.
pub struct Report {
    rounds: usize,
    pps: u64,
    cells: BTreeMap<What, BTreeMap<&'static str, Vec<Cell>>>,
    idle: Option<Idle>,
    notes: Vec<String>,
}

impl What {
    fn title(self) -> (&'static str, usize) {
        match self {
            Self::Transmit(size) => ("guest->tap", size),
            Self::Receive(size) => ("tap->guest", size),
            Self::ReceiveCpu(size) => ("tap->guest, fixed rate", size),
        }
    }

    fn is_cpu(self) -> bool {
        matches!(self, Self::ReceiveCpu(_))
    }
}

impl Report {
    /// An empty one.
    pub fn new(rounds: usize, pps: u64) -> Self {
        Self { rounds, pps, cells: BTreeMap::new(), idle: None, notes: Vec::new() }
    }

    /// Says something that the reader must know.
    pub fn note(&mut self, text: &str) {
        eprintln!("note: {text}");
        self.notes.push(text.to_string());
    }

    /// Adds a measurement.
    pub fn add(&mut self, side: &Side, what: What, cell: Cell) {
        self.cells.entry(what).or_default().entry(side.name()).or_default().push(cell);
    }

    /// Adds what idle ports cost.
    pub fn idle(&mut self, idle: Idle) {
        self.idle = Some(idle);
    }

    fn rows(&self) -> Vec<Row> {
        self.cells.iter().map(|(&what, sides)| row(what, sides)).collect()
    }

    /// For machines.
    pub fn json(&self) -> Result<String> {
        let all = serde_json::json!({
            "rounds": self.rounds,
            "fixed_rate_pps": self.pps,
            "rows": self.rows(),
            "idle": self.idle,
            "notes": self.notes,
        });
        Ok(serde_json::to_string_pretty(&all)?)
    }

    /// For people.
    pub fn text(&self) -> String {
        let rows = self.rows();
        let mut head = vec!["row", "bytes", "unit"];
        head.extend(NAMES);
        head.extend(["ours/dpdk", "above bare", "verdict"]);
        let body: Vec<Vec<String>> = rows
            .iter()
            .map(|r| {
                let mut cells = vec![r.row.clone(), r.bytes.to_string(), r.unit.to_string()];
                for name in NAMES {
                    cells.push(r.sides.get(name).map_or("-".into(), |s| match r.unit {
                        "Mpps" => s.mpps.show(2),
                        _ => s.cpu_ns_per_packet.show(0),
                    }));
                }
                cells.push(r.ratio_to_dpdk.map_or("-".into(), |x| format!("{x:.2}")));
                cells.push(r.above_bare_ns.map_or("-".into(), |x| format!("{x:+.0} ns")));
                cells.push(r.verdict.clone());
                cells
            })
            .collect();
        let mut out = format!("\nMedians (min-max) of {} rounds; back-end on one CPU. ", self.rounds);
        out.push_str(&format!(
            "Fixed rate: {} packets/s, CPU ns of the back-end per packet (less is better).\n",
            self.pps
        ));
        out.push_str("A ratio above 1 is in our favour in every row; \"above bare\" is ns per packet over the bare plain loop.\n\n");
        out.push_str(&report::table(&head, &body));
        out.push_str(&cpu_text(&rows));
        out.push_str(&self.idle_text());
        for r in &rows {
            for (side, s) in &r.sides {
                if s.lost.median > 0.0005 {
                    let percent = s.lost.median * 100.0;
                    out.push_str(&format!(
                        "note: {} {} B: {side} lost {percent:.1} % of what it took\n",
                        r.row, r.bytes
                    ));
                }
                if r.unit == "Mpps" && s.cpu_share.median < 0.95 {
                    let percent = s.cpu_share.median * 100.0;
                    out.push_str(&format!(
                        "note: {} {} B: {side} used {percent:.0} % of its CPU: it was not the limit\n",
                        r.row, r.bytes
                    ));
                }
            }
        }
        for n in &self.notes {
            out.push_str(&format!("note: {n}\n"));
        }
        out
    }

    fn idle_text(&self) -> String {
        let Some(i) = &self.idle else { return String::new() };
        let quiet = i.wakeups == 0 && i.cpu_us / i.seconds <= IDLE_CPU_US_PER_S_MAX;
        let small = i.one_port_resident_kib <= RESIDENT_KIB_MAX;
        let rows = [
            vec![
                format!("{} idle ports, {:.0} s", i.ports, i.seconds),
                format!("{} wake-ups, {:.0} us CPU", i.wakeups, i.cpu_us),
                "0 wake-ups, no measurable CPU".into(),
                word(quiet).into(),
            ],
            vec![
                "resident memory, one port".into(),
                format!(
                    "{:.1} MiB (+ {} KiB shared)",
                    i.one_port_resident_kib as f64 / 1024.0,
                    i.one_port_shared_kib
                ),
                format!("<= {} MiB", RESIDENT_KIB_MAX / 1024),
                word(small).into(),
            ],
        ];
        format!("\n{}", report::table(&["what", "ours", "to reach", "verdict"], &rows))
    }
}

/// The same rows as CPU time: what a packet costs also shows on a machine that is busy with other things, where the
/// rates show nothing.
fn cpu_text(rows: &[Row]) -> String {
    let mut head = vec!["CPU ns per packet", "bytes"];
    head.extend(NAMES);
    head.push("ours above bare");
    let body: Vec<Vec<String>> = rows
        .iter()
        .map(|r| {
            let cost = |name: &str| r.sides.get(name).map(|s| s.cpu_ns_per_packet);
            let mut cells = vec![r.row.clone(), r.bytes.to_string()];
            cells.extend(NAMES.map(|name| cost(name).map_or("-".into(), |c| c.show(0))));
            let above = cost("ours").zip(cost("bare")).map(|(o, b)| o.median - b.median);
            cells.push(above.map_or("-".into(), |a| format!("{a:+.0} ns")));
            cells
        })
        .collect();
    format!("\n{}", report::table(&head, &body))
}

fn word(reached: bool) -> &'static str {
    if reached { "reached" } else { "MISSED" }
}

fn row(what: What, sides: &BTreeMap<&'static str, Vec<Cell>>) -> Row {
    let (title, bytes) = what.title();
    let numbers: BTreeMap<_, _> = sides
        .iter()
        .map(|(&name, cells)| {
            let numbers = SideNumbers {
                mpps: spread(cells, |c| c.mpps),
                cpu_ns_per_packet: spread(cells, |c| c.cpu_ns),
                cpu_share: spread(cells, |c| c.cpu_share),
                lost: spread(cells, |c| c.lost),
            };
            (name, numbers)
        })
        .collect();
    let cost = |name: &str| {
        numbers.get(name).map(|s| match what.is_cpu() {
            true => s.cpu_ns_per_packet.median,
            false => 1e3 / s.mpps.median,
        })
    };
    let (ours, dpdk, bare) = (cost("ours"), cost("dpdk"), cost("bare"));
    let ratio_to_dpdk = ours.zip(dpdk).map(|(o, d)| d / o);
    let above_bare_ns = ours.zip(bare).map(|(o, b)| o - b);
    let verdict = match (ratio_to_dpdk, above_bare_ns) {
        (None, None) => "-".into(),
        (ratio, above) => {
            let fast = ratio.is_none_or(|r| r >= RATIO_MIN);
            let lean = above.is_none_or(|a| a <= ABOVE_BARE_NS_MAX);
            match (fast, lean) {
                (true, true) => word(true).to_string(),
                (false, true) => format!("{}: DPDK", word(false)),
                (true, false) => format!("{}: bare loop", word(false)),
                (false, false) => format!("{}: both", word(false)),
            }
        }
    };
    let unit = if what.is_cpu() { "CPU ns" } else { "Mpps" };
    Row { row: title.into(), bytes, unit, sides: numbers, ratio_to_dpdk, above_bare_ns, verdict }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(mpps: f64, cpu_ns: f64) -> Cell {
        Cell { mpps, cpu_ns, cpu_share: 1.0, lost: 0.0 }
    }

    #[test]
    fn verdicts_need_both_dpdk_and_the_bare_loop() {
        let mut r = Report::new(1, 200_000);
        let ours = Side::Ours("x".into());
        for (side, mpps) in [(&Side::Bare, 2.0), (&Side::Dpdk, 1.8), (&ours, 1.9)] {
            r.add(side, What::Transmit(64), cell(mpps, 500.0));
        }
        for (side, ns) in [(&Side::Bare, 500.0), (&Side::Dpdk, 5000.0), (&ours, 700.0)] {
            r.add(side, What::ReceiveCpu(64), cell(0.2, ns));
        }
        let rows = r.rows();
        assert_eq!(rows[0].verdict, "reached");
        assert!((rows[0].above_bare_ns.expect("both sides") - 26.3).abs() < 0.1);
        assert_eq!(rows[1].verdict, "MISSED: bare loop");
        assert!((rows[1].ratio_to_dpdk.expect("both sides") - 5000.0 / 700.0).abs() < 1e-9);
        assert!(r.json().expect("JSON").contains("\"ratio_to_dpdk\""));
    }
}
