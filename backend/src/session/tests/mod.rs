//! Tests of the session. Here: the front-end and the owner that they are driven by.
//!
//! `handlers`: one message each, right and wrong. `replay`: what real front-ends sent. `stream`: framing, and random
//! input. `owner`: a checking owner, shared with the fuzz target.

mod device;
mod features;
mod memory;
mod owner;
mod postcopy;
mod replay;
mod rings;
mod stream;
mod table;

/// What `owner` uses; the fuzz target has its own.
mod api {
    pub(super) use crate::memory::RegionSpec;
    pub(super) use crate::session::{Effect, Outcome, RING_SIZE_MAX, RingConfig, TABLE_REGIONS_MAX};
}

use zerocopy::{FromBytes, IntoBytes};

use super::message::{Header, RequestId as Id, SingleRegion, TableHead, VringAddr, VringState, WireRegion};
use super::*;
use owner::CheckedOwner;

/// A file descriptor of the tests: its number.
#[derive(Debug, PartialEq, Eq)]
struct Fd(u32);

/// Header flags of a message without and with need_reply.
const PLAIN: u32 = 0x1;
const NEED_REPLY: u32 = 0x9;

/// What the tests' session offers, besides all implemented protocol features.
const FEATURES: u64 = 1 << 32 | virtio_feature::PROTOCOL_FEATURES | virtio_feature::LOG_ALL | 1 << 15;

fn config() -> SessionConfig {
    SessionConfig {
        features: FEATURES,
        protocol_features: u64::MAX,
        queue_pairs: 2,
        max_mem_slots: 4,
        config_space: ConfigSpace::new((0..12).collect()),
        mtu_max: 9000,
        postcopy_resend: false,
    }
}

/// The bytes of one message.
fn message(id: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let header = Header { request: id, flags, size: payload.len() as u32 };
    [header.as_bytes(), payload].concat()
}

fn state(index: u32, num: u32) -> Vec<u8> {
    VringState { index, num }.as_bytes().to_vec()
}

fn addr(index: u32, log: bool) -> Vec<u8> {
    let desc_user = 0x7000_0000 + u64::from(index) * 0x1_0000;
    VringAddr {
        index,
        flags: log.into(),
        desc_user,
        used_user: desc_user + 0x2000,
        avail_user: desc_user + 0x1000,
        log_guest: 0x2000 + u64::from(index) * 0x1_0000,
    }
    .as_bytes()
    .to_vec()
}

/// A region of 2 MiB; number n is at n GiB in the guest.
fn region(n: u64) -> WireRegion {
    WireRegion { guest_phys: n << 30, size: 2 << 20, user_addr: 0x7000_0000 + (n << 30), mmap_offset: 0 }
}

fn spec(n: u64) -> crate::memory::RegionSpec {
    region(n).into()
}

fn table(regions: &[WireRegion]) -> Vec<u8> {
    [TableHead { regions: regions.len() as u32, padding: 0 }.as_bytes(), regions.as_bytes()].concat()
}

fn slot(n: u64) -> Vec<u8> {
    SingleRegion { padding: 0, region: region(n) }.as_bytes().to_vec()
}

/// The one u64 of a reply, having checked the rest of it.
fn reply_u64(id: Id, steps: &[Step<Fd>]) -> u64 {
    u64::read_from_bytes(&reply(id, steps)).expect("8 bytes of payload")
}

/// The payload of the one reply among steps.
fn reply(id: Id, steps: &[Step<Fd>]) -> Vec<u8> {
    let mut sent = steps.iter().filter_map(|step| match step {
        Step::Send(bytes) => Some(bytes),
        _ => None,
    });
    let bytes = sent.next().unwrap_or_else(|| panic!("no reply in {steps:?}"));
    assert!(sent.next().is_none(), "two replies in {steps:?}");
    let (header, payload) = Header::read_from_prefix(bytes).unwrap();
    assert_eq!((header.request, header.flags, header.size as usize), (id as u32, 5, payload.len()));
    payload.to_vec()
}

