//! Bare loops on io_uring, a batch per system call.
//!
//! The tap is O_NONBLOCK: an operation on an empty tap ends with EAGAIN. With a blocking file each of the 64 pending reads
//! would arm its own poll, and each packet would wake all of them.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use super::device::VNET_HDR_LEN;
use anyhow::{Context, Result, bail, ensure};
use io_uring::types::{BufRingEntry, Fixed};
use io_uring::{IoUring, cqueue, opcode, squeue};

use super::plain::{BUFFER_LEN, wait_readable};
use super::{BATCH, Mover};

const TAP: Fixed = Fixed(0);

fn ring(file: &File, completions: u32) -> Result<IoUring> {
    let ring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_cqsize(completions)
        .build(BATCH as u32)
        .context("io_uring set-up (Linux 6.1 or later)")?;
    ring.submitter().register_files(&[file.as_raw_fd()]).context("registering the tap")?;
    Ok(ring)
}

fn push(ring: &mut IoUring, entry: &squeue::Entry) -> Result<()> {
    // SAFETY: every caller's entry points only to memory that its Mover owns and keeps in place; each step waits
    // for all completions of what it submitted, or (multishot) the ring is dropped before the memory.
    unsafe { ring.submission().push(entry) }.context("submission queue is full")
}

/// What a vectored operation points to; boxed, so that it stays where it is.
struct Batch {
    /// Declared before the memory that its operations point to, so that it is dropped first.
    ring: IoUring,
    file: File,
    iovecs: Box<[[libc::iovec; 2]]>,
    _headers: Box<[[u8; VNET_HDR_LEN]]>,
    _buffers: Box<[[u8; BUFFER_LEN]]>,
}

impl Batch {
    fn new(file: File, frame: &[u8], room: usize) -> Result<Self> {
        ensure!(frame.len() <= BUFFER_LEN && room <= BUFFER_LEN, "frames of up to {BUFFER_LEN} bytes");
        let mut headers = vec![[0u8; VNET_HDR_LEN]; BATCH].into_boxed_slice();
        let mut buffers = vec![[0u8; BUFFER_LEN]; BATCH].into_boxed_slice();
        let iovecs = headers
            .iter_mut()
            .zip(buffers.iter_mut())
            .map(|(header, buffer)| {
                buffer[..frame.len()].copy_from_slice(frame);
                [
                    libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: VNET_HDR_LEN },
                    libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: room },
                ]
            })
            .collect();
        Ok(Self { ring: ring(&file, 2 * BATCH as u32)?, file, iovecs, _headers: headers, _buffers: buffers })
    }

    /// Submits one operation per buffer and waits for all; returns how many moved a packet.
    fn run(&mut self, entry: impl Fn(*const libc::iovec) -> squeue::Entry) -> Result<u64> {
        for i in 0..BATCH {
            let iovec = self.iovecs[i].as_ptr();
            push(&mut self.ring, &entry(iovec))?;
        }
        self.ring.submit_and_wait(BATCH).or_else(|e| match e.raw_os_error() {
            Some(libc::EINTR) => Ok(0),
            _ => Err(e),
        })?;
        let (mut ended, mut packets) = (0, 0);
        while ended < BATCH {
            for c in self.ring.completion() {
                ended += 1;
                match c.result() {
                    n if n > 0 => packets += 1,
                    e if e == -libc::EAGAIN => {}
                    e => bail!("tap operation: {}", std::io::Error::from_raw_os_error(-e)),
                }
            }
            if ended < BATCH {
                self.ring.submit_and_wait(1)?;
            }
        }
        Ok(packets)
    }
}

/// Batches of WRITEV.
pub struct Writer(Batch);

impl Writer {
    pub fn new(file: File, frame: &[u8]) -> Result<Self> {
        Ok(Self(Batch::new(file, frame, frame.len())?))
    }
}

impl Mover for Writer {
    fn step(&mut self) -> Result<u64> {
        let n = self.0.run(|iovec| opcode::Writev::new(TAP, iovec, 2).build())?;
        ensure!(n == BATCH as u64, "the tap refused a write");
        Ok(n)
    }
}

/// Batches of READV; what finds the tap empty ends at once.
pub struct Reader(Batch);

impl Reader {
    pub fn new(file: File) -> Result<Self> {
        Ok(Self(Batch::new(file, &[], BUFFER_LEN)?))
    }
}

impl Mover for Reader {
    fn step(&mut self) -> Result<u64> {
        let n = self.0.run(|iovec| opcode::Readv::new(TAP, iovec, 2).build())?;
        if n == 0 {
            wait_readable(&self.0.file)?;
        }
        Ok(n)
    }
}

