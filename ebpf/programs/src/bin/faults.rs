//! Fault latency: how long the threads of one process stand still in `handle_userfault`, where a thread sleeps until
//! another process has supplied a page.
//!
//! Two ways to see that, of which user space attaches one:
//! - **fentry and fexit** of the function, where the kernel lets functions be patched;
//! - **the tracepoint `sched_switch`**, which sees every thread that falls asleep or wakes: a look at the stack of ours
//!   tells whether it sleeps in that function. The faulting address is found on that stack too: the function keeps its
//!   waiter there, which is known by its wake function and its task. So populates and other faults inside system calls,
//!   for which no page fault tracepoint fires, have an address as well.
//!
//! What is counted and how: see `vhost_user_net_ebpf_common::faults`. Not here: who fills areas, notes and threads.
//!
//! Offsets are globals in frozen .rodata: the verifier takes them for constants, and lets a trusted task be read
//! directly.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![allow(non_upper_case_globals, reason = "maps are named as people see them")]

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::btf_maps::lpm_trie::Key as Prefix;
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use aya_ebpf::helpers::generated::bpf_probe_read_kernel as helper_read;
use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid, bpf_get_current_task_btf, bpf_get_stack, bpf_ktime_get_ns,
    bpf_probe_read_kernel,
};
use aya_ebpf::macros::{btf_map, btf_tracepoint, fentry, fexit};
use aya_ebpf::programs::{BtfTracePointContext, FEntryContext, FExitContext};
use aya_ebpf::{EbpfContext, Global};
use core::arch::asm;
use core::mem::MaybeUninit;
use core::ptr::{addr_of, read_volatile};
use vhost_user_net_ebpf_common::faults::{
    ABSENT, Area, Event, Hist, Kernel, Key, Meta, NO_PORT, Name, SLOTS, Stall, context, kind, source,
};

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Set by user space.
#[unsafe(no_mangle)]
static KERNEL: Global<Kernel> = Global::new(Kernel {
    code_start: 0,
    code_end: 0,
    wake_function: 0,
    tgid: 0,
    task_pid: 0,
    task_tgid: 0,
    task_flags: 0,
    task_min_flt: 0,
    task_maj_flt: 0,
    task_worker: ABSENT,
    worker_work: 0,
    request_work: 0,
    request_opcode: 0,
    madvise_addr: 0,
    waiter_task: ABSENT,
    waiter_address: 0,
    fault_address: 0,
});

/// A histogram to begin with: too large for the stack.
static EMPTY: Hist = Hist::EMPTY;

#[btf_map]
static fault_hist: HashMap<Key, Hist, 64> = HashMap::new();
#[btf_map]
static fault_areas: LpmTrie<[u8; 8], Area, 65536> = LpmTrie::new();
#[btf_map]
static fault_notes: LruHashMap<u64, Area, 8192> = LruHashMap::new();
#[btf_map]
static fault_threads: HashMap<u32, u32, 256> = HashMap::new();
#[btf_map]
static fault_stalls: LruHashMap<u32, Stall, 4096> = LruHashMap::new();
#[btf_map]
static fault_ports: HashMap<u32, Name, 1024> = HashMap::new();
#[btf_map]
static fault_meta: Array<Meta, 1> = Array::new();
/// Not pinned: a piece of a stack.
#[btf_map]
static fault_scratch: PerCpuArray<[u64; PIECE], 1> = PerCpuArray::new();
#[btf_map]
static fault_events: RingBuf<Event, 131072> = RingBuf::new();

/// PF_IO_WORKER: a thread of io_uring's worker pool.
const IO_WORKER: u32 = 0x10;
/// IORING_OP_MADVISE.
const OP_MADVISE: u8 = 25;
/// VM_FAULT_RETRY: `handle_userfault` has waited.
const RETRY: u32 = 0x400;
/// Frames of a sleeping thread that are looked at: the function is near the end, below the scheduler.
const FRAMES: usize = 12;
/// Words of a sleeping thread's stack that are read at once.
const PIECE: usize = 32;
/// Pieces, from this tracepoint's arguments up, in which the scheduler's frames end (in the first on 6.12 and 6.18).
const FRAME_PIECES: usize = 3;
/// Pieces in which the waiter is.
const STACK_PIECES: usize = 16;
/// Attempts to raise a maximum that others raise too.
const RAISES: u32 = 8;
const PAGE: u64 = 4096;
const BITS: u32 = 64;
/// NO_PORT and UNKNOWN: addresses outside every area.
const NOWHERE: Area = Area { port: NO_PORT, kind: kind::UNKNOWN };

