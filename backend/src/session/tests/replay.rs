//! What real front-ends sent, replayed message by message: QEMU 7.2 and 10.0 with DPDK's testpmd or a stub as the
//! back-end. The files hold the messages (`>`, `!` is need_reply, `+n` fds) and the replies (`<`) of one connection;
//! ours must be the same, and nothing may be refused.

use super::*;
use std::fmt::Write;

struct Message<'a> {
    name: &'a str,
    need_reply: bool,
    args: Vec<u64>,
    fds: u32,
}

fn number(word: &str) -> u64 {
    match word.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).unwrap(),
        None => word.parse().unwrap(),
    }
}

fn parse(line: &str) -> Message<'_> {
    let mut words = line.split(' ').skip(1);
    let name = words.next().unwrap();
    let (mut args, mut fds) = (Vec::new(), 0);
    for word in words {
        match word.strip_prefix('+') {
            Some(count) => fds = count.parse().unwrap(),
            None if matches!(word, "ack" | "log" | "table" | "uffd") => {}
            None => args.push(number(word)),
        }
    }
    Message { name: name.trim_end_matches('!'), need_reply: name.ends_with('!'), args, fds }
}

fn payload(name: &str, args: &[u64]) -> Vec<u8> {
    let regions = |args: &[u64]| -> Vec<WireRegion> {
        args.chunks(4)
            .map(|r| WireRegion { guest_phys: r[0], size: r[1], user_addr: r[2], mmap_offset: r[3] })
            .collect()
    };
    match name {
        "SET_VRING_NUM" | "SET_VRING_BASE" | "GET_VRING_BASE" | "SET_VRING_ENABLE" => {
            state(args[0] as u32, args[1] as u32)
        }
        "SET_VRING_ADDR" => VringAddr {
            index: args[0] as u32,
            flags: args[1] as u32,
            desc_user: args[2],
            used_user: args[3],
            avail_user: args[4],
            log_guest: args[5],
        }
        .as_bytes()
        .to_vec(),
        "SET_MEM_TABLE" if args.len() > 1 => table(&regions(args)),
        "ADD_MEM_REG" => SingleRegion { padding: 0, region: regions(args)[0] }.as_bytes().to_vec(),
        _ => args.iter().flat_map(|arg| arg.to_ne_bytes()).collect(),
    }
}

/// The replies in the files' words.
fn spell(steps: &[Step<Fd>]) -> Vec<String> {
    let spelled = steps.iter().filter_map(|step| match step {
        Step::Send(bytes) => Some(spell_one(bytes)),
        Step::SendUserfaultfd(bytes) => {
            assert_eq!(bytes.len(), super::super::HEADER_BYTES);
            Some("< POSTCOPY_ADVISE uffd".into())
        }
        _ => None,
    });
    spelled.collect()
}

fn spell_one(bytes: &[u8]) -> String {
    let (header, payload) = Header::read_from_prefix(bytes).unwrap();
    let name = Session::<Fd>::row(header.request).unwrap().name;
    assert_eq!((header.flags, header.size as usize), (5, payload.len()));
    let value = || u64::read_from_bytes(payload).unwrap();
    match name {
        "SET_MEM_TABLE" if payload.len() > 8 => {
            assert_eq!((payload.len() - 8) % size_of::<WireRegion>(), 0);
            format!("< {name} table")
        }
        "SET_LOG_BASE" => format!("< {name} log"),
        "GET_VRING_BASE" => {
            let state = VringState::read_from_bytes(payload).unwrap();
            format!("< {name} {} {}", state.index, state.num)
        }
        _ if name.starts_with("GET_") => format!("< {name} {:#x}", value()),
        _ => {
            assert_eq!(value(), 0, "{name} was refused");
            format!("< {name} ack")
        }
    }
}

/// What the owner was told, in a few words, without call and error fds and repeated enables.
fn summary(effect: &Effect<Fd>, out: &mut String) {
    let _ = match effect {
        Effect::SetMemTable { regions, .. } => write!(out, "table{} ", regions.len()),
        Effect::AddMemReg { .. } => write!(out, "add "),
        Effect::SetLogBase { size, .. } => write!(out, "log{size:#x} "),
        Effect::SetFeatures { log_all, .. } => write!(out, "features{} ", if *log_all { "+log" } else { "" }),
        Effect::StartRing { index, config, .. } => {
            write!(out, "start{index}@{}{} ", config.base, if config.enabled { "" } else { "-off" })
        }
        Effect::UpdateRing { index, config } => {
            write!(out, "update{index}{} ", if config.log_used.is_some() { "+log" } else { "" })
        }
        Effect::StopRing { index } => write!(out, "stop{index} "),
        Effect::EnableRing { index, enabled } => {
            write!(out, "{}{index} ", if *enabled { "on" } else { "off" })
        }
        Effect::SetMtu(mtu) => write!(out, "mtu{mtu} "),
        Effect::SendRarp(_) => write!(out, "rarp "),
        Effect::Reset => write!(out, "reset "),
        Effect::RemMemReg { .. }
        | Effect::SetCall { .. }
        | Effect::SetErr { .. }
        | Effect::SetBackendChannel(_) => Ok(()),
        Effect::PostcopyAdvise => write!(out, "advise "),
        Effect::PostcopyListen => write!(out, "listen "),
        Effect::PostcopyArm => write!(out, "arm "),
        Effect::PostcopyWake => write!(out, "wake "),
        Effect::PostcopyEnd => write!(out, "end "),
    };
}

