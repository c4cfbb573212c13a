//! Fault latency: how long threads of the process stood still for missing guest memory.
//!
//! ```text
//!                                           fault_stalls  tid ─► who stands still, since when
//!  fault_threads  tid ─► worker        ┐                        ┌► fault_hist    {port, kind, context} ─► histogram
//!  fault_areas    address prefix ─► {port, kind} ┼─ a stall ends ─┤
//!  fault_notes    page ─► {port, kind} ┘                        └► fault_events  ring buffer
//! ```
//!
//! **What a stall is.** One page fault on missing memory, however often its thread was woken in vain and slept again; its
//! length is the time spent asleep. A stall is counted when its thread first wakes. If the same fault then sleeps on, the
//! histogram is corrected (the stall moves to a longer bucket, it is not counted again), and another event tells. (Where
//! the faulting address cannot be had, each sleep is a stall.)

use crate::plain;

/// Buckets of a histogram: bucket `n` counts stalls of 2^n to 2^(n+1) µs, bucket 0 also shorter ones (as QEMU's
/// `postcopy-latency-distribution`).
pub const SLOTS: usize = 40;
/// The port of an address that belongs to none.
pub const NO_PORT: u32 = u32::MAX;

/// What guest memory was wanted for; the `kind` of keys and areas.
pub mod kind {
    /// Not known: not guest memory of a port, or the address could not be had.
    pub const UNKNOWN: u32 = 0;
    /// Descriptor table, available or used ring (the whole pages that hold them).
    pub const RING: u32 = 1;
    /// An indirect descriptor table.
    pub const INDIRECT_TABLE: u32 = 2;
    /// A packet's buffer with its header: guest memory outside the rings. An indirect table that nobody noted beforehand
    /// counts here too, since its address says nothing about what it is.
    pub const PACKET_BUFFER: u32 = 3;
    /// Their names, by number.
    pub const NAMES: [&str; 4] = ["unknown", "ring", "indirect-table", "packet-buffer"];
}

/// Who stood still; the `context` of keys.
pub mod context {
    /// A worker's own thread.
    pub const WORKER: u32 = 0;
    /// An io-wq thread, working off a request of the process.
    pub const IO_WQ: u32 = 1;
    /// Any other thread of the process.
    pub const OTHER: u32 = 2;
    /// Their names, by number.
    pub const NAMES: [&str; 3] = ["worker", "io-wq", "other"];
}

/// How stalls are measured; the `mode` of [`Meta`].
pub mod mode {
    /// Not at all.
    pub const OFF: u32 = 0;
    /// fentry and fexit of `handle_userfault`.
    pub const FENTRY: u32 = 1;
    /// The tracepoint of context switches, with a look at the stack.
    pub const TRACEPOINT: u32 = 2;
    /// Tracepoints again, loaded but not attached: they cost something at each context switch of the machine, and nothing
    /// can fault now.
    pub const TRACEPOINT_IDLE: u32 = 3;
    /// Their names, by number.
    pub const NAMES: [&str; 4] = ["off", "fentry", "tracepoint", "tracepoint-idle"];
}

/// Where the kind of a stall comes from; the `source` of [`Event`].
pub mod source {
    /// The faulting address, which lies in a known area.
    pub const ADDRESS: u32 = 0;
    /// The io-wq thread's request (MADVISE), whose start address was read, as the faulting address could not be had.
    pub const REQUEST: u32 = 1;
    /// A note of the fault engine for that page.
    pub const NOTE: u32 = 2;
    /// Nothing was known.
    pub const NONE: u32 = 3;
    /// Their names, by number.
    pub const NAMES: [&str; 4] = ["address", "request", "note", "none"];
}

/// Key of `fault_hist`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The port's number, or [`NO_PORT`].
    pub port: u32,
    /// See [`kind`].
    pub kind: u32,
    /// See [`context`].
    pub context: u32,
}

/// Value of `fault_hist`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hist {
    /// Stalls by length, see [`SLOTS`].
    pub slots: [u64; SLOTS],
    /// Stalls.
    pub count: u64,
    /// Their sum, ns.
    pub sum_ns: u64,
    /// The longest, ns.
    pub max_ns: u64,
    /// Stalls by where their kind came from, see [`source`].
    pub sources: [u64; source::NAMES.len()],
}

