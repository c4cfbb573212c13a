//! What the steering programs share: reading frames, and which flow a frame belongs to.
//!
//! Here: pure code over [`frame::Frame`], the same for XDP and socket filters. Not here: the programs (`bin/`), map layouts
//! (`common`).
#![no_std]

pub mod flow;
pub mod frame;
