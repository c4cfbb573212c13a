//! One file of the front-end, mapped: what it may be, and how long the mapping lives.
//! Calls here can sleep (fstatfs, mmap, munmap of large memory): control helper thread only (rule 1).

use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use nix::sys::stat::{SFlag, fstat};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};

use super::MapError;
use super::dirty::{LOG_BYTES_MAX, LOG_PAGE_SIZE};
use super::layout::RegionSpec;
use super::sigbus;

/// The largest region, bytes: as much as a dirty log can speak of. What we keep of a region grows with it.
const REGION_BYTES_MAX: u64 = LOG_BYTES_MAX * 8 * LOG_PAGE_SIZE;

/// So many words of zero, which the allocator has from the kernel as they are: no page of them is touched.
pub(super) fn zeroed_words(count: usize) -> Box<[AtomicU64]> {
    const { assert!(align_of::<AtomicU64>() == align_of::<u64>() && size_of::<AtomicU64>() == size_of::<u64>()) };
    let words = Box::into_raw(vec![0u64; count].into_boxed_slice());
    // SAFETY: the box is ours alone, and both types have the same size and alignment (above) and allow all bits.
    unsafe { Box::from_raw(words as *mut [AtomicU64]) }
}

fn system(call: &'static str) -> impl FnOnce(Errno) -> MapError {
    move |errno| MapError::System { call, errno }
}

/// A shared mapping of a part of a file that cannot make us wait for anybody.
#[derive(Debug)]
pub(super) struct SharedMap {
    addr: NonNull<u8>,
    len: NonZeroUsize,
    page_size: u64,
    // Declared before `_file` and dropped by hand first: see Drop.
    guard: Option<sigbus::Guard>,
    file: OwnedFd,
}

// SAFETY: the mapping belongs to this value alone and is not tied to a thread; it hands out no references.
unsafe impl Send for SharedMap {}
// SAFETY: as above; all methods take plain copies of address and length.
unsafe impl Sync for SharedMap {}

impl SharedMap {
    /// Maps `size` bytes at `offset`. The offset must be a multiple of the file's page size.
    pub(super) fn new(file: OwnedFd, offset: u64, size: u64) -> Result<Self, MapError> {
        sigbus::install().map_err(system("sigaction"))?;
        let (page_size, file_size) = inspect(&file)?;
        if size == 0 {
            return Err(MapError::Empty);
        }
        if !offset.is_multiple_of(page_size) {
            return Err(MapError::Misaligned { offset, size, page_size });
        }
        let needed = offset.checked_add(size).ok_or(MapError::Wraps)?;
        if needed > file_size {
            return Err(MapError::FileTooSmall { file_size, needed });
        }
        let file_offset = libc::off_t::try_from(offset).map_err(|_| MapError::Wraps)?;
        // The last page of a tmpfs file is there even if the file ends within it; hugetlbfs files have whole pages.
        let len = size
            .checked_next_multiple_of(page_size)
            .and_then(|len| usize::try_from(len).ok())
            .and_then(NonZeroUsize::new)
            .ok_or(MapError::Wraps)?;
        // No MAP_POPULATE: nothing here may touch a page (rule 6). MAP_NORESERVE: the memory is the front-end's.
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let addr = unsafe {
            mmap(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags, &file, file_offset)
        }
        .map_err(system("mmap"))?
        .cast::<u8>();
        let mut map = Self { addr, len, page_size, guard: None, file };
        // From here on Drop unmaps.
        if !(addr.as_ptr() as u64).is_multiple_of(page_size) {
            return Err(MapError::Misaligned { offset: addr.as_ptr() as u64, size, page_size });
        }
        // SAFETY: the range was mapped just now; MADV_DONTDUMP changes nothing about its contents.
        unsafe { madvise(addr.cast(), len.get(), MmapAdvise::MADV_DONTDUMP) }.map_err(system("madvise"))?;
        map.guard = Some(
            sigbus::Guard::new(addr.as_ptr() as usize, len.get(), page_size as usize)
                .ok_or(MapError::TooManyMappings)?,
        );
        Ok(map)
    }

    /// First byte of the mapping.
    pub(super) fn addr(&self) -> NonNull<u8> {
        self.addr
    }

    /// Lets go of what this process has mapped of the file, and refuses huge pages; the file keeps its contents.
    fn forget_pages(&self) -> Result<(), Errno> {
        for advice in [MmapAdvise::MADV_DONTNEED, MmapAdvise::MADV_NOHUGEPAGE] {
            // SAFETY: the range is ours, and a shared mapping loses no data by either.
            match unsafe { madvise(self.addr.cast(), self.len.get(), advice) } {
                // Kernels without transparent huge pages, and hugetlbfs.
                Err(Errno::EINVAL) if advice == MmapAdvise::MADV_NOHUGEPAGE => {}
                result => result?,
            }
        }
        Ok(())
    }

    /// Puts nothing in the place of the mapping: the addresses stay taken, whoever touches them fails.
    fn give_up(&self) -> Result<(), Errno> {
        let flags =
            MapFlags::MAP_PRIVATE | MapFlags::MAP_ANONYMOUS | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED;
        // SAFETY: exactly our own range is replaced. That nobody uses it any more is the caller's word, and an access all the
        // same would end the process, not reach other memory.
        unsafe {
            nix::sys::mman::mmap_anonymous(
                NonZeroUsize::new(self.addr.as_ptr() as usize),
                self.len,
                ProtFlags::PROT_NONE,
                flags,
            )
        }
        .map(drop)
    }

