//! Memory whose pages are missing until a thread of ours supplies them, each after a given time: userfaultfd.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Page size, bytes.
pub const PAGE: usize = 4096;

const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const API: u64 = 0xaa;
const FEATURE_THREAD_ID: u64 = 1 << 8;
const MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
/// Time within which a thread that has faulted is asleep.
const ASLEEP_PATIENCE: Duration = Duration::from_millis(200);

/// How a page comes.
#[derive(Clone, Copy, Debug)]
pub struct Delivery {
    /// So long after its fault.
    pub after: Duration,
    /// So often the thread is woken in vain meanwhile.
    pub wakes: u32,
    /// So often it gets a signal meanwhile.
    pub signals: u32,
}

/// Pages that are missing.
pub struct Missing {
    start: usize,
    len: usize,
    plans: Arc<Mutex<HashMap<usize, Delivery>>>,
    _memory: OwnedFd,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl Missing {
    /// Maps `pages` pages of a memfd, and starts the thread that supplies them as planned. Both stay until the process ends.
    pub fn new(pages: usize) -> io::Result<Self> {
        Self::supplied_by(pages, supply)
    }

    /// As [`Self::new`]; each page comes at once.
    pub fn prompt(pages: usize) -> io::Result<Self> {
        Self::supplied_by(pages, |uffd, _| {
            for_each_fault(&uffd, |address, _| copy(&uffd, address));
        })
    }

    fn supplied_by(
        pages: usize,
        supplier: fn(OwnedFd, &Mutex<HashMap<usize, Delivery>>),
    ) -> io::Result<Self> {
        let len = pages * PAGE;
        // SAFETY: plain system calls; the mapping is new, and the descriptors are taken into ownership at once.
        let (memory, start, uffd) = unsafe {
            let memory =
                OwnedFd::from_raw_fd(checked(libc::memfd_create(c"missing".as_ptr(), 0).into())? as i32);
            checked(libc::ftruncate(memory.as_raw_fd(), len as i64).into())?;
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let start =
                libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, memory.as_raw_fd(), 0);
            if start == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            let uffd = checked(libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC))?;
            (memory, start as usize, OwnedFd::from_raw_fd(uffd as i32))
        };
        request(&uffd, UFFDIO_API, &mut [API, FEATURE_THREAD_ID, 0])?;
        request(&uffd, UFFDIO_REGISTER, &mut [start as u64, len as u64, MODE_MISSING, 0])?;
        let plans = Arc::new(Mutex::new(HashMap::new()));
        let shared = plans.clone();
        thread::Builder::new().name("supplier".into()).spawn(move || supplier(uffd, &shared))?;
        Ok(Self { start, len, plans, _memory: memory })
    }

    /// Address of a page.
    pub fn page(&self, number: usize) -> usize {
        assert!(number * PAGE < self.len);
        self.start + number * PAGE
    }

    /// Says how a page will come.
    pub fn plan(&self, number: usize, delivery: Delivery) {
        lock(&self.plans).insert(self.page(number), delivery);
    }
}

fn request<const N: usize>(uffd: &OwnedFd, code: libc::c_ulong, words: &mut [u64; N]) -> io::Result<()> {
    // SAFETY: each request's structure is as many words as its callers pass, and lives for the call.
    checked(unsafe { libc::ioctl(uffd.as_raw_fd(), code, words.as_mut_ptr()) }.into()).map(drop)
}

fn supply(uffd: OwnedFd, plans: &Mutex<HashMap<usize, Delivery>>) {
    let uffd = Arc::new(uffd);
    for_each_fault(&uffd.clone(), |address, tid| {
        // A plan is for one fault: the same again after a wake-up or a signal is still that fault.
        let Some(delivery) = lock(plans).remove(&address) else { return };
        let uffd = uffd.clone();
        thread::spawn(move || deliver(&uffd, address, tid, delivery));
    });
}

fn for_each_fault(uffd: &OwnedFd, mut each: impl FnMut(usize, u32)) {
    let mut file = fs::File::from(uffd.try_clone().expect("a descriptor"));
    let mut message = [0_u8; 32];
    while file.read_exact(&mut message).is_ok() {
        if message[0] != EVENT_PAGEFAULT {
            continue;
        }
        let word = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().expect("8 bytes"));
        each(word(16) as usize & !(PAGE - 1), word(24) as u32);
    }
}

fn deliver(uffd: &OwnedFd, address: usize, tid: u32, delivery: Delivery) {
    await_sleep(tid);
    let pauses = delivery.wakes + delivery.signals + 1;
    for pause in 1..=pauses {
        thread::sleep(delivery.after / pauses);
        if pause <= delivery.wakes {
            let _ = request(uffd, UFFDIO_WAKE, &mut [address as u64, PAGE as u64]);
            await_sleep(tid);
        } else if pause < pauses {
            // SAFETY: a signal to a thread of our own, which has a handler for it.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, libc::SIGUSR2) };
            await_sleep(tid);
        }
    }
    copy(uffd, address);
}

fn copy(uffd: &OwnedFd, address: usize) {
    let page = [0x5a_u8; PAGE];
    let mut copy = [address as u64, page.as_ptr() as u64, PAGE as u64, 0, 0];
    request(uffd, UFFDIO_COPY, &mut copy).expect("UFFDIO_COPY");
}

/// Waits until a thread sleeps: only then does the time run that it should stand still.
fn await_sleep(tid: u32) {
    let path = format!("/proc/self/task/{tid}/wchan");
    let started = Instant::now();
    while fs::read_to_string(&path).is_ok_and(|place| place.trim() == "0")
        && started.elapsed() < ASLEEP_PATIENCE
    {
        thread::yield_now();
    }
}
