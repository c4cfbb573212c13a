//! Many ports at one worker: shares beside a greedy one, and what those cost that have nothing to do. By counts, not times.
#![forbid(unsafe_code)]

use super::rig::{BUFFERS, FEATURES, kick, nonblocking};
use crate::config::Poll;
use crate::memory::testing::guest;
use crate::net::counters::PairCounters;
use crate::reactor::Reactor;
use crate::uplink::testing::FakeUplink;
use crate::virtq::tests::driver::{Driver, MEM_SIZE};
use crate::worker::datapath::Datapath;
use crate::worker::{Attachment, Command, Direction, PairKey, PairToken};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Entries of a ring: more than a turn takes.
const SIZE: u16 = 1024;
/// What one ring gets in a round at most.
const TURN: u64 = 256;
/// Rounds until everybody has been served: the kernel hands over some 20 kicks at once.
const ROUNDS: u32 = 5;
/// Time from round to round.
const TICK: Duration = Duration::from_micros(5);

/// One of the ports: a driver that sends.
struct Port {
    tx: Driver,
    kick: Arc<OwnedFd>,
    counters: Arc<PairCounters>,
}

impl Port {
    /// Offers so many frames, and kicks if that is wanted.
    fn send(&self, count: u16) {
        for _ in 0..count {
            self.tx.offer_one(self.tx.avail_idx() % SIZE, BUFFERS, 72, 0);
        }
        if self.tx.used_flags() == 0 {
            kick(&self.kick);
        }
    }

    fn sent(&self) -> u64 {
        self.counters.read().tx_packets
    }
}

struct Ports {
    reactor: Reactor<PairToken>,
    datapath: Datapath,
    all: Vec<Port>,
    now: Instant,
}

impl Ports {
    fn new(count: u16, poll: Poll) -> Self {
        let mut datapath = Datapath::new(poll, Arc::default());
        let mut reactor = Reactor::new().unwrap();
        let port = |id| {
            let (memory, file) = guest(MEM_SIZE);
            let tx = Driver::sharing(memory.clone(), file, 0, SIZE);
            let (kick, counters) = (nonblocking(), Arc::<PairCounters>::default());
            let key = PairKey { port: id, pair: 0 };
            let uplink = Box::new(FakeUplink::new());
            datapath.attach(Attachment { key, uplink, counters: counters.clone(), peers: Vec::new() });
            let config = tx.config;
            let start = Command::Start {
                direction: Direction::Transmit,
                config,
                kick: Some(kick.clone()),
                enabled: true,
            };
            for command in [Command::Features(FEATURES), Command::Memory(memory), start] {
                datapath.command(&mut reactor, key, command);
            }
            Port { tx, kick, counters }
        };
        let all = (0..count).map(port).collect();
        let mut ports = Self { reactor, datapath, all, now: Instant::now() };
        ports.rest();
        ports
    }

    /// One turn of the loop. True if it would not sleep.
    fn turn(&mut self) -> bool {
        let (mut done, mut mail) = (Vec::new(), false);
        self.reactor.turn(false, &mut done, &mut mail).unwrap();
        for (token, done) in done {
            self.datapath.completion(&mut self.reactor, token, &done);
        }
        self.now += TICK;
        let goes_on = self.datapath.round_at(&mut self.reactor, self.now);
        self.datapath.outbox().clear();
        goes_on
    }

    /// Turns until it would sleep, or a while if it never does.
    fn rest(&mut self) {
        for _ in 0..100 {
            self.turn();
        }
    }
}

fn auto() -> Poll {
    Poll::Auto(Duration::from_micros(200))
}

#[test]
fn a_greedy_port_gets_its_turn_and_no_more() {
    for poll in [Poll::Never, auto(), Poll::Always] {
        let mut ports = Ports::new(64, poll);
        ports.all[0].send(SIZE);
        ports.turn();
        assert_eq!(ports.all[0].sent(), TURN);
        for _ in 0..20 {
            let before: Vec<_> = ports.all[1..].iter().map(Port::sent).collect();
            ports.all[1..].iter().for_each(|port| port.send(3));
            for _ in 0..ROUNDS {
                // It has always more than it gets.
                ports.all[0].send(TURN as u16);
                let had = ports.all[0].sent();
                ports.turn();
                assert_eq!(ports.all[0].sent() - had, TURN, "{poll}");
            }
            for (port, before) in ports.all[1..].iter().zip(before) {
                assert_eq!(port.sent() - before, 3, "{poll}");
            }
        }
    }
}

#[test]
fn only_ports_with_traffic_are_looked_at() {
    for count in [1, 16, 64, 256] {
        let mut ports = Ports::new(count, auto());
        assert_eq!(ports.datapath.hot(), 0, "all sleep");
        // One of them is busy for long: the others cost it nothing.
        for _ in 0..200 {
            ports.all[0].send(4);
            assert!(ports.turn() || ports.all[0].tx.used_flags() == 0);
            assert!(ports.datapath.hot() <= 1);
        }
        assert_eq!((ports.all[0].sent(), ports.datapath.hot()), (800, 1));
        let kicks: u64 = ports.all.iter().map(|port| port.counters.read().kicks).sum();
        assert!(kicks <= 10, "{kicks}");
        ports.rest();
        assert_eq!(ports.datapath.hot(), 0);
        // Asleep, every one of them wakes it.
        for port in &ports.all {
            assert_eq!(port.tx.used_flags(), 0);
            port.send(1);
        }
        ports.turn();
        ports.rest();
        let sent: u64 = ports.all.iter().map(Port::sent).sum();
        assert_eq!(sent, 800 + u64::from(count));
    }
}

/// A port that was busy and is not any more is left to its kicks, though the worker goes on polling for another.
#[test]
fn a_port_cools_down_beside_a_hot_one() {
    let mut ports = Ports::new(2, auto());
    for _ in 0..50 {
        ports.all.iter().for_each(|port| port.send(4));
        ports.turn();
    }
    assert_eq!(ports.datapath.hot(), 2);
    for _ in 0..50 {
        ports.all[0].send(4);
        assert!(ports.turn());
    }
    assert_eq!((ports.datapath.hot(), ports.all[1].tx.used_flags()), (1, 0));
    ports.all[1].send(1);
    ports.turn();
    assert_eq!((ports.datapath.hot(), ports.all[1].sent()), (2, 201));
}
