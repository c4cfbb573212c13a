//! The paths of a queue pair against a driver in a real memory file and a scripted uplink.

mod deliver;
mod random;
mod receive;
mod receive_hostile;
mod residency;
mod rig;
mod transmit;
