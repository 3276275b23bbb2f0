//! `bulkhead`: parses the line, runs it, and turns the end into an exit code.

use std::process::ExitCode;

use bulkhead_cli::command::{CommandLine, run};
use bulkhead_cli::environment::Environment;
use clap::Parser;

fn main() -> ExitCode {
    let (mut out, mut err) = (std::io::stdout().lock(), std::io::stderr().lock());
    match run(
        CommandLine::parse(),
        Environment::of_process(),
        &mut out,
        &mut err,
    ) {
        Ok(exit) => exit.into(),
        Err(refusal) => {
            drop(err);
            eprintln!("{refusal}");
            refusal.exit().into()
        }
    }
}
