//! What a port tells the operator: one line each, with its name.
#![forbid(unsafe_code)]

use super::Port;
use std::time::Instant;

impl Port {
    /// A warning that the peer can cause: rate-limited, counted in any case.
    pub(crate) fn warn(&mut self, text: &dyn std::fmt::Display) {
        self.refused += 1;
        self.caution(text);
    }

    /// A warning about what is allowed all the same, that the peer can cause: rate-limited.
    pub(crate) fn caution(&mut self, text: &dyn std::fmt::Display) {
        let Some(suppressed) = self.warnings.allow(Instant::now()) else { return };
        if suppressed > 0 {
            tracing::warn!(port = self.name(), "{suppressed} warnings left out");
        }
        tracing::warn!(port = self.name(), "{text}");
    }

    /// A line that the peer can cause, though nothing is wrong: rate-limited.
    pub(crate) fn note(&mut self, text: &dyn std::fmt::Display) {
        if let Some(suppressed) = self.notes.allow(Instant::now()) {
            if suppressed > 0 {
                tracing::info!(port = self.name(), "{suppressed} lines left out");
            }
            tracing::info!(port = self.name(), "{text}");
        }
    }

    /// Says if the dirty log was too small for what was written: pages are missing from the migration.
    pub(crate) fn check_log(&mut self) {
        let beyond = self.log.as_ref().map_or(0, |log| log.beyond());
        if beyond > 0 {
            self.failures += 1;
            self.warn(&format_args!(
                "{beyond} pages were written that the front-end's dirty log is too small for"
            ));
        }
    }

    /// The counters that are not zero, in one line.
    pub(crate) fn summary(&self) -> String {
        let counts = self.counts();
        let mut words: Vec<String> = counts
            .each()
            .into_iter()
            .filter(|(_, n)| *n > 0)
            .map(|(name, n)| format!("{name}={n}"))
            .collect();
        for (name, n) in [("refused", self.refused), ("failures", self.failures)] {
            if n > 0 {
                words.push(format!("{name}={n}"));
            }
        }
        if let Some((pair, range, age)) = self.longest_stall() {
            words.push(format!(
                "stalled={:.1}s (queue pair {pair} waits for guest memory at {:#x})",
                age.as_secs_f32(),
                range.gpa
            ));
        }
        words.extend(Some(self.uplink.report()).filter(|report| !report.is_empty()));
        if self.stalls.stalls > 0 {
            words.push(self.stalls.to_string());
        }
        if words.is_empty() { "no packets".into() } else { words.join(" ") }
    }
}
