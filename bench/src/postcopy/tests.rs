//! Whole measurements against a back-end in this process, honest and not.
#![forbid(unsafe_code)]

use std::time::Duration;

use super::driver::Direction;
use super::fake::{Fake, Manner};
use super::findings::Wrong;
use super::guest::Backing;
use super::run::{Case, Outcome, measure};
use super::schedule::Link;
use super::second::SecondPort;
use super::suite;
use super::table::{Report, Row};
use super::uffd::Uffd;

const RING: u16 = 32;

fn case(direction: Direction, latency_us: Option<u64>) -> Case {
    let link = Link { latency_ns: latency_us.map(|us| us * 1000), bandwidth: 0, background: 0 };
    Case {
        direction,
        link,
        ring_size: RING,
        buffers: RING.into(),
        frame: 64,
        memory: Backing::Memfd,
        slots: false,
        second: None,
        watch: None,
        rings_arrived: true,
        mergeable: false,
        packets: 500,
        stops: 0,
        stop_within: Duration::from_millis(4),
        steady: Duration::from_millis(50),
        limit: Duration::from_secs(20),
    }
}

/// `None`, with a line that says so, where userfaultfd cannot be had.
fn run(name: &str, manner: Manner, case: &Case) -> Option<Outcome> {
    if let Err(error) = Uffd::new() {
        lab::skip(name, &format!("userfaultfd: {error}"));
        return None;
    }
    let ports = [Fake::start(manner).expect("a port"), Fake::start(Manner::Honest).expect("another port")];
    let sockets = ports.each_ref().map(|fake| fake.socket.clone());
    Some(measure(&sockets, case).unwrap_or_else(|error| panic!("{name}: {error:#}")))
}

fn kinds(outcome: &Outcome) -> Vec<Wrong> {
    outcome.wrong.keys().copied().collect()
}

#[test]
fn an_honest_back_end_that_blocks_has_one_page_outstanding() {
    let Some(out) = run("honest", Manner::Honest, &case(Direction::Tx, Some(1000))) else { return };
    assert!(out.wrong.is_empty(), "{:?}", out.wrong);
    assert_eq!((out.faults.faults, out.faults.placed), (u64::from(RING), u64::from(RING)));
    assert_eq!((out.faults.outstanding_max, out.faults.repeated), (1, 0));
    assert!(out.to_packets_ms.expect("packets") >= f64::from(RING), "one millisecond for each page at least");
    assert!(out.full_rate_pps.is_some() && out.end_ms.is_some());
}

#[test]
fn packets_come_back_whole_with_everything_missing_and_a_stream() {
    let mut case = case(Direction::Echo, Some(500));
    case.rings_arrived = false;
    case.link.background = 20_000;
    case.link.bandwidth = 200_000_000;
    let Some(out) = run("echo", Manner::Honest, &case) else { return };
    assert!(out.wrong.is_empty(), "{:?}", out.wrong);
    assert!(out.used[0] >= 500 && out.faults.placed_background > 0, "{out:?}");
}

#[test]
fn a_ring_that_is_stopped_in_stalls_goes_on_where_it_was() {
    let mut case = case(Direction::Tx, Some(1000));
    (case.stops, case.buffers) = (5, 8 * u64::from(RING));
    let Some(out) = run("stops", Manner::Honest, &case) else { return };
    assert!(out.wrong.is_empty(), "{:?}", out.wrong);
    assert!(!out.stops.is_empty() && out.stops.len() <= 5);
}

#[test]
fn a_back_end_that_never_touches_answers_for_ever() {
    let mut case = case(Direction::Tx, None);
    case.limit = Duration::from_secs(5);
    let Some(out) = run("idle", Manner::Idle, &case) else { return };
    assert!(out.wrong.is_empty(), "{:?}", out.wrong);
    let stuck = out.stuck.expect("for ever");
    assert!(stuck.stop_answered && stuck.usable_again && out.ping.is_some());
}

#[test]
fn a_hole_that_is_filled_at_teardown_is_found() {
    let mut case = case(Direction::Tx, None);
    case.limit = Duration::from_millis(200);
    let Some(out) = run("teardown", Manner::UnregistersFirst, &case) else { return };
    assert_eq!(kinds(&out), [Wrong::HoleGone], "{:?}", out.wrong);
    assert!(!out.stuck.expect("for ever").stop_answered);
}

#[test]
fn a_second_port_sends_while_the_first_stalls() {
    let mut case = case(Direction::Tx, Some(5000));
    case.second = Some(SecondPort::Steady { pps: 20_000 });
    case.watch = Some(Duration::from_millis(200));
    let Some(out) = run("second port", Manner::Honest, &case) else { return };
    assert!(out.wrong.is_empty(), "{:?}", out.wrong);
    let second = out.second.expect("second port");
    for (flow, ms) in [(second.alone, 50), (second.beside, 200)] {
        let due = flow.sent + flow.lost + flow.skipped;
        assert!(flow.sent > 0 && flow.latency.is_some_and(|l| l.p50_us <= l.max_us), "{flow:?}");
        // So many are due in that time; a busy machine makes it longer, never much shorter.
        assert!(due >= ms * 10, "{flow:?}");
    }
    assert!(out.to_packets_ms.is_none() && out.ping.is_some() && out.own_delay.is_some());
}

