//! Threads that sleep most of the time and must be on time when they wake.

/// Timers of the calling thread end when they should, and it runs before ordinary threads when it wakes (if we may:
/// else it takes its turn). Only for threads that never run for long. What it starts is ordinary again.
pub fn prefer_me() {
    exact_timers();
    schedule(libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, 1);
}

/// Timers of the calling thread end when they should, not up to 50 µs later.
pub fn exact_timers() {
    // SAFETY: the call takes numbers only.
    let _ = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
}

/// The calling thread is preferred until this is dropped: while it asks how long an answer takes, for its own turn must
/// not count as the answer's.
pub struct Preferred(());

impl Preferred {
    /// From now on.
    pub fn enter() -> Self {
        prefer_me();
        Self(())
    }
}

impl Drop for Preferred {
    fn drop(&mut self) {
        schedule(libc::SCHED_OTHER, 0);
    }
}

fn schedule(policy: libc::c_int, sched_priority: libc::c_int) {
    let parameter = libc::sched_param { sched_priority };
    // SAFETY: the call reads `parameter`, which outlives it, and changes only how this thread is scheduled.
    let _ = unsafe { libc::sched_setscheduler(0, policy, &parameter) };
}
