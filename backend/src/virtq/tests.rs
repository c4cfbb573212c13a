//! Queues against drivers good and bad.

mod basic;
mod differential;
pub(crate) mod driver;
mod lookahead;
mod migration;
pub(crate) mod packed;
mod regressions;
mod threads;
