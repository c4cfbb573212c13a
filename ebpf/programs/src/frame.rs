//! Reading an Ethernet frame that may end anywhere.

use aya_ebpf::programs::{SkBuffContext, XdpContext};

/// Offsets that are read at most: the verifier wants a bound, and headers are near the beginning.
const OFFSET_MAX: u32 = 2048;

/// Bytes of an Ethernet header.
pub const ETHERNET_LEN: u32 = 14;

/// A frame.
pub trait Frame {
    /// `N` bytes from an offset; `None` where it ends before.
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;

    /// A number in network order.
    #[inline(always)]
    fn u16(&self, offset: u32) -> Option<u16> {
        self.bytes(offset).map(u16::from_be_bytes)
    }

    /// One byte.
    #[inline(always)]
    fn u8(&self, offset: u32) -> Option<u8> {
        self.bytes::<1>(offset).map(|[byte]| byte)
    }
}

impl Frame for XdpContext {
    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        if offset > OFFSET_MAX {
            return None;
        }
        let start = self.data() + offset as usize;
        if start + N > self.data_end() {
            return None;
        }
        // SAFETY: these bytes lie between the frame's beginning and its end, as the verifier proves once more; an array of
        // bytes needs no alignment.
        Some(unsafe { *(start as *const [u8; N]) })
    }
}

impl Frame for SkBuffContext {
    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        if offset > OFFSET_MAX {
            return None;
        }
        self.load(offset as usize).ok()
    }
}

/// Where the layer behind Ethernet begins.
#[derive(Clone, Copy)]
pub struct Ethernet {
    /// The outer VLAN's number; `None` without a tag. 0 is a tag without a VLAN.
    pub vlan: Option<u16>,
    /// Whether a tag is cut off: the frame belongs to a VLAN, but to which is not known.
    pub is_cut_off: bool,
    /// The EtherType behind the tags; 0 where the frame ends before.
    pub kind: u16,
    /// Offset of what follows.
    pub offset: u32,
}

/// Tags that are looked behind at most; in a frame with more, the next tag is what follows.
const TAGS_MAX: usize = 2;

const ETH_P_8021Q: u16 = 0x8100;
const ETH_P_8021AD: u16 = 0x88a8;

/// Reads what follows the addresses of a frame of at least [`ETHERNET_LEN`] bytes.
#[inline(always)]
pub fn ethernet(frame: &impl Frame) -> Ethernet {
    let mut found =
        Ethernet { vlan: None, is_cut_off: false, kind: frame.u16(12).unwrap_or(0), offset: ETHERNET_LEN };
    for _ in 0..TAGS_MAX {
        if found.kind != ETH_P_8021Q && found.kind != ETH_P_8021AD {
            break;
        }
        let (Some(tag), Some(kind)) = (frame.u16(found.offset), frame.u16(found.offset + 2)) else {
            found.is_cut_off = found.vlan.is_none();
            found.kind = 0;
            break;
        };
        found.vlan = found.vlan.or(Some(tag & 0xfff));
        found.kind = kind;
        found.offset += 4;
    }
    found
}
