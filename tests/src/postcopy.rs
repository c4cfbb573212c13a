//! Postcopy migration: the guest runs on the destination before its memory is there.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::backend::{Backend, is_ours};
use crate::qemu::Qemu;
use crate::scenario::Lab;
use crate::wait::{PATIENCE, until};

/// A slow link and a busy, emulated guest.
const MIGRATION_PATIENCE: Duration = Duration::from_secs(120);

/// How a guest is moved.
#[derive(Debug, Clone)]
pub struct Postcopy {
    /// Bytes per second on the link until the switch.
    pub bandwidth: u64,
    /// Bytes per second of the background stream after the switch; 0: no limit.
    pub postcopy_bandwidth: u64,
    /// The downtime in milliseconds that precopy aims at, should it come to its end.
    pub downtime_ms: u64,
    /// Where the source connects to, if it is not straight to the destination.
    pub via: Option<String>,
}

impl Default for Postcopy {
    fn default() -> Self {
        Self { bandwidth: 20 << 20, postcopy_bandwidth: 20 << 20, downtime_ms: 300, via: None }
    }
}

/// How it went.
#[derive(Debug, Clone, Default)]
pub struct PostcopyReport {
    /// From the command to the end, in milliseconds.
    pub total_ms: u64,
    /// Neither guest ran, in milliseconds.
    pub downtime_ms: u64,
    /// Bytes sent before the switch.
    pub precopy_bytes: u64,
    /// Bytes sent after it.
    pub postcopy_bytes: u64,
    /// Pages that the destination asked for: its guest's CPUs and its back-end.
    pub requests: u64,
    /// The time that all CPUs of the guest together were blocked, and each of them, in milliseconds, as the
    /// destination's QEMU says.
    pub blocktime_ms: Option<(u64, Vec<u64>)>,
}

impl Postcopy {
    /// The address that a destination's QEMU listens at.
    pub fn address(lab: &Lab, destination: &Qemu) -> std::path::PathBuf {
        lab.path(&format!("{}.migration", destination.name()))
    }

    /// Lets both sides do it.
    pub fn allow(source: &mut Qemu, destination: &mut Qemu) -> Result<()> {
        capability(source, "postcopy-ram", true)?;
        capability(destination, "postcopy-ram", true)?;
        capability(destination, "postcopy-blocktime", true)
    }

    /// Starts it with precopy; the destination must have been started as such.
    pub fn start(&self, lab: &Lab, source: &mut Qemu, destination: &mut Qemu) -> Result<()> {
        Self::allow(source, destination)?;
        let uri = format!("unix:{}", Self::address(lab, destination).display());
        destination.qmp.execute("migrate-incoming", json!({ "uri": uri }))?;
        self.apply(source)?;
        source.qmp.execute("migrate", json!({ "uri": self.via.as_ref().unwrap_or(&uri) }))?;
        until("precopy to be on its way", PATIENCE, || match status(source)?.as_str() {
            "active" => Ok(Some(())),
            "failed" | "completed" => bail!("it is over before it began: {}", source.migration()?),
            _ => Ok(None),
        })
    }

    /// Makes these the parameters, before or while a migration runs.
    pub fn apply(&self, source: &mut Qemu) -> Result<()> {
        let parameters = json!({
            "max-bandwidth": self.bandwidth,
            "max-postcopy-bandwidth": self.postcopy_bandwidth,
            "downtime-limit": self.downtime_ms,
        });
        source.qmp.execute("migrate-set-parameters", parameters).map(drop)
    }

    /// Waits until a QEMU calls its side of the migration so.
    pub fn wait_status(qemu: &mut Qemu, wanted: &str) -> Result<()> {
        until(&format!("{} to be {wanted}", qemu.name().to_owned()), PATIENCE, || {
            Ok((status(qemu)? == wanted).then_some(()))
        })
        .with_context(|| format!("{:?}", qemu.migration()))
    }

    /// After the link was cut: the destination listens at another address, and the source goes on there. Nothing is asked of
    /// the destination's main loop, which may wait for a page itself.
    pub fn recover(lab: &Lab, source: &mut Qemu, destination: &mut Qemu) -> Result<()> {
        Self::wait_status(source, "postcopy-paused")?;
        let uri = format!("unix:{}", lab.path(&format!("{}.recovery", destination.name())).display());
        until("the destination to be ready for recovery", PATIENCE, || {
            destination.check_alive()?;
            match destination.qmp.execute_out_of_band("migrate-recover", json!({ "uri": uri })) {
                Ok(_) => Ok(Some(())),
                // It has not noticed yet.
                Err(error) if format!("{error:#}").contains("paused") => Ok(None),
                Err(error) => Err(error),
            }
        })?;
        source.qmp.execute("migrate", json!({ "uri": uri, "resume": true }))?;
        Self::wait_status(source, "postcopy-active").or_else(|error| match status(source)?.as_str() {
            "completed" => Ok(()),
            _ => Err(error),
        })
    }

