//! Drives a session with whatever bytes, fds and outcomes the fuzzer comes up with.
//!
//! The input is a list of reads. Each begins with a byte of choices and a length:
//! ```text
//!   bit 0-3  how many fds come with the read
//!   bit 4    bytes are one message's payload: a correct header is put before it (number: next byte)
//!   bit 5    the owner refuses what this read leads to
//!   bit 6    the owner is slow: the first effect is outstanding until the next read
//!   bit 7    the header asks for a reply
//! ```
//! The first byte chooses whether features are agreed on before (bit 0), and whether tables are sent again in postcopy
//! (bit 1).
//! What has to hold: no panic; the owner is told nothing that makes no sense (it checks); replies are well formed and
//! no more than there were messages; what is kept is bounded; every fd is given back.
#![no_main]

use std::rc::Rc;

use libfuzzer_sys::fuzz_target;
use vhost_user_net::session::{
    BUFFER_BYTES_MAX, ConfigSpace, Effect, HEADER_BYTES, Session, SessionConfig, SessionError, Step,
    protocol_feature, virtio_feature,
};

#[path = "../../src/session/tests/owner.rs"]
mod owner;

/// What `owner` uses.
mod api {
    pub use vhost_user_net::memory::RegionSpec;
    pub use vhost_user_net::session::{Effect, Outcome, RING_SIZE_MAX, RingConfig, TABLE_REGIONS_MAX};
}

use owner::CheckedOwner;

const FEATURES: u64 = 1 << 32 | 1 << 15 | virtio_feature::PROTOCOL_FEATURES | virtio_feature::LOG_ALL;
/// Slots offered.
const MEM_SLOTS: u8 = 4;
/// Numbers from 0 to here are put into headers: all known ones and a few unknown.
const REQUESTS: u8 = 48;

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let header = [request, flags, payload.len() as u32];
    header.iter().flat_map(|word| word.to_ne_bytes()).chain(payload.iter().copied()).collect()
}

/// The session and its surroundings.
struct Lab {
    session: Session<Rc<()>>,
    owner: CheckedOwner,
    /// The effect that a slow owner has, and whether it will refuse it.
    held: Option<(Effect<Rc<()>>, bool)>,
    closed: bool,
    /// Tables are sent again for further queue pairs.
    resend: bool,
}

impl Lab {
    /// Take steps until there are no more.
    fn drain(&mut self, refuse: bool, slow: bool) {
        if let Some((effect, refuse)) = self.held.take() {
            self.session.complete(self.owner.carry_out(&effect, refuse));
        }
        while let Some(step) = self.session.step() {
            assert!(!self.closed, "a step after the last one: {step:?}");
            match step {
                Step::SendUserfaultfd(bytes) => {
                    assert!(self.owner.userfaultfd, "a userfaultfd is sent that nobody has made");
                    assert_eq!(bytes.len(), HEADER_BYTES);
                }
                Step::Send(bytes) => {
                    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
                    assert_eq!((word(4), word(8) as usize), (5, bytes.len() - HEADER_BYTES));
                }
                Step::Effect(effect) => {
                    assert!(self.session.waiting() && self.session.step().is_none());
                    if slow {
                        self.held = Some((effect, refuse));
                        return;
                    }
                    self.session.complete(self.owner.carry_out(&effect, refuse));
                }
                Step::Warn(notice) => assert!(!notice.to_string().is_empty()),
                Step::Close(why) => {
                    assert!(!why.to_string().is_empty());
                    self.closed = true;
                }
            }
        }
        assert!(!self.session.waiting());
    }

    fn check(&self) {
        let session = &self.session;
        assert!(session.buffered() <= BUFFER_BYTES_MAX);
        // A table that came in slots is sent again slot by slot.
        let sent_again = if self.resend { u64::from(MEM_SLOTS) } else { 1 };
        assert!(session.stats().replies <= sent_again.saturating_add(1) * session.stats().messages);
        assert!(!(self.closed && session.wants_input()));
        if !self.closed && self.held.is_none() {
            assert_eq!(session.regions(), self.owner.regions);
            assert!(session.rings().all(|r| r.running == self.owner.rings[usize::from(r.index)].is_some()));
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((&start, mut input)) = input.split_first() else { return };
    let resend = start & 2 != 0;
    let session = Session::new(SessionConfig {
        features: FEATURES,
        protocol_features: u64::MAX,
        queue_pairs: 2,
        max_mem_slots: MEM_SLOTS.into(),
        config_space: ConfigSpace::new(vec![7; 12]),
        mtu_max: 9000,
        postcopy_resend: resend,
    });
    let mut lab = Lab { session, owner: CheckedOwner::new(4), held: None, closed: false, resend };
    let fd = Rc::new(());
    if start & 1 != 0 {
        let agree = [
            message(16, 1, &protocol_feature::IMPLEMENTED.to_ne_bytes()),
            message(2, 1, &(FEATURES & !virtio_feature::LOG_ALL).to_ne_bytes()),
        ];
        lab.session.feed(&agree.concat(), Vec::new()).expect("two messages");
        lab.drain(false, false);
        assert!(!lab.closed);
    }
    while let [choices, length, rest @ ..] = input {
        let (bytes, rest) = rest.split_at(usize::from(*length).min(rest.len()));
        input = rest;
        let framed;
        let chunk = match bytes.split_first() {
            Some((request, payload)) if choices & 0x10 != 0 => {
                let flags = 1 | u32::from(choices & 0x80) >> 4;
                framed = message((request % REQUESTS).into(), flags, payload);
                &framed[..]
            }
            _ => bytes,
        };
        match lab.session.feed(chunk, vec![fd.clone(); usize::from(choices & 0xf)]) {
            Ok(()) => {}
            Err(SessionError::Flooded { bytes }) => assert!(bytes > BUFFER_BYTES_MAX),
            Err(other) => panic!("{other}"),
        }
        lab.drain(choices & 0x20 != 0, choices & 0x40 != 0);
        lab.check();
    }
    drop(lab);
    assert_eq!(Rc::strong_count(&fd), 1, "an fd was lost");
});
