//! A snapshot as JSON: what `vhost-user-net faults --json` prints. The shape is stable; fields may be added.
//!
//! ```text
//! { "instance": "web", "layout": 1,
//!   "process": {"pid": 4711, "alive": true},
//!   "mode": "fentry" | "tracepoint" | "tracepoint-idle" | "off",
//!   "interval_s": 1.0,                        only with --watch: what follows are the changes of so long
//!   "events_lost": 0,
//!   "stalls": [                               one for each port, kind and context with stalls
//!     { "port": "vm1" | null,                 null: memory of no port
//!       "kind": "ring" | "indirect-table" | "packet-buffer" | "unknown",
//!       "context": "worker" | "io-wq" | "other",
//!       "count": 20, "sum_ns": 9240000, "mean_ns": 462000, "max_ns": 560000,
//!       "p50_ns": 512000, "p99_ns": 560000,   not above this, to the end of their bucket
//!       "buckets": [{"from_us": 256, "below_us": 512, "count": 19}, ...],
//!       "sources": {"address": 20, "request": 0, "note": 0, "none": 0} } ],
//!   "standing": [                             threads that stand still now
//!     { "tid": 4713, "port": ..., "kind": ..., "context": ..., "address": "0x7f…" | null, "for_ns": 1200000 } ] }
//! ```
#![forbid(unsafe_code)]

use super::hist;
use super::read::Snapshot;
use super::show::name;
use ebpf_common::faults::{Hist, Key, Stall, context, kind, mode, source};
use serde_json::{Value, json};
use std::time::Duration;

/// The snapshot; `interval`: its histograms are the changes of so long.
pub fn value(snapshot: &Snapshot, interval: Option<Duration>) -> Value {
    let meta = &snapshot.meta;
    let mut whole = json!({
        "instance": snapshot.instance,
        "layout": meta.layout,
        "process": { "pid": meta.pid, "alive": snapshot.is_alive },
        "mode": name(&mode::NAMES, meta.mode),
        "events_lost": meta.events_lost,
        "stalls": snapshot.histograms.iter().map(|(key, hist)| stalls(snapshot, key, hist)).collect::<Vec<_>>(),
        "standing": snapshot.standing.iter().map(|(tid, stall)| standing(snapshot, *tid, stall)).collect::<Vec<_>>(),
    });
    if let Some(interval) = interval {
        whole["interval_s"] = json!(interval.as_secs_f64());
    }
    whole
}

fn stalls(snapshot: &Snapshot, key: &Key, h: &Hist) -> Value {
    let buckets: Vec<_> = hist::buckets(h)
        .filter(|(_, count)| *count > 0)
        .map(|(slot, count)| json!({ "from_us": hist::from_us(slot), "below_us": hist::below_us(slot), "count": count }))
        .collect();
    let sources: serde_json::Map<_, _> =
        source::NAMES.iter().zip(h.sources).map(|(name, count)| ((*name).to_owned(), json!(count))).collect();
    json!({
        "port": snapshot.ports.get(&key.port),
        "kind": name(&kind::NAMES, key.kind),
        "context": name(&context::NAMES, key.context),
        "count": h.count,
        "sum_ns": h.sum_ns,
        "mean_ns": hist::mean_ns(h),
        "max_ns": h.max_ns,
        "p50_ns": hist::percentile_ns(h, 50),
        "p99_ns": hist::percentile_ns(h, 99),
        "buckets": buckets,
        "sources": sources,
    })
}

fn standing(snapshot: &Snapshot, tid: u32, stall: &Stall) -> Value {
    json!({
        "tid": tid,
        "port": snapshot.ports.get(&stall.port),
        "kind": name(&kind::NAMES, stall.kind),
        "context": name(&context::NAMES, stall.context),
        "address": (stall.address != 0).then(|| format!("{:#x}", stall.address)),
        "for_ns": snapshot.now_ns.saturating_sub(stall.since_ns) + stall.slept_ns,
    })
}
