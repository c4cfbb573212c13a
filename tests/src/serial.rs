//! Commands in the guest, over its serial port.
//!
//! The guest's init reads lines `NUMBER COMMAND`, runs each, and ends its output with a line
//! `@@NUMBER STATUS@@`. There is no echo and no prompt.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::wait::{PATIENCE, connect};

/// What `init.sh` says when it takes commands.
const READY: &str = "guest: ready";

/// A guest's serial port with `init.sh` behind it.
#[derive(Debug)]
pub struct Shell {
    stream: UnixStream,
    received: Arc<Received>,
    number: u64,
}

#[derive(Debug, Default)]
struct Received {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    text: String,
    is_closed: bool,
}

impl Received {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shell {
    /// Connects to the chardev's socket; the guest need not run yet.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = connect(path)?;
        let received = Arc::new(Received::default());
        let (mut reader, sink) = (stream.try_clone()?, Arc::clone(&received));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let count = reader.read(&mut buffer).unwrap_or(0);
                let mut state = sink.lock();
                state.text.push_str(&String::from_utf8_lossy(&buffer[..count]));
                state.is_closed = count == 0;
                sink.changed.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        Ok(Self { stream, received, number: 0 })
    }

    /// Waits until the guest has booted and takes commands.
    pub fn wait_ready(&mut self, patience: Duration) -> Result<()> {
        match self.wait(patience, |text| text.contains(READY))? {
            Some(_) => Ok(()),
            None => bail!("the guest did not boot within {} s", patience.as_secs()),
        }
    }

    /// Runs a command and returns what it prints on both outputs; fails unless its status is 0.
    pub fn run(&mut self, command: &str) -> Result<String> {
        self.run_within(command, PATIENCE)
    }

    /// As [`Shell::run`], with another limit of time.
    pub fn run_within(&mut self, command: &str, patience: Duration) -> Result<String> {
        self.begin(command)?;
        self.finish(patience)
    }

    /// Sends a command without waiting for its end; [`Shell::finish`] must follow.
    pub fn begin(&mut self, command: &str) -> Result<()> {
        if command.contains('\n') {
            bail!("a guest command is one line: {command}");
        }
        self.number += 1;
        self.received.lock().text.clear();
        self.stream
            .write_all(format!("{} {command}\n", self.number).as_bytes())
            .context("writing to the guest's serial port")
    }

    /// Waits for the end of the command that [`Shell::begin`] sent.
    pub fn finish(&mut self, patience: Duration) -> Result<String> {
        let marker = format!("@@{} ", self.number);
        let Some(text) =
            self.wait(patience, |text| text.find(&marker).is_some_and(|at| text[at + 2..].contains("@@")))?
        else {
            bail!(
                "the guest did not answer within {} s; so far: {}",
                patience.as_secs(),
                self.received.lock().text
            );
        };
        let at = text.find(&marker).unwrap_or(0);
        let status = text[at + marker.len()..].split('@').next().unwrap_or_default().to_owned();
        // Terminals ask for the cursor's position; that is no output.
        let output = text[..at].replace("\x1b[6n", "").replace('\r', "");
        let output = output.trim().to_owned();
        if status != "0" {
            bail!("the guest's command ended with {status}: {output}");
        }
        Ok(output)
    }

    fn wait(&self, patience: Duration, is_there: impl Fn(&str) -> bool) -> Result<Option<String>> {
        let deadline = Instant::now() + patience;
        let mut state = self.received.lock();
        loop {
            if is_there(&state.text) {
                return Ok(Some(state.text.clone()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.is_closed {
                bail!("the guest's serial port is closed: QEMU has ended");
            }
            if left.is_zero() {
                return Ok(None);
            }
            state = self.received.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
