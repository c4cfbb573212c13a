//! A real guest on AF_XDP: its own driver, its own checksums left to the device, the kernel's stack at the other end.
#![forbid(unsafe_code)]

use anyhow::{Result, ensure};
use lab::wire::Link;
use lab::xdp::{NIC, WIRE};
use lab::{
    Backend, BackendConfig, GUEST_IP, HOST_IP, Lab, NetNs, PATIENCE, PREFIX, Qemu, QemuConfig, ping,
    ping_whole, scenario, skip, there_and_back,
};

/// Bytes that go to the guest and come back.
const BYTES: u64 = 2_000_000;

#[test]
fn a_guest_on_an_interface() {
    scenario("a_guest_on_an_interface", |lab: &Lab| -> Result<()> {
        let netns = match NetNs::with_bpf() {
            Ok(netns) => netns,
            Err(why) => {
                skip("a_guest_on_an_interface", &format!("{why:#}"));
                return Ok(());
            }
        };
        netns.add_veth(NIC, WIRE, 1)?;
        // Else what this end sends has no checksums.
        netns.run(|| Link::named(WIRE).set_checksum_offload(false))?;
        netns.ip(&format!("address add {HOST_IP}/{PREFIX} dev {WIRE}"))?;
        let socket = lab.path("vhost");
        let config = BackendConfig { uplink: format!("xdp:{NIC}"), ..BackendConfig::tap(&socket, "") };
        let mut backend = Backend::start(lab, &netns, &config)?;
        let mut guest = Qemu::boot(lab, &QemuConfig::new("guest", &socket))?;

        // The guest's address is learned from its first frames.
        let answer = guest.run(&format!("ping -c 3 -W 10 {HOST_IP}"))?;
        ensure!(answer.contains(" 0% packet loss"), "the guest's ping: {answer}");
        ping(&netns, GUEST_IP, 5, PATIENCE)?;
        ping_whole(&netns, GUEST_IP, 1472, PATIENCE)?;
        there_and_back(&netns, &mut guest, BYTES)?;

        backend.check_alive()?;
        drop(guest);
        backend.stop_cleanly()
    });
}
