//! Packed queues against drivers good and bad.

pub(crate) mod driver;
mod oracle;
