//! The root of a live cluster rolls.

use anyhow::Context as _;
use tokio::time::Instant;

use super::Bench;
use crate::report::{Row, Unit};
use crate::samples::Summary;
use bulkhead_lab::Lab;

/// From the command to its end, which is seen at the next look (each 0.2 s) after the old root was dropped. The cluster is
/// one of its own: the operator's key of the other parts would be one of the old root.
pub(super) async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let count = bench.times(10, 2);
    bench.lab = None;
    let (lab, _) = Lab::up(&bench.place(), 3, 5).await?;
    let mut times = Vec::new();
    for _ in 0..count {
        let start = Instant::now();
        lab.bulkhead(&["cluster", "ca", "rotate", "--progress", "none"])
            .await?;
        times.push(start.elapsed().as_secs_f64());
    }
    let summary = Summary::of(times).context("at least one run")?;
    Ok(vec![
        Row {
            what: "root rotation, 3 managers and 5 workers: command → old root gone".into(),
            swarmkit: "3.06 s",
            goal: "≤ 1.5 s",
            reached: Some(summary.p50 <= 1.5),
            figures: serde_json::json!({ "seconds": summary }),
            ..Row::default()
        }
        .figures(&summary, Unit::Seconds),
    ])
}
