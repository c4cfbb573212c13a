//! Network namespaces without names: they live as long as a descriptor or a process holds them, so
//! nothing can be left behind on the machine. With a mount namespace beside it, one has a BPF file system of its own: what is
//! pinned there goes with it.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use crate::artefacts::find_in_path;
use crate::process::run_to_end;

/// A network namespace with its loopback up.
#[derive(Debug)]
pub struct NetNs {
    fd: OwnedFd,
    /// The mount namespace with the BPF file system.
    mounts: Option<OwnedFd>,
}

impl NetNs {
    /// Makes a new namespace. Needs CAP_SYS_ADMIN, as root has it, or `unshare -Ur`.
    pub fn new() -> Result<Self> {
        let make = || -> Result<OwnedFd> {
            unshare(CloneFlags::CLONE_NEWNET).context("no permission to make a network namespace")?;
            Ok(File::open("/proc/thread-self/ns/net")?.into())
        };
        let fd = std::thread::scope(|scope| scope.spawn(make).join().expect("the thread does not panic"))?;
        let made = Self { fd, mounts: None };
        made.ip("link set lo up")?;
        Ok(made)
    }

    /// Makes a new namespace with a BPF file system of its own. Needs CAP_SYS_ADMIN in the initial user namespace.
    pub fn with_bpf() -> Result<Self> {
        Self::new()?.with_fresh_bpf()
    }

    /// The same network with another BPF file system, an empty one.
    pub fn with_fresh_bpf(&self) -> Result<Self> {
        let make = || -> Result<OwnedFd> {
            unshare(CloneFlags::CLONE_NEWNS).context("no permission to make a mount namespace")?;
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
            mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), none)
                .context("mounting a BPF file system")?;
            Ok(File::open("/proc/thread-self/ns/mnt")?.into())
        };
        let mounts =
            std::thread::scope(|scope| scope.spawn(make).join().expect("the thread does not panic"))?;
        Ok(Self { fd: self.fd.try_clone()?, mounts: Some(mounts) })
    }

    /// What a thread or process enters to be inside; nothing is allocated.
    pub(crate) fn entrance(&self) -> Result<impl Fn() -> nix::Result<()> + Send + Sync + 'static> {
        let net = self.fd.try_clone()?;
        let mounts = self.mounts.as_ref().map(OwnedFd::try_clone).transpose()?;
        Ok(move || {
            if let Some(mounts) = &mounts {
                // Threads share their working directory, which a mount namespace brings along.
                unshare(CloneFlags::CLONE_FS)?;
                setns(mounts.as_fd(), CloneFlags::CLONE_NEWNS)?;
            }
            setns(net.as_fd(), CloneFlags::CLONE_NEWNET)
        })
    }

    /// Runs a closure on a thread inside the namespace. Sockets it makes stay there for good.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
        let enter = self.entrance()?;
        let inside = || {
            enter().context("entering the namespace")?;
            work()
        };
        std::thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Runs `ip ARGUMENTS` inside and returns what it prints. Words are split at blanks.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        let mut command = Command::new(find_in_path("ip").context("there is no `ip` program")?);
        command.args(arguments.split_whitespace());
        run_to_end(command, Some(self))
    }

    /// Makes a persistent tap (it goes with the namespace), up, with an address such as `10.0.0.1/24`.
    ///
    /// A back-end that is killed and started again finds it as it was.
    pub fn add_tap(&self, name: &str, multi_queue: bool, address: Option<&str>) -> Result<()> {
        let kind = if multi_queue { "vnet_hdr multi_queue" } else { "vnet_hdr" };
        self.ip(&format!("tuntap add dev {name} mode tap {kind}"))?;
        if let Some(address) = address {
            self.ip(&format!("address add {address} dev {name}"))?;
        }
        self.ip(&format!("link set {name} up")).map(drop)
    }

    /// Makes a pair of virtual interfaces with as many queues each, both up. What is put on one comes in at the other.
    pub fn add_veth(&self, one: &str, other: &str, queues: u16) -> Result<()> {
        let queues = format!("numrxqueues {queues} numtxqueues {queues}");
        self.ip(&format!("link add {one} {queues} type veth peer name {other} {queues}"))?;
        for name in [one, other] {
            // Nobody's stack adds frames of its own.
            let file = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
            self.run(|| {
                // A kernel without IPv6 needs no telling.
                let _ = std::fs::write(file, "1");
                Ok(())
            })?;
            self.ip(&format!("link set {name} up"))?;
        }
        Ok(())
    }

    /// Makes a bridge with an address, and puts interfaces into it.
    pub fn add_bridge(&self, name: &str, address: &str, ports: &[&str]) -> Result<()> {
        self.ip(&format!("link add {name} type bridge forward_delay 0 stp_state 0"))?;
        for port in ports {
            self.ip(&format!("link set {port} master {name}"))?;
        }
        self.ip(&format!("address add {address} dev {name}"))?;
        self.ip(&format!("link set {name} up")).map(drop)
    }

    /// An interface's MTU in bytes.
    pub fn mtu(&self, interface: &str) -> Result<u32> {
        let text = self.ip(&format!("-o link show dev {interface}"))?;
        let mut words = text.split_whitespace().skip_while(|word| *word != "mtu").skip(1);
        words.next().and_then(|mtu| mtu.parse().ok()).with_context(|| format!("no MTU in: {text}"))
    }

    /// An interface's MAC address.
    pub fn mac(&self, interface: &str) -> Result<String> {
        let text = self.ip(&format!("-o link show dev {interface}"))?;
        let mut words = text.split_whitespace().skip_while(|word| *word != "link/ether").skip(1);
        words.next().map(str::to_owned).with_context(|| format!("no MAC address in: {text}"))
    }

    /// Packets that an interface received and sent; for a tap, from the guest and to it.
    pub fn packets(&self, interface: &str) -> Result<(u64, u64)> {
        let json: serde_json::Value =
            serde_json::from_str(&self.ip(&format!("-s -j link show dev {interface}"))?)?;
        let count = |way: &str| json[0]["stats64"][way]["packets"].as_u64().context("no packet counters");
        Ok((count("rx")?, count("tx")?))
    }

    /// The number that the kernel gave an interface.
    pub fn index_of(&self, interface: &str) -> Result<usize> {
        self.run(|| Ok(nix::net::if_::if_nametoindex(interface)? as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taps_live_and_die_with_their_namespace() {
        let Ok(netns) = NetNs::new() else {
            eprintln!("skipped: no permission to make a network namespace");
            return;
        };
        netns.add_tap("tap0", false, None).unwrap();
        netns.add_bridge("br0", "10.0.0.1/24", &["tap0"]).unwrap();
        assert_eq!(netns.mtu("tap0").unwrap(), 1500);
        assert!(netns.index_of("br0").unwrap() > 1);
        assert!(NetNs::new().unwrap().index_of("br0").is_err());
    }
}
