//! An XDP program of a few instructions, assembled here and loaded by bpf(2): what the bare loop needs is too little for a
//! compiler and a loader.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use lab::wire::Link;

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_MAP_TYPE_XSKMAP: u32 = 17;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// One instruction: code, destination and source register, offset, immediate.
#[repr(C)]
#[derive(Clone, Copy)]
struct Insn(u8, u8, i16, i32);

const fn insn(code: u8, to: u8, from: u8, offset: i16, value: i32) -> Insn {
    Insn(code, from << 4 | to, offset, value)
}

const MOV_IMM: u8 = 0xb7;
const LOAD_U32: u8 = 0x61;
const LOAD_MAP: u8 = 0x18;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const PSEUDO_MAP_FD: u8 = 1;
const HELPER_REDIRECT_MAP: i32 = 51;
const XDP_PASS: i32 = 2;
/// Where `struct xdp_md` has its receive queue.
const RX_QUEUE_INDEX: i16 = 16;

/// The bpf(2) system call; `A` is the part of `union bpf_attr` that the command uses.
///
/// # Safety
/// Addresses in `attributes` must be valid for what the command does with them.
unsafe fn bpf<A>(command: libc::c_long, attributes: &mut A) -> io::Result<i32> {
    // SAFETY: the kernel reads and writes `size_of::<A>()` bytes of the attributes; the caller answers for the rest.
    let r = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<A>()) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r as i32) }
}

/// The same for commands that make a descriptor.
///
/// # Safety
/// As for [`bpf`].
unsafe fn bpf_fd<A>(command: libc::c_long, attributes: &mut A) -> io::Result<OwnedFd> {
    // SAFETY: the caller answers for the attributes; the command's result is a new descriptor and nobody else's.
    unsafe { bpf(command, attributes).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

fn load(program: &[Insn]) -> Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
    }
    let license = c"Dual MIT/GPL";
    let mut log = vec![0u8; 4096];
    let mut attributes = Load {
        kind: BPF_PROG_TYPE_XDP,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 1,
        log_size: log.len() as u32,
        log: log.as_mut_ptr() as u64,
    };
    // SAFETY: instructions, licence and log outlive the call and have the lengths that are given.
    unsafe { bpf_fd(BPF_PROG_LOAD, &mut attributes) }.with_context(|| {
        format!(
            "loading an XDP program (needs CAP_BPF): {}",
            String::from_utf8_lossy(&log).trim_end_matches('\0')
        )
    })
}

/// A program on an interface, with the map that it sends frames to. Dropping it detaches it.
pub struct Steering {
    _link: OwnedFd,
    map: OwnedFd,
}

impl Steering {
    /// Sends everything that arrives on queue n of `link` to socket n of its map, in the driver's own mode; what has no
    /// socket goes to the stack.
    pub fn attach(link: &Link) -> Result<Self> {
        #[repr(C)]
        struct Create {
            kind: u32,
            key_size: u32,
            value_size: u32,
            entries: u32,
        }
        let mut attributes = Create { kind: BPF_MAP_TYPE_XSKMAP, key_size: 4, value_size: 4, entries: 1 };
        // SAFETY: no addresses.
        let map = unsafe { bpf_fd(BPF_MAP_CREATE, &mut attributes) }.context("XSKMAP")?;
        let program = load(&[
            insn(LOAD_U32, 2, 1, RX_QUEUE_INDEX, 0),
            insn(LOAD_MAP, 1, PSEUDO_MAP_FD, 0, map.as_raw_fd()),
            insn(0, 0, 0, 0, 0),
            insn(MOV_IMM, 3, 0, 0, XDP_PASS),
            insn(CALL, 0, 0, 0, HELPER_REDIRECT_MAP),
            insn(EXIT, 0, 0, 0, 0),
        ])?;
        #[repr(C)]
        struct Attach {
            program: u32,
            target: u32,
            kind: u32,
            flags: u32,
        }
        let mut attributes = Attach {
            program: program.as_raw_fd() as u32,
            target: link.index()? as u32,
            kind: BPF_XDP,
            flags: XDP_FLAGS_DRV_MODE,
        };
        // SAFETY: no addresses.
        let _link = unsafe { bpf_fd(BPF_LINK_CREATE, &mut attributes) }
            .with_context(|| format!("attaching an XDP program to {}", link.name()))?;
        Ok(Self { _link, map })
    }

    /// Names the socket of queue 0.
    pub fn set(&self, socket: &OwnedFd) -> Result<()> {
        #[repr(C)]
        struct Update {
            map: u32,
            padding: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        let (key, value) = (0u32, socket.as_raw_fd());
        let mut attributes = Update {
            map: self.map.as_raw_fd() as u32,
            padding: 0,
            key: &raw const key as u64,
            value: &raw const value as u64,
            flags: 0,
        };
        // SAFETY: key and value have the sizes that the map was made with and outlive the call.
        unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attributes) }.context("putting a socket into the XSKMAP")?;
        Ok(())
    }
}
