//! A pair whose guest memory arrives late, page by page, only as far as the pair asks for it: everything comes out right,
//! in order, and nothing that has not arrived is read or written.
//!
//! A page that is away holds zeros in the file; what it really holds is put there when it arrives.

use super::rig::{BUFFERS, FEATURES, Rig, SIZE, kick};
use crate::memory::testing::{contents, memfd};
use crate::memory::{DirtyLog, ResidencyMap};
use crate::virtq::tests::driver::{INDIRECT, MEM_SIZE, NEXT, USED, WRITE};
use crate::worker::{Command, Direction, Event};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

const PAGE: usize = 0x1000;
const HEADER: usize = 12;
/// Indirect tables, one page for four of them.
const TABLES: u64 = BUFFERS + 0x8_0000;
const MRG_RXBUF: u64 = 1 << 15;
const EVENT_IDX: u64 = 1 << 29;

#[derive(Clone, Copy, Debug)]
struct Mode {
    event_idx: bool,
    indirect: bool,
    mergeable: bool,
    log: bool,
    /// Pages come that nobody has asked for, too.
    background: bool,
    seed: u64,
}

fn mode() -> impl Strategy<Value = Mode> {
    (any::<[bool; 5]>(), any::<u64>()).prop_map(
        |([event_idx, indirect, mergeable, log, background], seed)| Mode {
            event_idx,
            indirect,
            mergeable,
            log,
            background,
            seed,
        },
    )
}

/// Numbers without end (xorshift).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

fn frame(number: u16, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u16).wrapping_mul(7).wrapping_add(number) as u8 | 1).collect()
}

fn sent_len(number: u16) -> usize {
    60 + usize::from(number) * 17 % 1400
}

fn received_len(number: u16, mode: Mode) -> usize {
    if mode.mergeable { 100 + usize::from(number) * 131 % 3000 } else { 60 + usize::from(number) * 17 % 600 }
}

/// What the guest has in its memory: full rings.
fn lay_out(rig: &mut Rig, mode: Mode) {
    for slot in 0..SIZE {
        let at = BUFFERS + u64::from(slot) * 0x800;
        rig.tx.put(at, &[0; HEADER]);
        let bytes = frame(slot, sent_len(slot));
        rig.tx.put(at + HEADER as u64, &bytes);
        // Header and frame apart, across whatever pages that makes.
        let parts = [(at, HEADER as u32), (at + HEADER as u64, bytes.len() as u32)];
        if mode.indirect {
            let table = TABLES + u64::from(slot) * 0x400;
            rig.tx.descriptor(table, 0, (parts[0].0, parts[0].1, NEXT, 1));
            rig.tx.descriptor(table, 1, (parts[1].0, parts[1].1, 0, 0));
            rig.tx.offer_one(slot, table, 32, INDIRECT);
        } else {
            rig.tx.offer_one(slot, at, (HEADER + bytes.len()) as u32, 0);
        }
        rig.rx.offer_one(slot, BUFFERS + 0x4_0000 + u64::from(slot) * 0x800, 0x800 - 0x100, WRITE);
    }
}

/// Pages that are away.
struct Away {
    file: File,
    real: Vec<u8>,
    map: Arc<ResidencyMap>,
    pages: BTreeSet<usize>,
}

impl Away {
    fn new(rig: &Rig) -> Self {
        let file = rig.tx.file.try_clone().unwrap();
        let real = contents(&file);
        file.write_all_at(&vec![0; real.len()], 0).unwrap();
        let map = Arc::new(ResidencyMap::new(MEM_SIZE, PAGE as u64));
        Self { file, pages: (0..real.len() / PAGE).collect(), real, map }
    }

    fn arrive(&mut self, page: usize) {
        if self.pages.remove(&page) {
            let at = page * PAGE;
            let now: Vec<u8> = contents(&self.file)[at..at + PAGE].to_vec();
            assert!(now.iter().all(|byte| *byte == 0), "page {page} was written before it came");
            self.file.write_all_at(&self.real[at..at + PAGE], at as u64).unwrap();
            self.map.set_present(at as u64..(at + PAGE) as u64);
        }
    }
}

