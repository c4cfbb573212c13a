//! `cargo xtask demo`: shows on this machine, with real parts, what the program is for.
#![forbid(unsafe_code)]

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{
    Amount, Filled, GUEST_IP, HOST_IP, Lab, Migration, NetNs, PATIENCE, PREFIX, Phases, Pinger, Place,
    Postcopy, Source, backend_binary, bridged, ping, pull, push,
};
use serde_json::json;

use crate::{cargo, privileged, setup};

const TAPS: [&str; 3] = ["tap0", "tap1", "tap2"];
const PINGS: u64 = 20;
const PING_INTERVAL: Duration = Duration::from_millis(20);
const TRANSFER_BYTES: u64 = 50_000_000;
/// MiB of random guest memory whose checksum is compared after the move.
const FILLED_MIB: u32 = 32;
/// Bytes per second of the stream that goes on during the move.
const STREAM_RATE: u64 = 1_000_000;
const LINK: u64 = 16 << 20;
/// Bytes per second of the link of the second move: packets have to wait for their pages.
const SLOW_LINK: u64 = 8 << 20;

/// Arguments of `cargo xtask demo`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The parts are there and we are inside a namespace of our own
    #[arg(long, hide = true)]
    prepared: bool,
}

/// Runs the demonstration.
pub fn run(options: &Options) -> Result<()> {
    if !options.prepared {
        setup::run(setup::Parts::Guest)?;
        println!("demo: building vhost-user-net");
        let built = cargo().args(["build", "--quiet", "--package", "vhost-user-net"]).status()?;
        ensure!(built.success(), "the back-end does not build");
        if !nix::unistd::geteuid().is_root() {
            let shown = privileged(&std::env::current_exe()?).args(["demo", "--prepared"]).status()?;
            ensure!(shown.success(), "the demonstration failed");
            return Ok(());
        }
    }
    let lab = Lab::open()?;
    show(&lab).inspect_err(|_| eprintln!("{}", lab.tails()))
}

/// Collects the report while it tells what it does.
struct Story {
    started: Instant,
    lines: Vec<(String, String)>,
    /// What `vhost-user-net faults` said.
    faults: String,
}

impl Story {
    fn now(&self, what: &str) {
        println!("demo: {:5.1} s  {what}", self.started.elapsed().as_secs_f32());
    }

    fn note(&mut self, what: &str, result: String) {
        self.lines.push((what.to_owned(), result));
    }
}

fn show(lab: &Lab) -> Result<()> {
    let mut story = Story { started: Instant::now(), lines: Vec::new(), faults: String::new() };

    story.now("making a bridge with three taps, in a network namespace of its own");
    let netns = bridged(&TAPS)?;
    story.now("starting vhost-user-net on tap0, and a Linux guest in QEMU on it");
    let booting = Instant::now();
    let mut source = Place::start(lab, &netns, TAPS[0], |_| {})?;
    let boot = booting.elapsed();
    let version = source.qemu.qmp.execute("query-version", json!({}))?;
    let kernel = source.qemu.run("uname -r")?;
    let number = |part: &str| version["qemu"][part].as_u64().unwrap_or_default();
    story.note(
        "guest",
        format!(
            "Linux {kernel} in QEMU {}.{}.{}, up after {:.1} s; {GUEST_IP}, the host is {HOST_IP}/{PREFIX}",
            number("major"),
            number("minor"),
            number("micro"),
            boot.as_secs_f32()
        ),
    );

    story.now("pinging the guest");
    let pings = ping(&netns, GUEST_IP, PINGS, PATIENCE)?;
    story.note(
        "ping",
        format!(
            "{} of {} answered, {:.1} ms on average",
            pings.answered,
            pings.sent,
            milliseconds(pings.mean_rtt)
        ),
    );

    story.now("sending data from the host to the guest");
    let timer = Instant::now();
    let data = pull(&netns, &mut source.qemu, TRANSFER_BYTES, "/tmp/data")?;
    story.note("host to guest", speed(data.bytes, timer.elapsed(), &data.md5));
    story.now("sending it back");
    let timer = Instant::now();
    push(&netns, &mut source.qemu, "/tmp/data", &data)?;
    story.note("guest to host", speed(data.bytes, timer.elapsed(), &data.md5));

    story.now("filling guest memory with random data, starting a stream into the guest");
    source.qemu.run("rm /tmp/data")?;
    let filled = Filled::write(&mut source.qemu, FILLED_MIB)?;
    let stream = Source::start(&netns, 11, Amount::UntilStopped(STREAM_RATE))?;
    let port = stream.port();
    source.qemu.run(&format!(
        "(nc {HOST_IP} {port} </dev/null | md5sum >/tmp/stream; touch /tmp/done) >/dev/null &"
    ))?;

    story.now("starting a second vhost-user-net on tap1, and an empty QEMU on it");
    let mut destination = Place::start(lab, &netns, TAPS[1], |config| config.is_incoming = true)?;
    story.now("migrating the running guest there, pinging it all the while");
    let pinger = Pinger::start(&netns, GUEST_IP, PING_INTERVAL)?;
    pinger.wait_answers(5, PATIENCE)?;
    let migration = Migration { bandwidth: LINK, ..Migration::default() };
    let moved = migration.run(lab, &mut source.qemu, &mut destination.qemu)?;
    pinger.wait_answers(20, PATIENCE).context("the guest does not answer in its new place")?;
    let pings = pinger.stop()?;
    story.note(
        "migration",
        format!(
            "{:.1} s in all, the guest stood still for {} ms; {} MB sent in {} passes over its memory",
            moved.total_ms as f64 / 1e3,
            moved.downtime_ms,
            moved.transferred / 1_000_000,
            moved.dirty_syncs
        ),
    );
    story.note(
        "ping meanwhile",
        format!(
            "{} of {} answered, {} changed, longest silence {:.0} ms",
            pings.answered,
            pings.sent,
            pings.corrupted,
            milliseconds(pings.longest_gap)
        ),
    );
    ensure!(pings.corrupted == 0, "pings came back changed");

    story.now("ending the first QEMU and its back-end");
    let (rx, tx) = netns.packets(TAPS[0])?;
    story.note("tap0", format!("{rx} frames from the guest, {tx} to it"));
    source.stop()?;

    story.now("comparing checksums in the new place");
    filled.check(&mut destination.qemu)?;
    story.note("guest memory", format!("{FILLED_MIB} MiB unchanged by the migration"));
    stream.stop();
    let sent = stream.finish()?;
    let seen = destination.qemu.run("while [ ! -e /tmp/done ]; do usleep 50000; done; cat /tmp/stream")?;
    ensure!(seen.contains(&sent.md5), "the stream: sent {sent:?}, the guest has {seen}");
    story.note(
        "stream meanwhile",
        format!("{:.1} MB over one TCP connection, md5 {} on both sides", mega(sent.bytes), sent.md5),
    );
    let (rx, tx) = netns.packets(TAPS[1])?;
    story.note("tap1", format!("{rx} frames from the guest, {tx} to it"));

    let last = move_by_postcopy(lab, &mut story, &netns, destination)?;

    story.now("cleaning up");
    last.stop()?;
    drop(netns);

    println!("\nWhat happened");
    for (what, result) in &story.lines {
        println!("  {what:<17} {result}");
    }
    println!(
        "\nHow long threads of the back-end waited for guest memory (`vhost-user-net faults --instance {}`)",
        TAPS[2]
    );
    for line in story.faults.lines() {
        println!("  {line}");
    }
    println!("\ndemo: done after {:.0} s", story.started.elapsed().as_secs_f32());
    Ok(())
}

