//! All messages of a front-end, to be read from top to bottom: what each looks like, what it needs, who handles it.
//!
//! Rows of parts that do not exist yet are here too, with what they wait for, so that their place is known and
//! their messages are refused by name. Numbers without a row are unknown messages.
#![forbid(unsafe_code)]

use super::Session;
use super::error::Refusal;
use super::handlers::{Answer, Call, Fault, device, features, log, memory, net, postcopy, rings};
use super::message::RequestId as Id;
use super::message::{CONFIG_BYTES_MAX, TABLE_REGIONS_MAX, protocol_feature as feature};

/// Does what a message says. Its form has been checked against the row.
pub(super) type Handler<F> = fn(&mut Session<F>, &mut Call<F>) -> Result<Answer, Fault>;

/// Rule for the payload's length, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Payload {
    /// No payload.
    Empty,
    /// One u64.
    U64,
    /// Exactly so many.
    Bytes(usize),
    /// A memory table: a head of 8, and 32 for each region.
    Table,
    /// A memory slot of 40, or the 8 of postcopy's acknowledgement.
    Slot,
    /// A head of 12, and up to 256 of configuration space.
    Config,
    /// Not looked at: the message is refused anyway.
    Any,
}

impl Payload {
    pub fn fits(self, size: usize) -> bool {
        match self {
            Payload::Empty => size == 0,
            Payload::U64 => size == 8,
            Payload::Bytes(bytes) => size == bytes,
            Payload::Table => {
                size >= 8 && (size - 8).is_multiple_of(32) && (size - 8) / 32 <= TABLE_REGIONS_MAX
            }
            Payload::Slot => size == 40 || size == 8,
            Payload::Config => (12..=12 + CONFIG_BYTES_MAX).contains(&size),
            Payload::Any => true,
        }
    }
}

/// What must have been agreed on before the message is obeyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Needs {
    /// Nothing.
    Nothing,
    /// The protocol feature was acknowledged by SET_PROTOCOL_FEATURES.
    Acked(u64),
    /// The protocol feature was offered. For questions: their sender waits for the answer, so it gets one.
    Offered(u64),
    /// A part of the back-end that is not there.
    Part(&'static str),
}

/// Who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Replies {
    /// The general acknowledgement, if asked for by need_reply.
    Ack,
    /// The message's own reply, always.
    Own,
}

/// One message.
pub(super) struct Row<F> {
    pub id: Id,
    pub name: &'static str,
    pub payload: Payload,
    /// Least and most file descriptors.
    pub fds: (usize, usize),
    pub needs: Needs,
    pub replies: Replies,
    pub handler: Handler<F>,
}

/// A row on one line.
const fn row<F>(
    id: Id,
    name: &'static str,
    payload: Payload,
    fds: (usize, usize),
    needs: Needs,
    replies: Replies,
    handler: Handler<F>,
) -> Row<F> {
    Row { id, name, payload, fds, needs, replies, handler }
}

use Needs::{Acked, Nothing, Offered, Part};
use Payload::{Any, Bytes, Config, Empty, Slot, Table, U64};
use Replies::{Ack, Own};

/// Nobody: the row's [`Needs::Part`] refuses the message before.
fn nobody<F>(_: &mut Session<F>, _: &mut Call<F>) -> Result<Answer, Fault> {
    Err(Refusal::Unknown.into())
}

const MAX_FDS: usize = super::message::FDS_PER_MESSAGE_MAX;

