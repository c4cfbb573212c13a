//! Ports that share an interface by AF_XDP: who receives what, whole and in order.
#![forbid(unsafe_code)]

use anyhow::{Result, ensure};
use lab::wire::Frame;
use lab::xdp::{Guest, OUTSIDE, mac, with_cable};

const A: u8 = 1;
const B: u8 = 2;
const BROADCAST: [u8; 6] = [0xff; 6];

fn with_mac(guest: u8, more: &str) -> String {
    format!(",mac={}{more}", mac(guest).map(|byte| format!("{byte:02x}")).join(":"))
}

/// Both ways at once, with their content; nobody gets what is another's.
#[test]
fn two_ports_talk_to_the_outside() -> Result<()> {
    with_cable("two_ports_talk_to_the_outside", 1, |cable| {
        let mut backend = cable.start(1, &[&with_mac(A, ""), &with_mac(B, "")])?;
        let mut a = Guest::up(&backend.socket("p0"), A, 1)?;
        let mut b = Guest::up(&backend.socket("p1"), B, 1)?;
        for (round, len) in [60, 64, 577, 1514].into_iter().enumerate() {
            let first = 1000 * round as u64;
            cable.send(first..first + 100, len, a.mac)?;
            cable.send(first + 100..first + 200, len, b.mac)?;
            a.expect(first..first + 100)?;
            b.expect(first + 100..first + 200)?;
            a.send(first + 200..first + 500, len, OUTSIDE)?;
            cable.expect(first + 200..first + 500)?;
            b.send(first + 500..first + 600, len, OUTSIDE)?;
            cable.expect(first + 500..first + 600)?;
        }
        ensure!(a.rest()? == 0 && b.rest()? == 0 && cable.rest()? == 0, "frames too many");
        // To each other: out of the interface, where no switch sends them back.
        a.send(0..10, 100, b.mac)?;
        cable.expect(0..10)?;
        ensure!(b.rest()? == 0, "a frame of another port");
        backend.check_alive()?;
        ensure!(backend.terminate()?.success(), "{}", backend.log_text());
        Ok(())
    })
}

#[test]
fn local_ports_reach_each_other_where_that_is_wanted() -> Result<()> {
    with_cable("local_ports_reach_each_other_where_that_is_wanted", 1, |cable| {
        let on = ",local-switch=on";
        let backend = cable.start(1, &[&with_mac(A, on), &with_mac(B, on), &with_mac(3, "")])?;
        let mut a = Guest::up(&backend.socket("p0"), A, 1)?;
        let mut b = Guest::up(&backend.socket("p1"), B, 1)?;
        let mut c = Guest::up(&backend.socket("p2"), 3, 1)?;
        a.send(0..200, 600, b.mac)?;
        b.expect(0..200)?;
        b.send(200..400, 1514, a.mac)?;
        a.expect(200..400)?;
        ensure!(cable.rest()? == 0, "a local frame went out");
        a.send(400..410, 100, c.mac)?;
        cable.expect(400..410)?;
        a.send(410..420, 100, OUTSIDE)?;
        cable.expect(410..420)?;
        // A group's address: out, and to those that want it.
        a.send(420..430, 100, BROADCAST)?;
        cable.expect(420..430)?;
        b.expect(420..430)?;
        ensure!(a.rest()? == 0 && b.rest()? == 0 && c.rest()? == 0, "frames too many");
        // From outside nothing has changed.
        cable.send(500..600, 200, b.mac)?;
        b.expect(500..600)
    })
}

