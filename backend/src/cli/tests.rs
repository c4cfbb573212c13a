//! The command line: what becomes a command, and every error sentence.
#![forbid(unsafe_code)]

use super::*;
use crate::config::{Endpoint, Postcopy, PostcopyMultiqueue};
use std::time::Duration;

fn run(line: &str) -> Result<Command, CliError> {
    parse_from(std::iter::once("vhost-user-net").chain(line.split_whitespace()))
}

fn config(line: &str) -> Config {
    match run(line) {
        Ok(Command::Run(config)) => config,
        other => panic!("{line}: {other:?}"),
    }
}

#[test]
fn one_port_from_options() {
    let config = config(
        "--socket-path /run/vm1.sock --uplink tap:vm1,up --queue-pairs 4 --workers 2 --mtu 1400 \
         --mac 52:54:00:12:34:56 --log debug --disable-protocol-feature rarp \
         --disable-protocol-feature=mtu",
    );
    let port = PortConfig {
        name: "vm1".into(),
        endpoint: Endpoint::Listen("/run/vm1.sock".into()),
        uplink: UplinkSpec::Tap { name: "vm1".into(), up: true },
        queue_pairs: 4,
        mtu: Some(1400),
        mac: Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]),
        disabled_protocol_features: 1 << 2 | 1 << 4,
        postcopy: Postcopy::Auto,
        postcopy_multiqueue: PostcopyMultiqueue::Off,
    };
    let expected = Config {
        workers: 2,
        log: Some("debug".into()),
        instance: "vm1".into(),
        fault_latency: FaultLatency::Auto,
        poll: Poll::default(),
        ports: vec![port],
    };
    assert_eq!(config, expected);
}

#[test]
fn endpoints() {
    let of = |line| config(line).ports[0].endpoint.clone();
    assert_eq!(of("--socket-path=a --uplink null"), Endpoint::Listen("a".into()));
    assert_eq!(of("--socket-path a --client --uplink null"), Endpoint::Connect("a".into()));
    assert_eq!(of("--fd=3 --uplink null"), Endpoint::Fd(3));
    assert_eq!(config("--fd=3 --uplink null --name x").ports[0].name, "x");
}

#[test]
fn print_capabilities_ignores_all_else() {
    for line in ["--print-capabilities", "--bogus --print-capabilities", "--print-capabilities --fd x"] {
        assert_eq!(run(line).expect(line), Command::PrintCapabilities);
    }
}

#[test]
fn check_config_with_and_without_file() {
    let Ok(Command::CheckConfig(config)) = run("--check-config --fd 3 --uplink null") else {
        panic!("not a check")
    };
    assert_eq!(
        summary(&config),
        "port fd3: uses socket fd 3, uplink null, 1 queue pair\nok: 1 port, 1 worker\n"
    );
    let dir = tempfile::tempdir().expect("tempdir");
    let file = dir.path().join("c.toml");
    std::fs::write(&file, "workers = 2\nlog = 'warn'\n[[port]]\nsocket = 's'\nuplink = 'null'\n")
        .expect("write");
    let file = file.display();
    let Ok(Command::CheckConfig(config)) = run(&format!("--config {file} --check-config")) else {
        panic!("not a check")
    };
    assert_eq!((config.workers, config.log.as_deref()), (2, Some("warn")));
    let Ok(Command::Run(config)) = run(&format!("--config {file} --workers 5 --log error")) else {
        panic!("not a run")
    };
    assert_eq!((config.workers, config.log.as_deref()), (5, Some("error")));
}

#[test]
fn help_and_version_are_no_errors() {
    for line in ["--help", "-h", "--version"] {
        assert_eq!(run(line).expect_err(line).exit_code(), 0, "{line}");
    }
}

