//! Postcopy migration of devices with several queue pairs, which QEMU hangs in unless it is helped.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{
    BackendConfig, Filled, Flood, GUEST_IP, Lab, PATIENCE, Phases, Pinger, Place, Postcopy, QemuConfig,
    bridged_with, is_ours, scenario, there_and_back,
};
use serde_json::json;

const TAPS: [&str; 2] = ["tap0", "tap1"];
const PING_INTERVAL: Duration = Duration::from_millis(20);
/// MiB of random guest memory whose checksum must survive.
const FILLED_MIB: u32 = 8;
const ECHO_BYTES: usize = 500;
const ECHO_RATE: u64 = 1000;
/// Protocol features that change what QEMU sends, and in which order.
const STATUS: &str = "status";
const SLOTS: &str = "configure-mem-slots";

/// One migration, and the guest's link down and up in the middle, with `pairs` queue pairs and without some features.
fn migrate(name: &str, pairs: u16, without: &[&str]) {
    scenario(name, |lab| {
        let options = |backend: &mut BackendConfig, guest: &mut QemuConfig| {
            backend.queue_pairs = pairs;
            if pairs > 1 {
                backend.extra.push("--postcopy-multiqueue=resend".into());
            }
            backend
                .extra
                .extend(without.iter().map(|feature| format!("--disable-protocol-feature={feature}")));
            guest.queue_pairs = pairs;
            guest.cpus = pairs.into();
        };
        let netns = bridged_with(&TAPS.map(|tap| (tap, pairs > 1)))?;
        let mut source = Place::start_with(lab, &netns, TAPS[0], options)?;
        let filled = Filled::write(&mut source.qemu, FILLED_MIB)?;
        let mut destination = Place::start_with(lab, &netns, TAPS[1], |backend, guest| {
            options(backend, guest);
            guest.is_incoming = true;
        })?;
        let pinger = Pinger::start(&netns, GUEST_IP, PING_INTERVAL)?;
        let echoed = Flood::echoed(&netns, ECHO_BYTES, ECHO_RATE)?;
        echoed.wait_arrivals(100, PATIENCE)?;

        let postcopy = Postcopy::default();
        postcopy.start(lab, &mut source.qemu, &mut destination.qemu)?;
        postcopy.switch(&mut source.qemu)?;
        // The device stops and starts again: its memory is told once more.
        for up in [false, true] {
            destination.qemu.qmp.execute("set_link", json!({ "name": "n0", "up": up }))?;
        }
        let report = postcopy.finish(&mut source.qemu, &mut destination.qemu)?;
        pinger.wait_answers(5, PATIENCE).context("after the migration")?;
        echoed.wait_arrivals(100, PATIENCE).context("after the migration")?;
        println!("{report:?}\n{:#?}", Phases::of(&destination.backend));
        println!("{}", destination.qemu.output());
        source.stop()?;
        let (echoed, pings) = (echoed.stop()?, pinger.stop()?);
        println!("echoed: {echoed:?}\npings: {pings:?}");
        ensure!(echoed.corrupt == 0 && pings.corrupted == 0, "packets came back changed: {echoed:?}");
        filled.check(&mut destination.qemu)?;
        there_and_back(&netns, &mut destination.qemu, 2_000_000)?;
        no_complaints(&destination)?;
        Phases::of(&destination.backend).check()?;
        destination.stop()
    });
}

/// What QEMU says is never refused, and what QEMU reads is what it waits for. (It may fail to find the region of a fault while
/// its further pairs start; that those pages come all the same is what the time of the whole shows.)
fn no_complaints(place: &Place) -> Result<()> {
    let (log, said) = (place.backend.output(), place.qemu.output());
    let refused = log.lines().find(|line| line.contains("refused"));
    ensure!(refused.is_none(), "the back-end has refused what a real QEMU says: {refused:?}");
    let unexpected =
        said.lines().find(|line| line.contains("unexpected msg") || line.contains("falling back"));
    ensure!(unexpected.is_none(), "QEMU has read what it did not wait for: {unexpected:?}");
    Ok(())
}

/// By the table, not by slots.
#[test]
fn postcopy_one_pair_without_slots() {
    migrate("postcopy_one_pair_without_slots", 1, &[SLOTS]);
}

#[test]
fn postcopy_one_pair_without_status_and_slots() {
    migrate("postcopy_one_pair_without_status_and_slots", 1, &[STATUS, SLOTS]);
}

#[test]
fn postcopy_two_pairs() {
    migrate("postcopy_two_pairs", 2, &[]);
}

#[test]
fn postcopy_two_pairs_without_status() {
    migrate("postcopy_two_pairs_without_status", 2, &[STATUS]);
}

#[test]
fn postcopy_two_pairs_without_slots() {
    migrate("postcopy_two_pairs_without_slots", 2, &[SLOTS]);
}

#[test]
fn postcopy_two_pairs_without_status_and_slots() {
    migrate("postcopy_two_pairs_without_status_and_slots", 2, &[STATUS, SLOTS]);
}

#[test]
fn postcopy_four_pairs() {
    migrate("postcopy_four_pairs", 4, &[]);
}

#[test]
fn postcopy_four_pairs_without_status() {
    migrate("postcopy_four_pairs_without_status", 4, &[STATUS]);
}

#[test]
fn postcopy_four_pairs_without_slots() {
    migrate("postcopy_four_pairs_without_slots", 4, &[SLOTS]);
}

#[test]
fn postcopy_four_pairs_without_status_and_slots() {
    migrate("postcopy_four_pairs_without_status_and_slots", 4, &[STATUS, SLOTS]);
}

/// Unless the operator asks for it, several pairs have no postcopy: QEMU refuses it, our log says why, and precopy works.
#[test]
fn postcopy_is_not_offered_for_several_pairs() {
    scenario("postcopy_is_not_offered_for_several_pairs", |lab: &Lab| {
        if !is_ours() {
            return Ok(());
        }
        let netns = bridged_with(&TAPS.map(|tap| (tap, true)))?;
        let options = |backend: &mut BackendConfig, guest: &mut QemuConfig| {
            backend.queue_pairs = 2;
            guest.queue_pairs = 2;
        };
        let mut source = Place::start_with(lab, &netns, TAPS[0], options)?;
        let mut destination = Place::start_with(lab, &netns, TAPS[1], |backend, guest| {
            options(backend, guest);
            guest.is_incoming = true;
        })?;
        let postcopy = Postcopy::default();
        let refused = postcopy
            .start(lab, &mut source.qemu, &mut destination.qemu)
            .and_then(|()| postcopy.switch(&mut source.qemu));
        println!(
            "source: {:?}\n{}{}",
            refused.as_ref().map_err(|e| format!("{e:#}")),
            source.qemu.output(),
            destination.qemu.output()
        );
        let said = format!("{refused:?}{}{}", source.qemu.output(), destination.qemu.output());
        ensure!(refused.is_err() && said.contains("ostcopy"), "QEMU does not say what is wrong: {said}");
        let log = destination.backend.output();
        println!("{log}");
        ensure!(
            log.lines().any(|line| line.contains("postcopy") && line.contains("queue pairs")),
            "the back-end does not say why: {log}"
        );
        source.stop()?;
        drop(destination.qemu);
        destination.backend.stop_cleanly()
    });
}
