//! `host_mtu` reaches the guest and the tap.

use anyhow::ensure;
use lab::{Bed, GUEST_IP, HOST_IP, PATIENCE, ping_whole, scenario, there_and_back};

const MTU: usize = 1400;
/// What IPv4 and ICMP put before the payload.
const HEADERS: usize = 28;

#[test]
fn host_mtu() {
    scenario("host_mtu", |lab| {
        let mut bed = Bed::start(lab, |_, guest| guest.device.push(format!("host_mtu={MTU}")))?;
        let seen = bed.guest.run("cat /sys/class/net/eth0/mtu")?;
        ensure!(seen == MTU.to_string(), "the guest's MTU is {seen}");
        let tap = bed.netns.mtu("tap0")?;
        ensure!(tap as usize == MTU, "the tap's MTU is {tap}");

        // Exactly full packets, not fragmented.
        ping_whole(&bed.netns, GUEST_IP, MTU - HEADERS, PATIENCE)?;
        let answer = bed.guest.run(&format!("ping -c 3 -W 10 -s {} {HOST_IP}", MTU - HEADERS))?;
        ensure!(answer.contains(" 0% packet loss"), "the guest's ping: {answer}");
        // Larger packets are fragmented by both sides, and still arrive.
        let answer = bed.guest.run(&format!("ping -c 3 -W 10 -s {} {HOST_IP}", 3 * MTU))?;
        ensure!(answer.contains(" 0% packet loss"), "the guest's ping: {answer}");
        there_and_back(&bed.netns, &mut bed.guest, 5_000_000)?;
        bed.stop()
    });
}
