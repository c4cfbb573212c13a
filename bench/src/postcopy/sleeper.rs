//! Threads that sleep most of the time and must be on time when they wake.

/// Timers of the calling thread end when they should, and it runs before ordinary threads when it wakes (if we may:
/// else it takes its turn). Only for threads that never run for long.
pub fn prefer_me() {
    exact_timers();
    let parameter = libc::sched_param { sched_priority: 1 };
    // SAFETY: the call reads `parameter`, which outlives it, and changes only how this thread is scheduled.
    let _ = unsafe { libc::sched_setscheduler(0, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, &parameter) };
}

/// Timers of the calling thread end when they should, not up to 50 µs later.
pub fn exact_timers() {
    // SAFETY: the call takes numbers only.
    let _ = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
}
