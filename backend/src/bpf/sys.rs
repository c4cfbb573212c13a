//! System calls that aya does not offer as we need them: links with their interface, and reading a map whose layout is
//! not known.
//!
//! Here: bpf(2) with its argument and result structures, as in `linux/bpf.h`, shortened to what is used: the kernel takes
//! what is missing as zeros.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_GET_FD_BY_ID: libc::c_long = 30;
const BPF_LINK_GET_NEXT_ID: libc::c_long = 31;
const BPF_LINK_DETACH: libc::c_long = 34;

/// `enum bpf_attach_type`.
const BPF_XDP: u32 = 37;
/// `enum bpf_link_type`.
const BPF_LINK_TYPE_XDP: u32 = 6;

/// bpf(2).
///
/// # Safety
/// `attributes` is what the command takes, and pointers in it are valid for what the command does.
unsafe fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads and writes `size_of::<T>()` bytes of the structure; the rest is the caller's word.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The same, for commands that return a descriptor.
///
/// # Safety
/// As for [`bpf`].
unsafe fn bpf_fd<T>(command: libc::c_long, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's word; the descriptor is new and ours.
    unsafe { bpf(command, attributes).map(|fd| OwnedFd::from_raw_fd(fd as i32)) }
}

#[repr(C)]
struct PinAttributes {
    path: u64,
    fd: u32,
    flags: u32,
}

/// An attachment of a program to an interface; it ends with the last descriptor or pin.
#[derive(Debug)]
pub struct Link(OwnedFd);

/// What the kernel says of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    /// The link's number.
    pub id: u32,
    /// The program's number.
    pub program: u32,
    /// The interface; 0 once it is gone.
    pub index: u32,
}

#[repr(C)]
#[derive(Default)]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    reserved: u32,
    index: u32,
    padding: [u32; 11],
}

impl Link {
    /// Attaches an XDP program; `flags` is one of `XDP_FLAGS_*_MODE`.
    ///
    /// # Errors
    /// What the kernel says; EBUSY: another program is there.
    pub fn attach_xdp(program: BorrowedFd<'_>, index: u32, flags: u32) -> io::Result<Self> {
        let mut attributes = [program.as_raw_fd() as u32, index, BPF_XDP, flags];
        // SAFETY: prog_fd, target_ifindex, attach_type, flags; no pointers.
        unsafe { bpf_fd(BPF_LINK_CREATE, &mut attributes).map(Self) }
    }

    /// Opens a pinned link.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn from_pin(path: &Path) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let mut attributes = PinAttributes { path: path.as_ptr() as u64, fd: 0, flags: 0 };
        // SAFETY: the path ends in NUL and outlives the call.
        unsafe { bpf_fd(BPF_OBJ_GET, &mut attributes).map(Self) }
    }

    /// Opens the XDP link that has this program on an interface, if a link of any process has. (The interface's number alone
    /// may be that of another one in another network namespace.)
    ///
    /// # Errors
    /// What the kernel says.
    pub fn of_program(program: u32, index: u32) -> io::Result<Option<Self>> {
        let mut id = 0u32;
        loop {
            let mut next = [id, 0, 0];
            // SAFETY: start_id, next_id (written), open_flags; no pointers.
            match unsafe { bpf(BPF_LINK_GET_NEXT_ID, &mut next) } {
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
                other => other?,
            };
            id = next[1];
            // SAFETY: link_id, next_id, open_flags; no pointers.
            let Ok(fd) = (unsafe { bpf_fd(BPF_LINK_GET_FD_BY_ID, &mut [id, 0, 0]) }) else { continue };
            let link = Self(fd);
            if link.info().is_ok_and(|info| info.index == index && info.program == program) {
                return Ok(Some(link));
            }
        }
    }

    /// Pins it, so that it outlives the process.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn pin(&self, path: &Path) -> io::Result<()> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let fd = self.0.as_raw_fd() as u32;
        let mut attributes = PinAttributes { path: path.as_ptr() as u64, fd, flags: 0 };
        // SAFETY: the path ends in NUL and outlives the call.
        unsafe { bpf(BPF_OBJ_PIN, &mut attributes) }.map(drop)
    }

    /// Puts another program in the place of the present one; no frame meets neither.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn update(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let mut attributes = [self.0.as_raw_fd() as u32, program.as_raw_fd() as u32, 0, 0];
        // SAFETY: link_fd, new_prog_fd, flags, old_prog_fd; no pointers.
        unsafe { bpf(BPF_LINK_UPDATE, &mut attributes) }.map(drop)
    }

    /// Another descriptor of it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Ends it, whoever else holds it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn detach(&self) -> io::Result<()> {
        // SAFETY: link_fd; no pointers.
        unsafe { bpf(BPF_LINK_DETACH, &mut [self.0.as_raw_fd() as u32]) }.map(drop)
    }

    /// What it is. Of a link that is not an XDP link, the interface is 0.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn info(&self) -> io::Result<LinkInfo> {
        let mut info = RawLinkInfo::default();
        let mut attributes = InfoAttributes {
            fd: self.0.as_raw_fd() as u32,
            len: size_of::<RawLinkInfo>() as u32,
            info: (&raw mut info) as u64,
        };
        // SAFETY: the kernel writes at most `len` bytes, which the structure has.
        unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes)? };
        let index = if info.kind == BPF_LINK_TYPE_XDP { info.index } else { 0 };
        Ok(LinkInfo { id: info.id, program: info.program, index })
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[repr(C)]
struct InfoAttributes {
    fd: u32,
    len: u32,
    info: u64,
}

#[repr(C)]
struct LookupAttributes {
    fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The first entry of an array map (not one for each CPU) whose values have `value_size` bytes, as bytes.
///
/// # Errors
/// What the kernel says.
pub fn first_entry(map: BorrowedFd<'_>, value_size: u32) -> io::Result<Vec<u8>> {
    let key = 0u32;
    let mut value = vec![0u8; value_size as usize];
    let mut attributes = LookupAttributes {
        fd: map.as_raw_fd() as u32,
        padding: 0,
        key: (&raw const key) as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: an array's key is a u32; the kernel writes as many bytes as the map's values have, which is the caller's word
    // from the map's own description and is what the buffer has.
    unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attributes)? };
    Ok(value)
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    #[repr(C)]
    struct LoadAttributes {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log: [u32; 4],
        kernel: [u32; 2],
        name: [u8; 16],
        index: u32,
        attach_type: u32,
    }

    /// Loads an XDP program from instructions.
    pub(crate) fn load_xdp(name: &str, instructions: &[u64]) -> io::Result<OwnedFd> {
        const BPF_PROG_LOAD: libc::c_long = 5;
        const BPF_PROG_TYPE_XDP: u32 = 6;
        let mut attributes = LoadAttributes {
            kind: BPF_PROG_TYPE_XDP,
            count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            log: [0; 4],
            kernel: [0; 2],
            name: [0; 16],
            index: 0,
            // As aya has it: a link takes only programs of one such type.
            attach_type: BPF_XDP,
        };
        attributes.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: instructions and licence outlive the call.
        unsafe { bpf_fd(BPF_PROG_LOAD, &mut attributes) }
    }
}
