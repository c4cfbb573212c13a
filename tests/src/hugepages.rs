//! Huge pages for guest memory, given back when the guard is dropped.
#![forbid(unsafe_code)]

use std::fs;

use anyhow::{Context, Result, ensure};

/// Huge pages of the default size, 2 MiB on x86-64.
const NUMBER: &str = "/proc/sys/vm/nr_hugepages";

/// Holds huge pages beside those that are there. Scenarios run one at a time, so guards do not overlap.
#[derive(Debug)]
pub struct HugePages {
    before: u64,
}

impl HugePages {
    /// Makes `mib` MiB of them free; an error says why this machine cannot (a reason to skip).
    pub fn reserve(mib: u64) -> Result<Self> {
        let size = meminfo("Hugepagesize:")?;
        ensure!(size == 2048, "huge pages are of {size} KiB by default here, not 2048");
        let before = number()?;
        let guard = Self { before };
        let wanted = (mib / 2).saturating_sub(meminfo("HugePages_Free:")?) + before;
        fs::write(NUMBER, wanted.to_string()).with_context(|| format!("writing {NUMBER}"))?;
        let free = meminfo("HugePages_Free:")?;
        ensure!(free >= mib / 2, "only {free} of {} huge pages can be had", mib / 2);
        Ok(guard)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if number().is_ok_and(|now| now != self.before)
            && let Err(error) = fs::write(NUMBER, self.before.to_string())
        {
            eprintln!("lab: {NUMBER} cannot be set back to {}: {error}", self.before);
        }
    }
}

fn number() -> Result<u64> {
    Ok(fs::read_to_string(NUMBER)?.trim().parse()?)
}

fn meminfo(key: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)).with_context(|| format!("no {key}"))?;
    let word = line.split_whitespace().next().context("an empty line")?;
    Ok(word.parse()?)
}
