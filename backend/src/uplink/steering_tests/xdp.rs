//! The XDP program: verdicts and counters.

use super::frames::{self, FLOW, Flow, MAC, UDP};
use super::{Random, oracle};
use crate::uplink::netlab::{in_bpf_namespace, index_of, veth, xdp_socket};
use crate::uplink::xdp::program::OBJECT;
use aya::maps::{Array, HashMap, MapData, PerCpuArray, XskMap};
use aya::programs::{TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use ebpf_common::LAYOUT;
use ebpf_common::xdp::{Config, MacKey, NO_PORT, PortStats, Stats, Steer, VLAN_ANY, VLAN_NONE};
use std::os::fd::{AsRawFd, OwnedFd};

const QUEUES: u32 = 2;
const PORTS: u32 = 4;
const SLOTS: u32 = 7;
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;

/// Of several VLANs; of any VLAN; of a port that is not known now; nobody's.
const ANY: [u8; 6] = [2, 0, 0, 0, 0, 8];
const ORPHAN: [u8; 6] = [2, 0, 0, 0, 0, 9];
const STRANGER: [u8; 6] = [2, 0, 0, 0, 0, 10];
const MULTICAST: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const BROADCAST: [u8; 6] = [0xff; 6];
/// Ports: of MAC without a VLAN, in VLAN 5, in any other; of ANY.
const MACS: [([u8; 6], u16, u32); 5] =
    [(MAC, VLAN_NONE, 0), (MAC, 5, 1), (MAC, VLAN_ANY, 2), (ANY, VLAN_ANY, 3), (ORPHAN, VLAN_NONE, NO_PORT)];
/// Slots of the ports, on each queue.
const STEER: [Steer; PORTS as usize] = [
    Steer { first: 1, count: 4 },
    Steer { first: 5, count: 1 },
    Steer { first: 6, count: 1 },
    Steer { first: 1, count: 0 },
];

struct Rig {
    ebpf: Ebpf,
    interface: u32,
    config: Array<MapData, Config>,
    sockets: XskMap<MapData>,
    stats: PerCpuArray<MapData, Stats>,
    port_stats: PerCpuArray<MapData, PortStats>,
    socket: OwnedFd,
    flood: u16,
    /// Slots of queue 0 and 1 with a socket.
    present: [[bool; SLOTS as usize]; QUEUES as usize],
}

impl Rig {
    fn new() -> Self {
        veth("v0", "v1", QUEUES + 1);
        let mut loader = EbpfLoader::new();
        loader.btf(None).map_max_entries("xdp_steer", QUEUES * PORTS);
        loader.map_max_entries("xsk_socks", QUEUES * SLOTS).map_max_entries("xdp_port_stats", PORTS);
        let mut ebpf = loader.load(OBJECT).unwrap();
        let program: &mut Xdp = ebpf.program_mut("vun_xdp").unwrap().try_into().unwrap();
        program.load().unwrap();
        let mut macs: HashMap<_, MacKey, u32> = ebpf.take_map("mac_table").unwrap().try_into().unwrap();
        for (mac, vlan, port) in MACS {
            macs.insert(MacKey { mac, vlan }, port, 0).unwrap();
        }
        let mut steer: Array<_, Steer> = ebpf.take_map("xdp_steer").unwrap().try_into().unwrap();
        for queue in 0..QUEUES {
            for port in 0..PORTS {
                steer.set(queue * PORTS + port, STEER[port as usize], 0).unwrap();
            }
        }
        let mut rig = Self {
            config: ebpf.take_map("xdp_config").unwrap().try_into().unwrap(),
            sockets: ebpf.take_map("xsk_socks").unwrap().try_into().unwrap(),
            stats: ebpf.take_map("xdp_stats").unwrap().try_into().unwrap(),
            port_stats: ebpf.take_map("xdp_port_stats").unwrap().try_into().unwrap(),
            interface: index_of("v0"),
            socket: xdp_socket(),
            flood: 0,
            present: [[false; SLOTS as usize]; QUEUES as usize],
            ebpf,
        };
        rig.set_flood(0);
        rig
    }

    fn set_flood(&mut self, flood: u16) {
        self.flood = flood;
        let config = Config {
            layout: LAYOUT,
            pid: 0,
            start_time: 0,
            queues: QUEUES,
            ports: PORTS,
            slots: SLOTS,
            flood,
            exact: 1,
        };
        self.config.set(0, config, 0).unwrap();
    }

    fn set_socket(&mut self, queue: usize, slot: usize, present: bool) {
        let index = (queue * SLOTS as usize + slot) as u32;
        match present {
            true => self.sockets.set(index, self.socket.as_raw_fd(), 0).unwrap(),
            false => drop(self.sockets.unset(index)),
        }
        self.present[queue][slot] = present;
    }

    fn run(&self, frame: &[u8], queue: u32) -> u32 {
        let program: &Xdp = self.ebpf.program("vun_xdp").unwrap().try_into().unwrap();
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let context = [0, frame.len() as u32, 0, self.interface, queue, 0].map(u32::to_ne_bytes).concat();
        let options =
            TestRunOptions { data_in: Some(frame), ctx_in: Some(&context), ..TestRunOptions::new() };
        program
            .test_run(options)
            .unwrap_or_else(|error| panic!("{} bytes: {error:?}", frame.len()))
            .return_value
    }

    /// What shall become of a frame: the verdict, its counter, and the port's.
    fn expected(&self, frame: &[u8], queue: u32) -> (u32, Stats, Option<(u32, PortStats)>) {
        let count = |what: fn(&mut Stats)| {
            let mut stats = Stats::default();
            what(&mut stats);
            stats
        };
        let mac: [u8; 6] = frame[..6].try_into().unwrap();
        let is_served = queue < QUEUES;
        let has = |slot: u32| self.present[queue as usize][slot as usize];
        if mac[0] % 2 == 1 {
            return match (self.flood, is_served) {
                (0, _) => (XDP_PASS, count(|s| s.misses = 1), None),
                (_, false) => (XDP_DROP, count(|s| s.drop_queue = 1), None),
                _ if has(0) => (XDP_REDIRECT, count(|s| s.flooded = 1), None),
                _ => (XDP_DROP, count(|s| s.drop_no_socket = 1), None),
            };
        }
        let vlan = oracle::see(frame).vlan;
        let of = |wanted: u16| MACS.iter().find(|(m, v, _)| *m == mac && *v == wanted).map(|found| found.2);
        let port = vlan.and_then(of).or_else(|| of(VLAN_ANY));
        let Some(port) = port else { return (XDP_PASS, count(|s| s.misses = 1), None) };
        let mut port_stats = PortStats::default();
        let steer = STEER.get(port as usize).copied().unwrap_or_default();
        let (verdict, stats) = if !is_served {
            port_stats.drop_queue = 1;
            (XDP_DROP, count(|s| s.drop_queue = 1))
        } else if steer.count > 0 && has(steer.first + oracle::hash(frame).unwrap_or(0) % steer.count) {
            port_stats.hits = 1;
            (XDP_REDIRECT, count(|s| s.hits = 1))
        } else {
            port_stats.drop_no_socket = 1;
            (XDP_DROP, count(|s| s.drop_no_socket = 1))
        };
        (verdict, stats, (port != NO_PORT).then_some((port, port_stats)))
    }

    fn counters(&self) -> (Stats, [PortStats; PORTS as usize]) {
        let port = |port: u32| {
            let mut sum = PortStats::default();
            self.port_stats.get(&port, 0).unwrap().iter().for_each(|cpu| add_port(&mut sum, cpu));
            sum
        };
        let mut sum = Stats::default();
        self.stats.get(&0, 0).unwrap().iter().for_each(|cpu| add(&mut sum, cpu));
        (sum, std::array::from_fn(|i| port(i as u32)))
    }

    fn check(&self, frames: &[Vec<u8>]) {
        let (mut stats, mut port_stats) = self.counters();
        for frame in frames {
            for queue in 0..=QUEUES {
                let (verdict, counted, port) = self.expected(frame, queue);
                assert_eq!(self.run(frame, queue), verdict, "queue {queue}, {port:?}: {frame:02x?}");
                add(&mut stats, &counted);
                if let Some((port, counted)) = port {
                    add_port(&mut port_stats[port as usize], &counted);
                }
            }
        }
        assert_eq!(self.counters(), (stats, port_stats));
    }
}

fn add(sum: &mut Stats, other: &Stats) {
    sum.hits += other.hits;
    sum.misses += other.misses;
    sum.flooded += other.flooded;
    sum.drop_no_socket += other.drop_no_socket;
    sum.drop_queue += other.drop_queue;
    sum.short += other.short;
}

fn add_port(sum: &mut PortStats, other: &PortStats) {
    sum.hits += other.hits;
    sum.drop_no_socket += other.drop_no_socket;
    sum.drop_queue += other.drop_queue;
}

/// Frames to all kinds of addresses.
fn frames() -> Vec<Vec<u8>> {
    let to = [MAC, ANY, ORPHAN, STRANGER, MULTICAST, BROADCAST];
    let all = to.map(|to| frames::all(to, FLOW));
    // All packets of several flows for the address that has several slots; of the others some.
    let flows = [1234, 1235, 1236, 1237].map(|port| Flow([1, 2], [port, 53]));
    let mut found: Vec<_> = flows.iter().flat_map(|flow| frames::all(MAC, *flow)).collect();
    found.extend(all[1..].iter().flat_map(|frames| frames.iter().step_by(17).cloned()));
    found
}

#[test]
fn every_frame_goes_where_it_should() {
    in_bpf_namespace("uplink::steering_tests::xdp::every_frame_goes_where_it_should", || {
        let mut rig = Rig::new();
        let frames = frames();
        for flood in [0, 1] {
            rig.set_flood(flood);
            for slot in 0..SLOTS as usize {
                rig.set_socket(0, slot, flood == 1);
                // Every second one.
                rig.set_socket(1, slot, slot % 2 == 1);
            }
            rig.check(&frames);
        }
    });
}

#[test]
fn frames_have_any_length() {
    in_bpf_namespace("uplink::steering_tests::xdp::frames_have_any_length", || {
        let mut rig = Rig::new();
        for slot in 1..4 {
            rig.set_socket(0, slot, true);
        }
        // The kernel runs no program on fewer than 14 bytes here; from there to one more than the MTU.
        for (kind, packet) in
            [(0x0800, frames::ipv4(FLOW, UDP, 0, 0)), (0x86dd, frames::ipv6(FLOW, &[], UDP))]
        {
            let mut frame = frames::ethernet(MAC, &[(0x8100, 0)], kind, &packet);
            frame.resize(14 + 4 + 1501, 3);
            let lengths: Vec<Vec<u8>> = (14..=frame.len()).map(|len| frame[..len].to_vec()).collect();
            rig.check(&lengths);
        }
        for frame in frames().iter().step_by(5) {
            let cut: Vec<Vec<u8>> = (14..=frame.len().min(140)).map(|len| frame[..len].to_vec()).collect();
            rig.check(&cut);
        }
        let mut random = Random(0x5eed);
        let frames = frames();
        let spoiled: Vec<Vec<u8>> = (0..5000).map(|_| random.spoil(&frames)).collect();
        rig.check(&spoiled);
    });
}

#[test]
fn a_flow_has_one_slot_in_both_directions() {
    in_bpf_namespace("uplink::steering_tests::xdp::a_flow_has_one_slot_in_both_directions", || {
        let mut rig = Rig::new();
        let mut shares = [0; 4];
        for i in 0..400 {
            let flow = Flow([1, 2], [1000 + i, 443]);
            let both = [flow, flow.back()];
            let frames = both.map(|flow| frames::ethernet(MAC, &[], 0x0800, &frames::ipv4(flow, UDP, 0, 0)));
            let slot = 1 + oracle::hash(&frames[0]).unwrap() as usize % 4;
            shares[slot - 1] += 1;
            // The socket of that slot alone, then all others.
            for other in 1..5 {
                rig.set_socket(0, other, other == slot);
            }
            assert!(frames.iter().all(|frame| rig.run(frame, 0) == XDP_REDIRECT));
            for other in 1..5 {
                rig.set_socket(0, other, other != slot);
            }
            assert!(frames.iter().all(|frame| rig.run(frame, 0) == XDP_DROP));
        }
        assert!(shares.iter().all(|share| (70..=130).contains(share)), "{shares:?}");
    });
}

#[test]
fn addresses_for_any_vlan_alone_take_one_look() {
    in_bpf_namespace("uplink::steering_tests::xdp::addresses_for_any_vlan_alone_take_one_look", || {
        let mut rig = Rig::new();
        let config = rig.config.get(&0, 0).unwrap();
        rig.config.set(0, Config { exact: 0, ..config }, 0).unwrap();
        // MAC's port for any VLAN has slot 6.
        rig.set_socket(0, 6, true);
        for frame in frames::all(MAC, FLOW) {
            assert_eq!(rig.run(&frame, 0), XDP_REDIRECT);
        }
        assert!(frames::all(ORPHAN, FLOW).iter().all(|frame| rig.run(frame, 0) == XDP_PASS));
    });
}

#[test]
fn contradictory_maps_do_no_harm() {
    in_bpf_namespace("uplink::steering_tests::xdp::contradictory_maps_do_no_harm", || {
        let mut rig = Rig::new();
        rig.set_socket(0, 1, true);
        let frame = frames::ethernet(MAC, &[(0x8100, 5)], 0x0800, &frames::ipv4(FLOW, UDP, 0, 0));
        rig.set_socket(0, 5, true);
        assert_eq!(rig.run(&frame, 0), XDP_REDIRECT);
        // Fewer slots than the steering says; fewer ports than the addresses say; more of all than the maps have.
        let config = rig.config.get(&0, 0).unwrap();
        for wrong in [
            Config { slots: 5, ..config },
            Config { ports: 1, ..config },
            Config { ports: u32::MAX, slots: u32::MAX, queues: u32::MAX, ..config },
            Config { queues: 0, ..config },
        ] {
            rig.config.set(0, wrong, 0).unwrap();
            for queue in 0..=QUEUES {
                assert!([XDP_DROP, XDP_REDIRECT].contains(&rig.run(&frame, queue)), "never to the stack");
            }
        }
        rig.config.set(0, Config { slots: 5, ..config }, 0).unwrap();
        assert_eq!(rig.run(&frame, 0), XDP_DROP);
    });
}
