//! Bare loops with one system call per packet.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd};

use super::device::VNET_HDR_LEN;
use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, poll};

use super::{BATCH, Mover};

/// Room for any frame without segmentation offload.
pub const BUFFER_LEN: usize = 2048;
const WAIT_MS: u16 = 100;

/// Waits until the tap has a frame, 100 ms at most.
pub fn wait_readable(file: &File) -> Result<()> {
    match poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], WAIT_MS) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(e) => Err(e).context("poll"),
    }
}

/// Header and frame in one buffer.
pub struct Writer {
    file: File,
    buffer: Vec<u8>,
}

impl Writer {
    pub fn new(file: File, frame: &[u8]) -> Self {
        let mut buffer = vec![0; VNET_HDR_LEN];
        buffer.extend_from_slice(frame);
        Self { file, buffer }
    }
}

impl Mover for Writer {
    fn step(&mut self) -> Result<u64> {
        for _ in 0..BATCH {
            let n = self.file.write(&self.buffer).context("write to the tap")?;
            ensure!(n == self.buffer.len(), "short write");
        }
        Ok(BATCH as u64)
    }
}

/// Header and frame apart.
pub struct VectoredWriter {
    file: File,
    frame: Vec<u8>,
}

impl VectoredWriter {
    pub fn new(file: File, frame: &[u8]) -> Self {
        Self { file, frame: frame.to_vec() }
    }
}

impl Mover for VectoredWriter {
    fn step(&mut self) -> Result<u64> {
        let header = [0u8; VNET_HDR_LEN];
        for _ in 0..BATCH {
            let pieces = [IoSlice::new(&header), IoSlice::new(&self.frame)];
            let n = self.file.write_vectored(&pieces).context("writev to the tap")?;
            ensure!(n == header.len() + self.frame.len(), "short write");
        }
        Ok(BATCH as u64)
    }
}

/// Reads until the tap is empty.
pub struct Reader {
    file: File,
    buffers: Vec<[u8; BUFFER_LEN]>,
}

impl Reader {
    pub fn new(file: File) -> Self {
        Self { file, buffers: vec![[0; BUFFER_LEN]; BATCH] }
    }
}

impl Mover for Reader {
    fn step(&mut self) -> Result<u64> {
        let Self { file, buffers } = self;
        read_batch(file, |i| (&*file).read(&mut buffers[i]))
    }
}

/// The same with the header in a place of its own.
pub struct VectoredReader {
    file: File,
    headers: [[u8; VNET_HDR_LEN]; BATCH],
    buffers: Vec<[u8; BUFFER_LEN]>,
}

impl VectoredReader {
    pub fn new(file: File) -> Self {
        Self { file, headers: [[0; VNET_HDR_LEN]; BATCH], buffers: vec![[0; BUFFER_LEN]; BATCH] }
    }
}

impl Mover for VectoredReader {
    fn step(&mut self) -> Result<u64> {
        let Self { file, headers, buffers } = self;
        read_batch(file, |i| {
            (&*file).read_vectored(&mut [IoSliceMut::new(&mut headers[i]), IoSliceMut::new(&mut buffers[i])])
        })
    }
}

fn read_batch(file: &File, mut read: impl FnMut(usize) -> io::Result<usize>) -> Result<u64> {
    let mut packets = 0;
    for i in 0..BATCH {
        match read(i) {
            Ok(n) => ensure!(n > VNET_HDR_LEN, "short read"),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if packets == 0 {
                    wait_readable(file)?;
                }
                break;
            }
            Err(e) => return Err(e).with_context(|| format!("read from tap fd {}", file.as_raw_fd())),
        }
        packets += 1;
    }
    Ok(packets)
}
