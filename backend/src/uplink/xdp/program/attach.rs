//! How the program comes to its interface: what is there, is it ours, what of it can be kept.
//!
//! ```text
//!  pins? ─ no ──► somebody else's program? ─► load ─► pin maps ─► attach ─► pin link
//!    │ yes: a process serves it, or another layout: refused
//!    ├─ link of another or a vanished interface ─► removed, as if there were none
//!    ├─ same sizes ─► maps kept; load ─► same program? ─► link kept, else replaced in it
//!    └─ other sizes ─► load with new maps, known addresses copied ─► replaced in the link ─► pin maps
//! ```
#![forbid(unsafe_code)]

use super::pins::{MAPS, Pins, Previous, list, lock};
use super::{Maps, Mode, Options, ProgramError, Sizes, XdpProgram};
use crate::bpf::netlink::{self, Attached, XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE};
use crate::bpf::sys::Link;
use crate::bpf::{Owner, ensure_bpf_fs, io_error, os_error};
use aya::maps::{HashMap, Map, MapData, MapError};
use aya::programs::{Program, ProgramInfo, Xdp, loaded_programs};
use aya::{Ebpf, EbpfLoader};
use ebpf_common::LAYOUT;
use ebpf_common::xdp::{Config, MacKey, NO_PORT, Steer, VLAN_ANY};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;

pub(crate) static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../../bpf/xdp.o");
pub(super) const PROGRAM: &str = "vun_xdp";

pub(super) fn attach(options: &Options) -> Result<XdpProgram, ProgramError> {
    let interface = options.interface.as_str();
    let call = |what, error| ProgramError::call(interface, what, error);
    let sizes = options.sizes()?;
    ensure_bpf_fs().map_err(|error| ProgramError::NoBpfFs(interface.into(), error))?;
    let _lock = lock().map_err(|error| call("locking the BPF file system", error))?;
    let attached = attached(options)?;
    let pins = Pins::of(interface);
    let mut previous = pins.previous()?;
    if previous.as_ref().is_none_or(|found| !is_on(&found.link, options.index, attached)) {
        previous = None;
        if pins.remove().map_err(|error| call("removing old pins", error))? {
            tracing::info!(
                "xdp:{interface}: what was pinned for this name is not on this interface: removed"
            );
        }
        if let Some(other) = self::attached(options)?.any() {
            make_room(options, other)?;
        }
    }
    let done = install(options, sizes, &pins, previous.as_ref(), attached);
    if done.is_err() {
        if Link::from_pin(&pins.link()).is_ok() {
            pins.unstage_maps();
        } else {
            let _ = pins.remove();
        }
    }
    done
}

fn attached(options: &Options) -> Result<Attached, ProgramError> {
    netlink::attached(options.index)
        .map_err(|error| ProgramError::call(&options.interface, "asking for its XDP programs", error))
}

/// Whether the link's program is on our interface. (Its number alone could be one of another network namespace.)
fn is_on(link: &Link, index: u32, attached: Attached) -> bool {
    link.info()
        .is_ok_and(|link| link.index == index && attached.any().is_some_and(|(id, ..)| id == link.program))
}