#[test]
fn broadcasts_reach_the_ports_that_want_them() -> Result<()> {
    with_cable("broadcasts_reach_the_ports_that_want_them", 1, |cable| {
        let ports = [with_mac(A, ""), with_mac(B, ",vlan=5"), with_mac(3, ",flood=off")];
        let backend = cable.start(1, &ports.each_ref().map(String::as_str))?;
        let mut a = Guest::up(&backend.socket("p0"), A, 1)?;
        let mut b = Guest::up(&backend.socket("p1"), B, 1)?;
        let mut c = Guest::up(&backend.socket("p2"), 3, 1)?;
        cable.send(0..100, 300, BROADCAST)?;
        cable.send(100..150, 300, [0x33, 0x33, 0, 0, 0, 1])?;
        a.expect(0..150)?;
        ensure!(b.rest()? == 0 && c.rest()? == 0, "not wanted");
        let mut tagged = Frame::from_to(7, 100, 0, OUTSIDE, BROADCAST);
        tagged.splice(12..12, [0x81, 0x00, 0x00, 5]);
        cable.put(&tagged)?;
        let mut got = Vec::new();
        lab::until("a tagged broadcast", lab::PATIENCE, || {
            got.extend(b.take()?);
            Ok((!got.is_empty()).then_some(()))
        })?;
        ensure!(got.len() == 1 && got[0].1 == tagged, "{got:?}");
        Ok(())
    })
}

/// No later frame wakes for it.
#[test]
fn a_broadcast_waits_behind_many_for_others() -> Result<()> {
    with_cable("a_broadcast_waits_behind_many_for_others", 1, |cable| {
        let backend = cable.start(1, &[&with_mac(A, ",vlan=5")])?;
        let setup = lab::rawfront::Setup { ring_size: 256, ..Default::default() };
        let front = lab::rawfront::Front::up_with(&backend.socket("p0"), setup)?;
        let mut a = Guest { front, mac: mac(A) };
        // Nothing is taken before the guest has buffers, and then there is one look.
        std::thread::sleep(std::time::Duration::from_millis(100));
        cable.send(0..900, 100, BROADCAST)?;
        let mut tagged = Frame::from_to(900, 100, 0, OUTSIDE, BROADCAST);
        tagged.splice(12..12, [0x81, 0x00, 0x00, 5]);
        cable.put(&tagged)?;
        std::thread::sleep(std::time::Duration::from_millis(100));
        a.offer()?;
        let mut got = Vec::new();
        lab::until("a tagged broadcast", lab::PATIENCE, || {
            got.extend(a.take()?);
            Ok((!got.is_empty()).then_some(()))
        })?;
        ensure!(got.len() == 1 && got[0].1 == tagged, "{got:?}");
        Ok(())
    })
}

#[test]
fn spoofed_sources_are_dropped_and_addresses_of_others_not_learned() -> Result<()> {
    with_cable("spoofed_sources_are_dropped_and_addresses_of_others_not_learned", 1, |cable| {
        let backend = cable.start(1, &[&with_mac(A, ",anti-spoof=on"), ""])?;
        let mut a = Guest::up(&backend.socket("p0"), A, 1)?;
        let mut b = Guest::up(&backend.socket("p1"), B, 1)?;
        a.send(0..50, 100, OUTSIDE)?;
        cable.expect(0..50)?;
        a.mac = mac(9);
        a.send(50..100, 100, OUTSIDE)?;
        a.mac = mac(A);
        a.send(100..110, 100, OUTSIDE)?;
        cable.expect(100..110)?;
        // B has not said who it is. Then it has.
        cable.send(200..210, 100, b.mac)?;
        ensure!(b.rest()? == 0, "for an address that nobody has");
        b.send(210..220, 100, OUTSIDE)?;
        cable.expect(210..220)?;
        cable.send(220..320, 100, b.mac)?;
        b.expect(220..320)?;
        // A's address stays A's, whoever sends with it.
        b.mac = mac(A);
        b.send(320..330, 100, OUTSIDE)?;
        cable.send(400..500, 100, mac(A))?;
        a.expect(400..500)?;
        ensure!(b.rest()? == 0, "a frame of another port");
        let counters = backend.counters("p0")?;
        ensure!(counters.get("tx_spoofed") == Some(&50), "{counters:?}");
        ensure!(backend.counters("p1")?.contains_key("tx_unlearned"), "not counted");
        Ok(())
    })
}

