//! One queue pair with all that it needs, driven turn by turn.
#![forbid(unsafe_code)]

use crate::config::Poll;
use crate::memory::testing::guest;
use crate::memory::{GuestMemory, ResidencyMap};
use crate::net::counters::PairCounters;
use crate::reactor::{Done, Reactor};
use crate::uplink::UplinkQueue;
use crate::uplink::testing::FakeUplink;
use crate::virtq::tests::driver::{Driver, MEM_SIZE, WRITE};
use crate::worker::datapath::Datapath;
use crate::worker::{Attachment, Command, Direction, Event, PairKey, PairToken, Reply, ToControl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub const KEY: PairKey = PairKey { port: 0, pair: 0 };
pub const BUFFERS: u64 = 0x4_0000;
/// Where the transmit ring lies, next to the receive ring.
const TX_ORIGIN: u64 = 0x8000;
pub const SIZE: u16 = 64;
/// Longest header; VERSION_1 and MRG_RXBUF are on.
pub const FEATURES: u64 = 1 << 32 | 1 << 15;

pub fn eventfd(count: u64, flags: EfdFlags) -> Arc<OwnedFd> {
    let event = EventFd::from_flags(flags | EfdFlags::EFD_CLOEXEC).unwrap();
    let fd = OwnedFd::from(event);
    if count > 0 {
        nix::unistd::write(&fd, &count.to_ne_bytes()).unwrap();
    }
    Arc::new(fd)
}

pub fn nonblocking() -> Arc<OwnedFd> {
    eventfd(0, EfdFlags::EFD_NONBLOCK)
}

/// What an eventfd counts; resets it. The descriptor may block: asked only if there is something.
pub fn count(fd: &Arc<OwnedFd>) -> u64 {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut polled = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    if poll(&mut polled, PollTimeout::ZERO).unwrap() == 0 {
        return 0;
    }
    let mut bytes = [0; 8];
    nix::unistd::read(fd.as_fd(), &mut bytes).unwrap();
    u64::from_ne_bytes(bytes)
}

pub fn kick(fd: &Arc<OwnedFd>) {
    nix::unistd::write(fd, &1u64.to_ne_bytes()).unwrap();
}

pub struct Rig {
    pub reactor: Reactor<PairToken>,
    pub datapath: Datapath,
    pub uplink: FakeUplink,
    pub memory: GuestMemory,
    pub rx: Driver,
    pub tx: Driver,
    pub rx_kick: Arc<OwnedFd>,
    pub tx_kick: Arc<OwnedFd>,
    pub rx_call: Arc<OwnedFd>,
    pub tx_call: Arc<OwnedFd>,
    pub counters: Arc<PairCounters>,
    pub events: Vec<Event>,
}

impl Rig {
    /// A pair with memory, features and calls, no ring started.
    pub fn new() -> Self {
        let uplink = FakeUplink::new();
        Self::with_uplink(uplink.clone(), Box::new(uplink))
    }

    /// The same, with a worker that may poll.
    pub fn polling(poll: Poll) -> Self {
        let uplink = FakeUplink::new();
        Self::with(poll, uplink.clone(), Box::new(uplink))
    }

    /// The same, with a real uplink in place of the scripted one.
    pub fn with_uplink(uplink: FakeUplink, queue: Box<dyn UplinkQueue>) -> Self {
        Self::with(Poll::Never, uplink, queue)
    }

    fn with(poll: Poll, uplink: FakeUplink, queue: Box<dyn UplinkQueue>) -> Self {
        let (memory, file) = guest(MEM_SIZE);
        let rx = Driver::sharing(memory.clone(), file.try_clone().unwrap(), 0, SIZE);
        let tx = Driver::sharing(memory.clone(), file, TX_ORIGIN, SIZE);
        let counters = Arc::<PairCounters>::default();
        let mut datapath = Datapath::new(poll, Arc::default());
        datapath.attach(Attachment {
            key: KEY,
            uplink: queue,
            counters: counters.clone(),
            peers: Vec::new(),
        });
        let mut rig = Self {
            reactor: Reactor::new().unwrap(),
            datapath,
            uplink,
            memory: memory.clone(),
            rx,
            tx,
            rx_kick: nonblocking(),
            tx_kick: nonblocking(),
            rx_call: nonblocking(),
            tx_call: nonblocking(),
            counters,
            events: Vec::new(),
        };
        rig.done(Command::Features(FEATURES));
        rig.done(Command::Memory(memory));
        for (direction, fd) in
            [(Direction::Receive, rig.rx_call.clone()), (Direction::Transmit, rig.tx_call.clone())]
        {
            rig.done(Command::Call { direction, fd: Some(fd) });
        }
        rig
    }

    /// Both rings run and are enabled.
    pub fn running() -> Self {
        let mut rig = Self::new();
        rig.start(Direction::Receive, true);
        rig.start(Direction::Transmit, true);
        rig.settle();
        rig
    }

    pub fn command(&mut self, command: Command) -> Reply {
        self.datapath.command(&mut self.reactor, KEY, command);
        let mut replies = Vec::new();
        for message in self.datapath.outbox().drain(..) {
            match message {
                ToControl::Reply(KEY, reply) => replies.push(reply),
                ToControl::Event(_, event) => self.events.push(event),
                ToControl::Reply(..) => panic!("for another pair"),
            }
        }
        assert_eq!(replies.len(), 1, "each command has one reply");
        replies.remove(0)
    }

    pub fn done(&mut self, command: Command) {
        let reply = self.command(command);
        assert!(matches!(reply, Reply::Done), "{reply:?}");
    }

    /// Pages have arrived: the one command without a reply.
    pub fn arrived(&mut self) {
        self.datapath.command(&mut self.reactor, KEY, Command::Arrived);
    }

    pub fn start(&mut self, direction: Direction, enabled: bool) {
        let (config, kick) = match direction {
            Direction::Receive => (self.rx.config, self.rx_kick.clone()),
            Direction::Transmit => (self.tx.config, self.tx_kick.clone()),
        };
        self.done(Command::Start { direction, config, kick: Some(kick), enabled });
    }

    pub fn stop(&mut self, direction: Direction) -> u32 {
        match self.command(Command::Stop { direction }) {
            Reply::Base(base) => base,
            other => panic!("{other:?}"),
        }
    }

    pub fn enable(&mut self, direction: Direction, enabled: bool) {
        self.done(Command::Enable { direction, enabled });
    }

    /// One turn of the loop, without waiting. True if something happened.
    pub fn turn(&mut self) -> bool {
        self.turn_at(Instant::now())
    }

    /// The same; it is so late. True also if the loop would not sleep.
    pub fn turn_at(&mut self, now: Instant) -> bool {
        let began = Instant::now();
        let (mut done, mut mail) = (Vec::new(), false);
        self.reactor.turn(false, &mut done, &mut mail).unwrap();
        let happened = !done.is_empty();
        for (token, done) in done {
            self.completion(token, &done);
        }
        let busy = self.datapath.round_at(&mut self.reactor, now);
        for message in self.datapath.outbox().drain(..) {
            match message {
                ToControl::Event(_, event) => self.events.push(event),
                ToControl::Reply(..) => panic!("a reply without a command"),
            }
        }
        assert!(began.elapsed() < Duration::from_secs(2), "the loop was held up");
        happened || busy
    }

    pub fn completion(&mut self, token: PairToken, done: &Done) {
        self.datapath.completion(&mut self.reactor, token, done);
    }

    /// Turns until nothing happens any more.
    pub fn settle(&mut self) {
        let began = Instant::now();
        let mut quiet = 0;
        // Work of io_uring's own threads may take a moment to show.
        while quiet < 3 {
            quiet = if self.turn() { 0 } else { quiet + 1 };
            if quiet > 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(began.elapsed() < Duration::from_secs(20), "the loop never rests");
        }
    }

    /// Turns until `what` holds.
    pub fn settle_until(&mut self, mut what: impl FnMut(&mut Self) -> bool) {
        let began = Instant::now();
        while !what(self) {
            self.turn();
            assert!(began.elapsed() < Duration::from_secs(20), "it never came");
        }
    }

    /// The guest sends a frame of `len` bytes that begins with `mark`; no kick.
    pub fn guest_sends(&mut self, mark: u8, len: u32) {
        let slot = self.tx.avail_idx() % SIZE;
        let at = BUFFERS + u64::from(slot) * 0x800;
        self.tx.put(at, &[0; 12]);
        self.tx.put(at + 12, &vec![mark; len as usize]);
        self.tx.offer_one(slot, at, 12 + len, 0);
    }

    /// The guest offers a buffer; no kick.
    pub fn guest_offers(&mut self, len: u32) {
        let slot = self.rx.avail_idx() % SIZE;
        self.rx.offer_one(slot, BUFFERS + 0x4_0000 + u64::from(slot) * 0x800, len, WRITE);
    }

    /// A frame of `len` bytes that begins with `mark` arrives at the uplink.
    pub fn uplink_delivers(&mut self, mark: u8, len: usize) {
        let mut frame = vec![0; 12];
        frame.resize(12 + len, mark);
        self.uplink.deliver(frame);
    }

    /// The first bytes of the frames that went out.
    pub fn marks(&mut self) -> Vec<u8> {
        self.uplink.sent().iter().map(|frame| frame[12]).collect()
    }

    /// From now on the guest's pages from `present` on are missing.
    pub fn lose_pages(&mut self, present: u64) -> Arc<ResidencyMap> {
        let map = Arc::new(ResidencyMap::new(MEM_SIZE, 0x1000));
        map.set_present(0..present);
        let memory = self.memory.with_residency(&[Some(map.clone())]);
        self.done(Command::Memory(memory));
        map
    }

    /// How many places of the program hold this descriptor.
    pub fn holders(fd: &Arc<OwnedFd>) -> usize {
        Arc::strong_count(fd)
    }
}
