//! A guest boots on the back-end and answers.

use anyhow::{Result, ensure};
use lab::{
    Backend, BackendConfig, GUEST_IP, HOST_IP, Lab, NetNs, PATIENCE, PREFIX, Qemu, QemuConfig, ping, scenario,
};

/// The back-end makes the tap itself.
#[test]
fn boot_and_ping() {
    scenario("boot_and_ping", |lab: &Lab| -> Result<()> {
        let netns = NetNs::new()?;
        let socket = lab.path("vhost");
        let mut backend = Backend::start(lab, &netns, &BackendConfig::tap(&socket, "tap0"))?;
        netns.ip(&format!("address add {HOST_IP}/{PREFIX} dev tap0"))?;
        netns.ip("link set tap0 up")?;
        let mut guest = Qemu::boot(lab, &QemuConfig::new("guest", &socket))?;

        ping(&netns, GUEST_IP, 5, PATIENCE)?;
        let answer = guest.run(&format!("ping -c 3 -W 10 {HOST_IP}"))?;
        ensure!(answer.contains(" 0% packet loss"), "the guest's ping: {answer}");

        backend.check_alive()?;
        drop(guest);
        backend.stop_cleanly()
    });
}
