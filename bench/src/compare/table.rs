//! What the numbers say: rows, ratios, verdicts, as text and as JSON.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::others::TOLERATED;
use crate::report::{self, Spread};

/// The contender that the others are held against.
const RIVAL: &str = "dpdk";
/// The contender that does nothing but the system calls.
const FLOOR: &str = "bare";
const OURS: &str = "ours";
/// A side that uses less of its CPU than this in a row of rates was not what limited it.
const BUSY: f64 = 0.95;
/// Loss that is worth a note.
const LOST: f64 = 0.0005;

/// What a row's numbers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Millions of packets per second; more is better.
    Mpps,
    /// CPU time per packet in ns; less is better.
    CpuNs,
}

/// What a row is to reach.
#[derive(Clone, Copy, Debug)]
pub struct Goal {
    /// Ours against DPDK's, above 1 where ours is better.
    pub ratio_min: f64,
    /// ns per packet over the bare loop, at most.
    pub above_bare_ns_max: Option<f64>,
}

/// The rows of a comparison, in their order.
pub trait Rows: Copy + Ord {
    /// What is measured, and the frame length in bytes. A title that begins with a blank says that it is the measurement of
    /// the row above, seen in another way.
    fn title(self) -> (&'static str, usize);
    /// Unit of its numbers.
    fn unit(self) -> Unit;
    /// What is to be reached; `None` for a row that only informs.
    fn goal(self) -> Option<Goal>;
}

/// One side's numbers of one round.
#[derive(Clone, Copy, Debug)]
pub struct Cell {
    /// Millions of packets per second.
    pub mpps: f64,
    /// CPU time of the back-end per packet, ns.
    pub cpu_ns: f64,
    /// The same without polling that found nothing; equal for a side that sleeps.
    pub work_ns: f64,
    /// CPU time of the back-end per time.
    pub cpu_share: f64,
    /// Share of packets lost between uplink and guest.
    pub lost: f64,
    /// Share of the CPUs that processes took which have nothing to do with it, where that was measured.
    pub others: f64,
}

impl Cell {
    /// Of the packets that arrived in a time and the CPU time that the back-end used meanwhile.
    pub fn of(packets: f64, wall: Duration, cpu_ns: u64, lost: f64) -> Self {
        let each = cpu_ns as f64 / packets;
        Self {
            mpps: packets / wall.as_secs_f64() / 1e6,
            cpu_ns: each,
            work_ns: each,
            cpu_share: cpu_ns as f64 / wall.as_nanos() as f64,
            lost,
            others: 0.0,
        }
    }
}

#[derive(Serialize)]
struct SideNumbers {
    mpps: Spread,
    cpu_ns_per_packet: Spread,
    work_ns_per_packet: Spread,
    cpu_share: Spread,
    lost: Spread,
    others_share: Spread,
}

#[derive(Serialize)]
struct Row {
    row: String,
    bytes: usize,
    unit: &'static str,
    sides: BTreeMap<&'static str, SideNumbers>,
    /// Ours against DPDK; above 1 is better whatever the unit.
    ratio_to_dpdk: Option<f64>,
    /// The ratio that is to be reached.
    ratio_to_reach: Option<f64>,
    /// Ours minus the bare loop, ns per packet.
    above_bare_ns: Option<f64>,
    verdict: String,
}

impl Row {
    /// An indented title: the measurement of the row above seen in another way.
    fn is_repeat(&self) -> bool {
        self.row.starts_with(' ')
    }
}

/// What stands over the table.
pub struct Heading {
    /// Sides in the order of their columns.
    pub columns: &'static [&'static str],
    /// How many rounds.
    pub rounds: usize,
    /// The fixed rate of the rows that have one, packets per second.
    pub pps: u64,
    /// Sentences about the rows.
    pub text: &'static str,
}

/// Everything that was measured.
pub struct Report<W> {
    heading: Heading,
    cells: BTreeMap<W, BTreeMap<&'static str, Vec<Cell>>>,
    extra_text: String,
    extra_json: serde_json::Map<String, serde_json::Value>,
    notes: Vec<String>,
}

impl<W: Rows> Report<W> {
    /// An empty one.
    pub fn new(heading: Heading) -> Self {
        let (cells, notes) = (BTreeMap::new(), Vec::new());
        Self { heading, cells, extra_text: String::new(), extra_json: serde_json::Map::new(), notes }
    }

    /// Says something that the reader must know.
    pub fn note(&mut self, text: &str) {
        eprintln!("note: {text}");
        self.notes.push(text.to_string());
    }

