//! What was measured, as a table for people and JSON for programs.
#![forbid(unsafe_code)]

use anyhow::Result;
use serde::Serialize;

use super::findings;
use super::run::{Case, Outcome};
use super::steady::Flow;
use super::suite::{self, Verdict};
use crate::report::{Spread, table};

/// One measurement of one side.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its short name.
    pub side: &'static str,
    /// Which turn.
    pub round: usize,
    /// The case in words: rows with the same words are compared.
    pub label: String,
    /// The case.
    pub case: Case,
    /// The link: latency in microseconds (none: no page ever comes), bytes and background pages per second.
    pub latency_us: Option<u64>,
    /// See `latency_us`; 0 is no limit.
    pub bandwidth: u64,
    /// See `latency_us`.
    pub background: u64,
    /// The numbers, or why there are none.
    pub outcome: Result<Outcome, String>,
}

/// All rows of a run.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    rows: Vec<Row>,
    notes: Vec<String>,
    verdicts: Vec<Verdict>,
}

type Number = fn(&Outcome) -> Option<f64>;

/// Names, digits behind the point, numbers.
const LINES: [(&str, usize, Number); 32] = [
    ("ring start to packets, ms", 1, |o| o.to_packets_ms),
    ("ring start to 90 % of full rate, ms", 1, |o| o.to_full_rate_ms),
    ("full rate, Mpps", 2, |o| o.full_rate_pps.map(|r| r / 1e6)),
    ("ring start to the last page, ms", 1, |o| o.last_page_ms),
    ("faults", 0, |o| Some(o.faults.faults as f64)),
    ("pages by background", 0, |o| Some(o.faults.placed_background as f64)),
    ("outstanding, max", 0, |o| Some(o.faults.outstanding_max as f64)),
    ("outstanding, mean", 1, |o| Some(o.faults.outstanding_mean)),
    ("GET_FEATURES in a stall, p50 ms", 3, |o| o.ping.map(|t| t.p50_ms)),
    ("GET_FEATURES in a stall, p99 ms", 3, |o| o.ping.map(|t| t.p99_ms)),
    ("GET_FEATURES in a stall, max ms", 3, |o| o.ping.map(|t| t.max_ms)),
    ("asking thread itself late, p99 ms", 3, |o| o.own_delay.map(|t| t.p99_ms)),
    ("asking thread itself late, max ms", 3, |o| o.own_delay.map(|t| t.max_ms)),
    ("GET_VRING_BASE in a stall, p50 ms", 3, |o| o.stop.map(|t| t.p50_ms)),
    ("GET_VRING_BASE in a stall, p99 ms", 3, |o| o.stop.map(|t| t.p99_ms)),
    ("GET_VRING_BASE in a stall, max ms", 3, |o| o.stop.map(|t| t.max_ms)),
    ("POSTCOPY_END, ms", 3, |o| o.end_ms),
    ("back-end ready but without CPU, %", 0, |o| o.cpu_missing_percent),
    ("second port alone, p50 us", 1, |o| alone(o)?.latency.map(|l| l.p50_us)),
    ("second port alone, p99 us", 1, |o| alone(o)?.latency.map(|l| l.p99_us)),
    ("second port alone, max us", 0, |o| alone(o)?.latency.map(|l| l.max_us)),
    ("second port alone, lost", 0, |o| Some(alone(o)?.lost as f64)),
    ("second port beside a stall, p50 us", 1, |o| beside(o)?.latency.map(|l| l.p50_us)),
    ("second port beside a stall, p99 us", 1, |o| beside(o)?.latency.map(|l| l.p99_us)),
    ("second port beside a stall, p99.9 us", 1, |o| beside(o)?.latency.map(|l| l.p999_us)),
    ("second port beside a stall, max us", 0, |o| beside(o)?.latency.map(|l| l.max_us)),
    ("second port beside a stall, sent", 0, |o| Some(beside(o)?.sent as f64)),
    ("second port beside a stall, lost or stuck", 0, |o| beside(o).map(|f| (f.lost + f.unused) as f64)),
    ("second port, not sent by our own delay", 0, |o| Some((alone(o)?.skipped + beside(o)?.skipped) as f64)),
    ("stalled second port, outstanding", 0, |o| o.second_outstanding.map(|n| n as f64)),
    ("GET_VRING_BASE is answered, 1 = yes", 0, |o| o.stuck.map(|s| f64::from(u8::from(s.stop_answered)))),
    ("port usable afterwards, 1 = yes", 0, |o| o.stuck.map(|s| f64::from(u8::from(s.usable_again)))),
];

