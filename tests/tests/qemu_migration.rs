//! Precopy migration between two QEMUs, each with its own back-end.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{
    Amount, GUEST_IP, GUEST_MAC, HOST_IP, Migration, NetNs, PATIENCE, Pinger, Place, Qemu, QemuConfig,
    Sniffer, Source, bridged, scenario, there_and_back, until,
};

const TAPS: [&str; 3] = ["tap0", "tap1", "tap2"];
const PING_INTERVAL: Duration = Duration::from_millis(20);
/// MiB of random guest memory whose checksum must survive.
const FILLED_MIB: u32 = 48;
/// Bytes per second that the back-end writes into guest memory all the time.
const STREAM_RATE: u64 = 1_000_000;
/// Bytes that wait in a socket of the guest while it moves.
const HELD_BYTES: u64 = 1_000_000;
/// Never ends by itself: what the guest dirties cannot be sent in one millisecond.
const ENDLESS: Migration = Migration { bandwidth: 16 << 20, downtime_ms: 1 };
const RARP: [u8; 2] = [0x80, 0x35];

/// Twice in a row, while packets and the guest itself write to guest memory.
#[test]
fn under_load_twice_in_a_row() {
    under_load("under_load_twice_in_a_row", &[]);
}

/// The same with packed rings: their descriptors change with every packet, and where they are is said in another way.
#[test]
fn packed_under_load_twice_in_a_row() {
    under_load("packed_under_load_twice_in_a_row", &["packed=on"]);
}

fn under_load(name: &str, device: &[&str]) {
    scenario(name, |lab| {
        let netns = bridged(&TAPS)?;
        let with = |config: &mut QemuConfig| config.device.extend(device.iter().map(ToString::to_string));
        let mut place = Place::start(lab, &netns, TAPS[0], with)?;
        if device.contains(&"packed=on") {
            place.qemu.check_packed()?;
        }
        place.qemu.run(&format!("dd if=/dev/urandom of=/tmp/filled bs=1M count={FILLED_MIB} 2>/dev/null"))?;
        let filled = place.qemu.run("md5sum </tmp/filled")?;

        let pinger = Pinger::start(&netns, GUEST_IP, PING_INTERVAL)?;
        let stream = Source::start(&netns, 5, Amount::UntilStopped(STREAM_RATE))?;
        let port = stream.port();
        place.qemu.run(&format!(
            "(nc {HOST_IP} {port} </dev/null | md5sum >/tmp/stream; touch /tmp/done) >/dev/null &"
        ))?;
        let dirty = "dd if=/dev/urandom of=/tmp/dirty bs=64k count=16 conv=notrunc";
        place.qemu.run(&format!("(while [ ! -e /tmp/done ]; do {dirty}; done) >/dev/null 2>&1 &"))?;
        pinger.wait_answers(5, PATIENCE).context("before any migration")?;

        for tap in &TAPS[1..] {
            let mut next = Place::start(lab, &netns, tap, |config| {
                with(config);
                config.is_incoming = true;
            })?;
            ENDLESS.start(lab, &mut place.qemu, &mut next.qemu)?;
            pinger.wait_answers(5, PATIENCE).context("during the migration")?;
            until("the first pass over guest memory", PATIENCE, || {
                Ok((ENDLESS.dirty_syncs(&mut place.qemu)? > 1).then_some(()))
            })?;
            let held = Held::start(&netns, &mut place.qemu)?;
            let migration = Migration::default();
            // Fails if it has ended by itself, and all this was for nothing.
            ENDLESS.dirty_syncs(&mut place.qemu)?;
            migration.apply(&mut place.qemu)?;
            let report = migration.finish(&mut place.qemu, &mut next.qemu)?;
            println!("to {tap}: {report:?}");
            pinger.wait_answers(5, PATIENCE).with_context(|| format!("after the migration to {tap}"))?;

            std::mem::replace(&mut place, next).stop()?;
            held.check(&mut place.qemu)?;
            let seen = place.qemu.run("md5sum </tmp/filled")?;
            ensure!(seen == filled, "the guest's memory changed: {filled} became {seen}");
        }

        stream.stop();
        let sent = stream.finish()?;
        let seen = place.qemu.run("while [ ! -e /tmp/done ]; do usleep 50000; done; cat /tmp/stream")?;
        ensure!(seen.contains(&sent.md5), "the stream: sent {sent:?}, the guest has {seen}");
        there_and_back(&netns, &mut place.qemu, 5_000_000)?;
        let pings = pinger.stop()?;
        println!("pings: {pings:?}");
        ensure!(pings.corrupted == 0, "pings came back changed");
        place.stop()
    });
}

