//! Ports of a back-end that share one virtual interface, with guests that are small drivers of ours, and the other end of
//! the cable.
//!
//! ```text
//!   guest A ┐
//!           ├─ back-end ── nic0 ════ wire0 ── Outside: frames put on the cable, and captured from it
//!   guest B ┘
//! ```
//! Everything is in a network namespace with a BPF file system of its own, and goes with it.
#![forbid(unsafe_code)]

use crate::netns::NetNs;
use crate::rawfront::{Backend, Front, PATIENCE, Setup, eventually};
use crate::scenario::skip;
use crate::wire::{Capture, Frame, Injector, Link};
use anyhow::{Context, Result, ensure};
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

/// The interface that back-ends are given.
pub const NIC: &str = "nic0";
/// The other end of its cable.
pub const WIRE: &str = "wire0";
/// Bytes for captured frames.
const CAPTURE_BYTES: usize = 16 << 20;
/// How long something is waited for that must not come.
const QUIET: Duration = Duration::from_millis(200);

/// The address of the guest with this number.
pub fn mac(guest: u8) -> [u8; 6] {
    [0x02, 0, 0, 0, 0xa0, guest]
}

/// Addresses that frames from outside come from.
pub const OUTSIDE: [u8; 6] = [0x02, 0, 0, 0, 0x0f, 1];

/// The interface, its cable, and who is outside.
pub struct Cable {
    /// Where all this is.
    pub netns: NetNs,
    /// What is put on the cable.
    pub injector: Injector,
    /// What comes out of it.
    pub capture: Capture,
}

impl Cable {
    /// A cable between interfaces of so many queues.
    pub fn new(queues: u16) -> Result<Self> {
        let netns = NetNs::with_bpf()?;
        netns.add_veth(NIC, WIRE, queues)?;
        let (injector, capture) = netns.run(|| {
            let link = Link::named(WIRE);
            Ok((Injector::open(&link)?, Capture::start(&link, CAPTURE_BYTES)?))
        })?;
        Ok(Self { netns, injector, capture })
    }

    /// Starts a back-end with one port for each text, which is more options of `xdp:nic0`: port `p0`, `p1` and so on.
    pub fn start(&self, queue_pairs: u16, ports: &[&str]) -> Result<Backend> {
        self.start_with(queue_pairs, ports, "")
    }

    /// The same, with more of the configuration in front.
    pub fn start_with(&self, queue_pairs: u16, ports: &[&str], more: &str) -> Result<Backend> {
        let port = |(index, options): (usize, &&str)| {
            format!(
                "[[port]]\nname = 'p{index}'\nsocket = '@/p{index}.sock'\nuplink = 'xdp:{NIC}{options}'\n\
                 queue-pairs = {queue_pairs}\n"
            )
        };
        let config = more.to_owned() + &ports.iter().enumerate().map(port).collect::<String>();
        self.netns.run(|| Backend::with_config(&config))
    }

    /// Puts frames on the cable, each with its number, for one address.
    pub fn send(&self, numbers: Range<u64>, len: usize, destination: [u8; 6]) -> Result<()> {
        for number in numbers {
            let frame = Frame::from_to(number, len, number as u16 % 64, OUTSIDE, destination);
            self.put(&frame)?;
        }
        Ok(())
    }

    /// Puts a frame on the cable.
    pub fn put(&self, frame: &[u8]) -> Result<()> {
        let taken = eventually(PATIENCE, || self.injector.send(&[frame]).is_ok_and(|taken| taken == 1));
        ensure!(taken, "the cable takes no frame");
        Ok(())
    }

    /// The next frame of ours that comes out of the cable.
    pub fn next_frame(&mut self) -> Result<Option<Vec<u8>>> {
        Ok(self.capture.next(QUIET)?.map(<[u8]>::to_vec))
    }

    /// Waits until these numbered frames have come out, whole and in order, each once; others may come between.
    pub fn expect(&mut self, numbers: Range<u64>) -> Result<()> {
        for number in numbers {
            loop {
                let frame =
                    self.capture.next(PATIENCE)?.with_context(|| format!("frame {number} did not come"))?;
                match Frame::number(frame) {
                    Some(got) => {
                        ensure!(got? == number, "frame {number} was expected");
                        break;
                    }
                    None => continue,
                }
            }
        }
        Ok(())
    }

    /// Numbered frames that come out within a moment.
    pub fn rest(&mut self) -> Result<usize> {
        let mut count = 0;
        while let Some(frame) = self.capture.next(QUIET)? {
            count += usize::from(Frame::number(frame).is_some());
        }
        Ok(count)
    }
}

/// A guest of a port.
pub struct Guest {
    /// Its front-end.
    pub front: Front,
    /// Its address.
    pub mac: [u8; 6],
}

