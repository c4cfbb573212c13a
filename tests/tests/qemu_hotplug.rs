//! Memory that is plugged in while packets flow becomes part of the memory table.

use anyhow::{Result, ensure};
use lab::{Bed, GUEST_IP, Lab, PATIENCE, Pinger, scenario, there_and_back, until};

const DIMM_MIB: u64 = 256;
const BYTES: u64 = 20_000_000;

/// Memory slots: each region comes in a message of its own (ADD_MEM_REG).
#[test]
fn with_memory_slots() {
    scenario("with_memory_slots", |lab| plug(lab, &[]));
}

/// No memory slots: the whole table comes again (SET_MEM_TABLE).
#[test]
fn without_memory_slots() {
    scenario("without_memory_slots", |lab| plug(lab, &["--disable-protocol-feature=configure-mem-slots"]));
}

fn plug(lab: &Lab, extra: &[&str]) -> Result<()> {
    let mut bed = Bed::start(lab, |backend, guest| {
        backend.extra.extend(extra.iter().map(|&option| option.to_owned()));
        guest.memory_slots = 4;
    })?;
    let pinger = Pinger::start(&bed.netns, GUEST_IP, std::time::Duration::from_millis(20))?;
    pinger.wait_answers(3, PATIENCE)?;

    let mut before = bed.guest.guest_memory_kib()?;
    for dimm in ["dimm0", "dimm1"] {
        bed.guest.plug_memory(dimm, DIMM_MIB)?;
        // The guest keeps a little of it for its own page structures.
        let wanted = before + DIMM_MIB * 1024 / 2;
        before = until("the guest to use its new memory", PATIENCE, || {
            let now = bed.guest.guest_memory_kib()?;
            Ok((now > wanted).then_some(now))
        })?;
        pinger.wait_answers(3, PATIENCE)?;
        // It lies above 4 GiB, where the guest's kernel takes buffers first, so packets now pass through it.
        there_and_back(&bed.netns, &mut bed.guest, BYTES)?;
    }
    ensure!(pinger.stop()?.corrupted == 0, "pings came back changed");
    bed.stop()
}