const GROUP: u16 = 0;
/// Buffers that a multishot read may fill before we give them back.
const PROVIDED: u16 = 256;

/// Anonymous memory, page-aligned as a ring of provided buffers must be.
struct Pages {
    start: NonNull<libc::c_void>,
    len: usize,
}

impl Pages {
    fn new(len: usize) -> Result<Self> {
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new anonymous mapping touches no memory that exists.
        let p = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        ensure!(p != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Ok(Self { start: NonNull::new(p).context("mmap gave null")?, len })
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours; nothing points into it any more (the io_uring is dropped before it).
        unsafe { libc::munmap(self.start.as_ptr(), self.len) };
    }
}

/// One READ_MULTISHOT; the kernel picks the buffers.
pub struct MultishotReader {
    /// Declared first, so that it is dropped before the memory that the kernel writes to.
    ring: IoUring,
    entries: Pages,
    buffers: Pages,
    file: File,
    tail: u16,
    armed: bool,
}

impl MultishotReader {
    pub fn new(file: File) -> Result<Self> {
        // READ_MULTISHOT waits by poll itself, and refuses a file that is O_NONBLOCK only where it would wait: it
        // arms its poll in either case.
        let ring = ring(&file, 2 * u32::from(PROVIDED))?;
        let entries = Pages::new(usize::from(PROVIDED) * size_of::<BufRingEntry>())?;
        let buffers = Pages::new(usize::from(PROVIDED) * BUFFER_LEN)?;
        let address = entries.start.as_ptr() as u64;
        // SAFETY: `entries` is page-aligned, has room for that many entries and outlives the ring.
        unsafe { ring.submitter().register_buf_ring_with_flags(address, PROVIDED, GROUP, 0) }
            .context("ring of provided buffers (Linux 5.19 or later)")?;
        let mut it = Self { ring, entries, buffers, file, tail: 0, armed: false };
        for id in 0..PROVIDED {
            it.give(id);
        }
        it.publish();
        Ok(it)
    }

    /// Puts buffer `id` into the ring of provided buffers.
    fn give(&mut self, id: u16) {
        let slot = usize::from(self.tail % PROVIDED);
        // SAFETY: `id` and `slot` are below PROVIDED, so both pointers stay inside their mappings; the kernel does
        // not look at the slot before the tail is published.
        unsafe {
            let entry = &mut *self.entries.start.as_ptr().cast::<BufRingEntry>().add(slot);
            entry.set_addr(self.buffers.start.as_ptr().cast::<u8>().add(usize::from(id) * BUFFER_LEN) as u64);
            entry.set_len(BUFFER_LEN as u32);
            entry.set_bid(id);
        }
        self.tail = self.tail.wrapping_add(1);
    }

    fn publish(&self) {
        // SAFETY: the tail lies in the first entry of the ring, 2-byte aligned, and is shared with the kernel only.
        let tail = unsafe { &*BufRingEntry::tail(self.entries.start.as_ptr().cast()).cast::<AtomicU16>() };
        tail.store(self.tail, Ordering::Release);
    }
}

impl Mover for MultishotReader {
    fn step(&mut self) -> Result<u64> {
        if !self.armed {
            // Not the registered file: io-uring 0.7's ReadMulti loses the flag that says so. The length must be 0.
            let fd = io_uring::types::Fd(self.file.as_raw_fd());
            push(&mut self.ring, &opcode::ReadMulti::new(fd, 0, GROUP).build())?;
            self.armed = true;
        }
        let timeout = io_uring::types::Timespec::new().nsec(100_000_000);
        let args = io_uring::types::SubmitArgs::new().timespec(&timeout);
        match self.ring.submitter().submit_with_args(1, &args) {
            Ok(_) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::ETIME | libc::EINTR)) => {}
            Err(e) => return Err(e).context("waiting for completions"),
        }
        let done: Vec<(i32, u32)> = self.ring.completion().map(|c| (c.result(), c.flags())).collect();
        let mut packets = 0;
        for (result, flags) in done {
            if let Some(id) = cqueue::buffer_select(flags) {
                self.give(id);
            }
            self.armed = cqueue::more(flags);
            match result {
                n if n > 0 => packets += 1,
                e if e == -libc::ENOBUFS || e == -libc::EAGAIN => {}
                e => bail!("multishot read: {}", std::io::Error::from_raw_os_error(-e)),
            }
        }
        self.publish();
        Ok(packets)
    }
}
