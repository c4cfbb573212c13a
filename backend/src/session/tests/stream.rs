//! The byte stream: pieces, several messages in one read, fds, limits; and random input.

use std::rc::Rc;

use proptest::prelude::*;

use super::*;

fn close(steps: &[Step<Fd>]) -> &SessionError {
    match steps {
        [.., Step::Close(why)] => why,
        _ => panic!("not closed: {steps:?}"),
    }
}

fn feed(lab: &mut Lab, bytes: &[u8], fds: u32) -> Vec<Step<Fd>> {
    let fds = lab.new_fds(fds);
    lab.session.feed(bytes, fds).unwrap();
    lab.drain()
}

/// The kernel glues messages without fds to one with: `[A][B][KICK + fd]`.
#[test]
fn fds_belong_to_the_last_message_that_begins_in_a_read() {
    let mut lab = Lab::agreed();
    lab.send(Id::SetMemTable, &table(&[region(0)]), 1);
    let glued = [
        message(Id::SetVringNum as u32, PLAIN, &state(0, 256)),
        message(Id::SetVringAddr as u32, PLAIN, &addr(0, false)),
        message(Id::SetVringKick as u32, PLAIN, &0u64.to_ne_bytes()),
    ]
    .concat();
    let told = effects(feed(&mut lab, &glued, 1));
    assert!(matches!(told[..], [Effect::StartRing { index: 0, kick: Some(Fd(1)), .. }]), "{told:?}");
}

#[test]
fn fds_stay_with_a_message_that_comes_in_pieces() {
    let bytes = message(Id::SetVringCall as u32, PLAIN, &1u64.to_ne_bytes());
    for cut in 1..bytes.len() {
        let mut lab = Lab::agreed();
        assert_eq!(feed(&mut lab, &bytes[..cut], 1), []);
        assert_eq!(lab.session.buffered(), cut);
        let told = effects(feed(&mut lab, &bytes[cut..], 0));
        assert_eq!(told, [Effect::SetCall { index: 1, fd: Some(Fd(0)) }]);
    }
}

#[test]
fn fds_in_the_middle_of_a_message_end_the_connection() {
    let mut lab = Lab::agreed();
    let bytes = message(Id::SetVringCall as u32, PLAIN, &1u64.to_ne_bytes());
    feed(&mut lab, &bytes[..5], 0);
    assert_eq!(close(&feed(&mut lab, &bytes[5..9], 1)), &SessionError::FdsWithoutMessage { count: 1 });
}

#[test]
fn more_fds_than_any_message_has_end_the_connection() {
    let mut lab = Lab::agreed();
    let bytes = message(Id::SetOwner as u32, PLAIN, &[]);
    assert_eq!(close(&feed(&mut lab, &bytes, 9)), &SessionError::TooManyFds { count: 9 });
}

#[test]
fn headers_that_break_the_stream_end_the_connection_after_what_came_before() {
    let cases = [
        (message(5, 0x0, &[]), SessionError::Version { request: 5, flags: 0 }),
        (message(5, 0x2, &[]), SessionError::Version { request: 5, flags: 2 }),
        (message(5, 0x3, &[]), SessionError::Version { request: 5, flags: 3 }),
        (message(5, 0x5, &[]), SessionError::UnexpectedReply { request: 5 }),
        (message(5, 0x1, &[0; 4097]), SessionError::Oversized { request: 5, size: 4097 }),
        (
            Header { request: 1, flags: 1, size: u32::MAX }.as_bytes().to_vec(),
            SessionError::Oversized { request: 1, size: u32::MAX },
        ),
    ];
    for (bad, why) in cases {
        let mut lab = Lab::agreed();
        let steps = feed(&mut lab, &[message(1, PLAIN, &[]), bad].concat(), 2);
        assert_eq!(reply_u64(Id::GetFeatures, &steps), FEATURES);
        assert_eq!(close(&steps), &why);
        assert!(!lab.session.wants_input());
        assert_eq!(feed(&mut lab, &message(1, PLAIN, &[]), 1), []);
        assert_eq!(lab.session.buffered(), 0);
    }
}

/// Bits that the specification does not define are no reason to stop talking.
#[test]
fn unknown_flags_are_ignored() {
    let mut lab = Lab::agreed();
    assert_eq!(reply_u64(Id::GetFeatures, &lab.send_raw(1, 0xffff_fff1, &[], 0)), FEATURES);
}

#[test]
fn messages_wait_while_an_effect_is_outstanding() {
    let mut lab = Lab::agreed();
    let bytes = [
        message(Id::SetVringCall as u32, PLAIN, &0x100u64.to_ne_bytes()),
        message(Id::GetFeatures as u32, PLAIN, &[]),
    ]
    .concat();
    lab.session.feed(&bytes, vec![]).unwrap();
    assert!(matches!(lab.session.step(), Some(Step::Effect(_))));
    assert!(lab.session.waiting());
    assert_eq!(lab.session.step(), None);
    assert_eq!(lab.session.buffered(), HEADER_BYTES);
    lab.session.complete(Outcome::Done);
    assert!(matches!(lab.session.step(), Some(Step::Send(_))));
    assert_eq!(lab.session.step(), None);
}

