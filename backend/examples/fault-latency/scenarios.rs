//! Faults of known length, and what the histograms say of them.

use crate::uffd::{Delivery, Missing, PAGE};
use ebpf_common::faults::{Area, Event, Hist, Key, context, kind, mode, source};
use io_uring::{IoUring, opcode};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use vhost_user_net::observe::areas::{Areas, Span};
use vhost_user_net::observe::events::Events;
use vhost_user_net::observe::load::{Programs, Ways};
use vhost_user_net::observe::read::Reader;
use vhost_user_net::reactor::{Done, Reactor};

const PORTS: [&str; 2] = ["vm1", "vm2"];
/// Pages for each of the areas.
const PAGES: usize = 64;

/// How a page is touched.
#[derive(Clone, Copy, Debug)]
enum Touch {
    /// By a load of this thread.
    Load,
    /// By the kernel, which copies from it for a write(2) to a tap (where there is one) or a pipe.
    Write,
    /// By an io-wq thread, which populates it for an MADVISE request.
    Populate,
    /// By a loop of MADV_POPULATE_WRITE in this thread.
    Advise,
}

struct Bed {
    missing: Missing,
    next: [usize; 4],
    programs: Programs,
    reader: Reader,
    ring: IoUring,
    file: File,
    file_is_tap: bool,
}

/// Where pages are.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// A ring of vm1.
    Ring,
    /// Plain memory of vm2.
    Buffer,
    /// Plain memory of vm2, noted as an indirect table.
    Noted,
    /// Nobody's.
    Nowhere,
}

impl Place {
    fn key(self) -> (Option<&'static str>, u32) {
        match self {
            Self::Ring => (Some(PORTS[0]), kind::RING),
            Self::Buffer => (Some(PORTS[1]), kind::PACKET_BUFFER),
            Self::Noted => (Some(PORTS[1]), kind::INDIRECT_TABLE),
            Self::Nowhere => (None, kind::UNKNOWN),
        }
    }
}

