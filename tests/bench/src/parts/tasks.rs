//! A hundred tasks on one node.

use std::time::Duration;

use anyhow::Context as _;
use bulkhead_proto::NodeId;
use tokio::time::Instant;

use super::Bench;
use super::work::{IMAGE, Watch, remove, service};
use crate::report::{Row, Unit};
use crate::samples::Summary;
use bulkhead_lab::system::{cpu_of, cpu_of_tree};
use bulkhead_lab::{Lab, nodes};

const TASKS: u32 = 100;

struct Run {
    took: Duration,
    worker_cpu: Duration,
    managers_cpu: Duration,
}

/// The image is on the node already, unpacked by a first service of one task. The constraint of the service names the
/// node; three managers commit.
pub(super) async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let count = bench.times(5, 1);
    let lab = bench.lab().await?;
    lab.pack_probe(IMAGE).await?;
    run(lab, 1).await?;
    let mut runs = Vec::new();
    for _ in 0..count {
        runs.push(run(lab, TASKS).await?);
    }
    let took = Summary::of(runs.iter().map(|run| run.took.as_secs_f64())).context("at least one run")?;
    let per_task = |cpu: Duration| cpu.as_secs_f64() / f64::from(TASKS);
    let cpu = Summary::of(runs.iter().map(|run| per_task(run.worker_cpu))).context("at least one run")?;
    let managers =
        Summary::of(runs.iter().map(|run| per_task(run.managers_cpu))).context("at least one run")?;
    let all = Row {
        what: format!("{TASKS} tasks on one node: request → all running"),
        swarmkit: "7.3 s",
        goal: "≤ 1 s",
        reached: Some(took.p50 <= 1.0),
        figures: serde_json::json!({ "seconds": took }),
        ..Row::default()
    };
    let each = Row {
        what: "… processor time per task: launcher, worker, supervisor, start of the task".into(),
        swarmkit: "0.133 s (machine)",
        goal: "≤ 0.015 s",
        reached: Some(cpu.p50 <= 0.015),
        median: format!("{:.4} s", cpu.p50),
        p99: format!("{:.4} s", cpu.p99),
        n: format!("{} × {TASKS}", cpu.n),
        against: format!("3 managers: {:.4} s", managers.p50),
        figures: serde_json::json!({ "node_seconds": cpu, "managers_seconds": managers }),
        ..Row::default()
    };
    Ok(vec![all.figures(&took, Unit::Seconds), each])
}

async fn run(lab: &Lab, replicas: u32) -> anyhow::Result<Run> {
    let leader = lab.leader().await?;
    let mut control = lab.operator()?.control(&lab.managers[leader].address)?;
    let worker = &lab.workers[0];
    let found = nodes(&mut control).await?;
    let node = found
        .iter()
        .find(|node| node.name == worker.name)
        .with_context(|| format!("the cluster does not know {}", worker.name))?;
    let node = NodeId::try_from(node.id.as_slice())?.to_string();
    let request = service("many", replicas, Some(node))?;
    let mut managers = Vec::new();
    for manager in &lab.managers {
        managers.push(manager.pid()?);
    }
    let mut watch = Watch::begin(&mut control).await?;
    let launcher = worker.pid()?;
    let (worker_before, managers_before) = (cpu_of_tree(launcher), cpu_of(&managers));
    let start = Instant::now();
    control.create_service(request).await?;
    watch.running(replicas as usize, |_| true).await?;
    let took = start.elapsed();
    let run = Run {
        took,
        worker_cpu: cpu_of_tree(launcher).saturating_sub(worker_before),
        managers_cpu: cpu_of(&managers).saturating_sub(managers_before),
    };
    remove(&mut control, "many").await?;
    Ok(run)
}
