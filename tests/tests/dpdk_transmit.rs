//! DPDK's virtio-user driver sends: every packet that it handed over is on the tap, whole and once.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::wire::check_udp;
use lab::{VirtioUser, Wiring, scenario};

const QUIET: Duration = Duration::from_millis(300);
/// testpmd's frames are UDP from and to this port.
const PORT: u16 = 9;

fn transmit(name: &str, queue_pairs: u16, mergeable: bool, workers: u16) {
    transmit_over(name, Wiring { queue_pairs, mergeable, workers, ..Wiring::default() });
}

fn transmit_over(name: &str, wiring: Wiring) {
    scenario(name, |lab| {
        let mut rig = VirtioUser::start(lab, wiring)?;
        for bytes in [64, 1500, 333] {
            moment(&mut rig, bytes)?;
        }
        rig.stop()
    });
}

fn moment(rig: &mut VirtioUser, bytes: usize) -> Result<()> {
    let mut capture = rig.capture()?;
    let before = rig.tap()?;
    let queues = rig.send_for_a_moment(bytes)?;
    ensure!(queues.iter().all(|&n| n > 0), "a queue sent nothing: {queues:?}");
    let sent = queues.iter().sum();
    rig.wait_for_tap(before, sent)?;
    let mut captured = 0;
    while let Some(frame) = capture.next(QUIET)? {
        captured += 1;
        ensure!(frame.len() == bytes, "frame {captured} has {} bytes instead of {bytes}", frame.len());
        let udp = check_udp(frame)?;
        ensure!((udp.source, udp.destination) == (PORT, PORT), "frame {captured}: {udp:?}");
    }
    ensure!(capture.lost()? == 0, "the capture lost frames: the test's own fault");
    ensure!(captured == sent, "{captured} frames captured, {sent} sent");
    eprintln!("{bytes} B: {sent} packets, by queue {queues:?}");
    Ok(())
}

#[test]
fn dpdk_transmit_one_pair() {
    transmit("dpdk_transmit_one_pair", 1, true, 1);
}

#[test]
fn dpdk_transmit_one_pair_without_mergeable() {
    transmit("dpdk_transmit_one_pair_without_mergeable", 1, false, 1);
}

#[test]
fn dpdk_transmit_four_pairs() {
    transmit("dpdk_transmit_four_pairs", 4, true, 1);
}

#[test]
fn dpdk_transmit_four_pairs_without_mergeable() {
    transmit("dpdk_transmit_four_pairs_without_mergeable", 4, false, 1);
}

/// Queue pairs on threads of their own, which hear from the first by MSG_RING.
#[test]
fn dpdk_transmit_four_pairs_on_three_workers() {
    transmit("dpdk_transmit_four_pairs_on_three_workers", 4, true, 3);
}

#[test]
fn dpdk_transmit_in_order() {
    transmit_over("dpdk_transmit_in_order", Wiring { in_order: true, ..Wiring::default() });
}

#[test]
fn dpdk_transmit_packed() {
    transmit_over("dpdk_transmit_packed", Wiring { packed: true, ..Wiring::default() });
}

/// One used descriptor stands for all frames of a burst.
#[test]
fn dpdk_transmit_packed_in_order() {
    let wiring = Wiring { packed: true, in_order: true, ..Wiring::default() };
    transmit_over("dpdk_transmit_packed_in_order", wiring);
}
