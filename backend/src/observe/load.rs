//! The programs in the kernel: which of the two ways works here, the maps they fill, and when they are attached.
//!
//! Loading takes some 100 ms (the kernel's type information is read): on a thread that may sleep.
#![forbid(unsafe_code)]

use super::areas::{Change, Prefix};
use super::kernel::{self, Symbols};
use super::pins::{Claim, MAPS};
use super::{Unavailable, rights};
use crate::bpf::Owner;
use aya::maps::lpm_trie::Key as TrieKey;
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, RingBuf};
use aya::programs::tp_btf::BtfTracePointLinkId;
use aya::programs::{BtfTracePoint, FEntry, FExit, ProgramError};
use aya::{Btf, Ebpf, EbpfLoader};
use ebpf_common::LAYOUT;
use ebpf_common::faults::{Area, Kernel, Meta, NAME_LEN, Name, Stall, context, kind, mode};

/// The programs, built by `cargo xtask build-ebpf`.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../bpf/faults.o");

const FUNCTION: &str = "handle_userfault";
const TRACEPOINT: &str = "sched_switch";

/// Which ways may be tried. Tests narrow it down.
#[derive(Clone, Copy, Debug)]
pub struct Ways {
    /// fentry and fexit.
    pub fentry: bool,
    /// The tracepoint.
    pub tracepoint: bool,
    /// Under the tracepoint: find the waiter, and with it the address, on the thread's stack.
    pub stack: bool,
}

impl Default for Ways {
    fn default() -> Self {
        Self { fentry: true, tracepoint: true, stack: true }
    }
}

/// The loaded programs and their maps; unloaded and unpinned when dropped.
pub struct Programs {
    ebpf: Ebpf,
    meta: Meta,
    armed: Option<BtfTracePointLinkId>,
    areas: LpmTrie<MapData, [u8; 8], Area>,
    notes: HashMap<MapData, u64, Area>,
    threads: HashMap<MapData, u32, u32>,
    // Last: maps are unpinned when nothing writes to them any more.
    _claim: Claim,
}

/// The ring buffer of events.
pub type EventRing = RingBuf<MapData>;

impl Programs {
    /// Loads the programs for this process, pins their maps as `instance`, and attaches what costs nothing while
    /// nothing faults.
    ///
    /// # Errors
    /// See [`Unavailable`].
    pub fn load(instance: &str, ports: &[String], ways: Ways) -> Result<(Self, EventRing), Unavailable> {
        rights::check()?;
        let claim = Claim::take(instance)?;
        let btf = Btf::from_sys_fs().map_err(|_| Unavailable::NoBtf)?;
        let mut refused = None;
        if ways.fentry {
            match by_function(ports, &btf) {
                Ok(ebpf) => return Self::take(ebpf, mode::FENTRY, ports, claim),
                Err(error @ Unavailable::Refused(_)) => refused = Some(error),
                Err(other) => return Err(other),
            }
        }
        match refused {
            Some(error) if !ways.tracepoint => return Err(error),
            Some(error) => tracing::debug!(%error, "{FUNCTION} cannot be patched; taking the tracepoint"),
            None => {}
        }
        let ebpf = by_tracepoint(ports, &btf, ways.stack)?;
        Self::take(ebpf, mode::TRACEPOINT_IDLE, ports, claim)
    }

    fn take(
        mut ebpf: Ebpf,
        mode: u32,
        ports: &[String],
        mut claim: Claim,
    ) -> Result<(Self, EventRing), Unavailable> {
        let Owner { pid, start_time } = Owner::this();
        let meta = Meta { layout: LAYOUT, mode, pid, events_lost: 0, start_time };
        let mut names = HashMap::<_, u32, Name>::try_from(map(&mut ebpf, "fault_ports")?).map_err(refused)?;
        for (port, name) in (0..).zip(ports) {
            names.insert(port, padded(name), 0).map_err(refused)?;
        }
        write_meta(&mut ebpf, meta)?;
        for name in MAPS {
            claim.pin(name, map(&mut ebpf, name)?)?;
        }
        let mut own = |name| {
            let missing = || Unavailable::Refused(format!("the object has no map {name}"));
            ebpf.take_map(name).ok_or_else(missing)
        };
        let areas = LpmTrie::try_from(own("fault_areas")?).map_err(refused)?;
        let notes = HashMap::try_from(own("fault_notes")?).map_err(refused)?;
        let threads = HashMap::try_from(own("fault_threads")?).map_err(refused)?;
        let events = RingBuf::try_from(own("fault_events")?).map_err(refused)?;
        Ok((Self { ebpf, meta, armed: None, areas, notes, threads, _claim: claim }, events))
    }

