//! Frames on a tap, seen from the host: what they are (numbered, so that every byte can be checked), AF_PACKET sockets
//! that put them on an interface or capture them, and the interface's counters.
//!
//! All of it works on the name space of the calling thread: use [`crate::NetNs::run`].

mod frame;
mod link;
mod packet;

pub use frame::{FOREIGN_MAC, FRAME_MIN, Frame, Udp, check_udp};
pub use link::{Counters, Link};
pub use packet::{Capture, INJECT_BURST, Injector};
