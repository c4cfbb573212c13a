//! A rate limit for log lines that a peer can cause.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// Length of a window.
const WINDOW: Duration = Duration::from_secs(10);

/// Lets through some lines in each [`WINDOW`] and counts the rest.
#[derive(Debug)]
pub(crate) struct LogLimit {
    lines_max: u32,
    window: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl LogLimit {
    /// Lets through `lines_max` in each window.
    pub fn new(lines_max: u32) -> Self {
        Self { lines_max, window: None, lines: 0, suppressed: 0 }
    }

    /// Whether a line may be written now; if so, how many were not since the last one that was.
    pub fn allow(&mut self, now: Instant) -> Option<u64> {
        if self.window.is_none_or(|start| now.duration_since(start) >= WINDOW) {
            self.window = Some(now);
            self.lines = 0;
        }
        if self.lines < self.lines_max {
            self.lines += 1;
            Some(std::mem::take(&mut self.suppressed))
        } else {
            self.suppressed += 1;
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_it_suppresses() {
        let mut limit = LogLimit::new(3);
        let start = Instant::now();
        for _ in 0..3 {
            assert_eq!(limit.allow(start), Some(0));
        }
        assert_eq!(limit.allow(start), None);
        assert_eq!(limit.allow(start), None);
        assert_eq!(limit.allow(start + WINDOW), Some(2));
    }
}
