//! The loader against the kernel: restarts, other sizes, other programs, other layouts, vanished interfaces.

use super::pins::Pins;
use super::{Mode, Options, ProgramError, XdpProgram, list, unload};
use crate::bpf::{Owner, PIN_ROOT, netlink, sys::Link};
use crate::uplink::netlab::{Host, in_bpf_namespace, index_of, ip, veth, within, xdp_socket};
use crate::uplink::testing::skip;
use aya::maps::{Array, Map, MapData};
use ebpf_common::xdp::{Config, MacKey, NO_PORT, Stats, Steer, VLAN_ANY, VLAN_NONE};
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

fn options(interface: &str) -> Options {
    Options {
        interface: interface.into(),
        index: index_of(interface),
        mode: Mode::Auto,
        queues: 1,
        ports: 2,
        slots: 4,
        flood: false,
        replace: false,
    }
}

fn key(vlan: u16) -> MacKey {
    MacKey { mac: MAC, vlan }
}

fn frame(to: [u8; 6], mark: u8) -> Vec<u8> {
    let mut bytes = to.to_vec();
    bytes.extend([2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    bytes.resize(60, mark);
    bytes
}

fn link_id(interface: &str) -> u32 {
    Link::from_pin(&Pins::of(interface).link()).unwrap().info().unwrap().id
}

fn program_id(interface: &str) -> u32 {
    Link::from_pin(&Pins::of(interface).link()).unwrap().info().unwrap().program
}

fn pinned_config(interface: &str) -> Array<MapData, Config> {
    Map::Array(MapData::from_pin(Pins::of(interface).map("xdp_config")).unwrap()).try_into().unwrap()
}

fn stats_soon(what: impl Fn(&Stats) -> bool) -> Stats {
    within(Duration::from_secs(5), || list().first()?.stats.filter(&what))
        .unwrap_or_else(|| panic!("{:?}", list()))
}

/// As if the process had been killed: it has no time to say so.
fn killed(program: XdpProgram) {
    let interface = list()[0].interface.clone();
    let mut program = std::mem::ManuallyDrop::new(program);
    let other = Flock::lock(File::open("/dev/null").unwrap(), FlockArg::LockShared).unwrap();
    drop(std::mem::replace(&mut program._held, other));
    let mut config = pinned_config(&interface);
    let present = config.get(&0, 0).unwrap();
    config.set(0, Config { start_time: present.start_time + 1, ..present }, 0).unwrap();
}

#[test]
fn a_restart_keeps_the_link_and_drops_are_counted_meanwhile() {
    in_bpf_namespace(
        "uplink::xdp::program::tests::a_restart_keeps_the_link_and_drops_are_counted_meanwhile",
        || {
            veth("v0", "v1", 1);
            let (inside, outside) = (Host::new("v0"), Host::new("v1"));
            let program = XdpProgram::attach(&options("v0")).unwrap();
            assert!(!program.was_pinned());
            assert_eq!(program.attached_mode(), Mode::Native, "a veth can");
            program.set_mac(key(VLAN_NONE), Some(1)).unwrap();
            program.set_steer(0, 1, Steer { first: 1, count: 1 }).unwrap();
            let socket = xdp_socket();
            program.set_socket(0, 1, Some(socket.as_fd())).unwrap();
            outside.send(&frame(MAC, 1));
            stats_soon(|stats| stats.hits == 1);
            assert_eq!(program.port_stats(1).unwrap().hits, 1);
            let (link, first_program) = (link_id("v0"), program_id("v0"));

            // It dies; frames for its address do not leak into the stack, others are not touched.
            killed(program);
            drop(socket);
            outside.send(&frame(MAC, 2));
            outside.send(&frame([2, 0, 0, 0, 0, 8], 3));
            assert!(inside.receives(&frame([2, 0, 0, 0, 0, 8], 3)));
            let stats = stats_soon(|stats| stats.drop_no_socket == 1 && stats.misses >= 1);
            assert_eq!(stats.hits, 1);
            assert!(!inside.has(&frame(MAC, 2)));

            // The next one: same link, same program, same counters; the address is known, and has no port yet.
            let program = XdpProgram::attach(&options("v0")).unwrap();
            assert!(program.was_pinned());
            assert_eq!((link_id("v0"), program_id("v0")), (link, first_program));
            assert_eq!(program.stats().unwrap().drop_no_socket, 1);
            program.set_steer(0, 0, Steer { first: 1, count: 1 }).unwrap();
            let socket = xdp_socket();
            program.set_socket(0, 1, Some(socket.as_fd())).unwrap();
            outside.send(&frame(MAC, 4));
            stats_soon(|stats| stats.drop_no_socket == 2);
            assert_eq!(program.port_stats(1).unwrap().drop_no_socket, 1, "of no port now");
            program.set_mac(key(VLAN_NONE), Some(0)).unwrap();
            outside.send(&frame(MAC, 5));
            stats_soon(|stats| stats.hits == 2);
            assert_eq!(program.port_stats(0).unwrap().hits, 1);
            program.set_socket(0, 1, None).unwrap();
            program.set_socket(0, 1, None).unwrap();
            outside.send(&frame(MAC, 6));
            stats_soon(|stats| stats.drop_no_socket == 3);

            // An orderly end: again, without a trick.
            drop(program);
            let program = XdpProgram::attach(&options("v0")).unwrap();
            assert_eq!(link_id("v0"), link);
            assert_eq!(program.forget_old_macs().unwrap(), 1);
            outside.send(&frame(MAC, 7));
            assert!(inside.receives(&frame(MAC, 7)), "forgotten: to the stack");
        },
    );
}

#[test]
fn bpftool_shows_names_and_fields() {
    let name = "uplink::xdp::program::tests::bpftool_shows_names_and_fields";
    in_bpf_namespace(name, || {
        veth("v0", "v1", 1);
        let program = XdpProgram::attach(&options("v0")).unwrap();
        program.set_mac(key(5), Some(1)).unwrap();
        program.set_steer(0, 1, Steer { first: 1, count: 3 }).unwrap();
        let dump = |map: &str| -> serde_json::Value {
            let pin = Pins::of("v0").map(map);
            let run =
                Command::new("bpftool").args(["-j", "map", "dump", "pinned"]).arg(pin).output().unwrap();
            serde_json::from_slice(&run.stdout).unwrap()
        };
        if Command::new("bpftool").arg("version").output().is_err() {
            return skip("what bpftool shows", "no bpftool");
        }
        let entry = &dump("mac_table")[0]["formatted"];
        assert_eq!(entry["key"], serde_json::json!({"mac": MAC, "vlan": 5}));
        assert_eq!(entry["value"], 1);
        let entry = &dump("xdp_steer")[1]["formatted"];
        assert_eq!(entry["value"], serde_json::json!({"first": 1, "count": 3}));
        let config = &dump("xdp_config")[0]["formatted"]["value"];
        assert_eq!((&config["pid"], &config["slots"]), (&std::process::id().into(), &4.into()));
        let fields = |map: &str| -> Vec<String> {
            let value = &dump(map)[0]["formatted"]["values"][0]["value"];
            value.as_object().unwrap().keys().cloned().collect()
        };
        assert_eq!(fields("xdp_stats").len(), 6);
        assert_eq!(fields("xdp_port_stats"), ["drop_no_socket", "drop_queue", "hits"]);
    });
}

#[test]
fn unload_leaves_nothing_behind() {
    in_bpf_namespace("uplink::xdp::program::tests::unload_leaves_nothing_behind", || {
        // A dot, which bpffs does not take.
        veth("v0.5", "v1", 1);
        assert!(!unload("v0.5").unwrap(), "nothing there");
        let program = XdpProgram::attach(&Options { mode: Mode::Skb, ..options("v0.5") }).unwrap();
        let found = list();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].interface, "v0.5");
        assert_eq!(found[0].owner, Some(Owner::this()));
        assert_eq!(found[0].index, Some(index_of("v0.5")));
        assert_eq!(found[0].config.unwrap().slots, 4);
        assert!(matches!(unload("v0.5"), Err(ProgramError::Served(_, pid)) if pid == std::process::id()));
        drop(program);
        assert_eq!(list()[0].owner, None);
        assert!(netlink::attached(index_of("v0.5")).unwrap().skb.is_some());
        assert!(unload("v0.5").unwrap());
        assert_eq!(netlink::attached(index_of("v0.5")).unwrap().any(), None);
        assert!(list().is_empty() && !Path::new(PIN_ROOT).exists());
        assert!(!unload("v0.5").unwrap());
    });
}

