//! For unit tests that need a kernel that loads BPF programs: network and mount namespaces of their own with a BPF file system
//! of their own, so that nothing is left behind, and packet sockets.

use super::testing::skip;
use nix::mount::{MsFlags, mount};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

const INSIDE: &str = "VHOST_USER_NET_TEST_INSIDE_BPF";

/// Runs `test`, whose full name is `name`, as root in namespaces of its own: starts this test binary again under `unshare`,
/// for that one test. Skipped without root (in a user namespace the kernel loads no program).
pub(crate) fn in_bpf_namespace(name: &str, test: fn()) {
    if std::env::var(INSIDE).as_deref() == Ok(name) {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("bpf"), crate::bpf::BPF_FS, Some("bpf"), flags, Some("mode=0700")).unwrap();
        return test();
    }
    if let Err(reason) = able() {
        return skip(name, &reason);
    }
    let binary = std::env::current_exe().unwrap();
    let mut command = Command::new("unshare");
    command.arg("-nm").arg(binary).args(["--exact", name, "--nocapture", "--test-threads=1"]);
    let run = command.env(INSIDE, name).output().unwrap();
    let text = String::from_utf8_lossy(&run.stdout) + String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{text}");
    assert!(text.contains("1 passed"), "{text}");
}

fn able() -> Result<(), String> {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let is_initial = map.split_whitespace().eq(["0", "0", "4294967295"]);
    if !nix::unistd::geteuid().is_root() || !is_initial {
        return Err("BPF programs are loaded for root only, and not in a user namespace".into());
    }
    match Command::new("unshare").args(["-nm", "true"]).output() {
        Ok(done) if done.status.success() => Ok(()),
        Ok(done) => Err(String::from_utf8_lossy(&done.stderr).trim().to_owned()),
        Err(error) => Err(format!("unshare(1): {error}")),
    }
}

/// Runs `ip ARGUMENTS`, words split at blanks.
pub(crate) fn ip(arguments: &str) {
    let run = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    assert!(run.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&run.stderr));
}

/// The number of an interface.
pub(crate) fn index_of(name: &str) -> u32 {
    nix::net::if_::if_nametoindex(name).unwrap()
}

/// Makes a pair of virtual interfaces with as many queues each, both up.
pub(crate) fn veth(one: &str, other: &str, queues: u32) {
    let queues = format!("numrxqueues {queues} numtxqueues {queues}");
    ip(&format!("link add {one} {queues} type veth peer name {other} {queues}"));
    for name in [one, other] {
        ip(&format!("link set {name} up"));
    }
}

/// A socket that no frame is read from: enough to be in a map.
pub(crate) fn xdp_socket() -> OwnedFd {
    // SAFETY: no pointers; the descriptor is new and ours.
    let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0);
    // SAFETY: as above.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The host's side of an interface: sees and sends whole Ethernet frames.
pub(crate) struct Host {
    pub(crate) socket: OwnedFd,
}

impl Host {
    pub(crate) fn new(name: &str) -> Self {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll).unwrap();
        let mut address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
            sll_ifindex: index_of(name) as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: the address is a sockaddr_ll of that length.
        let bound = unsafe {
            libc::bind(socket.as_raw_fd(), (&raw mut address).cast(), size_of::<libc::sockaddr_ll>() as u32)
        };
        assert_eq!(bound, 0);
        Self { socket }
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        assert_eq!(nix::unistd::write(&self.socket, frame).unwrap(), frame.len());
    }

    /// Whether this frame arrives here, soon.
    pub(crate) fn receives(&self, frame: &[u8]) -> bool {
        let mut bytes = vec![0; 70_000];
        within(Duration::from_secs(5), || {
            let len = nix::unistd::read(&self.socket, &mut bytes).ok()?;
            (bytes[..len] == *frame).then_some(())
        })
        .is_some()
    }

    /// Whether this frame has arrived among those that wait.
    pub(crate) fn has(&self, frame: &[u8]) -> bool {
        let mut bytes = vec![0; 70_000];
        while let Ok(len) = nix::unistd::read(&self.socket, &mut bytes) {
            if bytes[..len] == *frame {
                return true;
            }
        }
        false
    }
}

/// Asks again until there is an answer or the time is over.
pub(crate) fn within<T>(time: Duration, mut what: impl FnMut() -> Option<T>) -> Option<T> {
    let began = Instant::now();
    loop {
        if let Some(found) = what() {
            return Some(found);
        }
        if began.elapsed() > time {
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Takes all capabilities from the calling thread.
pub(crate) fn drop_capabilities() {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let none = [0u32; 6];
    // SAFETY: version 3 of the header for the calling thread, and two sets of three words.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    assert_eq!(result, 0);
}
