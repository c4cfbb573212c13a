//! Two Linux guests wired together: pings and TCP, with all offloads and without any at one end.
#![forbid(unsafe_code)]

use anyhow::{Result, ensure};
use lab::rawfront::Backend;
use lab::{Lab, PATIENCE, Qemu, QemuConfig, scenario, until};
use std::time::Duration;

const OTHER_IP: &str = "10.77.0.3";
const OTHER_MAC: &str = "52:54:00:12:34:57";
const MIB: u32 = 8;
/// Two emulated guests on few cores.
const TRANSFER: Duration = Duration::from_secs(180);

/// One guest has split rings, the other packed ones.
#[test]
fn qemu_peer_with_all_offloads() {
    scenario("qemu_peer_with_all_offloads", |lab| {
        let counts = both_ways(lab, &["packed=on".into()])?;
        ensure!(counts.large, "no frame crossed in one piece");
        ensure!(counts.software == 0, "{} frames were finished in software", counts.software);
        Ok(())
    });
}

/// Checksums and segments that the sender leaves to the device are made on the way.
#[test]
fn qemu_peer_with_a_guest_that_takes_no_offloads() {
    scenario("qemu_peer_with_a_guest_that_takes_no_offloads", |lab| {
        let off = ["csum", "tso4", "tso6", "ecn", "uso4", "uso6"].map(|name| format!("guest_{name}=off"));
        let counts = both_ways(lab, &off)?;
        ensure!(counts.software > 0, "nothing was finished in software");
        Ok(())
    });
}

struct Counts {
    /// Frames were longer than an MTU.
    large: bool,
    /// Frames that were finished in software.
    software: u64,
}

/// Boots both guests, the second with `device` properties; they ping each other and exchange files.
fn both_ways(lab: &Lab, device: &[String]) -> Result<Counts> {
    let port = |name: &str, peer: &str| {
        format!("[[port]]\nname = '{name}'\nsocket = '@/{name}.sock'\nuplink = 'peer:{peer}'\n")
    };
    let mut backend = Backend::with_config(&[port("left", "right"), port("right", "left")].concat())?;
    until("the back-end's sockets", PATIENCE, || Ok(backend.socket("right").exists().then_some(())))?;
    let mut first = Qemu::boot(lab, &QemuConfig::new("first", &backend.socket("left")))?;
    let mut config = QemuConfig::new("second", &backend.socket("right"));
    (config.ip, config.mac, config.device) = (OTHER_IP.into(), OTHER_MAC.into(), device.to_vec());
    let mut second = Qemu::boot(lab, &config)?;
    first.run(&format!("ping -c 3 -W 10 {OTHER_IP}"))?;
    let lost = first.run(&format!("ping -c 20 -i 0.1 -s 1400 -W 10 {OTHER_IP}"))?;
    ensure!(lost.contains(" 0% packet loss"), "{lost}");
    transfer(&mut first, &mut second, OTHER_IP)?;
    transfer(&mut second, &mut first, lab::GUEST_IP)?;
    let [a, b] = [backend.counters("left")?, backend.counters("right")?];
    let count = |counter: &str| b.get(counter).copied().unwrap_or(0);
    // (Emulated guests may be slow to give buffers: TCP sees to that.)
    for cause in ["too_long", "mtu", "offload"] {
        ensure!(count(&format!("rx_dropped_{cause}")) == 0, "{}", backend.summary("right")?);
    }
    ensure!(a.get("tx_bad_header").is_none_or(|count| *count == 0), "{}", backend.summary("left")?);
    first.check_alive()?;
    second.check_alive()?;
    drop((first, second));
    backend.check_alive()?;
    Ok(Counts {
        large: count("rx_bytes") > u64::from(MIB) << 20 && count("rx_bytes") / count("rx_packets") > 1600,
        software: count("rx_software_offload"),
    })
}

/// One guest sends random bytes to the other over TCP; they must arrive unchanged.
fn transfer(from: &mut Qemu, to: &mut Qemu, to_ip: &str) -> Result<()> {
    // An end of its input would make the receiver close its direction, and the sender would leave.
    to.run("mkfifo /tmp/open; (nc -l -p 5001 <>/tmp/open >/tmp/got; md5sum </tmp/got >/tmp/sum) >/dev/null 2>&1 & true")?;
    from.run(&format!("dd if=/dev/urandom of=/tmp/sent bs=1M count={MIB} 2>/dev/null"))?;
    let sent = from.run("md5sum </tmp/sent")?;
    until("the other guest to listen", PATIENCE, || {
        let listening = to.run("cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -c :1389 || true")?;
        Ok((listening.trim() != "0").then_some(()))
    })?;
    from.shell.run_within(&format!("nc {to_ip} 5001 </tmp/sent"), TRANSFER)?;
    until("the other guest to have it all", TRANSFER, || {
        Ok(to.run("test -s /tmp/sum && echo yes || echo no")?.contains("yes").then_some(()))
    })?;
    let got = to.run("cat /tmp/sum")?;
    ensure!(got.trim() == sent.trim(), "sent {sent}, arrived {got}");
    to.run("rm /tmp/open /tmp/got /tmp/sum")?;
    from.run("rm /tmp/sent").map(drop)
}
