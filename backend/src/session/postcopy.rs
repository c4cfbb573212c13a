//! The phases of a postcopy migration to here: the guest runs before its memory has arrived.
//!
//! ```text
//!            ADVISE             LISTEN               table, slots               ack
//!  idle ─────────────► advised ─────────► listening ─────────────► awaiting ack ─────► armed
//!   ▲ ▲ userfaultfd     │      u64 0         ▲      our addresses        ▲               │ table again (the guest
//!   │ └── a ring starts ┘                    └──────── slots ◄───────────┴───────────────┘ restarts its device)
//!   └──────────────────────────── END, at any time: u64 0 ◄──────────────────────────────
//! ```
//! ADVISE, LISTEN and END come once for each queue pair; all but the first change nothing. Here: the phases, the
//! answers that carry our addresses, and QEMU's ways. Not here: userfaultfd and pages (`postcopy` of the crate).
//!
//! **Allowed and not needed.** Where postcopy is allowed but precopy comes to its end, QEMU (10.0) sends ADVISE when the migration
//! begins, then starts the device as after any precopy: no LISTEN, and no END on that connection, ever. So a ring that starts
//! while advised ends it: the guest runs with all its memory here. A LISTEN after that is refused: what the ring has touched
//! would not have arrived. Between migrations the phase is idle, whichever way they went.
//!
//! **QEMU and several queue pairs.** For pairs after the first QEMU leaves SET_MEM_TABLE out (it is sent once per device)
//! but still reads an answer to it, for ever (QEMU 7.2 to 10.2). With `postcopy_resend` the answer is sent again where
//! QEMU waits for it: after SET_FEATURES of a further pair, or after the GET_STATUS that follows it if STATUS is
//! agreed on. By slots it waits so when a pair starts for the first time only; by a table, whenever the guest restarts its
//! device. A QEMU that does not wait would be thrown off by that, so it is an option.
//!
//! Each pair of QEMU's listens to the one userfaultfd, and reports go to any of them; one that has not had its answer
//! yet drops them ("Failed to find region for fault"). When it has, its rings start: then all who wait report again.
#![forbid(unsafe_code)]

use super::effect::Effect;
use super::handlers::Answer;
use super::message::{RequestId as Id, SingleRegion, TableHead, WireRegion, encode_reply};
use crate::memory::RegionSpec;
use std::fmt;
use zerocopy::IntoBytes;

/// A pair has a receive and a transmit ring.
const RINGS_OF_FIRST_PAIR: u16 = 2;

/// How far a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// There is none.
    #[default]
    Idle,
    /// The front-end has our userfaultfd.
    Advised,
    /// Memory that is mapped now has not arrived.
    Listening,
    /// The front-end has our addresses, or some of them; nothing may be touched.
    AwaitingAck,
    /// Pages may be asked for.
    Armed,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Idle => "idle",
            Self::Advised => "advised",
            Self::Listening => "listening",
            Self::AwaitingAck => "awaiting the front-end's acknowledgement",
            Self::Armed => "armed",
        })
    }
}

/// A step that the owner takes part in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Advise,
    Listen,
    Arm,
    End,
}

impl Step {
    pub fn effect<F>(self) -> Effect<F> {
        match self {
            Self::Advise => Effect::PostcopyAdvise,
            Self::Listen => Effect::PostcopyListen,
            Self::Arm => Effect::PostcopyArm,
            Self::End => Effect::PostcopyEnd,
        }
    }
}

/// How the front-end told us its memory.
#[derive(Debug, Default, PartialEq, Eq)]
enum Told {
    #[default]
    AsTable,
    AsSlots,
}

/// When a further pair's answer is due.
#[derive(Debug, Default, PartialEq, Eq)]
enum Resend {
    #[default]
    No,
    /// After the next GET_STATUS.
    AfterStatus,
}

/// The session's postcopy state.
#[derive(Debug, Default)]
pub(super) struct Postcopy {
    pub phase: Phase,
    /// An END has been answered since the last ADVISE: those of the other pairs follow.
    pub ended: bool,
    /// Regions as answered: with our addresses as user addresses.
    answered: Vec<WireRegion>,
    told: Told,
    resend: Resend,
    /// Which pair of a device that starts SET_FEATURES was sent for last.
    pair: u16,
    /// The last pair that has been answered by slots.
    pair_told: u16,
}

