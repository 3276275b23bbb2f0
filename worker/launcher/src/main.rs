//! `bulkhead-launcher`: the root part of a worker node, and, executed again under other names by
//! itself, the task supervisor, the unpacker, and the worker's first stage.

use anyhow::Context;
use bulkhead_launcher::forget::forget;
use bulkhead_launcher::launcher::{DEFAULT_WORKER_UID, Options, run};
use bulkhead_launcher::{supervisor, take_channel, unpack, worker_process};
use clap::Parser;
use std::ffi::CString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::ExitCode;

/// Unpacks images and isolates tasks for a worker, which it starts without privileges
#[derive(Debug, Parser)]
#[command(name = "bulkhead-launcher", version)]
struct Arguments {
    /// Folder for layers, tasks and the worker's own data
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// The worker's program [default: bulkhead-worker beside this one]
    #[arg(long, value_name = "PATH")]
    worker: Option<PathBuf>,
    /// User and group id that the worker runs as
    #[arg(long, value_name = "ID", default_value_t = DEFAULT_WORKER_UID, value_parser = clap::value_parser!(u32).range(1..))]
    worker_uid: u32,
    /// Instead of running: ends and removes whatever an ended launcher left of this folder's tasks
    #[arg(long)]
    forget: bool,
    /// Further arguments for the worker
    #[arg(last = true)]
    worker_arguments: Vec<String>,
}

fn main() -> ExitCode {
    let name = std::env::args_os().next().unwrap_or_default();
    let played = match name.as_encoded_bytes() {
        b"bulkhead-supervisor" => take_channel().map(supervisor::run),
        b"bulkhead-unpacker" => take_channel().map(unpack::run),
        b"bulkhead-run-worker" => Some(run_worker()),
        _ => return launcher(),
    };
    match played {
        Some(Ok(())) => ExitCode::SUCCESS,
        Some(Err(error)) => fail(&name.to_string_lossy(), &error),
        None => fail(&name.to_string_lossy(), &"only a launcher can start this"),
    }
}

fn fail(name: &str, error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("{name}: {error}");
    ExitCode::FAILURE
}

fn run_worker() -> std::io::Result<()> {
    let arguments: Vec<CString> = c_strings(std::env::args_os().map(OsStringExt::into_vec))?;
    let env = std::env::vars_os().map(|(name, value)| [name.into_vec(), value.into_vec()].join(&b'='));
    worker_process::become_worker(&arguments, &c_strings(env)?)
}

fn c_strings(texts: impl Iterator<Item = Vec<u8>>) -> std::io::Result<Vec<CString>> {
    texts.map(|text| CString::new(text).map_err(Into::into)).collect()
}

fn launcher() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .init();
    let done = match arguments.forget {
        true => forget(&arguments.data),
        false => options(arguments).and_then(|options| run(&options)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail("bulkhead-launcher", &format!("{error:#}")),
    }
}

fn options(arguments: Arguments) -> anyhow::Result<Options> {
    let beside = || {
        let own = std::env::current_exe().context("could not find this program's folder")?;
        Ok::<_, anyhow::Error>(own.with_file_name("bulkhead-worker"))
    };
    let kept = ["RUST_LOG", "RUST_BACKTRACE"]; // nothing else of the environment is the worker's business
    let worker_env = std::env::vars()
        .filter(|(name, _)| kept.contains(&name.as_str()))
        .collect();
    Ok(Options {
        data: arguments.data,
        worker: arguments.worker.map_or_else(beside, Ok)?,
        worker_uid: arguments.worker_uid,
        worker_arguments: arguments.worker_arguments,
        worker_env,
    })
}