    /// Adds a measurement.
    pub fn add(&mut self, side: &'static str, what: W, cell: Cell) {
        self.cells.entry(what).or_default().entry(side).or_default().push(cell);
    }

    /// Adds something that is no row: text behind the tables, and a JSON member.
    pub fn extra(&mut self, name: &str, value: &impl Serialize, text: &str) -> Result<()> {
        self.extra_json.insert(name.into(), serde_json::to_value(value)?);
        self.extra_text.push_str(text);
        Ok(())
    }

    fn rows(&self) -> Vec<Row> {
        self.cells.iter().map(|(&what, sides)| row(what, sides)).collect()
    }

    /// For machines.
    pub fn json(&self) -> Result<String> {
        let mut all = serde_json::json!({
            "rounds": self.heading.rounds,
            "fixed_rate_pps": self.heading.pps,
            "rows": self.rows(),
            "notes": self.notes,
        });
        if let Some(all) = all.as_object_mut() {
            all.extend(self.extra_json.clone());
        }
        Ok(serde_json::to_string_pretty(&all)?)
    }

    /// For people.
    pub fn text(&self) -> String {
        let rows = self.rows();
        let names = self.heading.columns;
        let mut head = vec!["row", "bytes", "unit"];
        head.extend(names);
        head.extend(["ours/dpdk", "above bare", "verdict"]);
        let body: Vec<Vec<String>> = rows
            .iter()
            .map(|r| {
                let mut cells = vec![r.row.clone(), r.bytes.to_string(), r.unit.to_string()];
                for name in names {
                    cells.push(r.sides.get(name).map_or("-".into(), |s| match r.unit {
                        "Mpps" => s.mpps.show(2),
                        _ => s.work_ns_per_packet.show(0),
                    }));
                }
                cells.push(r.ratio_to_dpdk.map_or("-".into(), |x| format!("{x:.2}")));
                cells.push(r.above_bare_ns.map_or("-".into(), |x| format!("{x:+.0} ns")));
                cells.push(r.verdict.clone());
                cells
            })
            .collect();
        let Heading { rounds, pps, text, .. } = &self.heading;
        let mut out = format!("\nMedians (min-max) of {rounds} rounds; back-end on one CPU. ");
        out.push_str(&format!(
            "Fixed rate: {pps} packets/s, CPU ns of the back-end per packet (less is better).\n"
        ));
        out.push_str(text);
        out.push_str("A ratio above 1 is in our favour in every row; \"above bare\" is ns per packet over the bare plain loop.\n\n");
        out.push_str(&report::table(&head, &body));
        out.push_str(&cpu_text(names, &rows));
        out.push_str(&self.extra_text);
        for r in rows.iter().filter(|r| !r.is_repeat()) {
            for (side, s) in &r.sides {
                if s.lost.median > LOST {
                    let percent = s.lost.median * 100.0;
                    out.push_str(&format!(
                        "note: {} {} B: {side} lost {percent:.1} % of what it took\n",
                        r.row, r.bytes
                    ));
                }
                if s.others_share.median > TOLERATED {
                    let percent = s.others_share.median * 100.0;
                    out.push_str(&format!(
                        "note: {} {} B: {side} was disturbed: others used {percent:.0} % of the CPUs\n",
                        r.row, r.bytes
                    ));
                }
                if r.unit == "Mpps" && s.cpu_share.median < BUSY {
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
}

/// The same rows as CPU time: what a packet costs also shows on a machine that is busy with other things, where the
/// rates show nothing.
fn cpu_text(names: &[&'static str], rows: &[Row]) -> String {
    let mut head = vec!["CPU ns per packet", "bytes"];
    head.extend(names);
    head.push("ours above bare");
    let body: Vec<Vec<String>> = rows
        .iter()
        .filter(|r| !r.is_repeat())
        .map(|r| {
            let cost = |name: &str| r.sides.get(name).map(|s| s.cpu_ns_per_packet);
            let mut cells = vec![r.row.clone(), r.bytes.to_string()];
            cells.extend(names.iter().map(|name| cost(name).map_or("-".into(), |c| c.show(0))));
            let above = cost(OURS).zip(cost(FLOOR)).map(|(o, b)| o.median - b.median);
            cells.push(above.map_or("-".into(), |a| format!("{a:+.0} ns")));
            cells
        })
        .collect();
    format!("\n{}", report::table(&head, &body))
}

/// How a verdict is written.
pub fn word(reached: bool) -> &'static str {
    if reached { "reached" } else { "MISSED" }
}

fn row<W: Rows>(what: W, sides: &BTreeMap<&'static str, Vec<Cell>>) -> Row {
    let (title, bytes) = what.title();
    let spread = |cells: &[Cell], number: fn(&Cell) -> f64| Spread::of(cells.iter().map(number));
    let numbers: BTreeMap<_, _> = sides
        .iter()
        .map(|(&name, cells)| {
            let numbers = SideNumbers {
                mpps: spread(cells, |c| c.mpps),
                cpu_ns_per_packet: spread(cells, |c| c.cpu_ns),
                work_ns_per_packet: spread(cells, |c| c.work_ns),
                cpu_share: spread(cells, |c| c.cpu_share),
                lost: spread(cells, |c| c.lost),
                others_share: spread(cells, |c| c.others),
            };
            (name, numbers)
        })
        .collect();
    let cost = |name: &str| {
        numbers.get(name).map(|s| match what.unit() {
            Unit::CpuNs => s.work_ns_per_packet.median,
            Unit::Mpps => 1e3 / s.mpps.median,
        })
    };
    let (ours, dpdk, bare) = (cost(OURS), cost(RIVAL), cost(FLOOR));
    let ratio_to_dpdk = ours.zip(dpdk).map(|(o, d)| d / o);
    let above_bare_ns = ours.zip(bare).map(|(o, b)| o - b);
    let goal = what.goal();
    Row {
        row: title.into(),
        bytes,
        unit: if what.unit() == Unit::CpuNs { "CPU ns" } else { "Mpps" },
        sides: numbers,
        ratio_to_dpdk,
        ratio_to_reach: goal.map(|g| g.ratio_min),
        above_bare_ns,
        verdict: goal.map_or("-".into(), |g| verdict(g, ratio_to_dpdk, above_bare_ns)),
    }
}

fn verdict(goal: Goal, ratio: Option<f64>, above: Option<f64>) -> String {
    let above = above.zip(goal.above_bare_ns_max);
    if ratio.is_none() && above.is_none() {
        return "-".into();
    }
    let fast = ratio.is_none_or(|r| r >= goal.ratio_min);
    let lean = above.is_none_or(|(a, max)| a <= max);
    match (fast, lean) {
        (true, true) => word(true).to_string(),
        (false, true) => format!("{}: DPDK", word(false)),
        (true, false) => format!("{}: bare loop", word(false)),
        (false, false) => format!("{}: both", word(false)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    enum What {
        Rate,
        Cpu,
    }

    impl Rows for What {
        fn title(self) -> (&'static str, usize) {
            ("row", 64)
        }

        fn unit(self) -> Unit {
            if self == Self::Rate { Unit::Mpps } else { Unit::CpuNs }
        }

        fn goal(self) -> Option<Goal> {
            Some(Goal { ratio_min: 1.0, above_bare_ns_max: Some(50.0) })
        }
    }

    fn cell(mpps: f64, cpu_ns: f64) -> Cell {
        Cell { mpps, cpu_ns, work_ns: cpu_ns, cpu_share: 1.0, lost: 0.0, others: 0.0 }
    }

    #[test]
    fn verdicts_need_both_dpdk_and_the_bare_loop() {
        let heading = Heading { columns: &["bare", "dpdk", "ours"], rounds: 1, pps: 200_000, text: "" };
        let mut r = Report::new(heading);
        for (side, mpps) in [("bare", 2.0), ("dpdk", 1.8), ("ours", 1.9)] {
            r.add(side, What::Rate, cell(mpps, 500.0));
        }
        for (side, ns) in [("bare", 500.0), ("dpdk", 5000.0), ("ours", 700.0)] {
            r.add(side, What::Cpu, cell(0.2, ns));
        }
        let rows = r.rows();
        assert_eq!(rows[0].verdict, "reached");
        assert!((rows[0].above_bare_ns.expect("both sides") - 26.3).abs() < 0.1);
        assert_eq!(rows[1].verdict, "MISSED: bare loop");
        assert!((rows[1].ratio_to_dpdk.expect("both sides") - 5000.0 / 700.0).abs() < 1e-9);
        assert!(r.json().expect("JSON").contains("\"ratio_to_dpdk\""));
    }

    #[test]
    fn a_higher_goal_than_equality() {
        let goal = Goal { ratio_min: 1.1, above_bare_ns_max: None };
        assert_eq!(verdict(goal, Some(1.05), Some(500.0)), "MISSED: DPDK");
        assert_eq!(verdict(goal, Some(1.15), Some(500.0)), "reached");
        assert_eq!(verdict(goal, None, Some(500.0)), "-");
    }
}