impl Postcopy {
    /// Whether memory that is mapped now has not arrived.
    pub fn is_on(&self) -> bool {
        matches!(self.phase, Phase::Listening | Phase::AwaitingAck | Phase::Armed)
    }

    /// How SET_MEM_TABLE and ADD_MEM_REG are answered now.
    pub fn answer_to_memory(&self) -> Answer {
        if self.is_on() { Answer::Mapped } else { Answer::Ack }
    }

    pub fn table_mapped(&mut self, regions: &[RegionSpec], hosts: Vec<u64>) {
        self.answered.clear();
        if self.is_on() {
            self.told = Told::AsTable;
            self.answered.extend(regions.iter().zip(hosts).map(|(spec, host)| answer_for(spec, host)));
            self.phase = Phase::AwaitingAck;
        }
    }

    pub fn slot_mapped(&mut self, region: RegionSpec, hosts: Vec<u64>) {
        if self.is_on() {
            self.told = Told::AsSlots;
            self.answered.extend(hosts.first().map(|host| answer_for(&region, *host)));
            self.phase = Phase::AwaitingAck;
        }
    }

    pub fn slot_removed(&mut self, region: &RegionSpec) {
        self.answered.retain(|known| (known.guest_phys, known.size) != (region.guest_phys, region.size));
    }

    /// The owner has taken a step.
    pub fn done(&mut self, step: Step) {
        match step {
            Step::Advise => {
                self.phase = Phase::Advised;
                self.ended = false;
            }
            Step::Listen => self.phase = Phase::Listening,
            Step::Arm => self.phase = Phase::Armed,
            Step::End => *self = Self { ended: true, ..Self::default() },
        }
    }

    /// The answer to the table or slot that was mapped last.
    pub fn latest_reply(&self, request: u32) -> Vec<u8> {
        match self.told {
            Told::AsTable => table_reply(request, &self.answered),
            Told::AsSlots => {
                self.answered.last().map_or_else(|| encode_reply(request, &[]), |r| slot_reply(request, *r))
            }
        }
    }

    /// What is to be sent again after the answer to `request`. `running`: some ring runs, so a SET_FEATURES is a further
    /// pair's, not the first one's of a device that starts.
    pub fn resend(&mut self, request: u32, with_status: bool, running: bool) -> Vec<Vec<u8>> {
        if !self.is_on() {
            return Vec::new();
        }
        let mut due =
            request == Id::GetStatus as u32 && std::mem::take(&mut self.resend) == Resend::AfterStatus;
        if request == Id::SetFeatures as u32 {
            self.pair = if running { self.pair.saturating_add(1) } else { 0 };
            let waits = self.pair > 0 && (self.told == Told::AsTable || self.pair > self.pair_told);
            due = waits && !with_status;
            self.resend = if waits && with_status { Resend::AfterStatus } else { Resend::No };
        }
        match self.told {
            _ if !due || self.answered.is_empty() => Vec::new(),
            Told::AsTable => vec![table_reply(Id::SetMemTable as u32, &self.answered)],
            Told::AsSlots => {
                self.pair_told = self.pair;
                self.answered.iter().map(|region| slot_reply(Id::AddMemReg as u32, *region)).collect()
            }
        }
    }

    /// A ring has started: what that means for the migration.
    pub fn ring_started(&self) -> Option<Step> {
        // All memory is here, or LISTEN would have come before.
        (self.phase == Phase::Advised).then_some(Step::End)
    }

    /// Whether reports of missing pages may have been lost until this ring's pair was answered.
    pub fn loses_faults(&self, ring: u16) -> bool {
        self.phase == Phase::Armed && ring >= RINGS_OF_FIRST_PAIR
    }
}

fn answer_for(spec: &RegionSpec, host: u64) -> WireRegion {
    WireRegion {
        guest_phys: spec.guest_phys,
        size: spec.size,
        user_addr: host,
        mmap_offset: spec.mmap_offset,
    }
}

fn table_reply(request: u32, regions: &[WireRegion]) -> Vec<u8> {
    let head = TableHead { regions: regions.len() as u32, padding: 0 };
    encode_reply(request, &[head.as_bytes(), regions.as_bytes()].concat())
}

fn slot_reply(request: u32, region: WireRegion) -> Vec<u8> {
    encode_reply(request, SingleRegion { padding: 0, region }.as_bytes())
}