/// (options, the first line of the message)
#[rustfmt::skip]
const ERRORS: &[(&str, &str)] = &[
    ("", "no control socket, add one of: --socket-path PATH, --fd N, --config FILE"),
    ("--check-config", "no control socket, add one of: --socket-path PATH, --fd N, --config FILE"),
    ("--socket-path a --fd 3 --uplink null", "a socket path and an inherited fd exclude each other, keep one"),
    ("--fd 3 --client --uplink null",
        "client mode connects to a socket's path, it cannot be used with an inherited fd: drop one"),
    ("--socket-path a", "no uplink, add one of: --uplink tap:NAME, --uplink tap-fd:N, --uplink xdp:INTERFACE, --uplink null"),
    ("--socket-path= --uplink null",
        "error: invalid value '' for '--socket-path <PATH>': the socket's path is empty, give the path of a Unix socket"),
    ("--fd x --uplink null", "error: invalid value 'x' for '--fd <N>': 'x' is not a whole number"),
    ("--fd=-1 --uplink null", "error: invalid value '-1' for '--fd <N>': fd is -1, choose a number from 0 to 2147483647"),
    ("--fd 3 --uplink dpdk:eth0",
        "error: invalid value 'dpdk:eth0' for '--uplink <UPLINK>': uplink 'dpdk:eth0' is unknown, use tap:NAME, tap-fd:N, xdp:INTERFACE, peer:PORT or null"),
    ("--fd 3 --uplink null --queue-pairs 0",
        "error: invalid value '0' for '--queue-pairs <N>': queue-pairs is 0, choose a number from 1 to 128"),
    ("--fd 3 --uplink null --workers 65",
        "error: invalid value '65' for '--workers <N>': workers is 65, choose a number from 1 to 64"),
    ("--fd 3 --uplink null --mtu 67",
        "error: invalid value '67' for '--mtu <BYTES>': mtu is 67, choose a number from 68 to 65535"),
    ("--fd 3 --uplink null --mac 5",
        "error: invalid value '5' for '--mac <AA:BB:CC:DD:EE:FF>': mac '5' is not an address, write it as six hexadecimal bytes: 52:54:00:12:34:56"),
    ("--fd 3 --uplink null --name a/b",
        "error: invalid value 'a/b' for '--name <NAME>': name 'a/b' is not usable, take 1 to 64 of the characters A-Z a-z 0-9 . _ -"),
    ("--fd 3 --uplink null --log a=b=c",
        "error: invalid value 'a=b=c' for '--log <LEVEL>': log filter 'a=b=c' is not valid, use error, warn, info, debug, trace or the syntax of RUST_LOG"),
    ("--fd 3 --uplink tap-fd:3", "fd 3 is given both as control socket and as tap, give two different ones"),
    ("--fd 3 --uplink tap-fd:4 --queue-pairs 2",
        "2 queue pairs need 2 tap fds, but the uplink has 1: give one tap-fd per queue pair"),
    ("--fd 3 --uplink null --queue-pairs 2 --disable-protocol-feature mq",
        "2 queue pairs need the protocol feature mq, enable it again or use 1 queue pair"),
    ("--config f --fd 3", "error: the argument '--config <FILE>' cannot be used with '--fd <N>'"),
    ("--config f --mtu 1400", "error: the argument '--config <FILE>' cannot be used with '--mtu <BYTES>'"),
    ("--config /nonexistent/f",
        "/nonexistent/f: cannot be read (No such file or directory (os error 2)), check the path and its permissions"),
    ("--fd 3 --uplink null --instance a/b",
        "error: invalid value 'a/b' for '--instance <NAME>': instance 'a/b' is not usable, take 1 to 64 of the characters A-Z a-z 0-9 _ - and not xdp- first"),
    ("--fd 3 --uplink null --fault-latency sometimes",
        "error: invalid value 'sometimes' for '--fault-latency <WHEN>': fault-latency is 'sometimes', choose auto, on or off"),
    ("faults --watch 0",
        "error: invalid value '0' for '--watch [<SECONDS>]': '0' is no interval, give seconds from 0.1 to 86400"),
    ("unload --all eth0", "error: the argument '--all' cannot be used with '[IFACE]'"),
    ("unload eth0 --instance a", "error: the argument '[IFACE]' cannot be used with '--instance <NAME>'"),
    ("--fd 3 faults", "error: the subcommand 'faults' cannot be used with '--fd <N>'"),
    ("--bogus", "error: unexpected argument '--bogus' found"),
    ("--fd 3 --fd 4 --uplink null", "error: the argument '--fd <N>' cannot be used multiple times"),
];

#[test]
fn every_error_is_one_clear_sentence() {
    for (line, sentence) in ERRORS {
        let error = run(line).expect_err(line);
        assert_eq!(error.to_string().lines().next(), Some(*sentence), "{line}");
        assert_eq!(error.exit_code(), EXIT_USAGE, "{line}");
    }
    let error = run("--fd 3 --uplink null --disable-protocol-feature warp").expect_err("feature");
    assert!(error.to_string().contains("'warp' is not a protocol feature, choose from: mq log-shmfd rarp"));
}

#[test]
fn commands() {
    let faults = |line| match run(line) {
        Ok(Command::Faults(what)) => what,
        other => panic!("{line}: {other:?}"),
    };
    assert_eq!(faults("faults"), Faults::default());
    let all = Faults { instance: Some("web".into()), json: true, watch: Some(Duration::from_millis(500)) };
    assert_eq!(faults("faults --instance web --json --watch 0.5"), all);
    assert_eq!(faults("faults --watch --json").watch, Some(Duration::from_secs(1)));
    for (line, what) in [
        ("unload", Unload::Instance(None)),
        ("unload --instance web", Unload::Instance(Some("web".into()))),
        ("unload eth0.7", Unload::Interface("eth0.7".into())),
        ("unload --all", Unload::All),
    ] {
        assert_eq!(run(line).expect(line), Command::Unload(what), "{line}");
    }
}

#[test]
fn what_is_measured_and_as_what() {
    let of = |line| {
        let config = config(line);
        (config.instance, config.fault_latency)
    };
    let both = of("--socket-path /run/vm.1.sock --uplink null --instance web --fault-latency off");
    assert_eq!(both, ("web".into(), FaultLatency::Off));
    assert_eq!(of("--socket-path /run/vm.1.sock --uplink null"), ("vm_1".into(), FaultLatency::Auto));
}

#[test]
fn options_are_consistent() {
    use clap::CommandFactory;
    Options::command().debug_assert();
}