    /// The file.
    pub(super) fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Page size of the file, bytes.
    pub(super) fn page_size(&self) -> u64 {
        self.page_size
    }

    /// True once a page of the file vanished under us.
    #[inline]
    pub(super) fn poisoned(&self) -> bool {
        self.guard.as_ref().is_some_and(sigbus::Guard::poisoned)
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // Withdraw from the SIGBUS table first: the address may be given away as soon as it is unmapped.
        drop(self.guard.take());
        // SAFETY: address and length are those of our mmap, and nobody has a pointer any more: `IoVec`s borrow
        // from, and ring views own, what owns this.
        if let Err(errno) = unsafe { munmap(self.addr.cast(), self.len.get()) } {
            tracing::error!(%errno, "munmap of guest memory");
        }
    }
}

/// Page size and size of a file that is fit to be mapped.
fn inspect(file: &OwnedFd) -> Result<(u64, u64), MapError> {
    // Only shmem and hugetlbfs files know seals, and the question is answered without asking a file system:
    // fstatfs and fstat on a FUSE file would wait for its owner.
    if fcntl(file, FcntlArg::F_GET_SEALS).is_err() {
        return Err(MapError::WrongKind);
    }
    let stat = fstat(file).map_err(system("fstat"))?;
    if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
        return Err(MapError::WrongKind);
    }
    let file_system = fstatfs(file).map_err(system("fstatfs"))?;
    let page_size = match file_system.filesystem_type() {
        TMPFS_MAGIC => base_page_size(),
        HUGETLBFS_MAGIC => file_system.block_size() as u64,
        _ => return Err(MapError::WrongKind),
    };
    if !page_size.is_power_of_two() {
        return Err(MapError::WrongKind);
    }
    Ok((page_size, stat.st_size.max(0) as u64))
}

fn base_page_size() -> u64 {
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(LOG_PAGE_SIZE)
}

/// One region of guest memory, mapped. Unmapped on drop, which therefore belongs on the control helper thread.
#[derive(Debug)]
pub struct Mapping {
    map: SharedMap,
    spec: RegionSpec,
}

impl Mapping {
    /// Maps `spec.size` bytes of `fd` at `spec.mmap_offset`, without touching them. May sleep.
    ///
    /// The file must be on tmpfs (memfd included) or hugetlbfs, regular, and long enough; offset and size must be
    /// multiples of its page size and the guest address of 4 KiB, as QEMU sends them. So an offset into the region and
    /// the address of our mapping are congruent to the file's pages, which postcopy wake-ups rely on.
    pub fn new(fd: OwnedFd, spec: &RegionSpec) -> Result<Self, MapError> {
        if spec.size == 0 {
            return Err(MapError::Empty);
        }
        if spec.size > REGION_BYTES_MAX {
            return Err(MapError::TooLarge { size: spec.size, max: REGION_BYTES_MAX });
        }
        if spec.guest_phys.checked_add(spec.size).is_none() || spec.user_addr.checked_add(spec.size).is_none()
        {
            return Err(MapError::Wraps);
        }
        let misaligned =
            |page_size| MapError::Misaligned { offset: spec.mmap_offset, size: spec.size, page_size };
        if !spec.guest_phys.is_multiple_of(LOG_PAGE_SIZE) {
            return Err(misaligned(LOG_PAGE_SIZE));
        }
        let map = SharedMap::new(fd, spec.mmap_offset, spec.size)?;
        if !spec.size.is_multiple_of(map.page_size()) {
            return Err(misaligned(map.page_size()));
        }
        Ok(Self { map, spec: *spec })
    }

    /// The region as the front-end described it.
    pub fn spec(&self) -> &RegionSpec {
        &self.spec
    }

    /// Page size of the backing file, bytes.
    pub fn page_size(&self) -> u64 {
        self.map.page_size()
    }

    /// True once the file was truncated under us and an access met the hole: what was read since is zeros.
    #[inline]
    pub fn poisoned(&self) -> bool {
        self.map.poisoned()
    }

    /// Address of our mapping, for replies in postcopy. A number, not a pointer.
    pub fn host_addr(&self) -> u64 {
        self.map.addr().as_ptr() as u64
    }

    /// Length of our mapping, bytes: whole pages of the file.
    pub fn mapped_len(&self) -> u64 {
        self.map.len.get() as u64
    }

    /// Lets go of what this process has mapped of the file, and refuses huge pages, before pages are awaited by
    /// userfaultfd. Loses no data. May sleep.
    ///
    /// # Errors
    /// What madvise(2) says.
    pub fn forget_pages(&self) -> Result<(), Errno> {
        self.map.forget_pages()
    }

    /// Puts nothing in the place of a mapping that no snapshot in use has any more, so that those who wait for its pages
    /// can be woken and fail (PROT_NONE; see `postcopy`). May sleep.
    ///
    /// # Errors
    /// What mmap(2) says.
    pub fn give_up(&self) -> Result<(), Errno> {
        self.map.give_up()
    }

    /// Addresses of our mapping, for those who observe the process. Numbers, not pointers.
    pub fn host_range(&self) -> Range<u64> {
        self.host_addr()..self.host_addr() + self.spec.size
    }

    /// The file, for a second look at which pages exist, and for handing it on.
    pub fn file(&self) -> &OwnedFd {
        &self.map.file
    }

    /// First byte of the region in our address space. Stays inside `memory`.
    pub(super) fn host(&self) -> NonNull<u8> {
        self.map.addr()
    }
}

impl AsRawFd for Mapping {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.map.file.as_raw_fd()
    }
}