#[test]
fn a_live_owner_and_another_layout_are_refused() {
    in_bpf_namespace("uplink::xdp::program::tests::a_live_owner_and_another_layout_are_refused", || {
        veth("v0", "v1", 1);
        let program = XdpProgram::attach(&options("v0")).unwrap();
        let error = XdpProgram::attach(&options("v0")).map(drop).unwrap_err();
        assert!(matches!(error, ProgramError::Served(..)), "{error}");
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        drop(program);

        let mut config = pinned_config("v0");
        let present = config.get(&0, 0).unwrap();
        config.set(0, Config { layout: 0, ..present }, 0).unwrap();
        let error = XdpProgram::attach(&options("v0")).map(drop).unwrap_err();
        assert!(matches!(error, ProgramError::Layout(..)), "{error}");
        assert!(error.to_string().contains("vhost-user-net unload v0"), "{error}");
        assert!(list()[0].config.is_none(), "not read as what it is not");
        config.set(0, present, 0).unwrap();

        // Values of another size, under the present number.
        let pins = Pins::of("v0");
        std::fs::remove_file(pins.map("xdp_steer")).unwrap();
        std::fs::hard_link(pins.map("xdp_config"), pins.map("xdp_steer")).unwrap_or_else(|_| {
            MapData::from_pin(pins.map("xdp_config")).unwrap().pin(pins.map("xdp_steer")).unwrap();
        });
        let error = XdpProgram::attach(&options("v0")).map(drop).unwrap_err();
        assert!(error.to_string().contains("xdp_steer has (4, 32) bytes"), "{error}");
        assert!(unload("v0").unwrap(), "the remedy");
        assert!(!XdpProgram::attach(&options("v0")).unwrap().was_pinned());
    });
}

