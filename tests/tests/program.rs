//! The program as an operator meets it: options, exit codes, the kinds of control sockets, and its end.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use lab::rawfront::{Backend, Front, PATIENCE, Setup, Wire, eventually, msg};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

fn run(args: &[&str]) -> Result<Output> {
    let mut child = Command::new(lab::backend_binary()?)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    // What should end at once must not hang the test.
    if !eventually(PATIENCE, || !matches!(child.try_wait(), Ok(None))) {
        child.kill()?;
    }
    Ok(child.wait_with_output()?)
}

/// vhost-user: Backend program conventions.
#[test]
fn capabilities_are_printed_whatever_else_is_asked() -> Result<()> {
    for args in [&["--print-capabilities"][..], &["--bogus", "--fd", "x", "--print-capabilities"]] {
        let output = run(args)?;
        ensure!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        let value: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        ensure!(value == serde_json::json!({"type": "net", "features": []}), "{value}");
    }
    Ok(())
}

/// Each ends with one sentence on stderr and a code that is not 0.
#[test]
fn errors_say_what_to_do() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (file, socket) = (path("file"), path("socket"));
    std::fs::write(&file, "not a socket, and no TOML either")?;
    let _busy = UnixListener::bind(&socket)?;
    let far = path("no/such/folder/socket");
    let cases: &[(&[&str], i32, &str)] = &[
        (&[], 2, "--socket-path"),
        (&["--socket-path", "s"], 2, "--uplink"),
        (&["--socket-path", "s", "--uplink", "null", "--mtu", "1"], 2, "68 to 65535"),
        (&["--config", &file], 2, "file:1:"),
        (&["--config", &far], 2, "cannot be read"),
        (&["--socket-path", &file, "--uplink", "null"], 1, "not a socket"),
        (&["--socket-path", &socket, "--uplink", "null"], 1, "another process is listening"),
        (&["--socket-path", &far, "--uplink", "null"], 1, "directory must exist"),
        (&["--fd", "77", "--uplink", "null"], 1, "77"),
        (&["--fd", "0", "--uplink", "null"], 1, "not an open Unix socket"),
    ];
    for (args, code, text) in cases {
        let output = run(args)?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.code() == Some(*code),
            "{args:?}: {} instead of {code}\n{stderr}",
            output.status
        );
        ensure!(stderr.contains(text), "{args:?}: no '{text}' in\n{stderr}");
        ensure!(!stderr.contains("panicked"), "{args:?}: {stderr}");
    }
    ensure!(Path::new(&file).is_file(), "what was in the way is gone");
    Ok(())
}

#[test]
fn the_example_configuration_is_valid() -> Result<()> {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../backend/contrib/vhost-user-net.toml");
    let output = run(&["--config", example, "--check-config"])?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(output.status.success() && text.ends_with("ok: 4 ports, 1 worker\n"), "{text}");
    Ok(())
}

#[test]
fn a_socket_left_over_by_a_killed_process_is_taken_over() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("s.sock");
    drop(UnixListener::bind(&socket)?);
    ensure!(socket.exists());
    let path = socket.display().to_string();
    let mut backend = Backend::with_options(&["--socket-path", &path, "--uplink", "null"])?;
    // The old file refuses connections; `Wire::connect` waits for the new one.
    Front::up(&socket)?.prove_alive(10)?;
    ensure!(backend.terminate()?.success());
    ensure!(!socket.exists(), "the socket's file is left behind");
    Ok(())
}