/// One field of what user space has set: a constant for the verifier.
macro_rules! kernel {
    ($field:ident) => {{
        #[allow(unused_unsafe, reason = "it is used inside and outside of unsafe blocks")]
        // SAFETY: in bounds of a static that is never written while the programs run.
        let value = unsafe { read_volatile(addr_of!((*(&raw const KERNEL).cast::<Kernel>()).$field)) };
        value
    }};
}

/// Reads a field of a trusted kernel structure; the verifier checks that it is one.
#[inline(always)]
unsafe fn field<T>(object: *const u8, offset: u32) -> T {
    // SAFETY: the caller's.
    unsafe { read_volatile(object.add(offset as usize).cast::<T>()) }
}

/// Reads kernel memory that the verifier does not know.
#[inline(always)]
fn peek<T>(base: u64, offset: u64) -> Option<T> {
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_kernel(base.wrapping_add(offset) as *const T) }.ok()
}

#[fentry(function = "handle_userfault")]
fn faults_enter(ctx: FEntryContext) -> i32 {
    let id = bpf_get_current_pid_tgid();
    if (id >> 32) as u32 == kernel!(tgid) {
        let fault: *const u8 = ctx.arg(0);
        // SAFETY: the function's first argument is a struct vm_fault, and the helper returns the current task.
        let (address, task) =
            unsafe { (field::<u64>(fault, kernel!(fault_address)), bpf_get_current_task_btf() as *const u8) };
        fall_asleep(task, id as u32, address, source::ADDRESS);
    }
    0
}

#[fexit(function = "handle_userfault")]
fn faults_exit(ctx: FExitContext) -> i32 {
    let id = bpf_get_current_pid_tgid();
    if (id >> 32) as u32 == kernel!(tgid) {
        // The value that the function returned stands behind its two arguments.
        let returned: u32 = ctx.arg(2);
        wake(id as u32, returned & RETRY != 0);
    }
    0
}

#[btf_tracepoint(function = "sched_switch")]
fn faults_switch(ctx: BtfTracePointContext) -> i32 {
    let previous: *const u8 = ctx.arg(1);
    let next: *const u8 = ctx.arg(2);
    let state: u32 = ctx.arg(3);
    // SAFETY: both arguments are a struct task_struct.
    unsafe {
        if state != 0
            && field::<u32>(previous, kernel!(task_tgid)) == kernel!(tgid)
            && let Some(frame) = waiting_frame(&ctx)
        {
            let tid = field::<u32>(previous, kernel!(task_pid));
            let (address, from) = match address_on_stack(&ctx, frame, previous as u64) {
                Some(address) => (address, source::ADDRESS),
                None => match requested_address(previous) {
                    Some(address) => (address, source::REQUEST),
                    None => (0, source::NONE),
                },
            };
            fall_asleep(previous, tid, address, from);
        }
        if field::<u32>(next, kernel!(task_tgid)) == kernel!(tgid) {
            wake(field::<u32>(next, kernel!(task_pid)), true);
        }
    }
    0
}

/// If the current thread is inside `handle_userfault`: the address there to which it will return.
///
/// Unwinding takes a microsecond or two, and threads of ours fall asleep often: first we look whether such an address
/// stands on the end of the stack at all. It may also be an old one that nobody has overwritten.
#[inline(always)]
fn waiting_frame(ctx: &BtfTracePointContext) -> Option<u64> {
    let is_inside = |address: u64| address >= kernel!(code_start) && address < kernel!(code_end);
    let words = fault_scratch.get_ptr_mut(0)?;
    let mut found = false;
    for piece in 0..FRAME_PIECES {
        // SAFETY: this CPU's buffer; nothing else runs here before we are through.
        let words = unsafe { read_piece(ctx, piece, &mut *words) }?;
        found = words.iter().any(|word| is_inside(*word));
        if found {
            break;
        }
    }
    if !found {
        return None;
    }
    let mut frames = MaybeUninit::<[u64; FRAMES]>::uninit();
    let size = size_of::<[u64; FRAMES]>() as u32;
    // SAFETY: the buffer is as long as said; what the helper does not fill it sets to zero.
    let (len, frames) = unsafe {
        let len = bpf_get_stack(ctx.as_ptr(), frames.as_mut_ptr().cast(), size, 0);
        (len, frames.assume_init_ref())
    };
    if len <= 0 {
        return None;
    }
    frames.iter().copied().find(|frame| is_inside(*frame))
}

