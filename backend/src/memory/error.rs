//! What can go wrong with guest memory. Values only; who reports them is the caller's business.
#![forbid(unsafe_code)]

use nix::errno::Errno;

/// Why a file of the front-end was not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The file is neither on tmpfs (memfd included) nor on hugetlbfs; another kind could make every access wait
    /// for its owner.
    #[error("the file descriptor is not a memfd, nor a file on tmpfs or hugetlbfs")]
    WrongKind,
    /// A region or log of no bytes.
    #[error("a mapping of zero bytes")]
    Empty,
    /// Offset or size is not a multiple of the page size of the file, or the guest address not of 4 KiB.
    #[error(
        "offset {offset:#x}, size {size:#x} or guest address is not aligned to pages of {page_size:#x} bytes"
    )]
    Misaligned {
        /// Offset into the file, bytes.
        offset: u64,
        /// Size asked for, bytes.
        size: u64,
        /// Page size of the file, bytes.
        page_size: u64,
    },
    /// Offset plus size, or address plus size, exceeds 64 bits (or this machine's address space).
    #[error("address range wraps")]
    Wraps,
    /// The file is shorter than what was announced.
    #[error("the file has {file_size:#x} bytes, {needed:#x} are needed")]
    FileTooSmall {
        /// Bytes the file has.
        file_size: u64,
        /// Bytes it would need.
        needed: u64,
    },
    /// A region larger than any guest's.
    #[error("a region of {size:#x} bytes; {max:#x} are the most")]
    TooLarge {
        /// Bytes asked for.
        size: u64,
        /// Bytes allowed.
        max: u64,
    },
    /// A dirty log larger than any guest's.
    #[error("a dirty log of {size:#x} bytes; {max:#x} are enough for any guest")]
    LogTooLarge {
        /// Bytes asked for.
        size: u64,
        /// Bytes allowed.
        max: u64,
    },
    /// The process-wide table of mappings is full ([`super::sigbus::MAX_LIVE_MAPPINGS`]).
    #[error("too many mappings in this process")]
    TooManyMappings,
    /// A system call failed.
    #[error("{call}: {errno}")]
    System {
        /// Its name.
        call: &'static str,
        /// How it failed.
        errno: Errno,
    },
}

/// Why regions do not make up a memory table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// More than [`super::MAX_REGIONS`].
    #[error("{0} memory regions are more than this back-end takes")]
    TooMany(usize),
    /// A region ends beyond 64 bits, in guest-physical or in user addresses.
    #[error("memory region at {0:#x} wraps around the address space")]
    Wraps(u64),
    /// Two regions share guest-physical addresses.
    #[error("memory regions overlap at guest-physical address {0:#x}")]
    GuestOverlap(u64),
    /// Two regions share front-end user addresses.
    #[error("memory regions overlap at user address {0:#x}")]
    UserOverlap(u64),
}

/// Guest memory that another process has yet to supply (postcopy). Page-granular, within one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest memory at {gpa:#x}, {len:#x} bytes, has not arrived")]
pub struct MissingRange {
    /// First byte, guest-physical; start of a page.
    pub gpa: u64,
    /// Bytes; a multiple of the page size of the region.
    pub len: u64,
}

/// Why an access to guest memory did not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// Not, or not wholly, in the memory table.
    #[error("guest address {gpa:#x}, {len:#x} bytes, is not guest memory")]
    OutOfRange {
        /// First byte asked for.
        gpa: u64,
        /// Bytes asked for.
        len: u64,
    },
    /// In the table, but not here yet: park and ask again when it is.
    #[error(transparent)]
    Missing(#[from] MissingRange),
    /// The [`super::IoVecs`] has no room left.
    #[error("too many buffer fragments")]
    Full,
}