/// Moves the guest on before its memory: it runs in its new place at once, and its packets wait for single pages.
fn move_by_postcopy(lab: &Lab, story: &mut Story, netns: &NetNs, mut source: Place) -> Result<Place> {
    story.now("starting a third vhost-user-net on tap2, and an empty QEMU on it");
    let mut destination = Place::start(lab, netns, TAPS[2], |config| config.is_incoming = true)?;
    let filled = Filled::write(&mut source.qemu, FILLED_MIB)?;
    story.now("moving the guest there by postcopy, before its memory, over a slow link");
    let pinger = Pinger::start(netns, GUEST_IP, PING_INTERVAL)?;
    pinger.wait_answers(5, PATIENCE)?;
    let postcopy = Postcopy { bandwidth: SLOW_LINK, postcopy_bandwidth: SLOW_LINK, ..Postcopy::default() };
    let moved = postcopy.run(lab, &mut source.qemu, &mut destination.qemu)?;
    pinger.wait_answers(20, PATIENCE).context("the guest does not answer in its new place")?;
    let pings = pinger.stop()?;
    ensure!(pings.corrupted == 0, "pings came back changed");
    let phases = Phases::of(&destination.backend);
    phases.check()?;
    story.note(
        "postcopy",
        format!(
            "{:.1} s in all, the guest stood still for {} ms; {} MB sent before it moved, {} MB after",
            moved.total_ms as f64 / 1e3,
            moved.downtime_ms,
            moved.precopy_bytes / 1_000_000,
            moved.postcopy_bytes / 1_000_000
        ),
    );
    for (place, phase) in phases.lines.iter().enumerate() {
        story.note(if place == 0 { "  phases" } else { "" }, phase.clone());
    }
    story.note(
        "  rings",
        format!("stopped for a page {} times ({} pages asked for)", phases.parks, phases.pages),
    );
    story.faults = faults(TAPS[2])?;
    let (blocked, each) = moved.blocktime_ms.context("QEMU tells no blocktime")?;
    story.note(
        "  guest CPUs",
        format!(
            "waited for pages for {each:?} ms, all together for {blocked} ms (QEMU's postcopy-blocktime); {} pages asked for \
             by guest and back-end",
            moved.requests
        ),
    );
    story.note(
        "  ping meanwhile",
        format!(
            "{} of {} answered, {} lost, {} changed, longest silence {:.0} ms",
            pings.answered,
            pings.sent,
            pings.sent - pings.answered,
            pings.corrupted,
            milliseconds(pings.longest_gap)
        ),
    );
    source.stop()?;
    filled.check(&mut destination.qemu)?;
    story.note("  guest memory", format!("{FILLED_MIB} MiB unchanged"));
    Ok(destination)
}

/// What the kernel counted for a back-end that runs, as a person reads it. Instances are named after their socket.
fn faults(instance: &str) -> Result<String> {
    let shown = Command::new(backend_binary()?).args(["faults", "--instance", instance]).output()?;
    let (text, why) = (String::from_utf8_lossy(&shown.stdout), String::from_utf8_lossy(&shown.stderr));
    // Where the kernel allows no such programs the back-end has said so; the demonstration goes on without.
    Ok(if shown.status.success() {
        text.trim_end().to_owned()
    } else {
        format!("not measured here: {}", why.trim())
    })
}

fn speed(bytes: u64, time: Duration, md5: &str) -> String {
    let rate = mega(bytes) / time.as_secs_f64();
    format!("{:.0} MB in {:.1} s ({rate:.1} MB/s), md5 {md5} on both sides", mega(bytes), time.as_secs_f32())
}

fn mega(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
