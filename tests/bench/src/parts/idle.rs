//! Memory of programs that rest.

use std::time::Duration;

use anyhow::Context as _;
use tokio::time::sleep;

use super::Bench;
use crate::report::{Row, Unit};
use crate::samples::Summary;
use bulkhead_lab::system::{cpu_of, memory};

const REST: Duration = Duration::from_secs(60);
const QUICK_REST: Duration = Duration::from_secs(5);
const MIB: f64 = (1 << 20) as f64;

/// One kind of program.
#[derive(Debug, Default)]
struct Kind {
    name: &'static str,
    pids: Vec<u32>,
    swarmkit: &'static str,
    goal: &'static str,
    /// In MiB.
    bound: Option<f64>,
}

/// Of each program after a minute in which nobody asked for anything. A new cluster: memory that a load needed says
/// something about the load.
pub(super) async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let rest = if bench.options.quick { QUICK_REST } else { REST };
    bench.lab = None;
    let lab = bench.lab().await?;
    let mut managers = Vec::new();
    for manager in &lab.managers {
        managers.push(manager.pid()?);
    }
    let (mut workers, mut launchers) = (Vec::new(), Vec::new());
    for worker in &lab.workers {
        workers.push(worker.agent()?);
        launchers.push(worker.pid()?);
    }
    let kinds = [
        Kind {
            name: "manager",
            pids: managers,
            swarmkit: "118 MiB",
            goal: "≤ 40 MiB",
            bound: Some(40.0),
        },
        Kind {
            name: "worker",
            pids: workers,
            swarmkit: "84 MiB",
            goal: "≤ 20 MiB",
            bound: Some(20.0),
        },
        Kind {
            name: "launcher",
            pids: launchers,
            ..Kind::default()
        },
    ];
    let before: Vec<Duration> = kinds.iter().map(|kind| cpu_of(&kind.pids)).collect();
    sleep(rest).await;
    let mut rows = Vec::new();
    for (kind, before) in kinds.into_iter().zip(before) {
        let cpu = cpu_of(&kind.pids).saturating_sub(before).as_secs_f64() / kind.pids.len() as f64;
        let percent = cpu / rest.as_secs_f64() * 100.0;
        let (mut resident, mut proportional) = (Vec::new(), Vec::new());
        for pid in &kind.pids {
            let memory = memory(*pid)?;
            resident.push(memory.resident as f64 / MIB);
            proportional.push(memory.proportional as f64 / MIB);
        }
        let resident = Summary::of(resident).context("at least one")?;
        let proportional = Summary::of(proportional).context("at least one")?;
        rows.push(
            Row {
                what: format!(
                    "resident memory of an idle {} after {} s",
                    kind.name,
                    rest.as_secs()
                ),
                cpu: format!("{percent:.1} % of a core"),
                swarmkit: kind.swarmkit,
                goal: kind.goal,
                reached: kind.bound.map(|bound| resident.max <= bound),
                against: format!("PSS {}", Unit::Mebibytes.show(proportional.p50)),
                figures: serde_json::json!({
                    "rss_mib": resident, "pss_mib": proportional, "cpu_percent_of_a_core": percent,
                }),
                ..Row::default()
            }
            .figures(&resident, Unit::Mebibytes),
        );
    }
    Ok(rows)
}
