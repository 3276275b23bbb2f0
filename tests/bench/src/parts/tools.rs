//! What has a benchmark of its own, beside the code that it measures: run here, and its figures put into the table.

use std::path::Path;
use std::process::Stdio;

use anyhow::Context as _;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::process::Command;

use super::Bench;
use crate::report::{Row, Unit};

#[derive(Deserialize)]
struct Log {
    n: usize,
    log_store: Times,
    plain_file: Times,
}

#[derive(Deserialize)]
struct Times {
    p50_ms: f64,
    p99_ms: f64,
}

/// The log store against a plain preallocated file, on the measured disk.
pub(super) async fn log_store(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    let folder = bench.folder().to_string_lossy().into_owned();
    let line = [
        "run",
        "-q",
        "--release",
        "-p",
        "bulkhead-raft",
        "--example",
        "log_bench",
        "--",
        "--json",
        &folder,
    ];
    let (log, figures): (Log, _) = cargo(&line).await?;
    let ratio = log.plain_file.p50_ms / log.log_store.p50_ms;
    Ok(vec![Row {
        what: "log store alone, 64 × 1 KiB per batch, sealed".into(),
        median: Unit::Millis.show(log.log_store.p50_ms),
        p99: Unit::Millis.show(log.log_store.p99_ms),
        n: log.n.to_string(),
        goal: "≥ 0.8 of a preallocated file",
        reached: Some(ratio >= 0.8),
        against: format!(
            "{ratio:.2} of {} (p99 {})",
            Unit::Millis.show(log.plain_file.p50_ms),
            Unit::Millis.show(log.plain_file.p99_ms)
        ),
        figures,
        ..Row::default()
    }])
}

#[derive(Deserialize)]
struct Start {
    n: usize,
    p50_ms: f64,
    p99_ms: f64,
    cpu_ms_per_task: f64,
}

/// One task, from the request to the launcher to the program's execution.
pub(super) async fn task_start() -> anyhow::Result<Vec<Row>> {
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "a sandbox needs root");
    let line = ["bench", "-q", "-p", "bulkhead-launcher", "--bench", "start"];
    let (start, figures): (Start, _) = cargo(&line).await?;
    Ok(vec![Row {
        what: "one task: request to the launcher → its program executed".into(),
        median: Unit::Millis.show(start.p50_ms),
        p99: Unit::Millis.show(start.p99_ms),
        n: start.n.to_string(),
        cpu: Unit::Millis.show(start.cpu_ms_per_task),
        swarmkit: "",
        goal: "p50 ≤ 5 ms",
        reached: Some(start.p50_ms <= 5.0),
        against: "crun 27.8 ms*, runc 45.3 ms*".into(),
        figures,
        ..Row::default()
    }])
}

/// Runs a benchmark through cargo, in release; its one line of JSON, read and whole.
async fn cargo<T: DeserializeOwned>(line: &[&str]) -> anyhow::Result<(T, serde_json::Value)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut command = Command::new("cargo");
    command.args(line).current_dir(root);
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .output()
        .await
        .context("could not run cargo")?;
    anyhow::ensure!(output.status.success(), "`cargo {}` failed", line.join(" "));
    let text = String::from_utf8(output.stdout)?;
    let json = text
        .lines()
        .rev()
        .find(|line| line.starts_with('{'))
        .context("it printed no figures")?;
    Ok((serde_json::from_str(json)?, serde_json::from_str(json)?))
}
