//! A pair on a real reactor, with eventfds, a driver in a real memory file and a scripted uplink.

mod dance;
mod faults;
mod late;
mod lifecycle;
mod link;
mod notify;
mod polling;
mod ports;
mod rig;
mod wake;
