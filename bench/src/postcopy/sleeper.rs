//! Threads that sleep most of the time and must be on time when they wake.

/// Which of the threads that run before ordinary ones runs before which other. They share a CPU.
#[derive(Clone, Copy, Debug)]
#[repr(i32)]
pub enum Rank {
    /// Brings pages: two milliseconds for 256 of them.
    Deliver = 1,
    /// Sends at a fixed rate: 40 µs at a time.
    Send = 2,
    /// Asks, and takes the time until the answer: a few µs.
    Ask = 3,
}

/// Timers of the calling thread end when they should, and it runs before ordinary threads when it wakes (if we may:
/// else it takes its turn). Only for threads that never run for long. What it starts is ordinary again.
pub fn prefer_me(rank: Rank) {
    exact_timers();
    schedule(libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, rank as libc::c_int);
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
        prefer_me(Rank::Ask);
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
