//! Every error sentence of a configuration file, and what a right one becomes.
#![forbid(unsafe_code)]

use super::*;

const FILE: &str = "ports.toml";

fn parse(text: &str) -> Result<Config, String> {
    parse_text(text, Path::new(FILE)).map_err(|e| e.to_string())
}

#[test]
fn full_file() {
    let config = parse(
        r#"
        workers = 3
        log = "warn,vhost_user_net=debug"
        instance = "cloud-7"
        fault-latency = "on"
        poll = "auto:50"
        [[port]]
        name = "web"
        socket = "/run/web.sock"
        uplink = "tap:web0,up"
        queue-pairs = 4
        [[port]]
        socket = "/run/my db.sock"
        client = true
        uplink = "tap-fd:7:8"
        queue-pairs = 2
        mtu = 1400
        mac = "52:54:00:12:34:56"
        disable-protocol-features = ["status", "configure-mem-slots"]
        [[port]]
        fd = 5
        uplink = "null"
        "#,
    )
    .expect("valid");
    let first = PortConfig {
        name: "web".into(),
        endpoint: Endpoint::Listen("/run/web.sock".into()),
        uplink: UplinkSpec::Tap { name: "web0".into(), up: true },
        queue_pairs: 4,
        mtu: None,
        mac: None,
        disabled_protocol_features: 0,
        postcopy: Postcopy::Auto,
        postcopy_multiqueue: PostcopyMultiqueue::Off,
    };
    let second = PortConfig {
        name: "my_db".into(),
        endpoint: Endpoint::Connect("/run/my db.sock".into()),
        uplink: UplinkSpec::TapFds(vec![7, 8]),
        queue_pairs: 2,
        mtu: Some(1400),
        mac: Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]),
        disabled_protocol_features: 1 << 15 | 1 << 16,
        postcopy: Postcopy::Auto,
        postcopy_multiqueue: PostcopyMultiqueue::Off,
    };
    let third = PortConfig {
        name: "fd5".into(),
        endpoint: Endpoint::Fd(5),
        uplink: UplinkSpec::Null { generate: None },
        queue_pairs: 1,
        mtu: None,
        mac: None,
        disabled_protocol_features: 0,
        postcopy: Postcopy::Auto,
        postcopy_multiqueue: PostcopyMultiqueue::Off,
    };
    let log = Some("warn,vhost_user_net=debug".into());
    let expected = Config {
        workers: 3,
        log,
        instance: "cloud-7".into(),
        fault_latency: FaultLatency::On,
        poll: Poll::Auto(std::time::Duration::from_micros(50)),
        ports: vec![first, second, third],
    };
    assert_eq!(config, expected);
}

#[test]
fn example_file_is_valid() {
    let config = parse(include_str!("../../contrib/vhost-user-net.toml")).expect("valid");
    assert_eq!(config.ports.len(), 4);
}

#[test]
fn summary_line_names_everything() {
    let config = parse(
        "[[port]]\nsocket = '/a/b.sock'\nuplink = 'tap:t0,up'\nmtu = 9000\nqueue-pairs = 2\n\
         mac = '02:00:00:00:00:0a'\ndisable-protocol-features = ['rarp', 'status']",
    )
    .expect("valid");
    assert_eq!(
        config.ports[0].to_string(),
        "port b: listens at /a/b.sock, uplink tap:t0,up, 2 queue pairs, mtu 9000, mac 02:00:00:00:00:0a, \
         without rarp status"
    );
}

#[test]
fn poll_words() {
    for text in ["never", "always", "auto:1", "auto:10000"] {
        assert_eq!(text.parse::<Poll>().expect(text).to_string(), text);
    }
    assert_eq!("auto".parse(), Ok(Poll::default()));
    for text in ["", "on", "auto:", "auto:0", "auto:10001", "auto:5us", "always:5", "Auto"] {
        let problem = text.parse::<Poll>().expect_err(text).to_string();
        assert!(problem.contains("auto:MICROSECONDS"), "{problem}");
    }
}

#[test]
fn limits_are_inclusive() {
    let port = "[[port]]\nsocket = 's'\nuplink = 'null'\n";
    for value in ["queue-pairs = 128", "mtu = 68", "mtu = 65535", "queue-pairs = 1"] {
        assert!(parse(&format!("{port}{value}")).is_ok(), "{value}");
    }
    assert!(parse(&format!("workers = 64\n{port}")).is_ok());
    let path = "p".repeat(MAX_SOCKET_PATH_LEN);
    assert!(parse(&format!("[[port]]\nsocket = '{path}'\nuplink = 'null'")).is_ok());
}

