//! The table as text. Pure.
#![forbid(unsafe_code)]

use super::score::{DPDK, LIMIT, Line, OURS, Side};
use crate::compare::TOLERATED;
use crate::report::{self, Spread};

/// Heading and table; `others` are more back-ends, by name.
pub fn text(lines: &[Line], rounds: usize, others: &[String]) -> String {
    let mut head = vec!["row", "unit", "DPDK", "ours", "ours / DPDK"];
    head.extend(others.iter().map(String::as_str));
    head.extend(["raw limit", "to reach", "front-end idle", "verdict"]);
    let body: Vec<Vec<String>> = lines.iter().map(|l| cells(l, others)).collect();
    let mut out = format!(
        "\nMedians (smallest-largest) of {rounds} rounds; back-end on one CPU, front-end on the other. A ratio is of adjacent \
         rounds,\nabove 1 where ours is better. Where the front-end (DPDK's row / ours) was idle for less than half of the time, \
         the number is its\nlimit, not the back-end's.\n\n"
    );
    out.push_str(&report::table(&head, &body));
    for line in lines {
        let disturbed: Vec<String> = line
            .sides
            .iter()
            .filter(|(_, side)| side.others_share > TOLERATED)
            .map(|(name, side)| format!("{name} {:.0} %", side.others_share * 100.0))
            .collect();
        if !disturbed.is_empty() {
            let disturbed = disturbed.join(", ");
            out.push_str(&format!("note: {}: others used the CPUs meanwhile: {disturbed}\n", line.title));
        }
    }
    out
}

fn cells(line: &Line, others: &[String]) -> Vec<String> {
    let number = |name: &str| line.sides.get(name).map_or("-".into(), |s| show(&s.value, line.digits));
    let mut cells = vec![line.title.clone(), line.unit.clone(), number(DPDK), number(OURS)];
    cells.push(line.ratio.map_or("-".into(), |r| show(&r, 2)));
    cells.extend(others.iter().map(|name| number(name)));
    let limit = line.sides.get(LIMIT).map_or("-".into(), |s| {
        let of = line.of_limit.map_or(String::new(), |share| format!(", ours {share:.2} of it"));
        format!("{:.*}{of}", line.digits, s.value.median)
    });
    cells.push(limit);
    cells.push(if line.to_reach.is_empty() { "-".into() } else { line.to_reach.clone() });
    let idle = |name: &str| {
        let share = line.sides.get(name).and_then(|s: &Side| s.idle_share);
        share.map_or("-".into(), |i| format!("{:.0} %", i * 100.0))
    };
    let (dpdk, ours) = (idle(DPDK), idle(OURS));
    cells.push(if dpdk == ours { dpdk } else { format!("{dpdk} / {ours}") });
    cells.push(line.verdict.text().into());
    cells
}

fn show(value: &Spread, digits: usize) -> String {
    if value.rounds > 1 { value.show(digits) } else { format!("{:.digits$}", value.median) }
}
