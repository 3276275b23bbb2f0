//! `bulkhead`: parses the line, runs it, and turns the end into an exit code.

use std::process::ExitCode;

use bulkhead_cli::command::{CommandLine, run};
use bulkhead_cli::environment::Environment;
use clap::Parser;

/// Memory is wiped when it is freed: a secret passes through buffers of TLS, HTTP/2 and protobuf that no type of ours owns.
#[global_allocator]
static ALLOCATOR: zeroizing_alloc::ZeroAlloc<std::alloc::System> =
    zeroizing_alloc::ZeroAlloc(std::alloc::System);

fn main() -> ExitCode {
    if let Err(error) = bulkhead_cli::scrub::ticket(std::env::args_os()) {
        eprintln!("bulkhead: cannot start anew without the ticket on its line: {error}; use --ticket-file");
        return ExitCode::FAILURE;
    }
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