/// One of another PID namespace, or where /proc hides those of others.
#[test]
fn an_owner_that_cannot_be_seen_goes_on_serving() {
    in_bpf_namespace("uplink::xdp::program::tests::an_owner_that_cannot_be_seen_goes_on_serving", || {
        veth("v0", "v1", 1);
        let program = XdpProgram::attach(&options("v0")).unwrap();
        program.set_mac(key(VLAN_ANY), Some(1)).unwrap();
        let mut config = pinned_config("v0");
        let present = config.get(&0, 0).unwrap();
        config.set(0, Config { start_time: present.start_time + 1, ..present }, 0).unwrap();
        let error = XdpProgram::attach(&options("v0")).map(drop).unwrap_err();
        assert!(matches!(error, ProgramError::Served(..)), "{error}");
        assert!(matches!(unload("v0"), Err(ProgramError::Served(..))));
        let macs = program.maps().macs.iter().map(Result::unwrap).collect::<Vec<_>>();
        assert_eq!(macs, [(key(VLAN_ANY), 1)], "its steering is as it was");

        // Under another name, too.
        ip("link set v0 down");
        ip("link set v0 name w0");
        let error = XdpProgram::attach(&options("w0")).map(drop).unwrap_err();
        assert!(matches!(error, ProgramError::Served(..)), "{error}");
        drop(program);
        assert!(!XdpProgram::attach(&options("w0")).unwrap().was_pinned());
    });
}