/// Replay one connection; what the owner was told.
fn replay(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let recorded =
        |name: &str| lines.iter().map(|line| parse(line)).find(|m| m.name == name && !m.args.is_empty());
    let mut lab = Lab::with(SessionConfig {
        features: recorded("GET_FEATURES").unwrap().args[0],
        protocol_features: recorded("GET_PROTOCOL_FEATURES").unwrap().args[0],
        queue_pairs: recorded("GET_QUEUE_NUM").unwrap().args[0] as u16,
        max_mem_slots: recorded("GET_MAX_MEM_SLOTS").map_or(32, |message| message.args[0]),
        config_space: None,
        mtu_max: 9000,
        postcopy_resend: true,
    });
    let mut told = String::new();
    for (at, line) in lines.iter().enumerate().filter(|(_, line)| line.starts_with('>')) {
        // What the front-end will be told when it asks for the bases next.
        for reply in
            lines[at..].iter().rev().filter(|line| line.starts_with("< GET_VRING_BASE")).map(|l| parse(l))
        {
            lab.owner.bases[reply.args[0] as usize] = reply.args[1] as u16;
        }
        let Message { name, need_reply, mut args, fds } = parse(line);
        if name == "SET_PROTOCOL_FEATURES" {
            // The recorded back-end offered more than we do.
            args[0] &= lab.session.cfg.protocol_features;
        }
        let id = Session::<Fd>::rows().iter().find(|row| row.name == name).unwrap().id as u32;
        let steps = lab.send_raw(id, if need_reply { NEED_REPLY } else { PLAIN }, &payload(name, &args), fds);
        for step in &steps {
            match step {
                Step::Effect(effect) => summary(effect, &mut told),
                Step::Send(_) | Step::SendUserfaultfd(_) => {}
                other => panic!("line {}: {line}: {other:?}", at + 1),
            }
        }
        let expected: Vec<&str> =
            lines[at + 1..].iter().copied().take_while(|next| next.starts_with('<')).collect();
        if name != "GET_PROTOCOL_FEATURES" {
            assert_eq!(spell(&steps), expected, "line {}: {line}", at + 1);
        }
    }
    assert_eq!(lab.session.stats().refused(), 0);
    told.trim_end().to_string()
}

macro_rules! replays {
    ($($test:ident: $file:literal => $told:literal,)*) => { $(
        #[test]
        fn $test() {
            let told = replay(include_str!(concat!("testdata/", $file, ".txt")));
            let expected = $told.split_whitespace().collect::<Vec<_>>().join(" ");
            assert_eq!(told, expected);
        }
    )* };
}

replays! {
    boot_qemu10: "boot-qemu10" => "features table1 start0@0 start1@0 stop0 stop1",
    precopy_qemu10_source: "precopy-qemu10-source" =>
        "features table1 start0@0 start1@0 log0x2000 features+log update0+log update1+log
         stop0 stop1",
    precopy_qemu10_destination: "precopy-qemu10-destination" => "features table1 start0@61 start1@66",
    precopy_qemu7_source: "precopy-qemu7-source" =>
        "features table1 start0@0 start1@0 log0x2000 features+log update0+log update1+log
         stop0 stop1 reset",
    precopy_qemu7_destination: "precopy-qemu7-destination" =>
        "features table1 start0@66 start1@71 stop0 stop1 reset",
    two_pairs_qemu10_source: "two-pairs-qemu10-source" =>
        "features table1 start0@0 start1@0 features start2@0-off start3@0-off on0 on1 on2
         on3 log0x2000 features+log update0+log update1+log features+log update2+log
         update3+log stop0 stop1 stop2 stop3",
    two_pairs_qemu10_destination: "two-pairs-qemu10-destination" =>
        "features table1 start0@1 start1@0 features start2@60 start3@67 stop0 stop1 stop2
         stop3",
    announce_qemu10_destination: "announce-qemu10-destination" =>
        "rarp features table1 start0@61 start1@66 rarp rarp rarp rarp stop0 stop1",
    start_stop_start_qemu10: "start-stop-start-qemu10" =>
        "reset reset features add start0@0 start1@0 stop0 stop1 features start0@0 start1@0
         stop0 stop1",
    start_stop_start_qemu7: "start-stop-start-qemu7" =>
        "features add start0@0 start1@0 stop0 stop1 reset features start0@0 start1@0 stop0
         stop1 reset",
    hotplug_slots_qemu10: "hotplug-slots-qemu10" =>
        "reset reset features add start0@0 start1@0 add stop0 stop1",
    hotplug_table_qemu10: "hotplug-table-qemu10" => "features table1 start0@0 start1@0 table2 stop0 stop1",
    host_mtu_qemu10: "host-mtu-qemu10" => "mtu1400 features table1 start0@0 start1@0 stop0 stop1",
    postcopy_qemu10_destination: "postcopy-qemu10-destination" =>
        "advise listen features table1 arm start0@28 start1@34 end stop0 stop1",
    postcopy_two_pairs_qemu10_destination: "postcopy-two-pairs-qemu10-destination" =>
        "advise advise listen features table1 arm start0@18 start1@24 features start2@6 wake start3@5 wake end
         stop0 stop1 stop2 stop3",
    reconnect_qemu10: "reconnect-qemu10" => "features table1 start0@4 start1@4 stop0 stop1",
    qemu_is_server_qemu10: "qemu-is-server-qemu10" => "features table1 start0@0 start1@0",
    live_update_qemu10_old: "live-update-qemu10-old" => "features table1 start0@0 start1@0 stop0 stop1",
    live_update_qemu10_new: "live-update-qemu10-new" => "features table1 start0@4 start1@6 stop0 stop1",
}
