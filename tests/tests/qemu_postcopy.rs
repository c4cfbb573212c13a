//! Postcopy migration between two QEMUs, each with its own back-end.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{GUEST_IP, PATIENCE, Phases, Pinger, Place, Postcopy, bridged, scenario, there_and_back};

const TAPS: [&str; 2] = ["tap0", "tap1"];
const PING_INTERVAL: Duration = Duration::from_millis(20);
/// MiB of random guest memory whose checksum must survive.
const FILLED_MIB: u32 = 32;

/// Nothing but a ping: the phases, the guest's memory, the pings.
#[test]
fn postcopy_plain() {
    scenario("postcopy_plain", |lab| {
        let netns = bridged(&TAPS)?;
        let mut source = Place::start(lab, &netns, TAPS[0], |_| {})?;
        source
            .qemu
            .run(&format!("dd if=/dev/urandom of=/tmp/filled bs=1M count={FILLED_MIB} 2>/dev/null"))?;
        let filled = source.qemu.run("md5sum </tmp/filled")?;
        let mut destination = Place::start(lab, &netns, TAPS[1], |config| config.is_incoming = true)?;
        let pinger = Pinger::start(&netns, GUEST_IP, PING_INTERVAL)?;
        pinger.wait_answers(5, PATIENCE)?;

        let report = Postcopy::default().run(lab, &mut source.qemu, &mut destination.qemu)?;
        pinger.wait_answers(5, PATIENCE)?;
        let phases = Phases::of(&destination.backend);
        println!("{report:?}\n{phases:#?}");
        println!("{}", destination.backend.output());
        source.stop()?;
        let seen = destination.qemu.run("md5sum </tmp/filled")?;
        ensure!(seen == filled, "the guest's memory changed: {filled} became {seen}");
        there_and_back(&netns, &mut destination.qemu, 2_000_000)?;
        let pings = pinger.stop()?;
        println!("pings: {pings:?}");
        ensure!(pings.corrupted == 0, "pings came back changed");
        phases.check()?;
        destination.stop()
    });
}
