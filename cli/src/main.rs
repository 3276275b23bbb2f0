//! `bulkhead`: parses the line, runs it, and turns the end into an exit code.

use std::process::ExitCode;

use bulkhead_cli::command::{CommandLine, run};
use clap::Parser;

fn main() -> ExitCode {
    match run(CommandLine::parse(), &mut std::io::stdout().lock()) {
        Ok(exit) => exit.into(),
        Err(refusal) => {
            eprintln!("{refusal}");
            refusal.exit().into()
        }
    }
}
