//! From samples to a line of the table: medians, ratios of adjacent rounds, verdicts. Pure.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde::Serialize;

use super::rows::{Goal, Row};
use crate::load::IDLE_MIN;
use crate::report::Spread;

/// Our back-end.
pub const OURS: &str = "ours";
/// The one that it is held against.
pub const DPDK: &str = "dpdk";
/// What the machine can do at all.
pub const LIMIT: &str = "limit";

/// One side's number of one round.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// In which round.
    pub round: usize,
    /// The number.
    pub value: f64,
    /// Share of the time in which the front-end had nothing to do.
    pub idle: Option<f64>,
    /// Share of the CPUs that others took meanwhile.
    pub others: f64,
}

/// A row's numbers by side.
pub type Samples = BTreeMap<String, Vec<Sample>>;

/// Whether a row is what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It is.
    Reached,
    /// It is, and the front-end was what limited it: more may be possible.
    ReachedAtFrontEndsLimit,
    /// It is not.
    Missed,
    /// It is not, but the front-end was what limited it.
    FrontEndsLimit,
    /// Nothing was to be reached.
    Informs,
    /// There is no number.
    NotMeasured,
}

impl Verdict {
    /// As it is written.
    pub fn text(self) -> &'static str {
        match self {
            Self::Reached => "reached",
            Self::ReachedAtFrontEndsLimit => "reached (front-end's limit)",
            Self::Missed => "MISSED",
            Self::FrontEndsLimit => "front-end's limit",
            Self::Informs => "-",
            Self::NotMeasured => "not measured",
        }
    }
}

/// One side's numbers.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Side {
    /// Over all rounds.
    pub value: Spread,
    /// The front-end's idle share.
    pub idle_share: Option<f64>,
    /// Share of the CPUs that others took.
    pub others_share: f64,
}

/// A line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// The row's name.
    pub id: String,
    /// What was measured.
    pub title: String,
    /// Unit.
    pub unit: String,
    /// Digits that are shown behind the point.
    #[serde(skip)]
    pub digits: usize,
    /// By side.
    pub sides: BTreeMap<String, Side>,
    /// Ours against DPDK in each round, above 1 where ours is better.
    pub ratio: Option<Spread>,
    /// Ours against the raw limit.
    pub of_limit: Option<f64>,
    /// What is to be reached.
    pub to_reach: String,
    /// The ratio that is to be reached.
    pub ratio_to_reach: Option<f64>,
    /// Whether it is.
    pub verdict: Verdict,
}

/// The line of a row.
pub fn line(row: &Row, samples: &Samples) -> Line {
    let sides: BTreeMap<String, Side> =
        samples.iter().filter(|(_, s)| !s.is_empty()).map(|(name, s)| (name.clone(), side(s))).collect();
    let more = row.unit.more_is_better();
    let ratio = ratio(samples.get(OURS), samples.get(DPDK), more);
    let ours = sides.get(OURS);
    let of_limit = ours.zip(sides.get(LIMIT)).map(|(o, l)| o.value.median / l.value.median);
    let (reached, to_reach, ratio_to_reach) = match row.goal {
        Goal::Ratio(min) => (ratio.map(|r| r.median >= min), format!(">= {min:.1} x DPDK"), Some(min)),
        Goal::OfLimit(min) => (of_limit.map(|r| r >= min), format!(">= {min:.1} of the limit"), None),
        Goal::AtMost(max) => (ours.map(|o| o.value.median <= max), at_most(max), None),
        Goal::AtLeast(min) => (ours.map(|o| o.value.median >= min), format!(">= {min}"), None),
        Goal::Nothing => (None, String::new(), None),
    };
    let limited = row.paced_by_driver
        && [OURS, DPDK].iter().any(|name| sides.get(*name).is_some_and(|s| s.idle_share < Some(IDLE_MIN)));
    let verdict = match (row.goal, reached) {
        _ if ours.is_none() => Verdict::NotMeasured,
        (Goal::Nothing, _) => Verdict::Informs,
        (_, None) => Verdict::NotMeasured,
        (_, Some(true)) if limited => Verdict::ReachedAtFrontEndsLimit,
        (_, Some(true)) => Verdict::Reached,
        (_, Some(false)) if limited => Verdict::FrontEndsLimit,
        (_, Some(false)) => Verdict::Missed,
    };
    Line {
        id: row.id.into(),
        title: row.title.into(),
        unit: row.unit.name().into(),
        digits: row.unit.digits(),
        sides,
        ratio,
        of_limit,
        to_reach,
        ratio_to_reach,
        verdict,
    }
}

