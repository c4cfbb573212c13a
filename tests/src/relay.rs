//! A link between two QEMUs that has a delay, a rate, and an end: what a migration goes over when the network matters.
//!
//! It is a relay in this process, between two Unix sockets: no privilege and no queueing discipline of the kernel is
//! needed, and it can be cut at a moment of the test's choice.
#![forbid(unsafe_code)]

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Bytes that one read takes: a page travels in one or two pieces.
const CHUNK: usize = 16 << 10;
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// A link that is up until it is cut or dropped. Each connection has both directions to itself, as on a full-duplex wire.
#[derive(Debug)]
pub struct Relay {
    path: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    far: PathBuf,
    delay: Duration,
    /// Bytes per second of each direction.
    rate: u64,
    is_down: AtomicBool,
    streams: Mutex<Vec<UnixStream>>,
}

impl Relay {
    /// Listens at `near` and connects each who comes to `far`, which need not exist yet. Every byte takes `delay`, and
    /// `rate` bytes per second go each way.
    pub fn start(near: &Path, far: &Path, delay: Duration, rate: u64) -> Result<Self> {
        let _ = std::fs::remove_file(near);
        let listener =
            UnixListener::bind(near).with_context(|| format!("listening at {}", near.display()))?;
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            far: far.to_owned(),
            delay,
            rate,
            is_down: AtomicBool::new(false),
            streams: Mutex::new(Vec::new()),
        });
        let inner = Arc::clone(&shared);
        std::thread::spawn(move || {
            while !inner.is_down.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        if let Err(error) = inner.join(stream) {
                            eprintln!("lab: the link leads nowhere: {error:#}");
                        }
                    }
                    Err(_) => std::thread::sleep(POLL_INTERVAL),
                }
            }
        });
        Ok(Self { path: near.to_owned(), shared })
    }

    /// Where it listens, as QEMU writes it.
    pub fn uri(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    /// Cuts it for good: both ends see their connections closed.
    pub fn cut(&self) {
        self.shared.is_down.store(true, Ordering::Relaxed);
        for stream in self.shared.streams.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.cut();
    }
}

impl Shared {
    fn join(self: &Arc<Self>, near: UnixStream) -> Result<()> {
        let far = UnixStream::connect(&self.far)
            .with_context(|| format!("connecting to {}", self.far.display()))?;
        near.set_nonblocking(false)?;
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.extend([near.try_clone()?, far.try_clone()?]);
        drop(streams);
        self.carry(near.try_clone()?, far.try_clone()?);
        self.carry(far, near);
        Ok(())
    }

    /// One direction: a thread that reads at the link's rate, and one that writes after its delay.
    fn carry(self: &Arc<Self>, mut from: UnixStream, mut to: UnixStream) {
        let (delay, rate) = (self.delay, self.rate.max(1));
        // What is on its way at most; behind that, the sender waits.
        let room = (delay.as_secs_f64() * rate as f64) as usize / CHUNK + 4;
        let (sender, inbox) = mpsc::sync_channel::<(Instant, Vec<u8>)>(room);
        std::thread::spawn(move || {
            let mut free = Instant::now();
            let mut chunk = vec![0; CHUNK];
            loop {
                let count = match from.read(&mut chunk) {
                    Ok(0) => return,
                    Ok(count) => count,
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(_) => return,
                };
                free = free.max(Instant::now()) + Duration::from_secs_f64(count as f64 / rate as f64);
                if sender.send((free + delay, chunk[..count].to_vec())).is_err() {
                    return;
                }
                // Slept off in pieces that a sleep can keep.
                let ahead = free.saturating_duration_since(Instant::now());
                if ahead > Duration::from_millis(1) {
                    std::thread::sleep(ahead);
                }
            }
        });
        std::thread::spawn(move || {
            for (due, bytes) in inbox {
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                if to.write_all(&bytes).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Write);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_their_time_until_the_cut() {
        let dir = tempfile::tempdir().unwrap();
        let far = UnixListener::bind(dir.path().join("far")).unwrap();
        let delay = Duration::from_millis(20);
        let relay = Relay::start(&dir.path().join("near"), &dir.path().join("far"), delay, 1 << 20).unwrap();
        let mut near = UnixStream::connect(dir.path().join("near")).unwrap();
        let (mut far, _) = far.accept().unwrap();
        let started = Instant::now();
        near.write_all(b"there").unwrap();
        let mut word = [0; 5];
        far.read_exact(&mut word).unwrap();
        far.write_all(&word).unwrap();
        near.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"there");
        assert!(started.elapsed() >= 2 * delay);
        relay.cut();
        assert_eq!(near.read(&mut word).unwrap_or(0), 0);
        assert_eq!(far.read(&mut word).unwrap_or(0), 0);
    }
}
