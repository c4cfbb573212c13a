//! A small QMP client: newline-separated JSON over a Unix socket.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::wait::{PATIENCE, connect};

/// Time one read may wait before the deadline is looked at.
const READ_TIMEOUT: Duration = Duration::from_millis(200);

/// A connection to QEMU's monitor, out of negotiation mode.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    partial: Vec<u8>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects, reads the greeting and enters command mode.
    pub fn connect(path: &Path) -> Result<Self> {
        let writer = connect(path)?;
        writer.set_read_timeout(Some(READ_TIMEOUT))?;
        let reader = BufReader::new(writer.try_clone()?);
        let mut qmp = Self { reader, writer, partial: Vec::new(), events: VecDeque::new() };
        let greeting = qmp.next(Instant::now() + PATIENCE)?.context("QEMU sends no greeting")?;
        let Some(offer) = greeting.get("QMP") else {
            bail!("this is no QMP greeting: {greeting}");
        };
        let oob = json!("oob");
        let has_oob = offer["capabilities"].as_array().is_some_and(|offered| offered.contains(&oob));
        qmp.execute("qmp_capabilities", json!({ "enable": if has_oob { vec![oob] } else { Vec::new() } }))?;
        Ok(qmp)
    }

    /// Runs a command and returns its result; QEMU's error is the error.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.send(command, &json!({ "execute": command, "arguments": arguments }))
    }

    /// As [`Qmp::execute`], for the few commands that QEMU's monitor thread runs by itself: its main loop may be blocked.
    pub fn execute_out_of_band(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.send(command, &json!({ "exec-oob": command, "arguments": arguments }))
    }

    fn send(&mut self, command: &str, message: &Value) -> Result<Value> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        self.writer.write_all(&line).with_context(|| format!("sending {command} to QEMU"))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let message = self.next(deadline)?.with_context(|| format!("QEMU does not answer {command}"))?;
            if let Some(error) = message.get("error") {
                bail!("QEMU refuses {command}: {}", error["desc"].as_str().unwrap_or("no reason given"));
            }
            if let Some(result) = message.get("return") {
                return Ok(result.clone());
            }
            self.events.push_back(message);
        }
    }

    /// Waits for an event and returns it; earlier events are dropped.
    pub fn wait_event(&mut self, name: &str, patience: Duration) -> Result<Value> {
        let deadline = Instant::now() + patience;
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.next(deadline)?.with_context(|| format!("QEMU reports no {name}"))?,
            };
            if event["event"] == name {
                return Ok(event);
            }
        }
    }

    fn next(&mut self, deadline: Instant) -> Result<Option<Value>> {
        loop {
            match self.reader.read_until(b'\n', &mut self.partial) {
                Ok(0) => bail!("QEMU has closed its monitor"),
                Ok(_) if self.partial.ends_with(b"\n") => {
                    let message = serde_json::from_slice(&self.partial).context("QEMU sent no JSON")?;
                    self.partial.clear();
                    return Ok(Some(message));
                }
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if Instant::now() > deadline {
                        return Ok(None);
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("reading from QEMU's monitor"),
            }
        }
    }
}
