//! Bulk data with checksums: TCP servers on the host's side, whose peer is `nc` in the guest.
//!
//! Sockets are made inside the namespace; the threads that use them need not be.
#![forbid(unsafe_code)]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use md5::{Digest as _, Md5};

use crate::netns::NetNs;
use crate::wait::{PATIENCE, until};

/// A peer that is silent for longer has failed.
const SILENCE: Duration = Duration::from_secs(180);
const POLL_INTERVAL: Duration = Duration::from_millis(10);
const CHUNK: usize = 64 << 10;

/// Length and checksum of what went over a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digest {
    /// Length in bytes.
    pub bytes: u64,
    /// The MD5 sum, as `md5sum` prints it.
    pub md5: String,
}

/// How much a [`Source`] sends.
#[derive(Debug, Clone, Copy)]
pub enum Amount {
    /// This many bytes, as fast as the peer takes them.
    Bytes(u64),
    /// Until [`Source::stop`], at this many bytes per second.
    UntilStopped(u64),
}

/// Sends pseudo-random bytes to the first one who connects.
#[derive(Debug)]
pub struct Source(Server);

/// Takes bytes from the first one who connects.
#[derive(Debug)]
pub struct Sink(Server);

#[derive(Debug)]
struct Server {
    port: u16,
    is_stopped: Arc<AtomicBool>,
    is_dropped: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Digest>>>,
}

impl Source {
    /// Listens inside the namespace. Equal seeds give equal bytes.
    pub fn start(netns: &NetNs, seed: u64, amount: Amount) -> Result<Self> {
        Server::start(netns, move |stream, is_stopped, is_dropped| {
            send(stream, seed, amount, is_stopped, is_dropped)
        })
        .map(Self)
    }

    /// The TCP port to connect to.
    pub fn port(&self) -> u16 {
        self.0.port
    }

    /// Ends an endless stream.
    pub fn stop(&self) {
        self.0.is_stopped.store(true, Ordering::Relaxed);
    }

    /// Waits until everything was sent and the peer has closed; call it when that can be expected soon.
    pub fn finish(self) -> Result<Digest> {
        self.0.finish()
    }
}

impl Sink {
    /// Listens inside the namespace.
    pub fn start(netns: &NetNs) -> Result<Self> {
        Server::start(netns, |stream, _, is_dropped| take(stream, is_dropped)).map(Self)
    }

    /// The TCP port to connect to.
    pub fn port(&self) -> u16 {
        self.0.port
    }

    /// Waits until the peer has closed; call it when that can be expected soon.
    pub fn finish(self) -> Result<Digest> {
        self.0.finish()
    }
}

impl Server {
    fn start(
        netns: &NetNs,
        serve: impl FnOnce(TcpStream, &AtomicBool, &AtomicBool) -> Result<Digest> + Send + 'static,
    ) -> Result<Self> {
        let listener = netns.run(|| Ok(TcpListener::bind(("0.0.0.0", 0))?))?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let is_stopped = Arc::new(AtomicBool::new(false));
        let is_dropped = Arc::new(AtomicBool::new(false));
        let (stopped, dropped) = (Arc::clone(&is_stopped), Arc::clone(&is_dropped));
        let thread = std::thread::spawn(move || {
            let stream = accept(&listener, &dropped)?;
            serve(stream, &stopped, &dropped)
        });
        Ok(Self { port, is_stopped, is_dropped, thread: Some(thread) })
    }

    fn finish(mut self) -> Result<Digest> {
        let thread = self.thread.take().context("a transfer ends once")?;
        let ended = until("the end of a transfer", PATIENCE, || Ok(thread.is_finished().then_some(())));
        self.is_dropped.store(ended.is_err(), Ordering::Relaxed);
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_dropped.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn accept(listener: &TcpListener, is_dropped: &AtomicBool) -> Result<TcpStream> {
    let started = Instant::now();
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(POLL_INTERVAL))?;
                stream.set_write_timeout(Some(POLL_INTERVAL))?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(POLL_INTERVAL),
            Err(error) => return Err(error).context("accepting the guest's connection"),
        }
        if is_dropped.load(Ordering::Relaxed) || started.elapsed() > SILENCE {
            bail!("the guest did not connect");
        }
    }
}

