//! `cargo xtask test`: unit tests, whole-program tests in order, documentation tests, a short run of the fuzzers.
//!
//! Here: what is run and how it is counted. A test binary is libtest's; what it prints is read line by
//! line, shown as progress, and shown whole when something fails.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{cargo, fuzz, privileged, setup, target_dir};

/// A test binary that prints nothing for so long hangs.
const SILENCE: Duration = Duration::from_secs(600);

/// Seconds for each fuzz target.
const FUZZ_SECONDS: u32 = 10;

/// Whole-program tests with these prefixes take long; of them, `--quick` runs [`QUICK`] only.
const LONG: [&str; 2] = ["qemu_", "dpdk_"];
const QUICK: [&str; 1] = ["qemu_boot"];

/// Arguments of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Unit tests and short whole-program tests only
    #[arg(long)]
    quick: bool,
    /// Test the release build of the back-end
    #[arg(long)]
    release: bool,
    /// Run only tests whose name, or whose file's name, contains this
    filter: Option<String>,
}

/// What was counted.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Tally {
    fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// One program with tests in it.
#[derive(Debug)]
struct TestBinary {
    name: String,
    executable: PathBuf,
    /// Where cargo would run it.
    package_dir: PathBuf,
    is_unit: bool,
}

/// Runs the tests; true if none failed.
pub fn run(options: &Options) -> Result<bool> {
    let started = Instant::now();
    setup::run(setup::Parts::All)?;
    let backend = build_backend(options.release)?;
    let mut binaries = build_tests()?;
    if options.quick {
        binaries.retain(|b| {
            let is_long = LONG.iter().any(|prefix| b.name.starts_with(prefix));
            b.is_unit || !is_long || QUICK.contains(&b.name.as_str())
        });
    }
    let skip_list = tempfile::NamedTempFile::new()?;
    let mut total = Tally::default();
    let mut failures = Vec::new();
    for binary in &binaries {
        let mut command = privileged(&binary.executable);
        command.current_dir(&binary.package_dir).env("CARGO_MANIFEST_DIR", &binary.package_dir);
        command.env(lab::LAB_DIR, target_dir().join("lab")).env(lab::BACKEND, &backend);
        command.env(lab::SKIP_LIST, skip_list.path());
        // Backtraces of libtest's own frames bury the reasons and the logs.
        command.env("RUST_BACKTRACE", "0");
        if !binary.is_unit {
            command.arg("--test-threads=1");
        }
        if let Some(filter) = &options.filter
            && !binary.name.contains(filter.as_str())
        {
            command.arg(filter);
        }
        let tally = run_libtest(&binary.name, command, skip_list.path(), &mut failures)?;
        total.add(tally);
    }
    if !options.quick {
        if options.filter.is_none() {
            let mut command = cargo();
            command.args(["test", "--quiet", "--workspace", "--doc"]);
            total.add(run_libtest("documentation", command, skip_list.path(), &mut failures)?);
        }
        total.add(run_fuzzers(options.filter.as_deref(), &mut failures)?);
    }

    println!("\nafter {} s:", started.elapsed().as_secs());
    for line in fs::read_to_string(skip_list.path())?.lines() {
        println!("skipped {line}");
    }
    for failure in &failures {
        println!("failed  {failure}");
    }
    println!("{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped);
    Ok(total.failed == 0)
}

fn build_backend(release: bool) -> Result<PathBuf> {
    println!("test: building the back-end");
    let mut build = cargo();
    build.args(["build", "--package", "vhost-user-net"]);
    if release {
        build.arg("--release");
    }
    ensure!(build.status()?.success(), "the back-end does not build");
    Ok(target_dir().join(if release { "release" } else { "debug" }).join("vhost-user-net"))
}

/// Builds all test binaries and returns them in the order in which they run.
fn build_tests() -> Result<Vec<TestBinary>> {
    println!("test: building the tests");
    let mut build = cargo();
    build.args(["test", "--workspace", "--no-run", "--message-format=json-render-diagnostics"]);
    let out = build.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(out.status.success(), "the tests do not build");
    let mut binaries: Vec<TestBinary> =
        out.stdout.lines().map_while(Result::ok).filter_map(|l| binary(&l)).collect();
    // Units first, then short whole-program tests, then guests; the boot before all that needs one.
    binaries.sort_by_key(|b| {
        let rank = if b.is_unit {
            0
        } else if QUICK.contains(&b.name.as_str()) {
            2
        } else if LONG.iter().any(|prefix| b.name.starts_with(prefix)) {
            3
        } else {
            1
        };
        (rank, b.name.clone())
    });
    Ok(binaries)
}

/// Reads one of cargo's messages.
fn binary(line: &str) -> Option<TestBinary> {
    let message: Value = serde_json::from_str(line).ok()?;
    if message["profile"]["test"] != true {
        return None;
    }
    let executable = PathBuf::from(message["executable"].as_str()?);
    let target = &message["target"];
    let is_unit = target["kind"][0] != "test";
    let package_dir = Path::new(message["manifest_path"].as_str()?).parent()?.to_owned();
    let name = target["name"].as_str()?.to_owned();
    let kind = if target["kind"][0] == "bin" { " (program)" } else { "" };
    Some(TestBinary { name: format!("{name}{kind}"), executable, package_dir, is_unit })
}

/// Runs a libtest program with progress.
fn run_libtest(name: &str, command: Command, skip_list: &Path, failures: &mut Vec<String>) -> Result<Tally> {
    let skipped_before = count_lines(skip_list);
    let started = Instant::now();
    println!("test: {name}");
    let (status, output) = run_watched(command, |line| {
        if let Some((test, result)) = result_line(line)
            && result != "ok"
        {
            println!("test:   {test} {result}");
        }
    })?;
    let mut tally = Tally::default();
    let mut has_result = false;
    for line in &output {
        if let Some(counted) = summary_line(line) {
            has_result = true;
            tally.add(counted);
        }
        if let Some((test, "FAILED")) = result_line(line) {
            failures.push(format!("{name}: {test}"));
        }
    }
    if tally.failed == 0 && !(status.is_some_and(|s| s.success()) && has_result) {
        // It hung, crashed or was killed before it could count.
        tally.passed =
            output.iter().filter(|l| result_line(l).is_some_and(|(_, result)| result == "ok")).count() as u64;
        tally.failed = 1;
        let end =
            status.map_or_else(|| "hung and was killed".to_owned(), |status| format!("ended with {status}"));
        failures.push(format!("{name}: {end}"));
    }
    // A scenario that skips itself looks passed to libtest.
    let skipped = count_lines(skip_list).saturating_sub(skipped_before);
    tally.passed = tally.passed.saturating_sub(skipped);
    tally.skipped += skipped;
    if tally.failed > 0 {
        println!("{}", output.join("\n"));
    }
    let seconds = started.elapsed().as_secs_f32();
    println!(
        "test:   {} passed, {} failed, {} skipped ({seconds:.1} s)",
        tally.passed, tally.failed, tally.skipped
    );
    Ok(tally)
}

fn run_fuzzers(filter: Option<&str>, failures: &mut Vec<String>) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut targets = fuzz::targets();
    targets.retain(|target| filter.is_none_or(|f| format!("fuzz {target}").contains(f)));
    if targets.is_empty() {
        return Ok(tally);
    }
    println!("test: building the fuzzers");
    if let Err(error) = fuzz::prepare() {
        failures.push(format!("fuzz: {error:#}"));
        tally.failed += 1;
        return Ok(tally);
    }
    for target in targets {
        println!("test: fuzz {target} for {FUZZ_SECONDS} s");
        let (status, output) = run_watched(fuzz::command(&target, FUZZ_SECONDS), |_| {})?;
        if status.is_some_and(|s| s.success()) {
            tally.passed += 1;
        } else {
            tally.failed += 1;
            failures.push(format!("fuzz {target}"));
            println!("{}", output.join("\n"));
        }
    }
    Ok(tally)
}

