//! What can go wrong around an XDP uplink: links, interfaces and processes that come and go, and frames of all kinds from
//! a guest.
#![forbid(unsafe_code)]

use anyhow::{Result, ensure};
use lab::rawfront::{Backend, Front, PATIENCE, eventually};
use lab::wire::{Frame, check_udp};
use lab::xdp::{Cable, Guest, NIC, OUTSIDE, WIRE, mac, with_cable};
use std::time::Duration;

const A: u8 = 1;
const B: u8 = 2;

fn with_mac(guest: u8, more: &str) -> String {
    format!(",mac={}{more}", mac(guest).map(|byte| format!("{byte:02x}")).join(":"))
}

/// Sends from outside until a frame arrives, then checks both ways.
fn talk_again(cable: &mut Cable, guest: &mut Guest) -> Result<()> {
    let mut number = 0;
    let came = eventually(PATIENCE, || {
        let _ = cable.send(number..number + 1, 100, guest.mac);
        number += 1;
        guest.take().is_ok_and(|frames| !frames.is_empty())
    });
    ensure!(came, "nothing arrives");
    guest.rest()?;
    cable.send(5000..5100, 100, guest.mac)?;
    guest.expect(5000..5100)?;
    let mut sent = 0;
    let came = eventually(PATIENCE, || {
        sent += 1;
        let _ = guest.send(sent..sent + 1, 100, OUTSIDE);
        cable.next_frame().is_ok_and(|frame| frame.is_some())
    });
    ensure!(came, "nothing goes out");
    cable.rest()?;
    guest.send(6000..6100, 100, OUTSIDE)?;
    cable.expect(6000..6100)
}

fn is_quiet(backend: &Backend, limit: u64) -> Result<()> {
    std::thread::sleep(Duration::from_millis(300));
    let before = backend.wakeups()?;
    std::thread::sleep(Duration::from_secs(1));
    let woken = backend.wakeups()? - before;
    ensure!(woken <= limit, "woken {woken} times in a second");
    Ok(())
}

#[test]
fn a_link_that_goes_down_and_up() -> Result<()> {
    with_cable("a_link_that_goes_down_and_up", 1, |cable| {
        let mut backend = cable.start(1, &[&with_mac(A, "")])?;
        let mut a = Guest::up(&backend.socket("p0"), A, 1)?;
        talk_again(cable, &mut a)?;
        for interface in [NIC, WIRE] {
            cable.netns.ip(&format!("link set {interface} down"))?;
            // The guest goes on; its frames are lost, and it is not held up.
            for _ in 0..20 {
                a.send(0..100, 300, OUTSIDE)?;
            }
            if interface == NIC {
                let counters = backend.counters("p0")?;
                ensure!(counters.get("tx_dropped_down").is_some_and(|n| *n > 500), "{counters:?}");
            }
            // It looks ten times in a second whether the link is up again.
            is_quiet(&backend, 40)?;
            cable.netns.ip(&format!("link set {interface} up"))?;
            std::thread::sleep(Duration::from_millis(300));
            while cable.rest()? > 0 {}
            talk_again(cable, &mut a)?;
        }
        is_quiet(&backend, 0)?;
        backend.check_alive()
    })
}

#[test]
fn an_interface_that_disappears() -> Result<()> {
    with_cable("an_interface_that_disappears", 1, |cable| {
        cable.netns.add_veth("nic1", "wire1", 1)?;
        let other = "[[port]]\nname = 'other'\nsocket = '@/other.sock'\nuplink = 'xdp:nic1'\n";
        let mut backend = cable.start_with(1, &[&with_mac(A, ""), &with_mac(B, "")], other)?;
        let mut a = Guest::up(&backend.socket("p0"), A, 1)?;
        let mut b = Guest::up(&backend.socket("p1"), B, 1)?;
        let mut other = Guest::up(&backend.socket("other"), 3, 1)?;
        talk_again(cable, &mut a)?;
        talk_again(cable, &mut b)?;
        cable.netns.ip(&format!("link delete {NIC}"))?;
        let told = eventually(PATIENCE, || backend.log_text().matches("interface nic0 is gone").count() == 2);
        ensure!(told, "each port is to say it once:\n{}", backend.log_text());
        for _ in 0..20 {
            a.send(0..100, 300, OUTSIDE)?;
        }
        is_quiet(&backend, 0)?;
        other.send(0..100, 300, OUTSIDE)?;
        // The front-end comes again: it is told, and served as far as that goes.
        drop(a);
        let mut a = Guest::up(&backend.socket("p0"), A, 1)?;
        a.send(0..100, 300, OUTSIDE)?;
        ensure!(backend.log_text().matches("interface nic0 is gone").count() == 2, "said again");
        ensure!(backend.counters("p0")?.get("tx_dropped_down").is_some_and(|n| *n >= 2000), "not counted");
        backend.check_alive()?;
        ensure!(backend.terminate()?.success(), "{}", backend.log_text());
        Ok(())
    })
}

