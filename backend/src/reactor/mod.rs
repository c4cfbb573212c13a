//! The io_uring reactor: one per worker thread, the only place where a worker sleeps (DESIGN rule 1).
//!
//! Lives here: ring set-up and kernel probing ([`probe`]), typed operations that own what they point to
//! until their completion ([`Reactor`]), messages with file descriptors ([`message`]), and messages
//! between workers ([`mailbox`]). Not here: what an operation is for. The owner gives every operation a
//! token of its own type and gets it back with the result.

pub mod mailbox;
pub mod message;
pub mod probe;
mod ring;
mod stranger;

pub use mailbox::{Mailbox, Postbox};
pub use message::{Incoming, Outgoing, has_unread};
pub use probe::SetupError;
pub use ring::{Done, OpId, Reactor};
pub use stranger::{PeerFd, close_late, crowd};
