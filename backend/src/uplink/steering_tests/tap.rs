//! The tap's program: its result shows the flow hash, ten bits of it in two runs.

use super::frames::{self, FLOW, Flow, MAC, UDP};
use super::{Random, oracle};
use crate::uplink::netlab::in_bpf_namespace;
use aya::maps::{Array, MapData, PerCpuArray};
use aya::programs::{SocketFilter, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use ebpf_common::tap::{Queues, Stats, TABLE_LEN};

struct Rig {
    ebpf: Ebpf,
    table: Array<MapData, Queues>,
    stats: PerCpuArray<MapData, Stats>,
}

impl Rig {
    fn new() -> Self {
        let mut ebpf = EbpfLoader::new().btf(None).load(crate::uplink::tap_steering::OBJECT).unwrap();
        let program: &mut SocketFilter = ebpf.program_mut("vun_tap").unwrap().try_into().unwrap();
        program.load().unwrap();
        let table = ebpf.take_map("tap_queues").unwrap().try_into().unwrap();
        let stats = ebpf.take_map("tap_stats").unwrap().try_into().unwrap();
        Self { ebpf, table, stats }
    }

    fn run(&self, frame: &[u8]) -> u32 {
        let program: &SocketFilter = self.ebpf.program("vun_tap").unwrap().try_into().unwrap();
        // The kernel takes an Ethernet header off before a socket filter runs; a tap's program sees the frame with it.
        let data = [&[0; 14], frame].concat();
        let options = TestRunOptions { data_in: Some(&data), ..TestRunOptions::new() };
        program.test_run(options).unwrap().return_value
    }

    /// The results for these frames when entry `e` of the table is `value(e)`.
    fn results(&mut self, frames: &[Vec<u8>], value: impl Fn(usize) -> u8) -> Vec<u32> {
        let table = std::array::from_fn::<u8, TABLE_LEN, _>(value);
        self.table.set(0, Queues { active: 1, table }, 0).unwrap();
        frames.iter().map(|frame| self.run(frame)).collect()
    }

    fn check(&mut self, frames: &[Vec<u8>]) {
        let before = self.stats();
        let low = self.results(frames, |entry| entry as u8);
        // Not 0 for entry 0, so that a frame without a flow can be told.
        let high = self.results(frames, |entry| (entry >> 8) as u8 + 1);
        let mut expected = Stats::default();
        for (i, frame) in frames.iter().enumerate() {
            let hash = oracle::hash(frame);
            match hash {
                Some(_) => expected.hits += 2,
                None => expected.misses += 2,
            }
            let index = hash.map(|hash| hash as usize % TABLE_LEN);
            let entry = (high[i] != 0).then(|| (high[i] as usize - 1) << 8 | low[i] as usize);
            assert_eq!(entry, index, "frame {i}: {frame:02x?}");
            assert!(index.is_some() || low[i] == 0);
        }
        let after = self.stats();
        assert_eq!(
            (after.hits - before.hits, after.misses - before.misses),
            (expected.hits, expected.misses)
        );
    }

    fn stats(&self) -> Stats {
        let cpus = self.stats.get(&0, 0).unwrap();
        cpus.iter().fold(Stats::default(), |sum, cpu| Stats {
            hits: sum.hits + cpu.hits,
            misses: sum.misses + cpu.misses,
        })
    }
}

#[test]
fn every_frame_has_the_flow_it_should() {
    in_bpf_namespace("uplink::steering_tests::tap::every_frame_has_the_flow_it_should", || {
        let mut rig = Rig::new();
        let frames = frames::all(MAC, FLOW);
        rig.check(&frames);
        let ends = |frame: &Vec<u8>| oracle::ends(frame);
        assert!(frames.iter().filter_map(ends).any(|ends| ends[0].1 == 1234), "ports are found");
        // Both directions.
        let back: Vec<_> = frames::all(MAC, FLOW.back());
        assert_eq!(rig.results(&frames, |e| e as u8), rig.results(&back, |e| e as u8));
    });
}

#[test]
fn a_frame_may_end_anywhere() {
    in_bpf_namespace("uplink::steering_tests::tap::a_frame_may_end_anywhere", || {
        let mut rig = Rig::new();
        for frame in frames::all(MAC, FLOW).iter().step_by(7) {
            let cut: Vec<Vec<u8>> = (1..=frame.len().min(140)).map(|len| frame[..len].to_vec()).collect();
            rig.check(&cut);
        }
        let mut random = Random(0x5eed);
        let frames = frames::all(MAC, FLOW);
        let spoiled: Vec<Vec<u8>> = (0..5000).map(|_| random.spoil(&frames)).collect();
        rig.check(&spoiled);
    });
}

#[test]
fn flows_are_spread_evenly() {
    in_bpf_namespace("uplink::steering_tests::tap::flows_are_spread_evenly", || {
        let mut rig = Rig::new();
        let sets: [Box<dyn Fn(u16) -> Flow>; 3] = [
            Box::new(|i| Flow([1, 2], [20_000 + i, 80])),
            Box::new(|i| Flow([(i % 250) as u8, 2], [5000, 5000 + i / 250])),
            Box::new(|i| Flow([1, (i % 200) as u8], [i, i])),
        ];
        for make in sets {
            for six in [false, true] {
                let frames: Vec<Vec<u8>> = (0..10_000)
                    .map(|i| match six {
                        false => frames::ethernet(MAC, &[], 0x0800, &frames::ipv4(make(i), UDP, 0, 0)),
                        true => frames::ethernet(MAC, &[], 0x86dd, &frames::ipv6(make(i), &[], UDP)),
                    })
                    .collect();
                let mut shares = [0; 4];
                for queue in rig.results(&frames, |entry| (entry % 4) as u8) {
                    shares[queue as usize] += 1;
                }
                assert!(shares.iter().all(|share| (2250..=2750).contains(share)), "{shares:?}");
            }
        }
    });
}
