//! From the first program's start to a cluster that is ready.

use anyhow::Context as _;

use super::Bench;
use crate::report::{Row, Unit};
use crate::samples::Summary;
use bulkhead_lab::Lab;

/// The programs start at once; the others join at once, as soon as the first manager gives tickets.
pub(super) async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let mut times = Vec::new();
    for _ in 0..bench.times(10, 2) {
        bench.lab = None;
        let (lab, took) = Lab::up(&bench.place(), 3, 2).await?;
        bench.lab = Some(lab);
        times.push(took.as_secs_f64());
    }
    let summary = Summary::of(times).context("at least one run")?;
    Ok(vec![
        Row {
            what: "cluster of 3 managers and 2 workers: first program started → all ready".into(),
            goal: "≤ 5 s",
            reached: Some(summary.p50 <= 5.0),
            figures: serde_json::json!({ "seconds": summary }),
            ..Row::default()
        }
        .figures(&summary, Unit::Seconds),
    ])
}
