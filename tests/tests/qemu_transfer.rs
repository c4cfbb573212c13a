//! Bulk data keeps its contents, both ways.

use lab::{Bed, scenario, there_and_back};

const MEGABYTE: u64 = 1_000_000;

/// Frames of up to 64 KiB cross, as the guest and the tap negotiate segmentation offloads.
#[test]
fn hundred_megabytes_both_ways() {
    scenario("hundred_megabytes_both_ways", |lab| {
        let mut bed = Bed::start(lab, |_, guest| guest.memory_mib = 384)?;
        there_and_back(&bed.netns, &mut bed.guest, 100 * MEGABYTE)?;
        bed.stop()
    });
}

/// The same without offloads and mergeable buffers in the guest: every frame is an ordinary one.
#[test]
fn without_offloads() {
    scenario("without_offloads", |lab| {
        let mut bed = Bed::start(lab, |_, guest| {
            let off = "csum gso host_tso4 host_tso6 host_ecn host_ufo guest_csum guest_tso4 guest_tso6 guest_ecn \
                guest_ufo mrg_rxbuf";
            guest.device.extend(off.split_whitespace().map(|feature| format!("{feature}=off")));
        })?;
        there_and_back(&bed.netns, &mut bed.guest, 10 * MEGABYTE)?;
        bed.stop()
    });
}