static SIGNALS: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_signal(_: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// Runs all scenarios; with `hold`, the maps stay until the input ends.
pub fn run(ways: Ways, hold: bool) -> Result<(), Box<dyn Error>> {
    // SAFETY: installs a handler that only adds to an atomic.
    unsafe { libc::signal(libc::SIGUSR2, on_signal as *const () as libc::sighandler_t) };
    let instance = format!("fault-latency-{}", std::process::id());
    let ports = PORTS.map(str::to_owned);
    let loaded = Instant::now();
    let (mut programs, events) = Programs::load(&instance, &ports, ways)?;
    let load_ms = loaded.elapsed().as_millis() as u64;
    programs.arm()?;
    let missing = Missing::new(4 * PAGES)?;
    let span = |place: Place, kind| Span {
        addresses: missing.page(place as usize * PAGES) as u64
            ..missing.page((place as usize + 1) * PAGES - 1) as u64 + PAGE as u64,
        kind,
    };
    let mut areas = Areas::default();
    programs.change_areas(&areas.set(0, &[span(Place::Ring, kind::RING)]))?;
    let buffers = [span(Place::Buffer, kind::PACKET_BUFFER), span(Place::Noted, kind::PACKET_BUFFER)];
    programs.change_areas(&areas.set(1, &buffers))?;
    let (file, file_is_tap) = open_file()?;
    let reader = Reader::open(&instance)?;
    let ring = IoUring::new(8)?;
    println!(
        "{}",
        json!({
            "mode": mode::NAMES[programs.mode() as usize], "load_ms": load_ms, "instance": instance, "tap": file_is_tap,
        })
    );
    let mut bed = Bed { missing, next: [0; 4], programs, reader, ring, file, file_is_tap };

    // SAFETY: no arguments.
    let tid = unsafe { libc::gettid() } as u32;
    let short = Duration::from_micros(300);
    let lengths = [short, Duration::from_millis(5), Duration::from_millis(20)];
    for after in lengths {
        bed.scenario("other", Place::Nowhere, Touch::Load, context::OTHER, plain(after), 1)?;
    }
    bed.programs.set_thread(tid, 0)?;
    for after in lengths {
        bed.scenario("ring", Place::Ring, Touch::Load, context::WORKER, plain(after), 1)?;
        bed.scenario("buffer", Place::Buffer, Touch::Load, context::WORKER, plain(after), 1)?;
        bed.scenario("tap-write", Place::Buffer, Touch::Write, context::WORKER, plain(after), 1)?;
        bed.scenario("populate", Place::Buffer, Touch::Populate, context::IO_WQ, plain(after), 1)?;
        bed.scenario("populate-noted", Place::Noted, Touch::Populate, context::IO_WQ, plain(after), 1)?;
    }
    bed.scenario("populate-ring", Place::Ring, Touch::Populate, context::IO_WQ, plain(short), 1)?;
    bed.scenario("populate-three", Place::Buffer, Touch::Populate, context::IO_WQ, plain(lengths[1]), 3)?;
    bed.scenario("advise", Place::Buffer, Touch::Advise, context::WORKER, plain(lengths[1]), 2)?;
    let woken = Delivery { wakes: 4, ..plain(lengths[2]) };
    bed.scenario("woken-in-vain", Place::Buffer, Touch::Load, context::WORKER, woken, 1)?;
    bed.scenario("woken-in-vain-io-wq", Place::Buffer, Touch::Populate, context::IO_WQ, woken, 1)?;
    let signalled = Delivery { signals: 4, ..plain(lengths[2]) };
    bed.scenario("signalled", Place::Buffer, Touch::Load, context::WORKER, signalled, 1)?;
    bed.scenario("many", Place::Ring, Touch::Load, context::WORKER, plain(short), 20)?;

    let mut sums = Sums::default();
    let mut events = Events::new(events)?;
    while events.has_more() {
        events.take(|event| sums.add(&event));
    }
    let heard = heard_by_a_loop(&mut bed, &mut events)?;
    let snapshot = bed.reader.snapshot()?;
    println!(
        "{}",
        json!({
            "events": sums.stalls, "events_ns": sums.slept_ns, "events_lost": snapshot.meta.events_lost,
            "sources": sums.sources, "heard": heard,
            "signals": SIGNALS.load(Ordering::Relaxed),
            "standing": snapshot.standing.len(),
        })
    );
    if hold {
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    }
    Ok(())
}

/// What the events say together.
#[derive(Default)]
struct Sums {
    stalls: u32,
    slept_ns: u64,
    sources: BTreeMap<String, u32>,
}

impl Sums {
    fn add(&mut self, event: &Event) {
        self.stalls += u32::from(event.part == 1);
        self.slept_ns += event.slept_ns;
        let context = context::NAMES[event.context as usize];
        let source = source::NAMES[event.source as usize];
        *self.sources.entry(format!("{context} {source}")).or_default() += 1;
    }
}

/// Makes two faults, one after the other, while a loop like the back-end's listens; returns how many it heard of.
fn heard_by_a_loop(bed: &mut Bed, events: &mut Events) -> Result<u32, Box<dyn Error>> {
    let mut reactor: Reactor<()> = Reactor::new()?;
    reactor.poll(events.fd(), libc::POLLIN, ());
    let mut done = Vec::new();
    let mut heard = 0;
    for expected in 1..=2 {
        bed.scenario(
            "heard",
            Place::Buffer,
            Touch::Load,
            context::WORKER,
            plain(Duration::from_millis(1)),
            1,
        )?;
        while heard < expected {
            reactor.turn(true, &mut done, &mut false)?;
            for ((), what) in done.drain(..) {
                match what {
                    Done::Ready(Ok(_), true) => events.wake(),
                    _ => return Err("the poll of the ring buffer has ended".into()),
                }
            }
            events.take(|_| heard += 1);
        }
    }
    Ok(heard)
}

fn plain(after: Duration) -> Delivery {
    Delivery { after, wakes: 0, signals: 0 }
}

fn open_file() -> Result<(File, bool), Box<dyn Error>> {
    if let Ok(tap) = OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        let mut request = [0_u8; 40];
        let flags = (libc::IFF_TAP | libc::IFF_NO_PI) as u16;
        request[16..18].copy_from_slice(&flags.to_ne_bytes());
        // SAFETY: TUNSETIFF takes a struct ifreq of 40 bytes, which lives for the call.
        if unsafe { libc::ioctl(tap.as_raw_fd(), 0x4004_54ca, request.as_mut_ptr()) } == 0 {
            return Ok((tap, true));
        }
    }
    let (reader, writer) = std::io::pipe()?;
    std::mem::forget(reader);
    Ok((File::from(std::os::fd::OwnedFd::from(writer)), false))
}

