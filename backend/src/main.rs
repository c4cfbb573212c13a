//! Parse, build, run: nothing else.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use vhost_user_net::capabilities::capabilities_json;
use vhost_user_net::cli::{self, Command};
use vhost_user_net::daemon;
use vhost_user_net::observe::command;

fn main() -> ExitCode {
    match cli::parse() {
        Ok(Command::PrintCapabilities) => cli::print_out(&capabilities_json()),
        Ok(Command::CheckConfig(config)) => cli::print_out(&cli::summary(&config)),
        Ok(Command::Faults(what)) => {
            if let Err(error) = command::faults(&what) {
                eprintln!("vhost-user-net: {error}");
                return ExitCode::FAILURE;
            }
        }
        Ok(Command::Unload(what)) => match command::unload(&what) {
            Ok(text) => cli::print_out(&text),
            Err(why) => {
                eprintln!("vhost-user-net: {why}");
                return ExitCode::FAILURE;
            }
        },
        Ok(Command::Run(config)) => {
            let served = daemon::block_signals().and_then(|()| {
                let _log = cli::init_log(config.log.as_deref());
                daemon::run(config)
            });
            if let Err(error) = served {
                eprintln!("vhost-user-net: {error}");
                return ExitCode::FAILURE;
            }
        }
        Err(error) => {
            error.print();
            return ExitCode::from(error.exit_code());
        }
    }
    ExitCode::SUCCESS
}
