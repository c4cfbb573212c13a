//! What the program `fault-latency` (an example of the back-end) measured of page faults of known length, and whether
//! that is right.
//!
//! Counts are exact. Times have a lower bound only from what was asked for, as the machine may be slow, and an upper
//! one from the time that the fault took as a whole.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Where cargo puts the program; `cargo test` builds it.
pub fn program() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let places = own.ancestors().skip(1).take(2);
    places
        .map(|place| place.join("examples/fault-latency"))
        .find(|path| path.is_file())
        .context("fault-latency is not built; run `cargo build -p vhost-user-net --example fault-latency`")
}

/// Checks what the program printed; returns its mode and the number of scenarios.
///
/// # Errors
/// The first thing that is wrong.
pub fn check(output: &str) -> Result<(String, usize)> {
    let lines: Vec<Value> = output
        .lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).with_context(|| format!("no JSON: {line}")))
        .collect::<Result<_>>()?;
    let [head, scenarios @ .., tail] = &lines[..] else { bail!("too few lines: {output}") };
    let mut stalls = 0;
    for scenario in scenarios {
        check_scenario(scenario).with_context(|| format!("{scenario}"))?;
        stalls += number(&scenario["stalls"])?;
    }
    let mode = head["mode"].as_str().context("no mode")?;
    ensure!(scenarios.len() > 20, "only {} scenarios", scenarios.len());
    // The last two came to a loop that waited for them.
    let heard = number(&tail["heard"])?;
    ensure!(
        heard == 2 && number(&tail["events"])? + heard == stalls,
        "{stalls} stalls, and other events: {tail}"
    );
    ensure!(tail["events_lost"] == 0 && tail["standing"] == 0, "{tail}");
    ensure!(number(&tail["signals"])? > 0, "no signal arrived: {tail}");
    // Every stall had an address, in every context.
    for source in tail["sources"].as_object().context("no sources")?.keys() {
        ensure!(source.ends_with(" address") || source == "io-wq note", "{source}");
    }
    Ok((mode.to_owned(), scenarios.len()))
}

fn check_scenario(scenario: &Value) -> Result<()> {
    let changes = scenario["changes"].as_array().context("no changes")?;
    ensure!(changes.len() == 1, "one histogram should have changed");
    let change = &changes[0];
    for field in ["port", "kind", "context"] {
        ensure!(change[field] == scenario[field], "another {field}: {}", change[field]);
    }
    let stalls = number(&scenario["stalls"])?;
    ensure!(number(&change["count"])? == stalls, "{} stalls counted, not {stalls}", change["count"]);
    let (after, wall) = (number(&scenario["after_us"])?, number(&scenario["wall_us"])?);
    let mut total = 0;
    for slot in change["slots"].as_array().context("no slots")? {
        let (slot, count) = (number(&slot[0])?, number(&slot[1])?);
        total += count;
        let shortest = if slot == 0 { 0 } else { 1 << slot };
        ensure!((2 << slot) > after, "bucket {slot} is for shorter stalls");
        ensure!(shortest <= wall, "bucket {slot} is for longer stalls");
    }
    ensure!(total == stalls, "buckets count {total}");
    let sum = number(&change["sum_us"])?;
    ensure!(sum >= stalls * after && sum <= wall, "the sum is {sum} µs");
    Ok(())
}

fn number(value: &Value) -> Result<u64> {
    value.as_u64().with_context(|| format!("no number: {value}"))
}
