//! What goes wrong in a postcopy migration, and what is done again: a cut link, a killed back-end, a cancelled migration, and
//! one migration after the other.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{
    Backend, BackendConfig, Filled, GUEST_IP, Lab, Migration, NetNs, PATIENCE, Phases, Pinger, Place,
    Postcopy, Qemu, QemuConfig, Relay, bridged, is_ours, scenario, there_and_back, until,
};
use serde_json::json;

const TAPS: [&str; 3] = ["tap0", "tap1", "tap2"];
const PING_INTERVAL: Duration = Duration::from_millis(20);
/// MiB of random guest memory whose checksum must survive.
const FILLED_MIB: u32 = 24;
/// Bytes per second that leave time for an accident in the middle.
const SLOW_LINK: u64 = 8 << 20;
/// Bytes per second of a link that is no limit.
const FAST_LINK: u64 = 1 << 30;
/// Numbers of the messages POSTCOPY_ADVISE, POSTCOPY_LISTEN and POSTCOPY_END.
const ADVISE: u32 = 28;
const LISTEN: u32 = 29;
const END: u32 = 30;

/// The network between the hosts fails in the middle, and the migration goes on over another.
#[test]
fn postcopy_recovers_after_a_cut_link() {
    scenario("postcopy_recovers_after_a_cut_link", |lab| {
        let netns = bridged(&TAPS[..2])?;
        let mut source = Place::start(lab, &netns, TAPS[0], |_| {})?;
        let filled = Filled::write(&mut source.qemu, FILLED_MIB)?;
        let mut destination = Place::start(lab, &netns, TAPS[1], |config| config.is_incoming = true)?;
        let pinger = Pinger::start(&netns, GUEST_IP, PING_INTERVAL)?;
        pinger.wait_answers(5, PATIENCE)?;

        let far = Postcopy::address(lab, &destination.qemu);
        let link = Relay::start(&lab.path("link"), &far, Duration::ZERO, FAST_LINK)?;
        let postcopy = Postcopy {
            bandwidth: SLOW_LINK,
            postcopy_bandwidth: SLOW_LINK,
            via: Some(link.uri()),
            ..Postcopy::default()
        };
        postcopy.start(lab, &mut source.qemu, &mut destination.qemu)?;
        postcopy.switch(&mut source.qemu)?;
        until("the guest to use its memory", PATIENCE, || {
            Ok((source.qemu.migration()?["ram"]["postcopy-requests"].as_u64() > Some(5)).then_some(()))
        })?;
        link.cut();
        let cut = Instant::now();
        Postcopy::recover(lab, &mut source.qemu, &mut destination.qemu)?;
        Postcopy::default().apply(&mut source.qemu)?;
        let report = postcopy.finish(&mut source.qemu, &mut destination.qemu)?;
        println!("complete {:.1} s after the cut: {report:?}", cut.elapsed().as_secs_f32());
        println!("{:#?}", Phases::of(&destination.backend));
        pinger.wait_answers(5, PATIENCE)?;
        source.stop()?;
        filled.check(&mut destination.qemu)?;
        there_and_back(&netns, &mut destination.qemu, 2_000_000)?;
        ensure!(pinger.stop()?.corrupted == 0, "pings came back changed");
        Phases::of(&destination.backend).check()?;
        destination.stop()
    });
}

/// The guest has moved, and its back-end is gone: the memory arrives all the same, the guest lives, and a back-end that is
/// started after that has it on the network again.
#[test]
fn postcopy_back_end_killed() {
    scenario("postcopy_back_end_killed", |lab| {
        let netns = bridged(&TAPS[..2])?;
        let reconnect = |config: &mut QemuConfig| config.reconnect_ms = Some(200);
        let mut source = Place::start(lab, &netns, TAPS[0], reconnect)?;
        let filled = Filled::write(&mut source.qemu, FILLED_MIB)?;
        let mut restart = None;
        let mut destination = Place::start_with(lab, &netns, TAPS[1], |backend, config| {
            reconnect(config);
            config.is_incoming = true;
            restart = Some(backend.clone());
        })?;
        let pinger = Pinger::start(&netns, GUEST_IP, PING_INTERVAL)?;
        pinger.wait_answers(5, PATIENCE)?;

        let slow = Postcopy { bandwidth: SLOW_LINK, postcopy_bandwidth: SLOW_LINK, ..Postcopy::default() };
        slow.start(lab, &mut source.qemu, &mut destination.qemu)?;
        slow.switch(&mut source.qemu)?;
        until("the back-end to ask for pages", PATIENCE, || {
            Ok(Phases::of(&destination.backend)
                .lines
                .iter()
                .any(|line| line.starts_with("armed"))
                .then_some(()))
        })?;
        destination.backend.kill()?;
        let report = slow.finish(&mut source.qemu, &mut destination.qemu)?;
        println!("without its back-end: {report:?}\n{}", destination.qemu.output());
        ensure!(
            destination.qemu.output().to_lowercase().contains("vhost"),
            "QEMU says nothing about its back-end: {}",
            destination.qemu.output()
        );
        filled.check(&mut destination.qemu)?;
        source.stop()?;
        // Not before the end: to a new back-end, memory that has not arrived would look like zeros.
        destination.backend = Backend::start(lab, &netns, &restart.context("it was started")?)?;
        pinger.wait_answers(5, PATIENCE)?;
        there_and_back(&netns, &mut destination.qemu, 2_000_000)?;
        ensure!(pinger.stop()?.corrupted == 0, "pings came back changed");
        destination.stop()
    });
}

