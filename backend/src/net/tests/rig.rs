//! One ring, one path, one uplink, and what a guest sees of them.
#![forbid(unsafe_code)]

use crate::memory::testing::{USER_BASE, memfd};
use crate::memory::{DirtyLog, GuestMemory, IoVecs, ResidencyMap};
use crate::net::counters::{PairCounters, PairCounts};
use crate::net::deliver::{self, Delivered};
use crate::net::rx::{Receiver, RxSettings, Scratch};
use crate::net::tx::{self, End, TxSettings};
use crate::uplink::Burst;
use crate::uplink::testing::FakeUplink;
use crate::virtq::Queue;
use crate::virtq::tests::driver::{Driver, MEM_SIZE, USED, WRITE};
use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;

/// Where buffers begin.
pub const BUFFERS: u64 = 0x4_0000;

/// `len` bytes that differ from those of another `seed`, and along the way.
pub fn body(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i * 7 + (i >> 8) * 13 + seed * 31) as u8).collect()
}

/// A frame as the uplink has it: a header of `header_len` zeros, and a body.
pub fn frame(header_len: usize, seed: u64, len: usize) -> Vec<u8> {
    let mut frame = vec![0; header_len];
    frame.extend(body(seed, len));
    frame
}

pub struct Rig {
    pub driver: Driver,
    pub queue: Queue,
    pub memory: GuestMemory,
    pub uplink: FakeUplink,
    pub counters: PairCounters,
    pub receiver: Receiver,
    pub rx: RxSettings,
    pub tx: TxSettings,
    scratch: Scratch,
    scratch_tx: tx::Scratch,
    scratch_deliver: deliver::Scratch,
    /// The pieces of each chain, by its head.
    chains: HashMap<u16, Vec<(u64, u32)>>,
    seen: u16,
    next_head: u16,
    next_buffer: u64,
}

impl Rig {
    pub fn new(size: u16, header_len: usize, mergeable: bool) -> Self {
        let driver = Driver::new(size);
        Self {
            queue: Queue::Split(driver.queue()),
            memory: driver.mem.clone(),
            driver,
            uplink: FakeUplink::new(),
            counters: PairCounters::default(),
            receiver: Receiver::default(),
            rx: RxSettings { header_len, mergeable, large: false },
            tx: TxSettings { features: 0, header_len, enabled: true },
            scratch: Scratch::default(),
            scratch_tx: tx::Scratch::default(),
            scratch_deliver: deliver::Scratch::default(),
            chains: HashMap::new(),
            seen: 0,
            next_head: 0,
            next_buffer: BUFFERS,
        }
    }

    /// Offers a chain to receive into, of pieces of these lengths wherever there is room; returns its head.
    pub fn buffer(&mut self, lens: &[u32]) -> u16 {
        let mut pieces = Vec::new();
        for len in lens {
            if self.next_buffer + u64::from(*len) > MEM_SIZE {
                self.next_buffer = BUFFERS;
            }
            pieces.push((self.next_buffer, *len));
            // Odd gaps, so that nothing depends on alignment.
            self.next_buffer += u64::from(*len) + 3;
        }
        self.buffer_at(&pieces)
    }

    /// Offers a chain to receive into, of these pieces.
    pub fn buffer_at(&mut self, pieces: &[(u64, u32)]) -> u16 {
        let parts: Vec<_> = pieces.iter().map(|(addr, len)| (*addr, *len, WRITE)).collect();
        let head = self.offer(&parts);
        self.chains.insert(head, pieces.to_vec());
        head
    }

    /// Offers any chain at the next free descriptors.
    pub fn offer(&mut self, parts: &[(u64, u32, u16)]) -> u16 {
        let count = parts.len() as u16;
        if self.next_head + count > self.driver.config.size {
            self.next_head = 0;
        }
        let head = self.next_head;
        self.next_head += count;
        self.driver.offer_chain(head, parts);
        head
    }

    pub fn receive(&mut self) -> End {
        self.receive_up_to(64)
    }

    /// One burst of the receive path, as the pair does it.
    pub fn receive_up_to(&mut self, budget: u32) -> End {
        let (used, end) = self.receiver.run(
            &mut self.queue,
            &self.memory,
            &mut self.uplink,
            &mut self.scratch,
            self.rx,
            &self.counters,
            budget,
        );
        self.publish(used);
        end
    }

