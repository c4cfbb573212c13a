//! DPDK's virtio driver on both ends of a peer link, passing packets round and round.
#![forbid(unsafe_code)]

use anyhow::{Result, ensure};
use lab::rawfront::{Backend, eventually};
use lab::{Lab, PATIENCE, Testpmd, TestpmdConfig, scenario};
use std::time::Duration;

/// Packets that must pass each port.
const PACKETS: u64 = 200_000;
/// testpmd's first burst of each port: so many are on their way for ever.
const BURST: u64 = 32;

#[test]
fn dpdk_peer_split() {
    scenario("dpdk_peer_split", |lab| round_and_round(lab, "", "", 64));
}

#[test]
fn dpdk_peer_without_mergeable() {
    scenario("dpdk_peer_without_mergeable", |lab| round_and_round(lab, ",mrg_rxbuf=0", ",mrg_rxbuf=0", 1500));
}

/// Each end has another kind of buffers.
#[test]
fn dpdk_peer_mixed() {
    scenario("dpdk_peer_mixed", |lab| round_and_round(lab, ",mrg_rxbuf=0", ",in_order=1", 1500));
}

#[test]
fn dpdk_peer_packed() {
    scenario("dpdk_peer_packed", |lab| round_and_round(lab, ",packed_vq=1", ",packed_vq=1", 64));
}

#[test]
fn dpdk_peer_packed_and_split() {
    let mode = ",packed_vq=1,mrg_rxbuf=0,in_order=1";
    scenario("dpdk_peer_packed_and_split", |lab| round_and_round(lab, mode, "", 1500));
}

fn round_and_round(lab: &Lab, options_a: &str, options_b: &str, bytes: usize) -> Result<()> {
    let port = |name: &str, peer: &str| {
        format!("[[port]]\nname = '{name}'\nsocket = '@/{name}.sock'\nuplink = 'peer:{peer}'\n")
    };
    let mut backend = Backend::with_config(&[port("left", "right"), port("right", "left")].concat())?;
    ensure!(eventually(PATIENCE, || backend.socket("right").exists()), "{}", backend.log_text());
    let mut config = TestpmdConfig::front_end(&backend.socket("left"), 1, options_a);
    config
        .vdevs
        .push(format!("net_virtio_user1,path={},queues=1{options_b}", backend.socket("right").display()));
    let mut testpmd = Testpmd::start(lab, None, &config)?;
    testpmd.command(&format!("set txpkts {bytes}"))?;
    testpmd.command("set fwd io")?;
    testpmd.command("start tx_first")?;
    let passed = eventually(PATIENCE * 3, || {
        std::thread::sleep(Duration::from_millis(100));
        let seen = |testpmd: &mut Testpmd, port| testpmd.stats(port).map_or(0, |stats| stats.rx_packets);
        seen(&mut testpmd, 0) > PACKETS && seen(&mut testpmd, 1) > PACKETS
    });
    testpmd.command("stop")?;
    let stats = [testpmd.stats(0)?, testpmd.stats(1)?];
    ensure!(passed, "packets do not go round: {stats:?}\n{}", backend.summary("left")?);
    for (name, (near, far)) in [("left", (stats[1], stats[0])), ("right", (stats[0], stats[1]))] {
        let counts = backend.counters(name)?;
        let count = |counter: &str| counts.get(counter).copied().unwrap_or(0);
        let lost = near.tx_packets - far.rx_packets;
        ensure!(lost <= 2 * BURST, "{name}: sent and not received: {stats:?}");
        ensure!(near.rx_bytes / near.rx_packets == bytes as u64, "{name}: lengths: {stats:?}");
        let dropped: u64 = ["no_buffers", "no_ring", "too_long", "mtu", "offload"]
            .iter()
            .map(|cause| count(&format!("rx_dropped_{cause}")))
            .sum();
        ensure!(dropped == 0, "{name}: {}", backend.summary(name)?);
    }
    drop(testpmd);
    backend.check_alive()
}