/// (what is checked, the file, the whole sentence)
#[rustfmt::skip]
const ERRORS: &[(&str, &str, &str)] = &[
    ("peer without a name", "[[port]]\nsocket='s'\nuplink='peer'",
        "ports.toml:3: peer '' is no port's name, write peer:PORT with the name of another [[port]] of the file"),
    ("peer that is not there", "[[port]]\nname='a'\nsocket='s'\nuplink='peer:b'",
        "ports.toml:1: port 'a': uplink peer:b: there is no port 'b', give both ports a name in one configuration file"),
    ("peer itself", "[[port]]\nname='a'\nsocket='s'\nuplink='peer:a'",
        "ports.toml:1: port 'a': uplink peer:a is the port itself, name another"),
    ("peer of one side", "[[port]]\nname='a'\nsocket='s'\nuplink='peer:b'\n[[port]]\nname='b'\nsocket='t'\nuplink='null'",
        "ports.toml:1: port 'a': uplink peer:b: port 'b' has uplink null, give it uplink = \"peer:a\": a link has two ends"),
    ("peers of a third", "[[port]]\nname='a'\nsocket='s'\nuplink='peer:b'\n[[port]]\nname='b'\nsocket='t'\nuplink='peer:a'\n[[port]]\nname='c'\nsocket='u'\nuplink='peer:a'",
        "ports.toml:9: port 'c': uplink peer:a: port 'a' has uplink peer:b, give it uplink = \"peer:c\": a link has two ends"),
    ("no port", "workers = 1", "ports.toml: there is no port, add a [[port]] section with socket and uplink"),
    ("workers low", "workers = 0", "ports.toml:1: workers is 0, choose a number from 1 to 64"),
    ("workers high", "\nworkers = 65", "ports.toml:2: workers is 65, choose a number from 1 to 64"),
    ("log", "log = 'vhost_user_net=loud'",
        "ports.toml:1: log filter 'vhost_user_net=loud' is not valid, use error, warn, info, debug, trace or the syntax of RUST_LOG"),
    ("pairs low", "[[port]]\nname='a'\nsocket='s'\nuplink='null'\nqueue-pairs = 0",
        "ports.toml:5: port 'a': queue-pairs is 0, choose a number from 1 to 128"),
    ("pairs high", "[[port]]\nsocket='s'\nuplink='null'\nqueue-pairs = 129",
        "ports.toml:4: queue-pairs is 129, choose a number from 1 to 128"),
    ("pairs huge", "[[port]]\nsocket='s'\nuplink='null'\nqueue-pairs = 65537",
        "ports.toml:4: queue-pairs is 65537, choose a number from 1 to 128"),
    ("mtu low", "[[port]]\nsocket='s'\nuplink='null'\nmtu = 67",
        "ports.toml:4: mtu is 67, choose a number from 68 to 65535"),
    ("mtu high", "[[port]]\nsocket='s'\nuplink='null'\nmtu = 65536",
        "ports.toml:4: mtu is 65536, choose a number from 68 to 65535"),
    ("mtu negative", "[[port]]\nsocket='s'\nuplink='null'\nmtu = -1",
        "ports.toml:4: mtu is -1, choose a number from 68 to 65535"),
    ("fd negative", "[[port]]\nfd = -2\nuplink='null'",
        "ports.toml:2: fd is -2, choose a number from 0 to 2147483647"),
    ("mac short", "[[port]]\nsocket='s'\nuplink='null'\nmac='52:54:00:12:34'",
        "ports.toml:4: mac '52:54:00:12:34' is not an address, write it as six hexadecimal bytes: 52:54:00:12:34:56"),
    ("mac long", "[[port]]\nsocket='s'\nuplink='null'\nmac='52:54:00:12:34:56:78'",
        "ports.toml:4: mac '52:54:00:12:34:56:78' is not an address, write it as six hexadecimal bytes: 52:54:00:12:34:56"),
    ("mac sign", "[[port]]\nsocket='s'\nuplink='null'\nmac='52:54:00:12:34:+6'",
        "ports.toml:4: mac '52:54:00:12:34:+6' is not an address, write it as six hexadecimal bytes: 52:54:00:12:34:56"),
    ("mac multicast", "[[port]]\nsocket='s'\nuplink='null'\nmac='53:54:00:12:34:56'",
        "ports.toml:4: mac '53:54:00:12:34:56' is a multicast address, choose one whose first byte is even"),
    ("mac zero", "[[port]]\nsocket='s'\nuplink='null'\nmac='00:00:00:00:00:00'",
        "ports.toml:4: mac is all zero, choose another or leave it out"),
    ("name", "[[port]]\nname='a b'\nsocket='s'\nuplink='null'",
        "ports.toml:2: port 'a b': name 'a b' is not usable, take 1 to 64 of the characters A-Z a-z 0-9 . _ -"),
    ("feature", "[[port]]\nsocket='s'\nuplink='null'\ndisable-protocol-features=['rarp',\n'speed']",
        "ports.toml:5: 'speed' is not a protocol feature, choose from: mq log-shmfd rarp reply-ack mtu backend-req cross-endian pagefault config backend-send-fd host-notifier inflight-shmfd reset-device inband-notifications configure-mem-slots status xen-mmap shared-object device-state"),
    ("no socket", "\n[[port]]\nname='a'\nuplink='null'",
        "ports.toml:2: port 'a': no control socket, add one of: socket = \"PATH\", fd = NUMBER"),
    ("both sockets", "[[port]]\nsocket='s'\nfd=3\nuplink='null'",
        "ports.toml:1: a socket path and an inherited fd exclude each other, keep one"),
    ("client with fd", "[[port]]\nfd=3\nclient=true\nuplink='null'",
        "ports.toml:1: client mode connects to a socket's path, it cannot be used with an inherited fd: drop one"),
    ("empty path", "[[port]]\nsocket=''\nuplink='null'",
        "ports.toml:2: the socket's path is empty, give the path of a Unix socket"),
    ("no uplink", "[[port]]\nsocket='s'",
        "ports.toml:1: no uplink, add one of: uplink = \"tap:NAME\", \"tap-fd:N\", \"xdp:INTERFACE\", \"peer:PORT\", \"null\""),
    ("uplink kind", "[[port]]\nsocket='s'\nuplink='tun:a'",
        "ports.toml:3: uplink 'tun:a' is unknown, use tap:NAME, tap-fd:N, xdp:INTERFACE, peer:PORT or null"),
    ("uplink empty", "[[port]]\nsocket='s'\nuplink=''",
        "ports.toml:3: uplink '' is unknown, use tap:NAME, tap-fd:N, xdp:INTERFACE, peer:PORT or null"),
    ("tap without name", "[[port]]\nsocket='s'\nuplink='tap'",
        "ports.toml:3: tap name '' is not usable, take 1 to 15 characters without blank, '/', ':', '%' or ','"),
    ("tap long name", "[[port]]\nsocket='s'\nuplink='tap:abcdefghijklmnop'",
        "ports.toml:3: tap name 'abcdefghijklmnop' is not usable, take 1 to 15 characters without blank, '/', ':', '%' or ','"),
    ("tap slash", "[[port]]\nsocket='s'\nuplink='tap:a/b'",
        "ports.toml:3: tap name 'a/b' is not usable, take 1 to 15 characters without blank, '/', ':', '%' or ','"),
    ("tap option", "[[port]]\nsocket='s'\nuplink='tap:a,down'",
        "ports.toml:3: tap option 'down' is unknown, the only one is: up (bring the link up)"),
    ("tap-fd text", "[[port]]\nsocket='s'\nuplink='tap-fd:x'",
        "ports.toml:3: tap-fd 'x' is not a list of fd numbers, write tap-fd:3 or, one per queue pair, tap-fd:3:4:5"),
    ("tap-fd negative", "[[port]]\nsocket='s'\nuplink='tap-fd:-1'",
        "ports.toml:3: tap-fd '-1' is not a list of fd numbers, write tap-fd:3 or, one per queue pair, tap-fd:3:4:5"),
    ("tap-fd twice", "[[port]]\nsocket='s'\nuplink='tap-fd:3:3'",
        "ports.toml:3: tap-fd has fd 3 twice, give each queue pair its own"),
    ("null option", "[[port]]\nsocket='s'\nuplink='null:fast'",
        "ports.toml:3: uplink null does not know ':fast', it is null, null:generate or null:generate=BYTES with 60 to 9014 bytes"),
    ("tap-fd count", "[[port]]\nname='a'\nsocket='s'\nuplink='tap-fd:3'\nqueue-pairs=2",
        "ports.toml:1: port 'a': 2 queue pairs need 2 tap fds, but the uplink has 1: give one tap-fd per queue pair"),
    ("pairs without mq", "[[port]]\nsocket='s'\nuplink='null'\nqueue-pairs=2\ndisable-protocol-features=['mq']",
        "ports.toml:1: 2 queue pairs need the protocol feature mq, enable it again or use 1 queue pair"),
    ("same name", "[[port]]\nname='a'\nsocket='s'\nuplink='null'\n[[port]]\nname='a'\nsocket='t'\nuplink='null'",
        "ports.toml:5: port 'a': name 'a' is also used by port 'a', give each port its own"),
    ("same socket", "[[port]]\nname='a'\nsocket='/s'\nuplink='null'\n[[port]]\nname='b'\nsocket='/./s'\nclient=true\nuplink='null'",
        "ports.toml:5: port 'b': socket /s is also used by port 'a', give each port its own"),
    ("same tap", "[[port]]\nname='a'\nsocket='/s'\nuplink='tap:x'\n[[port]]\nname='b'\nsocket='/t'\nuplink='tap:x,up'",
        "ports.toml:5: port 'b': tap 'x' is also used by port 'a', give each port its own"),
    ("same fd", "[[port]]\nname='a'\nfd=4\nuplink='null'\n[[port]]\nname='b'\nfd=3\nuplink='tap-fd:4'",
        "ports.toml:5: port 'b': fd 4 is also used by port 'a', give each port its own"),
    ("xdp option", "[[port]]\nsocket='s'\nuplink='xdp:e,zerocopy=yes'",
        "ports.toml:3: xdp option zerocopy=yes is not possible, use auto, on, off"),
    ("xdp conflict", "[[port]]\nname='a'\nsocket='/s'\nuplink='xdp:e,mode=skb'\n[[port]]\nname='b'\nsocket='/t'\nuplink='xdp:e,mode=native'",
        "ports.toml:5: port 'b': uplink xdp:e has another mode= than port 'a' on the same interface, give all its ports the same or only one of them"),
    ("xdp address twice", "[[port]]\nname='a'\nsocket='/s'\nuplink='xdp:e'\nmac='02:00:00:00:00:01'\n[[port]]\nname='b'\nsocket='/t'\nuplink='xdp:e,mac=02:00:00:00:00:01'",
        "ports.toml:6: port 'b': address 02:00:00:00:00:01 on xdp:e is also used by port 'a', give each port its own"),
    ("xdp anti-spoof", "[[port]]\nname='a'\nsocket='/s'\nuplink='xdp:e,anti-spoof=on'",
        "ports.toml:1: port 'a': anti-spoof=on needs the port's address: add mac= to the uplink, or mac to the port"),
    ("fd as socket and tap", "[[port]]\nname='a'\nfd=4\nuplink='tap-fd:4'",
        "ports.toml:1: port 'a': fd 4 is given both as control socket and as tap, give two different ones"),
    ("unknown key", "[[port]]\nsocket='s'\nuplink='null'\nqueues=2",
        "ports.toml:4: unknown field `queues`, expected one of `name`, `socket`, `fd`, `client`, `uplink`, `queue-pairs`, `mtu`, `mac`, `disable-protocol-features`, `postcopy`, `postcopy-multiqueue`, correct the file's syntax, keys or types"),
    ("instance", "instance = 'a.b'",
        "ports.toml:1: instance 'a.b' is not usable, take 1 to 64 of the characters A-Z a-z 0-9 _ - and not xdp- first"),
    ("instance of an interface", "instance = 'xdp-eth0'",
        "ports.toml:1: instance 'xdp-eth0' is not usable, take 1 to 64 of the characters A-Z a-z 0-9 _ - and not xdp- first"),
    ("poll", "\npoll = 'auto:0'", "ports.toml:2: poll is 'auto:0', choose one of: auto, auto:MICROSECONDS (1 to 10000), never, always"),
    ("fault latency", "\nfault-latency = 'yes'", "ports.toml:2: fault-latency is 'yes', choose auto, on or off"),
    ("unknown top key", "threads = 2",
        "ports.toml:1: unknown field `threads`, expected one of `workers`, `log`, `instance`, `fault-latency`, `poll`, `port`, correct the file's syntax, keys or types"),
    ("wrong type", "[[port]]\nsocket='s'\nuplink='null'\nmtu='big'",
        "ports.toml:4: invalid type: string \"big\", expected i64, correct the file's syntax, keys or types"),
    ("syntax", "[[port]]\nsocket = \n",
        "ports.toml:2: string values must be quoted, expected literal string, correct the file's syntax, keys or types"),
];

