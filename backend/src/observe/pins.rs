//! The pinned maps of an instance: taking the name, giving it back, and what others have left.
//!
//! An instance is a folder below [`bpf::PIN_ROOT`] that holds [`META`]; that map says whose it is. Maps stay pinned when
//! their process is killed, so that what it measured can still be read; the next of that name replaces them.
#![forbid(unsafe_code)]

use super::Unavailable;
use crate::bpf::{self, Owner, io_error};
use aya::maps::{Array, Map, MapData, MapError};
use ebpf_common::LAYOUT;
use ebpf_common::faults::Meta;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The maps that are pinned, each under its own name.
pub const MAPS: [&str; 8] = [
    "fault_hist",
    "fault_areas",
    "fault_notes",
    "fault_threads",
    "fault_stalls",
    "fault_ports",
    "fault_events",
    META,
];
/// What all names of maps begin with.
const PREFIX: &str = "fault_";
/// How long another process may take to change pins; loading the programs takes it some 100 ms.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often to look whether it has done.
const PAUSE: Duration = Duration::from_millis(10);
/// Says whose the others are: pinned last.
pub const META: &str = "fault_meta";

/// What an instance's [`META`] says.
#[derive(Debug)]
pub enum Found {
    /// A map of this version's layout.
    Ours(Meta),
    /// Of another.
    OtherLayout,
}

/// Held while pins are changed: of two processes that take one name, the second is to see the first one's [`META`].
///
/// None: this user may not open the folder of pins, as one who may only write to [`bpf::PIN_ROOT`]; then nothing is held.
///
/// # Errors
/// Another process has held it for too long. (It may have been stopped; this one must be able to end all the same.)
pub fn lock() -> io::Result<Option<Flock<File>>> {
    let mut file = match File::open(bpf::BPF_FS) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => return Ok(None),
        other => other?,
    };
    let until = Instant::now() + PATIENCE;
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((file, nix::errno::Errno::EWOULDBLOCK)) if Instant::now() < until => file,
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                return Err(io::Error::other(format!(
                    "another process has had {} locked for {} s (`lslocks`): end it, or wait for it, and start this one again",
                    bpf::BPF_FS,
                    PATIENCE.as_secs()
                )));
            }
            Err((_, error)) => return Err(error.into()),
        };
        std::thread::sleep(PAUSE);
    }
}

/// Reads who an instance's maps belong to. None: there is no such instance.
///
/// # Errors
/// It may not be read.
pub fn look(dir: &Path) -> io::Result<Option<Found>> {
    let path = dir.join(META);
    match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
        Ok(_) => {}
    }
    let map = MapData::from_pin(&path).map_err(io_error)?;
    let meta = Array::<_, Meta>::try_from(Map::Array(map)).and_then(|map| map.get(&0, 0));
    Ok(Some(match meta {
        Ok(meta) if meta.layout == LAYOUT => Found::Ours(meta),
        Ok(_) | Err(MapError::InvalidValueSize { .. }) => Found::OtherLayout,
        Err(error) => return Err(io_error(error)),
    }))
}

/// The process that an instance's maps belong to.
pub fn owner(meta: &Meta) -> Owner {
    Owner { pid: meta.pid, start_time: meta.start_time }
}

/// All instances, in order.
///
/// # Errors
/// The folder may not be read; that there is none is no error.
pub fn instances() -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(bpf::PIN_ROOT) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.path().join(META).exists())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    Ok(names)
}

/// Removes an instance's pins, those of other versions too. True if there were any.
///
/// # Errors
/// They may not be removed.
pub fn remove(dir: &Path) -> io::Result<bool> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        other => other?,
    };
    let mut any = false;
    for entry in entries {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()) {
            fs::remove_file(entry.path())?;
            any = true;
        }
    }
    remove_folders(dir);
    Ok(any)
}

/// Removes an instance's folder, and that of all, where they are empty: what else lies there is not ours.
fn remove_folders(dir: &Path) {
    let _ = fs::remove_dir(dir);
    if let Some(root) = dir.parent() {
        let _ = fs::remove_dir(root);
    }
}

/// An instance's name and place, ours until this is dropped.
#[derive(Debug)]
pub struct Claim {
    dir: PathBuf,
    /// What was pinned, in that order. What else lies there may be another's.
    pinned: Vec<PathBuf>,
    /// Until the name is seen to be taken.
    lock: Option<Flock<File>>,
}

impl Claim {
    /// Takes the name, if no living process has it.
    ///
    /// # Errors
    /// Another has it, or there is no place for pins.
    pub fn take(instance: &str) -> Result<Self, Unavailable> {
        bpf::ensure_bpf_fs().map_err(Unavailable::BpfFs)?;
        let dir = bpf::pin_dir(instance);
        let failed = |error: io::Error| Unavailable::Pin(dir.clone(), error.to_string());
        let lock = lock().map_err(failed)?;
        match look(&dir).map_err(failed)? {
            Some(Found::OtherLayout) => return Err(Unavailable::OtherLayout(instance.to_owned())),
            Some(Found::Ours(meta)) if owner(&meta).is_alive() => {
                return Err(Unavailable::InUse { instance: instance.to_owned(), pid: meta.pid });
            }
            Some(Found::Ours(_)) | None => {}
        }
        remove(&dir).map_err(failed)?;
        fs::create_dir_all(&dir).map_err(failed)?;
        Ok(Self { dir, pinned: Vec::new(), lock })
    }

    /// Pins a map under its name. With [`META`], the name is seen to be taken.
    ///
    /// # Errors
    /// It cannot be pinned; mostly because another process has just taken the name too.
    pub fn pin(&mut self, name: &str, map: &Map) -> Result<(), Unavailable> {
        let path = self.dir.join(name);
        map.pin(&path).map_err(|error| {
            let why = std::error::Error::source(&error).map_or(error.to_string(), ToString::to_string);
            Unavailable::Pin(path.clone(), why)
        })?;
        self.pinned.push(path);
        if name == META {
            self.lock = None;
        }
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        for path in &self.pinned {
            match fs::remove_file(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    tracing::warn!(%error, "{}: cannot be removed", path.display());
                }
                _ => {}
            }
        }
        remove_folders(&self.dir);
    }
}
