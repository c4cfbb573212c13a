//! What is pinned for an interface: found, judged, listed and removed.
#![forbid(unsafe_code)]

use super::{ProgramError, Sizes};
use crate::bpf::sys::{Link, first_entry};
use crate::bpf::{BPF_FS, Owner, PIN_ROOT, io_error, pin_dir};
use aya::Ebpf;
use aya::maps::{Map, MapData, MapInfo, PerCpuArray};
use ebpf_common::LAYOUT;
use ebpf_common::xdp::{Config, MACS_MAX, MacKey, PortStats, Stats, Steer};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

const PREFIX: &str = "xdp-";
/// bpffs keeps dots for itself, and interface names have no colons.
const DOT: (&str, &str) = (".", ":");
const LINK: &str = "link";
/// A map that is to take the place of another.
const NEW: &str = "new-";

/// The maps with the sizes of their keys and values, bytes.
pub(super) const MAPS: [(&str, usize, usize); 6] = [
    ("xdp_config", 4, size_of::<Config>()),
    ("mac_table", size_of::<MacKey>(), 4),
    ("xdp_steer", 4, size_of::<Steer>()),
    ("xsk_socks", 4, 4),
    ("xdp_stats", 4, size_of::<Stats>()),
    ("xdp_port_stats", 4, size_of::<PortStats>()),
];

/// The folder of an interface.
pub(super) struct Pins {
    pub(super) interface: String,
    pub(super) folder: PathBuf,
}

/// What an earlier process has left.
pub(super) struct Previous {
    /// The link.
    pub(super) link: Link,
    /// Of the maps, if all are there.
    pub(super) sizes: Option<Sizes>,
    /// Their numbers.
    pub(super) map_ids: Vec<u32>,
}

/// Held while pins are changed: two processes must not attach to one interface at once.
pub(super) fn lock() -> io::Result<Flock<File>> {
    Flock::lock(File::open(BPF_FS)?, FlockArg::LockExclusive).map_err(|(_, error)| error.into())
}

impl Pins {
    pub(super) fn of(interface: &str) -> Self {
        let folder = pin_dir(&format!("{PREFIX}{}", interface.replace(DOT.0, DOT.1)));
        Self { interface: interface.into(), folder }
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub(super) fn link(&self) -> PathBuf {
        self.folder.join(LINK)
    }

    pub(super) fn exist(&self) -> bool {
        self.folder.is_dir()
    }

    /// Locks the folder: whoever serves the interface holds this as long as it does. `None`: another process does. Only to
    /// be tried while [`lock`] is held, or two who try would take each other for one who serves.
    pub(super) fn hold(&self) -> io::Result<Option<Flock<File>>> {
        match Flock::lock(File::open(&self.folder)?, FlockArg::LockExclusiveNonblock) {
            Ok(held) => Ok(Some(held)),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, error)) => Err(error.into()),
        }
    }

    /// Sees that no process serves the interface. The lock tells, as the process may be one that /proc does not show here
    /// (another PID namespace, hidepid); its number tells who it is. [`lock`] is held meanwhile.
    ///
    /// # Errors
    /// One does.
    pub(super) fn check_unserved(&self) -> Result<(), ProgramError> {
        let held = match self.hold() {
            Ok(held) => held.is_none(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(ProgramError::call(&self.interface, "locking its pins", error)),
        };
        let owner = self.head().map(|(_, owner)| owner);
        if held || owner.is_some_and(|owner| owner.is_alive()) {
            return Err(ProgramError::Served(self.interface.clone(), owner.map_or(0, |owner| owner.pid)));
        }
        Ok(())
    }

    /// Looks at what is there. Without a link, nothing is: a process ended half-way.
    ///
    /// # Errors
    /// Another process serves it, or it has another layout.
    pub(super) fn previous(&self) -> Result<Option<Previous>, ProgramError> {
        if !self.exist() {
            return Ok(None);
        }
        self.check_unserved()?;
        let other = |why: String| ProgramError::Layout(self.interface.clone(), self.folder.clone(), why);
        if let Some((layout, _)) = self.head()
            && layout != LAYOUT
        {
            return Err(other(format!("number {layout}, this program has {LAYOUT}")));
        }
        let mut map_ids = Vec::new();
        let mut entries = Vec::new();
        for (name, key_size, value_size) in MAPS {
            let Ok(map) = MapInfo::from_pin(self.map(name)) else { break };
            let sizes = (map.key_size() as usize, map.value_size() as usize);
            if sizes != (key_size, value_size) {
                return Err(other(format!("{name} has {sizes:?} bytes, not {:?}", (key_size, value_size))));
            }
            if name == "mac_table" && map.max_entries() != MACS_MAX {
                return Err(other(format!("{name} has {} entries, not {MACS_MAX}", map.max_entries())));
            }
            map_ids.push(map.id());
            entries.push(map.max_entries());
        }
        // A process that ended half-way has left less than all.
        let sizes = match entries[..] {
            [_, _, steer, sockets, _, ports] if ports > 0 && steer >= ports => {
                let queues = steer / ports;
                Some(Sizes { queues, ports, slots: sockets / queues })
            }
            _ => None,
        };
        Ok(Link::from_pin(&self.link()).ok().map(|link| Previous { link, sizes, map_ids }))
    }

    /// Layout and owner, which are where they are in all layouts.
    fn head(&self) -> Option<(u32, Owner)> {
        let map = MapData::from_pin(self.map(MAPS[0].0)).ok()?;
        let value_size = map.info().ok()?.value_size();
        let value = first_entry(map.fd().as_fd(), value_size).ok()?;
        let word = |at: usize| Some(u32::from_ne_bytes(value.get(at..at + 4)?.try_into().ok()?));
        let start_time = u64::from_ne_bytes(value.get(8..16)?.try_into().ok()?);
        Some((word(0)?, Owner { pid: word(4)?, start_time }))
    }

    /// Pins new maps beside the present ones.
    pub(super) fn stage_maps(&self, ebpf: &Ebpf) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        self.unstage_maps();
        for (name, ..) in MAPS {
            let map = ebpf.map(name).ok_or(io::ErrorKind::NotFound)?;
            map.pin(self.staged(name)).map_err(io_error)?;
        }
        Ok(())
    }

    /// Puts the new maps in the place of the present ones.
    pub(super) fn commit_maps(&self) -> io::Result<()> {
        MAPS.iter().try_for_each(|(name, ..)| fs::rename(self.staged(name), self.map(name)))
    }

    /// Forgets the new maps.
    pub(super) fn unstage_maps(&self) {
        for (name, ..) in MAPS {
            let _ = fs::remove_file(self.staged(name));
        }
    }

    fn staged(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{NEW}{name}"))
    }

    /// Detaches the program and removes all that is pinned; true if there was something.
    pub(super) fn remove(&self) -> io::Result<bool> {
        if !self.exist() {
            return Ok(false);
        }
        if let Ok(link) = Link::from_pin(&self.link()) {
            // It may be held by others, and its interface may be gone.
            let _ = link.detach();
        }
        for entry in fs::read_dir(&self.folder)? {
            fs::remove_file(entry?.path())?;
        }
        fs::remove_dir(&self.folder)?;
        // Others may have pins there.
        let _ = fs::remove_dir(PIN_ROOT);
        Ok(true)
    }
}

