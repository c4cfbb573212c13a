//! The words of the wire: request numbers, header flags, feature bits, payload layouts, and how a reply is encoded.
//!
//! Only layout lives here. Which message may carry what is in `table`, what a message does is in `handlers`,
//! and how bytes become messages is in `framing`. The `vhost` crate's structs are not used: they lack half of
//! the messages a network back-end meets, and bring their own idea of validity.
#![forbid(unsafe_code)]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a message header: request, flags, size (vhost-user: Header).
pub const HEADER_BYTES: usize = 12;
/// Largest payload taken from a front-end, in bytes. The largest one defined is GET/SET_CONFIG with 268;
/// the rest is room for messages we do not know and skip.
pub const PAYLOAD_BYTES_MAX: usize = 4096;
/// Most regions in one SET_MEM_TABLE (vhost-user: Multiple memory regions description).
pub const TABLE_REGIONS_MAX: usize = 8;
/// Most file descriptors with one message: one for each region of a table.
pub const FDS_PER_MESSAGE_MAX: usize = TABLE_REGIONS_MAX;
/// Most bytes of device configuration space (vhost-user: Virtio device config space).
pub const CONFIG_BYTES_MAX: usize = 256;
/// Largest split virtqueue (VIRTIO 1.3 §2.7).
pub const RING_SIZE_MAX: u32 = 32768;

/// Header flags, bits 0-1: the version, always 1.
pub const FLAG_VERSION_MASK: u32 = 0x3;
/// The only version there is.
pub const VERSION: u32 = 0x1;
/// Header flag: this is a reply.
pub const FLAG_REPLY: u32 = 0x4;
/// Header flag: the front-end waits for an acknowledgement (REPLY_ACK).
pub const FLAG_NEED_REPLY: u32 = 0x8;
/// Flags of every reply. QEMU drops the connection over any other value.
pub const REPLY_FLAGS: u32 = VERSION | FLAG_REPLY;

/// SET_VRING_KICK/CALL/ERR: bits 0-7 are the ring's index.
pub const VRING_INDEX_MASK: u64 = 0xff;
/// SET_VRING_KICK/CALL/ERR: no fd comes with this message.
pub const VRING_NO_FD: u64 = 0x100;
/// SET_VRING_ADDR: writes to the used ring are to be logged.
pub const VRING_ADDR_F_LOG: u32 = 0x1;

/// Virtio feature bits (as masks) that the session itself acts on.
pub mod virtio_feature {
    /// VHOST_F_LOG_ALL: all writes to guest memory are to be logged.
    pub const LOG_ALL: u64 = 1 << 26;
    /// VHOST_USER_F_PROTOCOL_FEATURES: protocol features exist, and rings start disabled.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// VIRTIO_F_RING_PACKED: rings have the packed format.
    pub const RING_PACKED: u64 = 1 << 34;
}

/// Protocol feature bits, as masks (vhost-user: Protocol features).
#[allow(missing_docs)] // the specification's own names
pub mod protocol_feature {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const RARP: u64 = 1 << 2;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const MTU: u64 = 1 << 4;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CROSS_ENDIAN: u64 = 1 << 6;
    pub const PAGEFAULT: u64 = 1 << 8;
    pub const CONFIG: u64 = 1 << 9;
    pub const BACKEND_SEND_FD: u64 = 1 << 10;
    pub const HOST_NOTIFIER: u64 = 1 << 11;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const INBAND_NOTIFICATIONS: u64 = 1 << 14;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    /// PRESETUP in one vendor's fork, SHARED_OBJECT upstream.
    pub const PRESETUP: u64 = 1 << 18;
    pub const DEVICE_STATE: u64 = 1 << 19;

    /// What the handlers of this module can do today; nothing else is ever offered.
    pub const IMPLEMENTED: u64 = MQ
        | LOG_SHMFD
        | RARP
        | REPLY_ACK
        | MTU
        | BACKEND_REQ
        | PAGEFAULT
        | CONFIG
        | RESET_DEVICE
        | CONFIGURE_MEM_SLOTS
        | STATUS;
}

