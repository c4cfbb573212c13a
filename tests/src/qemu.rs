//! A QEMU with our guest in it.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::process::Process;
use crate::qmp::Qmp;
use crate::scenario::Lab;
use crate::serial::Shell;
use crate::wait::{PATIENCE, until};

/// The guest's address.
pub const GUEST_IP: &str = "10.77.0.2";
/// The host's address, on the tap or on the bridge behind it.
pub const HOST_IP: &str = "10.77.0.1";
/// Length of the network's prefix in bits.
pub const PREFIX: u8 = 24;
/// The guest's MAC address.
pub const GUEST_MAC: &str = "52:54:00:12:34:56";

/// Boot takes 3 s on a quiet machine; this is for one that is not.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);

/// What guest memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backing {
    /// A memfd.
    #[default]
    Memfd,
    /// A file in /dev/shm that QEMU makes and unlinks, one for each QEMU.
    ShmFile,
    /// A memfd of 2 MiB pages; see [`crate::HugePages`].
    Huge2M,
}

impl Backing {
    fn object(self, mib: u32) -> String {
        match self {
            Self::Memfd => format!("memory-backend-memfd,id=m0,share=on,size={mib}M"),
            Self::ShmFile => format!("memory-backend-file,id=m0,share=on,size={mib}M,mem-path=/dev/shm"),
            Self::Huge2M => {
                format!("memory-backend-memfd,id=m0,share=on,size={mib}M,hugetlb=on,hugetlbsize=2M")
            }
        }
    }
}

/// A guest and its one virtio-net device.
#[derive(Debug, Clone)]
pub struct QemuConfig {
    /// Name for messages and logs.
    pub name: String,
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// QEMU serves the socket and waits for the back-end.
    pub is_server: bool,
    /// As a client: connect again after this many milliseconds when the back-end is gone.
    pub reconnect_ms: Option<u32>,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// What it is made of.
    pub backing: Backing,
    /// Slots for memory hotplug.
    pub memory_slots: u32,
    /// Guest CPUs.
    pub cpus: u32,
    /// Queue pairs of the device.
    pub queue_pairs: u16,
    /// The guest's address.
    pub ip: String,
    /// The device's address.
    pub mac: String,
    /// More properties of the device, such as `host_mtu=1400`.
    pub device: Vec<String>,
    /// Start as the destination of a migration.
    pub is_incoming: bool,
}

impl QemuConfig {
    /// A small guest on a back-end's socket.
    pub fn new(name: &str, socket: &Path) -> Self {
        Self {
            name: name.to_owned(),
            socket: socket.to_owned(),
            is_server: false,
            reconnect_ms: None,
            memory_mib: 256,
            backing: Backing::Memfd,
            memory_slots: 0,
            cpus: 1,
            queue_pairs: 1,
            ip: GUEST_IP.to_owned(),
            mac: GUEST_MAC.to_owned(),
            device: Vec::new(),
            is_incoming: false,
        }
    }

    fn arguments(&self, lab: &Lab, sockets: &Sockets, serial_log: &Path) -> Vec<String> {
        let artefacts = &lab.artefacts;
        let mut arguments = Vec::new();
        for data in &artefacts.qemu_data {
            arguments.extend(["-L".to_owned(), data.display().to_string()]);
        }
        let mut pair = |key: &str, value: String| arguments.extend([key.to_owned(), value]);
        let memory = self.memory_mib;
        pair("-M", "pc,accel=tcg,mem-merge=off,memory-backend=m0".into());
        pair("-cpu", "max".into());
        pair("-smp", self.cpus.to_string());
        pair(
            "-m",
            match self.memory_slots {
                0 => format!("{memory}M"),
                slots => format!("{memory}M,slots={slots},maxmem=4G"),
            },
        );
        pair("-object", self.backing.object(memory));
        let serial = sockets.serial.display();
        let log = serial_log.display();
        pair("-chardev", format!("socket,id=ser,path={serial},server=on,wait=off,logfile={log}"));
        pair("-serial", "chardev:ser".into());
        pair("-qmp", format!("unix:{},server=on,wait=off", sockets.qmp.display()));
        pair("-kernel", artefacts.kernel.display().to_string());
        pair("-initrd", artefacts.initramfs.display().to_string());
        // init_on_alloc=0: packet buffers are written by the back-end alone, so that its dirty log is what counts.
        let settings = "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check nokaslr mitigations=off init_on_alloc=0";
        pair("-append", format!("{settings} lab_ip={}/{PREFIX}", self.ip));
        let mut chardev = format!("socket,id=vu0,path={}", self.socket.display());
        if self.is_server {
            chardev.push_str(",server=on");
        }
        if let Some(milliseconds) = self.reconnect_ms {
            chardev.push_str(&format!(",reconnect-ms={milliseconds}"));
        }
        pair("-chardev", chardev);
        let queues =
            if self.queue_pairs > 1 { format!(",queues={}", self.queue_pairs) } else { String::new() };
        pair("-netdev", format!("vhost-user,id=n0,chardev=vu0{queues}"));
        let mut device = format!("virtio-net-pci,id=nic0,netdev=n0,mac={},romfile=", self.mac);
        if self.queue_pairs > 1 {
            // Two vectors per pair, one for the control queue, one for configuration changes.
            device.push_str(&format!(",mq=on,vectors={}", 2 * self.queue_pairs + 2));
        }
        for property in &self.device {
            device.push_str(&format!(",{property}"));
        }
        pair("-device", device);
        if self.is_incoming {
            pair("-incoming", "defer".into());
        }
        arguments.extend(["-nodefaults", "-nographic", "-no-reboot"].map(str::to_owned));
        arguments
    }
}

