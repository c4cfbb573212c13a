//! Postcopy migration over a link that is too slow: for precopy to come to an end, or for packets not to wait.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::rawfront::{Front, msg};
use lab::{
    Amount, GUEST_IP, HOST_IP, PATIENCE, Phases, Pinger, Place, Postcopy, Qemu, Source, bridged, scenario,
    there_and_back, until,
};
use serde_json::json;

const TAPS: [&str; 2] = ["tap0", "tap1"];
const PING_INTERVAL: Duration = Duration::from_millis(20);
/// Bytes per second of a link that does not keep up, and of traffic on which it does not.
const SLOW_LINK: u64 = 2_000_000;
const STREAM_RATE: u64 = 6_000_000;
/// The file that the stream goes round in.
const RING_MIB: u32 = 6;
/// How long precopy may try.
const NO_CONVERGENCE: Duration = Duration::from_secs(15);
/// How long the link stays slow.
const SLOW_TIME: Duration = Duration::from_secs(10);

/// The case that postcopy is for: traffic makes the guest's memory change faster than the link copies it.
#[test]
fn postcopy_where_precopy_does_not_converge() {
    scenario("postcopy_where_precopy_does_not_converge", |lab| {
        let netns = bridged(&TAPS)?;
        let mut source = Place::start(lab, &netns, TAPS[0], |_| {})?;
        let mut destination = Place::start(lab, &netns, TAPS[1], |config| config.is_incoming = true)?;
        // What arrives goes round in a file in the guest's memory, and into a checksum.
        let stream = Source::start(&netns, 17, Amount::UntilStopped(STREAM_RATE))?;
        let port = stream.port();
        let round = format!("dd bs=64k count={} iflag=fullblock of=/tmp/ring conv=notrunc", RING_MIB * 16);
        source.qemu.run(&format!(
            "mkfifo /tmp/fifo; (md5sum </tmp/fifo >/tmp/stream; touch /tmp/done) & \
             (nc {HOST_IP} {port} </dev/null | tee /tmp/fifo | \
             while [ ! -e /tmp/done ]; do {round}; done) >/dev/null 2>&1 &"
        ))?;
        let pinger = Pinger::start(&netns, GUEST_IP, PING_INTERVAL)?;
        pinger.wait_answers(5, PATIENCE)?;

        // The first pass is quick; that it never ends by itself is for the slow link to show.
        let first = Postcopy { bandwidth: 24 << 20, downtime_ms: 1, ..Postcopy::default() };
        first.start(lab, &mut source.qemu, &mut destination.qemu)?;
        until("the first pass over guest memory", PATIENCE, || {
            Ok((dirty(&mut source.qemu)?.syncs > 1).then_some(()))
        })?;
        let slow = Postcopy { bandwidth: SLOW_LINK, downtime_ms: 300, ..Postcopy::default() };
        slow.apply(&mut source.qemu)?;
        let began = dirty(&mut source.qemu)?;
        let started = Instant::now();
        let mut seen = began;
        while started.elapsed() < NO_CONVERGENCE || seen.syncs < began.syncs + 3 {
            ensure!(started.elapsed() < PATIENCE, "no passes are made: {began:?}, then {seen:?}");
            std::thread::sleep(Duration::from_secs(1));
            // Fails if precopy has come to its end.
            let now = dirty(&mut source.qemu)?;
            if now.syncs != seen.syncs {
                println!(
                    "{:4.1} s: pass {}, {:.1} MiB to go, {:.1} MB/s change, {:.1} MB/s are copied",
                    started.elapsed().as_secs_f32(),
                    now.syncs,
                    now.remaining as f64 / 1048576.0,
                    now.bytes_per_second as f64 / 1e6,
                    SLOW_LINK as f64 / 1e6
                );
            }
            seen = now;
        }
        ensure!(seen.bytes_per_second > SLOW_LINK, "memory changes slower than the link: {seen:?}");

        let switched = Instant::now();
        slow.switch(&mut source.qemu)?;
        let report = slow.finish(&mut source.qemu, &mut destination.qemu)?;
        println!("postcopy: complete {:.1} s after the switch; {report:?}", switched.elapsed().as_secs_f32());
        println!("{:#?}", Phases::of(&destination.backend));
        pinger.wait_answers(5, PATIENCE)?;
        source.stop()?;
        stream.stop();
        let sent = stream.finish()?;
        let seen =
            destination.qemu.run("while [ ! -e /tmp/done ]; do usleep 50000; done; cat /tmp/stream")?;
        ensure!(seen.contains(&sent.md5), "the stream: sent {sent:?}, the guest has {seen}");
        let pings = pinger.stop()?;
        println!("pings: {pings:?}");
        ensure!(pings.corrupted == 0, "pings came back changed");
        Phases::of(&destination.backend).check()?;
        destination.stop()
    });
}

