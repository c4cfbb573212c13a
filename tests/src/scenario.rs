//! One test's surroundings: a folder, a lock, a reason to skip, and a report when it fails.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::fs::{self, File};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use tempfile::TempDir;

use crate::artefacts::{Artefacts, lab_dir};
use crate::netns::NetNs;

/// Environment variable: set to 1, a scenario that would be skipped fails instead.
pub const REQUIRE_ALL: &str = "VUN_REQUIRE_ALL";

/// Environment variable: a file to which each skipped scenario appends `name: reason`.
pub const SKIP_LIST: &str = "VUN_SKIP_LIST";

/// Environment variable: set to 1, the folder with logs is kept when a scenario fails.
const KEEP: &str = "VUN_KEEP";

/// Lines of each log that are shown when a scenario fails.
const TAIL_LINES: usize = 40;

/// What a scenario works with.
#[derive(Debug)]
pub struct Lab {
    /// The lab's parts.
    pub artefacts: Artefacts,
    dir: TempDir,
    logs: Cell<u32>,
    // Scenarios load the whole machine and would disturb each other: one at a time per build folder.
    _lock: Flock<File>,
}

impl Lab {
    /// Waits for its turn and makes a folder.
    pub fn open() -> Result<Self> {
        let artefacts = Artefacts::find()?;
        let lock = lab_dir().join("lock");
        let file = File::create(&lock).with_context(|| format!("cannot open {}", lock.display()))?;
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        let dir = tempfile::Builder::new().prefix("vun-lab-").tempdir()?;
        Ok(Self { artefacts, dir, logs: Cell::new(0), _lock: lock })
    }

    /// The folder for sockets and logs; it goes when the lab is dropped.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// A new log file's path; its end is shown if the scenario fails.
    pub fn new_log(&self, name: &str) -> PathBuf {
        let number = self.logs.get() + 1;
        self.logs.set(number);
        self.path(&format!("{number:02}-{name}.log"))
    }

    /// Leaves the folder where it is.
    fn keep(&mut self) -> &Path {
        self.dir.disable_cleanup(true);
        self.dir.path()
    }

    /// The ends of all logs, for a person who looks for the reason of a failure.
    pub fn tails(&self) -> String {
        let mut files: Vec<PathBuf> = fs::read_dir(self.dir())
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        files.retain(|file| file.extension().is_some_and(|e| e == "log"));
        files.sort();
        let mut text = String::new();
        for file in files {
            let content = String::from_utf8_lossy(&fs::read(&file).unwrap_or_default()).into_owned();
            let lines: Vec<&str> = content.lines().filter(|line| !line.trim().is_empty()).collect();
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let from = lines.len().saturating_sub(TAIL_LINES);
            text.push_str(&format!("--- {name} (last {} of {} lines)\n", lines.len() - from, lines.len()));
            for line in &lines[from..] {
                text.push_str(line);
                text.push('\n');
            }
        }
        text
    }
}

/// Runs a test that needs real parts: skips it with a printed reason where the machine cannot have
/// them, prints the ends of all logs if it fails.
pub fn scenario(name: &str, body: impl FnOnce(&Lab) -> Result<()>) {
    if let Err(reason) = usable() {
        skip(name, &format!("{reason:#}"));
        return;
    }
    let mut lab = Lab::open().unwrap_or_else(|error| panic!("{name}: {error:#}"));
    let outcome = catch_unwind(AssertUnwindSafe(|| body(&lab)));
    if !matches!(outcome, Ok(Ok(()))) {
        eprintln!("{}", lab.tails());
        if std::env::var_os(KEEP).is_some_and(|v| v != "0") {
            eprintln!("logs are kept in {}", lab.keep().display());
        } else {
            eprintln!("(set {KEEP}=1 to keep the whole logs)");
        }
    }
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(error)) => panic!("{name}: {error:#}"),
        Err(panic) => resume_unwind(panic),
    }
}

/// What every scenario needs.
fn usable() -> Result<()> {
    Artefacts::find()?;
    let netns = NetNs::new()?;
    netns.add_tap("probe0", false, None).context("this machine lets us make no tap")
}

/// Says, and notes where it is asked for, that a test is skipped; fails if nothing may be skipped.
pub fn skip(name: &str, reason: &str) {
    assert!(std::env::var_os(REQUIRE_ALL).is_none_or(|v| v == "0"), "{name} may not be skipped: {reason}");
    eprintln!("SKIPPED {name}: {reason}");
    if let Some(list) = std::env::var_os(SKIP_LIST) {
        let file = File::options().append(true).create(true).open(list);
        if let Err(error) = file.and_then(|mut file| writeln!(file, "{name}: {reason}")) {
            eprintln!("lab: cannot note the skipped test: {error}");
        }
    }
}