#[derive(Debug)]
struct Sockets {
    qmp: PathBuf,
    serial: PathBuf,
}

/// A running QEMU.
#[derive(Debug)]
pub struct Qemu {
    /// The guest's shell.
    pub shell: Shell,
    /// QEMU's monitor.
    pub qmp: Qmp,
    process: Process,
    name: String,
}

impl Qemu {
    /// Starts QEMU and connects to its monitor and the guest's serial port. The guest boots (or waits for
    /// a migration) when this returns.
    pub fn start(lab: &Lab, config: &QemuConfig) -> Result<Self> {
        let name = &config.name;
        let sockets =
            Sockets { qmp: lab.path(&format!("{name}.qmp")), serial: lab.path(&format!("{name}.serial")) };
        let mut command = Command::new(&lab.artefacts.qemu);
        command.args(config.arguments(lab, &sockets, &lab.new_log(&format!("{name}-serial"))));
        command.stdin(Stdio::null());
        let log = lab.new_log(&format!("{name}-stderr"));
        let mut process = Process::start(&format!("QEMU {name}"), command, &log, None)?;
        until("QEMU's monitor", PATIENCE, || {
            process.check_alive()?;
            Ok((sockets.serial.exists() && sockets.qmp.exists()).then_some(()))
        })?;
        let shell = Shell::connect(&sockets.serial)?;
        let qmp = Qmp::connect(&sockets.qmp).or_else(|error| {
            process.check_alive()?;
            Err(error)
        })?;
        Ok(Self { shell, qmp, process, name: name.clone() })
    }

    /// Starts QEMU and waits until the guest has booted.
    pub fn boot(lab: &Lab, config: &QemuConfig) -> Result<Self> {
        let mut qemu = Self::start(lab, config)?;
        qemu.shell.wait_ready(BOOT_PATIENCE)?;
        Ok(qemu)
    }

    /// Runs a command in the guest; see [`Shell::run`].
    pub fn run(&mut self, command: &str) -> Result<String> {
        self.shell.run(command)
    }

    /// What it has printed so far, the guest's serial port aside.
    pub fn output(&self) -> String {
        self.process.output()
    }

    /// The name it was started with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Fails if QEMU has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        self.process.check_alive()
    }

    /// Plugs in a DIMM of `mib` MiB. The machine needs memory slots.
    pub fn plug_memory(&mut self, id: &str, mib: u64) -> Result<()> {
        let memory = format!("{id}-ram");
        self.qmp.execute(
            "object-add",
            json!({ "qom-type": "memory-backend-memfd", "id": memory, "share": true, "size": mib << 20 }),
        )?;
        self.qmp.execute("device_add", json!({ "driver": "pc-dimm", "id": id, "memdev": memory })).map(drop)
    }

    /// The guest's memory in KiB, as it sees it.
    pub fn guest_memory_kib(&mut self) -> Result<u64> {
        Ok(self.run("sed -n 's/^MemTotal: *//p' /proc/meminfo | cut -d' ' -f1")?.trim().parse()?)
    }

    /// Fails unless the guest's network device has packed rings (VIRTIO_F_RING_PACKED).
    pub fn check_packed(&mut self) -> Result<()> {
        const BIT: usize = 34;
        let bits = self.run("cat /sys/bus/virtio/drivers/virtio_net/virtio*/features")?;
        ensure!(bits.trim().as_bytes().get(BIT) == Some(&b'1'), "the guest has no packed rings: {bits}");
        Ok(())
    }

    /// What `query-migrate` says.
    pub fn migration(&mut self) -> Result<Value> {
        self.qmp.execute("query-migrate", json!({}))
    }
}