#[test]
fn an_instance_is_called_like_its_file_or_port_as_far_as_that_is_possible() {
    assert_eq!(parse("[[port]]\nsocket = 's'\nuplink = 'null'").expect("valid").instance, "ports");
    for (from, expected) in [
        ("vm1", "vm1"),
        ("my.web server", "my_web_server"),
        ("", "vhost-user-net"),
        ("xdp-eth0", "vhost-user-net"),
    ] {
        assert_eq!(default_instance(from), expected);
        assert!(instance(expected).is_ok());
    }
}

#[test]
fn every_error_is_one_clear_sentence() {
    for (case, text, sentence) in ERRORS {
        assert_eq!(parse(text).expect_err(case), *sentence, "{case}");
        assert!(!sentence.contains('\n'), "{case}");
    }
}

#[test]
fn too_long_path_and_too_many_ports() {
    let path = "p".repeat(MAX_SOCKET_PATH_LEN + 1);
    assert_eq!(
        parse(&format!("[[port]]\nsocket = '{path}'\nuplink = 'null'")).expect_err("too long"),
        format!("ports.toml:2: socket path {path} is longer than 107 bytes, choose a shorter one")
    );
    let many: String = (0..=MAX_PORTS).map(|i| format!("[[port]]\nsocket='{i}'\nuplink='null'\n")).collect();
    assert_eq!(
        parse(&many).expect_err("too many"),
        "ports.toml: 1025 ports are too many for one process, use up to 1024"
    );
}