/// Checksums that the guest leaves to the device (VIRTIO 1.3 §5.1.6.2).
#[test]
fn partial_checksums_are_completed() -> Result<()> {
    with_cable("partial_checksums_are_completed", 1, |cable| {
        const NEEDS_CSUM: u8 = 1;
        let backend = cable.start(1, &[&with_mac(A, "")])?;
        let mut a = Guest::up(&backend.socket("p0"), A, 1)?;
        for len in (50..300).chain([1513, 1514]) {
            let whole = Frame::from_to(len as u64, len, 1, a.mac, OUTSIDE);
            let mut frame = whole.clone();
            // The pseudo-header's sum stands where the checksum goes: addresses, protocol, length.
            let words = frame[26..34].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
            let mut sum = words.sum::<u32>() + 17 + (len as u32 - 34);
            sum = (sum & 0xffff) + (sum >> 16);
            frame[40..42].copy_from_slice(&(sum as u16).to_be_bytes());
            let mut bytes = vec![NEEDS_CSUM, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
            bytes.extend_from_slice(&frame);
            a.front.tx().queue_bytes(&bytes)?;
            a.front.tx().kick()?;
            let got = cable.next_frame()?;
            ensure!(got.as_ref() == Some(&whole), "length {len}: {got:?}");
            check_udp(&whole)?;
        }
        Ok(())
    })
}

#[test]
fn frames_of_every_length_from_a_guest() -> Result<()> {
    with_cable("frames_of_every_length_from_a_guest", 1, |cable| {
        let mut backend = cable.start(1, &[&with_mac(A, "")])?;
        let mut a = Guest::up(&backend.socket("p0"), A, 1)?;
        // An Ethernet header's length, then the payload's.
        const MTU: usize = 1500;
        for len in 0..=14 + MTU + 1 {
            let mut frame = [OUTSIDE, a.mac].concat();
            frame.extend([0x88, 0xb5]);
            frame.resize(len.max(14), len as u8);
            frame.truncate(len);
            if (14..=14 + MTU).contains(&len) {
                a.send_frame(&frame)?;
                let got = cable.next_frame()?.unwrap_or_default();
                ensure!(got == frame, "length {len}: {} bytes came", got.len());
            } else {
                a.front.tx().queue_frame(Front::HEADER_LEN, &frame)?;
                a.front.tx().kick()?;
            }
        }
        // With tags it may be longer by as much.
        for (tags, more) in [(1, 4), (2, 8)] {
            let mut frame = [OUTSIDE, a.mac].concat();
            (0..tags).for_each(|_| frame.extend([0x81, 0x00, 0x00, 0x07]));
            frame.extend([0x88, 0xb5]);
            frame.resize(14 + MTU + more, 9);
            a.send_frame(&frame)?;
            // (A second tag is more than this driver passes on.)
            if tags == 1 {
                ensure!(cable.next_frame()?.is_some_and(|got| got.len() >= frame.len() - 4), "{tags} tags");
            }
            frame.push(0);
            a.send_frame(&frame)?;
        }
        ensure!(cable.rest()? == 0);
        let counters = backend.counters("p0")?;
        ensure!(counters.get("tx_rejected") == Some(&3), "{counters:?}");
        ensure!(counters.get("tx_bad_length") == Some(&14), "{counters:?}");
        talk_again(cable, &mut a)?;
        backend.check_alive()
    })
}

/// Here we ourselves read and write the guest's buffers: memory that goes away meanwhile costs that port its front-end.
#[test]
fn memory_that_is_truncated_while_frames_pass() -> Result<()> {
    with_cable("memory_that_is_truncated_while_frames_pass", 1, |cable| {
        let mut backend = cable.start(1, &[&with_mac(A, ""), &with_mac(B, "")])?;
        let mut b = Guest::up(&backend.socket("p1"), B, 1)?;
        for ring in 0..2 {
            let mut a = Guest::up(&backend.socket("p0"), A, 1)?;
            talk_again(cable, &mut a)?;
            // Offered, but not told yet. (A write after the cut would make the file long again.)
            for number in 0..50 {
                let frame = Frame::from_to(number, 1000, 0, a.mac, OUTSIDE);
                a.front.tx().queue_frame(Front::HEADER_LEN, &frame)?;
            }
            a.front.memory.file().set_len(a.front.rings[ring].buffers)?;
            a.front.tx().kick()?;
            cable.send(0..50, 1000, a.mac)?;
            let ended =
                eventually(PATIENCE, || backend.log_text().matches("guest memory vanished").count() > ring);
            ensure!(ended, "{}", backend.log_text());
            while cable.rest()? > 0 {}
            talk_again(cable, &mut b)?;
        }
        backend.check_alive()
    })
}

/// The program stays attached while nobody serves it, and frames for our addresses are dropped, and counted.
#[test]
fn a_killed_process_leaves_its_program_and_the_next_one_goes_on() -> Result<()> {
    with_cable("a_killed_process_leaves_its_program_and_the_next_one_goes_on", 1, |cable| {
        let program = |cable: &Cable| cable.netns.ip(&format!("-d link show dev {NIC}"));
        let id = |text: &str| {
            text.split("prog/xdp id ").nth(1).map(|rest| rest.split(' ').next().map(str::to_owned))
        };
        let backend = cable.start(1, &[&with_mac(A, "")])?;
        let mut a = Guest::up(&backend.socket("p0"), A, 1)?;
        talk_again(cable, &mut a)?;
        let before = id(&program(cable)?);
        ensure!(before.is_some(), "no program");
        // Dropped: killed.
        drop((a, backend));
        ensure!(id(&program(cable)?) == before, "the program is gone");
        let inside = lab::Sniffer::start(&cable.netns, NIC, |frame| Frame::number(frame).is_some())?;
        cable.send(0..100, 100, mac(A))?;
        cable.send(100..101, 100, mac(B))?;
        // A stranger's frame reaches the stack; ours do not.
        lab::until("the stranger's frame", PATIENCE, || Ok((!inside.frames().is_empty()).then_some(())))?;
        ensure!(inside.frames().len() == 1, "{} frames reached the stack", inside.frames().len());
        let mut backend = cable.start(1, &[&with_mac(A, "")])?;
        let listens = eventually(PATIENCE, || backend.log_text().contains("listening"));
        ensure!(listens, "{}", backend.log_text());
        ensure!(id(&program(cable)?) == before, "another program");
        // As long as it has no guest they are dropped, too. (Sockets of a killed process may take frames for a moment.)
        cable.send(0..100, 100, mac(A))?;
        let mut a = Guest::up(&backend.socket("p0"), A, 1)?;
        talk_again(cable, &mut a)?;
        let counters = backend.counters("p0")?;
        ensure!(counters.get("xdp_dropped_no_socket").is_some_and(|n| *n >= 100), "{counters:?}");
        ensure!(backend.terminate()?.success(), "{}", backend.log_text());
        Ok(())
    })
}

#[test]
fn what_cannot_be_is_refused_with_a_sentence() -> Result<()> {
    with_cable("what_cannot_be_is_refused_with_a_sentence", 1, |cable| {
        let refusal = |cable: &Cable, ports: &[&str], more: &str, words: &[&str]| -> Result<()> {
            let mut backend = cable.start_with(1, ports, more)?;
            let ended = eventually(PATIENCE, || backend.check_alive().is_err());
            ensure!(ended, "it was accepted: {}", backend.log_text());
            let said = eventually(PATIENCE, || words.iter().all(|word| backend.log_text().contains(word)));
            ensure!(said, "{words:?} in: {}", backend.log_text());
            Ok(())
        };
        let own = "[[port]]\nsocket = '@/n.sock'\nuplink = 'xdp:nix9'\n";
        for (ports, more, words) in [
            (&[][..], own, &["there is no interface nix9"][..]),
            (&[",queues=3"], "", &["queues=3, but the interface has 1", "ethtool -L nic0 combined 3"]),
            (&[",zerocopy=on"], "", &["zero-copy", "use zerocopy=auto"]),
        ] {
            refusal(cable, ports, more, words)?;
        }
        // A program that another has attached; here it is ours, of another place.
        let strangers = lab::xdp::Cable { netns: cable.netns.with_fresh_bpf()?, ..Cable::new(1)? };
        let there = strangers.start(1, &[""])?;
        let mut front = Front::up(&there.socket("p0"))?;
        front.prove_alive(10)?;
        refusal(cable, &[""], "", &["another XDP program is attached", "vun_xdp"])?;
        drop((front, there));
        let backend = cable.start(1, &[",replace"])?;
        Front::up(&backend.socket("p0"))?.prove_alive(10)?;
        drop(backend);
        // Larger than frames can be; program and sockets are gone, so the driver lets us.
        cable.netns.ip(&format!("link delete {NIC}"))?;
        cable.netns.add_veth(NIC, WIRE, 1)?;
        cable.netns.ip(&format!("link set {NIC} mtu 9000"))?;
        refusal(cable, &[""], "", &["MTU of 9000", "ip link set nic0 mtu 3818"])?;
        Ok(())
    })
}