fn alone(outcome: &Outcome) -> Option<Flow> {
    outcome.second.map(|second| second.alone)
}

fn beside(outcome: &Outcome) -> Option<Flow> {
    outcome.second.map(|second| second.beside)
}

impl Report {
    /// Adds a measurement.
    pub fn add(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// Adds a remark.
    pub fn note(&mut self, text: String) {
        if !self.notes.contains(&text) {
            self.notes.push(text);
        }
    }

    /// Compares all rows with the numbers to reach.
    pub fn judge(&mut self) {
        self.verdicts = suite::verdicts(&self.rows);
    }

    /// Whether every measurement came off and nothing wrong was found.
    pub fn is_clean(&self) -> bool {
        self.rows.iter().all(|row| row.outcome.as_ref().is_ok_and(|o| o.wrong.is_empty()))
    }

    /// Whether ours did, and reached all numbers.
    pub fn is_reached(&self) -> bool {
        let mut ours = self.rows.iter().filter(|row| row.side == "ours");
        ours.all(|row| row.outcome.is_ok()) && self.verdicts.iter().all(|v| v.reached != Some(false))
    }

    /// For programs.
    pub fn json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// For people: a table per case, a column per side.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let mut labels: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !labels.contains(&row.label.as_str()) {
                labels.push(&row.label);
            }
        }
        for label in labels {
            let rows: Vec<&Row> = self.rows.iter().filter(|r| r.label == label).collect();
            out.push_str(&format!("\n{label}\n"));
            out.push_str(&case_table(&rows));
            for row in rows {
                let lines = match &row.outcome {
                    Ok(outcome) => findings::lines(&outcome.wrong),
                    Err(error) => vec![error.clone()],
                };
                for line in lines {
                    out.push_str(&format!("! {} in round {}: {line}\n", row.side, row.round));
                }
            }
        }
        if !self.verdicts.is_empty() {
            out.push_str(&suite::text(&self.verdicts));
        }
        self.notes.iter().for_each(|note| out.push_str(&format!("\nnote: {note}")));
        out + "\n"
    }
}

fn case_table(rows: &[&Row]) -> String {
    let mut sides: Vec<&str> = Vec::new();
    rows.iter().for_each(|r| {
        if !sides.contains(&r.side) {
            sides.push(r.side)
        }
    });
    let outcomes = |side: &str| {
        let of_side = rows.iter().filter(|r| r.side == side);
        of_side.filter_map(|r| r.outcome.as_ref().ok()).collect::<Vec<_>>()
    };
    let mut lines = Vec::new();
    for (name, digits, number) in LINES {
        let spreads: Vec<Spread> =
            sides.iter().map(|side| Spread::of(outcomes(side).into_iter().filter_map(number))).collect();
        if spreads.iter().all(|s| s.rounds == 0) {
            continue;
        }
        let mut line = vec![name.to_string()];
        line.extend(spreads.iter().map(|s| match s.rounds {
            0 => "-".into(),
            1 => format!("{:.digits$}", s.median),
            _ => s.show(digits),
        }));
        if let [a, b] = spreads[..] {
            let ratio = a.median / b.median;
            line.push(if ratio.is_finite() { format!("{ratio:.2}") } else { "-".into() });
        }
        lines.push(line);
    }
    let mut head = vec![""];
    head.extend(&sides);
    let ratio = if let [a, b] = sides[..] { format!("{a}/{b}") } else { String::new() };
    if !ratio.is_empty() {
        head.push(&ratio);
    }
    table(&head, &lines)
}
