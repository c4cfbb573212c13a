//! The back-end is killed and started again under a running guest.

use std::time::Duration;

use anyhow::ensure;
use lab::{Amount, Backend, Bed, GUEST_IP, HOST_IP, PATIENCE, Pinger, Source, scenario, there_and_back};

/// Bytes per second of the stream that lives through it.
const STREAM_RATE: u64 = 500_000;
const PING_INTERVAL: Duration = Duration::from_millis(20);

/// Pings and one TCP connection go on after it: nothing but packets was lost.
#[test]
fn reconnect_after_sigkill() {
    reconnect("reconnect_after_sigkill", &[]);
}

/// QEMU says where packed rings began, not where they are: it does not know.
#[test]
fn reconnect_after_sigkill_packed() {
    reconnect("reconnect_after_sigkill_packed", &["packed=on"]);
}

fn reconnect(name: &str, device: &[&str]) {
    scenario(name, |lab| {
        let mut bed = Bed::start(lab, |_, guest| {
            guest.reconnect_ms = Some(500);
            guest.device.extend(device.iter().map(ToString::to_string));
        })?;
        if device.contains(&"packed=on") {
            bed.guest.check_packed()?;
        }
        let pinger = Pinger::start(&bed.netns, GUEST_IP, PING_INTERVAL)?;
        let stream = Source::start(&bed.netns, 3, Amount::UntilStopped(STREAM_RATE))?;
        let port = stream.port();
        bed.guest.run(&format!(
            "(nc {HOST_IP} {port} </dev/null | md5sum >/tmp/stream; touch /tmp/done) >/dev/null &"
        ))?;
        pinger.wait_answers(10, PATIENCE)?;

        for _ in 0..2 {
            bed.backend.kill()?;
            bed.backend = Backend::start(lab, &bed.netns, &bed.backend_config)?;
            pinger.wait_answers(10, PATIENCE)?;
        }
        there_and_back(&bed.netns, &mut bed.guest, 5_000_000)?;

        stream.stop();
        let sent = stream.finish()?;
        let seen = bed.guest.run("while [ ! -e /tmp/done ]; do usleep 50000; done; cat /tmp/stream")?;
        ensure!(seen.contains(&sent.md5), "the stream: sent {sent:?}, the guest has {seen}");
        ensure!(pinger.stop()?.corrupted == 0, "pings came back changed");
        bed.stop()
    });
}
