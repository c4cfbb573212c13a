//! Guest memory regions as the front-end describes them. Plain data: no mapping, no fd.
#![forbid(unsafe_code)]

/// One region of guest memory, in the words of the front-end
/// (vhost-user: Memory region description). All values in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Where the guest sees the region.
    pub guest_phys: u64,
    /// Length of the region.
    pub size: u64,
    /// Where the front-end's own mapping of the region starts; ring addresses are in these terms.
    pub user_addr: u64,
    /// Where the region starts in its file.
    pub mmap_offset: u64,
}
