//! The leader is killed with a large fleet at it.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context as _;
use bulkhead_lab::Lab;
use bulkhead_lab::client::Control;
use bulkhead_proto::limits::WORKER_LIVENESS;
use bulkhead_proto::wire::{
    Kind, NodeStatus, Role, WatchRequest, WatchResponse, event::Change, object::Object as Any,
};
use futures::future::try_join_all;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tonic::Streaming;

use super::Bench;
use crate::fleet::{self, Simulated};
use crate::report::{Row, Unit};
use crate::samples::Summary;

/// Each of them at the leader, which is the worst that can be: a worker chooses its manager by chance.
const FLEET: usize = 1_000;
const LIMIT: Duration = Duration::from_secs(120);

/// From `kill -9` of the leader until every worker has a session with another manager; whether one of them was called down.
pub(super) async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let count = bench.times(FLEET, 30);
    bench.lab = None;
    let (mut lab, _) = Lab::up(&bench.place(), 3, 0).await?;
    let leader = lab.leader().await?;
    let mut fleet = gather(&lab, leader, count).await?;
    let mut control = lab.others(leader).await?.swap_remove(0);
    let (all_back, downs) = watch_downs(&mut control).await?;
    let before: Vec<usize> = fleet.iter().map(Simulated::begun).collect();
    let start = Instant::now();
    lab.managers[leader].kill()?;
    let back = fleet.iter_mut().zip(before).map(|(node, begun)| async move {
        node.until_after(begun).await?;
        Ok::<_, anyhow::Error>(start.elapsed())
    });
    let times = timeout(LIMIT, try_join_all(back))
        .await
        .context("not all came back")??;
    sleep(WORKER_LIVENESS * 2).await; // who was not heard in time is called down by then
    drop(all_back);
    let downs = downs.await??;
    let summary = Summary::of_times(&times).context("at least one")?;
    let figures = serde_json::json!({ "milliseconds": summary, "called_down": downs });
    Ok(vec![
        Row {
            what: format!("kill -9 of the leader, which {count} workers are at → a session elsewhere, {downs} called down; each"),
            goal: "the last ≤ 5 s, none called down",
            reached: Some(summary.max <= 5_000.0 && downs == 0),
            against: format!("max {}", Unit::Millis.show(summary.max)),
            figures,
            ..Row::default()
        }
        .figures(&summary, Unit::Millis),
    ])
}

/// Workers whose sessions stand with the leader.
async fn gather(lab: &Lab, leader: usize, count: usize) -> anyhow::Result<Vec<Simulated>> {
    let address = |at: usize| lab.managers[at].address.clone();
    let others: Vec<usize> = (0..lab.managers.len()).filter(|at| *at != leader).collect();
    let lists = [[others[0], others[1]], [others[1], others[0]]];
    let lists = lists.map(|[next, last]| [leader, next, last].map(address).to_vec());
    let ticket = lab.ticket("worker", count).await?;
    let mut fleet = fleet::join_all(&ticket, &lists, "fleet", count).await?;
    for node in &mut fleet {
        timeout(LIMIT, node.until(true)).await.context("no session")??;
    }
    Ok(fleet)
}

/// Counts the workers that are called down, until the sender is dropped.
async fn watch_downs(
    control: &mut Control,
) -> anyhow::Result<(oneshot::Sender<()>, JoinHandle<anyhow::Result<usize>>)> {
    let request = WatchRequest {
        kinds: vec![Kind::Node.into()],
        ..WatchRequest::default()
    };
    let mut stream = control.watch(request).await?.into_inner();
    stream.message().await?.context("the watch ended")?; // says from where: now it stands
    let (end, mut ended) = oneshot::channel();
    let counting = tokio::spawn(async move {
        let mut downs = BTreeSet::new();
        loop {
            let message = tokio::select! {
                biased;
                message = next(&mut stream) => message?,
                _ = &mut ended => return Ok(downs.len()),
            };
            for event in message.events {
                if let Some(Change::Put(object)) = event.change
                    && let Some(Any::Node(node)) = object.object
                    && node.role() == Role::Worker
                    && node.status() == NodeStatus::Down
                {
                    downs.insert(node.id);
                }
            }
        }
    });
    Ok((end, counting))
}

async fn next(stream: &mut Streaming<WatchResponse>) -> anyhow::Result<WatchResponse> {
    stream.message().await?.context("the watch ended")
}