impl<F: 'static> Session<F> {
    #[rustfmt::skip]
    const TABLE: &'static [Row<F>] = &[
        // id                         name                     payload    fds           needs                               reply handler
        row(Id::None,                "POSTCOPY_ACK",          U64,       (0, 0),       Acked(feature::PAGEFAULT),          Ack, postcopy::acknowledged),
        row(Id::GetFeatures,         "GET_FEATURES",          Empty,     (0, 0),       Nothing,                            Own, features::get_features),
        row(Id::SetFeatures,         "SET_FEATURES",          U64,       (0, 0),       Nothing,                            Ack, features::set_features),
        row(Id::SetOwner,            "SET_OWNER",             Empty,     (0, 0),       Nothing,                            Ack, device::set_owner),
        row(Id::ResetOwner,          "RESET_OWNER",           Empty,     (0, 0),       Nothing,                            Ack, device::reset_owner),
        row(Id::SetMemTable,         "SET_MEM_TABLE",         Table,     (0, MAX_FDS), Nothing,                            Ack, memory::set_mem_table),
        row(Id::SetLogBase,          "SET_LOG_BASE",          Bytes(16), (1, 1),       Acked(feature::LOG_SHMFD),          Own, log::set_log_base),
        row(Id::SetLogFd,            "SET_LOG_FD",            Any,       (0, MAX_FDS), Part("an eventfd for the log"),     Ack, nobody),
        row(Id::SetVringNum,         "SET_VRING_NUM",         Bytes(8),  (0, 0),       Nothing,                            Ack, rings::set_vring_num),
        row(Id::SetVringAddr,        "SET_VRING_ADDR",        Bytes(40), (0, 0),       Nothing,                            Ack, rings::set_vring_addr),
        row(Id::SetVringBase,        "SET_VRING_BASE",        Bytes(8),  (0, 0),       Nothing,                            Ack, rings::set_vring_base),
        row(Id::GetVringBase,        "GET_VRING_BASE",        Bytes(8),  (0, 0),       Nothing,                            Own, rings::get_vring_base),
        row(Id::SetVringKick,        "SET_VRING_KICK",        U64,       (0, 1),       Nothing,                            Ack, rings::set_vring_kick),
        row(Id::SetVringCall,        "SET_VRING_CALL",        U64,       (0, 1),       Nothing,                            Ack, rings::set_vring_call),
        row(Id::SetVringErr,         "SET_VRING_ERR",         U64,       (0, 1),       Nothing,                            Ack, rings::set_vring_err),
        row(Id::GetProtocolFeatures, "GET_PROTOCOL_FEATURES", Empty,     (0, 0),       Nothing,                            Own, features::get_protocol_features),
        row(Id::SetProtocolFeatures, "SET_PROTOCOL_FEATURES", U64,       (0, 0),       Nothing,                            Ack, features::set_protocol_features),
        row(Id::GetQueueNum,         "GET_QUEUE_NUM",         Empty,     (0, 0),       Offered(feature::MQ),               Own, features::get_queue_num),
        // Comes before SET_FEATURES acknowledged PROTOCOL_FEATURES, so it cannot need that.
        row(Id::SetVringEnable,      "SET_VRING_ENABLE",      Bytes(8),  (0, 0),       Nothing,                            Ack, rings::set_vring_enable),
        row(Id::SendRarp,            "SEND_RARP",             U64,       (0, 0),       Acked(feature::RARP),               Ack, net::send_rarp),
        row(Id::NetSetMtu,           "NET_SET_MTU",           U64,       (0, 0),       Acked(feature::MTU),                Ack, net::net_set_mtu),
        row(Id::SetBackendReqFd,     "SET_BACKEND_REQ_FD",    Empty,     (1, 1),       Acked(feature::BACKEND_REQ),        Ack, net::set_backend_req_fd),
        row(Id::IotlbMsg,            "IOTLB_MSG",             Any,       (0, MAX_FDS), Part("an IOMMU"),                   Ack, nobody),
        row(Id::SetVringEndian,      "SET_VRING_ENDIAN",      Any,       (0, MAX_FDS), Part("foreign byte order"),         Ack, nobody),
        row(Id::GetConfig,           "GET_CONFIG",            Config,    (0, 0),       Offered(feature::CONFIG),           Own, net::get_config),
        row(Id::SetConfig,           "SET_CONFIG",            Config,    (0, 0),       Acked(feature::CONFIG),             Ack, net::set_config),
        row(Id::PostcopyAdvise,      "POSTCOPY_ADVISE",       Empty,     (0, 0),       Acked(feature::PAGEFAULT),          Own, postcopy::advise),
        row(Id::PostcopyListen,      "POSTCOPY_LISTEN",       Empty,     (0, 0),       Acked(feature::PAGEFAULT),          Own, postcopy::listen),
        row(Id::PostcopyEnd,         "POSTCOPY_END",          Empty,     (0, 0),       Acked(feature::PAGEFAULT),          Own, postcopy::end),
        row(Id::GetInflightFd,       "GET_INFLIGHT_FD",       Any,       (0, MAX_FDS), Part("inflight tracking"),          Ack, nobody),
        row(Id::SetInflightFd,       "SET_INFLIGHT_FD",       Any,       (0, MAX_FDS), Part("inflight tracking"),          Ack, nobody),
        row(Id::ResetDevice,         "RESET_DEVICE",          Empty,     (0, 0),       Acked(feature::RESET_DEVICE),       Ack, device::reset_device),
        row(Id::VringKick,           "VRING_KICK",            Any,       (0, MAX_FDS), Part("in-band notifications"),      Ack, nobody),
        row(Id::GetMaxMemSlots,      "GET_MAX_MEM_SLOTS",     Empty,     (0, 0),       Offered(feature::CONFIGURE_MEM_SLOTS), Own, memory::get_max_mem_slots),
        row(Id::AddMemReg,           "ADD_MEM_REG",           Slot,      (0, 1),       Acked(feature::CONFIGURE_MEM_SLOTS), Ack, memory::add_mem_reg),
        // The specification has no fd here, but some front-ends send one.
        row(Id::RemMemReg,           "REM_MEM_REG",           Slot,      (0, 1),       Acked(feature::CONFIGURE_MEM_SLOTS), Ack, memory::rem_mem_reg),
        row(Id::SetStatus,           "SET_STATUS",            U64,       (0, 0),       Acked(feature::STATUS),             Ack, device::set_status),
        row(Id::GetStatus,           "GET_STATUS",            Empty,     (0, 0),       Offered(feature::STATUS),           Own, device::get_status),
        // The same number is upstream's GET_SHARED_OBJECT: the two exclude each other.
        row(Id::Presetup,            "PRESETUP",              Any,       (0, MAX_FDS), Part("early configuration"),        Ack, nobody),
        row(Id::SetDeviceStateFd,    "SET_DEVICE_STATE_FD",   Any,       (0, MAX_FDS), Part("device state transfer"),      Ack, nobody),
        row(Id::CheckDeviceState,    "CHECK_DEVICE_STATE",    Any,       (0, MAX_FDS), Part("device state transfer"),      Ack, nobody),
    ];

    /// All rows, in the order of the table.
    pub(super) fn rows() -> &'static [Row<F>] {
        Self::TABLE
    }

    /// The row of a message number.
    pub(super) fn row(request: u32) -> Option<&'static Row<F>> {
        Self::rows().iter().find(|row| row.id as u32 == request)
    }
}