/// Four flows at least reach both pairs, each whole and in order; pairs send on queues of their own.
#[test]
fn two_pairs_on_two_queues() -> Result<()> {
    with_cable("two_pairs_on_two_queues", 2, |cable| {
        for workers in [1, 2] {
            let backend = cable.start_with(2, &[&with_mac(A, "")], &format!("workers = {workers}\n"))?;
            let mut a = Guest::up(&backend.socket("p0"), A, 2)?;
            cable.send(0..200, 200, a.mac)?;
            let mut got = Vec::new();
            lab::until("200 frames", lab::PATIENCE, || {
                got.extend(a.take()?);
                Ok((got.len() >= 200).then_some(()))
            })?;
            let mut last = [None; 64];
            for (_, frame) in &got {
                let number = Frame::number(frame).unwrap_or(Ok(0))?;
                let flow = number as usize % 64;
                ensure!(last[flow] < Some(number), "flow {flow} out of order");
                last[flow] = Some(number);
            }
            ensure!(got.len() == 200, "{} frames", got.len());
            for pair in 0..2 {
                a.send_on(pair, 1000..1200, 700, OUTSIDE)?;
                cable.expect(1000..1200)?;
            }
        }
        Ok(())
    })
}

/// Ports with pairs on two workers: frames of one pair come in order, whoever serves whom.
#[test]
fn local_ports_on_two_workers() -> Result<()> {
    with_cable("local_ports_on_two_workers", 2, |cable| {
        let on = ",local-switch=on";
        let backend = cable.start_with(2, &[&with_mac(A, on), &with_mac(B, on)], "workers = 2\n")?;
        let mut a = Guest::up(&backend.socket("p0"), A, 2)?;
        let mut b = Guest::up(&backend.socket("p1"), B, 2)?;
        for pair in 0..2 {
            a.send_on(pair, 0..200, 900, b.mac)?;
            b.expect(0..200)?;
            b.send_on(pair, 200..400, 900, a.mac)?;
            a.expect(200..400)?;
        }
        ensure!(cable.rest()? == 0, "a local frame went out");
        let counters = backend.counters("p0")?;
        let local = (counters.get("tx_local"), counters.get("rx_inbox"));
        ensure!(local == (Some(&400), Some(&400)), "{counters:?}");
        Ok(())
    })
}

/// One guest offers no buffers and one never takes its sent frames back: others go on as if nothing was.
#[test]
fn a_port_that_stands_still_holds_up_no_other() -> Result<()> {
    with_cable("a_port_that_stands_still_holds_up_no_other", 1, |cable| {
        let backend = cable.start(1, &[&with_mac(A, ""), &with_mac(B, "")])?;
        let stalled = lab::rawfront::Front::up(&backend.socket("p0"))?;
        let mut b = Guest::up(&backend.socket("p1"), B, 1)?;
        // Far more than all frames that there are.
        for round in 0..30u64 {
            cable.send(0..400, 100, mac(A))?;
            let first = 1000 * round;
            cable.send(first..first + 100, 1000, b.mac)?;
            b.expect(first..first + 100)?;
            b.send(first..first + 50, 1000, OUTSIDE)?;
            cable.expect(first..first + 50)?;
        }
        let counters = backend.counters("p0")?;
        ensure!(counters.get("xdp_ring_full").is_some_and(|n| *n > 5000), "{counters:?}");
        ensure!(!backend.counters("p1")?.contains_key("xdp_ring_full"), "the other has lost frames");
        // It comes to life: nothing is stale for ever, nothing is lost for good.
        drop(stalled);
        let mut a = Guest::up(&backend.socket("p0"), A, 1)?;
        cable.send(0..500, 100, a.mac)?;
        let got = a.numbers(500)?;
        ensure!(got.iter().copied().eq(0..500), "{got:?}");
        Ok(())
    })
}
