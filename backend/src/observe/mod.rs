//! What an operator sees of the program: how long it stood still for missing guest memory, and points to trace it at.
#![forbid(unsafe_code)]

pub mod areas;
mod btf;
mod error;
pub mod events;
pub mod kernel;
pub mod load;
pub mod pins;
pub mod read;
mod rights;

pub use error::Unavailable;
