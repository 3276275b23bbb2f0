//! The leader is asked to stop while operators write.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use bulkhead_proto::wire::Role;
use tokio::time::error::Elapsed;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tonic::Status;

use super::Bench;
use crate::report::{Row, Unit};
use crate::samples::Summary;
use bulkhead_lab::Lab;
use bulkhead_lab::client::{Control, create, secret};

/// Writes per second, in an open loop.
const RATE: u64 = 1_000;
/// Writers, each at its share of the rate.
const WRITERS: u64 = 20;
/// Under way before the leader is asked, and after.
const AROUND: Duration = Duration::from_millis(400);
const TRY: Duration = Duration::from_secs(5);

/// The longest time without an acknowledged write around the stop, of writes at the other managers.
pub(super) async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let count = bench.times(100, 3);
    let lab = bench.lab().await?;
    let mut gaps = Vec::new();
    for _ in 0..count {
        gaps.push(hand_over(lab).await?);
    }
    let summary = Summary::of_times(&gaps).context("at least one run")?;
    Ok(vec![
        Row {
            what: format!(
                "the leader stops as asked, at {RATE} writes/s: longest gap between acknowledged writes"
            ),
            goal: "p99 ≤ 100 ms",
            reached: Some(summary.p99 <= 100.0),
            figures: serde_json::json!({ "milliseconds": summary }),
            ..Row::default()
        }
        .figures(&summary, Unit::Millis),
    ])
}

async fn hand_over(lab: &mut Lab) -> anyhow::Result<Duration> {
    let leader = lab.leader().await?;
    let others = lab.others(leader).await?;
    let over = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..WRITERS)
        .map(|at| {
            let control = others[usize::try_from(at).unwrap_or(0) % others.len()].clone();
            tokio::spawn(write(control, over.clone()))
        })
        .collect();
    sleep(AROUND).await;
    lab.managers[leader].stop().await?;
    sleep(AROUND).await;
    over.store(true, Ordering::Relaxed);
    let mut acknowledged = Vec::new();
    for writer in writers {
        acknowledged.extend(writer.await??);
    }
    acknowledged.sort_unstable();
    let gap = acknowledged.windows(2).map(|pair| pair[1] - pair[0]).max();
    lab.revive(Role::Manager, leader).await?;
    gap.context("two writes at least")
}

/// When each of its writes was acknowledged.
async fn write(mut control: Control, over: Arc<AtomicBool>) -> anyhow::Result<Vec<Instant>> {
    let mut pace = interval(Duration::from_micros(1_000_000 * WRITERS / RATE));
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut acknowledged = Vec::new();
    while !over.load(Ordering::Relaxed) {
        pace.tick().await;
        let write = secret(vec![0xA5; 1_024])?;
        let end = Instant::now() + TRY;
        // As a client would: what was put off is sent again, and is the same write.
        while let Some(why) = refusal(timeout(TRY, create(&mut control, write.clone())).await) {
            anyhow::ensure!(
                Instant::now() < end,
                "a write was not acknowledged within {} s: {why}",
                TRY.as_secs()
            );
            sleep(Duration::from_millis(5)).await;
        }
        acknowledged.push(Instant::now());
    }
    Ok(acknowledged)
}

/// Why a write was not acknowledged; nothing: it was.
fn refusal<T>(answer: Result<Result<T, Status>, Elapsed>) -> Option<String> {
    match answer {
        Ok(Ok(_)) => None,
        Ok(Err(status)) => Some(format!("{:?}: {}", status.code(), status.message())),
        Err(elapsed) => Some(elapsed.to_string()),
    }
}