    /// How stalls are measured now: see [`mode`].
    pub fn mode(&self) -> u32 {
        self.meta.mode
    }

    /// Attaches the tracepoint: from now on stalls are measured in any case.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn arm(&mut self) -> Result<(), Unavailable> {
        if self.meta.mode == mode::TRACEPOINT_IDLE {
            // What began before it was last detached would seem to have lasted until now.
            self.forget_stalls()?;
            self.armed = Some(tracepoint(&mut self.ebpf)?.attach().map_err(refused)?);
            self.set_mode(mode::TRACEPOINT)?;
        }
        Ok(())
    }

    /// Detaches it again: a context switch costs what it did before.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn disarm(&mut self) -> Result<(), Unavailable> {
        if let Some(link) = self.armed.take() {
            tracepoint(&mut self.ebpf)?.detach(link).map_err(refused)?;
            self.set_mode(mode::TRACEPOINT_IDLE)?;
            // Nobody sees these end: they must not be shown as standing.
            self.forget_stalls()?;
        }
        Ok(())
    }

    /// Forgets which threads stand still.
    fn forget_stalls(&mut self) -> Result<(), Unavailable> {
        let mut stalls = stalls(&mut self.ebpf)?;
        let threads: Vec<u32> = stalls.keys().flatten().collect();
        threads.iter().try_for_each(|thread| match stalls.remove(thread) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(error) => Err(refused(error)),
        })
    }

    fn set_mode(&mut self, mode: u32) -> Result<(), Unavailable> {
        self.meta.mode = mode;
        write_meta(&mut self.ebpf, self.meta)
    }

    /// A thread is a worker from now on.
    ///
    /// # Errors
    /// The map is full.
    pub fn set_thread(&mut self, tid: u32, worker: u32) -> Result<(), MapError> {
        self.threads.insert(tid, worker, 0)
    }

    /// Addresses are something else from now on.
    ///
    /// # Errors
    /// The map is full.
    pub fn change_areas(&mut self, changes: &[Change]) -> Result<(), MapError> {
        changes.iter().try_for_each(|change| match change {
            Change::Put(prefix, area) => self.areas.insert(&key(*prefix), *area, 0),
            Change::Remove(prefix) => self.areas.remove(&key(*prefix)),
        })
    }

    /// What the page at `address` is wanted for, whatever area it lies in; `None`: nothing special any more.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn note(&mut self, address: u64, area: Option<Area>) -> Result<(), MapError> {
        let page = address & !(super::areas::PAGE - 1);
        match area {
            Some(area) => self.notes.insert(page, area, 0),
            None => self.notes.remove(&page).or_else(|error| match error {
                MapError::KeyNotFound => Ok(()),
                other => Err(other),
            }),
        }
    }
}

fn key(prefix: Prefix) -> TrieKey<[u8; 8]> {
    TrieKey::new(prefix.len, prefix.start.to_be_bytes())
}

fn padded(text: &str) -> Name {
    let mut name = Name { name: [0; NAME_LEN] };
    for (to, from) in name.name.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    name
}

fn map<'e>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut Map, Unavailable> {
    ebpf.map_mut(name).ok_or_else(|| Unavailable::Refused(format!("the object has no map {name}")))
}

fn write_meta(ebpf: &mut Ebpf, meta: Meta) -> Result<(), Unavailable> {
    let mut place = Array::<_, Meta>::try_from(map(ebpf, "fault_meta")?).map_err(refused)?;
    // Others count in it too.
    let events_lost = place.get(&0, 0).map_or(0, |now| now.events_lost);
    place.set(0, Meta { events_lost, ..meta }, 0).map_err(refused)
}

