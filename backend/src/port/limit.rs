//! A rate limit for log lines that a peer can cause.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// Lines let through in one window.
const LINES: u32 = 10;
/// Length of a window.
const WINDOW: Duration = Duration::from_secs(10);

/// Lets through [`LINES`] in each [`WINDOW`] and counts the rest.
#[derive(Debug, Default)]
pub(crate) struct LogLimit {
    window: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl LogLimit {
    /// Whether a line may be written now; if so, how many were not since the last one that was.
    pub fn allow(&mut self, now: Instant) -> Option<u64> {
        if self.window.is_none_or(|start| now.duration_since(start) >= WINDOW) {
            self.window = Some(now);
            self.lines = 0;
        }
        if self.lines < LINES {
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
        let mut limit = LogLimit::default();
        let start = Instant::now();
        for _ in 0..LINES {
            assert_eq!(limit.allow(start), Some(0));
        }
        assert_eq!(limit.allow(start), None);
        assert_eq!(limit.allow(start), None);
        assert_eq!(limit.allow(start + WINDOW), Some(2));
    }
}