/// Reads a piece of the current thread's stack, from this tracepoint's arguments up: they lie on it.
#[inline(always)]
fn read_piece<'w>(
    ctx: &BtfTracePointContext,
    piece: usize,
    words: &'w mut [u64; PIECE],
) -> Option<&'w [u64; PIECE]> {
    let start = ctx.as_ptr().cast::<[u64; PIECE]>().wrapping_add(piece);
    let size = size_of::<[u64; PIECE]>() as u32;
    // SAFETY: the helper checks the address; the buffer is as long as said.
    let read = unsafe { helper_read(words.as_mut_ptr().cast(), size, start.cast()) };
    (read == 0).then_some(words)
}

/// The address that the current thread waits for, from the waiter in the frame of `handle_userfault`. That frame begins
/// above the return address into it; words before it may be old ones of another fault.
#[inline(always)]
fn address_on_stack(ctx: &BtfTracePointContext, frame: u64, task: u64) -> Option<u64> {
    if kernel!(waiter_task) == ABSENT || kernel!(wake_function) == 0 {
        return None;
    }
    let words = fault_scratch.get_ptr_mut(0)?;
    let mut inside = false;
    for piece in 0..STACK_PIECES {
        // SAFETY: as in `waiting_frame`.
        let words = unsafe { read_piece(ctx, piece, &mut *words) }?;
        for (word, value) in words.iter().enumerate() {
            inside |= *value == frame;
            if inside && *value == kernel!(wake_function) {
                let at = ctx.as_ptr().cast::<u64>().wrapping_add(piece * PIECE + word).cast::<u8>();
                // SAFETY: the helper checks the address.
                let back = |bytes: u32| unsafe {
                    bpf_probe_read_kernel(at.wrapping_sub(bytes as usize).cast::<u64>())
                };
                if back(kernel!(waiter_task)) == Ok(task) {
                    return back(kernel!(waiter_address)).ok();
                }
            }
        }
    }
    None
}

/// Where the io_uring request begins that an io-wq thread works off, if it is an MADVISE.
#[inline(always)]
unsafe fn requested_address(task: *const u8) -> Option<u64> {
    // SAFETY: the caller's task.
    let flags = unsafe { field::<u32>(task, kernel!(task_flags)) };
    if kernel!(task_worker) == ABSENT || flags & IO_WORKER == 0 {
        return None;
    }
    let worker = peek::<u64>(task as u64, kernel!(task_worker).into())?;
    let work = peek::<u64>(worker, kernel!(worker_work).into()).filter(|work| *work != 0)?;
    let request = work.wrapping_sub(kernel!(request_work).into());
    if peek::<u8>(request, kernel!(request_opcode).into())? != OP_MADVISE {
        return None;
    }
    peek::<u64>(request, kernel!(madvise_addr).into())
}

/// A thread of ours is about to wait for a page.
#[inline(always)]
fn fall_asleep(task: *const u8, tid: u32, address: u64, from: u32) {
    // SAFETY: `task` is a trusted task_struct.
    let (completed, flags) = unsafe {
        (
            field::<u64>(task, kernel!(task_min_flt)) + field::<u64>(task, kernel!(task_maj_flt)),
            field::<u32>(task, kernel!(task_flags)),
        )
    };
    // SAFETY: reads the clock.
    let now = unsafe { bpf_ktime_get_ns() };
    if let Some(stall) = fault_stalls.get_ptr_mut(tid) {
        // SAFETY: an entry of the map; only its own thread's events write to it.
        let stall = unsafe { &mut *stall };
        // The kernel counts a fault when it is complete: this is still the one before. Populates are not counted at all,
        // so where the address is not the very page's, each sleep is taken for a stall of its own.
        if stall.completed == completed && stall.address == address && from == source::ADDRESS {
            if stall.since_ns == 0 {
                stall.part += 1;
                stall.since_ns = now;
            }
            return;
        }
    }
    let page = address & !(PAGE - 1);
    // SAFETY: entries may change while they are read: a stall at the border of two lives of a page is either's.
    let (area, from) = match unsafe { fault_notes.get(page) } {
        Some(area) if address != 0 => (*area, source::NOTE),
        _ => match fault_areas.get(&Prefix::new(BITS, address.to_be_bytes())) {
            Some(area) => (*area, from),
            None => (NOWHERE, from),
        },
    };
    let context = if flags & IO_WORKER != 0 {
        context::IO_WQ
    // SAFETY: as above.
    } else if unsafe { fault_threads.get(tid) }.is_some() {
        context::WORKER
    } else {
        context::OTHER
    };
    let stall = Stall {
        since_ns: now,
        start_ns: now,
        slept_ns: 0,
        address,
        completed,
        port: area.port,
        kind: area.kind,
        context,
        source: from,
        part: 1,
        reserved: 0,
    };
    let _ = fault_stalls.insert(tid, stall, 0);
}

