//! A front-end can truncate its memory file while we use it. The next access then raises SIGBUS, which would end
//! the process and with it every other port. Here: a handler that puts a page of zeros where the file was, and
//! marks the mapping as poisoned; its port fails at the end of the turn, the others do not notice.
//!
//! The handler finds the mapping in a static table without locks. A slot's life: claimed → range published
//! (after mmap, before anybody has a pointer) → range withdrawn (when no pointer is left, before munmap) → free.
//! So while a thread faults inside a mapping, that mapping's slot is stable; and a range that was withdrawn cannot be
//! taken for memory that was mapped at the same place later, since that mmap came after the withdrawal.
//!
//! System calls that meet such a page fail with EFAULT instead; their callers see that as any other error.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Mappings (memory regions and dirty logs of all ports together) that can be alive at once.
pub const MAX_LIVE_MAPPINGS: usize = 8192;

struct Slot {
    claimed: AtomicBool,
    poisoned: AtomicBool,
    /// Address of the first byte; 0 = nothing published.
    start: AtomicUsize,
    len: AtomicUsize,
    page_size: AtomicUsize,
}

static TABLE: [Slot; MAX_LIVE_MAPPINGS] = [const {
    Slot {
        claimed: AtomicBool::new(false),
        poisoned: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        page_size: AtomicUsize::new(0),
    }
}; MAX_LIVE_MAPPINGS];

/// One past the highest slot ever claimed, so that the handler's search is short.
static HIGH_WATER: AtomicUsize = AtomicUsize::new(0);

/// Pages replaced since the process began. While it is 0, nothing is poisoned.
static FAULTS: AtomicU64 = AtomicU64::new(0);

/// Installs the handler; later calls do nothing. Mapping guest memory does it too, so it cannot be forgotten.
pub fn install() -> Result<(), Errno> {
    static DONE: OnceLock<Result<(), Errno>> = OnceLock::new();
    *DONE.get_or_init(|| {
        let action = SigAction::new(
            SigHandler::SigAction(on_sigbus),
            SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK,
            SigSet::empty(),
        );
        // SAFETY: the handler uses atomics and direct system calls only, and preserves errno.
        unsafe { sigaction(Signal::SIGBUS, &action) }.map(drop)
    })
}

/// Pages of guest mappings that vanished under us since the process began.
pub fn faults() -> u64 {
    FAULTS.load(Ordering::Relaxed)
}

/// A live mapping's entry in the table; withdrawn on drop, which must come before munmap.
#[derive(Debug)]
pub(super) struct Guard {
    index: usize,
}

impl Guard {
    /// Publishes a mapping; None when the table is full.
    pub(super) fn new(start: usize, len: usize, page_size: usize) -> Option<Self> {
        let index = TABLE.iter().position(|slot| {
            slot.claimed.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
        })?;
        HIGH_WATER.fetch_max(index + 1, Ordering::SeqCst);
        let slot = &TABLE[index];
        slot.poisoned.store(false, Ordering::Relaxed);
        slot.len.store(len, Ordering::Relaxed);
        slot.page_size.store(page_size, Ordering::Relaxed);
        slot.start.store(start, Ordering::SeqCst);
        Some(Self { index })
    }

    /// True once a page of the mapping had to be replaced.
    #[inline]
    pub(super) fn poisoned(&self) -> bool {
        FAULTS.load(Ordering::Relaxed) != 0 && TABLE[self.index].poisoned.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let slot = &TABLE[self.index];
        slot.start.store(0, Ordering::SeqCst);
        slot.claimed.store(false, Ordering::Release);
    }
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let saved = Errno::last_raw();
    // SAFETY: the kernel passes a valid siginfo for a SA_SIGINFO handler.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // A positive code is a fault; kill(2) and the like have none and no address.
    if !(code > 0 && replace_page(address)) {
        // Not ours: let it have its usual effect. A fault repeats when we return; a signal that was sent does not,
        // so it is sent again.
        // SAFETY: plain signal calls, async-signal-safe.
        unsafe {
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
            if code <= 0 {
                libc::raise(libc::SIGBUS);
            }
        }
    }
    Errno::set_raw(saved);
}

/// Maps a zero page over the page of `address` if that lies in a guest mapping. Async-signal-safe.
fn replace_page(address: usize) -> bool {
    let used = HIGH_WATER.load(Ordering::SeqCst).min(MAX_LIVE_MAPPINGS);
    for slot in &TABLE[..used] {
        let start = slot.start.load(Ordering::SeqCst);
        let len = slot.len.load(Ordering::SeqCst);
        let page_size = slot.page_size.load(Ordering::SeqCst);
        // A slot that changes while we read is not the one of the fault (see the header).
        if start == 0 || address.wrapping_sub(start) >= len || slot.start.load(Ordering::SeqCst) != start {
            continue;
        }
        let page = address & !(page_size - 1);
        // SAFETY: the page lies within a mapping that `Mapping` or `DirtyLog` owns and that is alive, because the
        // faulting thread is using it. MAP_FIXED replaces a page of that mapping only.
        let mapped = unsafe {
            libc::mmap(
                page as *mut libc::c_void,
                page_size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return false;
        }
        slot.poisoned.store(true, Ordering::Release);
        FAULTS.fetch_add(1, Ordering::SeqCst);
        return true;
    }
    false
}