/// "0" is written for what cannot be told from it.
fn at_most(max: f64) -> String {
    if max < 0.001 { "0".into() } else { format!("<= {max}") }
}

fn side(samples: &[Sample]) -> Side {
    let idle: Vec<f64> = samples.iter().filter_map(|s| s.idle).collect();
    Side {
        value: Spread::of(samples.iter().map(|s| s.value)),
        idle_share: (!idle.is_empty()).then(|| Spread::of(idle).median),
        others_share: Spread::of(samples.iter().map(|s| s.others)).median,
    }
}

/// Of rounds that both have.
fn ratio(ours: Option<&Vec<Sample>>, dpdk: Option<&Vec<Sample>>, more_is_better: bool) -> Option<Spread> {
    let (ours, dpdk) = ours.zip(dpdk)?;
    let ratios: Vec<f64> = ours
        .iter()
        .filter_map(|o| {
            let d = dpdk.iter().find(|d| d.round == o.round)?;
            let ratio = if more_is_better { o.value / d.value } else { d.value / o.value };
            ratio.is_finite().then_some(ratio)
        })
        .collect();
    (!ratios.is_empty()).then(|| Spread::of(ratios))
}

#[cfg(test)]
mod tests {
    use super::super::rows::Unit;
    use super::*;

    fn samples(list: &[(&str, &[(f64, f64)])]) -> Samples {
        list.iter()
            .map(|(name, values)| {
                let of = |(round, &(value, idle)): (usize, &(f64, f64))| Sample {
                    round,
                    value,
                    idle: Some(idle),
                    others: 0.0,
                };
                (name.to_string(), values.iter().enumerate().map(of).collect())
            })
            .collect()
    }

    fn row(unit: Unit, goal: Goal) -> Row {
        Row { id: "x", title: "x", unit, goal, paced_by_driver: true }
    }

    #[test]
    fn a_ratio_is_of_adjacent_rounds() {
        let s = samples(&[
            (OURS, &[(2.0, 0.9), (9.0, 0.9), (4.0, 0.9)]),
            (DPDK, &[(1.0, 0.9), (3.0, 0.9), (4.0, 0.9)]),
        ]);
        let l = line(&row(Unit::Mpps, Goal::Ratio(1.5)), &s);
        let r = l.ratio.expect("both sides");
        assert_eq!((r.median, r.min, r.max), (2.0, 1.0, 3.0));
        assert_eq!(l.verdict, Verdict::Reached);
        // Less is better: the other way round.
        let l = line(&row(Unit::Micros, Goal::Ratio(1.0)), &s);
        assert_eq!((l.ratio.expect("both").median, l.verdict), (0.5, Verdict::Missed));
    }

    #[test]
    fn a_busy_front_end_takes_the_blame() {
        let goal = row(Unit::Mpps, Goal::Ratio(1.2));
        let s = samples(&[(OURS, &[(1.1, 0.3)]), (DPDK, &[(1.0, 0.7)])]);
        assert_eq!(line(&goal, &s).verdict, Verdict::FrontEndsLimit);
        let s = samples(&[(OURS, &[(1.3, 0.3)]), (DPDK, &[(1.0, 0.7)])]);
        assert_eq!(line(&goal, &s).verdict, Verdict::ReachedAtFrontEndsLimit);
        let s = samples(&[(OURS, &[(1.1, 0.6)]), (DPDK, &[(1.0, 0.7)])]);
        assert_eq!(line(&goal, &s).verdict, Verdict::Missed);
    }

    #[test]
    fn what_was_not_measured_is_said() {
        let goal = row(Unit::Mpps, Goal::Ratio(1.2));
        assert_eq!(line(&goal, &samples(&[(DPDK, &[(1.0, 0.7)])])).verdict, Verdict::NotMeasured);
        assert_eq!(line(&goal, &samples(&[(OURS, &[(1.0, 0.7)])])).verdict, Verdict::NotMeasured);
        let s = samples(&[(OURS, &[(9.0, 0.9)]), (LIMIT, &[(10.0, 0.9)])]);
        assert_eq!(line(&row(Unit::GBs, Goal::OfLimit(0.8)), &s).verdict, Verdict::Reached);
        assert_eq!(line(&row(Unit::KiB, Goal::AtMost(8.0)), &s).verdict, Verdict::Missed);
    }
}
