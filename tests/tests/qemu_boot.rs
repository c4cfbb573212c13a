//! A guest boots on the back-end and answers.

use anyhow::{Result, ensure};
use lab::{
    Backend, BackendConfig, GUEST_IP, HOST_IP, Lab, NetNs, PATIENCE, PREFIX, Qemu, QemuConfig, ping, scenario,
};

/// The back-end makes the tap itself.
#[test]
fn boot_and_ping() {
    boot("boot_and_ping", &[]);
}

#[test]
fn boot_and_ping_packed() {
    boot("boot_and_ping_packed", &["packed=on"]);
}

/// Without all that a driver may leave away: chains in the ring, kicks and calls by flags, buffers of one frame each.
#[test]
fn boot_and_ping_packed_and_plain() {
    let plain = ["packed=on", "indirect_desc=off", "event_idx=off", "mrg_rxbuf=off"];
    boot("boot_and_ping_packed_and_plain", &plain);
}

fn boot(name: &str, device: &[&str]) {
    scenario(name, |lab: &Lab| -> Result<()> {
        let netns = NetNs::new()?;
        let socket = lab.path("vhost");
        let mut backend = Backend::start(lab, &netns, &BackendConfig::tap(&socket, "tap0"))?;
        netns.ip(&format!("address add {HOST_IP}/{PREFIX} dev tap0"))?;
        netns.ip("link set tap0 up")?;
        let mut config = QemuConfig::new("guest", &socket);
        config.device.extend(device.iter().map(ToString::to_string));
        let mut guest = Qemu::boot(lab, &config)?;
        if device.contains(&"packed=on") {
            guest.check_packed()?;
        }

        ping(&netns, GUEST_IP, 5, PATIENCE)?;
        let answer = guest.run(&format!("ping -c 3 -W 10 {HOST_IP}"))?;
        ensure!(answer.contains(" 0% packet loss"), "the guest's ping: {answer}");

        backend.check_alive()?;
        drop(guest);
        backend.stop_cleanly()
    });
}
