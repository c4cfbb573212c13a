//! `vubench tx|rx|both|loop|latency --check` on our back-end: some thousand packets each, every one looked into.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use lab::{PATIENCE, until};
use serde_json::Value;

/// Seconds of each measurement; more if a busy machine did not let enough packets through.
const SECONDS: [&str; 3] = ["0.2", "2", "10"];
/// Packets that must be looked into.
const PACKETS: u64 = 1000;

/// The back-end with the ports of a configuration file.
struct BackEnd {
    child: Child,
    folder: tempfile::TempDir,
}

impl BackEnd {
    /// Ports by name, with the uplink of each.
    fn start(ports: &[(&str, &str)]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = |name: &str| folder.path().join(format!("{name}.sock"));
        let mut text = String::new();
        for (name, uplink) in ports {
            let socket = socket(name);
            text +=
                &format!("[[port]]\nname = '{name}'\nsocket = '{}'\nuplink = '{uplink}'\n", socket.display());
        }
        let file = folder.path().join("ports.toml");
        std::fs::write(&file, text)?;
        let child = Command::new(lab::backend_binary()?)
            .arg("--config")
            .arg(file)
            .args(["--log", "warn", "--fault-latency", "off"])
            .stdin(Stdio::null())
            .spawn()?;
        let it = Self { child, folder };
        until("the back-end's sockets", PATIENCE, || {
            Ok(ports.iter().all(|(name, _)| it.socket(name).exists()).then_some(()))
        })?;
        Ok(it)
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.sock"))
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs vubench with checks; what it measured.
fn vubench(load: &str, sockets: &[(&str, &Path)], more: &[&str]) -> Result<Value> {
    let mut last = Ok(Value::Null);
    for seconds in SECONDS {
        last = vubench_for(seconds, load, sockets, more);
        match &last {
            Ok(measured) if measured["checked"].as_u64() < Some(PACKETS) => {}
            Err(error) if error.to_string().contains("no packet") => {}
            _ => return last,
        }
    }
    ensure!(last.is_err(), "{load} {more:?}: too few packets: {last:?}");
    last
}

fn vubench_for(seconds: &str, load: &str, sockets: &[(&str, &Path)], more: &[&str]) -> Result<Value> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vubench"));
    command.arg(load);
    for (option, socket) in sockets {
        command.arg(option).arg(socket);
    }
    command.args(["--check", "--json", "-", "--warm-up", "0.05", "--seconds", seconds]).args(more);
    let output = command.env("RUST_BACKTRACE", "0").output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {errors}");
    let mut all: Value = serde_json::from_slice(&output.stdout).context("JSON")?;
    let measured = all["measured"].take();
    eprintln!("{load} {more:?}: {measured}");
    Ok(measured)
}

#[test]
fn sent_packets_stay_whole() -> Result<()> {
    let backend = BackEnd::start(&[("sink", "null")])?;
    let socket = backend.socket("sink");
    for more in [&[][..], &["--frame", "1500", "--ring-size", "1024"], &["--event-idx"], &["--no-mergeable"]]
    {
        vubench("tx", &[("--socket", &socket)], more)?;
    }
    vubench("tx", &[("--socket", &socket)], &["--packed"])?;
    vubench("tx", &[("--socket", &socket)], &["--packed", "--event-idx", "--ring-size", "64"])?;
    vubench("tx", &[("--socket", &socket)], &["--in-order"])?;
    vubench("tx", &[("--socket", &socket)], &["--packed", "--in-order"])?;
    let paced = vubench("tx", &[("--socket", &socket)], &["--pps", "20000"])?;
    ensure!(paced["tx_mpps"].as_f64().is_some_and(|mpps| mpps < 0.05), "{paced}");
    Ok(())
}

#[test]
fn received_packets_are_whole() -> Result<()> {
    let backend = BackEnd::start(&[("short", "null:generate=64"), ("long", "null:generate=1500")])?;
    let (short, long) = (backend.socket("short"), backend.socket("long"));
    vubench("rx", &[("--socket", &short)], &[])?;
    vubench("rx", &[("--socket", &long)], &["--no-mergeable"])?;
    // Each in several buffers.
    vubench("rx", &[("--socket", &long)], &["--receive-len", "512"])?;
    vubench("both", &[("--socket", &short)], &["--event-idx"])?;
    vubench("rx", &[("--socket", &long)], &["--packed", "--receive-len", "512"])?;
    vubench("both", &[("--socket", &short)], &["--packed"])?;
    vubench("both", &[("--socket", &short)], &["--packed", "--in-order"])?;
    vubench("both", &[("--socket", &short)], &["--in-order"])?;
    Ok(())
}

#[test]
fn many_ports_at_once() -> Result<()> {
    let names: Vec<String> = (0..8).map(|i| format!("port{i}")).collect();
    let ports: Vec<_> = names.iter().map(|name| (name.as_str(), "null")).collect();
    let backend = BackEnd::start(&ports)?;
    let sockets: Vec<_> = names.iter().map(|name| backend.socket(name)).collect();
    let sockets: Vec<_> = sockets.iter().map(|s| ("--socket", s.as_path())).collect();
    let measured = vubench("tx", &sockets, &["--pps", "5000", "--greedy", "1"])?;
    let by_port = measured["by_port"].as_array().context("by port")?;
    ensure!(by_port.len() == 8 && by_port.iter().all(|n| n.as_u64() > Some(0)), "{measured}");
    Ok(())
}

#[test]
fn packets_go_round_between_peers() -> Result<()> {
    let backend = BackEnd::start(&[("left", "peer:right"), ("right", "peer:left")])?;
    let (left, right) = (backend.socket("left"), backend.socket("right"));
    let ends = [("--socket", left.as_path()), ("--peer-socket", right.as_path())];
    for more in [
        &[][..],
        &["--packed"],
        &["--frame", "1500", "--in-flight", "32"],
        &["--frame", "1500", "--receive-len", "512", "--packed", "--in-order", "--in-flight", "32"],
        &["--one-way", "--event-idx"],
    ] {
        let measured = vubench("loop", &ends, more)?;
        // The ring has room for all that is in flight.
        ensure!(measured["lost"] == 0, "{more:?}: {measured}");
    }
    for more in [&[][..], &["--packed"], &["--pps", "5000"]] {
        let measured = vubench("latency", &ends, more)?;
        let trip = &measured["round_trip"];
        ensure!(trip["p50_ns"].as_u64() <= trip["p99_ns"].as_u64(), "{more:?}: {measured}");
    }
    Ok(())
}

/// Nobody sends anything back.
#[test]
fn a_sink_is_no_echo() -> Result<()> {
    let backend = BackEnd::start(&[("sink", "null")])?;
    let output = Command::new(env!("CARGO_BIN_EXE_vubench"))
        .args(["latency", "--seconds", "10", "--socket"])
        .arg(backend.socket("sink"))
        .env("RUST_BACKTRACE", "0")
        .output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && errors.contains("nothing comes back"), "{output:?}");
    Ok(())
}
