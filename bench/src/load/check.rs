//! `--check`: what is sent is numbered and must stay as it is while the device has it; what comes must be whole and in
//! order.
#![forbid(unsafe_code)]

use anyhow::{Result, ensure};

use super::lane::Piece;
use crate::driver::{Buffers, Used};
use crate::packet::{self, Content, HEADER};

/// Packets that go out.
pub struct Outgoing {
    next: u64,
    /// The number of the packet in each buffer.
    numbers: Vec<u64>,
    packet: Vec<u8>,
    found: Vec<u8>,
    checked: u64,
}

impl Outgoing {
    /// For a ring of this size and packets of this length, header included.
    pub fn new(ring_size: u16, len: usize) -> Self {
        let numbers = vec![0; ring_size.into()];
        Self { next: 0, numbers, packet: vec![0; len], found: vec![0; len], checked: 0 }
    }

    /// Writes the next packet into a buffer.
    pub fn goes(&mut self, buffers: &Buffers, id: u16) {
        packet::build(self.next, &mut self.packet);
        buffers.write(id, &self.packet);
        self.numbers[usize::from(id)] = self.next;
        self.next += 1;
    }

    /// The device has used it: nothing may have been written.
    pub fn came_back(&mut self, buffers: &Buffers, used: Used) -> Result<()> {
        let number = self.numbers[usize::from(used.id)];
        ensure!(used.len == 0, "the device says that it wrote {} bytes into sent packet {number}", used.len);
        packet::build(number, &mut self.packet);
        buffers.read(used.id, &mut self.found);
        ensure!(self.found == self.packet, "the device has changed sent packet {number}");
        self.checked += 1;
        Ok(())
    }

    /// How many were looked at.
    pub fn checked(&self) -> u64 {
        self.checked
    }
}

/// What must come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Any good frame.
    Anything,
    /// Frames of ours of this length, in order; some may be missing.
    Ours(usize),
}

/// Packets that come in.
pub struct Incoming {
    expect: Expect,
    next: u64,
    lost: u64,
    packet: Vec<u8>,
    checked: u64,
}

impl Incoming {
    /// Nothing came yet.
    pub fn new(expect: Expect) -> Self {
        Self { expect, next: 0, lost: 0, packet: Vec::new(), checked: 0 }
    }

    /// One more buffer of a packet.
    pub fn piece(&mut self, buffers: &Buffers, piece: Piece) -> Result<()> {
        let len = piece.used.len;
        ensure!(len <= buffers.len(), "a buffer of {} bytes was used with {len}", buffers.len());
        if piece.first {
            self.packet.clear();
        }
        let at = self.packet.len();
        self.packet.resize(at + len as usize, 0);
        buffers.read(piece.used.id, &mut self.packet[at..]);
        if piece.more == 0 { self.whole() } else { Ok(()) }
    }

    fn whole(&mut self) -> Result<()> {
        let (number, frame) = (self.checked, self.packet.len().saturating_sub(HEADER));
        let content = packet::look(&self.packet);
        match (self.expect, content) {
            (Expect::Anything, Content::Foreign | Content::Ours(_)) => {}
            (Expect::Ours(_), Content::Ours(seq)) => {
                ensure!(seq >= self.next, "frame {seq} came where {} is due", self.next);
                self.lost += seq - self.next;
                self.next = seq + 1;
            }
            (_, content) => anyhow::bail!("received frame {number} of {frame} bytes: {content:?}"),
        }
        if let Expect::Ours(expected) = self.expect {
            ensure!(frame == expected, "received frame {number} has {frame} bytes instead of {expected}");
        }
        self.checked += 1;
        Ok(())
    }

    /// How many were looked at.
    pub fn checked(&self) -> u64 {
        self.checked
    }

    /// Frames that did not come though later ones did.
    pub fn lost(&self) -> u64 {
        self.lost
    }
}
