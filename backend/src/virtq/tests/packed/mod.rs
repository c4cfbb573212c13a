//! Packed queues against drivers good and bad.

mod basic;
pub(crate) mod driver;
mod hostile;
mod migration;
mod oracle;
mod resync;
mod threads;
