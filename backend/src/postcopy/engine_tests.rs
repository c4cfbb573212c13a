//! The engine against a model: every page once, quotas kept, nobody starves.

use super::*;
use proptest::prelude::*;
use std::collections::HashSet;

const PAGE: u64 = 0x1000;

fn region(engine: &mut Engine, port: u16, pages: u64) -> (RegionId, Arc<ResidencyMap>) {
    let map = Arc::new(ResidencyMap::new(pages * PAGE, PAGE));
    let host = 0x7000_0000_0000 + (u64::from(port) << 32);
    let id = engine.add(port, host, pages * PAGE, PAGE, map.clone());
    engine.arm(port, true);
    (id, map)
}

fn drain(engine: &mut Engine) -> Vec<Populate> {
    std::iter::from_fn(|| engine.next_populate()).collect()
}

#[test]
fn a_page_is_asked_for_once() {
    let mut engine = Engine::default();
    let (id, map) = region(&mut engine, 0, 100);
    map.set_present(3 * PAGE..4 * PAGE);
    engine.want(id, 0..5 * PAGE, false);
    engine.want(id, 2 * PAGE + 5..6 * PAGE + 1, false);
    let asked: Vec<u64> = drain(&mut engine).iter().map(|populate| populate.page).collect();
    assert_eq!(asked, [0, 1, 2, 4, 5, 6]);
    engine.want(id, 0..7 * PAGE, false);
    assert_eq!(engine.next_populate(), None);
    assert_eq!(engine.completed(id, 2, true), Completed::Arrived { port: 0 });
    assert_eq!(map.first_missing(2 * PAGE..3 * PAGE), None);
    assert_eq!(engine.completed(id, 4, false), Completed::Failed { port: 0 });
    engine.want(id, 0..7 * PAGE, false);
    assert_eq!(drain(&mut engine).iter().map(|populate| populate.page).collect::<Vec<_>>(), [4]);
    assert_eq!(engine.in_flight(0), 5);
}

#[test]
fn pages_that_came_by_themselves_are_not_asked_for() {
    let mut engine = Engine::default();
    let (id, map) = region(&mut engine, 0, 10);
    engine.want(id, 0..10 * PAGE, false);
    map.set_present(0..9 * PAGE);
    assert_eq!(drain(&mut engine).iter().map(|populate| populate.page).collect::<Vec<_>>(), [9]);
}

#[test]
fn nothing_is_asked_for_before_the_port_is_armed() {
    let mut engine = Engine::default();
    let (id, _map) = region(&mut engine, 0, 10);
    engine.arm(0, false);
    engine.want(id, 0..10 * PAGE, false);
    assert_eq!(engine.next_populate(), None);
    engine.arm(0, true);
    assert_eq!(drain(&mut engine).len(), 10);
}

/// One port's pages never come; the other gets its own as if it were alone, less its share.
#[test]
fn a_stalled_port_does_not_starve_another() {
    let mut engine = Engine::default();
    let (stalled, _a) = region(&mut engine, 0, 4096);
    let (moving, _b) = region(&mut engine, 3, 4096);
    for start in (0..4096).step_by(64) {
        engine.want(stalled, start * PAGE..(start + 64) * PAGE, false);
    }
    assert_eq!(drain(&mut engine).len(), PORT_IN_FLIGHT_MAX);
    for start in (0..4096).step_by(64) {
        engine.want(moving, start * PAGE..(start + 64) * PAGE, false);
        let asked = drain(&mut engine);
        assert_eq!(asked.len(), 64);
        for populate in asked {
            assert_eq!(engine.completed(moving, populate.page, true), Completed::Arrived { port: 3 });
        }
    }
    assert!(engine.workers() >= 2 * PORT_IN_FLIGHT_MAX);
}

#[test]
fn a_region_that_is_given_up_is_forgotten_when_it_is_quiet() {
    let mut engine = Engine::default();
    let (id, _map) = region(&mut engine, 0, 1000);
    (0..10).for_each(|n| engine.want(id, n * 64 * PAGE..(n + 1) * 64 * PAGE, false));
    let asked = drain(&mut engine);
    assert!(engine.queued(0) > 0);
    engine.give_up(id);
    assert_eq!((engine.queued(0), engine.next_populate()), (0, None));
    for (n, populate) in asked.iter().enumerate() {
        engine.remove(id);
        assert!(!engine.is_quiet(id), "{n}");
        assert_eq!(engine.completed(id, populate.page, n % 2 == 0), Completed::GivenUp);
    }
    assert!(engine.is_quiet(id));
    engine.remove(id);
    engine.want(id, 0..PAGE, false);
    assert_eq!((engine.next_populate(), engine.in_flight(0)), (None, 0));
}