fn stalls(ebpf: &mut Ebpf) -> Result<HashMap<&mut MapData, u32, Stall>, Unavailable> {
    HashMap::try_from(map(ebpf, "fault_stalls")?).map_err(refused)
}

fn tracepoint(ebpf: &mut Ebpf) -> Result<&mut BtfTracePoint, Unavailable> {
    program(ebpf, "faults_switch")
}

fn program<'e, P>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut P, Unavailable>
where
    &'e mut P: TryFrom<&'e mut aya::programs::Program, Error = ProgramError>,
{
    ebpf.program_mut(name)
        .ok_or_else(|| Unavailable::Refused(format!("the object has no program {name}")))?
        .try_into()
        .map_err(refused)
}

/// An object for this process, its maps made, no program loaded yet.
fn object(ports: &[String], btf: &Btf, kernel: &Kernel) -> Result<Ebpf, Unavailable> {
    let keys = (ports.len() + 1) * kind::NAMES.len() * context::NAMES.len();
    EbpfLoader::new()
        .btf(Some(btf))
        .override_global("KERNEL", kernel, true)
        .map_max_entries("fault_hist", keys as u32)
        .map_max_entries("fault_ports", ports.len().max(1) as u32)
        .load(OBJECT)
        .map_err(|error| Unavailable::Refused(chain(&error)))
}

fn by_function(ports: &[String], btf: &Btf) -> Result<Ebpf, Unavailable> {
    let kernel = kernel::layout(std::process::id(), Symbols::default())?;
    let mut ebpf = object(ports, btf, &kernel)?;
    let exit: &mut FExit = program(&mut ebpf, "faults_exit")?;
    exit.load(FUNCTION, btf).map_err(refused)?;
    exit.attach().map_err(refused)?;
    let enter: &mut FEntry = program(&mut ebpf, "faults_enter")?;
    enter.load(FUNCTION, btf).map_err(refused)?;
    enter.attach().map_err(refused)?;
    Ok(ebpf)
}

fn by_tracepoint(ports: &[String], btf: &Btf, stack: bool) -> Result<Ebpf, Unavailable> {
    let mut symbols = kernel::symbols()?;
    if !stack {
        symbols.wake_function = 0;
    }
    let kernel = kernel::layout(std::process::id(), symbols)?;
    let mut ebpf = object(ports, btf, &kernel)?;
    tracepoint(&mut ebpf)?.load(TRACEPOINT, btf).map_err(refused)?;
    Ok(ebpf)
}

fn refused(error: impl std::error::Error) -> Unavailable {
    Unavailable::Refused(chain(&error))
}

/// An error with its causes, without repeating what one says of the next.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uplink::netlab::in_bpf_namespace;
    use crate::uplink::testing::skip;

    #[test]
    fn stalls_that_nobody_saw_end_are_forgotten() {
        let name = "observe::load::tests::stalls_that_nobody_saw_end_are_forgotten";
        in_bpf_namespace(name, || {
            let ways = Ways { fentry: false, ..Ways::default() };
            let mut programs = match Programs::load("ghosts", &[], ways) {
                Ok((programs, _)) => programs,
                Err(error) => return skip("stalls_that_nobody_saw_end_are_forgotten", &error.to_string()),
            };
            let stall = Stall {
                since_ns: 1,
                start_ns: 1,
                slept_ns: 0,
                address: 0,
                completed: 0,
                port: 0,
                kind: 0,
                context: 0,
                source: 0,
                part: 1,
                reserved: 0,
            };
            // A number that no thread has.
            let sleeps = |programs: &mut Programs| {
                stalls(&mut programs.ebpf).unwrap().insert(u32::MAX, stall, 0).unwrap();
            };
            let standing = |programs: &mut Programs| stalls(&mut programs.ebpf).unwrap().keys().count();
            sleeps(&mut programs);
            programs.arm().unwrap();
            assert_eq!(standing(&mut programs), 0, "left from before");
            sleeps(&mut programs);
            programs.arm().unwrap();
            assert_eq!(standing(&mut programs), 1, "measured already: it goes on");
            programs.disarm().unwrap();
            assert_eq!(standing(&mut programs), 0, "nobody sees it end");
        });
    }
}
