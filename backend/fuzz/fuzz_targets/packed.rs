//! Drives a packed queue in guest memory that the fuzzer writes as it likes, while chains are taken, used and given back.
//!
//! Input and rules are those of `rings`; besides: what is told as the base is a place in the ring.
#![no_main]

use std::collections::VecDeque;

use libfuzzer_sys::fuzz_target;
use vhost_user_net::memory::IoVecStorage;
use vhost_user_net::virtq::{Access, Chain, PackedQueue, PopError, QueueConfig, QueueError, Single};

#[path = "../src/guest.rs"]
mod guest;
use guest::*;

const AVAILABLE: u16 = 1 << 7;
const USED_FLAG: u16 = 1 << 15;

fn run(mut input: Input<'_>) -> Option<()> {
    let guest = Guest::new();
    let mut memory = guest.memory.clone();
    let flags = input.byte()?;
    let mut config = QueueConfig {
        packed: true,
        size: u16::from(input.byte()?) + 1,
        base: u32::from(input.word()?) | u32::from(input.word()?) << 16,
        desc_user: USER + DESC,
        avail_user: USER + AVAIL,
        used_user: USER + USED,
        log_used: (flags & 1 != 0).then_some(USED),
        event_idx: flags & 2 != 0,
        indirect: flags & 4 != 0,
        in_order: flags & 16 != 0,
        transmit: flags & 32 != 0,
    };
    if flags & 8 != 0 {
        config.size = input.word()?;
        config.desc_user = USER.wrapping_add(u64::from(input.word()?));
        config.avail_user = USER.wrapping_add(u64::from(input.word()?));
        config.used_user = USER.wrapping_add(u64::from(input.word()?) << 2);
    }
    if flags & 64 != 0 {
        config.base = 0x8000_8000;
    }
    let size = config.size;
    let mut queue = PackedQueue::new(&memory, &config).ok()?;
    let mut chain = Chain::new();
    let mut storage = IoVecStorage::default();
    let mut in_work = VecDeque::new();
    // Where an honest driver would go on.
    let (mut slot, mut wrap) = (queue.base() as u16 & 0x7fff, queue.base() & 0x8000 != 0);
    while let Some(op) = input.byte() {
        match op % 18 {
            // The guest writes: anywhere, a descriptor, one that is available where it should be.
            0 => {
                let (at, len) = (input.word()?, input.byte()?);
                guest.put(at.into(), input.bytes(usize::from(len % 64)));
            }
            1..=4 => {
                let index = u64::from(input.byte()?);
                let (addr, len, rest) = (input.word()?, input.word()?, input.word()?);
                let mut raw = [0; 16];
                raw[..2].copy_from_slice(&addr.to_le_bytes());
                raw[8..10].copy_from_slice(&len.to_le_bytes());
                raw[12] = (rest >> 8) as u8;
                let (at, bits) = match op % 18 {
                    1 => (0x4008 + 16 * index, rest & 0x8087),
                    2 => (config.desc_user - USER + 16 * index, rest & 0x8087),
                    _ => {
                        let at = config.desc_user - USER + 16 * u64::from(slot);
                        slot += 1;
                        let bits = rest & 7 | if wrap { AVAILABLE } else { USED_FLAG };
                        if slot == size {
                            (slot, wrap) = (0, !wrap);
                        }
                        (at, bits)
                    }
                };
                raw[14..].copy_from_slice(&bits.to_le_bytes());
                guest.put(at, &raw);
            }
            // The device.
            5..=7 => match queue.pop(&memory, &mut chain) {
                Ok(true) => {
                    check(&chain, &memory, &mut storage);
                    in_work.push_back(chain.head());
                }
                Err(PopError::Bad { head, .. }) => in_work.push_back(head),
                Ok(false) | Err(PopError::Missing(_) | PopError::Broken(_)) => {}
            },
            8 => {
                let n = input.byte()?;
                let access = if n & 64 != 0 { Access::Writable } else { Access::Readable };
                let mut out = [Single::default(); 64];
                if let Ok(count) = queue.pop_singles(access, &mut out[..usize::from(n % 64)]) {
                    assert!(out[..count].iter().all(|single| single.len > 0));
                    in_work.extend(out[..count].iter().map(|single| single.head));
                }
            }
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
                let count = usize::from(input.byte()?).min(in_work.len());
                queue.push_all(in_work.drain(..count).map(|head| (head, 0)));
            }
            12 => {
                queue.publish();
                queue.needs_call();
            }
            13 => {
                let _ = queue.enable_kicks();
            }
            14 => queue.disable_kicks(),
            15 => {
                let (skip, most) = (input.byte()?, input.word()?);
                queue.look_ahead(&memory, skip.into(), most % 1024, &mut chain, |_, _| {});
                queue.prefetch_used(most);
                queue.prefetch_buffer(&memory, skip.into());
            }
            // The front-end: another snapshot.
            16 => {
                let what = input.byte()?;
                let next = snapshot(&guest, what);
                match queue.remap(&next) {
                    Ok(()) => memory = next,
                    Err(QueueError::Busy) => assert!(!in_work.is_empty() || what & 2 != 0),
                    Err(error) => panic!("{error}: the ring was there before"),
                }
            }
            _ => {
                let page = u64::from(input.byte()?) * 0x1000;
                guest.residency.set_present(page..page + 1);
            }
        }
        assert_eq!(usize::from(queue.in_flight()), in_work.len());
        assert!(queue.in_flight() <= size);
        let base = queue.base();
        assert!(base & 0x7fff < u32::from(size) && base >> 16 == base & 0xffff);
    }
    Some(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(Input(data));
});
