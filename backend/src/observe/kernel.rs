//! What the programs must know of the running kernel, gathered from its BTF and its symbols.
#![forbid(unsafe_code)]

use super::Unavailable;
use super::btf::Btf;
use ebpf_common::faults::{ABSENT, Kernel};
use std::fs::File;
use std::io::{BufRead, BufReader};

/// The kernel's type information.
pub const BTF: &str = "/sys/kernel/btf/vmlinux";
const SYMBOLS: &str = "/proc/kallsyms";

/// Addresses of code; all zero where they are not needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Symbols {
    /// `handle_userfault`.
    pub code_start: u64,
    /// What follows it.
    pub code_end: u64,
    /// `userfaultfd_wake_function`, or 0.
    pub wake_function: u64,
}

/// Reads [`BTF`] for a process that is to be measured.
///
/// # Errors
/// No BTF, or fields are missing without which nothing can be measured.
pub fn layout(tgid: u32, symbols: Symbols) -> Result<Kernel, Unavailable> {
    let bytes = std::fs::read(BTF).map_err(|_| Unavailable::NoBtf)?;
    let btf = Btf::parse(&bytes).ok_or(Unavailable::NoBtf)?;
    let need = |name: &'static str, field: &'static str| {
        btf.offset(name, &[field]).ok_or(Unavailable::NoField(name, field))
    };
    let request = || {
        Some([
            btf.offset("task_struct", &["worker_private"])?,
            btf.offset("io_worker", &["cur_work"])?,
            btf.offset("io_kiocb", &["work"])?,
            btf.offset("io_kiocb", &["opcode"])?,
            btf.offset("io_madvise", &["addr"])?,
        ])
    };
    let [task_worker, worker_work, request_work, request_opcode, madvise_addr] =
        request().unwrap_or([ABSENT, 0, 0, 0, 0]);
    let waiter = || {
        let at = |path: &[&str]| btf.offset("userfaultfd_wait_queue", path);
        let function = at(&["wq", "func"])?;
        let address = at(&["msg", "arg", "pagefault", "address"])?;
        Some((function.checked_sub(at(&["wq", "private"])?)?, function.checked_sub(address)?))
    };
    let (waiter_task, waiter_address) = waiter().unwrap_or((ABSENT, 0));
    Ok(Kernel {
        code_start: symbols.code_start,
        code_end: symbols.code_end,
        wake_function: symbols.wake_function,
        tgid,
        task_pid: need("task_struct", "pid")?,
        task_tgid: need("task_struct", "tgid")?,
        task_flags: need("task_struct", "flags")?,
        task_min_flt: need("task_struct", "min_flt")?,
        task_maj_flt: need("task_struct", "maj_flt")?,
        task_worker,
        worker_work,
        request_work,
        request_opcode,
        madvise_addr,
        waiter_task,
        waiter_address,
        fault_address: need("vm_fault", "address")?,
    })
}

/// Looks the kernel's symbols up.
///
/// # Errors
/// They are hidden from us, or `handle_userfault` is not among them.
pub fn symbols() -> Result<Symbols, Unavailable> {
    let file = File::open(SYMBOLS).map_err(|_| Unavailable::NoSymbols)?;
    parse_symbols(BufReader::new(file))
}

fn parse_symbols(mut text: impl BufRead) -> Result<Symbols, Unavailable> {
    let mut found = Symbols::default();
    // The file is sorted only in parts: what follows is known at its end.
    let mut next: Vec<u64> = Vec::new();
    let mut line = String::new();
    while text.read_line(&mut line).map_err(|_| Unavailable::NoSymbols)? > 0 {
        let mut words = line.split_ascii_whitespace();
        if let (Some(address), Some(kind), Some(name)) = (words.next(), words.next(), words.next()) {
            let address = u64::from_str_radix(address, 16).unwrap_or(0);
            match name {
                "handle_userfault" => found.code_start = address,
                "userfaultfd_wake_function" => found.wake_function = address,
                _ if kind.eq_ignore_ascii_case("t") => {}
                _ => {
                    line.clear();
                    continue;
                }
            }
            next.push(address);
        }
        line.clear();
    }
    found.code_end = next.into_iter().filter(|address| *address > found.code_start).min().unwrap_or(0);
    if found.code_start == 0 || found.code_end == 0 { Err(Unavailable::NoSymbols) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_ends_where_the_next_symbol_begins() {
        let text = "00000100 T a\n00000900 t userfaultfd_wake_function\n00000500 T handle_userfault\n\
                    00000700 t b\n00000600 d data\n00000680 t c\t[module]\n";
        let expected = Symbols { code_start: 0x500, code_end: 0x680, wake_function: 0x900 };
        assert_eq!(parse_symbols(text.as_bytes()).unwrap(), expected);
    }

    #[test]
    fn hidden_symbols_are_no_symbols() {
        let text = "00000000 T a\n00000000 T handle_userfault\n";
        assert!(parse_symbols(text.as_bytes()).is_err());
        assert!(parse_symbols("".as_bytes()).is_err());
    }
}
