//! The memory of a NIC queue: frames that the kernel and we hand each other.
//!
//! ```text
//!   frame  [ headroom (256) .......... │ data ................................ ]
//!            XDP metadata, our header ─┘ └─ what is on the wire
//! ```
//! Both directions leave the headroom that XDP keeps in front of received data: programs may put metadata there, and
//! our virtio-net header lies right in front of the data, so that one copy moves both.
//! In a memfd, so that another process can be given it. Not here: who has which frame (`frames`).

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::ftruncate;
use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

/// Bytes in front of the data of a frame (the kernel's XDP_PACKET_HEADROOM).
pub const HEADROOM: usize = 256;
/// Link header and two VLAN tags, bytes.
pub const LINK_BYTES: usize = 14 + 8;
/// Sizes of frames, bytes: the kernel takes powers of two up to a page.
const FRAME_SIZES: [u32; 2] = [2048, 4096];
/// Largest layer-3 packet that fits a frame, bytes.
pub const MTU_MAX: u32 = FRAME_SIZES[1] - (HEADROOM + LINK_BYTES) as u32;

/// The smallest frame that packets of this MTU fit into, bytes; none if it is larger than [`MTU_MAX`].
pub fn frame_size(mtu: u32) -> Option<u32> {
    FRAME_SIZES.into_iter().find(|size| mtu <= size - (HEADROOM + LINK_BYTES) as u32)
}

/// Frames in shared memory.
#[derive(Debug)]
pub struct Umem {
    start: NonNull<c_void>,
    len: usize,
    frame_size: u32,
    _file: OwnedFd,
}

// SAFETY: the mapping lives as long as the value; accesses through it are the business of whoever owns a frame.
unsafe impl Send for Umem {}
// SAFETY: as above.
unsafe impl Sync for Umem {}

impl Umem {
    /// Memory for `frames` frames of `frame_size` bytes (see [`frame_size`]).
    ///
    /// # Errors
    /// No memory, mostly.
    pub fn new(frames: u32, frame_size: u32) -> io::Result<Self> {
        let len = frames as usize * frame_size as usize;
        let file = memfd_create("xdp-umem", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        ftruncate(&file, len as i64)?;
        // Nobody may pull it out from under us.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        let size = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(None, size, access, MapFlags::MAP_SHARED, &file, 0) }?;
        Ok(Self { start, len, frame_size, _file: file })
    }

    /// Where it lies, and its length in bytes.
    pub fn area(&self) -> (u64, u64) {
        (self.start.as_ptr() as u64, self.len as u64)
    }

    /// Bytes of a frame.
    pub fn frame_size(&self) -> u32 {
        self.frame_size
    }

    /// The frame that an address (of a descriptor) lies in, and the offset in it. The frame may be one that there is not.
    #[inline]
    pub fn locate(&self, address: u64) -> (u32, usize) {
        // A power of two; the compiler does not know that.
        let shift = self.frame_size.trailing_zeros();
        ((address >> shift) as u32, (address & u64::from(self.frame_size - 1)) as usize)
    }

    /// The address of a frame's byte, for a descriptor.
    #[inline]
    pub fn address(&self, frame: u32, offset: usize) -> u64 {
        u64::from(frame) * u64::from(self.frame_size) + offset as u64
    }

    /// A frame's bytes; none for one that there is not.
    ///
    /// # Safety
    /// The frame must be the caller's: neither in FILL or TX nor with the kernel, nor in anybody else's hands, for as long
    /// as the slice is used.
    #[inline]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn bytes(&self, frame: u32) -> &mut [u8] {
        let size = self.frame_size as usize;
        let at = frame as usize * size;
        if at + size > self.len {
            return &mut [];
        }
        // SAFETY: within the mapping, and nobody else's (the caller's promise).
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast::<u8>().add(at), size) }
    }

    /// Asks the CPU for the first line of data at an address, as a hint.
    #[inline]
    pub fn prefetch(&self, address: u64) {
        if address < self.len as u64 {
            // SAFETY: within the mapping; a prefetch reads nothing.
            prefetch_line(unsafe { self.start.as_ptr().cast::<u8>().add(address as usize) });
        }
    }
}

#[inline]
fn prefetch_line(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint for any address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

impl Drop for Umem {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and no slice of it outlives `self`. (The kernel keeps the pages as long as it needs.)
        let _ = unsafe { munmap(self.start, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_as_large_as_the_mtu_needs() {
        assert_eq!(frame_size(68), Some(2048));
        assert_eq!(frame_size(1500), Some(2048));
        assert_eq!(frame_size(1770), Some(2048));
        assert_eq!(frame_size(1771), Some(4096));
        assert_eq!(frame_size(MTU_MAX), Some(4096));
        assert_eq!((MTU_MAX, frame_size(MTU_MAX + 1)), (3818, None));
    }

    #[test]
    fn addresses_and_frames_agree() {
        let umem = Umem::new(4, 2048).unwrap();
        assert_eq!(umem.locate(umem.address(3, 256)), (3, 256));
        for frame in 0..4 {
            // SAFETY: one frame at a time, and no kernel.
            unsafe { umem.bytes(frame) }.fill(frame as u8 + 1);
        }
        for frame in 0..4 {
            // SAFETY: as above.
            assert!(unsafe { umem.bytes(frame) }.iter().all(|byte| *byte == frame as u8 + 1));
        }
        // SAFETY: there is no such frame.
        assert!(unsafe { umem.bytes(4) }.is_empty() && unsafe { umem.bytes(u32::MAX) }.is_empty());
    }
}