fn effects(steps: Vec<Step<Fd>>) -> Vec<Effect<Fd>> {
    steps
        .into_iter()
        .filter_map(|step| if let Step::Effect(effect) = step { Some(effect) } else { None })
        .collect()
}

/// The one refusal among steps, which must not contain an effect.
fn refusal(steps: &[Step<Fd>]) -> &Refusal {
    let mut refusals = steps.iter().filter_map(|step| match step {
        Step::Warn(Notice { what: Matter::Refused(why), .. }) => Some(why),
        Step::Effect(effect) => panic!("{effect:?} of a refused message"),
        _ => None,
    });
    refusals.next().unwrap_or_else(|| panic!("no refusal in {steps:?}"))
}

/// A front-end and an owner around a session.
struct Lab {
    session: Session<Fd>,
    owner: CheckedOwner,
    /// How many effects from now are carried out before one is refused.
    refuse_after: Option<usize>,
    fds: u32,
}

impl Lab {
    fn with(cfg: SessionConfig) -> Self {
        let owner = CheckedOwner::new(2 * usize::from(cfg.queue_pairs));
        Self { session: Session::new(cfg), owner, refuse_after: None, fds: 0 }
    }

    /// A session that has agreed on all that is offered, but LOG_ALL.
    fn agreed() -> Self {
        let mut lab = Self::with(config());
        lab.send(Id::SetProtocolFeatures, &protocol_feature::IMPLEMENTED.to_ne_bytes(), 0);
        lab.send(Id::SetFeatures, &(FEATURES & !virtio_feature::LOG_ALL).to_ne_bytes(), 0);
        lab
    }

    /// A session with memory and rings 0 and 1 running and enabled.
    fn running() -> Self {
        let mut lab = Self::agreed();
        lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
        for index in 0..2 {
            lab.ring_up(index);
            lab.send(Id::SetVringEnable, &state(index, 1), 0);
        }
        assert!(lab.owner.rings[0].is_some() && lab.owner.rings[1].is_some());
        lab
    }

    /// The messages of a ring's start, in QEMU's order.
    fn ring_up(&mut self, index: u32) -> Vec<Step<Fd>> {
        self.send(Id::SetVringNum, &state(index, 256), 0);
        self.send(Id::SetVringBase, &state(index, 7), 0);
        self.send(Id::SetVringAddr, &addr(index, false), 0);
        self.send(Id::SetVringKick, &u64::from(index).to_ne_bytes(), 1)
    }

    /// Send a message without need_reply, carry out what follows, and return it.
    fn send(&mut self, id: Id, payload: &[u8], fds: u32) -> Vec<Step<Fd>> {
        self.send_raw(id as u32, PLAIN, payload, fds)
    }

    /// The same with need_reply.
    fn ask(&mut self, id: Id, payload: &[u8], fds: u32) -> Vec<Step<Fd>> {
        self.send_raw(id as u32, NEED_REPLY, payload, fds)
    }

    fn send_raw(&mut self, id: u32, flags: u32, payload: &[u8], fds: u32) -> Vec<Step<Fd>> {
        let fds = self.new_fds(fds);
        self.session.feed(&message(id, flags, payload), fds).expect("little input");
        self.drain()
    }

    fn new_fds(&mut self, count: u32) -> Vec<Fd> {
        self.fds += count;
        (self.fds - count..self.fds).map(Fd).collect()
    }

    fn drain(&mut self) -> Vec<Step<Fd>> {
        let mut steps = Vec::new();
        while let Some(step) = self.session.step() {
            if let Step::Effect(effect) = &step {
                assert!(self.session.waiting());
                assert_eq!(self.session.step(), None, "a step while an effect is outstanding");
                let refuse = self.refuse_after == Some(0);
                self.refuse_after = self.refuse_after.and_then(|count| count.checked_sub(1));
                let outcome = self.owner.carry_out(effect, refuse);
                self.session.complete(outcome);
            }
            steps.push(step);
        }
        steps
    }
}
