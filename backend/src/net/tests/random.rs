//! Random frames and buffers: nothing is lost, cut or reordered, and every page that changed is logged.
#![forbid(unsafe_code)]

use super::rig::{BUFFERS, Rig, frame};
use crate::memory::testing::contents;
use crate::net::tx::End;
use crate::uplink::testing::Refuse;
use crate::virtq::Queue;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    /// The guest offers a chain of pieces of these lengths.
    Buffer(Vec<u32>),
    /// A frame arrives.
    Frame(usize),
    /// A burst.
    Run(u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let piece = prop_oneof![1u32..40, 200u32..2000, Just(4096u32)];
    let step = prop_oneof![
        5 => prop::collection::vec(piece, 1..5).prop_map(Step::Buffer),
        1 => Just(Step::Buffer(vec![9])),
        2 => prop_oneof![14usize..2000, 14usize..20_000].prop_map(Step::Frame),
        3 => (1u32..8).prop_map(Step::Run),
    ];
    prop::collection::vec(step, 1..80)
}

/// Pages that differ between two states of the guest.
fn changed(before: &[u8], after: &[u8]) -> Vec<usize> {
    let pages = before.chunks(4096).zip(after.chunks(4096)).enumerate();
    pages.filter(|(_, (a, b))| a != b).map(|(page, _)| page).collect()
}

fn logged(log: &[u8], page: usize) -> bool {
    log[page / 8] & 1 << (page % 8) != 0
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn received_frames_are_whole_and_in_order_and_logged(steps in steps(), log_from in 0usize..40) {
        let mut rig = Rig::new(256, 12, true);
        let (mut log, mut before) = (None, Vec::new());
        let (mut sent, mut got, mut seed) = (Vec::new(), Vec::new(), 0);
        for (i, step) in steps.iter().enumerate() {
            if i == log_from {
                log = Some(rig.log_writes());
                before = contents(&rig.driver.file);
            }
            match step {
                // As a driver: no more descriptors than the ring has. Buffers of 4 bursts at most.
                Step::Buffer(lens) if rig.driver.avail_idx().wrapping_sub(rig.driver.used_idx()) < 40 => {
                    let here = contents(&rig.driver.file);
                    rig.buffer(lens);
                    if log.is_some() {
                        // What the driver wrote is not ours to log.
                        let now = contents(&rig.driver.file);
                        for page in changed(&here, &now) {
                            before[page * 4096..][..4096].copy_from_slice(&now[page * 4096..][..4096]);
                        }
                    }
                }
                Step::Buffer(_) => {}
                Step::Frame(len) => {
                    seed += 1;
                    let frame = frame(12, seed, *len);
                    sent.push(frame.clone());
                    rig.uplink.deliver(frame);
                }
                Step::Run(budget) => {
                    rig.receive_up_to(*budget);
                    collect(&mut rig, &mut got);
                }
            }
        }
        // Then the guest gives all the buffers there can be.
        for _ in 0..2000 {
            if got.len() == sent.len() {
                break;
            }
            if log.is_none() {
                rig.buffer(&[4096]);
            }
            if matches!(rig.receive(), End::NoBuffers | End::Idle) && log.is_some() {
                break;
            }
            collect(&mut rig, &mut got);
        }
        collect(&mut rig, &mut got);
        prop_assert!(got == sent[..got.len()], "frames are lost, cut or out of order");
        prop_assert!(log.is_some() || got.len() == sent.len());
        if let Some(log) = log {
            let log = contents(&log);
            for page in changed(&before, &contents(&rig.driver.file)) {
                prop_assert!(logged(&log, page), "page {page:#x} was written and not logged");
            }
        }
    }

    #[test]
    fn transmitting_writes_and_logs_only_the_used_ring(
        frames in prop::collection::vec((14u32..3000, 0u8..8), 1..60),
        event_idx: bool,
    ) {
        let mut rig = Rig::new(256, 12, true);
        if event_idx {
            rig.driver.config.event_idx = true;
            rig.queue = Queue::Split(rig.driver.queue());
        }
        let log = rig.log_writes();
        for (len, answer) in &frames {
            rig.offer(&[(BUFFERS, 12 + len, 0)]);
            match answer {
                0 => rig.uplink.state().refuse.push_back(Refuse::Full),
                1 => rig.uplink.state().refuse.push_back(Refuse::Rejected),
                _ => {}
            }
        }
        let before = contents(&rig.driver.file);
        rig.queue.disable_kicks();
        while !matches!(rig.transmit(), End::Idle) {}
        rig.queue.enable_kicks().unwrap();
        prop_assert_eq!(rig.used().len(), frames.len());
        let pages = changed(&before, &contents(&rig.driver.file));
        prop_assert_eq!(&pages, &[0x30], "the used ring, in one page");
        let log = contents(&log);
        for page in 0..256 {
            prop_assert_eq!(logged(&log, page), page == 0x30);
        }
    }
}

fn collect(rig: &mut Rig, got: &mut Vec<Vec<u8>>) {
    let frames = rig.frames();
    // A chain too small for the header is given back empty, and is no frame.
    got.extend(frames.into_iter().map(|(frame, _)| frame).filter(|frame| !frame.is_empty()));
}
