//! A load's numbers: taken in intervals, printed for people and as JSON.
#![forbid(unsafe_code)]

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::Common;
use super::meter::Counted;
use crate::report::Spread;

/// Intervals of a measurement: how far they are apart says how steady it was.
const INTERVALS: usize = 10;

/// What was measured.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Whether packets were sent.
    pub sends: bool,
    /// Whether they were received.
    pub receives: bool,
    /// By intervals.
    pub counted: Vec<Counted>,
    /// Packets that were looked into.
    pub checked: Option<u64>,
    /// Notifications that the device wanted, warm-up included.
    pub kicks: u64,
}

#[derive(Serialize)]
struct Json<'a> {
    socket: &'a Path,
    packed: bool,
    ring_size: u16,
    burst: u16,
    frame_bytes: usize,
    touch: super::Touch,
    seconds: f64,
    sent: u64,
    received: u64,
    received_bytes: u64,
    lost: u64,
    tx_mpps: Option<f64>,
    rx_mpps: Option<f64>,
    /// By intervals.
    tx_mpps_intervals: Option<Spread>,
    /// By intervals.
    rx_mpps_intervals: Option<Spread>,
    idle_share: f64,
    kicks: u64,
    checked: Option<u64>,
}

/// Warms up, then measures.
pub fn measure(
    common: &Common,
    ticks_per_second: f64,
    mut run: impl FnMut(u64) -> Result<Counted>,
) -> Result<Vec<Counted>> {
    run((common.warm_up * ticks_per_second) as u64)?;
    let each = (common.seconds / INTERVALS as f64 * ticks_per_second) as u64;
    (0..INTERVALS).map(|_| run(each)).collect()
}

fn sum(counted: &[Counted]) -> Counted {
    let mut all = Counted::default();
    for c in counted {
        all.seconds += c.seconds;
        all.sent += c.sent;
        all.received += c.received;
        all.received_bytes += c.received_bytes;
        all.lost += c.lost;
        all.idle_share += c.idle_share * c.seconds;
    }
    all.idle_share /= all.seconds;
    all
}

/// Prints it; fails if nothing moved.
pub fn publish(common: &Common, outcome: &Outcome) -> Result<()> {
    let all = sum(&outcome.counted);
    let spread = |wanted: bool, rate: fn(&Counted) -> f64| {
        wanted.then(|| Spread::of(outcome.counted.iter().map(rate)))
    };
    let json = Json {
        socket: &common.socket,
        packed: common.packed,
        ring_size: common.ring_size,
        burst: common.burst,
        frame_bytes: common.frame(),
        touch: common.touch,
        seconds: all.seconds,
        sent: all.sent,
        received: all.received,
        received_bytes: all.received_bytes,
        lost: all.lost,
        tx_mpps: outcome.sends.then_some(all.sent_mpps()),
        rx_mpps: outcome.receives.then_some(all.received_mpps()),
        tx_mpps_intervals: spread(outcome.sends, Counted::sent_mpps),
        rx_mpps_intervals: spread(outcome.receives, Counted::received_mpps),
        idle_share: all.idle_share,
        kicks: outcome.kicks,
        checked: outcome.checked,
    };
    write(common.json.as_deref(), &json, &text(&json))?;
    ensure!(!outcome.sends || all.sent > 0, "the back-end has taken no packet");
    ensure!(!outcome.receives || all.received > 0, "no packet came from the back-end");
    Ok(())
}

/// Text to stdout, JSON to where it is wanted; JSON on stdout stands alone.
fn write(path: Option<&Path>, json: &impl Serialize, text: &str) -> Result<()> {
    let Some(path) = path else {
        print!("{text}");
        return Ok(());
    };
    let json = serde_json::to_string_pretty(json)?;
    if path == Path::new("-") {
        println!("{json}");
        return Ok(());
    }
    print!("{text}");
    std::fs::write(path, json).with_context(|| path.display().to_string())
}

fn text(j: &Json<'_>) -> String {
    let mut out = String::new();
    for (name, rate) in [("to the back-end", &j.tx_mpps_intervals), ("from it", &j.rx_mpps_intervals)] {
        if let Some(rate) = rate {
            out.push_str(&format!("{name}: {} Mpps\n", rate.show(2)));
        }
    }
    let idle = j.idle_share * 100.0;
    let whose = if j.idle_share >= 0.5 { "the back-end's limit" } else { "the front-end's limit, or nearly" };
    out.push_str(&format!("front-end idle {idle:.0} % of {:.1} s: {whose}; {} kicks\n", j.seconds, j.kicks));
    if let Some(checked) = j.checked {
        out.push_str(&format!("{checked} packets looked into: all good\n"));
    }
    out
}