fn run(mode: Mode) {
    let mut rig = Rig::new();
    let mut numbers = Numbers(mode.seed | 1);
    let mut features = FEATURES & !MRG_RXBUF;
    if mode.mergeable {
        features |= MRG_RXBUF;
    }
    if mode.event_idx {
        features |= EVENT_IDX;
    }
    rig.done(Command::Features(features));
    let log_file = memfd(0x1000);
    let log_at = 0x200_0000;
    for driver in [&mut rig.rx, &mut rig.tx] {
        driver.config.event_idx = mode.event_idx;
        driver.config.log_used = mode.log.then_some(log_at + driver.origin);
    }
    lay_out(&mut rig, mode);
    let mut away = Away::new(&rig);
    let mut memory = rig.memory.with_residency(&[Some(away.map.clone())]);
    if mode.log {
        let log = DirtyLog::new(log_file.try_clone().unwrap().into(), 0x1000, 0).unwrap();
        memory = memory.with_log(Some(Arc::new(log)));
    }
    rig.done(Command::Memory(memory));
    rig.start(Direction::Receive, true);
    rig.start(Direction::Transmit, true);
    let mut expected = Vec::new();
    let mut room = usize::from(SIZE);
    for number in 0.. {
        let len = received_len(number, mode);
        let chains = (HEADER + len).div_ceil(0x800 - 0x100);
        if room < chains {
            break;
        }
        room -= chains;
        expected.push((frame(number, len), chains));
        let mut bytes = vec![0; HEADER];
        bytes.extend(frame(number, len));
        rig.uplink.deliver(bytes);
    }
    kick(&rig.tx_kick);
    kick(&rig.rx_kick);
    let mut wanted: Vec<usize> = Vec::new();
    let mut quiet = 0;
    let buffers: usize = expected.iter().map(|(_, chains)| chains).sum();
    let (mut sent, mut used) = (0, (0, 0));
    while used != (SIZE, buffers as u16) {
        let busy = rig.turn();
        for event in std::mem::take(&mut rig.events) {
            let Event::Wants { ranges, parked, .. } = event else { panic!("{event:?}") };
            assert!(parked.is_none_or(|range| ranges.iter().any(|(told, _)| *told == range)));
            for (range, _) in ranges {
                let pages = range.gpa as usize / PAGE..(range.gpa + range.len) as usize / PAGE;
                wanted.extend(pages.filter(|page| away.pages.contains(page)));
            }
            wanted.sort_unstable();
            wanted.dedup();
        }
        let mut came = false;
        for _ in 0..numbers.next(6) {
            if !wanted.is_empty() {
                away.arrive(wanted.swap_remove(numbers.next(wanted.len() as u64) as usize));
                came = true;
            }
        }
        if mode.background && numbers.next(4) == 0 {
            let page = numbers.next(MEM_SIZE / PAGE as u64) as usize;
            away.arrive(page);
            wanted.retain(|other| *other != page);
            came = true;
        }
        if came {
            rig.arrived();
        }
        for bytes in rig.uplink.sent() {
            assert_eq!(bytes[HEADER..], frame(sent, sent_len(sent)), "frame {sent}");
            sent += 1;
        }
        // Used indices cannot be read while their pages are away.
        let here = |origin: u64| !away.pages.contains(&((origin + USED) as usize / PAGE));
        used = (
            if here(rig.tx.origin) { rig.tx.used_idx() } else { 0 },
            if here(rig.rx.origin) { rig.rx.used_idx() } else { 0 },
        );
        quiet = if busy || came || !wanted.is_empty() { 0 } else { quiet + 1 };
        assert!(quiet < 10_000, "it stands still, and nothing was asked for: {used:?} of {SIZE}, {buffers}");
    }
    assert_eq!(sent, SIZE);
    let mut index = 0;
    for (bytes, chains) in &expected {
        let mut got = Vec::new();
        for _ in 0..*chains {
            let (head, len) = rig.rx.used(index);
            assert_eq!(head, u32::from(index), "buffers complete in the ring's order");
            let mut piece = vec![0; len as usize];
            let at = BUFFERS + 0x4_0000 + u64::from(index) * 0x800;
            rig.rx.file.read_exact_at(&mut piece, at).unwrap();
            got.extend(piece);
            index += 1;
        }
        assert_eq!(u16::from_le_bytes([got[10], got[11]]), *chains as u16, "num_buffers");
        assert_eq!(got[HEADER..], *bytes);
    }
    (0..SIZE).for_each(|index| assert_eq!(rig.tx.used(index), (u32::from(index), 0)));
    let now = contents(&away.file);
    for page in &away.pages {
        assert!(now[page * PAGE..(page + 1) * PAGE].iter().all(|byte| *byte == 0), "page {page} was written");
    }
    if mode.log {
        let bits = contents(&log_file);
        let marked = |gpa: u64| bits[(gpa >> 15) as usize] & 1 << (gpa >> 12 & 7) != 0;
        assert!(marked(log_at) && marked(log_at + rig.tx.origin));
        assert!((0..index).all(|slot| marked(BUFFERS + 0x4_0000 + u64::from(slot) * 0x800)));
    }
    if !mode.background {
        assert!(!away.pages.is_empty(), "everything was asked for, not only what was needed");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn late_memory_changes_nothing_but_the_time(mode in mode()) {
        run(mode);
    }
}

/// A frame that waits for more buffers has taken some; then all of memory is awaited anew (a device is started again).
#[test]
fn a_held_frame_does_not_break_the_ring_when_memory_goes_away() {
    let mut rig = Rig::running();
    rig.guest_offers(500);
    rig.uplink_delivers(1, 900);
    kick(&rig.rx_kick);
    rig.settle();
    assert_eq!(rig.rx.used_idx(), 0, "the frame waits for another buffer");
    let arrived = rig.lose_pages(0);
    rig.settle();
    assert!(!rig.events.iter().any(|event| matches!(event, Event::RingBroken(..))), "{:?}", rig.events);
    arrived.set_present(0..MEM_SIZE);
    rig.arrived();
    rig.guest_offers(500);
    rig.uplink_delivers(2, 900);
    kick(&rig.rx_kick);
    rig.settle();
    assert_eq!(rig.rx.used_idx(), 2);
    assert_eq!(rig.rx.get::<1>(BUFFERS + 0x4_0000 + 12), [2]);
}
