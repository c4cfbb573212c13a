//! The queue against a driver of a few lines.

mod basic;
mod driver;