fn send(
    mut stream: TcpStream,
    seed: u64,
    amount: Amount,
    is_stopped: &AtomicBool,
    is_dropped: &AtomicBool,
) -> Result<Digest> {
    let (limit, rate) = match amount {
        Amount::Bytes(bytes) => (bytes, u64::MAX),
        Amount::UntilStopped(rate) => (u64::MAX, rate),
    };
    let mut random = Random(seed | 1);
    let mut digest = Md5::new();
    let mut chunk = vec![0; CHUNK];
    let (mut sent, started) = (0, Instant::now());
    while sent < limit && !is_stopped.load(Ordering::Relaxed) {
        if is_dropped.load(Ordering::Relaxed) {
            bail!("given up");
        }
        let allowed = (started.elapsed().as_secs_f64() * rate as f64) as u64;
        if rate != u64::MAX && sent > allowed {
            std::thread::sleep(POLL_INTERVAL);
            continue;
        }
        let count = usize::try_from(limit - sent).map_or(CHUNK, |left| left.min(CHUNK));
        random.fill(&mut chunk[..count]);
        patiently(is_dropped, &mut &chunk[..count], |rest| {
            let written = stream.write(rest)?;
            *rest = &rest[written..];
            Ok(rest.is_empty())
        })
        .context("sending to the guest")?;
        digest.update(&chunk[..count]);
        sent += count as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    patiently(is_dropped, &mut (), |()| Ok(stream.read(&mut [0; 16])? == 0))
        .context("waiting for the guest to close")?;
    Ok(Digest { bytes: sent, md5: hex(&digest.finalize()) })
}

fn take(mut stream: TcpStream, is_dropped: &AtomicBool) -> Result<Digest> {
    let mut digest = Md5::new();
    let mut chunk = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        let mut count = 0;
        patiently(is_dropped, &mut count, |count| {
            *count = stream.read(&mut chunk)?;
            Ok(true)
        })
        .context("receiving from the guest")?;
        if count == 0 {
            return Ok(Digest { bytes, md5: hex(&digest.finalize()) });
        }
        digest.update(&chunk[..count]);
        bytes += count as u64;
    }
}

/// Repeats an operation with a short timeout until it says that it is done; gives up when there was no progress
/// for long.
fn patiently<S>(
    is_dropped: &AtomicBool,
    state: &mut S,
    mut operation: impl FnMut(&mut S) -> std::io::Result<bool>,
) -> Result<()> {
    let mut progress = Instant::now();
    loop {
        match operation(state) {
            Ok(true) => return Ok(()),
            Ok(false) => progress = Instant::now(),
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            Err(error) => return Err(error.into()),
        }
        if is_dropped.load(Ordering::Relaxed) {
            bail!("given up");
        }
        if progress.elapsed() > SILENCE {
            bail!("no progress for {} s", SILENCE.as_secs());
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// xorshift64*: quick, and no byte pattern repeats.
struct Random(u64);

impl Random {
    fn fill(&mut self, bytes: &mut [u8]) {
        for part in bytes.chunks_mut(8) {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            let word = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
            part.copy_from_slice(&word[..part.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_what_arrives() {
        let Ok(netns) = NetNs::new() else {
            eprintln!("skipped: no permission to make a network namespace");
            return;
        };
        let source = Source::start(&netns, 7, Amount::Bytes(1_000_003)).unwrap();
        let sink = Sink::start(&netns).unwrap();
        netns
            .run(|| {
                let mut from = TcpStream::connect(("127.0.0.1", source.port()))?;
                let mut to = TcpStream::connect(("127.0.0.1", sink.port()))?;
                std::io::copy(&mut from, &mut to)?;
                Ok(())
            })
            .unwrap();
        let sent = source.finish().unwrap();
        assert_eq!(sent.bytes, 1_000_003);
        assert_eq!(sent, sink.finish().unwrap());
    }
}
