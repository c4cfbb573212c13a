//! What control's operations on the reactor are for.
#![forbid(unsafe_code)]

/// What a reactor operation of control is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControlToken {
    /// The signalfd.
    Signal,
    /// The helper's bell.
    Helper,
    /// The observer's bell.
    Observer,
    /// Stalls have ended.
    Stalls,
    /// Pages that were asked for may need a nudge.
    Nudge,
    /// A page that was asked for.
    Populate {
        /// The fault engine's region.
        region: u32,
        /// Its number there.
        page: u64,
    },
    /// An operation of a port; `epoch` tells earlier connections apart.
    Port {
        /// Which port.
        port: u16,
        /// Which connection.
        epoch: u32,
        /// What for.
        what: PortOp,
    },
}

/// The operations a port may have in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortOp {
    /// Accepting.
    Accept,
    /// Connecting.
    Connect,
    /// Waiting to try again.
    Retry,
    /// Reading the control socket.
    Receive,
    /// Writing the control socket.
    Send,
    /// Postcopy: rings look again after a populate failed.
    LookAgain,
    /// Postcopy: a look for pages that came by themselves is due.
    Scan,
    /// Postcopy: END has waited long enough.
    Drain,
}