#[test]
fn a_second_port_that_is_stalled_for_ever_keeps_its_holes() {
    let mut case = case(Direction::Tx, Some(500));
    case.second = Some(SecondPort::Stalled);
    let Some(out) = run("stalled", Manner::Honest, &case) else { return };
    assert!(out.to_packets_ms.is_some());
    assert_eq!(out.second_outstanding, Some(1));
    assert!(out.wrong.is_empty(), "{:?}", out.wrong);
}

#[test]
fn memory_of_other_kinds() {
    let mut case = case(Direction::Tx, Some(200));
    case.memory = Backing::Shm;
    let Some(out) = run("shm", Manner::Honest, &case) else { return };
    assert!(out.wrong.is_empty() && out.to_packets_ms.is_some(), "{:?}", out.wrong);
    case.slots = true;
    let fake = Fake::start(Manner::Honest).expect("a back-end");
    let error = measure(std::slice::from_ref(&fake.socket), &case).expect_err("it offers no slots");
    assert!(error.to_string().contains("CONFIGURE_MEM_SLOTS"), "{error:#}");
}

#[test]
fn numbers_to_reach_are_judged() {
    let base = case(Direction::Tx, Some(5000));
    let mut fast = base.clone();
    fast.link.latency_ns = Some(200_000);
    let Some(out) = run("verdicts", Manner::Honest, &fast) else { return };
    let row = |side, round, ms: f64, outstanding_max| {
        let mut outcome = out.clone();
        outcome.to_packets_ms = Some(ms);
        outcome.faults.outstanding_max = outstanding_max;
        let (label, case, outcome) = ("tx".into(), base.clone(), Ok(outcome));
        Row { side, round, label, case, latency_us: Some(5000), bandwidth: 0, background: 0, outcome }
    };
    let rows = [row("ours", 1, 10.0, 256), row("dpdk", 1, 1320.0, 1), row("ours", 2, 12.0, 190)];
    let verdicts = suite::verdicts(&rows);
    let reached = |what: &str| verdicts.iter().find(|v| v.what.starts_with(what)).expect("verdict").reached;
    assert_eq!(reached("tx: ring start"), Some(true));
    assert_eq!(reached("tx: faults outstanding"), Some(true));
    assert_eq!(reached("tx: 10,000 packets beside"), Some(false), "it never got there");
    assert_eq!((reached("rx: ring start"), reached("second port")), (None, None));
    assert_eq!(reached("runs in which something was wrong"), Some(true));
    let cases = suite::cases(&base);
    assert_eq!(cases.iter().filter(|c| c.second.is_some()).count(), 4);
    assert!(cases.iter().filter(|c| c.stops > 0).all(|c| suite::at_side(c, "dpdk").stops < c.stops));
}

#[test]
fn every_wrong_manner_is_found() {
    let found = [
        (Manner::TouchesBeforeAck, Direction::Tx, vec![Wrong::TouchedBeforeAck]),
        (
            Manner::FillsHole,
            Direction::Tx,
            vec![Wrong::TouchedBeforeAck, Wrong::FilledHole, Wrong::PageChanged],
        ),
        (Manner::Disorder, Direction::Tx, vec![Wrong::RingOrder]),
        (Manner::Zeros, Direction::Echo, vec![Wrong::ZeroPacket]),
        (Manner::FalseBase, Direction::Tx, vec![Wrong::FalseBase]),
    ];
    for (manner, direction, expected) in found {
        let Some(out) = run("wrong manners", manner, &case(direction, Some(200))) else { return };
        assert_eq!(kinds(&out), expected, "{manner:?}: {:?}", out.wrong);
    }
}

#[test]
fn the_report_says_what_was_wrong() {
    let case = case(Direction::Tx, Some(200));
    let Some(out) = run("report", Manner::FillsHole, &case) else { return };
    let mut report = Report::default();
    for (side, outcome) in [("ours", Ok(out)), ("dpdk", Err("not there".to_string()))] {
        let (label, latency_us) = ("tx".into(), Some(200));
        let case = case.clone();
        report.add(Row { side, round: 1, label, case, latency_us, bandwidth: 0, background: 0, outcome });
    }
    assert!(!report.is_clean());
    let text = report.text();
    assert!(text.contains("! ours in round 1: FilledHole × 1"), "{text}");
    assert!(text.contains("! dpdk in round 1: not there") && text.contains("ours/dpdk"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&report.json().expect("JSON")).expect("JSON");
    let ours = &json["rows"][0]["outcome"]["Ok"];
    assert_eq!(ours["faults"]["outstanding_max"], 1);
    assert_eq!(ours["wrong"]["filled-hole"][0], 1);
}