#[test]
fn unreadable_files() {
    let dir = tempfile::tempdir().expect("tempdir");
    let missing = dir.path().join("none.toml");
    let text = load(&missing).expect_err("missing").to_string();
    assert_eq!(
        text,
        format!(
            "{}: cannot be read (No such file or directory (os error 2)), check the path and its permissions",
            missing.display()
        )
    );
    let huge = dir.path().join("huge");
    std::fs::File::create(&huge).and_then(|f| f.set_len(1 << 30)).expect("sparse file");
    let text = load(&huge).expect_err("huge").to_string();
    assert_eq!(text, format!("{}: is larger than 4194304 bytes, is this the right file?", huge.display()));
}

#[test]
fn uplink_text_round_trips() {
    for text in ["tap:a", "tap:a,up", "tap-fd:3", "tap-fd:3:9:4", "xdp:e,vlan=7", "peer:b", "null"] {
        assert_eq!(text.parse::<UplinkSpec>().expect(text).to_string(), text);
    }
}

#[test]
fn ports_may_be_wired_in_any_order_and_with_any_pairs() {
    let port = |name, peer, pairs| {
        format!(
            "[[port]]\nname = '{name}'\nsocket = '{name}'\nuplink = 'peer:{peer}'\nqueue-pairs = {pairs}\n"
        )
    };
    let text = [port("a", "c", 1), port("b", "d", 2), port("c", "a", 4), port("d", "b", 2)].concat();
    let config = parse(&text).unwrap();
    let peers: Vec<_> = (0..5).map(|index| peer_of(&config.ports, index)).collect();
    assert_eq!(peers, [Some(2), Some(3), Some(0), Some(1), None]);
}

#[test]
fn postcopy_is_a_choice_of_words() {
    let port = |more: &str| parse(&format!("[[port]]\nsocket = \"/s\"\nuplink = \"null\"\n{more}"));
    let config = port("postcopy = \"off\"\npostcopy-multiqueue = \"resend\"\nqueue-pairs = 2").unwrap();
    assert_eq!(config.ports[0].postcopy, Postcopy::Off);
    assert_eq!(config.ports[0].postcopy_multiqueue, PostcopyMultiqueue::Resend);
    assert_eq!(
        port("postcopy = \"maybe\"").unwrap_err(),
        "ports.toml:4: postcopy is 'maybe', choose one of: auto, on, off"
    );
}

#[test]
fn the_null_uplink_may_make_frames() {
    for (text, generate) in [("null", None), ("null:generate", Some(64)), ("null:generate=1500", Some(1500))]
    {
        let spec: UplinkSpec = text.parse().unwrap();
        assert_eq!(spec, UplinkSpec::Null { generate });
        assert_eq!(spec.to_string().parse(), Ok(spec));
    }
    for text in ["null:generate=59", "null:generate=9015", "null:generate=", "null:make", "null,generate"] {
        text.parse::<UplinkSpec>().unwrap_err();
    }
}
