//! The null uplink: counts and drops what the guest sends and never has a frame for it. For measurements
//! and tests of everything but an uplink.
#![forbid(unsafe_code)]

use super::{Capabilities, FrameFormat, ReceiveError, SendError, Uplink, UplinkQueue};
use crate::memory::IoVec;
use crate::net::features::OFFLOADS;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Drops everything.
pub struct Null;

/// A queue of [`Null`].
pub struct NullQueue;

impl Uplink for Null {
    fn describe(&self) -> &str {
        "null"
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities { offloads: OFFLOADS, mtu: u16::MAX }
    }
    fn configure(&self, _format: FrameFormat) -> io::Result<()> {
        Ok(())
    }
    fn set_mtu(&self, _mtu: u16) -> io::Result<()> {
        Ok(())
    }
    fn set_queue_active(&self, _queue: u16, _active: bool) -> io::Result<()> {
        Ok(())
    }
    fn announce(&self, _frame: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

impl UplinkQueue for NullQueue {
    fn readable(&self) -> &[Arc<OwnedFd>] {
        &[]
    }
    fn send(&mut self, _frame: &[IoVec<'_>]) -> Result<(), SendError> {
        Ok(())
    }
    fn receive(&mut self, _buffers: &[IoVec<'_>]) -> Result<usize, ReceiveError> {
        Err(ReceiveError::Empty)
    }
}
