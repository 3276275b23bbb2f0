//! A worker is lost with all that runs on it.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context as _;
use bulkhead_proto::wire::{Role, Task};
use tokio::time::{Instant, sleep};

use super::Bench;
use super::work::{IMAGE, Watch, is_running, remove, service, tasks};
use crate::report::{Row, Unit};
use crate::samples::Summary;
use bulkhead_lab::Lab;
use bulkhead_lab::client::until;

const TASKS: u32 = 12;
/// A new leader gives every worker two seconds more; a loss is measured under one that leads for longer.
const SETTLED: Duration = Duration::from_secs(5);

/// The node's launcher, worker, supervisors and tasks are killed at once; from there until all that ran on it runs
/// elsewhere.
pub(super) async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let count = bench.times(10, 2);
    let lab = bench.lab().await?;
    lab.pack_probe(IMAGE).await?;
    let (mut times, mut starts) = (Vec::new(), Vec::new());
    for round in 0..count {
        let (lost, started) = lose(lab, round % 2).await?;
        times.push(lost.as_secs_f64());
        starts.push(started);
    }
    let summary = Summary::of(times).context("at least one run")?;
    let started = Summary::of_times(&starts).context("at least one run")?;
    Ok(vec![
        Row {
            what: "a worker's start, launcher included → session with a manager".into(),
            swarmkit: "105 ms",
            goal: "≤ 100 ms",
            reached: Some(started.p50 <= 100.0),
            figures: serde_json::json!({ "milliseconds": started }),
            ..Row::default()
        }
        .figures(&started, Unit::Millis),
        Row {
            what: "a worker lost (kill -9 of all of it) → its tasks run elsewhere".into(),
            swarmkit: "18.2 s",
            goal: "≤ 4 s",
            reached: Some(summary.p50 <= 4.0),
            figures: serde_json::json!({ "seconds": summary }),
            ..Row::default()
        }
        .figures(&summary, Unit::Seconds),
    ])
}

/// How long its tasks were away, and how long its next start took.
async fn lose(lab: &mut Lab, at: usize) -> anyhow::Result<(Duration, Duration)> {
    let leader = lab.leader().await?;
    let mut control = lab.operator()?.control(&lab.managers[leader].address)?;
    control.create_service(service("moves", TASKS, None)?).await?;
    until("all tasks run", Duration::from_secs(60), async || {
        running(&mut control)
            .await
            .is_ok_and(|tasks| tasks.len() == TASKS as usize)
    })
    .await?;
    sleep(SETTLED).await;

    let name = lab.workers[at].name.clone();
    let nodes = bulkhead_lab::nodes(&mut control).await?;
    let node = nodes
        .into_iter()
        .find(|node| node.name == name)
        .with_context(|| format!("the cluster does not know {name}"))?;
    let before = running(&mut control).await?;
    let lost = before.iter().filter(|task| task.node_id == node.id).count();
    anyhow::ensure!(lost > 0, "no task runs on {name}: nothing can be lost");
    let known: BTreeSet<Vec<u8>> = before.into_iter().map(|task| task.id).collect();

    let mut watch = Watch::begin(&mut control).await?;
    let start = Instant::now();
    lab.workers[at].kill()?;
    watch
        .running(lost, |task: &Task| {
            task.node_id != node.id && !known.contains(&task.id)
        })
        .await?;
    let took = start.elapsed();

    let started = lab.revive(Role::Worker, at).await?;
    remove(&mut control, "moves").await?;
    Ok((took, started))
}

async fn running(control: &mut bulkhead_lab::client::Control) -> anyhow::Result<Vec<Task>> {
    let all = tasks(control, "moves").await?;
    Ok(all.into_iter().filter(is_running).collect())
}