/// Ports that were there first took the most that one may have, and stand still: each later one still moves.
#[test]
fn ports_that_came_first_and_stand_still_leave_something_for_later_ones() {
    let mut engine = Engine::default();
    for port in 0..10 {
        let (id, _map) = region(&mut engine, port, 4096);
        (0..4096).step_by(64).for_each(|n| engine.want(id, n * PAGE..(n + 64) * PAGE, false));
        let asked = drain(&mut engine).len();
        assert!(asked >= PORT_IN_FLIGHT_MIN, "port {port}: {asked}");
        assert_eq!(asked, engine.in_flight(port));
    }
    let all: usize = (0..10).map(|port| engine.in_flight(port)).sum();
    assert!(all <= IN_FLIGHT_MAX + 10 * PORT_IN_FLIGHT_MIN, "{all}");
    assert!(engine.workers() >= all + WORKERS_RESERVE);
}

#[test]
fn what_a_ring_stands_still_for_goes_first() {
    let mut engine = Engine::default();
    let (id, _map) = region(&mut engine, 0, 2 * QUEUE_MAX as u64);
    (0..2 * QUEUE_MAX as u64).step_by(64).for_each(|n| engine.want(id, n * PAGE..(n + 64) * PAGE, false));
    assert_eq!(engine.queued(0), QUEUE_MAX);
    let far = 2 * QUEUE_MAX as u64 - 2;
    engine.want(id, far * PAGE..(far + 2) * PAGE, true);
    assert_eq!(engine.next_populate().map(|populate| populate.page), Some(far));
    assert_eq!(engine.next_populate().map(|populate| populate.page), Some(far + 1));
    assert_eq!(engine.next_populate().map(|populate| populate.page), Some(0));
}

#[test]
fn a_queue_that_was_dropped_can_be_filled_again() {
    let mut engine = Engine::default();
    let (id, _map) = region(&mut engine, 0, 100);
    engine.want(id, 0..50 * PAGE, false);
    assert_eq!(engine.next_populate().map(|populate| populate.page), Some(0));
    engine.drop_queue(0);
    assert_eq!((engine.queued(0), engine.next_populate()), (0, None));
    engine.want(id, 0..50 * PAGE, false);
    assert_eq!(drain(&mut engine).len(), 49, "the first is under way still");
}

#[derive(Clone, Debug)]
enum Op {
    Want(usize, u64, u64),
    Next,
    Complete(usize, bool),
    Present(usize, u64),
    GiveUp(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0..3usize, 0..200u64, 1..80u64).prop_map(|(region, page, count)| Op::Want(region, page, count)),
        Just(Op::Next),
        Just(Op::Next),
        (any::<usize>(), prop::bool::weighted(0.9)).prop_map(|(which, arrived)| Op::Complete(which, arrived)),
        (0..3usize, 0..200u64).prop_map(|(region, page)| Op::Present(region, page)),
        prop::bool::weighted(0.02).prop_flat_map(|rare| (0..3usize).prop_map(move |region| match rare {
            true => Op::GiveUp(region),
            false => Op::Next,
        })),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_no_page_is_under_way_twice(ops in prop::collection::vec(op(), 0..400)) {
        let mut engine = Engine::default();
        let regions: Vec<_> = [0, 1, 1].iter().map(|port| region(&mut engine, *port, 200)).collect();
        let mut given_up = [false; 3];
        let mut under_way: Vec<Populate> = Vec::new();
        for op in ops {
            match op {
                Op::Want(n, page, count) => engine.want(regions[n].0, page * PAGE..(page + count) * PAGE, false),
                Op::Next => if let Some(populate) = engine.next_populate() {
                    let n = regions.iter().position(|(id, _)| *id == populate.region).unwrap();
                    prop_assert!(!given_up[n] && populate.page < 200);
                    prop_assert!(regions[n].1.first_missing(populate.page * PAGE..populate.page * PAGE + 1).is_some());
                    under_way.push(populate);
                },
                Op::Complete(which, arrived) if !under_way.is_empty() => {
                    let populate = under_way.swap_remove(which % under_way.len());
                    engine.completed(populate.region, populate.page, arrived);
                }
                Op::Complete(..) => {}
                Op::Present(n, page) => regions[n].1.set_present(page * PAGE..(page + 1) * PAGE),
                Op::GiveUp(n) => { engine.give_up(regions[n].0); given_up[n] = true; }
            }
            let distinct: HashSet<_> = under_way.iter().map(|p| (p.region, p.page)).collect();
            prop_assert_eq!(distinct.len(), under_way.len());
            prop_assert_eq!(engine.in_flight(0) + engine.in_flight(1), under_way.len());
            prop_assert!(engine.in_flight(0) <= PORT_IN_FLIGHT_MAX && engine.in_flight(1) <= PORT_IN_FLIGHT_MAX);
        }
    }
}
