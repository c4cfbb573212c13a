//! `--suite`: the cases of the whole comparison, and whether the numbers to reach are reached. Pure.
//!
//! What decides is 5 ms per page, unlimited bandwidth, rings that have arrived, a ring of 256 and as many buffers.
#![forbid(unsafe_code)]

use std::time::Duration;

use serde::Serialize;

use super::driver::Direction;
use super::run::{Case, Outcome};
use super::schedule::Link;
use super::second::SecondPort;
use super::table::Row;
use crate::report::{Spread, table};

const LATENCIES_US: [u64; 4] = [200, 1000, 5000, 20_000];
const DECIDES_US: u64 = 5000;
/// Buffers and bandwidth of a stall that lasts as long as it is watched: 65 MB at 16 MB/s.
const MANY_BUFFERS: u64 = 16_384;
const SLOW: u64 = 16_000_000;
const STALL: Duration = Duration::from_secs(3);
const ALONE: Duration = Duration::from_secs(2);
const RATE: u64 = 500_000;
/// Enough for a 99th percentile at ours; DPDK takes a tenth of a second for each.
const STOPS: usize = 100;
const STOPS_DPDK: usize = 20;
/// A back-end that one stalled port stops altogether is given up after this.
const GIVE_UP: Duration = Duration::from_secs(8);

/// Faster than DPDK to the packets, times.
const FASTER: f64 = 20.0;
/// Faults outstanding.
const OUTSTANDING: f64 = 200.0;
/// Answer to a control message during a stall, p99, ms.
const ANSWER_MS: f64 = 1.0;
/// p99 latency of the second port, times that of the undisturbed one.
const DISTURBED: f64 = 2.0;
/// Two ports in postcopy: what one of them may lose by chance.
const NOT_SLOWER: f64 = 1.1;

/// All cases, from one as the command line gives it.
pub fn cases(base: &Case) -> Vec<Case> {
    let link = |latency_us: u64| Link { latency_ns: Some(latency_us * 1000), bandwidth: 0, background: 0 };
    let base = Case { link: link(DECIDES_US), ..base.clone() };
    let both = [Direction::Tx, Direction::Rx];
    let mut cases = Vec::new();
    for direction in both {
        cases.extend(LATENCIES_US.map(|us| Case { direction, link: link(us), ..base.clone() }));
    }
    let slow = Link { bandwidth: SLOW, ..base.link };
    let long = Case { link: slow, buffers: MANY_BUFFERS, watch: Some(STALL), ..base.clone() };
    cases.push(long.clone());
    for direction in both {
        let within = base.stop_within;
        cases.push(Case {
            direction,
            buffers: MANY_BUFFERS,
            stops: STOPS,
            stop_within: within,
            ..base.clone()
        });
    }
    let second = Some(SecondPort::Steady { pps: RATE });
    cases.push(Case { second, steady: ALONE, ..long.clone() });
    let never = Link { latency_ns: None, ..base.link };
    cases.push(Case { second, steady: ALONE, watch: Some(STALL), link: never, ..base.clone() });
    for direction in both {
        let second = Some(SecondPort::Stalled);
        cases.push(Case { direction, second, limit: GIVE_UP, ..base.clone() });
    }
    cases
}

/// A case as it is measured at one side.
pub fn at_side(case: &Case, side: &str) -> Case {
    let stops = if side == "dpdk" { case.stops.min(STOPS_DPDK) } else { case.stops };
    Case { stops, ..case.clone() }
}

/// One number to reach.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// What it is about.
    pub what: String,
    /// In words.
    pub to_reach: String,
    /// Ours.
    pub ours: String,
    /// DPDK's, where that says something.
    pub dpdk: String,
    /// `None`: there is no number.
    pub reached: Option<bool>,
}

/// What is measured in which rows.
struct Look<'a> {
    rows: &'a [Row],
}

impl Look<'_> {
    fn outcomes(&self, side: &str, is: impl Fn(&Case) -> bool) -> Vec<&Outcome> {
        let rows = self.rows.iter().filter(|row| row.side == side && is(&row.case));
        rows.filter_map(|row| row.outcome.as_ref().ok()).collect()
    }

    fn spread(
        &self,
        side: &str,
        is: impl Fn(&Case) -> bool,
        number: impl Fn(&Outcome) -> Option<f64>,
    ) -> Spread {
        Spread::of(self.outcomes(side, is).into_iter().filter_map(number))
    }
}

fn show(spread: Spread, digits: usize, unit: &str) -> String {
    if spread.rounds == 0 { "-".into() } else { format!("{} {unit}", spread.show(digits)) }
}

fn ask(spread: Spread, reached: impl Fn(Spread) -> bool) -> Option<bool> {
    (spread.rounds > 0).then(|| reached(spread))
}