/// Takes away somebody else's program, or says whose it is.
fn make_room(options: &Options, (id, mode, flag): (u32, &'static str, u32)) -> Result<(), ProgramError> {
    let interface = options.interface.clone();
    let failed = |what, error| ProgramError::call(&interface, what, error);
    // Ours, if the interface was renamed.
    if let Some(renamed) = list().into_iter().find(|pinned| pinned.program == Some(id)) {
        let pins = Pins { interface: interface.clone(), ..Pins::of(&renamed.interface) };
        pins.check_unserved()?;
        tracing::info!(
            "xdp:{interface}: what was pinned when it was called {} is removed",
            renamed.interface
        );
        return pins.remove().map(drop).map_err(|e| failed("removing old pins", e));
    }
    let name = loaded_programs().flatten().find(|program| program.id() == id);
    let name = match name.as_ref().and_then(|program| program.name_as_str()) {
        None | Some("") => "without a name".to_owned(),
        Some(name) => format!("named {name}"),
    };
    if !options.replace || flag == 0 {
        return Err(ProgramError::Foreign { interface, id, name, mode });
    }
    tracing::warn!("xdp:{interface}: program {id}, {name}, {mode} mode, is replaced");
    match Link::of_program(id, options.index) {
        Ok(Some(link)) => link.detach(),
        Ok(None) => netlink::detach(options.index, flag),
        Err(error) => Err(error),
    }
    .map_err(|error| failed("detaching the other program", error))
}

/// Loads the program and puts it to work.
fn install(
    options: &Options,
    sizes: Sizes,
    pins: &Pins,
    previous: Option<&Previous>,
    attached: Attached,
) -> Result<XdpProgram, ProgramError> {
    let interface = options.interface.as_str();
    let call = |what, error| ProgramError::call(interface, what, error);
    let keeps_maps =
        previous.is_some_and(|found| found.sizes == Some(sizes) && uses(&found.link, &found.map_ids));
    let mut ebpf = load(options, sizes, keeps_maps.then_some(pins))?;
    if !keeps_maps {
        pins.stage_maps(&ebpf).map_err(|error| call("pinning maps", error))?;
    }
    let held = pins
        .hold()
        .and_then(|held| held.ok_or_else(|| io::ErrorKind::WouldBlock.into()))
        .map_err(|error| call("locking its pins", error))?;
    let mut maps = Maps::take(&mut ebpf).map_err(|error| call("opening maps", io_error(error)))?;
    if keeps_maps {
        maps.forget_ports(sizes)
    } else {
        maps.copy_addresses(pins);
        Ok(())
    }
    .and_then(|()| {
        let config = config(options, &maps);
        maps.config.set(0, config, 0)
    })
    .map_err(|error| call("writing maps", io_error(error)))?;

    let program: &Xdp = program(&ebpf).map_err(|error| call("opening the program", error))?;
    let fd = program.fd().map_err(|error| call("opening the program", io_error(error)))?.as_fd();
    let (link, mode) = match previous {
        Some(Previous { link, .. }) if !wants_other(options.mode, mode_of(attached)) => {
            if !keeps_maps || program.info().ok().map(|ours| ours.tag()) != tag_of(link) {
                link.update(fd).map_err(|error| call("replacing the program in its link", error))?;
                tracing::info!("xdp:{interface}: the program in the pinned link was replaced");
            }
            (link.try_clone().map_err(|error| call("duplicating its link", error))?, mode_of(attached))
        }
        _ => {
            if let Some(Previous { link, .. }) = previous {
                let removed = link.detach().and_then(|()| std::fs::remove_file(pins.link()));
                removed.map_err(|error| call("detaching, to attach in another mode", error))?;
            }
            let (link, mode) = create_link(options, fd)?;
            link.pin(&pins.link()).map_err(|error| call("pinning its link", error))?;
            (link, mode)
        }
    };
    if !keeps_maps {
        pins.commit_maps().map_err(|error| call("pinning maps", error))?;
    }
    Ok(XdpProgram {
        mode,
        was_pinned: previous.is_some(),
        maps: Mutex::new(maps),
        sizes,
        _link: link,
        _held: held,
    })
}

fn config(options: &Options, maps: &Maps) -> Config {
    let Options { queues, ports, slots, flood, .. } = *options;
    let Owner { pid, start_time } = Owner::this();
    let exact = maps.macs.keys().flatten().any(|key| key.vlan != VLAN_ANY);
    Config { layout: LAYOUT, pid, start_time, queues, ports, slots, flood: flood.into(), exact: exact.into() }
}

/// Loads the object, with maps of its own or with those that are pinned.
fn load(options: &Options, sizes: Sizes, pinned: Option<&Pins>) -> Result<Ebpf, ProgramError> {
    let failed = |error: &(dyn std::error::Error + 'static)| {
        let interface = options.interface.clone();
        match os_error(error) {
            Some(libc::EPERM | libc::EACCES) => ProgramError::NotPermitted(interface, "loading the program"),
            _ => ProgramError::Load(interface, chain(error)),
        }
    };
    let Sizes { queues, ports, slots } = sizes;
    let mut loader = EbpfLoader::new();
    // The kernel's own types are not needed.
    loader.btf(None);
    loader.map_max_entries("xdp_steer", queues * ports);
    loader.map_max_entries("xsk_socks", queues * slots);
    loader.map_max_entries("xdp_port_stats", ports);
    for (name, ..) in MAPS {
        if let Some(pins) = pinned {
            loader.map_pin_path(name, pins.map(name));
        }
    }
    let mut ebpf = loader.load(OBJECT).map_err(|error| failed(&error))?;
    if let Some(Program::Xdp(program)) = ebpf.program_mut(PROGRAM) {
        program.load().map_err(|error| failed(&error))?;
    }
    Ok(ebpf)
}

fn program(ebpf: &Ebpf) -> io::Result<&Xdp> {
    match ebpf.program(PROGRAM) {
        Some(Program::Xdp(program)) => Ok(program),
        _ => Err(io::ErrorKind::NotFound.into()),
    }
}

/// An error with its causes, where they say more.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        next = error.source();
    }
    text
}

