//! Reading what an instance has measured, from its pinned maps: of this process or of any other, alive or not.
#![forbid(unsafe_code)]

use super::pins::{self, Found};
use crate::bpf;
use aya::maps::{Array, HashMap, Map, MapData, MapError};
use ebpf_common::faults::{Hist, Key, Meta, Name, Stall};
use nix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::Path;

/// Why there is nothing to show. Each text says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// No such instance.
    #[error("there is no instance {0}; {1}")]
    NoInstance(String, String),
    /// No instance at all.
    #[error(
        "no instance measures fault latency: none of this program runs, or their logs say what they lack for it"
    )]
    NoInstances,
    /// Several, and none was named.
    #[error("there are several instances: choose one with --instance ({})", .0.join(", "))]
    Several(Vec<String>),
    /// Of a version with other layouts.
    #[error("instance {0} is of a version with other layouts: use that version's `vhost-user-net faults`")]
    OtherLayout(String),
    /// May not be read.
    #[error("{0} may not be read: use root, or a user with CAP_BPF who may enter /sys/fs/bpf")]
    NotAllowed(String),
    /// Anything else.
    #[error("{0}: {1}")]
    Map(String, String),
}

/// The maps of an instance, opened for reading.
pub struct Reader {
    instance: String,
    meta: Array<MapData, Meta>,
    hist: HashMap<MapData, Key, Hist>,
    stalls: HashMap<MapData, u32, Stall>,
    ports: HashMap<MapData, u32, Name>,
}

/// What an instance had measured at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its name.
    pub instance: String,
    /// What it says about itself.
    pub meta: Meta,
    /// Whether its process still runs.
    pub is_alive: bool,
    /// Names of its ports.
    pub ports: BTreeMap<u32, String>,
    /// Stalls that have ended.
    pub histograms: BTreeMap<Key, Hist>,
    /// Threads that stand still now, by thread id, the longest first.
    pub standing: Vec<(u32, Stall)>,
    /// When it was read, CLOCK_MONOTONIC, ns.
    pub now_ns: u64,
}

/// The instance to use where `named` may name one: it, or the only one there is.
///
/// # Errors
/// There is none, or there are several.
pub fn choose(named: Option<&str>) -> Result<String, ReadError> {
    let mut all = pins::instances().map_err(|error| failed(bpf::PIN_ROOT, &error))?;
    match (named, all.len()) {
        (_, 0) if named.is_none() => Err(ReadError::NoInstances),
        (None, 1) => Ok(all.remove(0)),
        (None, _) => Err(ReadError::Several(all)),
        (Some(name), _) if all.iter().any(|known| known == name) => Ok(name.to_owned()),
        (Some(name), 0) => Err(ReadError::NoInstance(name.to_owned(), "there are none".into())),
        (Some(name), _) => {
            Err(ReadError::NoInstance(name.to_owned(), format!("there are: {}", all.join(", "))))
        }
    }
}

fn failed(place: &str, error: &io::Error) -> ReadError {
    match error.kind() {
        ErrorKind::PermissionDenied => ReadError::NotAllowed(place.to_owned()),
        _ => ReadError::Map(place.to_owned(), error.to_string()),
    }
}

impl Reader {
    /// Opens an instance's maps.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn open(instance: &str) -> Result<Self, ReadError> {
        let dir = bpf::pin_dir(instance);
        let place = dir.display().to_string();
        match pins::look(&dir).map_err(|error| failed(&place, &error))? {
            Some(Found::Ours(_)) => {}
            Some(Found::OtherLayout) => return Err(ReadError::OtherLayout(instance.to_owned())),
            None => return choose(Some(instance)).and_then(|name| Err(ReadError::Map(name, "gone".into()))),
        }
        Ok(Self {
            instance: instance.to_owned(),
            meta: open(&dir, pins::META, Map::Array)?,
            hist: open(&dir, "fault_hist", Map::HashMap)?,
            stalls: open(&dir, "fault_stalls", Map::LruHashMap)?,
            ports: open(&dir, "fault_ports", Map::HashMap)?,
        })
    }

    /// What is there now. Entries that change while they are read are one moment's or the next's.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn snapshot(&self) -> Result<Snapshot, ReadError> {
        let wrong = |error: MapError| ReadError::Map(self.instance.clone(), error.to_string());
        let meta = self.meta.get(&0, 0).map_err(wrong)?;
        let name = |name: Name| {
            let len = name.name.iter().position(|byte| *byte == 0).unwrap_or(name.name.len());
            String::from_utf8_lossy(&name.name[..len]).into_owned()
        };
        let mut standing: Vec<_> = entries(&self.stalls)
            .map_err(wrong)?
            .into_iter()
            .filter(|(_, stall)| stall.since_ns != 0)
            .collect();
        standing.sort_by_key(|(_, stall)| stall.since_ns);
        Ok(Snapshot {
            instance: self.instance.clone(),
            meta,
            is_alive: pins::owner(&meta).is_alive(),
            ports: entries(&self.ports)
                .map_err(wrong)?
                .into_iter()
                .map(|(port, n)| (port, name(n)))
                .collect(),
            histograms: entries(&self.hist).map_err(wrong)?.into_iter().collect(),
            standing,
            now_ns: now_ns(),
        })
    }
}

/// All entries; those that go while we walk are left out.
fn entries<K: aya::Pod, V: aya::Pod>(map: &HashMap<MapData, K, V>) -> Result<Vec<(K, V)>, MapError> {
    map.iter().filter(|entry| !matches!(entry, Err(MapError::KeyNotFound))).collect()
}

fn open<M>(dir: &Path, name: &str, wrap: fn(MapData) -> Map) -> Result<M, ReadError>
where
    M: TryFrom<Map, Error = MapError>,
{
    let path = dir.join(name);
    let place = path.display().to_string();
    let data = MapData::from_pin(&path).map_err(|error| match error {
        MapError::SyscallError(error) => failed(&place, &error.io_error),
        other => ReadError::Map(place.clone(), other.to_string()),
    })?;
    wrap(data).try_into().map_err(|error: MapError| ReadError::Map(place.clone(), error.to_string()))
}

/// CLOCK_MONOTONIC, as the programs in the kernel read it.
pub fn now_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |now| now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}
