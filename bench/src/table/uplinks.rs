//! The rows of `vubench tap` and `vubench xdp`, taken over from their reports.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::score::{DPDK, LIMIT, Line, OURS, Side, Verdict};
use crate::report::Spread;

/// Runs the comparison and returns its lines.
pub fn lines(what: &str, backend: &Path, rounds: usize) -> Result<Vec<Line>> {
    let report = tempfile::NamedTempFile::new()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(what).arg("--backend-bin").arg(backend).args(["--rounds", &rounds.to_string()]);
    let status = command.arg("--json").arg(report.path()).status()?;
    ensure!(status.success(), "vubench {what} failed");
    parse(what, &serde_json::from_slice(&std::fs::read(report.path())?)?)
}

fn parse(what: &str, report: &Value) -> Result<Vec<Line>> {
    let rows = report["rows"].as_array().context("rows")?;
    // An indented row is another look at the one above it.
    let rows = rows.iter().filter(|row| !row["row"].as_str().is_some_and(|title| title.starts_with(' ')));
    rows.map(|row| line(what, row).with_context(|| format!("a row of vubench {what}"))).collect()
}

fn line(what: &str, row: &Value) -> Result<Line> {
    let rate = row["unit"] == "Mpps";
    let number = if rate { "mpps" } else { "work_ns_per_packet" };
    let side = |name: &str| -> Option<Side> {
        let side = &row["sides"][name];
        let value = spread(&side[number])?;
        Some(Side {
            value,
            idle_share: None,
            others_share: side["others_share"]["median"].as_f64().unwrap_or(0.0),
        })
    };
    let columns = [(DPDK, side("dpdk")), (OURS, side("ours")), (LIMIT, side("bare"))];
    let sides = columns.into_iter().filter_map(|(name, s)| Some((name.to_string(), s?))).collect();
    let bytes = row["bytes"].as_u64().context("bytes")?;
    let title = row["row"].as_str().context("title")?;
    let ratio = row["ratio_to_dpdk"].as_f64();
    let goal = row["ratio_to_reach"].as_f64();
    let mut to_reach = goal.map_or(String::new(), |g| format!(">= {g:.1} x DPDK"));
    if what == "tap" && goal.is_some() {
        to_reach.push_str(", <= 50 ns above bare");
    }
    Ok(Line {
        id: format!("{what}-{title}-{bytes}").replace([' ', ',', '>'], ""),
        title: format!("{title}, {bytes} B"),
        unit: if rate { "Mpps" } else { "CPU ns" }.into(),
        digits: if rate { 2 } else { 0 },
        sides,
        // The report has medians of sides, not of rounds.
        ratio: ratio.map(|r| Spread::of([r])),
        of_limit: None,
        to_reach,
        ratio_to_reach: goal,
        verdict: match row["verdict"].as_str() {
            Some("reached") => Verdict::Reached,
            Some(text) if text.starts_with("MISSED") => Verdict::Missed,
            _ => Verdict::Informs,
        },
    })
}

fn spread(value: &Value) -> Option<Spread> {
    let number = |name: &str| value[name].as_f64();
    Some(Spread {
        median: number("median")?,
        min: number("min")?,
        max: number("max")?,
        rounds: value["rounds"].as_u64()? as usize,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_becomes_lines() {
        let spread = |m: f64| serde_json::json!({"median": m, "min": m, "max": m, "rounds": 3});
        let side = |m: f64| serde_json::json!({"mpps": spread(m), "work_ns_per_packet": spread(m), "others_share": spread(0.01)});
        let report = serde_json::json!({"rows": [{
            "row": "guest->tap", "bytes": 64, "unit": "Mpps", "verdict": "MISSED: DPDK",
            "sides": {"bare": side(1.5), "dpdk": side(2.0), "ours": side(1.0)},
            "ratio_to_dpdk": 0.5, "ratio_to_reach": 1.0
        }]});
        let lines = parse("tap", &report).expect("lines");
        assert_eq!((lines[0].title.as_str(), lines[0].verdict), ("guest->tap, 64 B", Verdict::Missed));
        assert_eq!(lines[0].sides[OURS].value.median, 1.0);
        assert_eq!(lines[0].id, "tap-guest-tap-64");
    }
}