/// Data that the back-end wrote into guest memory and nobody has touched since: it waits in a socket whose reader
/// sleeps. It comes after its pages were sent once, so it moves only if the back-end logged them; everything that
/// the guest's CPU touches, QEMU would log by itself.
struct Held {
    source: Source,
    port: u16,
}

impl Held {
    fn start(netns: &NetNs, guest: &mut Qemu) -> Result<Self> {
        let source = Source::start(netns, 7, Amount::Bytes(HELD_BYTES))?;
        let port = source.port();
        let room = HELD_BYTES * 8;
        guest
            .run(&format!("echo 4096 {room} {room} >/proc/sys/net/ipv4/tcp_rmem; rm -f /tmp/go /tmp/held"))?;
        let late = "while [ ! -e /tmp/go ]; do usleep 50000; done; md5sum >/tmp/held.part; mv /tmp/held.part /tmp/held";
        guest.run(&format!(
            "echo '{late}' >/tmp/late; nc {HOST_IP} {port} -e /bin/sh /tmp/late >/dev/null 2>&1 &"
        ))?;
        until("the data to wait in the guest", PATIENCE, || {
            let waiting = guest.run(&format!("netstat -tn | grep ':{port} ' | tr -s ' ' | cut -d' ' -f2"))?;
            Ok((waiting.parse::<u64>().unwrap_or(0) >= HELD_BYTES).then_some(()))
        })?;
        Ok(Self { source, port })
    }

    fn check(self, guest: &mut Qemu) -> Result<()> {
        let seen =
            guest.run("touch /tmp/go; while [ ! -e /tmp/held ]; do usleep 50000; done; cat /tmp/held")?;
        let sent = self.source.finish()?;
        ensure!(
            seen.contains(&sent.md5),
            "what waited in the socket to port {} did not move: sent {sent:?}, the guest has {seen}",
            self.port
        );
        Ok(())
    }
}

/// A guest that cannot announce itself is announced by the back-end (SEND_RARP).
#[test]
fn announced_by_the_back_end() {
    scenario("announced_by_the_back_end", |lab| {
        let netns = bridged(&TAPS[..2])?;
        let silent = |config: &mut QemuConfig| config.device.push("guest_announce=off".into());
        let mut source = Place::start(lab, &netns, TAPS[0], silent)?;
        let mut destination = Place::start(lab, &netns, TAPS[1], |config| {
            silent(config);
            config.is_incoming = true;
        })?;
        let pinger = Pinger::start(&netns, GUEST_IP, PING_INTERVAL)?;
        pinger.wait_answers(5, PATIENCE)?;

        let announced = Sniffer::start(&netns, TAPS[1], |frame| frame.get(12..14) == Some(&RARP))?;
        Migration::default().run(lab, &mut source.qemu, &mut destination.qemu)?;
        let frame = announced.wait("an announcement on the tap", PATIENCE)?;
        let mac = mac_bytes(GUEST_MAC)?;
        ensure!(frame.get(..6) == Some(&[0xff; 6]), "the announcement is no broadcast: {frame:02x?}");
        ensure!(
            frame.get(6..12) == Some(&mac),
            "the announcement does not come from the guest: {frame:02x?}"
        );
        // RFC 903: hardware and protocol types, lengths, request reverse, then the addresses asked about.
        ensure!(frame.get(14..22) == Some(&[0, 1, 8, 0, 6, 4, 0, 3]), "no reverse request: {frame:02x?}");
        ensure!(
            frame.get(22..28) == Some(&mac) && frame.get(32..38) == Some(&mac),
            "other addresses: {frame:02x?}"
        );

        pinger.wait_answers(5, PATIENCE)?;
        source.stop()?;
        there_and_back(&netns, &mut destination.qemu, 5_000_000)?;
        destination.stop()
    });
}

fn mac_bytes(text: &str) -> Result<[u8; 6]> {
    let bytes = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<Vec<u8>, _>>()?;
    bytes.try_into().ok().context("a MAC address has six bytes")
}
