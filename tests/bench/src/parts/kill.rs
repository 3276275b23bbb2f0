//! The leader is killed under an operator who writes.

use std::time::Duration;

use anyhow::{Context as _, bail};
use bulkhead_proto::wire::Role;
use tokio::time::{Instant, sleep, timeout};

use super::Bench;
use crate::report::{Row, Unit};
use crate::samples::Summary;
use bulkhead_lab::Lab;
use bulkhead_lab::client::{create, secret};

/// One try of the write; a manager answers far sooner, even to say that nobody leads.
const TRY: Duration = Duration::from_secs(5);
/// Between tries, so that a refusal at once is no storm.
const PAUSE: Duration = Duration::from_millis(5);
const LIMIT: Duration = Duration::from_secs(30);

/// From `kill -9` of the leader to the acknowledgement of a write that is sent, after it, to the two others in turn.
/// The connections stand before.
pub(super) async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let count = bench.times(50, 3);
    let lab = bench.lab().await?;
    let mut times = Vec::new();
    for _ in 0..count {
        times.push(kill_leader(lab).await?);
    }
    let summary = Summary::of_times(&times).context("at least one run")?;
    let all: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1e3).collect();
    Ok(vec![
        Row {
            what: "kill -9 of the leader → next acknowledged write".into(),
            swarmkit: "15.4 s",
            goal: "p50 ≤ 600 ms, p99 ≤ 1.5 s",
            reached: Some(summary.p50 <= 600.0 && summary.p99 <= 1_500.0),
            against: format!("max {}", Unit::Millis.show(summary.max)),
            figures: serde_json::json!({ "milliseconds": summary, "each": all }),
            ..Row::default()
        }
        .figures(&summary, Unit::Millis),
    ])
}

async fn kill_leader(lab: &mut Lab) -> anyhow::Result<Duration> {
    let leader = lab.leader().await?;
    let mut others = lab.others(leader).await?;
    let write = secret(vec![0xA5; 1_024])?;
    let start = Instant::now();
    lab.managers[leader].kill()?;
    let mut last = None;
    let took = 'acknowledged: loop {
        for control in &mut others {
            match timeout(TRY, create(control, write.clone())).await {
                Ok(Ok(_)) => break 'acknowledged start.elapsed(),
                Ok(Err(status)) => last = Some(status),
                Err(_) => {}
            }
            sleep(PAUSE).await;
        }
        if start.elapsed() > LIMIT {
            bail!("no write was acknowledged within {} s: {last:?}", LIMIT.as_secs());
        }
    };
    lab.revive(Role::Manager, leader).await?;
    Ok(took)
}
