//! The table, and the program on a real tap.

use super::*;
use crate::memory::IoVecs;
use crate::uplink::netlab::{Host, in_bpf_namespace, within};
use crate::uplink::tap::{Tap, TapQueue};
use crate::uplink::{Uplink, UplinkQueue};
use std::time::Duration;

/// Which queue has how many entries, by the queue's number.
fn shares(order: &Order, queues: u16) -> Vec<usize> {
    let table = order.table(queues);
    let mut shares = vec![0; usize::from(queues)];
    for index in table.table {
        shares[usize::from(order.0[usize::from(index)])] += 1;
    }
    shares
}

#[test]
fn entries_are_shared_by_those_that_take_part() {
    let mut order = Order(vec![0]);
    assert_eq!(shares(&order, 4), [1024, 0, 0, 0]);
    for queue in 1..4 {
        order.set(queue, true);
        order.set(queue, true);
    }
    assert_eq!(shares(&order, 4), [256; 4]);
    assert_eq!(order.table(4).active, 4);
    let whole: Vec<u16> = order.table(4).table.iter().map(|i| order.0[usize::from(*i)]).collect();
    order.set(1, false);
    order.set(1, false);
    // As the kernel has it: the last takes the place of the one that leaves.
    assert_eq!(order.0, [0, 3, 2]);
    let fewer = shares(&order, 4);
    assert!(
        fewer[1] == 0 && fewer.iter().all(|share| *share == 0 || (341..=342).contains(share)),
        "{fewer:?}"
    );
    for (entry, queue) in whole.iter().enumerate() {
        let now = order.0[usize::from(order.table(4).table[entry])];
        assert!(now == *queue || *queue == 1, "flows of others stay");
    }
    order.set(1, true);
    assert_eq!(order.0, [0, 3, 2, 1]);
    let again: Vec<u16> = order.table(4).table.iter().map(|i| order.0[usize::from(*i)]).collect();
    assert_eq!(again, whole, "all flows are where they were");
    // As many as there may be.
    for queue in 0..128 {
        order.set(queue, true);
    }
    assert_eq!(shares(&order, 128), [8; 128]);
    assert_eq!(Order(vec![]).table(0).active, 0);
}

/// A UDP packet of a flow, in one or the other direction.
fn udp(flow: u16, back: bool) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    bytes.extend([0x45, 0, 0, 40, 0, 0, 0, 0, 64, 17, 0, 0]);
    let ends = [([10, 0, 0, 1], flow), ([10, 0, 9, 2], 53)];
    let (from, to) = if back { (ends[1], ends[0]) } else { (ends[0], ends[1]) };
    bytes.extend([from.0, to.0].concat());
    bytes.extend([from.1.to_be_bytes(), to.1.to_be_bytes()].concat());
    bytes.extend([0, 20, 0, 0]);
    bytes.extend(flow.to_be_bytes());
    bytes.resize(60, 0);
    bytes
}

/// Sends a frame of each flow, and returns which queue each arrived at.
fn queue_of_each(host: &Host, queues: &mut [TapQueue], flows: &[u16], back: bool) -> Vec<usize> {
    let mut found = vec![usize::MAX; flows.len()];
    let first = flows[0];
    for some in flows.chunks(64) {
        for flow in some {
            host.send(&udp(*flow, back));
        }
        let mut missing = some.len();
        let all = within(Duration::from_secs(10), || {
            for (number, queue) in queues.iter_mut().enumerate() {
                while let Some(frame) = receive(queue) {
                    // Others are the kernel's own.
                    if frame.len() == 60 && frame[12..14] == [8, 0] {
                        let flow = u16::from_be_bytes([frame[42], frame[43]]);
                        found[usize::from(flow - first)] = number;
                        missing -= 1;
                    }
                }
            }
            (missing == 0).then_some(())
        });
        assert!(all.is_some(), "{missing} frames are missing");
    }
    found
}

fn receive(queue: &mut TapQueue) -> Option<Vec<u8>> {
    let mut bytes = [0; 2000];
    let mut iovecs = IoVecs::new();
    iovecs.push_own_mut(&mut bytes);
    let len = queue.receive(iovecs.as_slice()).ok()?;
    drop(iovecs);
    Some(bytes[12..len].to_vec())
}

#[test]
fn flows_are_spread_and_keep_their_queues() {
    in_bpf_namespace("uplink::tap_steering::tests::flows_are_spread_and_keep_their_queues", || {
        let tap = Tap::open("t0", 4, None).unwrap();
        tap.bring_up().unwrap();
        assert!(tap.steering_stats().is_some());
        let host = Host::new("t0");
        let mut queues = tap.queues();
        let flows: Vec<u16> = (20_000..30_000).collect();
        let some = &flows[..500];
        assert!(
            queue_of_each(&host, &mut queues, some, false).iter().all(|queue| *queue == 0),
            "the first alone"
        );
        for queue in [2, 1, 3] {
            tap.set_queue_active(queue, true).unwrap();
        }

        let found = queue_of_each(&host, &mut queues, &flows, false);
        let mut shares = [0; 4];
        found.iter().for_each(|queue| shares[*queue] += 1);
        assert!(shares.iter().all(|share| (2250..=2750).contains(share)), "{shares:?}");
        println!("10,000 flows over 4 queues: {shares:?}");
        assert_eq!(queue_of_each(&host, &mut queues, &flows, true), found, "both directions");
        // (With one queue alone the kernel does not ask.)
        let stats = tap.steering_stats().unwrap();
        assert!(stats.hits >= 20_000, "{stats:?}");

        // A queue leaves and comes back.
        tap.set_queue_active(2, false).unwrap();
        let without = queue_of_each(&host, &mut queues, &flows, false);
        for (now, then) in without.iter().zip(&found) {
            assert!(*now != 2 && (*then == 2 || now == then), "flows of others stay");
        }
        tap.set_queue_active(2, true).unwrap();
        tap.set_queue_active(2, true).unwrap();
        assert_eq!(queue_of_each(&host, &mut queues, &flows, false), found, "all are where they were");

        // What is no IP goes to the first.
        let mut arp = udp(1, false);
        arp[13] = 6;
        host.send(&arp);
        let first = within(Duration::from_secs(5), || receive(&mut queues[0]).filter(|frame| frame[13] == 6));
        assert_eq!(first, Some(arp));
    });
}

#[test]
fn without_the_capability_the_kernel_spreads() {
    in_bpf_namespace("uplink::tap_steering::tests::without_the_capability_the_kernel_spreads", || {
        let tap = Tap::open("t0", 4, None).unwrap();
        assert!(tap.steering_stats().is_some());
        let queue = tap.queues()[0].readable()[0].clone();
        let none = std::thread::spawn(move || {
            crate::uplink::netlab::drop_capabilities();
            Steering::start(&queue, 4, "tap:t0").is_none()
        });
        assert!(none.join().unwrap());
    });
}