impl Hist {
    /// No stalls.
    pub const EMPTY: Self =
        Self { slots: [0; SLOTS], count: 0, sum_ns: 0, max_ns: 0, sources: [0; source::NAMES.len()] };
}

/// One stall that has ended, in `fault_events`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// When it began, CLOCK_MONOTONIC, ns.
    pub start_ns: u64,
    /// How long it was asleep so far, ns.
    pub duration_ns: u64,
    /// How much of that is new since the last event of this stall, ns.
    pub slept_ns: u64,
    /// The faulting address, or the start of the request, in the process; 0: unknown.
    pub address: u64,
    /// The thread.
    pub tid: u32,
    /// As in [`Key`].
    pub port: u32,
    /// As in [`Key`].
    pub kind: u32,
    /// As in [`Key`].
    pub context: u32,
    /// See [`source`].
    pub source: u32,
    /// 1: a stall; n: the same stall as in the last event of this thread, which slept on for the n-th time.
    pub part: u32,
}

/// Value of `fault_stalls`: the last fault of a thread (the key) that stood still. While it does, `since_ns` is set.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stall {
    /// When it fell asleep, CLOCK_MONOTONIC, ns; 0: it is awake.
    pub since_ns: u64,
    /// When it fell asleep for this fault first.
    pub start_ns: u64,
    /// How long it was asleep before `since_ns`, ns.
    pub slept_ns: u64,
    /// As in [`Event`].
    pub address: u64,
    /// Faults that the thread had completed before: unchanged, it is the same fault.
    pub completed: u64,
    /// As in [`Key`].
    pub port: u32,
    /// As in [`Key`].
    pub kind: u32,
    /// As in [`Key`].
    pub context: u32,
    /// See [`source`].
    pub source: u32,
    /// How often it fell asleep.
    pub part: u32,
    /// Zero.
    pub reserved: u32,
}

/// Of a [`Kernel`]'s offset: this kernel has no such thing.
pub const ABSENT: u32 = u32::MAX;

/// What the programs must know of the running kernel: the global `KERNEL`, set before they are loaded. Offsets in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The code of `handle_userfault`; only the fallback looks at it.
    pub code_start: u64,
    /// Its end.
    pub code_end: u64,
    /// `userfaultfd_wake_function`, by which the waiter is found on a thread's stack; 0: not known.
    pub wake_function: u64,
    /// The process to measure.
    pub tgid: u32,
    /// `task_struct.pid`.
    pub task_pid: u32,
    /// `task_struct.tgid`.
    pub task_tgid: u32,
    /// `task_struct.flags`.
    pub task_flags: u32,
    /// `task_struct.min_flt`.
    pub task_min_flt: u32,
    /// `task_struct.maj_flt`.
    pub task_maj_flt: u32,
    /// `task_struct.worker_private`, or [`ABSENT`].
    pub task_worker: u32,
    /// `io_worker.cur_work`.
    pub worker_work: u32,
    /// `io_kiocb.work`.
    pub request_work: u32,
    /// `io_kiocb.opcode`.
    pub request_opcode: u32,
    /// `io_madvise.addr`.
    pub madvise_addr: u32,
    /// From `userfaultfd_wait_queue.wq.private` to `wq.func`, or [`ABSENT`].
    pub waiter_task: u32,
    /// From `userfaultfd_wait_queue.msg.arg.pagefault.address` to `wq.func`.
    pub waiter_address: u32,
    /// `vm_fault.address`.
    pub fault_address: u32,
}

/// What addresses of the process are: value of `fault_areas` (longest prefix wins, so the pages of a ring stand out
/// of the region around them) and of `fault_notes` (key: page address).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// The port.
    pub port: u32,
    /// See [`kind`].
    pub kind: u32,
}

/// The one entry of `fault_meta`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    /// [`crate::LAYOUT`] of the program that made the maps.
    pub layout: u32,
    /// See [`mode`].
    pub mode: u32,
    /// The process that is measured.
    pub pid: u32,
    /// Events that found the ring buffer full.
    pub events_lost: u32,
    /// When the process was started, clock ticks after boot (`/proc/PID/stat`): tells it from a later one of that number.
    pub start_time: u64,
}

/// Length of a port's name at most, bytes.
pub const NAME_LEN: usize = 64;

/// Value of `fault_ports`: key is the port's number.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    /// The name, filled up with zeros.
    pub name: [u8; NAME_LEN],
}

plain!(Key, Hist, Event, Stall, Kernel, Area, Meta, Name);
