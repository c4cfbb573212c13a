//! Drives a split queue in guest memory that the fuzzer writes as it likes, while chains are taken, used and given back.
//!
//! The input: a few bytes of configuration, then operations of one byte each with their operands. What has to hold: no panic, no
//! access outside (the sanitizer and the SIGBUS handler would tell), indices in step with what was taken and given back,
//! segments that are sound, and buffers that are either wholly in guest memory or refused.
#![no_main]

use std::collections::VecDeque;
use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use vhost_user_net::memory::IoVecStorage;
use vhost_user_net::virtq::{Chain, PopError, QueueConfig, QueueError, SplitQueue};

#[path = "../src/guest.rs"]
mod guest;
use guest::*;

fn get16(guest: &Guest, at: u64) -> u16 {
    let mut bytes = [0; 2];
    guest.file.read_exact_at(&mut bytes, (at + REGION) % MEM_SIZE).unwrap();
    u16::from_le_bytes(bytes)
}

fn run(mut input: Input<'_>) -> Option<()> {
    let guest = Guest::new();
    let mut memory = guest.memory.clone();
    let flags = input.byte()?;
    let mut config = QueueConfig {
        packed: false,
        in_order: flags & 16 != 0,
        transmit: flags & 32 != 0,
        size: 1 << (input.byte()? % 9),
        base: input.word()?.into(),
        desc_user: USER + DESC,
        avail_user: USER + AVAIL,
        used_user: USER + USED,
        log_used: (flags & 1 != 0).then_some(USED),
        event_idx: flags & 2 != 0,
        indirect: flags & 4 != 0,
    };
    if flags & 8 != 0 {
        config.size = input.word()?;
        config.desc_user = USER.wrapping_add(u64::from(input.word()?));
        config.avail_user = USER.wrapping_add(u64::from(input.word()?));
        config.used_user = USER.wrapping_add(u64::from(input.word()?) << 4);
    }
    let mut queue = SplitQueue::new(&memory, &config).ok()?;
    let mut chain = Chain::new();
    let mut storage = IoVecStorage::default();
    let mut in_work = VecDeque::new();
    while let Some(op) = input.byte() {
        match op % 16 {
            // The guest writes: anywhere, a descriptor, a chain made available.
            0 => {
                let (at, len) = (input.word()?, input.byte()?);
                guest.put(at.into(), input.bytes(usize::from(len % 64)));
            }
            1 | 2 => {
                let index = u64::from(input.byte()?);
                let (addr, len, rest) = (input.word()?, input.word()?, input.word()?);
                let mut raw = [0; 16];
                raw[..2].copy_from_slice(&addr.to_le_bytes());
                raw[8..10].copy_from_slice(&len.to_le_bytes());
                raw[12] = (rest & 7) as u8;
                raw[14] = (rest >> 8) as u8;
                let table = if op % 16 == 1 { DESC } else { 0x4008 };
                guest.put(table + index * 16, &raw);
            }
            3 | 4 => {
                let idx = get16(&guest, AVAIL + 2);
                let head = u16::from(input.byte()?);
                guest.put(AVAIL + 4 + 2 * u64::from(idx % config.size), &head.to_le_bytes());
                guest.put(AVAIL + 2, &idx.wrapping_add(1).to_le_bytes());
            }
            // The device.
            5..=8 => match queue.pop(&memory, &mut chain) {
                Ok(true) => {
                    check(&chain, &memory, &mut storage);
                    in_work.push_back(chain.head());
                }
                Err(PopError::Bad { head, .. }) => in_work.push_back(head),
                Ok(false) | Err(PopError::Missing(_) | PopError::Broken(_)) => {}
            },
            9 => {
                let n = u16::from(input.byte()?).min(in_work.len() as u16);
                queue.unpop(n);
                in_work.truncate(in_work.len() - usize::from(n));
            }
            10 => {
                for _ in 0..input.byte()? {
                    let Some(head) = in_work.pop_front() else { break };
                    queue.push(head, 1);
                }
            }
            11 => {
                queue.publish();
                queue.needs_call();
            }
            12 => {
                let _ = queue.enable_kicks();
            }
            13 => queue.disable_kicks(),
            // The front-end: another snapshot.
            14 => {
                let what = input.byte()?;
                let next = snapshot(&guest, what);
                match queue.remap(&next) {
                    Ok(()) => memory = next,
                    Err(QueueError::Busy) => assert!(!in_work.is_empty() || what & 2 != 0),
                    Err(error) => panic!("{error}: the ring was there before"),
                }
                queue.set_log_used((what & 4 != 0).then_some(USED));
            }
            _ => {
                let page = u64::from(input.byte()?) * 0x1000;
                guest.residency.set_present(page..page + 1);
            }
        }
        assert_eq!(usize::from(queue.in_flight()), in_work.len());
        assert!(queue.in_flight() <= config.size);
        if let Ok(available) = queue.available() {
            assert!(available <= config.size);
        }
    }
    Some(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(Input(data));
});