/// A thread of ours runs again.
#[inline(always)]
fn wake(tid: u32, has_slept: bool) {
    let Some(stall) = fault_stalls.get_ptr_mut(tid) else { return };
    // SAFETY: an entry of the map; only its own thread's events write to it.
    let stall = unsafe { &mut *stall };
    if stall.since_ns == 0 {
        return;
    }
    // SAFETY: reads the clock.
    let slept = unsafe { bpf_ktime_get_ns() }.wrapping_sub(stall.since_ns);
    stall.since_ns = 0;
    if !has_slept {
        return;
    }
    let before = stall.slept_ns;
    let total = before.wrapping_add(slept);
    stall.slept_ns = total;
    if let Some(hist) = histogram(Key { port: stall.port, kind: stall.kind, context: stall.context }) {
        if stall.part == 1 {
            add(hist, SLOTS_AT + 8 * slot(total), 1);
            add(hist, COUNT_AT, 1);
            add(hist, SOURCES_AT + 8 * (stall.source as usize & 3), 1);
        } else {
            add(hist, SLOTS_AT + 8 * slot(before), u64::MAX);
            add(hist, SLOTS_AT + 8 * slot(total), 1);
        }
        add(hist, SUM_AT, slept);
        raise(hist, total);
    }
    match fault_events.reserve(0) {
        Some(mut event) => {
            event.write(Event {
                start_ns: stall.start_ns,
                duration_ns: total,
                slept_ns: slept,
                address: stall.address,
                tid,
                port: stall.port,
                kind: stall.kind,
                context: stall.context,
                source: stall.source,
                part: stall.part,
            });
            event.submit(0);
        }
        None => {
            if let Some(meta) = fault_meta.get_ptr_mut(0) {
                // SAFETY: in bounds of the entry.
                unsafe {
                    asm!("lock *(u32 *)({p} + 0) += {n}", p = in(reg) &raw mut (*meta).events_lost, n = in(reg) 1_u64)
                };
            }
        }
    }
}

const SLOTS_AT: usize = core::mem::offset_of!(Hist, slots);
const COUNT_AT: usize = core::mem::offset_of!(Hist, count);
const SUM_AT: usize = core::mem::offset_of!(Hist, sum_ns);
const SOURCES_AT: usize = core::mem::offset_of!(Hist, sources);
const MAX_AT: usize = core::mem::offset_of!(Hist, max_ns);

/// The histogram of a key, made if there is none.
#[inline(always)]
fn histogram(key: Key) -> Option<*mut Hist> {
    if let Some(hist) = fault_hist.get_ptr_mut(key) {
        return Some(hist);
    }
    // Another CPU may do the same at the same time: one of the two wins.
    let _ = fault_hist.insert(key, &EMPTY, BPF_NOEXIST.into());
    fault_hist.get_ptr_mut(key)
}

/// The bucket of a stall.
#[inline(always)]
fn slot(ns: u64) -> usize {
    let mut rest = ns / 1000;
    let mut slot = 0;
    let mut step = 32;
    while step > 0 {
        if rest >> step != 0 {
            rest >>= step;
            slot += step;
        }
        step /= 2;
    }
    let slot = slot as usize;
    if slot < SLOTS { slot } else { SLOTS - 1 }
}

#[inline(always)]
fn add(hist: *mut Hist, at: usize, n: u64) {
    // SAFETY: the callers' offsets lie within the histogram.
    unsafe { asm!("lock *(u64 *)({p} + 0) += {n}", p = in(reg) hist.cast::<u8>().add(at), n = in(reg) n) };
}

/// Raises the maximum to `ns` if it is lower.
#[inline(always)]
fn raise(hist: *mut Hist, ns: u64) {
    // SAFETY: in bounds of the histogram.
    let max = unsafe { hist.cast::<u8>().add(MAX_AT) };
    // SAFETY: as above.
    let mut seen = unsafe { read_volatile(max.cast::<u64>()) };
    for _ in 0..RAISES {
        if seen >= ns {
            return;
        }
        let expected = seen;
        // SAFETY: as above; swaps if the value is still the expected one, and returns what was there.
        unsafe {
            asm!("r0 = cmpxchg_64({p} + 0, r0, {n})", p = in(reg) max, n = in(reg) ns, inout("r0") seen);
        }
        if seen == expected {
            return;
        }
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
