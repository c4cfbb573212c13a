//! Fault latency, seen from outside: page faults of known length, bpftool, `vhost-user-net faults` and `unload`, and a
//! back-end that may or may not measure.
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use lab::rawfront::{Backend, Front, Late, PATIENCE, eventually, test_frame};
use lab::{backend_binary, find_in_path, skip, stalls};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;

/// Below it, a folder for each instance.
const PINS: &str = "/sys/fs/bpf/vhost-user-net";

/// Runs a test that needs the right to load BPF programs, or says why not. It has a BPF file system of its own.
fn measured(name: &str, body: impl FnOnce() -> Result<()>) -> Result<()> {
    let why = match private_bpf_fs() {
        Err(error) => Some(format!("no BPF file system of its own: {error}")),
        Ok(()) => cannot_measure()?,
    };
    match why {
        Some(why) => skip(name, &why),
        None => body()?,
    }
    Ok(())
}

/// Gives this thread, and what it starts, an empty BPF file system: instances are seen by the whole machine otherwise.
fn private_bpf_fs() -> nix::Result<()> {
    const NONE: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), NONE)
}

fn cannot_measure() -> Result<Option<String>> {
    let mut backend = measuring("probe", "auto")?;
    let said = || backend.log_text().lines().find(|line| line.contains("fault latency:")).map(str::to_owned);
    ensure!(
        eventually(PATIENCE, || said().is_some()),
        "nothing is said of fault latency: {}",
        backend.log_text()
    );
    let why = said().filter(|line| line.contains("not measured"));
    backend.terminate()?;
    Ok(why)
}

/// A back-end with the port `vm1` that measures as `instance`.
fn measuring(instance: &str, when: &str) -> Result<Backend> {
    Backend::with_options(&[
        "--socket-path=@/vm1.sock",
        "--uplink=null",
        "--fault-latency",
        when,
        "--instance",
        instance,
    ])
}

/// The small program, with its faults made and its maps still there.
struct Held {
    child: Child,
    instance: String,
    output: String,
}

impl Held {
    fn start(way: &[&str]) -> Result<Self> {
        let mut command = Command::new(stalls::program()?);
        command.args(way).arg("--hold").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let mut reader = BufReader::new(child.stdout.take().context("stdout")?);
        let mut output = String::new();
        // Its last line has the number of events.
        while !output.contains("\"events\":") {
            let len = output.len();
            reader.read_line(&mut output)?;
            ensure!(output.len() > len, "it has ended: {output}");
        }
        let head: Value = serde_json::from_str(output.lines().next().unwrap_or_default())?;
        let instance = head["instance"].as_str().context("no instance")?.to_owned();
        Ok(Self { child, instance, output })
    }