/// Where precopy stands.
#[derive(Debug, Clone, Copy)]
struct Dirty {
    syncs: u64,
    remaining: u64,
    /// How fast guest memory changes.
    bytes_per_second: u64,
}

fn dirty(source: &mut Qemu) -> Result<Dirty> {
    let state = source.migration()?;
    ensure!(state["status"] == "active", "precopy is {}", state["status"]);
    let number = |key: &str| state["ram"][key].as_u64().unwrap_or_default();
    Ok(Dirty {
        syncs: number("dirty-sync-count"),
        remaining: number("remaining"),
        bytes_per_second: number("dirty-pages-rate") * 4096,
    })
}

/// Pages come so slowly that packets wait for seconds; whoever does not wait for pages notices nothing: the control
/// socket, QEMU's main loop behind it, and another port of the same process.
#[test]
fn postcopy_slow_link() {
    scenario("postcopy_slow_link", |lab| {
        let netns = bridged(&TAPS)?;
        let mut source = Place::start(lab, &netns, TAPS[0], |_| {})?;
        let socket = lab.path("neighbour");
        let mut destination = Place::start_with(lab, &netns, TAPS[1], |backend, qemu| {
            qemu.is_incoming = true;
            backend.neighbour = Some(socket.clone());
        })?;
        let mut neighbour = Front::up(&socket)?;
        let pinger = Pinger::start(&netns, GUEST_IP, PING_INTERVAL)?;
        pinger.wait_answers(5, PATIENCE)?;

        let slow = Postcopy { bandwidth: SLOW_LINK, postcopy_bandwidth: SLOW_LINK, ..Postcopy::default() };
        slow.start(lab, &mut source.qemu, &mut destination.qemu)?;
        slow.switch(&mut source.qemu)?;
        let mut answers = Answers::default();
        let started = Instant::now();
        while started.elapsed() < SLOW_TIME {
            answers.time("QEMU's main loop", || destination.qemu.qmp.execute("query-status", json!({})))?;
            answers.time("the other port's packets", || neighbour.prove_alive(64))?;
            answers.time("the other port's control socket", || {
                Ok(neighbour.wire.ask(msg::GET_FEATURES, &[])?)
            })?;
            // Behind it: SET_VRING_ENABLE, GET_VRING_BASE, and the whole of setting up again, table included.
            for up in [false, true] {
                answers.time("set_link", || {
                    destination.qemu.qmp.execute("set_link", json!({ "name": "n0", "up": up }))
                })?;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let state = destination.qemu.migration()?;
        ensure!(state["status"] == "postcopy-active", "it was over too soon to prove anything: {state}");
        Postcopy::default().apply(&mut source.qemu)?;
        let report = slow.finish(&mut source.qemu, &mut destination.qemu)?;
        pinger.wait_answers(5, PATIENCE)?;
        let pings = pinger.stop()?;
        println!("{report:?}\npings: {pings:?}\n{answers:#?}\n{:#?}", Phases::of(&destination.backend));
        println!("{}", destination.backend.output());
        ensure!(pings.longest_gap > Duration::from_secs(1), "packets did not wait long enough: {pings:?}");
        let worst = answers.0.values().map(|(_, worst)| *worst).max().unwrap_or_default();
        ensure!(worst * 2 < pings.longest_gap, "somebody waited who should not: {answers:?}");
        source.stop()?;
        there_and_back(&netns, &mut destination.qemu, 2_000_000)?;
        drop(neighbour);
        Phases::of(&destination.backend).check()?;
        destination.stop()
    });
}

/// How often something answered, and how long that took at most.
#[derive(Debug, Default)]
struct Answers(BTreeMap<&'static str, (u32, Duration)>);

impl Answers {
    fn time<T>(&mut self, what: &'static str, ask: impl FnOnce() -> Result<T>) -> Result<()> {
        let asked = Instant::now();
        ask().context(what)?;
        let (count, worst) = self.0.entry(what).or_default();
        *count += 1;
        *worst = (*worst).max(asked.elapsed());
        Ok(())
    }
}
