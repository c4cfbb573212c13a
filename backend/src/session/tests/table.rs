//! The table is whole, and every row's rules hold.

use super::*;
use crate::session::table::{Needs, Payload, Replies};

type Lines = Session<Fd>;

/// Every message number that a front-end can know, in order, once.
#[test]
fn the_table_has_every_message() {
    let ids: Vec<u32> = Lines::rows().iter().map(|row| row.id as u32).collect();
    let defined: Vec<u32> = (0..=25).chain(28..=32).chain(34..=43).collect();
    assert_eq!(ids, defined);
    let mut names: Vec<_> = Lines::rows().iter().map(|row| row.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), ids.len());
}

/// A part that is missing is refused by name, whatever it looks like, and the connection goes on.
#[test]
fn missing_parts_are_refused_by_name() {
    let mut lab = Lab::agreed();
    let mut count = 0;
    for row in Lines::rows() {
        let Needs::Part(part) = row.needs else { continue };
        for (payload, fds) in [(&[0u8; 8][..], 1), (&[], 0), (&[0; 24], 8)] {
            let steps = lab.ask(row.id, payload, fds);
            assert_eq!(refusal(&steps), &Refusal::NotOffered(part));
            assert_eq!(reply_u64(row.id, &steps), 1);
            assert_eq!(lab.send(row.id, payload, fds).len(), 1);
        }
        count += 1;
    }
    assert_eq!(count, 9);
}

/// Payload lengths next to the right one, and one fd too many or too few, never reach a handler.
#[test]
fn rows_are_enforced() {
    for row in Lines::rows() {
        if matches!(row.needs, Needs::Part(_)) {
            continue;
        }
        for size in 0..300 {
            if row.payload.fits(size) {
                continue;
            }
            let mut lab = Lab::agreed();
            let steps = lab.ask(row.id, &vec![0; size], row.fds.0 as u32);
            match row.replies {
                Replies::Own => {
                    assert!(
                        matches!(steps[..], [Step::Close(SessionError::Unanswerable { .. })]),
                        "{steps:?}"
                    );
                }
                Replies::Ack => {
                    assert_eq!(refusal(&steps), &Refusal::PayloadSize { size }, "{}", row.name);
                    assert_eq!(reply_u64(row.id, &steps), 1, "{}", row.name);
                }
            }
            assert_eq!(lab.session.stats().bad_size, 1);
        }
    }
}

#[test]
fn fd_counts_are_enforced() {
    for row in Lines::rows() {
        let size = match row.payload {
            Payload::Empty => 0,
            Payload::U64 | Payload::Table => 8,
            Payload::Bytes(bytes) => bytes,
            Payload::Slot => 40,
            Payload::Config => 12,
            Payload::Any => continue,
        };
        for fds in 0..=FDS_PER_MESSAGE_MAX {
            if (row.fds.0..=row.fds.1).contains(&fds) {
                continue;
            }
            let mut lab = Lab::agreed();
            let steps = lab.ask(row.id, &vec![0; size], fds as u32);
            assert_eq!(lab.session.stats().bad_fds, 1, "{} with {fds} fds: {steps:?}", row.name);
            assert!(effects(steps).is_empty());
        }
    }
}

/// Only what has a handler is offered: a row's feature is implemented, and every implemented one has a row but
/// those that change other messages.
#[test]
fn what_is_offered_has_handlers() {
    let mut needed = protocol_feature::REPLY_ACK;
    for row in Lines::rows() {
        if let Needs::Acked(bits) | Needs::Offered(bits) = row.needs {
            assert_eq!(bits & !protocol_feature::IMPLEMENTED, 0, "{}", row.name);
            needed |= bits;
        }
    }
    assert_eq!(needed, protocol_feature::IMPLEMENTED);
}