#[test]
fn what_waits_is_bounded() {
    let mut lab = Lab::agreed();
    lab.session.feed(&message(Id::SetVringCall as u32, PLAIN, &0x100u64.to_ne_bytes()), vec![]).unwrap();
    assert!(lab.session.step().is_some());
    let big = message(1000, PLAIN, &[0; 1000]);
    while lab.session.wants_input() {
        lab.session.feed(&big, vec![]).unwrap();
    }
    assert!(lab.session.buffered() < BUFFER_BYTES_SOFT + big.len());
    let flood = vec![0; BUFFER_BYTES_MAX];
    assert!(matches!(lab.session.feed(&flood, vec![]), Err(SessionError::Flooded { .. })));
    // When the effect is done, all that came before is still handled.
    lab.session.complete(Outcome::Done);
    lab.drain();
    assert_eq!(lab.session.buffered(), 0);
    assert!(lab.session.wants_input());
    // Fds are bounded too.
    lab.session.feed(&message(Id::SetVringCall as u32, PLAIN, &0x100u64.to_ne_bytes()), vec![]).unwrap();
    assert!(lab.session.step().is_some());
    let mut fds = 0;
    while lab.session.wants_input() {
        let eight = lab.new_fds(8);
        lab.session.feed(&message(1000, PLAIN, &[]), eight).unwrap();
        fds += 8;
    }
    assert_eq!(fds, BUFFER_FDS_SOFT);
}

/// A message of the tests' streams: number, flags, payload, fds.
#[derive(Clone, Debug)]
struct Sent {
    id: u32,
    flags: u32,
    payload: Vec<u8>,
    fds: usize,
}

/// Mostly messages that make sense in some order, some that make none.
fn any_message() -> impl Strategy<Value = Sent> {
    let index = 0u32..5;
    let body = prop_oneof![
        Just((Id::GetFeatures, vec![], 0)),
        Just((Id::GetStatus, vec![], 0)),
        prop_oneof![Just(0), Just(virtio_feature::LOG_ALL), Just(1 << 30), Just(1 << 40)].prop_map(
            |toggle| {
                let features: u64 = (FEATURES & !virtio_feature::LOG_ALL) ^ toggle;
                (Id::SetFeatures, features.to_ne_bytes().to_vec(), 0)
            }
        ),
        (0u64..4).prop_map(|n| (Id::AddMemReg, slot(n), 1)),
        (0u64..4, 0usize..2).prop_map(|(n, fds)| (Id::RemMemReg, slot(n), fds)),
        (1u64..4)
            .prop_map(|n| { (Id::SetMemTable, table(&(0..n).map(region).collect::<Vec<_>>()), n as usize) }),
        (0u64..2).prop_map(|n| (Id::SetLogBase, [(n << 13).to_ne_bytes(), [0; 8]].concat(), 1)),
        (index.clone(), 0u32..20).prop_map(|(i, power)| (Id::SetVringNum, state(i, 1 << power), 0)),
        (index.clone(), any::<bool>()).prop_map(|(i, log)| (Id::SetVringAddr, addr(i, log), 0)),
        (index.clone(), any::<u16>()).prop_map(|(i, base)| (Id::SetVringBase, state(i, base.into()), 0)),
        index.clone().prop_map(|i| (Id::GetVringBase, state(i % 4, 0), 0)),
        (index.clone(), 0u32..3).prop_map(|(i, on)| (Id::SetVringEnable, state(i, on), 0)),
        (index, 0usize..2, 0usize..3).prop_map(|(i, fds, which)| {
            let id = [Id::SetVringKick, Id::SetVringCall, Id::SetVringErr][which];
            let value = u64::from(i) | if fds == 0 { 0x100 } else { 0 };
            (id, value.to_ne_bytes().to_vec(), fds)
        }),
        (0u64..3).prop_map(|status| (Id::SetStatus, (status * 7).to_ne_bytes().to_vec(), 0)),
        Just((Id::ResetDevice, vec![], 0)),
        Just((Id::SendRarp, vec![2; 8], 0)),
    ];
    let sound = (body, any::<bool>()).prop_map(|((id, payload, fds), need_reply)| Sent {
        id: id as u32,
        flags: if need_reply { NEED_REPLY } else { PLAIN },
        payload,
        fds,
    });
    let wild = (0u32..50, any::<bool>(), proptest::collection::vec(any::<u8>(), 0..60), 0usize..9).prop_map(
        |(id, need_reply, payload, fds)| Sent {
            id,
            flags: if need_reply { NEED_REPLY } else { PLAIN },
            payload,
            fds,
        },
    );
    prop_oneof![9 => sound, 1 => wild]
}

