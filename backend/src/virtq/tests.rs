//! The queue against drivers good and bad.

mod basic;
mod differential;
pub(crate) mod driver;
mod lookahead;
mod migration;
mod regressions;
mod threads;