/// Cancelled while the guest still runs on the source, then done again to a fresh destination on the same back-end.
#[test]
fn postcopy_cancelled_before_the_switch() {
    scenario("postcopy_cancelled_before_the_switch", |lab| {
        let netns = bridged(&TAPS[..2])?;
        let mut hosts = hosts(lab, &netns, &TAPS[..2])?;
        let mut guest = hosts[0].boot(lab)?;
        let filled = Filled::write(&mut guest, FILLED_MIB)?;
        let pinger = Pinger::start(&netns, GUEST_IP, PING_INTERVAL)?;
        pinger.wait_answers(5, PATIENCE)?;

        let mut next = hosts[1].receive(lab)?;
        let slow = Postcopy { bandwidth: SLOW_LINK, ..Postcopy::default() };
        slow.start(lab, &mut guest, &mut next)?;
        until("the back-end to be advised", PATIENCE, || {
            Ok((!Phases::of(&hosts[1].backend).lines.is_empty()).then_some(()))
        })?;
        guest.qmp.execute("migrate_cancel", json!({}))?;
        Postcopy::wait_status(&mut guest, "cancelled")?;
        pinger.wait_answers(5, PATIENCE).context("after it was cancelled")?;
        // QEMU ends, or not, when its migration does.
        drop(next);
        hosts[1].wait_free()?;

        let mut next = hosts[1].receive(lab)?;
        let report = Postcopy::default().run(lab, &mut guest, &mut next)?;
        println!("{report:?}\n{:#?}", Phases::of(&hosts[1].backend));
        pinger.wait_answers(5, PATIENCE).context("after it was done again")?;
        drop(guest);
        filled.check(&mut next)?;
        there_and_back(&netns, &mut next, 2_000_000)?;
        ensure!(pinger.stop()?.corrupted == 0, "pings came back changed");
        Phases::of(&hosts[1].backend).check()?;
        drop(next);
        hosts.into_iter().try_for_each(|host| host.backend.stop_cleanly())
    });
}

/// Precopy to the second host, postcopy to the third, precopy back to the first: each back-end stays, is destination and
/// source in turn, and logs dirty pages after its postcopy.
#[test]
fn postcopy_between_two_precopies() {
    scenario("postcopy_between_two_precopies", |lab| {
        let netns = bridged(&TAPS)?;
        let hosts = hosts(lab, &netns, &TAPS)?;
        let mut guest = hosts[0].boot(lab)?;
        let filled = Filled::write(&mut guest, FILLED_MIB)?;
        let pinger = Pinger::start(&netns, GUEST_IP, PING_INTERVAL)?;
        pinger.wait_answers(5, PATIENCE)?;
        for (place, is_postcopy) in [(1, false), (2, true), (0, false)] {
            let mut next = hosts[place].receive(lab)?;
            if is_postcopy {
                println!("{:?}", Postcopy::default().run(lab, &mut guest, &mut next)?);
                println!("{:#?}", Phases::of(&hosts[place].backend));
            } else {
                // As an operator's tool does: allowed, and not needed.
                Postcopy::allow(&mut guest, &mut next)?;
                println!("{:?}", Migration::default().run(lab, &mut guest, &mut next)?);
            }
            pinger.wait_answers(5, PATIENCE).with_context(|| format!("on host {place}"))?;
            guest = next;
            filled.check(&mut guest)?;
            there_and_back(&netns, &mut guest, 1_000_000)?;
        }
        ensure!(pinger.stop()?.corrupted == 0, "pings came back changed");
        drop(guest);
        hosts.into_iter().try_for_each(|host| host.backend.stop_cleanly())
    });
}