/// Detaches the program from an interface and removes its pins; false if there are none.
///
/// # Errors
/// A process serves it, or what the kernel says.
pub fn unload(interface: &str) -> Result<bool, ProgramError> {
    let pins = Pins::of(interface);
    if !pins.exist() {
        return Ok(false);
    }
    let call = |what, error| ProgramError::call(interface, what, error);
    let _lock = lock().map_err(|error| call("locking the BPF file system", error))?;
    pins.check_unserved()?;
    pins.remove().map_err(|error| call("removing its pins", error))
}

/// An interface's program, as it is pinned.
#[derive(Clone, Debug)]
pub struct Pinned {
    /// The interface's name when it was attached.
    pub interface: String,
    /// The folder with the pins.
    pub folder: PathBuf,
    /// The interface's number in its network namespace; `None`: it is gone.
    pub index: Option<u32>,
    /// The link's number.
    pub link: Option<u32>,
    /// The program's number.
    pub program: Option<u32>,
    /// The process that serves it, if one does.
    pub owner: Option<Owner>,
    /// Receive queues, ports and slots; `None`: of another layout.
    pub config: Option<Config>,
    /// The counters, over all CPUs.
    pub stats: Option<Stats>,
}

/// All that is pinned by this program for XDP, in the order of the names. Empty where nothing is, or where it may not be read.
pub fn list() -> Vec<Pinned> {
    let Ok(folders) = fs::read_dir(PIN_ROOT) else { return Vec::new() };
    let mut found: Vec<Pinned> = folders.flatten().filter_map(|entry| describe(&entry.path())).collect();
    found.sort_by(|a, b| a.interface.cmp(&b.interface));
    found
}

fn describe(folder: &Path) -> Option<Pinned> {
    let name = folder.file_name()?.to_str()?.strip_prefix(PREFIX)?;
    let pins = Pins::of(&name.replace(DOT.1, DOT.0));
    let link = Link::from_pin(&pins.link()).ok().and_then(|link| link.info().ok());
    let is_ours = pins.head().is_some_and(|(layout, _)| layout == LAYOUT);
    let map = |name: &str| MapData::from_pin(pins.map(name)).ok().filter(|_| is_ours);
    let config = map("xdp_config").and_then(|map| {
        let config: aya::maps::Array<_, Config> = Map::Array(map).try_into().ok()?;
        config.get(&0, 0).ok()
    });
    let stats = map("xdp_stats").and_then(|map| sum_stats(&Map::PerCpuArray(map).try_into().ok()?).ok());
    Some(Pinned {
        owner: pins.head().map(|(_, owner)| owner).filter(Owner::is_alive),
        index: link.map(|link| link.index).filter(|index| *index != 0),
        link: link.map(|link| link.id),
        program: link.map(|link| link.program),
        config,
        stats,
        interface: pins.interface,
        folder: pins.folder,
    })
}

pub(super) fn sum_stats(map: &PerCpuArray<MapData, Stats>) -> io::Result<Stats> {
    let mut sum = Stats::default();
    for cpu in map.get(&0, 0).map_err(io_error)?.iter() {
        let Stats { hits, misses, flooded, drop_no_socket, drop_queue, short } = *cpu;
        sum.hits += hits;
        sum.misses += misses;
        sum.flooded += flooded;
        sum.drop_no_socket += drop_no_socket;
        sum.drop_queue += drop_queue;
        sum.short += short;
    }
    Ok(sum)
}