/// Runs a command, both outputs together, and returns how it ended (`None`: killed for silence) and its lines.
fn run_watched(
    mut command: Command,
    mut on_line: impl FnMut(&str),
) -> Result<(Option<std::process::ExitStatus>, Vec<String>)> {
    let (reader, writer) = std::io::pipe()?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    // Our copies of the pipe's writing end.
    drop(command);
    let (lines, inbox) = mpsc::channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            if lines.send(text).is_err() {
                return;
            }
        }
    });
    let mut output = Vec::new();
    loop {
        match inbox.recv_timeout(SILENCE) {
            Ok(line) => {
                on_line(&line);
                output.push(line);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => return Ok((Some(child.wait()?), output)),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                child.kill()?;
                child.wait()?;
                return Ok((None, output));
            }
        }
    }
}

fn count_lines(file: &Path) -> u64 {
    fs::read_to_string(file).map_or(0, |text| text.lines().count() as u64)
}

/// `test NAME ... RESULT`
fn result_line(line: &str) -> Option<(&str, &str)> {
    line.strip_prefix("test ")?.split_once(" ... ")
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; ...`
fn summary_line(line: &str) -> Option<Tally> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |what: &str| {
        counts.split(';').find_map(|part| part.trim().strip_suffix(what)?.trim().parse().ok()).unwrap_or(0)
    };
    Some(Tally { passed: number("passed"), failed: number("failed"), skipped: number("ignored") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtest_lines() {
        let line = "test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.1s";
        assert_eq!(summary_line(line), Some(Tally { passed: 3, failed: 2, skipped: 1 }));
        assert_eq!(summary_line("test a ... ok"), None);
        assert_eq!(result_line("test a::b ... FAILED"), Some(("a::b", "FAILED")));
        assert_eq!(result_line("test result: ok. 1 passed"), None);
    }

    #[test]
    fn cargo_messages() {
        let line = r#"{"reason":"compiler-artifact","manifest_path":"/w/tests/Cargo.toml","target":{"kind":["test"],
            "name":"qemu_boot"},"profile":{"test":true},"executable":"/t/qemu_boot-1"}"#;
        let found = binary(line).unwrap();
        assert!(!found.is_unit && found.name == "qemu_boot" && found.package_dir == Path::new("/w/tests"));
        assert!(binary(r#"{"reason":"build-finished","success":true}"#).is_none());
    }
}
