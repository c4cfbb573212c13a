//! Whether workers look at rings without being told to (`--poll`).
#![forbid(unsafe_code)]

use super::Problem;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// The bound of `auto` that was given none, in µs: longer than the gaps between the bursts of a steady sender, shorter than
/// anybody notices on a CPU.
const BOUND_DEFAULT_US: u16 = 200;
/// The longest bound, in µs.
const BOUND_MAX_US: u16 = 10_000;

/// Whether a worker looks at its rings all the time, for a while after work, or only when it was notified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Poll {
    /// After work, while packets come often enough; without any for as long as this at most. Then it sleeps.
    Auto(Duration),
    /// It sleeps whenever there is nothing to do.
    Never,
    /// It never sleeps, and no driver has to notify it.
    Always,
}

impl Default for Poll {
    fn default() -> Self {
        Self::Auto(Duration::from_micros(BOUND_DEFAULT_US.into()))
    }
}

impl FromStr for Poll {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        match text {
            "auto" => Ok(Self::default()),
            "never" => Ok(Self::Never),
            "always" => Ok(Self::Always),
            _ => {
                let bound = text.strip_prefix("auto:").and_then(|bound| bound.parse().ok());
                let bound = bound.filter(|us| (1..=BOUND_MAX_US).contains(us));
                bound.map(|us| Self::Auto(Duration::from_micros(us.into()))).ok_or_else(|| Problem::Choice {
                    key: "poll",
                    value: text.to_owned(),
                    choices: "auto, auto:MICROSECONDS (1 to 10000), never, always",
                })
            }
        }
    }
}

impl fmt::Display for Poll {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto(bound) => write!(f, "auto:{}", bound.as_micros()),
            Self::Never => f.write_str("never"),
            Self::Always => f.write_str("always"),
        }
    }
}
