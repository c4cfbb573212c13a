//! The back-end as a process: started, watched from outside (log, fds, memory), and ended.
#![forbid(unsafe_code)]

use super::{Confinement, PATIENCE};
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Asks again and again until `done` or the time is over.
pub fn eventually(patience: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Held while a child is started, and while a [`super::SilentFuse`] says nothing: a child closes what it inherits before
/// it becomes another program, and would wait for ever for that file system.
pub(super) static STARTING: Mutex<()> = Mutex::new(());

/// A running back-end, with a folder of its own for its sockets. Ended when dropped.
#[derive(Debug)]
pub struct Backend {
    child: Child,
    folder: tempfile::TempDir,
    log: Arc<Mutex<Vec<String>>>,
}

impl Backend {
    /// Starts a back-end with one `--uplink null` port for each name; see [`Self::socket`].
    pub fn with_null_ports(names: &[&str], queue_pairs: u16) -> Result<Self> {
        let port = |name: &&str| {
            format!(
                "[[port]]\nname = '{name}'\nsocket = '@/{name}.sock'\nuplink = 'null'\nqueue-pairs = {queue_pairs}\n"
            )
        };
        Self::with_config(&names.iter().map(port).collect::<String>())
    }

    /// Starts a back-end with a configuration file; `@` stands for a fresh folder.
    pub fn with_config(config: &str) -> Result<Self> {
        Self::with_rights(config, None)
    }

    /// As [`Self::with_config`], with fewer rights than the test has. Needs root.
    pub fn confined(config: &str, confinement: Confinement) -> Result<Self> {
        Self::with_rights(config, Some(confinement))
    }

    fn with_rights(config: &str, confinement: Option<Confinement>) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("vun-").tempdir()?;
        let file = folder.path().join("ports.toml");
        std::fs::write(&file, config.replace('@', &folder.path().display().to_string()))?;
        let args = ["--config".into(), file.display().to_string()];
        Self::start(folder, &args, confinement)
    }

    /// Starts a back-end with options; `@` stands for a fresh folder.
    pub fn with_options(options: &[&str]) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("vun-").tempdir()?;
        let place = folder.path().display().to_string();
        let args: Vec<String> = options.iter().map(|o| o.replace('@', &place)).collect();
        Self::start(folder, &args, None)
    }

    fn start(folder: tempfile::TempDir, args: &[String], confinement: Option<Confinement>) -> Result<Self> {
        let program = crate::backend_binary()?;
        let mut command = match confinement {
            None => Command::new(&program),
            Some(confinement) => confinement.command(&program, folder.path())?,
        };
        command.args(args).env_remove("RUST_LOG").stdin(Stdio::null()).stderr(Stdio::piped());
        // By this very thread: the child gets its network namespace.
        let starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut child = command.spawn().with_context(|| format!("start {}", program.display()))?;
        drop(starting);
        let stderr = child.stderr.take().context("stderr")?;
        let log = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                sink.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        Ok(Self { child, folder, log })
    }

    /// The socket of a port of [`Self::with_null_ports`].
    pub fn socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.sock"))
    }

    /// The folder that `@` stood for.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails with the log if the process has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the back-end has ended ({status}):\n{}", self.log_text()),
        }
    }

    /// Number of open fds.
    pub fn fds(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.pid()))?.count())
    }

    /// What the open fds are, for messages.
    pub fn fd_list(&self) -> Vec<String> {
        let links = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).into_iter().flatten().flatten();
        let mut list: Vec<String> = links
            .filter_map(|entry| std::fs::read_link(entry.path()).ok())
            .map(|target| target.display().to_string())
            .collect();
        list.sort();
        list
    }

    /// Number of memory mappings.
    pub fn mappings(&self) -> Result<usize> {
        Ok(std::fs::read_to_string(format!("/proc/{}/maps", self.pid()))?.lines().count())
    }

    /// Resident memory that belongs to nobody else, in KiB (guest memory does not count).
    pub fn rss_anon_kib(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find(|l| l.starts_with("RssAnon:")).context("RssAnon")?;
        line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).context("RssAnon's number")
    }

    /// All resident memory, guest memory that was touched included, in KiB.
    pub fn rss_kib(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).context("VmRSS")?;
        line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).context("VmRSS's number")
    }

    /// Threads that wait in the kernel for a page that userfaultfd reports.
    pub fn waiting_for_pages(&self) -> Result<usize> {
        let mut count = 0;
        for task in std::fs::read_dir(format!("/proc/{}/task", self.pid()))?.flatten() {
            // A thread may end meanwhile.
            let place = std::fs::read_to_string(task.path().join("wchan")).unwrap_or_default();
            count += usize::from(place.contains("userfault"));
        }
        Ok(count)
    }

    /// How often its threads have gone to sleep, which is as often as they were woken.
    pub fn wakeups(&self) -> Result<u64> {
        let mut count = 0;
        for task in std::fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let status = std::fs::read_to_string(task?.path().join("status"))?;
            let line =
                status.lines().find(|l| l.starts_with("voluntary_ctxt_switches:")).context("switches")?;
            count += line.split_whitespace().nth(1).context("number")?.parse::<u64>()?;
        }
        Ok(count)
    }

    /// Waits until the number of fds is back at `count`.
    pub fn settle_at_fds(&self, count: usize) -> Result<()> {
        let settled = eventually(PATIENCE, || self.fds().is_ok_and(|n| n == count));
        ensure!(
            settled,
            "{} fds are open instead of {count}: {:#?}\n{}",
            self.fds()?,
            self.fd_list(),
            self.log_text()
        );
        Ok(())
    }

    /// The log so far, without the counters that a test has asked for.
    pub fn log_text(&self) -> String {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.iter().filter(|line| !is_asked_for(line)).map(String::as_str).collect::<Vec<_>>().join("\n")
    }

    /// How much the back-end counts against a port: refused messages, failed connections, bad chains and frames.
    ///
    /// Log lines have rate limits; the counters have none. They are asked for with SIGUSR1.
    pub fn complaints(&self, port: &str) -> Result<u64> {
        Ok(counted_against(&self.summary(port)?))
    }

    /// A port's counters that are not zero.
    pub fn counters(&self, port: &str) -> Result<BTreeMap<String, u64>> {
        let summary = self.summary(port)?;
        let pairs = summary.split_whitespace().filter_map(|word| word.split_once('='));
        Ok(pairs.filter_map(|(name, n)| Some((name.to_owned(), n.parse().ok()?))).collect())
    }

    /// Asks for the counters, and waits for a port's line.
    pub fn summary(&self, port: &str) -> Result<String> {
        let answers = || {
            let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
            let mut lines = log.iter().filter(|line| is_asked_for(line) && line.contains(port));
            let last = lines.next_back().cloned();
            (lines.count() + usize::from(last.is_some()), last)
        };
        let (before, _) = answers();
        kill(self.id(), Signal::SIGUSR1)?;
        let answered = eventually(PATIENCE, || answers().0 > before);
        ensure!(answered, "SIGUSR1 was not answered:\n{}", self.log_text());
        answers().1.context("counters")
    }

    /// Whether the log has anything against a port: a warning, or the end of a connection with such counters.
    pub fn has_reported(&self, port: &str) -> bool {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let mut lines = log.iter().filter(|line| line.contains(port) && !is_asked_for(line));
        lines.any(|line| line.contains("WARN") || line.contains("ERROR") || counted_against(line) > 0)
    }

    fn id(&self) -> Pid {
        Pid::from_raw(self.pid() as i32)
    }

    /// Ends the process by SIGTERM and returns how it ended.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        if self.child.try_wait()?.is_none() {
            kill(self.id(), Signal::SIGTERM)?;
        }
        let mut status = None;
        let ended = eventually(PATIENCE, || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        });
        ensure!(ended, "the back-end does not end after SIGTERM:\n{}", self.log_text());
        status.context("status")
    }
}

/// Whether a line is an answer to SIGUSR1 (the end of a connection is reported by another module).
fn is_asked_for(line: &str) -> bool {
    line.contains("port::control: ")
}

/// The sum of those counters in a summary line that speak of something refused.
fn counted_against(line: &str) -> u64 {
    const BAD: [&str; 8] = [
        "refused",
        "failures",
        "rings_broken",
        "rx_bad_chains",
        "tx_bad_chains",
        "tx_bad_header",
        "tx_bad_length",
        "tx_rejected",
    ];
    let pairs = line.split_whitespace().filter_map(|word| word.split_once('='));
    let counts = pairs.filter(|(name, _)| BAD.contains(name)).filter_map(|(_, n)| n.parse::<u64>().ok());
    counts.sum()
}

impl Drop for Backend {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of the back-end\n{}\n---", self.log_text());
        }
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
