//! Makes page faults of known length and prints what was measured of them, as JSON: a check of fault latency on the
//! kernel it runs on, and of what it costs.
//!
//! ```text
//! fault-latency [--way fentry|tracepoint|request] [--hold]     the scenarios; then waits for the end of its input
//! fault-latency --cost                                         what the programs cost
//! ```
//! As root. One line for each scenario; the reader decides whether it is right.

mod cost;
mod scenarios;
mod uffd;

use std::process::ExitCode;
use vhost_user_net::observe::load::Ways;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let hold = words.pop_if(|word| *word == "--hold").is_some();
    let done = match words[..] {
        [] => scenarios::run(Ways::default(), hold),
        ["--way", "fentry"] => scenarios::run(Ways { tracepoint: false, ..Ways::default() }, hold),
        ["--way", "tracepoint"] => scenarios::run(Ways { fentry: false, ..Ways::default() }, hold),
        ["--way", "request"] => scenarios::run(Ways { fentry: false, stack: false, ..Ways::default() }, hold),
        ["--cost"] => cost::run(),
        ["--switches"] => cost::print_switches(),
        _ => Err("usage: fault-latency [--way fentry|tracepoint|request] [--hold] | --cost".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fault-latency: {error}");
            ExitCode::FAILURE
        }
    }
}