/// Numbers of the front-end's messages (vhost-user: Front-end message types).
#[allow(missing_docs)] // the specification's own names
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RequestId {
    /// Not a message of the specification: QEMU's acknowledgement in postcopy when no slot has changed.
    None = 0,
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    ResetOwner = 4,
    SetMemTable = 5,
    SetLogBase = 6,
    SetLogFd = 7,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    SetVringErr = 14,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    SendRarp = 19,
    NetSetMtu = 20,
    SetBackendReqFd = 21,
    IotlbMsg = 22,
    SetVringEndian = 23,
    GetConfig = 24,
    SetConfig = 25,
    PostcopyAdvise = 28,
    PostcopyListen = 29,
    PostcopyEnd = 30,
    GetInflightFd = 31,
    SetInflightFd = 32,
    ResetDevice = 34,
    VringKick = 35,
    GetMaxMemSlots = 36,
    AddMemReg = 37,
    RemMemReg = 38,
    SetStatus = 39,
    GetStatus = 40,
    Presetup = 41,
    SetDeviceStateFd = 42,
    CheckDeviceState = 43,
}

/// A message header as it is on the wire, native endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// The request's number; a reply repeats it.
    pub request: u32,
    /// Version, reply and need_reply bits.
    pub flags: u32,
    /// Bytes of payload that follow.
    pub size: u32,
}

/// A ring's index and one number (vhost-user: A vring state description).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VringState {
    /// Which ring.
    pub index: u32,
    /// Size, base, or 0/1, by message.
    pub num: u32,
}

/// Where a ring is (vhost-user: A vring address description). Addresses are in the front-end's own address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VringAddr {
    /// Which ring.
    pub index: u32,
    /// [`VRING_ADDR_F_LOG`] or 0.
    pub flags: u32,
    /// Descriptor table.
    pub desc_user: u64,
    /// Used ring.
    pub used_user: u64,
    /// Available ring.
    pub avail_user: u64,
    /// Guest physical address that stands for the used ring in the dirty log.
    pub log_guest: u64,
}

/// One region of guest memory (vhost-user: Memory region description). Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct WireRegion {
    /// Guest physical address.
    pub guest_phys: u64,
    /// Length.
    pub size: u64,
    /// Address in the front-end.
    pub user_addr: u64,
    /// Offset in the file.
    pub mmap_offset: u64,
}

/// Head of a SET_MEM_TABLE payload; the regions follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TableHead {
    /// Number of regions that follow.
    pub regions: u32,
    /// Not used.
    pub padding: u32,
}

/// Payload of ADD_MEM_REG and REM_MEM_REG.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SingleRegion {
    /// Not used.
    pub padding: u64,
    /// The region.
    pub region: WireRegion,
}

/// Payload of SET_LOG_BASE and of its reply (vhost-user: Log description). Bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LogArea {
    /// Length of the log.
    pub size: u64,
    /// Offset in the file.
    pub offset: u64,
}

/// Head of a GET_CONFIG or SET_CONFIG payload; `size` bytes follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ConfigHead {
    /// Offset in the configuration space.
    pub offset: u32,
    /// Length asked for.
    pub size: u32,
    /// Who writes; of no interest here.
    pub flags: u32,
}

/// A whole reply to `request` with `payload`.
///
/// The payload comes from our own handlers and is at most a configuration space long.
pub fn encode_reply(request: u32, payload: &[u8]) -> Vec<u8> {
    let header = Header { request, flags: REPLY_FLAGS, size: payload.len() as u32 };
    let mut message = Vec::with_capacity(HEADER_BYTES + payload.len());
    message.extend_from_slice(header.as_bytes());
    message.extend_from_slice(payload);
    message
}

/// A reply that carries one u64: values asked for, and acknowledgements (0 is success).
pub fn encode_u64(request: u32, value: u64) -> Vec<u8> {
    encode_reply(request, value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// vhost-user: Message Specification. The sizes a peer checks.
    #[test]
    fn payload_sizes_are_those_of_the_specification() {
        assert_eq!(size_of::<Header>(), 12);
        assert_eq!(size_of::<VringState>(), 8);
        assert_eq!(size_of::<VringAddr>(), 40);
        assert_eq!(size_of::<WireRegion>(), 32);
        assert_eq!(size_of::<TableHead>(), 8);
        assert_eq!(size_of::<SingleRegion>(), 40);
        assert_eq!(size_of::<LogArea>(), 16);
        assert_eq!(size_of::<ConfigHead>(), 12);
    }

    /// QEMU accepts flags 0x5 and nothing else, not even need_reply echoed.
    #[test]
    fn replies_carry_exactly_flags_5() {
        let message = encode_u64(1, 0x1122);
        let (header, payload) = Header::read_from_prefix(&message).unwrap();
        assert_eq!(header, Header { request: 1, flags: 5, size: 8 });
        assert_eq!(payload, 0x1122u64.as_bytes());
    }
}