/// What the numbers to reach say to these rows.
pub fn verdicts(rows: &[Row]) -> Vec<Verdict> {
    let look = Look { rows };
    let mut all = Vec::new();
    let mut add = |what: String, to_reach: String, ours: String, dpdk: String, reached: Option<bool>| {
        all.push(Verdict { what, to_reach, ours, dpdk, reached });
    };
    for direction in [Direction::Tx, Direction::Rx] {
        let name = format!("{direction:?}").to_lowercase();
        let plain = |case: &Case| is_plain(case, direction);
        let [ours, dpdk] = ["ours", "dpdk"].map(|side| look.spread(side, plain, |o| o.to_packets_ms));
        let faster = dpdk.median / ours.median;
        add(
            format!("{name}: ring start to 10,000 packets"),
            format!("{FASTER} times faster"),
            show(ours, 1, "ms"),
            format!("{}: {faster:.0} times", show(dpdk, 0, "ms")),
            faster.is_finite().then_some(faster >= FASTER),
        );
        let outstanding = |side| look.spread(side, plain, |o| Some(o.faults.outstanding_max as f64));
        let ours = outstanding("ours");
        add(
            format!("{name}: faults outstanding at most"),
            format!("{OUTSTANDING}"),
            show(ours, 0, ""),
            show(outstanding("dpdk"), 0, ""),
            ask(ours, |s| s.median >= OUTSTANDING),
        );
        let stops =
            |side| look.spread(side, |c| c.stops > 0 && c.direction == direction, |o| Some(o.stop?.p99_ms));
        let ours = stops("ours");
        add(
            format!("{name}: GET_VRING_BASE in a stall, p99"),
            format!("{ANSWER_MS} ms"),
            show(ours, 3, "ms"),
            show(stops("dpdk"), 0, "ms"),
            ask(ours, |s| s.median <= ANSWER_MS),
        );
        let beside = |c: &Case| c.second == Some(SecondPort::Stalled) && c.direction == direction;
        let [beside, other] = ["ours", "dpdk"].map(|side| look.spread(side, beside, |o| o.to_packets_ms));
        let alone = look.spread("ours", plain, |o| o.to_packets_ms);
        add(
            format!("{name}: 10,000 packets beside a port in postcopy that is stalled for ever"),
            "not slower than alone".into(),
            format!("{}, alone {}", show(beside, 1, "ms"), show(alone, 1, "ms")),
            if other.rounds == 0 { "never".into() } else { show(other, 0, "ms") },
            // One that never got there has no number: that is slower, too.
            (alone.rounds > 0).then_some(beside.rounds == alone.rounds && beside.median <= limit(alone)),
        );
    }
    let long = |case: &Case| case.watch.is_some() && case.second.is_none();
    let ping = |side| look.spread(side, long, |o| Some(o.ping?.p99_ms));
    let ours = ping("ours");
    add(
        "GET_FEATURES in a stall of seconds, p99".into(),
        format!("{ANSWER_MS} ms"),
        show(ours, 3, "ms"),
        show(ping("dpdk"), 3, "ms"),
        ask(ours, |s| s.median <= ANSWER_MS),
    );
    for (words, never) in [("seconds", false), ("for ever", true)] {
        let is = |case: &Case| {
            matches!(case.second, Some(SecondPort::Steady { .. })) && case.link.latency_ns.is_none() == never
        };
        let lost =
            |side| look.spread(side, is, |o| o.second.map(|s| (s.beside.lost + s.beside.unused) as f64));
        let ours = lost("ours");
        add(
            format!("second port at 500 kpps, the first stalled ({words}): lost"),
            "nothing".into(),
            show(ours, 0, ""),
            show(lost("dpdk"), 0, ""),
            ask(ours, |s| s.median == 0.0),
        );
        let p99 = |o: &Outcome| {
            let second = o.second?;
            Some((second.alone.latency?.p99_us, second.beside.latency?.p99_us))
        };
        let times = |side| look.spread(side, is, |o| p99(o).map(|(alone, beside)| beside / alone));
        let us = |side| {
            let [alone, beside] = [
                look.spread(side, is, |o| p99(o).map(|p| p.0)),
                look.spread(side, is, |o| p99(o).map(|p| p.1)),
            ];
            format!("{} times ({:.0} us, alone {:.0})", times(side).show(2), beside.median, alone.median)
        };
        let ours = times("ours");
        let words_of = |side| if times(side).rounds == 0 { "-".into() } else { us(side) };
        add(
            format!("second port at 500 kpps, the first stalled ({words}): p99 latency"),
            format!("{DISTURBED} times undisturbed"),
            words_of("ours"),
            words_of("dpdk"),
            ask(ours, |s| s.median <= DISTURBED),
        );
    }
    let ours = rows.iter().filter(|row| row.side == "ours");
    let wrong = ours.clone().filter(|row| row.outcome.as_ref().is_ok_and(|o| !o.wrong.is_empty())).count();
    add(
        "runs in which something was wrong".into(),
        "none".into(),
        format!("{wrong} of {}", ours.clone().count()),
        "-".into(),
        (ours.count() > 0).then_some(wrong == 0),
    );
    all
}

fn is_plain(case: &Case, direction: Direction) -> bool {
    case.direction == direction
        && case.link == Link { latency_ns: Some(DECIDES_US * 1000), bandwidth: 0, background: 0 }
        && case.second.is_none()
        && case.watch.is_none()
        && case.stops == 0
}

/// What does not count as slower than this.
fn limit(alone: Spread) -> f64 {
    alone.max.max(alone.median * NOT_SLOWER)
}

/// For people.
pub fn text(verdicts: &[Verdict]) -> String {
    let line = |v: &Verdict| {
        let reached = match v.reached {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "-",
        };
        vec![v.what.clone(), v.to_reach.clone(), v.ours.clone(), v.dpdk.clone(), reached.into()]
    };
    let lines: Vec<_> = verdicts.iter().map(line).collect();
    format!("\n{}", table(&["to reach", "", "ours", "dpdk", "reached"], &lines))
}
