//! AF_XDP without a back-end: a socket on one queue, XDP programs of a few instructions, and `vubench xdp-loop`, the bare
//! loop that is the floor for every back-end on AF_XDP.

mod bpf;
mod ring;
mod socket;

use anyhow::{Context, Result};
use bpf::Steering;
use lab::wire::{FOREIGN_MAC, Frame, Link};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use socket::{FRAME_LEN, FRAMES, Socket};

use crate::interrupt;
use crate::raw::Direction;

/// Frames per step, as many as the kernel sends in one call.
const BATCH: u32 = 32;
/// How long a reader waits for a frame before it looks whether it is to end.
const WAIT_MS: i32 = 100;

#[derive(clap::Args)]
pub struct Args {
    /// Interface of the caller's network name space
    #[arg(long)]
    iface: String,
    /// Which way
    #[arg(long)]
    direction: Direction,
    /// Frame length in bytes, without FCS
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// CPU to run on
    #[arg(long, default_value_t = 0)]
    cpu: usize,
}

/// Sends or receives until it is killed: a copy-mode AF_XDP socket, no ring to a guest, no guest.
pub fn run(args: &Args) -> Result<()> {
    interrupt::install()?;
    let mut cpus = CpuSet::new();
    cpus.set(args.cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cpus).with_context(|| format!("pinning to CPU {}", args.cpu))?;
    let link = Link::named(&args.iface);
    // Also for sending: the driver's path is the same as that of the others then.
    let steering = Steering::attach(&link)?;
    let socket = Socket::bind(&link)?;
    steering.set(socket.fd())?;
    match args.direction {
        Direction::Tx => send(socket, args.size),
        Direction::Rx => receive(socket),
    }
}

fn send(socket: Socket, size: usize) -> Result<()> {
    let mut sender = Sender::new(socket, &Frame::numbered(0, size, 0, FOREIGN_MAC));
    while interrupt::check().is_ok() {
        sender.send(BATCH)?;
    }
    Ok(())
}

/// Sends one frame many times.
pub struct Sender {
    socket: Socket,
    free: Vec<u64>,
    len: u32,
}

impl Sender {
    /// Out of `link`, on its queue 0.
    pub fn open(link: &Link, frame: &[u8]) -> Result<Self> {
        Ok(Self::new(Socket::bind(link)?, frame))
    }

    fn new(mut socket: Socket, frame: &[u8]) -> Self {
        // Few, so that they stay in the cache.
        (0..BATCH).for_each(|i| socket.write(i, frame));
        let free = (0..BATCH).map(|i| u64::from(i * FRAME_LEN)).collect();
        Self { socket, free, len: frame.len() as u32 }
    }

    /// Sends up to `n` frames, [`BATCH`] at most; returns how many the kernel took from us.
    pub fn send(&mut self, n: u32) -> Result<u32> {
        let n = self.free.len().min(n as usize);
        for address in self.free.drain(self.free.len() - n..) {
            self.socket.tx.push(libc::xdp_desc { addr: address, len: self.len, options: 0 });
        }
        self.socket.tx.publish();
        self.socket.kick()?;
        while let Some(address) = self.socket.completion.pop() {
            self.free.push(address);
        }
        self.socket.completion.release();
        Ok(n as u32)
    }
}

fn receive(mut socket: Socket) -> Result<()> {
    for i in 0..FRAMES {
        socket.fill.push(u64::from(i * FRAME_LEN));
    }
    socket.fill.publish();
    while interrupt::check().is_ok() {
        let mut got = 0;
        while got < BATCH
            && let Some(frame) = socket.rx.pop()
        {
            // Its place is a multiple of the chunk's length plus the headroom that the kernel leaves.
            socket.fill.push(frame.addr - frame.addr % u64::from(FRAME_LEN));
            got += 1;
        }
        if got == 0 {
            socket.wait(WAIT_MS)?;
            continue;
        }
        socket.rx.release();
        socket.fill.publish();
    }
    Ok(())
}
