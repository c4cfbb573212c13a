//! The policy over simulated arrivals: how often the worker sleeps, what it costs, how long packets wait.
#![forbid(unsafe_code)]

use super::*;

/// A round that finds nothing, ns.
const ROUND: u64 = 500;
/// A packet, ns.
const PACKET: u64 = 100;
/// CPU time of a sleep and its wake-up, as in a virtual machine, ns.
const SLEEP: u64 = 14_000;
/// From a notification to the first round after it, ns.
const WAKE: u64 = 10_000;
/// What is simulated, ns.
const TIME: u64 = 400_000_000;

/// xorshift64: the same numbers each time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Exponential with this mean, ns.
    fn exponential(&mut self, mean: f64) -> u64 {
        let uniform = (self.next() >> 11) as f64 / (1u64 << 53) as f64;
        (-(1.0 - uniform).ln() * mean) as u64
    }
}

/// Moments at which packets come, ns, and how many at each.
type Arrivals = Vec<(u64, u32)>;

fn groups(per_second: u64, group: u32) -> Arrivals {
    let gap = 1_000_000_000 * u64::from(group) / per_second;
    (1..TIME / gap).map(|i| (i * gap, group)).collect()
}

fn poisson(per_second: u64) -> Arrivals {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut at, mut all) = (0, Vec::new());
    while at < TIME {
        at += random.exponential(1e9 / per_second as f64);
        all.push((at, 1));
    }
    all
}

#[derive(Debug, Default)]
struct Outcome {
    /// Of the CPU, percent.
    cpu: u64,
    /// Each second.
    sleeps: u64,
    /// Mean, from a packet's arrival to the round that finds it, ns.
    latency: u64,
}

fn simulate(mode: Poll, arrivals: &Arrivals) -> Outcome {
    let start = Instant::now();
    let mut polling = Polling::new(mode);
    let (mut now, mut cpu, mut sleeps, mut waited, mut packets) = (0, 0, 0, 0, 0);
    let mut next = arrivals.iter().peekable();
    while now < TIME {
        let mut came = 0;
        while let Some((at, count)) = next.next_if(|(at, _)| *at <= now) {
            came += count;
            waited += (now - at) * u64::from(*count);
        }
        packets += u64::from(came);
        let goes_on = polling.goes_on(start + Duration::from_nanos(now), came, false);
        let cost = ROUND + PACKET * u64::from(came);
        (now, cpu) = (now + cost, cpu + cost);
        let Some((at, _)) = next.peek() else { break };
        if !goes_on && *at > now {
            (now, cpu, sleeps) = (at + WAKE, cpu + SLEEP, sleeps + 1);
        }
    }
    Outcome { cpu: cpu * 100 / now, sleeps: sleeps * 1_000_000_000 / now, latency: waited / packets.max(1) }
}

fn auto(arrivals: &Arrivals) -> Outcome {
    simulate(Poll::default(), arrivals)
}

#[test]
fn a_stream_never_sleeps() {
    let streams = [
        ("200,000 one by one", groups(200_000, 1)),
        ("100,000 one by one", groups(100_000, 1)),
        ("500,000 in groups of 32", groups(500_000, 32)),
        ("200,000 in groups of 32", groups(200_000, 32)),
        ("100,000 in groups of 16", groups(100_000, 16)),
        ("200,000 at random", poisson(200_000)),
        ("2,000,000 at random", poisson(2_000_000)),
    ];
    for (name, arrivals) in streams {
        let outcome = auto(&arrivals);
        // Finding out that it is one takes a few.
        assert!(outcome.sleeps <= 40, "{name}: {outcome:?}");
        assert!(outcome.latency < 2 * ROUND, "{name}: {outcome:?}");
    }
}

#[test]
fn rare_packets_cost_what_they_cost_without_polling() {
    let rare = [
        ("10,000 one by one", groups(10_000, 1)),
        ("10,000 in groups of 32", groups(10_000, 32)),
        ("10,000 at random", poisson(10_000)),
        ("1,000 in groups of 64", groups(1_000, 64)),
        ("100 one by one", groups(100, 1)),
    ];
    for (name, arrivals) in rare {
        let (outcome, without) = (auto(&arrivals), simulate(Poll::Never, &arrivals));
        assert!(outcome.cpu <= without.cpu + 2, "{name}: {outcome:?}, without: {without:?}");
        assert!(outcome.cpu <= 17, "{name}: {outcome:?}");
    }
}