/// `--fd N`, connected and listening, in one test: while an fd is inheritable no other child may be started.
#[test]
fn inherited_sockets() -> Result<()> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut backend = with_inherited(&theirs)?;
    drop(theirs);
    let wire = Wire::from_stream(ours);
    ensure!(wire.ask(msg::GET_FEATURES, &[])?.u64()? != 0);
    drop(wire);
    // The only connection there will ever be is over.
    ensure!(eventually(PATIENCE, || backend.check_alive().is_err()), "it goes on with nobody to serve");
    ensure!(backend.terminate()?.success(), "{}", backend.log_text());

    let folder = tempfile::tempdir()?;
    let path = folder.path().join("s.sock");
    let listener = UnixListener::bind(&path)?;
    let mut backend = with_inherited(&listener)?;
    drop(listener);
    for _ in 0..3 {
        Front::up(&path)?.prove_alive(10)?;
    }
    ensure!(backend.terminate()?.success());
    ensure!(path.exists(), "an inherited socket's file is not ours to remove");
    Ok(())
}

fn with_inherited(socket: &impl AsFd) -> Result<Backend> {
    let fd = socket.as_fd();
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let started = Backend::with_options(&["--fd", &fd.as_raw_fd().to_string(), "--uplink", "null"]);
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    started
}

/// `--client`: QEMU serves the socket, comes later, and comes again.
#[test]
fn a_client_connects_again_and_again() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("qemu.sock");
    let text = path.display().to_string();
    let mut backend = Backend::with_options(&["--socket-path", &text, "--client", "--uplink", "null"])?;
    // Nobody serves yet.
    std::thread::sleep(Duration::from_millis(300));
    backend.check_alive()?;
    for round in 0..3 {
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        let mut accepted = None;
        eventually(PATIENCE, || {
            accepted = listener.accept().ok();
            accepted.is_some()
        });
        let (stream, _) = accepted.with_context(|| format!("round {round}: it does not connect"))?;
        stream.set_nonblocking(false)?;
        let mut front = Front::over(Wire::from_stream(stream), Setup::default())?;
        front.bring_up()?;
        front.prove_alive(50)?;
        drop((front, listener));
        std::fs::remove_file(&path)?;
        backend.check_alive()?;
    }
    ensure!(backend.terminate()?.success());
    Ok(())
}

/// While nobody listens and while half a message is there; twice in a row is not worse.
#[test]
fn sigterm_is_a_clean_end() -> Result<()> {
    for _ in 0..5 {
        let mut backend = Backend::with_null_ports(&["a", "b"], 1)?;
        let half = Wire::connect(&backend.socket("a"))?;
        half.send_once(&[1, 0, 0], &[])?;
        let mut running = Front::up(&backend.socket("b"))?;
        running.prove_alive(10)?;
        ensure!(backend.terminate()?.success(), "{}", backend.log_text());
        ensure!(!backend.socket("a").exists() && !backend.socket("b").exists(), "files are left behind");
    }
    Ok(())
}

/// Sixteen ports with front-ends that do nothing, after some work.
#[test]
fn idle_ports_wake_nobody() -> Result<()> {
    let names: Vec<String> = (0..16).map(|i| format!("idle{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let backend = Backend::with_null_ports(&names, 1)?;
    let mut fronts = Vec::new();
    for name in &names {
        let mut front = Front::up(&backend.socket(name))?;
        front.prove_alive(100)?;
        fronts.push(front);
    }
    // What polls for a while after work has come to rest by then.
    std::thread::sleep(Duration::from_millis(300));
    let before = backend.wakeups()?;
    std::thread::sleep(Duration::from_secs(2));
    let woken = backend.wakeups()? - before;
    ensure!(woken == 0, "woken {woken} times in 2 s");
    fronts.iter_mut().try_for_each(|front| front.prove_alive(10).map(drop))
}

#[test]
fn one_port_is_small() -> Result<()> {
    const RESIDENT_MAX_KIB: u64 = 12 << 10;
    let backend = Backend::with_null_ports(&["small"], 1)?;
    let mut front = Front::up(&backend.socket("small"))?;
    front.prove_alive(1000)?;
    let resident = backend.rss_kib()?;
    println!("{resident} KiB resident, ring memory of the guest included");
    ensure!(resident <= RESIDENT_MAX_KIB, "{resident} KiB resident");
    Ok(())
}
