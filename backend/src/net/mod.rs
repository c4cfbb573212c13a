//! The network half of the device: features, headers, and the receive and transmit paths of a queue pair.
//!
//! Not here: how rings work (`virtq`), where frames go (`uplink`), what the front-end says (`session`).

pub mod checksum;
pub mod counters;
pub mod cross;
pub mod deliver;
pub mod features;
pub mod header;
mod held;
pub mod offload;
pub mod rarp;
pub mod rx;
pub mod segment;
#[cfg(test)]
mod tests;
pub mod tx;
mod tx_singles;
