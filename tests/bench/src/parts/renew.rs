//! Many certificates at once.

use std::time::Duration;

use anyhow::Context as _;
use bulkhead_proto::wire::dispatcher_client::DispatcherClient;
use futures::future::try_join_all;
use tokio::time::{Instant, timeout};
use tonic::transport::Channel;

use super::Bench;
use crate::fleet::{self, Simulated};
use crate::report::{Row, Unit};
use crate::samples::Summary;
use bulkhead_lab::Lab;

/// More workers than any of the cluster's own; their joins take most of the time.
const FLEET: usize = 1_000;
const LIMIT: Duration = Duration::from_secs(120);

/// Every worker of a large fleet renews at once over connections that stand; then the root rolls under it, with one in a
/// hundred dead.
pub(super) async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let count = bench.times(FLEET, 30);
    bench.lab = None;
    let (lab, _) = Lab::up(&bench.place(), 3, 0).await?;
    let each: Vec<Vec<String>> = lab.managers.iter().map(|it| vec![it.address.clone()]).collect();
    let ticket = lab.ticket("worker", count).await?;
    let mut fleet = fleet::join_all(&ticket, &each, "fleet", count).await?;
    for node in &mut fleet {
        timeout(LIMIT, node.until(true)).await.context("no session")??;
    }
    let renewals = renewals(&fleet).await?;
    let rotation = rotation(&lab, &mut fleet).await?;
    Ok(vec![renewals, rotation])
}

async fn renewals(fleet: &[Simulated]) -> anyhow::Result<Row> {
    let mut ways: Vec<(&Simulated, DispatcherClient<Channel>)> = Vec::new();
    for node in fleet {
        let mut way = node.dispatcher(node.manager())?;
        fleet::renew(&node.identity, &mut way).await?; // so that the connection stands
        ways.push((node, way));
    }
    let start = Instant::now();
    let all = ways.iter_mut().map(|(node, way)| async {
        let start = Instant::now();
        let put_off = fleet::renew(&node.identity, way).await?;
        Ok::<_, anyhow::Error>((start.elapsed(), put_off))
    });
    let (times, put_off): (Vec<Duration>, Vec<usize>) = try_join_all(all).await?.into_iter().unzip();
    let put_off: usize = put_off.iter().sum();
    let rate = fleet.len() as f64 / start.elapsed().as_secs_f64();
    let summary = Summary::of_times(&times).context("at least one")?;
    Ok(Row {
        what: format!(
            "{} workers renew at once: certificates/s {rate:.0}, {put_off} put off; each",
            fleet.len()
        ),
        goal: "≥ 1,500/s",
        reached: Some(rate >= 1_500.0),
        figures: serde_json::json!({ "milliseconds": summary, "per_second": rate, "put_off": put_off }),
        ..Row::default()
    }
    .figures(&summary, Unit::Millis))
}

async fn rotation(lab: &Lab, fleet: &mut [Simulated]) -> anyhow::Result<Row> {
    let dead = (fleet.len() / 100).max(1);
    for node in &mut fleet[..dead] {
        node.die();
    }
    let start = Instant::now();
    lab.bulkhead(&[
        "cluster",
        "ca",
        "rotate",
        "--deadline",
        "2m",
        "--progress",
        "none",
    ])
    .await?;
    let summary = Summary::of(vec![start.elapsed().as_secs_f64()]).context("one run")?;
    Ok(Row {
        what: format!(
            "root rotation, 3 managers and {} simulated workers, {dead} of them dead",
            fleet.len()
        ),
        swarmkit: "never ends with a dead node",
        goal: "≤ 20 s",
        reached: Some(summary.p50 <= 20.0),
        figures: serde_json::json!({ "seconds": summary }),
        ..Row::default()
    }
    .figures(&summary, Unit::Seconds))
}
