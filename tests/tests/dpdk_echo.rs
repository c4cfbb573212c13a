//! Numbered frames go into the tap, through the back-end to DPDK's virtio-user driver, which sends each back with swapped
//! addresses, through the back-end to the tap again: every byte both ways, nothing twice, nothing lost.

use anyhow::{Result, ensure};
use lab::wire::{FOREIGN_MAC, FRAME_MIN, Frame};
use lab::{VirtioUser, Wiring, is_ours, scenario};

const FRAMES: u64 = 20_000;
/// Slow enough for an unoptimised back-end beside other work.
const PER_SECOND: u64 = 10_000;
/// More flows than queues, so that each queue is hit.
const FLOWS: u64 = 61;
const SIZES: [usize; 9] = [FRAME_MIN, 60, 64, 65, 127, 128, 590, 1499, 1514];
const JUMBO_SIZES: [usize; 5] = [64, 2048, 2049, 3500, 4014];
const JUMBO_MTU: u16 = 4000;

fn frames(sizes: &[usize]) -> Vec<Vec<u8>> {
    let make = |n: u64| {
        let size = sizes[(n % sizes.len() as u64) as usize];
        Frame::numbered(n, size, (n % FLOWS) as u16, FOREIGN_MAC)
    };
    (0..FRAMES).map(make).collect()
}

fn echo(name: &str, wiring: Wiring, sizes: &[usize]) {
    scenario(name, |lab| {
        let mut rig = VirtioUser::start(lab, wiring)?;
        // A machine that is busy with other things must not make the tap overflow.
        rig.set_queue_len(FRAMES as u32)?;
        no_loss(&mut rig, &frames(sizes))?;
        rig.stop()
    });
}

fn no_loss(rig: &mut VirtioUser, frames: &[Vec<u8>]) -> Result<()> {
    let before = rig.tap()?;
    let echo = rig.echo(frames, PER_SECOND)?;
    let (after, guest) = (rig.tap()?, rig.stats()?);
    echo.check_unique()?;
    let lost: Vec<u64> = (0..frames.len() as u64).filter(|n| !echo.seen.contains_key(n)).collect();
    ensure!(
        lost.is_empty(),
        "{} of {} frames did not come back, first {:?}; tap {before:?} to {after:?}, front-end {guest:?}",
        lost.len(),
        frames.len(),
        lost.iter().take(10).collect::<Vec<_>>()
    );
    ensure!(guest.rx_packets == frames.len() as u64, "the front-end received {guest:?}");
    ensure!(guest.tx_packets == frames.len() as u64, "the front-end sent {guest:?}");
    Ok(())
}

#[test]
fn dpdk_echo_one_pair() {
    let wiring = Wiring::default();
    echo("dpdk_echo_one_pair", wiring, &SIZES);
}

#[test]
fn dpdk_echo_one_pair_without_mergeable() {
    let wiring = Wiring { mergeable: false, ..Wiring::default() };
    echo("dpdk_echo_one_pair_without_mergeable", wiring, &SIZES);
}

#[test]
fn dpdk_echo_four_pairs() {
    let wiring = Wiring { queue_pairs: 4, ..Wiring::default() };
    echo("dpdk_echo_four_pairs", wiring, &SIZES);
}

#[test]
fn dpdk_echo_four_pairs_without_mergeable() {
    let wiring = Wiring { queue_pairs: 4, mergeable: false, ..Wiring::default() };
    echo("dpdk_echo_four_pairs_without_mergeable", wiring, &SIZES);
}

/// Queue pairs on threads of their own, which hear from the first by MSG_RING.
#[test]
fn dpdk_echo_four_pairs_on_three_workers() {
    let wiring = Wiring { queue_pairs: 4, workers: 3, ..Wiring::default() };
    echo("dpdk_echo_four_pairs_on_three_workers", wiring, &SIZES);
}

/// Frames that need several of the driver's 2 KiB buffers.
#[test]
fn dpdk_echo_jumbo_over_several_buffers() {
    if !is_ours() {
        eprintln!("skipped: net_tap of DPDK 22.11 moves no frame that is longer than one of its buffers");
        return;
    }
    let wiring = Wiring { mtu: JUMBO_MTU, ..Wiring::default() };
    echo("dpdk_echo_jumbo_over_several_buffers", wiring, &JUMBO_SIZES);
}

/// DPDK has a driver of its own for rings in order, which counts used entries and does not look at their ids.
#[test]
fn dpdk_echo_in_order() {
    let wiring = Wiring { in_order: true, ..Wiring::default() };
    echo("dpdk_echo_in_order", wiring, &SIZES);
}

#[test]
fn dpdk_echo_packed() {
    let wiring = Wiring { packed: true, ..Wiring::default() };
    echo("dpdk_echo_packed", wiring, &SIZES);
}

#[test]
fn dpdk_echo_packed_without_mergeable() {
    let wiring = Wiring { packed: true, mergeable: false, ..Wiring::default() };
    echo("dpdk_echo_packed_without_mergeable", wiring, &SIZES);
}

/// One used descriptor stands for all frames of a burst.
#[test]
fn dpdk_echo_packed_in_order() {
    let wiring = Wiring { packed: true, in_order: true, ..Wiring::default() };
    echo("dpdk_echo_packed_in_order", wiring, &SIZES);
}

#[test]
fn dpdk_echo_packed_four_pairs_on_three_workers() {
    let wiring = Wiring { packed: true, queue_pairs: 4, workers: 3, ..Wiring::default() };
    echo("dpdk_echo_packed_four_pairs_on_three_workers", wiring, &SIZES);
}

/// Frames that need several of the driver's 2 KiB buffers, one descriptor each, and chains of descriptors on the way back.
#[test]
fn dpdk_echo_packed_jumbo_over_several_buffers() {
    if !is_ours() {
        eprintln!("skipped: net_tap of DPDK 22.11 moves no frame that is longer than one of its buffers");
        return;
    }
    for in_order in [false, true] {
        let wiring = Wiring { packed: true, in_order, mtu: JUMBO_MTU, ..Wiring::default() };
        echo("dpdk_echo_packed_jumbo_over_several_buffers", wiring, &JUMBO_SIZES);
    }
}

/// As fast as the machine can: what the tap had no room for is lost and counted there, the rest arrives whole and
/// is lost nowhere else.
#[test]
fn dpdk_echo_overload() {
    scenario("dpdk_echo_overload", |lab| {
        let mut rig = VirtioUser::start(lab, Wiring::default())?;
        let before = rig.tap()?;
        let frames = frames(&SIZES);
        let echo = rig.echo(&frames, u64::from(u32::MAX))?;
        let (after, guest) = (rig.tap()?, rig.stats()?);
        echo.check_unique()?;
        let taken = after.tx_packets - before.tx_packets;
        let returned = after.rx_packets - before.rx_packets;
        let told = format!("tap {before:?} to {after:?}, front-end {guest:?}, {} came back", echo.seen.len());
        // DPDK's back-end drops what the front-end has no buffers for at the moment.
        ensure!(guest.rx_packets == taken || !is_ours(), "taken from the tap is not received: {told}");
        ensure!(taken > 0, "nothing arrived: {told}");
        ensure!(guest.tx_packets == returned, "sent is not written to the tap: {told}");
        ensure!(echo.seen.len() as u64 == returned, "written to the tap is not captured: {told}");
        rig.stop()
    });
}
