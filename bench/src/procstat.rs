//! Another process as `/proc` shows it: CPU time, context switches, memory, where its threads may run; the set-up of
//! a child before its exec, and a thread's place before others. Not here: anything about packets.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Pins `command` to a CPU (if one is given) and has the kernel kill it when the thread that spawns it ends, so
/// that nothing is left behind however the caller dies.
pub fn pin_and_die_with_parent(command: &mut Command, cpu: Option<usize>) {
    let hook = move || {
        if let Some(cpu) = cpu {
            let mut set = nix::sched::CpuSet::new();
            set.set(cpu)?;
            nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)?;
        }
        // SAFETY: prctl with these arguments reads no memory of ours.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: the hook runs between fork and exec; it makes two system calls, allocates nothing and takes no lock.
    unsafe { command.pre_exec(hook) };
}

/// Above those who run a whole comparison in a real-time class.
const PRIORITY: i32 = 10;

/// The calling thread comes before others, until this is dropped.
pub struct RealTime {
    before: (i32, libc::sched_param),
}

impl RealTime {
    /// From now on.
    pub fn enter() -> Result<Self> {
        let mut parameter = libc::sched_param { sched_priority: 0 };
        // SAFETY: both calls write at most the parameter, which outlives them; 0 is the calling thread.
        let policy = unsafe {
            libc::sched_getparam(0, &raw mut parameter);
            libc::sched_getscheduler(0)
        };
        schedule(libc::SCHED_FIFO, &libc::sched_param { sched_priority: PRIORITY })
            .context("SCHED_FIFO (needs CAP_SYS_NICE)")?;
        Ok(Self { before: (policy, parameter) })
    }
}

impl Drop for RealTime {
    fn drop(&mut self) {
        let _ = schedule(self.before.0, &self.before.1);
    }
}

fn schedule(policy: i32, parameter: &libc::sched_param) -> Result<()> {
    // SAFETY: the parameter outlives the call; 0 is the calling thread.
    let r = unsafe { libc::sched_setscheduler(0, policy, std::ptr::from_ref(parameter)) };
    ensure!(r == 0, "sched_setscheduler: {}", std::io::Error::last_os_error());
    Ok(())
}

/// CPU time of all live threads of a process in nanoseconds (the scheduler's own clock, not ticks).
pub fn cpu_time_ns(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in
        fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("threads of process {pid}"))?
    {
        // A thread may end between the two reads; its time is then lost, which a caller that samples long-lived
        // workers can accept.
        let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        sum += text.split_whitespace().next().and_then(|f| f.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(sum)
}

/// How long all live threads of a process were ready to run and had no CPU, in nanoseconds.
pub fn cpu_wait_ns(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in
        fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("threads of process {pid}"))?
    {
        let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        sum += text.split_whitespace().nth(1).and_then(|f| f.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(sum)
}

/// How long a CPU has been idle since the machine started, ns (in steps of 10 ms). The other fields of `/proc/stat` are
/// sampled by the timer tick and miss what sleeps between two ticks; this one is not.
pub fn idle_ns(cpu: usize) -> Result<u64> {
    const TICK_NS: u64 = 10_000_000;
    let text = fs::read_to_string("/proc/stat")?;
    let name = format!("cpu{cpu} ");
    let fields = text.lines().find_map(|l| l.strip_prefix(&name)).with_context(|| format!("no {name}"))?;
    // user, nice, system, idle, iowait, …
    let idle = fields.split_whitespace().skip(3).take(2).filter_map(|f| f.parse::<u64>().ok());
    Ok(idle.sum::<u64>() * TICK_NS)
}

/// Voluntary plus involuntary context switches of all threads: how often the process was woken or preempted.
pub fn context_switches(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in
        fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("threads of process {pid}"))?
    {
        let Ok(text) = fs::read_to_string(task?.path().join("status")) else { continue };
        sum += status_field(&text, "voluntary_ctxt_switches:").unwrap_or(0);
        sum += status_field(&text, "nonvoluntary_ctxt_switches:").unwrap_or(0);
    }
    Ok(sum)
}

/// Resident memory in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// Heap, stacks, private data.
    pub anon: u64,
    /// Program text and libraries.
    pub file: u64,
    /// Shared memory: the guest's, for a back-end.
    pub shmem: u64,
}

/// Resident memory of a process.
pub fn resident(pid: u32) -> Result<Resident> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let get = |name| status_field(&text, name).with_context(|| format!("{name} of process {pid}"));
    Ok(Resident { anon: get("RssAnon:")?, file: get("RssFile:")?, shmem: get("RssShmem:")? })
}

/// The CPUs that the threads of a process may use, one entry per different answer: `["0"]` if all are pinned to CPU 0.
pub fn cpus_allowed(pid: u32) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let Ok(text) = fs::read_to_string(task?.path().join("status")) else { continue };
        let cpus = text.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).unwrap_or("").trim();
        if !all.iter().any(|c| c == cpus) {
            all.push(cpus.to_string());
        }
    }
    Ok(all)
}

fn status_field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|l| l.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_process_is_seen() {
        let me = std::process::id();
        let before = cpu_time_ns(me).expect("cpu time");
        // The kernel counts at its ticks.
        let start = std::time::Instant::now();
        while cpu_time_ns(me).expect("cpu time") <= before {
            assert!(start.elapsed().as_secs() < 60, "no CPU time is counted");
        }
        idle_ns(0).expect("CPU 0");
        assert!(resident(me).expect("resident").anon > 0);
        assert_eq!(status_field("a:\t7\nb: 9 kB\n", "b:"), Some(9));
        assert!(!cpus_allowed(me).expect("cpus").is_empty());
    }
}
