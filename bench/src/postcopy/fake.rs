//! A back-end for tests, in this process: it blocks on missing pages as DPDK does, and can be told to do one thing
//! wrong. A front-end's checks are worth something only if they find that.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab::rawfront::{Reply, Wire, flag, msg, protocol, virtio};

use super::PAGE;
use super::layout::{RINGS, RX, TX};
use super::uffd::Uffd;
use crate::mapping::Mapping;

/// What it does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    Honest,
    /// Touches a buffer when it has answered with its table.
    TouchesBeforeAck,
    /// Touches it before it is registered: that makes a page of zeros.
    FillsHole,
    /// Uses two buffers in the wrong order.
    Disorder,
    /// Sends packets back as they are in a hole.
    Zeros,
    /// Answers GET_VRING_BASE with one too many.
    FalseBase,
    /// Unregisters before it unmaps when the connection ends.
    UnregistersFirst,
    /// Never touches a buffer.
    Idle,
}

const IDLE_NAP: Duration = Duration::from_micros(50);
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug, Default)]
struct Ring {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    next: u16,
    started: bool,
}

impl Ring {
    fn is_empty(&self, memory: &Mapping) -> bool {
        !self.started || memory.load_u16(self.avail + 2) == self.next
    }

    /// Descriptor index and guest address of the next buffer.
    fn head(&self, memory: &Mapping) -> (u16, u64) {
        let head = memory.load_u16(self.avail + 4 + 2 * u64::from(self.next % self.size));
        let at = self.desc + 16 * u64::from(head);
        let address = u64::from(memory.load_u32(at)) | u64::from(memory.load_u32(at + 4)) << 32;
        (head, address)
    }

    fn use_up(&mut self, memory: &Mapping, head: u16, len: u32) {
        let at = self.used + 4 + 8 * u64::from(self.next % self.size);
        memory.store_u32(at, head.into());
        memory.store_u32(at + 4, len);
        self.next = self.next.wrapping_add(1);
        memory.store_u16(self.used + 2, self.next);
    }
}

#[derive(Debug)]
struct Device {
    rings: Mutex<[Ring; RINGS]>,
    memory: Mapping,
    ended: AtomicBool,
}

/// The running back-end. It serves one front-end after the other.
#[derive(Debug)]
pub struct Fake {
    /// Where it listens.
    pub socket: PathBuf,
    _folder: tempfile::TempDir,
}

impl Fake {
    /// Starts it; its threads end with this process.
    pub fn start(manner: Manner) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("fake.sock");
        let listener = UnixListener::bind(&socket)?;
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let mut session = Session::new(Wire::from_stream(stream), manner);
                // The end of the connection is an error too.
                while session.step().is_ok() {}
                session.close();
            }
        });
        Ok(Self { socket, _folder: folder })
    }
}

struct Session {
    wire: Wire,
    manner: Manner,
    uffd: Option<Uffd>,
    device: Option<Arc<Device>>,
    user: u64,
    mover: Option<JoinHandle<()>>,
}

fn word(bytes: &[u8], at: usize) -> Result<u64> {
    let bytes = bytes.get(at..at + 8).context("a short message")?;
    Ok(u64::from_ne_bytes(bytes.try_into()?))
}

impl Session {
    fn new(wire: Wire, manner: Manner) -> Self {
        Self { wire, manner, uffd: None, device: None, user: 0, mover: None }
    }

    fn answer(&self, request: u32, payload: &[u8]) -> Result<()> {
        let reply = Wire::encode(request, flag::VERSION | flag::REPLY, payload);
        Ok(self.wire.send_raw(&reply, &[])?)
    }