    /// Moves the guest, and what of its memory has not been sent follows.
    pub fn switch(&self, source: &mut Qemu) -> Result<()> {
        source.qmp.execute("migrate-start-postcopy", json!({}))?;
        until("the guest to be moved", PATIENCE, || match status(source)?.as_str() {
            "postcopy-active" | "completed" => Ok(Some(())),
            "active" | "device" => Ok(None),
            _ => bail!("no postcopy: {}", source.migration()?),
        })
    }

    /// Waits until both sides call it complete and the guest runs on the destination.
    pub fn finish(&self, source: &mut Qemu, destination: &mut Qemu) -> Result<PostcopyReport> {
        let done = until("the migration", MIGRATION_PATIENCE, || {
            source.check_alive()?;
            destination.check_alive()?;
            let state = source.migration()?;
            match state["status"].as_str() {
                Some("completed") => Ok(Some(state)),
                Some("failed" | "cancelled" | "postcopy-paused" | "postcopy-recover-failed") => {
                    bail!("the migration has failed: {state}")
                }
                _ => Ok(None),
            }
        })?;
        let there = until("the destination to have all", MIGRATION_PATIENCE, || {
            destination.check_alive()?;
            let state = destination.migration()?;
            Ok((state["status"] == "completed").then_some(state))
        })?;
        let running = destination.qmp.execute("query-status", json!({}))?;
        ensure!(running["status"] == "running", "the guest is {} on the destination", running["status"]);
        let number = |value: &Value| value.as_u64().unwrap_or_default();
        let blocktime = there["postcopy-blocktime"].as_u64().map(|total| {
            let each = there["postcopy-vcpu-blocktime"].as_array().cloned().unwrap_or_default();
            (total, each.iter().map(number).collect())
        });
        Ok(PostcopyReport {
            total_ms: number(&done["total-time"]),
            downtime_ms: number(&done["downtime"]),
            precopy_bytes: number(&done["ram"]["precopy-bytes"]),
            postcopy_bytes: number(&done["ram"]["postcopy-bytes"]),
            requests: number(&done["ram"]["postcopy-requests"]),
            blocktime_ms: blocktime,
        })
    }

    /// Starts it, moves the guest at once, and waits for the end.
    pub fn run(&self, lab: &Lab, source: &mut Qemu, destination: &mut Qemu) -> Result<PostcopyReport> {
        self.start(lab, source, destination)?;
        self.switch(source)?;
        self.finish(source, destination)
    }
}

/// Switches a capability of a QEMU.
pub(crate) fn capability(qemu: &mut Qemu, name: &str, state: bool) -> Result<()> {
    let capabilities = json!({ "capabilities": [{ "capability": name, "state": state }] });
    qemu.qmp.execute("migrate-set-capabilities", capabilities).map(drop)
}

fn status(qemu: &mut Qemu) -> Result<String> {
    qemu.check_alive()?;
    Ok(qemu.migration()?["status"].as_str().unwrap_or("none").to_owned())
}

/// What the destination's back-end says about a postcopy migration, line by line.
#[derive(Debug, Clone, Default)]
pub struct Phases {
    /// Its lines, from advice to the end, without time, level and port.
    pub lines: Vec<String>,
    /// Pages that the back-end asked for.
    pub pages: u64,
    /// How often a ring stopped for a page.
    pub parks: u64,
}

impl Phases {
    /// Reads them from a back-end's log.
    pub fn of(backend: &Backend) -> Self {
        let mut found = Self::default();
        for line in backend.output().lines() {
            let Some((_, text)) = line.split_once("postcopy: ") else { continue };
            let before = |word: &str| {
                let number = text.split(word).next().unwrap_or_default().trim_end();
                number.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or_default().parse().ok()
            };
            if text.starts_with("ended") {
                found.pages = before(" pages asked for").unwrap_or_default();
                found.parks = before(" parks").unwrap_or_default();
            }
            found.lines.push(text.to_owned());
        }
        found
    }

    /// Fails unless it went through all phases in order.
    pub fn check(&self) -> Result<()> {
        if !is_ours() {
            return Ok(());
        }
        let begins = ["advised", "listening", "armed", "ended"];
        let at: Vec<_> =
            begins.iter().map(|word| self.lines.iter().position(|l| l.starts_with(word))).collect();
        ensure!(at.iter().all(Option::is_some) && at.is_sorted(), "the back-end's phases: {:?}", self.lines);
        Ok(())
    }
}