impl Bed {
    fn scenario(
        &mut self,
        name: &str,
        place: Place,
        touch: Touch,
        context: u32,
        delivery: Delivery,
        pages: usize,
    ) -> Result<(), Box<dyn Error>> {
        let first = place as usize * PAGES + self.next[place as usize];
        self.next[place as usize] += pages;
        assert!(self.next[place as usize] <= PAGES, "{place:?} has no page left");
        for page in first..first + pages {
            self.missing.plan(page, delivery);
            if matches!(place, Place::Noted) {
                let area = Area { port: 1, kind: kind::INDIRECT_TABLE };
                self.programs.note(self.missing.page(page) as u64, Some(area))?;
            }
        }
        let before = self.reader.snapshot()?.histograms;
        let started = Instant::now();
        self.touch(touch, self.missing.page(first), pages)?;
        let wall = started.elapsed();
        // The thread that wakes us may run before the switch to it is over.
        let after = self.reader.snapshot()?;
        let changes: Vec<Value> = after
            .histograms
            .iter()
            .filter(|(key, hist)| before.get(key) != Some(hist))
            .map(|(key, hist)| change(key, before.get(key), hist, &after.ports))
            .collect();
        let (port, kind) = place.key();
        println!(
            "{}",
            json!({
                "scenario": name, "touch": format!("{touch:?}"), "stalls": pages,
                "port": port, "kind": kind::NAMES[kind as usize], "context": context::NAMES[context as usize],
                "after_us": delivery.after.as_micros() as u64, "wall_us": wall.as_micros() as u64, "changes": changes,
            })
        );
        Ok(())
    }

    fn touch(&mut self, touch: Touch, address: usize, pages: usize) -> Result<(), Box<dyn Error>> {
        let len = pages * PAGE;
        match touch {
            Touch::Load => (0..pages).for_each(|page| {
                // SAFETY: a mapped page, which will come.
                unsafe { ((address + page * PAGE) as *const u8).read_volatile() };
            }),
            Touch::Write => (0..pages).try_for_each(|page| {
                // SAFETY: a mapped page, which will come; nobody writes to it meanwhile.
                let bytes = unsafe { std::slice::from_raw_parts((address + page * PAGE) as *const u8, 1000) };
                match self.file.write(bytes) {
                    // The frame is nonsense and the link is down: the kernel has looked at it all the same.
                    Err(_) if self.file_is_tap => Ok(()),
                    other => other.map(drop),
                }
            })?,
            Touch::Advise => {
                // SAFETY: only makes pages present.
                let done = unsafe { libc::madvise(address as *mut _, len, libc::MADV_POPULATE_WRITE) };
                if done != 0 {
                    return Err(std::io::Error::last_os_error().into());
                }
            }
            Touch::Populate => {
                let entry =
                    opcode::Madvise::new(address as *const _, len as i64, libc::MADV_POPULATE_WRITE).build();
                // SAFETY: the range stays mapped.
                unsafe { self.ring.submission().push(&entry)? };
                self.ring.submit_and_wait(1)?;
                let result = self.ring.completion().next().ok_or("no completion")?.result();
                if result != 0 {
                    return Err(std::io::Error::from_raw_os_error(-result).into());
                }
            }
        }
        Ok(())
    }
}

/// What has changed in a histogram.
fn change(key: &Key, before: Option<&Hist>, after: &Hist, ports: &BTreeMap<u32, String>) -> Value {
    let before = before.unwrap_or(&Hist::EMPTY);
    let slots: Vec<Value> = (0..)
        .zip(after.slots.iter().zip(&before.slots))
        .filter(|(_, (now, then))| now != then)
        .map(|(slot, (now, then))| json!([slot as u32, now.wrapping_sub(*then) as i64]))
        .collect();
    json!({
        "port": ports.get(&key.port), "kind": kind::NAMES[key.kind as usize],
        "context": context::NAMES[key.context as usize],
        "slots": slots, "count": after.count - before.count, "sum_us": (after.sum_ns - before.sum_ns) / 1000,
        "max_us": after.max_ns / 1000,
    })
}
