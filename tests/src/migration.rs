//! Live migration from one QEMU to another over a Unix socket.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

use crate::qemu::Qemu;
use crate::scenario::Lab;
use crate::wait::until;

/// A slow link and a busy, emulated guest: minutes are possible, hours are not.
const MIGRATION_PATIENCE: Duration = Duration::from_secs(240);

/// A precopy migration.
#[derive(Debug, Clone, Copy)]
pub struct Migration {
    /// Bytes per second on the link; slow, so that the dirty log matters.
    pub bandwidth: u64,
    /// The downtime in milliseconds that QEMU aims at.
    pub downtime_ms: u64,
}

/// How a migration went, as the source tells.
#[derive(Debug, Clone, Default)]
pub struct MigrationReport {
    /// From the command to the end, in milliseconds.
    pub total_ms: u64,
    /// Neither guest ran, in milliseconds.
    pub downtime_ms: u64,
    /// Bytes sent.
    pub transferred: u64,
    /// How often the dirty log was read.
    pub dirty_syncs: u64,
    /// The guest's memory in bytes.
    pub memory: u64,
}

impl Default for Migration {
    fn default() -> Self {
        Self { bandwidth: 32 << 20, downtime_ms: 300 }
    }
}

impl Migration {
    /// Starts it; the destination must have been started as such.
    pub fn start(&self, lab: &Lab, source: &mut Qemu, destination: &mut Qemu) -> Result<()> {
        let uri = format!("unix:{}", lab.path(&format!("{}.migration", destination.name())).display());
        destination.qmp.execute("migrate-incoming", json!({ "uri": uri }))?;
        self.apply(source)?;
        source.qmp.execute("migrate", json!({ "uri": uri })).map(drop)
    }

    /// Waits until both sides call it complete and the guest runs on the destination.
    pub fn finish(&self, source: &mut Qemu, destination: &mut Qemu) -> Result<MigrationReport> {
        let done = until("the migration", MIGRATION_PATIENCE, || {
            source.check_alive()?;
            destination.check_alive()?;
            let state = source.migration()?;
            match state["status"].as_str() {
                Some("completed") => Ok(Some(state)),
                Some("failed" | "cancelled") => bail!("the migration has failed: {state}"),
                _ => Ok(None),
            }
        })?;
        until("the guest to run on the destination", MIGRATION_PATIENCE, || {
            destination.check_alive()?;
            let state = destination.qmp.execute("query-status", json!({}))?;
            Ok((state["status"] == "running").then_some(()))
        })?;
        let number = |value: &Value| value.as_u64().unwrap_or_default();
        Ok(MigrationReport {
            total_ms: number(&done["total-time"]),
            downtime_ms: number(&done["downtime"]),
            transferred: number(&done["ram"]["transferred"]),
            dirty_syncs: number(&done["ram"]["dirty-sync-count"]),
            memory: number(&done["ram"]["total"]),
        })
    }

    /// Makes these the parameters, before or while a migration runs.
    pub fn apply(&self, source: &mut Qemu) -> Result<()> {
        let parameters = json!({ "max-bandwidth": self.bandwidth, "downtime-limit": self.downtime_ms });
        source.qmp.execute("migrate-set-parameters", parameters).map(drop)
    }

    /// Fails unless a migration is on its way; returns how often the dirty log was read.
    pub fn dirty_syncs(&self, source: &mut Qemu) -> Result<u64> {
        let state = source.migration()?;
        ensure!(state["status"] == "active", "the migration is {}", state["status"]);
        Ok(state["ram"]["dirty-sync-count"].as_u64().unwrap_or_default())
    }

    /// Starts it and waits for its end.
    pub fn run(&self, lab: &Lab, source: &mut Qemu, destination: &mut Qemu) -> Result<MigrationReport> {
        self.start(lab, source, destination)?;
        self.finish(source, destination)
    }
}
