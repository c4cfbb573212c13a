//! uplink (skeleton).
