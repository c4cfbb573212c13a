//! The usual arrangements of back-end and guest, and bulk transfers between the guest and the host.
#![forbid(unsafe_code)]

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::backend::{Backend, BackendConfig};
use crate::netns::NetNs;
use crate::qemu::{HOST_IP, PREFIX, Qemu, QemuConfig};
use crate::scenario::Lab;
use crate::transfer::{Amount, Digest, Sink, Source};

/// An emulated guest moves some 10 MB/s, and less beside other work.
const TRANSFER_PATIENCE: Duration = Duration::from_secs(240);

/// One guest on one back-end with one tap, which has the host's address.
#[derive(Debug)]
pub struct Bed {
    /// The guest; it ends before its back-end.
    pub guest: Qemu,
    /// The back-end.
    pub backend: Backend,
    /// Where the back-end and its tap are.
    pub netns: NetNs,
    /// How the back-end was started, for starting another.
    pub backend_config: BackendConfig,
}

impl Bed {
    /// Starts both and waits until the guest has booted. The tap is persistent, so it outlives the back-end.
    pub fn start(lab: &Lab, change: impl FnOnce(&mut BackendConfig, &mut QemuConfig)) -> Result<Self> {
        let netns = NetNs::new()?;
        let socket = lab.path("vhost");
        let mut backend_config = BackendConfig::tap(&socket, "tap0");
        let mut guest_config = QemuConfig::new("guest", &socket);
        change(&mut backend_config, &mut guest_config);
        netns.add_tap("tap0", backend_config.wants_multi_queue(), Some(&format!("{HOST_IP}/{PREFIX}")))?;
        let backend = Backend::start(lab, &netns, &backend_config)?;
        let guest = Qemu::boot(lab, &guest_config)?;
        Ok(Self { guest, backend, netns, backend_config })
    }

    /// Ends the guest, then the back-end, which must have survived everything and end cleanly.
    pub fn stop(mut self) -> Result<()> {
        self.guest.check_alive()?;
        self.backend.check_alive()?;
        drop(self.guest);
        self.backend.stop_cleanly()
    }
}

/// A back-end on a tap of its own, and a QEMU on that: one side of a migration.
#[derive(Debug)]
pub struct Place {
    /// The guest, or where it will be; it ends before its back-end.
    pub qemu: Qemu,
    /// The back-end.
    pub backend: Backend,
}

impl Place {
    /// Starts both. Unless the guest is to come by migration, waits until it has booted.
    pub fn start(lab: &Lab, netns: &NetNs, tap: &str, change: impl FnOnce(&mut QemuConfig)) -> Result<Self> {
        Self::start_with(lab, netns, tap, |_, config| change(config))
    }

    /// As [`Place::start`], with a back-end that can be changed, too.
    pub fn start_with(
        lab: &Lab,
        netns: &NetNs,
        tap: &str,
        change: impl FnOnce(&mut BackendConfig, &mut QemuConfig),
    ) -> Result<Self> {
        let socket = lab.path(&format!("{tap}.vhost"));
        let mut backend_config = BackendConfig::tap(&socket, tap);
        let mut config = QemuConfig::new(&format!("on-{tap}"), &socket);
        change(&mut backend_config, &mut config);
        let backend = Backend::start(lab, netns, &backend_config)?;
        let qemu = if config.is_incoming { Qemu::start(lab, &config)? } else { Qemu::boot(lab, &config)? };
        Ok(Self { qemu, backend })
    }

    /// Ends the QEMU, then the back-end, which must have survived everything and end cleanly.
    pub fn stop(mut self) -> Result<()> {
        self.backend.check_alive()?;
        drop(self.qemu);
        self.backend.stop_cleanly()
    }
}

/// Random data in a guest's memory, whose checksum must survive what happens to the guest.
#[derive(Debug)]
pub struct Filled(String);

impl Filled {
    /// Fills `mib` MiB.
    pub fn write(guest: &mut Qemu, mib: u32) -> Result<Self> {
        guest.run(&format!("dd if=/dev/urandom of=/tmp/filled bs=1M count={mib} 2>/dev/null"))?;
        Ok(Self(guest.run("md5sum </tmp/filled")?))
    }

    /// Fails unless it is all there.
    pub fn check(&self, guest: &mut Qemu) -> Result<()> {
        let seen = guest.run("md5sum </tmp/filled")?;
        ensure!(seen == self.0, "the guest's memory changed: {} became {seen}", self.0);
        Ok(())
    }
}

/// A bridge with the host's address, and one tap in it for each back-end of a migration.
///
/// The bridge learns where the guest is from its frames, as a switch does: after a migration, traffic finds the
/// guest only if the new place was announced.
pub fn bridged(taps: &[&str]) -> Result<NetNs> {
    let multi_queue = BackendConfig::tap(Path::new(""), "").wants_multi_queue();
    bridged_with(&taps.iter().map(|tap| (*tap, multi_queue)).collect::<Vec<_>>())
}

/// As [`bridged`], with taps of the multi-queue kind (true) or not.
pub fn bridged_with(taps: &[(&str, bool)]) -> Result<NetNs> {
    let netns = NetNs::new()?;
    for (tap, multi_queue) in taps {
        netns.add_tap(tap, *multi_queue, None)?;
    }
    let taps: Vec<&str> = taps.iter().map(|(tap, _)| *tap).collect();
    netns.add_bridge("br0", &format!("{HOST_IP}/{PREFIX}"), &taps)?;
    Ok(netns)
}

/// The guest fetches pseudo-random bytes into a file; fails unless they arrive unchanged.
pub fn pull(netns: &NetNs, guest: &mut Qemu, bytes: u64, file: &str) -> Result<Digest> {
    let source = Source::start(netns, bytes, Amount::Bytes(bytes))?;
    let port = source.port();
    let command = format!("nc {HOST_IP} {port} </dev/null >{file} && md5sum <{file} && wc -c <{file}");
    let seen = guest.shell.run_within(&command, TRANSFER_PATIENCE)?;
    let sent = source.finish()?;
    ensure!(
        seen.contains(&sent.md5) && seen.contains(&sent.bytes.to_string()),
        "host to guest: sent {sent:?}, the guest has {seen}"
    );
    Ok(sent)
}

/// The guest sends a file; fails unless it arrives with the given length and checksum.
pub fn push(netns: &NetNs, guest: &mut Qemu, file: &str, expected: &Digest) -> Result<()> {
    let sink = Sink::start(netns)?;
    guest.shell.run_within(&format!("nc {HOST_IP} {} <{file}", sink.port()), TRANSFER_PATIENCE)?;
    let seen = sink.finish()?;
    ensure!(seen == *expected, "guest to host: sent {expected:?}, arrived {seen:?}");
    Ok(())
}

/// Transfers so many bytes from the host to the guest, and the same bytes back.
pub fn there_and_back(netns: &NetNs, guest: &mut Qemu, bytes: u64) -> Result<()> {
    let file = "/tmp/transfer";
    let sent = pull(netns, guest, bytes, file)?;
    push(netns, guest, file, &sent)?;
    guest.run(&format!("rm {file}")).map(drop)
}
