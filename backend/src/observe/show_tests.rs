//! What people and scripts see of a snapshot.
#![forbid(unsafe_code)]

use super::*;
use crate::observe::json;
use ebpf_common::LAYOUT;
use ebpf_common::faults::{Meta, Stall};

fn snapshot() -> Snapshot {
    let mut ring = Hist { count: 20, sum_ns: 9_240_000, max_ns: 560_000, ..Hist::EMPTY };
    (ring.slots[8], ring.slots[9], ring.sources[0]) = (19, 1, 20);
    let mut buffer = Hist { count: 3, sum_ns: 30_000_000, max_ns: 20_238_000, ..Hist::EMPTY };
    (buffer.slots[12], buffer.slots[14], buffer.sources[2], buffer.sources[0]) = (2, 1, 1, 2);
    let stall = Stall {
        since_ns: 1_000_000_000,
        start_ns: 1_000_000_000,
        slept_ns: 0,
        address: 0x7000,
        completed: 0,
        port: 0,
        kind: kind::RING,
        context: context::WORKER,
        source: source::ADDRESS,
        part: 1,
        reserved: 0,
    };
    Snapshot {
        instance: "web".into(),
        meta: Meta { layout: LAYOUT, mode: mode::TRACEPOINT, pid: 4711, events_lost: 0, start_time: 1 },
        is_alive: true,
        ports: [(0, "vm1".into()), (1, "database".into())].into(),
        histograms: [
            (Key { port: 0, kind: kind::RING, context: context::WORKER }, ring),
            (Key { port: 1, kind: kind::PACKET_BUFFER, context: context::IO_WQ }, buffer),
        ]
        .into(),
        standing: vec![(4713, stall)],
        now_ns: 3_500_000_000,
    }
}

#[test]
fn the_page_has_names_bars_and_who_stands_still() {
    let expected = "\
instance web: process 4711, measured by tracepoint; kinds by the faulting address (22), the fault engine's note (1)

vm1       ring           worker  20 stalls, mean 462 µs, 99 % within 560 µs, longest 560 µs, 9.24 ms together
    256 µs │████████████████████████████████████████  19
    512 µs │██                                         1

database  packet-buffer  io-wq   3 stalls, mean 10.0 ms, 99 % within 20.2 ms, longest 20.2 ms, 30.0 ms together
      4 ms │████████████████████████████████████████  2
      8 ms │                                          0
     16 ms │████████████████████                      1

standing still now:
    2.50 s  vm1  ring  worker (thread 4713)
";
    assert_eq!(page(&snapshot(), None), expected);
}

#[test]
fn a_dead_process_is_called_so_and_stands_no_more() {
    let mut snapshot = snapshot();
    snapshot.is_alive = false;
    snapshot.histograms.clear();
    snapshot.meta.mode = mode::FENTRY;
    let expected = "\
instance web: process 4711 (has ended; this is what it measured), measured by fentry

no stall so far
";
    assert_eq!(page(&snapshot, None), expected);
}

#[test]
fn changes_since_a_moment_before() {
    let now = snapshot();
    let mut before = now.histograms.clone();
    let key = Key { port: 0, kind: kind::RING, context: context::WORKER };
    if let Some(hist) = before.get_mut(&key) {
        hist.count -= 2;
        hist.slots[8] -= 2;
        hist.sources[0] -= 2;
        hist.sum_ns -= 900_000;
    }
    let rest = since(&now, &before);
    assert_eq!(rest.histograms.len(), 1);
    assert_eq!((rest.histograms[&key].count, rest.histograms[&key].max_ns), (2, 512_000));
    let page = page(&since(&now, &now.histograms), Some(Duration::from_secs(2)));
    assert!(page.contains("\nno stall in the last 2 s\n"), "{page}");
}

#[test]
fn json_is_what_the_header_says() {
    let value = json::value(&snapshot(), None);
    let text = r#"{"instance":"web","layout":1,"process":{"pid":4711,"alive":true},"mode":"tracepoint","events_lost":0,
        "stalls":[
         {"port":"vm1","kind":"ring","context":"worker","count":20,"sum_ns":9240000,"mean_ns":462000,"max_ns":560000,
          "p50_ns":512000,"p99_ns":560000,
          "buckets":[{"from_us":256,"below_us":512,"count":19},{"from_us":512,"below_us":1024,"count":1}],
          "sources":{"address":20,"request":0,"note":0,"none":0}},
         {"port":"database","kind":"packet-buffer","context":"io-wq","count":3,"sum_ns":30000000,"mean_ns":10000000,
          "max_ns":20238000,"p50_ns":8192000,"p99_ns":20238000,
          "buckets":[{"from_us":4096,"below_us":8192,"count":2},{"from_us":16384,"below_us":32768,"count":1}],
          "sources":{"address":2,"request":0,"note":1,"none":0}}],
        "standing":[{"tid":4713,"port":"vm1","kind":"ring","context":"worker","address":"0x7000","for_ns":2500000000}]}"#;
    let expected: serde_json::Value = serde_json::from_str(text).unwrap();
    assert_eq!(value, expected);
    let watched = json::value(&snapshot(), Some(Duration::from_millis(500)));
    assert_eq!(watched["interval_s"], 0.5);
}