    fn step(&mut self) -> Result<()> {
        let m = self.wire.recv(PATIENCE)?;
        let features = virtio::PROTOCOL_FEATURES | virtio::VERSION_1;
        match m.request {
            msg::GET_FEATURES => self.answer(m.request, &features.to_ne_bytes())?,
            msg::GET_PROTOCOL_FEATURES => {
                let offer = protocol::PAGEFAULT | protocol::REPLY_ACK;
                self.answer(m.request, &offer.to_ne_bytes())?;
            }
            msg::POSTCOPY_ADVISE => {
                let uffd = Uffd::new()?;
                let reply = Wire::encode(m.request, flag::VERSION | flag::REPLY, &[]);
                self.wire.send_raw(&reply, &[uffd.duplicate()?.as_raw_fd()])?;
                self.uffd = Some(uffd);
            }
            msg::SET_MEM_TABLE if m.fds.len() == 1 => self.table(m)?,
            msg::SET_VRING_NUM => self.ring(&m.payload, |r, n, _| r.size = n as u16)?,
            msg::SET_VRING_BASE => self.ring(&m.payload, |r, n, _| r.next = n as u16)?,
            msg::SET_VRING_ADDR => {
                let user = self.user;
                self.ring(&m.payload, |r, _, p| {
                    let place = |at| word(p, at).unwrap_or(0) - user;
                    (r.desc, r.used, r.avail) = (place(8), place(16), place(24));
                })?;
            }
            msg::SET_VRING_KICK => self.ring(&m.payload, |r, _, _| r.started = true)?,
            msg::GET_VRING_BASE => {
                let mut base = 0;
                self.ring(&m.payload, |r, _, _| {
                    r.started = false;
                    base = r.next;
                })?;
                if self.manner == Manner::FalseBase {
                    base = base.wrapping_add(1);
                }
                let mut reply = m.payload[..4].to_vec();
                reply.extend_from_slice(&u32::from(base).to_ne_bytes());
                self.answer(m.request, &reply)?;
            }
            msg::POSTCOPY_END => {
                if let (Some(uffd), Some(device)) = (self.uffd.take(), &self.device) {
                    uffd.unregister(device.memory.address(), device.memory.len())?;
                }
                self.answer(m.request, &0u64.to_ne_bytes())?;
            }
            _ if m.flags & flag::NEED_REPLY != 0 => self.answer(m.request, &0u64.to_ne_bytes())?,
            _ => {}
        }
        Ok(())
    }

    fn ring(&self, payload: &[u8], change: impl FnOnce(&mut Ring, u64, &[u8])) -> Result<()> {
        let first = word(payload, 0)?;
        let device = self.device.as_ref().context("no memory")?;
        if self.manner == Manner::UnregistersFirst && device.rings.try_lock().is_err() {
            bail!("it does not wait, it gives up");
        }
        // As in DPDK, this waits for the burst that is on its way.
        let mut rings = device.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let ring = rings.get_mut((first & 0xff) as usize).context("no such ring")?;
        change(ring, first >> 32, payload);
        Ok(())
    }

    fn table(&mut self, mut m: Reply) -> Result<()> {
        let file = File::from(m.fds.remove(0));
        let len = word(&m.payload, 16)?;
        self.user = word(&m.payload, 24)?;
        let memory = Mapping::of_file(&file, len)?;
        if self.manner == Manner::FillsHole {
            memory.load_u32(len - PAGE);
            memory.store_u32(len - PAGE, 0);
        }
        // Without ADVISE it is a machine that has all its memory, and nobody waits for an answer.
        if let Some(uffd) = &self.uffd {
            uffd.register(memory.address(), len)?;
            let mut reply = m.payload.clone();
            reply[24..32].copy_from_slice(&memory.address().to_ne_bytes());
            self.answer(m.request, &reply)?;
        }
        if self.manner == Manner::TouchesBeforeAck {
            memory.load_u32(len - PAGE);
        }
        let device = Arc::new(Device { rings: Mutex::default(), memory, ended: AtomicBool::new(false) });
        self.device = Some(Arc::clone(&device));
        let manner = self.manner;
        self.mover = Some(std::thread::spawn(move || {
            while !device.ended.load(Ordering::Acquire) {
                if manner == Manner::Idle || !burst(&device, manner) {
                    std::thread::sleep(IDLE_NAP);
                }
            }
        }));
        Ok(())
    }

    fn close(mut self) {
        let (Some(device), Some(mover)) = (self.device.take(), self.mover.take()) else { return };
        device.ended.store(true, Ordering::Release);
        if self.manner == Manner::UnregistersFirst {
            let uffd = self.uffd.take().expect("it was advised");
            uffd.unregister(device.memory.address(), device.memory.len()).expect("unregister");
        }
        mover.join().expect("the mover does not panic");
    }
}

/// Sends packets back while the RX ring has buffers, else drops them. Whether there were any.
fn burst(device: &Device, manner: Manner) -> bool {
    const BURST: usize = 32;
    let memory = &device.memory;
    let mut rings = device.rings.lock().unwrap_or_else(PoisonError::into_inner);
    let mut moved = 0;
    while moved < BURST && !rings[TX].is_empty(memory) {
        let (mut head, address) = rings[TX].head(memory);
        let mut packet = [0; 76];
        memory.read(address, &mut packet);
        if manner == Manner::Zeros {
            packet.fill(0);
        }
        if !rings[RX].is_empty(memory) {
            let (head, to) = rings[RX].head(memory);
            memory.write(to, &packet);
            rings[RX].use_up(memory, head, packet.len() as u32);
        }
        if manner == Manner::Disorder && moved == 1 {
            head += 1;
        }
        rings[TX].use_up(memory, head, 0);
        moved += 1;
    }
    moved > 0
}