/// Attaches by a new link, where the mode says.
fn create_link(options: &Options, program: BorrowedFd<'_>) -> Result<(Link, Mode), ProgramError> {
    let interface = options.interface.as_str();
    if options.mode != Mode::Skb {
        match Link::attach_xdp(program, options.index, XDP_FLAGS_DRV_MODE) {
            Ok(link) => return Ok((link, Mode::Native)),
            Err(error) => match (error.raw_os_error(), options.mode) {
                (Some(libc::EPERM | libc::ENODEV | libc::EBUSY | libc::EEXIST), _) => {
                    return Err(ProgramError::call(interface, "attaching", error));
                }
                (_, Mode::Auto) => {
                    tracing::info!(
                        "xdp:{interface}: the driver takes no program ({error}): skb mode, which is slower"
                    );
                }
                _ => return Err(ProgramError::NoNative(interface.into(), error)),
            },
        }
    }
    let link = Link::attach_xdp(program, options.index, XDP_FLAGS_SKB_MODE)
        .map_err(|error| ProgramError::call(interface, "attaching", error))?;
    Ok((link, Mode::Skb))
}

/// Where our program runs.
fn mode_of(attached: Attached) -> Mode {
    if attached.native.is_some() { Mode::Native } else { Mode::Skb }
}

fn wants_other(wanted: Mode, present: Mode) -> bool {
    wanted != Mode::Auto && wanted != present
}

/// Whether the link's program works with just these maps.
fn uses(link: &Link, map_ids: &[u32]) -> bool {
    let Some(Ok(Some(mut used))) = program_of(link).map(|program| program.map_ids()) else { return false };
    let mut pinned = map_ids.to_vec();
    used.sort_unstable();
    pinned.sort_unstable();
    used == pinned
}

/// A number for the instructions of the link's program.
fn tag_of(link: &Link) -> Option<u64> {
    program_of(link).map(|program| program.tag())
}

fn program_of(link: &Link) -> Option<ProgramInfo> {
    let id = link.info().ok()?.program;
    loaded_programs().flatten().find(|program| program.id() == id)
}

impl Maps {
    fn take(ebpf: &mut Ebpf) -> Result<Self, MapError> {
        let mut take =
            |name: &str| ebpf.take_map(name).ok_or_else(|| MapError::InvalidName { name: name.into() });
        Ok(Self {
            config: take("xdp_config")?.try_into()?,
            macs: take("mac_table")?.try_into()?,
            steer: take("xdp_steer")?.try_into()?,
            sockets: take("xsk_socks")?.try_into()?,
            stats: take("xdp_stats")?.try_into()?,
            port_stats: take("xdp_port_stats")?.try_into()?,
        })
    }

    /// Ports may have other numbers now: no address has one, and no slot takes part.
    fn forget_ports(&mut self, sizes: Sizes) -> Result<(), MapError> {
        for index in 0..sizes.queues * sizes.ports {
            self.steer.set(index, Steer::default(), 0)?;
        }
        let known: Vec<MacKey> = self.macs.keys().flatten().collect();
        known.iter().try_for_each(|key| self.macs.insert(key, NO_PORT, 0))
    }

    /// Takes over the addresses that are known in pinned maps of other sizes, if there are any.
    fn copy_addresses(&mut self, pins: &Pins) {
        let Ok(pinned) = MapData::from_pin(pins.map("mac_table")) else { return };
        let Ok(pinned) = HashMap::<_, MacKey, u32>::try_from(Map::HashMap(pinned)) else { return };
        for key in pinned.keys().flatten() {
            // The maps have the same size.
            let _ = self.macs.insert(key, NO_PORT, 0);
        }
    }
}