    fn end(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        let status = self.child.wait()?;
        ensure!(status.success(), "it ended with {status}");
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the program under test and returns whether it succeeded, and what it printed on both outputs.
fn ours(arguments: &[&str]) -> Result<(bool, String)> {
    let output = Command::new(backend_binary()?).args(arguments).output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
}

/// What bpftool prints of a pinned map, its fields by name.
fn dump(instance: &str, map: &str) -> Result<Vec<Value>> {
    let path = Path::new(PINS).join(instance).join(map);
    let output = Command::new("bpftool").args(["-j", "map", "dump", "pinned"]).arg(path).output()?;
    ensure!(output.status.success(), "bpftool: {}", String::from_utf8_lossy(&output.stdout));
    let entries: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    Ok(entries.into_iter().map(|entry| entry["formatted"].clone()).collect())
}

fn has_instance(instance: &str) -> bool {
    Path::new(PINS).join(instance).exists()
}

#[test]
fn stalls_of_known_length_are_counted_exactly() -> Result<()> {
    measured("stalls_of_known_length_are_counted_exactly", || {
        let held = Held::start(&[])?;
        stalls::check(&held.output)?;
        held.end()?;
        // The other way too, where the first was fentry.
        let held = Held::start(&["--way", "tracepoint"])?;
        let (mode, _) = stalls::check(&held.output)?;
        ensure!(mode == "tracepoint", "measured by {mode}");
        let instance = held.instance.clone();
        held.end()?;
        ensure!(!has_instance(&instance), "its pins were left");
        Ok(())
    })
}

#[test]
fn an_io_wq_threads_request_tells_the_address_where_the_stack_does_not() -> Result<()> {
    measured("an_io_wq_threads_request_tells_the_address_where_the_stack_does_not", || {
        let held = Held::start(&["--way", "request"])?;
        let populates = held.output.lines().filter(|line| line.contains("\"scenario\":\"populate"));
        let mut count = 0;
        for line in populates {
            let scenario: Value = serde_json::from_str(line)?;
            let change = &scenario["changes"][0];
            ensure!(change["kind"] == scenario["kind"] && change["count"] == scenario["stalls"], "{line}");
            count += 1;
        }
        ensure!(count >= 8, "only {count} populates");
        let tail: Value = serde_json::from_str(held.output.lines().last().unwrap_or_default())?;
        let sources = tail["sources"].as_object().context("no sources")?;
        ensure!(sources.contains_key("io-wq request") && sources.contains_key("worker none"), "{tail}");
        held.end()
    })
}

#[test]
fn bpftool_prints_names_and_the_program_bars() -> Result<()> {
    measured("bpftool_prints_names_and_the_program_bars", || {
        let held = Held::start(&[])?;
        let instance = &held.instance;
        if find_in_path("bpftool").is_some() {
            bpftool_prints_names(instance)?;
        } else {
            skip("bpftool_prints_names_and_the_program_bars (the first part)", "there is no bpftool");
        }

        let (ok, page) = ours(&["faults", "--instance", instance])?;
        ensure!(ok && page.contains("measured by") && page.contains(" │█"), "{page}");
        for words in [
            "vm1  ring",
            "vm2  packet-buffer",
            "vm2  indirect-table",
            "(no port)",
            "io-wq",
            "kinds by the faulting address",
        ] {
            let flat =
                page.split("  ").map(str::trim).filter(|w| !w.is_empty()).collect::<Vec<_>>().join("  ");
            ensure!(flat.contains(words), "no {words}:\n{page}");
        }
        let (ok, text) = ours(&["faults", "--json"])?;
        let value: Value = serde_json::from_str(&text)?;
        ensure!(ok && value["instance"] == **instance && value["process"]["alive"] == true, "{text}");
        let stalls = value["stalls"].as_array().context("no stalls")?;
        let total: u64 = stalls.iter().filter_map(|one| one["count"].as_u64()).sum();
        let made: u64 = held
            .output
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok()?["stalls"].as_u64())
            .sum();
        ensure!(total == made, "{total} stalls of {made}: {text}");

        // Nothing comes any more: a line of JSON for each interval says so.
        let mut watch = Command::new(backend_binary()?);
        watch.args(["faults", "--json", "--watch", "0.1"]).stdout(Stdio::piped());
        let mut watch = watch.spawn()?;
        let mut line = String::new();
        BufReader::new(watch.stdout.take().context("stdout")?).read_line(&mut line)?;
        watch.kill()?;
        watch.wait()?;
        let value: Value = serde_json::from_str(&line)?;
        ensure!(value["interval_s"] == 0.1 && value["stalls"] == serde_json::json!([]), "{line}");
        held.end()
    })
}

fn bpftool_prints_names(instance: &str) -> Result<()> {
    let ports = dump(instance, "fault_ports")?;
    let name = |port: &Value| {
        let bytes = port["value"]["name"].as_array().into_iter().flatten().filter_map(Value::as_u64);
        bytes.map(|byte| byte as u8 as char).take_while(|c| *c != '\0').collect::<String>()
    };
    let mut names: Vec<String> = ports.iter().map(name).collect();
    names.sort();
    ensure!(names == ["vm1", "vm2"], "{ports:?}");
    let hist = dump(instance, "fault_hist")?;
    ensure!(!hist.is_empty(), "no histogram");
    for entry in &hist {
        let (key, value) = (&entry["key"], &entry["value"]);
        ensure!(["port", "kind", "context"].iter().all(|field| key[field].is_u64()), "{key}");
        ensure!(["count", "sum_ns", "max_ns"].iter().all(|field| value[field].is_u64()), "{value}");
        let slots = value["slots"].as_array().context("no slots")?;
        let counted: u64 = slots.iter().filter_map(Value::as_u64).sum();
        ensure!(slots.len() == 40 && Some(counted) == value["count"].as_u64(), "{value}");
    }
    let meta = dump(instance, "fault_meta")?;
    let value = &meta[0]["value"];
    ensure!(
        ["layout", "mode", "pid", "events_lost", "start_time"].iter().all(|f| value[f].is_u64()),
        "{value}"
    );
    let areas = dump(instance, "fault_areas")?;
    ensure!(
        areas.iter().all(|area| area["value"]["kind"].is_u64() && area["key"]["prefix_len"].is_u64()),
        "{areas:?}"
    );
    Ok(())
}

#[test]
fn a_killed_process_leaves_what_it_measured_until_it_is_unloaded() -> Result<()> {
    measured("a_killed_process_leaves_what_it_measured_until_it_is_unloaded", || {
        let mut held = Held::start(&[])?;
        let instance = held.instance.clone();
        let (ok, text) = ours(&["unload", "--instance", &instance])?;
        ensure!(!ok && text.contains("is in use by process"), "{text}");
        held.child.kill()?;
        held.child.wait()?;
        let (ok, page) = ours(&["faults"])?;
        ensure!(ok && page.contains("has ended; this is what it measured") && page.contains(" │█"), "{page}");
        let (ok, text) = ours(&["faults", "--instance", "none-such"])?;
        ensure!(
            !ok && text.contains(&format!("there is no instance none-such; there are: {instance}")),
            "{text}"
        );
        let (ok, text) = ours(&["unload", "--all"])?;
        ensure!(ok && text.contains(&instance) && !has_instance(&instance), "{text}");
        let (ok, text) = ours(&["faults"])?;
        ensure!(!ok && text.contains("no instance measures fault latency"), "{text}");
        ensure!(ours(&["unload", "--all"])?.0, "nothing left is no error");
        Ok(())
    })
}

#[test]
fn maps_of_another_layout_are_refused_with_the_remedy() -> Result<()> {
    const NAME: &str = "maps_of_another_layout_are_refused_with_the_remedy";
    measured(NAME, || {
        if find_in_path("bpftool").is_none() {
            skip(NAME, "there is no bpftool");
            return Ok(());
        }
        // One with other sizes, and one that only says so.
        for (instance, size) in [("older", "16"), ("newer", "24")] {
            let dir = Path::new(PINS).join(instance);
            std::fs::create_dir_all(&dir)?;
            let mut command = Command::new("bpftool");
            command.args(["map", "create"]).arg(dir.join("fault_meta"));
            command.args(["type", "array", "key", "4", "value", size, "entries", "1", "name", "fault_meta"]);
            ensure!(command.status()?.success(), "bpftool map create");
            let mut backend = measuring(instance, "auto")?;
            let remedy = format!("vhost-user-net unload --instance {instance}");
            let said = || backend.log_text().contains(&remedy);
            ensure!(eventually(PATIENCE, said), "{}", backend.log_text());
            Front::up(&backend.socket("vm1"))?.prove_alive(8)?;
            backend.terminate()?;
            let (ok, text) = ours(&["faults", "--instance", instance])?;
            ensure!(!ok && text.contains("of a version with other layouts"), "{text}");
        }
        let (ok, text) = ours(&["faults"])?;
        ensure!(
            !ok && text.contains("several instances: choose one with --instance (newer, older)"),
            "{text}"
        );
        let (ok, text) = ours(&["unload", "--instance", "older"])?;
        ensure!(ok && !has_instance("older") && has_instance("newer"), "{text}");
        let (ok, text) = ours(&["unload"])?;
        ensure!(ok && !Path::new(PINS).exists(), "{text}");
        Ok(())
    })
}

#[test]
fn a_back_end_says_which_memory_is_what_and_cleans_up() -> Result<()> {
    measured("a_back_end_says_which_memory_is_what_and_cleans_up", || {
        const NAME: &str = "vun-test-areas";
        let mut backend = measuring(NAME, "on")?;
        let areas = |kind: u64| {
            let all = dump(NAME, "fault_areas").unwrap_or_default();
            all.iter().filter(|area| area["value"]["port"] == 0 && area["value"]["kind"] == kind).count()
        };
        let has_bpftool = find_in_path("bpftool").is_some();
        let front = Front::up(&backend.socket("vm1"))?;
        if has_bpftool {
            let shown = eventually(PATIENCE, || areas(1) > 0 && areas(3) > 0);
            ensure!(shown, "no areas: {:?}\n{}", dump(NAME, "fault_areas"), backend.log_text());
            let threads = dump(NAME, "fault_threads")?;
            ensure!(threads.iter().any(|t| t["key"] == backend.pid() && t["value"] == 0), "{threads:?}");
        }
        // The name is taken; the second back-end runs all the same.
        let second = measuring(NAME, "auto")?;
        let said = eventually(PATIENCE, || second.log_text().contains("give this one another --instance"));
        ensure!(said, "{}", second.log_text());
        Front::up(&second.socket("vm1"))?.prove_alive(8)?;
        drop(second);
        ensure!(has_instance(NAME), "the second took the first one's pins with it");

        drop(front);
        if has_bpftool {
            ensure!(
                eventually(PATIENCE, || areas(1) + areas(3) == 0),
                "areas stayed: {:?}",
                dump(NAME, "fault_areas")
            );
        }
        ensure!(backend.terminate()?.success(), "{}", backend.log_text());
        ensure!(!has_instance(NAME), "pins were left");
        Ok(())
    })
}

#[test]
fn a_migration_that_breaks_has_its_longest_stalls_counted() -> Result<()> {
    measured("a_migration_that_breaks_has_its_longest_stalls_counted", || {
        const CHAINS: usize = 100;
        let mut backend = measuring("vun-test-broken", "auto")?;
        let mut late = Late::connect(&backend.socket("vm1"), Late::setup(256))?;
        for _ in 0..CHAINS {
            late.front.tx().queue_frame(Front::HEADER_LEN, &test_frame())?;
        }
        let rings = late.ring_pages();
        late.depart(|page| rings.contains(&page))?;
        late.advise()?;
        // The programs may still be being loaded.
        let is_on = || {
            ours(&["faults", "--json"]).is_ok_and(|(ok, text)| ok && !text.contains("\"tracepoint-idle\""))
        };
        ensure!(eventually(PATIENCE, is_on), "{}", backend.log_text());
        late.listen()?;
        late.tell_memory()?;
        late.acknowledge()?;
        late.front.start_rings()?;
        late.front.rings.iter().try_for_each(|ring| ring.kick())?;
        let asleep = || backend.waiting_for_pages().unwrap_or_default();
        ensure!(eventually(PATIENCE, || asleep() >= CHAINS / 2), "only {} populates wait", asleep());
        // Longer than anything else here.
        std::thread::sleep(std::time::Duration::from_secs(1));
        let sleepers = asleep() as u64;
        let away = late.hang_up();
        ensure!(eventually(PATIENCE, || asleep() == 0), "{} wait for ever", asleep());
        let measured = || -> Result<(u64, u64, Value)> {
            let (ok, text) = ours(&["faults", "--json"])?;
            ensure!(ok, "{text}");
            let value: Value = serde_json::from_str(&text)?;
            let stalls = value["stalls"].as_array().context("no stalls")?;
            let sum = |field: &str| stalls.iter().filter_map(|one| one[field].as_u64()).sum();
            Ok((
                sum("count"),
                stalls.iter().filter_map(|one| one["max_ns"].as_u64()).max().unwrap_or(0),
                value,
            ))
        };
        let all = || measured().is_ok_and(|(count, longest, _)| count >= sleepers && longest > 900_000_000);
        ensure!(eventually(PATIENCE, all), "{sleepers} slept: {:?}", measured());
        let (_, _, value) = measured()?;
        ensure!(value["standing"].as_array().is_none_or(Vec::is_empty), "{value}");
        away.check_holes()?;
        ensure!(backend.terminate()?.success(), "{}", backend.log_text());
        Ok(())
    })
}

#[test]
fn of_two_back_ends_that_take_one_name_at_once_one_measures() -> Result<()> {
    measured("of_two_back_ends_that_take_one_name_at_once_one_measures", || {
        const NAME: &str = "vun-test-twice";
        for round in 0..3 {
            let mut both = [measuring(NAME, "auto")?, measuring(NAME, "auto")?];
            let said = |backend: &Backend, what: &str| {
                backend.log_text().lines().any(|line| line.contains("fault latency:") && line.contains(what))
            };
            ensure!(
                eventually(PATIENCE, || both.iter().all(|backend| said(backend, ""))),
                "round {round}: {}{}",
                both[0].log_text(),
                both[1].log_text()
            );
            let losers =
                both.iter().filter(|backend| said(backend, "give this one another --instance")).count();
            let refused = both.iter().filter(|backend| said(backend, "not measured")).count();
            ensure!(
                (losers, refused) == (1, 1),
                "round {round}: {}{}",
                both[0].log_text(),
                both[1].log_text()
            );
            let pins = std::fs::read_dir(Path::new(PINS).join(NAME))?.count();
            ensure!(pins == 8, "round {round}: {pins} pins are left of the one that measures");
            let (ok, text) = ours(&["faults", "--json"])?;
            ensure!(ok && text.contains(NAME), "round {round}: {text}");
            for backend in &mut both {
                backend.terminate()?;
            }
            ensure!(!has_instance(NAME), "round {round}: pins were left");
        }
        Ok(())
    })
}

#[test]
fn without_rights_a_back_end_runs_and_says_once_what_it_lacks() -> Result<()> {
    const NAME: &str = "without_rights_a_back_end_runs_and_says_once_what_it_lacks";
    let Some(setpriv) = find_in_path("setpriv") else {
        skip(NAME, "there is no setpriv");
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("vm1.sock");
    let mut command = Command::new(setpriv);
    command.args(["--bounding-set=-all", "--inh-caps=-all"]).arg(backend_binary()?);
    command.arg("--socket-path").arg(&socket).args(["--uplink=null", "--instance=vun-test-rights"]);
    let mut child = command.stderr(Stdio::piped()).spawn()?;
    let served = eventually(PATIENCE, || socket.exists());
    let works = Front::up(&socket).and_then(|mut front| front.prove_alive(8));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), nix::sys::signal::Signal::SIGTERM)?;
    let mut log = String::new();
    child.stderr.take().context("stderr")?.read_to_string(&mut log)?;
    child.wait()?;
    ensure!(served, "it does not run without rights: {log}");
    works.context(log.clone())?;
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("fault latency")).collect();
    ensure!(lines.len() == 1, "{log}");
    ensure!(
        lines[0].contains("CAP_BPF and CAP_PERFMON are missing") && lines[0].contains("AmbientCapabilities="),
        "{log}"
    );
    Ok(())
}