#[test]
fn what_is_between_costs_no_more_than_packets_pay_for() {
    for rate in [20_000, 30_000, 40_000] {
        for arrivals in [groups(rate, 1), groups(rate, 8), groups(rate, 32), poisson(rate)] {
            let (outcome, without) = (auto(&arrivals), simulate(Poll::Never, &arrivals));
            let paid = rate * PER_PACKET.as_nanos() as u64 / 10_000_000;
            assert!(outcome.cpu <= without.cpu.max(paid) + 5, "{rate}: {outcome:?}, without: {without:?}");
        }
    }
}

#[test]
fn a_request_and_its_answer_do_not_begin_it() {
    // The next request comes when the answer to the last was seen, and some time has passed.
    for think in [30_000, 60_000, 150_000, 1_000_000] {
        let outcome = auto(&groups(1_000_000_000 / think, 1));
        assert!(outcome.sleeps >= 990_000_000 / (think + WAKE), "{think}: {outcome:?}");
    }
}

#[test]
fn never_and_always_are_what_they_say() {
    let arrivals = poisson(300_000);
    assert_eq!(simulate(Poll::Always, &arrivals).sleeps, 0);
    assert!(simulate(Poll::Never, &arrivals).sleeps > 10_000);
    let idle = vec![(1000, 1), (TIME, 1)];
    assert!(simulate(Poll::Never, &idle).cpu == 0 && auto(&idle).cpu == 0);
    assert_eq!(simulate(Poll::Always, &idle).cpu, 100);
}

#[test]
fn it_ends_when_the_stream_does() {
    let start = Instant::now();
    let mut polling = Polling::new(Poll::default());
    let at = |us: u64| start + Duration::from_micros(us);
    for us in 0..10_000 {
        polling.goes_on(at(us), 4, false);
    }
    assert!(polling.goes_on(at(10_000), 0, false));
    let end = (10_000..).find(|us| !polling.goes_on(at(*us), 0, false)).expect("an end");
    assert!(end <= 10_200, "{end}");
    // One packet later, it does not begin again.
    assert!(!polling.goes_on(at(20_000), 1, false));
    assert!(polling.goes_on(at(20_001), 10, true), "there is work");
}

#[test]
fn a_short_bound_is_kept() {
    let outcome = simulate(Poll::Auto(Duration::from_micros(20)), &groups(500_000, 32));
    assert!(outcome.sleeps > 15_000, "{outcome:?}");
    let outcome = simulate(Poll::Auto(Duration::from_micros(20)), &groups(500_000, 4));
    assert!(outcome.sleeps < 10, "{outcome:?}");
    let outcome = simulate(Poll::Auto(Duration::from_millis(1)), &groups(100_000, 64));
    assert!(outcome.sleeps < 40, "{outcome:?}");
}

/// A stream on a CPU that somebody else takes for so long, ms, every 8 ms, or that stops altogether. The moments at which
/// the worker turns to sleeping and back, ms.
fn shared(taken: u64, stops: u64, end: u64) -> Vec<u64> {
    let start = Instant::now();
    let mut polling = Polling::new(Poll::default());
    let (mut us, mut cpu, mut turns, mut polls) = (0, 0, Vec::new(), true);
    while us < end * 1000 {
        let now = start + Duration::from_micros(us);
        if polling.asks_for_cpu_time(now) {
            polling.ran(now, Duration::from_micros(cpu));
        }
        if std::mem::replace(&mut polls, polling.goes_on(now, 10, false)) != polls {
            turns.push(us / 1000);
        }
        if us % 8000 == 0 {
            us += (taken + stops) * 1000;
            cpu += stops * 1000;
        }
        (us, cpu) = (us + 10, cpu + 10);
    }
    turns
}

#[test]
fn a_shared_cpu_is_left_to_others() {
    assert!(shared(0, 0, 3000).is_empty(), "ours alone");
    assert!(shared(0, 4, 3000).is_empty(), "a virtual CPU that stands still has nobody else on it");
    let turns = shared(4, 0, 3000);
    let pauses: Vec<_> =
        turns.chunks(2).filter(|turn| turn.len() == 2).map(|turn| turn[1] - turn[0]).collect();
    assert!(pauses.len() >= 5, "{turns:?}");
    for (pause, want) in pauses.iter().zip([50, 100, 200, 400, 800, 1600]) {
        assert!((want..want + 5).contains(pause), "{turns:?}");
    }
    let polled: u64 = turns.windows(2).skip(1).step_by(2).map(|turn| turn[1] - turn[0]).sum();
    assert!(polled < 100, "{turns:?}");
}
