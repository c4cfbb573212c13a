//! `vhost-user-net faults` and `vhost-user-net unload`: what they print and do. They read and remove pins, and need no
//! process of ours to run.
#![forbid(unsafe_code)]

use super::pins::{self, Found};
use super::read::{self, ReadError, Reader};
use super::{json, show};
use crate::bpf;
use crate::uplink::xdp::program as xdp;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

/// What to show, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// The instance; `None`: the only one.
    pub instance: Option<String>,
    /// As JSON.
    pub json: bool,
    /// Again and again, what has come since.
    pub watch: Option<Duration>,
}

/// What to remove.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unload {
    /// An instance's maps; `None`: those of the only one.
    Instance(Option<String>),
    /// The XDP program of an interface.
    Interface(String),
    /// Everything that no living process uses.
    All,
}

/// Clears the screen and goes to its corner.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// Shows what an instance has measured. Returns when all is said, or nobody reads it any more.
///
/// # Errors
/// See [`ReadError`].
pub fn faults(what: &Faults) -> Result<(), ReadError> {
    let instance = read::choose(what.instance.as_deref())?;
    let mut reader = Reader::open(&instance)?;
    let mut snapshot = reader.snapshot()?;
    let mut out = io::stdout();
    let Some(interval) = what.watch else {
        let text = if what.json {
            format!("{:#}\n", json::value(&snapshot, None))
        } else {
            show::page(&snapshot, None)
        };
        let _ = out.write_all(text.as_bytes());
        return Ok(());
    };
    let clear = if out.is_terminal() && !what.json { CLEAR } else { "" };
    loop {
        std::thread::sleep(interval);
        // A process that was started anew has maps of its own.
        if !snapshot.is_alive
            && let Ok(new) = Reader::open(&instance)
        {
            reader = new;
        }
        let now = reader.snapshot()?;
        let is_same = now.meta.start_time == snapshot.meta.start_time && now.meta.pid == snapshot.meta.pid;
        let before = if is_same { snapshot.histograms } else { Default::default() };
        let changes = show::since(&now, &before);
        let text = if what.json {
            format!("{}\n", json::value(&changes, Some(interval)))
        } else {
            format!("{clear}{}\n", show::page(&changes, Some(interval)))
        };
        if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
            return Ok(());
        }
        snapshot = now;
    }
}

/// Removes pins, and says which.
///
/// # Errors
/// A sentence: nothing is there, somebody uses it, or it may not be removed.
pub fn unload(what: &Unload) -> Result<String, String> {
    match what {
        Unload::Instance(named) => {
            let instance = read::choose(named.as_deref()).map_err(|error| error.to_string())?;
            unload_instance(&instance)
        }
        Unload::Interface(interface) => unload_interface(interface),
        Unload::All => {
            let instances =
                pins::instances().map_err(|error| format!("{}: {error}", bpf::PIN_ROOT))?.into_iter();
            let interfaces = xdp::list().into_iter().map(|pinned| pinned.interface);
            let done: Vec<_> = instances
                .map(|instance| unload_instance(&instance))
                .chain(interfaces.map(|interface| unload_interface(&interface)))
                .collect();
            if done.is_empty() {
                return Ok("nothing is left\n".into());
            }
            let failed: Vec<String> = done.iter().filter_map(|one| one.clone().err()).collect();
            let text: String = done.into_iter().flatten().collect();
            if failed.is_empty() { Ok(text) } else { Err(format!("{text}{}", failed.join("\n"))) }
        }
    }
}

fn unload_instance(instance: &str) -> Result<String, String> {
    let dir = bpf::pin_dir(instance);
    let place = dir.display();
    let failed = |error: io::Error| format!("{place}: {error}");
    let _lock = pins::lock().map_err(failed)?;
    if let Some(Found::Ours(meta)) = pins::look(&dir).map_err(failed)?
        && pins::owner(&meta).is_alive()
    {
        return Err(format!("instance {instance} is in use by process {}: end that first", meta.pid));
    }
    match pins::remove(&dir).map_err(failed)? {
        true => Ok(format!("instance {instance}: maps removed\n")),
        false => Err(format!("{place}: nothing is there")),
    }
}

fn unload_interface(interface: &str) -> Result<String, String> {
    match xdp::unload(interface).map_err(|error| error.to_string())? {
        true => Ok(format!("interface {interface}: XDP program detached, maps removed\n")),
        false => Err(format!("interface {interface} has no XDP program of ours")),
    }
}
