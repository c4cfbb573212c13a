//! A snapshot as text: what `vhost-user-net faults` prints. Pure.
//!
//! ```text
//! instance web: process 4711, measured by tracepoint, kinds by the faulting address
//!
//! vm1  ring  worker    20 stalls, mean 462 µs, 99 % below 560 µs, longest 560 µs, 9.24 ms together
//!     256 µs │██████████████████████████████████████  19
//!     512 µs │██                                       1
//! ```
#![forbid(unsafe_code)]

use super::hist;
use super::read::Snapshot;
use ebpf_common::faults::{Hist, Key, NO_PORT, context, kind, mode, source};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

/// Cells of the longest bar.
const BAR_WIDTH: usize = 40;
/// Threads standing still that are listed.
const STANDING_MAX: usize = 20;

/// A number's name.
pub fn name(names: &[&'static str], number: u32) -> &'static str {
    names.get(number as usize).copied().unwrap_or("?")
}

/// A port's name.
pub fn port(snapshot: &Snapshot, number: u32) -> String {
    match snapshot.ports.get(&number) {
        Some(name) => name.clone(),
        None if number == NO_PORT => "(no port)".into(),
        None => format!("(port {number})"),
    }
}

/// What has come since `before`, by key; nothing is left out but what has not changed.
pub fn since(snapshot: &Snapshot, before: &BTreeMap<Key, Hist>) -> Snapshot {
    let mut rest = snapshot.clone();
    for (key, now) in &mut rest.histograms {
        if let Some(before) = before.get(key) {
            *now = hist::difference(now, before);
        }
    }
    rest.histograms.retain(|_, hist| hist.count > 0);
    rest
}

/// The whole page; `interval`: what is shown are the changes of so long.
pub fn page(snapshot: &Snapshot, interval: Option<Duration>) -> String {
    let mut text = head(snapshot);
    if snapshot.histograms.is_empty() {
        let when = interval.map_or("so far".into(), |time| format!("in the last {} s", time.as_secs_f32()));
        let _ = writeln!(text, "\nno stall {when}");
    }
    let mut width = [0; 3];
    let titles: Vec<_> = snapshot
        .histograms
        .iter()
        .map(|(key, hist)| {
            let title = [
                port(snapshot, key.port),
                name(&kind::NAMES, key.kind).into(),
                name(&context::NAMES, key.context).into(),
            ];
            for (width, word) in width.iter_mut().zip(&title) {
                *width = (*width).max(word.chars().count());
            }
            (title, hist)
        })
        .collect();
    for ([port, kind, context], hist) in titles {
        let _ = write!(text, "\n{port:<0$}  {kind:<1$}  {context:<2$}  ", width[0], width[1], width[2]);
        text.push_str(&summary(hist));
        text.push_str(&bars(hist));
    }
    text.push_str(&standing(snapshot));
    text
}

fn head(snapshot: &Snapshot) -> String {
    let meta = &snapshot.meta;
    let life = if snapshot.is_alive { "" } else { " (has ended; this is what it measured)" };
    let how = match meta.mode {
        mode::TRACEPOINT_IDLE => {
            "not measured now: the tracepoint is attached while a migration needs it (--fault-latency on: always)".into()
        }
        mode::OFF => "not measured".into(),
        known => format!("measured by {}", name(&mode::NAMES, known)),
    };
    let mut text = format!("instance {}: process {}{life}, {how}", snapshot.instance, meta.pid);
    let sources = sources(snapshot);
    if !sources.is_empty() {
        let _ = write!(text, "; kinds by {sources}");
    }
    text.push('\n');
    if meta.events_lost > 0 {
        let _ = writeln!(
            text,
            "{} events did not reach the log; the histograms count all stalls",
            meta.events_lost
        );
    }
    text
}

/// Where the kinds of the stalls shown come from.
fn sources(snapshot: &Snapshot) -> String {
    let mut sums = [0; source::NAMES.len()];
    for hist in snapshot.histograms.values() {
        for (sum, count) in sums.iter_mut().zip(hist.sources) {
            *sum += count;
        }
    }
    let words = |number: usize| match number as u32 {
        source::ADDRESS => "the faulting address",
        source::REQUEST => "the io-wq thread's request",
        source::NOTE => "the fault engine's note",
        _ => "nothing (unknown)",
    };
    let used: Vec<_> = sums.iter().enumerate().filter(|(_, count)| **count > 0).collect();
    if let [(only, _)] = used[..] {
        return words(only).into();
    }
    used.into_iter()
        .map(|(number, count)| format!("{} ({count})", words(number)))
        .collect::<Vec<_>>()
        .join(", ")
}

fn summary(hist: &Hist) -> String {
    let s = if hist.count == 1 { "" } else { "s" };
    format!(
        "{} stall{s}, mean {}, 99 % within {}, longest {}, {} together\n",
        hist.count,
        hist::length(hist::mean_ns(hist)),
        hist::length(hist::percentile_ns(hist, 99)),
        hist::length(hist.max_ns),
        hist::length(hist.sum_ns),
    )
}

fn bars(hist: &Hist) -> String {
    let largest = hist.slots.iter().copied().max().unwrap_or(0);
    let digits = largest.to_string().len();
    let mut text = String::new();
    for (slot, count) in hist::buckets(hist) {
        let bar = hist::bar(count, largest, BAR_WIDTH);
        let _ = writeln!(text, "{:>10} │{bar:<BAR_WIDTH$}  {count:>digits$}", hist::bucket_label(slot));
    }
    text
}

fn standing(snapshot: &Snapshot) -> String {
    if snapshot.standing.is_empty() || !snapshot.is_alive {
        return String::new();
    }
    let mut text = "\nstanding still now:\n".to_owned();
    for (tid, stall) in snapshot.standing.iter().take(STANDING_MAX) {
        let long = snapshot.now_ns.saturating_sub(stall.since_ns) + stall.slept_ns;
        let _ = writeln!(
            text,
            "{:>10}  {}  {}  {} (thread {tid})",
            hist::length(long),
            port(snapshot, stall.port),
            name(&kind::NAMES, stall.kind),
            name(&context::NAMES, stall.context),
        );
    }
    if snapshot.standing.len() > STANDING_MAX {
        let _ = writeln!(text, "{:>10} more threads", snapshot.standing.len() - STANDING_MAX);
    }
    text
}

#[cfg(test)]
#[path = "show_tests.rs"]
mod tests;
