//! A node is removed: from the commit on nobody serves it.

use std::time::Duration;

use anyhow::Context as _;
use bulkhead_proto::wire::{FetchBlobRequest, RemoveRequest};
use futures::future::try_join_all;
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;

use super::Bench;
use crate::fleet::{self, Simulated};
use crate::report::{Row, Unit};
use crate::samples::Summary;
use bulkhead_lab::client::new_id;

/// A manager that still serves the node is asked again after this.
const PAUSE: Duration = Duration::from_millis(1);
const LIMIT: Duration = Duration::from_secs(10);

/// From `node rm`'s answer until every manager refuses the node's key on a connection that stands, and its stream is closed.
pub(super) async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let count = bench.times(200, 5);
    let lab = bench.lab().await?;
    let addresses: Vec<String> = lab.managers.iter().map(|it| it.address.clone()).collect();
    let ticket = lab.ticket("worker", count).await?;
    let each: Vec<Vec<String>> = addresses.iter().map(|it| vec![it.clone()]).collect();
    let nodes = fleet::join_all(&ticket, &each, "removed", count).await?;
    let leader = lab.leader().await?;
    let mut control = lab.operator()?.control(&addresses[leader])?;
    let mut times = Vec::new();
    for mut node in nodes {
        timeout(LIMIT, node.until(true)).await.context("no session")??;
        let mut probes = Vec::new();
        for address in &addresses {
            let mut probe = node.dispatcher(address)?;
            // It answers that there is no such blob for this node: the key is served.
            anyhow::ensure!(
                !refused(&mut probe).await,
                "{} is refused before its removal",
                node.name
            );
            probes.push(probe);
        }
        let request = RemoveRequest {
            request_id: new_id()?,
            selector: node.name.clone(),
            force: true,
            ..Default::default()
        };
        control.remove_node(request).await?;
        let start = Instant::now();
        let refusals = probes.iter_mut().map(|probe| async {
            while !refused(probe).await {
                sleep(PAUSE).await;
            }
            Ok::<_, anyhow::Error>(())
        });
        let both = async { tokio::try_join!(try_join_all(refusals), closed(&mut node)).map(drop) };
        timeout(LIMIT, both).await.context("it is still served")??;
        times.push(start.elapsed());
    }
    let summary = Summary::of_times(&times).context("at least one run")?;
    Ok(vec![
        Row {
            what: "`node rm` → refused by every manager, and its stream closed".into(),
            swarmkit: "up to a certificate's life",
            goal: "p99 ≤ 1 s",
            reached: Some(summary.p99 <= 1_000.0),
            figures: serde_json::json!({ "milliseconds": summary }),
            ..Row::default()
        }
        .figures(&summary, Unit::Millis),
    ])
}

async fn closed(node: &mut Simulated) -> anyhow::Result<()> {
    node.until(false).await
}

async fn refused(
    probe: &mut bulkhead_proto::wire::dispatcher_client::DispatcherClient<tonic::transport::Channel>,
) -> bool {
    let request = FetchBlobRequest {
        digest: vec![0; 32],
        ..Default::default()
    };
    match probe.fetch_blob(request).await {
        Err(status) => matches!(status.code(), Code::Unauthenticated) || unknown_key(&status),
        Ok(_) => false,
    }
}

/// Whether the key itself is refused, and not what it asked for.
fn unknown_key(status: &tonic::Status) -> bool {
    let code = status.metadata().get(bulkhead_proto::CODE_KEY);
    code.is_some_and(|code| code.as_bytes() == bulkhead_proto::Code::UnknownCaller.as_str().as_bytes())
}