#[test]
fn other_sizes_and_modes_take_the_place_of_the_present_ones() {
    in_bpf_namespace(
        "uplink::xdp::program::tests::other_sizes_and_modes_take_the_place_of_the_present_ones",
        || {
            veth("v0", "v1", 2);
            let outside = Host::new("v1");
            let program = XdpProgram::attach(&options("v0")).unwrap();
            program.set_mac(key(VLAN_ANY), Some(1)).unwrap();
            assert!(program.set_mac(key(VLAN_ANY), Some(2)).is_err(), "no such port");
            assert!(program.set_steer(1, 0, Steer::default()).is_err(), "no such queue");
            assert!(program.set_steer(0, 0, Steer { first: 1, count: 4 }).is_err(), "no such slot");
            assert!(program.set_socket(0, 4, None).is_err() && program.port_stats(2).is_err());
            let link = link_id("v0");
            killed(program);

            let larger = Options { queues: 2, ports: 5, slots: 9, ..options("v0") };
            let program = XdpProgram::attach(&larger).unwrap();
            assert!(program.was_pinned());
            assert_eq!(link_id("v0"), link, "replaced in the link");
            program.set_steer(1, 4, Steer { first: 1, count: 8 }).unwrap();
            outside.send(&frame(MAC, 1));
            stats_soon(|stats| stats.drop_no_socket == 1);
            assert_eq!(program.port_stats(4).unwrap(), Default::default());
            let table = MapData::from_pin(Pins::of("v0").map("mac_table")).unwrap();
            let table: aya::maps::HashMap<_, MacKey, u32> = Map::HashMap(table).try_into().unwrap();
            assert_eq!(table.iter().map(Result::unwrap).collect::<Vec<_>>(), [(key(VLAN_ANY), NO_PORT)]);
            let names = std::fs::read_dir(&Pins::of("v0").folder).unwrap();
            assert_eq!(names.count(), 7, "the link and six maps");
            drop(program);

            let program = XdpProgram::attach(&Options { mode: Mode::Skb, ..larger.clone() }).unwrap();
            assert!(program.was_pinned() && program.attached_mode() == Mode::Skb);
            assert_ne!(link_id("v0"), link, "a mode cannot be changed in a link");
            assert_eq!(program.stats().unwrap().drop_no_socket, 1, "the maps are kept");
            drop(program);
            let program = XdpProgram::attach(&larger).unwrap();
            assert_eq!(program.attached_mode(), Mode::Skb, "auto takes what is there");
        },
    );
}

#[test]
fn the_program_of_another_build_is_replaced_in_the_link() {
    in_bpf_namespace(
        "uplink::xdp::program::tests::the_program_of_another_build_is_replaced_in_the_link",
        || {
            veth("v0", "v1", 1);
            drop(XdpProgram::attach(&options("v0")).unwrap());
            let (link, first) = (link_id("v0"), program_id("v0"));
            // Another program with other maps, in the pinned link.
            let other = foreign_program();
            Link::from_pin(&Pins::of("v0").link()).unwrap().update(other.as_fd()).unwrap();
            assert_ne!(program_id("v0"), first);
            let foreign = program_id("v0");
            let program = XdpProgram::attach(&options("v0")).unwrap();
            assert!(program.was_pinned());
            assert_eq!(link_id("v0"), link);
            assert!(![first, foreign].contains(&program_id("v0")));
            assert!(
                netlink::attached(index_of("v0")).unwrap().any().is_some_and(|p| p.0 == program_id("v0"))
            );
        },
    );
}

/// Two instructions: r0 = XDP_PASS; exit. By name `stranger`.
fn foreign_program() -> OwnedFd {
    crate::bpf::sys::testing::load_xdp("stranger", &[0x0000_0002_0000_00b7, 0x95]).unwrap()
}

#[test]
fn a_foreign_program_is_named_and_stays_unless_it_may_be_replaced() {
    in_bpf_namespace(
        "uplink::xdp::program::tests::a_foreign_program_is_named_and_stays_unless_it_may_be_replaced",
        || {
            veth("v0", "v1", 1);
            let program = foreign_program();
            let attached = || netlink::attached(index_of("v0")).unwrap().any().unwrap().0;
            for flag in [netlink::XDP_FLAGS_DRV_MODE, netlink::XDP_FLAGS_SKB_MODE] {
                // By a link.
                let link = Link::attach_xdp(program.as_fd(), index_of("v0"), flag).unwrap();
                let id = attached();
                let error = XdpProgram::attach(&options("v0")).map(drop).unwrap_err().to_string();
                assert!(error.contains(&format!("number {id}, named stranger")), "{error}");
                assert!(error.contains(if flag == 2 { "xdpgeneric off" } else { "xdpdrv off" }), "{error}");
                assert_eq!(attached(), id, "still there");
                assert!(list().is_empty() && !Path::new(PIN_ROOT).exists());
                let ours = XdpProgram::attach(&Options { replace: true, ..options("v0") }).unwrap();
                assert_ne!(attached(), id);
                drop((ours, link));
                assert!(unload("v0").unwrap());

                // Without one, as ip(8) does it.
                crate::bpf::netlink::testing::attach(index_of("v0"), program.as_fd(), flag).unwrap();
                let error = XdpProgram::attach(&options("v0")).map(drop).unwrap_err();
                assert!(matches!(error, ProgramError::Foreign { .. }), "{error}");
                assert_eq!(attached(), id);
                drop(XdpProgram::attach(&Options { replace: true, ..options("v0") }).unwrap());
                assert_ne!(attached(), id);
                assert!(unload("v0").unwrap());
            }
        },
    );
}