/// Postcopy is allowed, and precopy comes to its end first. QEMU has sent ADVISE then, and sends neither LISTEN nor END: to the
/// destination's back-end it is over when the rings start, and nothing of it is left for what comes later on the same connection.
#[test]
fn postcopy_allowed_and_not_needed() {
    scenario("postcopy_allowed_and_not_needed", |lab| {
        let netns = bridged(&TAPS[..2])?;
        let hosts = hosts(lab, &netns, &TAPS[..2])?;
        let mut guest = hosts[0].boot(lab)?;
        let filled = Filled::write(&mut guest, FILLED_MIB)?;
        let pinger = Pinger::start(&netns, GUEST_IP, PING_INTERVAL)?;
        pinger.wait_answers(5, PATIENCE)?;
        let mut next = hosts[1].receive(lab)?;
        Postcopy::allow(&mut guest, &mut next)?;
        trace_messages(&mut next)?;
        println!("{:?}", Migration::default().run(lab, &mut guest, &mut next)?);
        pinger.wait_answers(5, PATIENCE)?;
        let told = messages(&next);
        let postcopy: Vec<u32> = told.iter().copied().filter(|n| (ADVISE..=END).contains(n)).collect();
        ensure!(postcopy == [ADVISE], "QEMU has said {told:?}");
        over_unused(&hosts[1].backend)?;
        drop(guest);
        let mut guest = next;
        filled.check(&mut guest)?;
        // Rings stop and start again.
        for up in [false, true] {
            guest.qmp.execute("set_link", json!({ "name": "n0", "up": up }))?;
        }
        pinger.wait_answers(5, PATIENCE).context("after its link was down")?;
        there_and_back(&netns, &mut guest, 1_000_000)?;
        let told = messages(&guest);
        ensure!(!told.contains(&LISTEN) && !told.contains(&END), "QEMU has said {told:?}");
        over_unused(&hosts[1].backend)?;
        // Later ones, from there and back to there, are postcopy.
        for place in [0, 1] {
            let mut next = hosts[place].receive(lab)?;
            println!("{:?}", Postcopy::default().run(lab, &mut guest, &mut next)?);
            guest = next;
            pinger.wait_answers(5, PATIENCE).with_context(|| format!("on host {place}"))?;
            filled.check(&mut guest)?;
        }
        there_and_back(&netns, &mut guest, 1_000_000)?;
        ensure!(pinger.stop()?.corrupted == 0, "pings came back changed");
        drop(guest);
        for host in &hosts {
            let log = host.backend.output();
            ensure!(!log.contains("refused"), "a real QEMU was refused something: {log}");
        }
        hosts.into_iter().try_for_each(|host| host.backend.stop_cleanly())
    });
}

/// The first migration to a back-end has had its advice, and was over without it.
fn over_unused(backend: &Backend) -> Result<()> {
    let lines = Phases::of(backend).lines;
    let as_told = matches!(&lines[..], [first, last] if first == "advised" && last.starts_with("not needed"));
    ensure!(as_told || !is_ours(), "the back-end's phases: {lines:?}");
    Ok(())
}

/// Has QEMU print each message that it sends to its back-end.
fn trace_messages(qemu: &mut Qemu) -> Result<()> {
    let event = json!({ "name": "vhost_user_write", "enable": true });
    qemu.qmp.execute("trace-event-set-state", event).map(drop)
}

/// The numbers of the messages that it has sent since.
fn messages(qemu: &Qemu) -> Vec<u32> {
    let output = qemu.output();
    let numbers = output.lines().filter_map(|line| line.split_once("vhost_user_write req:"));
    numbers.filter_map(|(_, rest)| rest.split(' ').next()?.parse().ok()).collect()
}

/// A back-end that stays while QEMUs come and go.
struct Host {
    backend: Backend,
    config: BackendConfig,
    tap: String,
    visits: std::cell::Cell<u32>,
}

fn hosts(lab: &Lab, netns: &NetNs, taps: &[&str]) -> Result<Vec<Host>> {
    let host = |tap: &&str| {
        let config = BackendConfig::tap(&lab.path(&format!("{tap}.vhost")), tap);
        let backend = Backend::start(lab, netns, &config)?;
        Ok(Host { backend, config, tap: (*tap).to_owned(), visits: std::cell::Cell::new(0) })
    };
    taps.iter().map(host).collect()
}

impl Host {
    fn boot(&self, lab: &Lab) -> Result<Qemu> {
        Qemu::boot(lab, &self.qemu())
    }

    fn receive(&self, lab: &Lab) -> Result<Qemu> {
        Qemu::start(lab, &QemuConfig { is_incoming: true, ..self.qemu() })
    }

    fn qemu(&self) -> QemuConfig {
        let visit = self.visits.replace(self.visits.get() + 1);
        QemuConfig::new(&format!("on-{}-{visit}", self.tap), &self.config.socket)
    }

    /// Waits until the last QEMU's connection is no more.
    fn wait_free(&mut self) -> Result<()> {
        until("the front-end to be gone", PATIENCE, || {
            self.backend.check_alive()?;
            Ok(self.backend.output().contains("front-end disconnected").then_some(()))
        })
    }
}