    pub fn transmit(&mut self) -> End {
        self.transmit_up_to(64)
    }

    /// One burst of the transmit path, as the pair does it.
    pub fn transmit_up_to(&mut self, budget: u32) -> End {
        let (used, end) = tx::run(
            &mut self.queue,
            &self.memory,
            &mut self.uplink,
            &mut self.scratch_tx,
            self.tx,
            &self.counters,
            budget,
        );
        self.publish(used);
        end
    }

    /// One burst of frames from memory, each with a header of `header_len` bytes in front, in pieces cut at `cut`.
    pub fn deliver(&mut self, frames: &[Vec<u8>], header_len: usize, cut: usize) -> Delivered {
        let mut buffers = IoVecs::new();
        let mut ranges = Vec::new();
        for frame in frames {
            let start = buffers.len();
            let (header, body) = frame.split_at(header_len);
            buffers.push_own(header);
            body.chunks(cut).for_each(|piece| assert!(buffers.push_own(piece)));
            ranges.push(start..buffers.len());
        }
        let done = deliver::run(
            &mut self.queue,
            &self.memory,
            self.receiver.kept(),
            &mut self.scratch_deliver,
            self.rx,
            &self.counters,
            &Burst { buffers: buffers.as_slice(), frames: &ranges },
        );
        self.publish(done.used);
        done
    }

    fn publish(&mut self, used: u32) {
        let before = self.driver.used_idx();
        if used > 0 {
            self.queue.publish();
        }
        let published = self.driver.used_idx().wrapping_sub(before);
        assert_eq!(u32::from(published), used, "chains that were used are counted");
    }

    pub fn counts(&self) -> PairCounts {
        self.counters.read()
    }

    /// Used elements the guest has not looked at yet.
    pub fn used(&mut self) -> Vec<(u16, u32)> {
        let mut elements = Vec::new();
        while self.seen != self.driver.used_idx() {
            let (head, len) = self.driver.used(self.seen);
            elements.push((head as u16, len));
            self.seen = self.seen.wrapping_add(1);
        }
        elements
    }

    pub fn bytes(&self, at: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        std::os::unix::fs::FileExt::read_exact_at(&self.driver.file, &mut bytes, at).unwrap();
        bytes
    }

    fn chain_bytes(&self, head: u16, mut len: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (addr, piece) in &self.chains[&head] {
            let take = len.min(*piece);
            bytes.extend(self.bytes(*addr, take));
            len -= take;
        }
        assert_eq!(len, 0, "more used than there is");
        bytes
    }

    /// The frames a driver finds: header (num_buffers taken out), body; and how many chains each took.
    pub fn frames(&mut self) -> Vec<(Vec<u8>, usize)> {
        let mut frames = Vec::new();
        let mut elements = self.used().into_iter();
        while let Some((head, len)) = elements.next() {
            let mut frame = self.chain_bytes(head, len);
            let mut count = 1;
            // A chain that was refused comes back empty; it says nothing about others.
            if self.rx.header_len == 12 && len > 0 {
                let given = u16::from_le_bytes([frame[10], frame[11]]);
                frame[10..12].fill(0);
                while count < given {
                    let (head, len) = elements.next().expect("num_buffers");
                    frame.extend(self.chain_bytes(head, len));
                    count += 1;
                }
                assert_ne!(given, 0);
            }
            frames.push((frame, usize::from(count)));
        }
        frames
    }

    /// From now on pages of the guest are missing, but for the first `present` bytes.
    pub fn lose_pages(&mut self, present: u64) -> Arc<ResidencyMap> {
        let map = Arc::new(ResidencyMap::new(MEM_SIZE, 0x1000));
        map.set_present(0..present);
        self.memory = self.memory.with_residency(&[Some(map.clone())]);
        self.queue.remap(&self.memory).unwrap();
        map
    }

    /// From now on writes are logged; returns the log.
    pub fn log_writes(&mut self) -> File {
        let file = memfd(0x1000);
        let log = DirtyLog::new(file.try_clone().unwrap().into(), 0x1000, 0).unwrap();
        self.memory = self.memory.with_log(Some(Arc::new(log)));
        self.queue.remap(&self.memory).unwrap();
        self.queue.set_log_used(Some(self.driver.config.used_user - USER_BASE));
        assert_eq!(self.driver.config.used_user - USER_BASE, USED);
        file
    }
}
