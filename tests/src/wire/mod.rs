//! The host's side of an uplink: a network name space of one's own, taps, frames whose content can be checked, and
//! AF_PACKET sockets that put them on an interface or capture them.
//! Not here: back-ends and front-ends.

mod frame;
mod link;
mod packet;
mod tap;

pub use frame::{FOREIGN_MAC, FRAME_MIN, Frame, Udp, check_udp};
pub use link::{Counters, Link, NetSpace};
pub use packet::{Capture, Injector};
pub use tap::{TapOptions, VNET_HDR_LEN, open_tap};