#[test]
fn an_interface_that_was_made_anew_or_renamed_is_not_the_pinned_one() {
    in_bpf_namespace(
        "uplink::xdp::program::tests::an_interface_that_was_made_anew_or_renamed_is_not_the_pinned_one",
        || {
            veth("v0", "v1", 1);
            killed(XdpProgram::attach(&options("v0")).unwrap());
            ip("link delete v0");
            assert_eq!(list()[0].index, None, "gone");
            let error = XdpProgram::attach(&Options { index: 77, ..plain() }).map(drop).unwrap_err();
            assert!(matches!(error, ProgramError::NoInterface(_)), "{error}");
            veth("v0", "v1", 1);
            let program = XdpProgram::attach(&options("v0")).unwrap();
            assert!(!program.was_pinned());
            killed(program);

            // Under another name it keeps the program; a new interface of the old name must not inherit the pins.
            ip("link set v0 down");
            ip("link set v0 name w0");
            veth("v0", "v2", 1);
            let program = XdpProgram::attach(&options("v0")).unwrap();
            assert!(!program.was_pinned());
            assert_eq!(netlink::attached(index_of("w0")).unwrap().any(), None, "taken away from the old one");
            killed(program);
            ip("link set v0 down");
            ip("link set v0 name u0");
            let program = XdpProgram::attach(&options("u0")).unwrap();
            assert!(!program.was_pinned() && list().len() == 1 && list()[0].interface == "u0");
            drop(program);
            assert!(unload("u0").unwrap());
            veth("v0", "v3", 1);
            killed(XdpProgram::attach(&options("v0")).unwrap());

            // The same number and name in another network namespace.
            let number = index_of("v0");
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let made = Command::new("ip")
                .args([
                    "link",
                    "add",
                    "v0",
                    "index",
                    &number.to_string(),
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "v1",
                ])
                .status();
            assert!(made.unwrap().success());
            assert_eq!(index_of("v0"), number);
            assert!(!XdpProgram::attach(&options("v0")).unwrap().was_pinned());
            assert!(netlink::attached(number).unwrap().any().is_some());
        },
    );
}

fn plain() -> Options {
    Options { interface: "v0".into(), ..options("lo") }
}

#[test]
fn native_mode_that_the_driver_refuses_is_refused_or_skb() {
    in_bpf_namespace(
        "uplink::xdp::program::tests::native_mode_that_the_driver_refuses_is_refused_or_skb",
        || {
            // The peer has more transmit queues than this end has receive queues.
            ip("link add v0 numrxqueues 1 numtxqueues 1 type veth peer name v1 numrxqueues 1 numtxqueues 4");
            ip("link set v0 up");
            ip("link set v1 up");
            let native = Options { mode: Mode::Native, ..options("v0") };
            let error = XdpProgram::attach(&native).map(drop).unwrap_err().to_string();
            assert!(error.contains("mode=skb") && error.contains("transmit queues"), "{error}");
            assert!(!Path::new(PIN_ROOT).exists(), "nothing is left behind");
            assert_eq!(XdpProgram::attach(&options("v0")).unwrap().attached_mode(), Mode::Skb);
            assert!(XdpProgram::attach(&Options { queues: 65, ..options("v0") }).is_err());
        },
    );
}

#[test]
fn without_capabilities_the_text_says_which() {
    in_bpf_namespace("uplink::xdp::program::tests::without_capabilities_the_text_says_which", || {
        let wanted = options("lo");
        let refusal = std::thread::spawn(move || {
            crate::uplink::netlab::drop_capabilities();
            XdpProgram::attach(&wanted).map(drop).unwrap_err().to_string()
        });
        let text = refusal.join().unwrap();
        assert!(text.contains("CAP_BPF") && text.contains("CAP_NET_ADMIN"), "{text}");
        assert!(!Path::new(PIN_ROOT).exists());
    });
}