fn agreed_lab(refusals: Option<usize>) -> Lab {
    let mut lab = Lab::agreed();
    lab.refuse_after = refusals;
    lab
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// However a stream is cut into reads, the steps are the same. Cuts are where the kernel could make them: what
    /// begins after a message with fds begins in another read.
    #[test]
    fn any_split_gives_the_same_steps(
        messages in proptest::collection::vec(any_message(), 1..30),
        cuts in proptest::collection::vec(1usize..90, 0..60),
    ) {
        let mut whole = agreed_lab(None);
        let mut expected = Vec::new();
        for m in &messages {
            expected.extend(whole.send_raw(m.id, m.flags, &m.payload, m.fds as u32));
        }

        let bytes: Vec<u8> = messages.iter().flat_map(|m| message(m.id, m.flags, &m.payload)).collect();
        // Where each message begins, and how many fds come with that byte.
        let mut begins = Vec::new();
        let mut at = 0;
        for m in &messages {
            begins.push((at, m.fds));
            at += HEADER_BYTES + m.payload.len();
        }
        let mut ends: Vec<usize> = cuts.iter().scan(0, |at, cut| { *at += cut; Some(*at) }).collect();
        ends.extend(begins.windows(2).filter(|pair| pair[0].1 > 0).map(|pair| pair[1].0));
        ends.push(bytes.len());
        ends.retain(|end| *end <= bytes.len());
        ends.sort_unstable();
        ends.dedup();

        let mut pieces = agreed_lab(None);
        let (mut steps, mut from) = (Vec::new(), 0);
        for end in ends {
            let fds = begins.iter().filter(|(at, _)| (from..end).contains(at)).map(|(_, fds)| *fds as u32).sum();
            steps.extend(feed(&mut pieces, &bytes[from..end], fds));
            from = end;
        }
        prop_assert_eq!(steps, expected);
    }

    /// Exactly one reply to each message that asks for one, at most one to any, none after the end; and the owner
    /// is never told nonsense (it checks), whatever it refuses.
    #[test]
    fn every_need_reply_gets_exactly_one_reply(
        messages in proptest::collection::vec(any_message(), 1..40),
        refuse_after in proptest::option::of(0usize..30),
    ) {
        let mut lab = agreed_lab(refuse_after);
        let mut open = true;
        for m in messages {
            let steps = lab.send_raw(m.id, m.flags, &m.payload, m.fds as u32);
            let replies: Vec<_> =
                steps.iter().filter_map(|step| if let Step::Send(bytes) = step { Some(bytes) } else { None }).collect();
            prop_assert!(open || steps.is_empty());
            open &= !steps.iter().any(|step| matches!(step, Step::Close(_)));
            prop_assert!(replies.len() <= 1);
            if open && m.flags == NEED_REPLY {
                prop_assert_eq!(replies.len(), 1, "{:?}", m);
            }
            for reply in replies {
                let (header, payload) = Header::read_from_prefix(reply).unwrap();
                prop_assert_eq!((header.request, header.flags), (m.id, 5));
                prop_assert_eq!(header.size as usize, payload.len());
            }
            for ring in lab.session.rings() {
                prop_assert_eq!(ring.running, lab.owner.rings[usize::from(ring.index)].is_some());
            }
            prop_assert_eq!(lab.session.regions(), &lab.owner.regions[..]);
        }
    }

    /// Random bytes with random fds: no panic, bounded, and every fd is given back.
    #[test]
    fn random_bytes_are_survived_and_no_fd_is_lost(
        reads in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 0..200), 0usize..10), 0..40),
        header in any::<bool>(),
    ) {
        let mut session: Session<Rc<()>> = Session::new(config());
        let fd = Rc::new(());
        let mut owner = CheckedOwner::new(4);
        for (mut bytes, fds) in reads {
            if header && bytes.len() >= HEADER_BYTES {
                let (flags, size) = (1 | u32::from(bytes[4] & 8), u32::from(bytes[8] % 64));
                let header = Header { request: (bytes[0] % 50).into(), flags, size };
                bytes[..HEADER_BYTES].copy_from_slice(header.as_bytes());
            }
            session.feed(&bytes, vec![fd.clone(); fds]).unwrap();
            while let Some(step) = session.step() {
                if let Step::Effect(effect) = step {
                    session.complete(owner.carry_out(&effect, false));
                }
            }
            prop_assert!(session.buffered() <= HEADER_BYTES + PAYLOAD_BYTES_MAX);
        }
        drop(session);
        prop_assert_eq!(Rc::strong_count(&fd), 1);
    }
}
