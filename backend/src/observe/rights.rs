//! Whether this process may measure at all, asked before anything is tried, so that the answer names what is missing.
#![forbid(unsafe_code)]

use super::Unavailable;
use std::os::linux::fs::MetadataExt;

/// Capabilities by number (linux/capability.h).
const SYS_ADMIN: u32 = 21;
const PERFMON: u32 = 38;
const BPF: u32 = 39;
/// The inode of the first PID namespace (PROC_PID_INIT_INO).
const FIRST_PID_NAMESPACE: u64 = 0xeffffffc;

/// Checks capabilities and the PID namespace.
pub(super) fn check() -> Result<(), Unavailable> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let missing = missing(&status);
    if !missing.is_empty() {
        let verb = if missing.len() == 1 { "is" } else { "are" };
        return Err(Unavailable::NotAllowed(format!("{} {verb}", missing.join(" and "))));
    }
    match std::fs::metadata("/proc/self/ns/pid") {
        Ok(namespace) if namespace.st_ino() != FIRST_PID_NAMESPACE => Err(Unavailable::PidNamespace),
        _ => Ok(()),
    }
}

/// What a process of this `/proc/PID/status` lacks.
fn missing(status: &str) -> Vec<&'static str> {
    let field = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let Some(held) = field.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()) else {
        return Vec::new(); // the kernel will tell
    };
    let has = |capability: u32| held & (1 << capability | 1 << SYS_ADMIN) != 0;
    [("CAP_BPF", BPF), ("CAP_PERFMON", PERFMON)]
        .into_iter()
        .filter(|(_, number)| !has(*number))
        .map(|(name, _)| name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(missing("Name:\tx\nCapEff:\t0000000000000000\n"), ["CAP_BPF", "CAP_PERFMON"]);
        assert_eq!(missing("CapEff:\t000000c000000000\n"), [""; 0]);
        assert_eq!(missing("CapEff:\t0000008000000000\n"), ["CAP_PERFMON"]);
        assert_eq!(missing("CapEff:\t000001ffffffffff\n"), [""; 0]);
    }
}
