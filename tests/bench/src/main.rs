//! `bulkhead-bench`: how fast a real cluster is, beside etcd on the same disk in the same run, as one table.
//!
//! Programs are started as an operator starts them, with all security on; the load comes from this program, which speaks
//! to both systems with the same client stack. Each figure says its n, and the table how busy other programs kept the
//! machine meanwhile: a figure from a busy machine is none to quote. Nothing is asserted about time.

mod etcd;
mod fleet;
mod floor;
mod load;
mod parts;
mod report;
mod samples;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};

use parts::{Bench, Part};
use report::Report;

/// Measures Bulkhead and prints the table of its speed
#[derive(Debug, Parser)]
#[command(name = "bulkhead-bench", version)]
struct Arguments {
    /// Only these parts, in the order of the table
    #[arg(long, value_delimiter = ',', value_enum)]
    only: Vec<Part>,
    /// Fewer repetitions: to see that all works, not to quote
    #[arg(long)]
    quick: bool,
    /// How the result is printed
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Also keeps the result as JSON in this file
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Folder of the programs [default: beside this one]
    #[arg(long, value_name = "DIR")]
    bin: Option<PathBuf>,
    /// Folder on the disk that is measured [default: the temporary one]
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    /// First three numbers of the loopback addresses of the nodes; etcd has the next network
    #[arg(long, value_name = "A.B.C", default_value = "127.83.0")]
    subnet: String,
    /// The etcd program [default: from PATH]
    #[arg(long, value_name = "PATH")]
    etcd: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match start(arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bulkhead-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: Arguments) -> anyhow::Result<bool> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        tokio::select! {
            biased;
            // Dropping the run ends and removes whatever it started.
            _ = terminate.recv() => anyhow::bail!("ended by a signal"),
            _ = interrupt.recv() => anyhow::bail!("ended by a signal"),
            ran = Box::pin(run(arguments)) => ran,
        }
    })
}

/// Whether every part was measured.
async fn run(arguments: Arguments) -> anyhow::Result<bool> {
    let beside = || {
        let own = std::env::current_exe().context("this program's own folder")?;
        Ok::<_, anyhow::Error>(own.parent().map(PathBuf::from).unwrap_or_default())
    };
    let mut parts = arguments.only;
    if parts.is_empty() {
        parts = Part::of_the_table();
    }
    parts.sort_unstable();
    parts.dedup();
    let mut bench = Bench::new(parts::Options {
        programs: arguments.bin.map_or_else(beside, Ok)?,
        folder: arguments.folder.unwrap_or_else(std::env::temp_dir),
        subnet: arguments.subnet,
        etcd: arguments.etcd,
        quick: arguments.quick,
    });
    let mut report = Report::new(bulkhead_lab::system::machine(bench.folder()));
    let mut complete = true;
    for part in parts {
        complete &= bench.measure(part, &mut report).await;
    }
    bench.end().await;
    if let Some(path) = arguments.out {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("could not make {}", folder.display()))?;
        }
        std::fs::write(&path, report.json())
            .with_context(|| format!("could not write {}", path.display()))?;
    }
    print!(
        "{}",
        match arguments.format {
            Format::Table => report.table(),
            Format::Json => report.json(),
        }
    );
    Ok(complete)
}