impl Guest {
    /// Brings the guest with this number up, ready to receive on all its rings.
    pub fn up(socket: &Path, number: u8, queue_pairs: u16) -> Result<Self> {
        let setup = Setup { queue_pairs, ring_size: 256, ..Setup::default() };
        let mut guest = Self { front: Front::up_with(socket, setup)?, mac: mac(number) };
        guest.offer()?;
        Ok(guest)
    }

    /// Gives the device empty buffers, as many as it may have.
    pub fn offer(&mut self) -> Result<()> {
        for ring in self.front.rings.iter_mut().step_by(2) {
            while ring.avail_idx.wrapping_sub(ring.seen) < ring.size - 1 {
                ring.queue_buffer()?;
            }
            ring.kick()?;
        }
        Ok(())
    }

    /// Frames that have come, without headers, with their queue pairs.
    pub fn take(&mut self) -> Result<Vec<(usize, Vec<u8>)>> {
        let mut frames = Vec::new();
        for (pair, ring) in self.front.rings.iter_mut().step_by(2).enumerate() {
            for frame in ring.take_received()? {
                ensure!(frame[..10] == [0; 10] && frame[10..12] == [1, 0], "header {:?}", &frame[..12]);
                frames.push((pair, frame[Front::HEADER_LEN..].to_vec()));
            }
        }
        if !frames.is_empty() {
            self.offer()?;
        }
        Ok(frames)
    }

    /// Waits for so many numbered frames: their numbers, each frame whole.
    pub fn numbers(&mut self, count: usize) -> Result<Vec<u64>> {
        let mut numbers = Vec::new();
        let mut wrong = None;
        eventually(PATIENCE, || {
            match self.take() {
                Ok(frames) => {
                    for (_, frame) in frames {
                        match Frame::number(&frame) {
                            Some(Ok(number)) => numbers.push(number),
                            Some(Err(error)) => wrong = Some(error),
                            None => {}
                        }
                    }
                }
                Err(error) => wrong = Some(error),
            }
            wrong.is_some() || numbers.len() >= count
        });
        match wrong {
            Some(error) => Err(error),
            None if numbers.len() < count => anyhow::bail!("{} of {count} frames came", numbers.len()),
            None => Ok(numbers),
        }
    }

    /// Waits for exactly these frames in order.
    pub fn expect(&mut self, numbers: Range<u64>) -> Result<()> {
        let got = self.numbers((numbers.end - numbers.start) as usize)?;
        ensure!(got.iter().copied().eq(numbers.clone()), "{got:?} instead of {numbers:?}");
        Ok(())
    }

    /// Numbered frames that come within a moment.
    pub fn rest(&mut self) -> Result<usize> {
        std::thread::sleep(QUIET);
        Ok(self.take()?.iter().filter(|(_, frame)| Frame::number(frame).is_some()).count())
    }

    /// Sends numbered frames on one pair, and waits until the device has taken them.
    pub fn send_on(&mut self, pair: usize, numbers: Range<u64>, len: usize, to: [u8; 6]) -> Result<()> {
        for number in numbers {
            let frame = Frame::from_to(number, len, number as u16 % 64, self.mac, to);
            self.send_frame_on(pair, &frame)?;
        }
        let ring = &self.front.rings[2 * pair + 1];
        ensure!(ring.is_drained_within(PATIENCE), "the device does not take frames");
        Ok(())
    }

    /// Sends numbered frames on the first pair.
    pub fn send(&mut self, numbers: Range<u64>, len: usize, to: [u8; 6]) -> Result<()> {
        self.send_on(0, numbers, len, to)
    }

    /// Sends a frame behind a zero header.
    pub fn send_frame(&mut self, frame: &[u8]) -> Result<()> {
        self.send_frame_on(0, frame)
    }

    fn send_frame_on(&mut self, pair: usize, frame: &[u8]) -> Result<()> {
        let ring = &mut self.front.rings[2 * pair + 1];
        let room = eventually(PATIENCE, || {
            ring.used_idx().is_ok_and(|used| ring.avail_idx.wrapping_sub(used) < ring.size / 2)
        });
        ensure!(room, "the transmit ring stands still");
        ring.queue_frame(Front::HEADER_LEN, frame)?;
        ring.kick()?;
        Ok(())
    }
}

/// Runs a test with a cable, or says why not.
pub fn with_cable(name: &str, queues: u16, body: impl FnOnce(&mut Cable) -> Result<()>) -> Result<()> {
    match Cable::new(queues) {
        Ok(mut cable) => body(&mut cable),
        Err(why) => {
            skip(name, &format!("{why:#}"));
            Ok(())
        }
    }
}
