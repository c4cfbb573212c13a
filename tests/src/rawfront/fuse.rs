//! A file whose owner does not answer: a FUSE file system of one file, served from a thread.
//!
//! Every touch of such a file waits for its owner: a page fault, but also fstat, fstatfs and even close. A
//! back-end that gets its fd must not do any of these in its loop.
#![forbid(unsafe_code)]

use super::process::STARTING;
use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const BATCH_FORGET: u32 = 42;

const IN_HEADER_LEN: usize = 40;
const REQUEST_LEN_MAX: usize = 128 << 10;
/// The kernel wants room for a write and its headers in each read.
const WRITE_LEN_MAX: u32 = 64 << 10;
const FILE_NODE: u64 = 2;
const FILE_LEN: u64 = 16 << 20;

/// A mounted file system with one file, `memory`, of 16 MiB. READ is never answered.
#[derive(Debug)]
pub struct SilentFuse {
    folder: tempfile::TempDir,
    silent: Arc<AtomicBool>,
}

impl SilentFuse {
    /// Mounts it. Fails where the machine does not let us.
    pub fn mount() -> Result<Self> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").context("open /dev/fuse")?;
        let folder = tempfile::Builder::new().prefix("vun-fuse-").tempdir()?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("vun-test"), folder.path(), Some("fuse"), flags, Some(options.as_str()))
            .context("mount a FUSE file system")?;
        let silent = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&silent);
        std::thread::spawn(move || serve(device, &flag));
        Ok(Self { folder, silent })
    }

    /// Opens the file.
    pub fn open(&self) -> Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(nix::libc::O_CLOEXEC);
        Ok(options.open(self.folder.path().join("memory"))?)
    }

    /// From now on answers nothing at all. While the guard lives, this process starts no back-end.
    pub fn fall_silent(&self) -> MutexGuard<'static, ()> {
        let guard = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        self.silent.store(true, Ordering::SeqCst);
        guard
    }

    /// Ends all waiting for good. Do this before closing own fds of the file.
    pub fn abort(&self) {
        let _ = umount2(self.folder.path(), MntFlags::MNT_FORCE);
        let _ = umount2(self.folder.path(), MntFlags::MNT_DETACH);
    }
}

impl Drop for SilentFuse {
    fn drop(&mut self) {
        self.abort();
    }
}

fn serve(mut device: File, silent: &AtomicBool) {
    let mut request = vec![0u8; REQUEST_LEN_MAX];
    // Ends with ENODEV when the file system is unmounted.
    while let Ok(length) = device.read(&mut request) {
        if length < IN_HEADER_LEN || silent.load(Ordering::SeqCst) {
            continue;
        }
        let opcode = u32::from_ne_bytes([request[4], request[5], request[6], request[7]]);
        let unique = &request[8..16];
        let answer: Option<Vec<u8>> = match opcode {
            READ | FORGET | BATCH_FORGET => continue,
            INIT => Some(words(&[7, 31, 0, 0, 0, WRITE_LEN_MAX, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
            LOOKUP => {
                // Node, generation, then how long it may be cached: not at all.
                let mut entry = longs(&[FILE_NODE, 0, 0, 0, 0]);
                entry.extend(attributes(FILE_NODE));
                Some(entry)
            }
            GETATTR => {
                let node = u64::from_ne_bytes(request[16..24].try_into().unwrap_or_default());
                let mut attr = longs(&[0, 0]);
                attr.extend(attributes(node));
                Some(attr)
            }
            OPEN => Some(longs(&[1, 0])),
            STATFS => Some(vec![0; 80]),
            RELEASE | FLUSH => Some(Vec::new()),
            _ => None,
        };
        let error = if answer.is_some() { 0i32 } else { -nix::libc::ENOSYS };
        let body = answer.unwrap_or_default();
        let mut reply = ((16 + body.len()) as u32).to_ne_bytes().to_vec();
        reply.extend_from_slice(&error.to_ne_bytes());
        reply.extend_from_slice(unique);
        reply.extend_from_slice(&body);
        drop(device.write(&reply));
    }
}

/// `struct fuse_attr`.
fn attributes(node: u64) -> Vec<u8> {
    let (mode, size) = if node == FILE_NODE { (0o100_666, FILE_LEN) } else { (0o040_777, 0) };
    let mut attr = longs(&[node, size, size / 512, 0, 0, 0]);
    attr.extend(words(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0]));
    attr
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_ne_bytes()).collect()
}

fn longs(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_ne_bytes()).collect()
}
