//! Postcopy migration between two QEMUs, each with its own back-end, while packets flood both ways.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{
    BackendConfig, Backing, Filled, Flood, GUEST_IP, HugePages, Lab, PATIENCE, Phases, Pinger, Place,
    Postcopy, QemuConfig, bridged, bridged_with, scenario, skip, there_and_back,
};

const TAPS: [&str; 2] = ["tap0", "tap1"];
const PING_INTERVAL: Duration = Duration::from_millis(20);
/// MiB of random guest memory whose checksum must survive.
const FILLED_MIB: u32 = 32;
/// Numbered echoes, and what its pktgen sends by itself: what an emulated CPU can do.
const ECHO_BYTES: usize = 1000;
const ECHO_RATE: u64 = 2000;
const PKTGEN_BYTES: usize = 300;
const PKTGEN_RATE: u64 = 4000;

/// Nothing but a ping: the phases, the guest's memory, the pings.
#[test]
fn postcopy_plain() {
    scenario("postcopy_plain", |lab| {
        let netns = bridged(&TAPS)?;
        let mut source = Place::start(lab, &netns, TAPS[0], |_| {})?;
        let filled = Filled::write(&mut source.qemu, FILLED_MIB)?;
        let mut destination = Place::start(lab, &netns, TAPS[1], |config| config.is_incoming = true)?;
        let pinger = Pinger::start(&netns, GUEST_IP, PING_INTERVAL)?;
        pinger.wait_answers(5, PATIENCE)?;

        let report = Postcopy::default().run(lab, &mut source.qemu, &mut destination.qemu)?;
        pinger.wait_answers(5, PATIENCE)?;
        let phases = Phases::of(&destination.backend);
        println!("{report:?}\n{phases:#?}");
        source.stop()?;
        filled.check(&mut destination.qemu)?;
        there_and_back(&netns, &mut destination.qemu, 2_000_000)?;
        let pings = pinger.stop()?;
        println!("pings: {pings:?}");
        ensure!(pings.corrupted == 0, "pings came back changed");
        phases.check()?;
        ensure!(report.blocktime_ms.is_some(), "QEMU says nothing about blocked CPUs");
        destination.stop()
    });
}

/// The seven steps of the test that DPDK's postcopy series came with, packets counted and looked into.
fn seven_steps(
    lab: &Lab,
    is_from_dpdk: bool,
    source: impl FnOnce(&mut BackendConfig, &mut QemuConfig),
    destination: impl FnOnce(&mut BackendConfig, &mut QemuConfig),
) -> Result<()> {
    let netns = match is_from_dpdk {
        // DPDK opens every tap as a multi-queue one.
        true => bridged_with(&[(TAPS[0], true), (TAPS[1], false)])?,
        false => bridged(&TAPS)?,
    };
    // Without checksum offloads, each packet has one that is checked: here by the test, in the guest by its kernel.
    let checksummed = ["csum=off", "guest_csum=off"].map(str::to_owned);
    // 1, 3: the source.
    let mut from = Place::start_with(lab, &netns, TAPS[0], |backend, qemu| {
        qemu.device.extend(checksummed.clone());
        source(backend, qemu);
    })?;
    let filled = Filled::write(&mut from.qemu, FILLED_MIB)?;
    // 2, 4: the destination.
    let mut to = Place::start_with(lab, &netns, TAPS[1], |backend, qemu| {
        qemu.device.extend(checksummed);
        qemu.is_incoming = true;
        destination(backend, qemu);
    })?;
    // 5: packets, both ways.
    let pinger = Pinger::start(&netns, GUEST_IP, PING_INTERVAL)?;
    let echoed = Flood::echoed(&netns, ECHO_BYTES, ECHO_RATE)?;
    let generated = Flood::generated(&netns, &mut from.qemu, "br0", PKTGEN_BYTES, PKTGEN_RATE)?;
    for flood in [&echoed, &generated] {
        flood.wait_arrivals(500, PATIENCE).context("before the migration")?;
    }
    pinger.wait_answers(5, PATIENCE).context("before the migration")?;
    // 6, 7: postcopy.
    let report = Postcopy::default().run(lab, &mut from.qemu, &mut to.qemu)?;
    for flood in [&echoed, &generated] {
        flood.wait_arrivals(500, PATIENCE).context("after the migration")?;
    }
    pinger.wait_answers(5, PATIENCE).context("after the migration")?;
    from.stop()?;
    let (echoed, generated, pings) = (echoed.stop()?, generated.stop()?, pinger.stop()?);
    Flood::quiet(&mut to.qemu)?;
    println!("{report:?}\n{:#?}", Phases::of(&to.backend));
    println!("echoed: {echoed:?}\ngenerated: {generated:?}\npings: {pings:?}");
    echoed.check()?;
    generated.check()?;
    ensure!(pings.corrupted == 0, "pings came back changed");
    filled.check(&mut to.qemu)?;
    let errors = to.qemu.run("grep '^Udp: [0-9]' /proc/net/snmp")?;
    // InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors SndbufErrors InCsumErrors
    let wrong_sums = errors.split_whitespace().nth(7).context("no InCsumErrors")?;
    ensure!(wrong_sums == "0", "the guest has got {wrong_sums} datagrams with a wrong checksum");
    Phases::of(&to.backend).check()?;
    to.stop()
}

#[test]
fn postcopy_seven_steps_memfd() {
    scenario("postcopy_seven_steps_memfd", |lab| seven_steps(lab, false, |_, _| {}, |_, _| {}));
}

#[test]
fn postcopy_seven_steps_packed() {
    let packed = |_: &mut BackendConfig, qemu: &mut QemuConfig| qemu.device.push("packed=on".into());
    scenario("postcopy_seven_steps_packed", |lab| seven_steps(lab, false, packed, packed));
}

#[test]
fn postcopy_seven_steps_shm_file() {
    let file = |_: &mut BackendConfig, qemu: &mut QemuConfig| qemu.backing = Backing::ShmFile;
    scenario("postcopy_seven_steps_shm_file", |lab| seven_steps(lab, false, file, file));
}

#[test]
fn postcopy_seven_steps_hugetlb() {
    let huge = |_: &mut BackendConfig, qemu: &mut QemuConfig| qemu.backing = Backing::Huge2M;
    scenario("postcopy_seven_steps_hugetlb", |lab| {
        // Two guests of 256 MiB, and what QEMU may need besides.
        match HugePages::reserve(520) {
            Ok(_pages) => seven_steps(lab, false, huge, huge),
            Err(reason) => {
                skip("postcopy_seven_steps_hugetlb", &format!("{reason:#}"));
                Ok(())
            }
        }
    });
}

/// From DPDK to ours.
#[test]
fn postcopy_from_dpdk() {
    from_dpdk("postcopy_from_dpdk", &[]);
}

/// DPDK says where it stopped in half as many bits.
#[test]
fn postcopy_from_dpdk_packed() {
    from_dpdk("postcopy_from_dpdk_packed", &["packed=on"]);
}

fn from_dpdk(name: &str, device: &[&str]) {
    scenario(name, |lab| {
        // What only DPDK offers, the guest must not have chosen.
        let common = |qemu: &mut QemuConfig| {
            let all = device.iter().chain(&["guest_ufo=off", "host_ufo=off"]);
            qemu.device.extend(all.map(ToString::to_string));
        };
        seven_steps(
            lab,
            true,
            |backend, qemu| {
                backend.dpdk = Some(",postcopy-support=1".into());
                common(qemu);
            },
            |_, qemu| common(qemu),
        )
    });
}
