//! Half an hour of writes at nine tenths of what the cluster can do: whether consensus stands it without losing its leader.
//!
//! openraft#2116 (a purge of the log overtakes what is still to be applied, and consensus panics) was found by such a load, with
//! a snapshot every 50,000 entries; managers make one every 5,000. It is no line of the table: it would make that an hour longer.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use bulkhead_proto::wire::{CreateSecretRequest, RemoveRequest};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::write::{CONNECTIONS, VALUE_BYTES, connect};
use super::{Bench, write};
use crate::load::{Load, Send1, round};
use crate::report::{Row, Unit};
use crate::samples::Summary;
use bulkhead_lab::client::{create, new_id, secret};
use bulkhead_lab::{Lab, status};

/// So many clients; enough for the most that the cluster can do.
const CLIENTS: u32 = 64;
/// So many secrets are there at once: each one more is followed by the removal of the oldest.
const SECRETS: usize = 1_000;
/// Of the ceiling, in percent.
const SHARE: u32 = 90;

/// Creates secrets and removes them, so that the state keeps its size.
#[derive(Clone)]
struct Turnover {
    secrets: write::Secrets,
    names: Arc<Mutex<VecDeque<String>>>,
}

#[derive(Clone)]
enum Request {
    Create(CreateSecretRequest),
    Remove(RemoveRequest),
}

impl Turnover {
    fn names(&self) -> std::sync::MutexGuard<'_, VecDeque<String>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Send1 for Turnover {
    type Request = Request;

    fn next(&self) -> anyhow::Result<Request> {
        let mut names = self.names();
        let oldest = (names.len() > SECRETS).then(|| names.pop_front()).flatten();
        Ok(match oldest {
            Some(selector) => Request::Remove(RemoveRequest {
                request_id: new_id()?,
                selector,
                ..RemoveRequest::default()
            }),
            None => Request::Create(secret(vec![0xA5; VALUE_BYTES])?),
        })
    }

    async fn send(&mut self, request: Request) -> Result<(), tonic::Status> {
        match request {
            Request::Create(secret) => {
                let name = secret.name.clone();
                create(&mut self.secrets.0, secret).await?;
                self.names().push_back(name);
            }
            Request::Remove(removal) => drop(self.secrets.0.remove_secret(removal).await?),
        }
        Ok(())
    }
}

/// What came of one client's part.
#[derive(Default)]
struct Part {
    latencies: Vec<Duration>,
    failed: usize,
}

/// One client that sends at a fixed pace, or as fast as it gets answers where that is slower. What is refused is sent no more.
async fn pace(
    mut sender: Turnover,
    period: Duration,
    first: Duration,
    until: Instant,
) -> anyhow::Result<Part> {
    let mut part = Part::default();
    let mut due = Instant::now() + first;
    while due < until {
        sleep_until(due).await;
        let (begun, request) = (Instant::now(), sender.next()?);
        match sender.send(request).await {
            Ok(()) => part.latencies.push(begun.elapsed()),
            Err(_) => part.failed += 1,
        }
        due = (due + period).max(Instant::now());
    }
    Ok(part)
}

pub(super) async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let length = Duration::from_secs(bench.times(30 * 60, 30) as u64);
    bench.lab = None;
    let (lab, _) = Lab::up(&bench.place(), 3, 0).await?;
    let leader = lab.leader().await?;
    let names = Arc::default();
    let senders: Vec<Turnover> = (connect(&lab, leader).await?.into_iter())
        .map(|secrets| Turnover {
            secrets,
            names: Arc::clone(&names),
        })
        .collect();
    let load = Load {
        clients: CLIENTS as usize,
        connections: CONNECTIONS,
        requests: bench.times(60_000, 6_000),
    };
    round(&senders, load).await?; // warm
    let ceiling = round(&senders, load).await?.per_second();
    let before = term(&lab, leader).await?;
    let pids = pids(&lab)?;

    let rate = ceiling * f64::from(SHARE) / 100.0;
    let period = Duration::from_secs_f64(f64::from(CLIENTS) / rate);
    let begun = Instant::now();
    let until = begun + length;
    let mut clients = JoinSet::new();
    for at in 0..CLIENTS {
        let first = period * at / CLIENTS;
        clients.spawn(pace(
            senders[at as usize % CONNECTIONS].clone(),
            period,
            first,
            until,
        ));
    }
    let mut whole = Part::default();
    while let Some(part) = clients.join_next().await {
        let part = part??;
        whole.latencies.extend(part.latencies);
        whole.failed += part.failed;
    }
    let took = begun.elapsed();
    ensure!(
        self::pids(&lab)? == pids,
        "a manager ended, and was started again"
    );
    let changes = term(&lab, lab.leader().await?).await? - before;
    let summary = Summary::of_times(&whole.latencies).context("no write")?;
    let per_second = whole.latencies.len() as f64 / took.as_secs_f64();
    Ok(vec![
        Row {
            what: format!(
                "{} min of writes of 1 KiB and removals at {SHARE} % of {}: {}",
                took.as_secs() / 60,
                Unit::PerSecond.show(ceiling),
                Unit::PerSecond.show(per_second)
            ),
            goal: "no leader change, none refused",
            reached: Some(changes == 0 && whole.failed == 0),
            against: format!(
                "{changes} leader changes, {} failed, max {}",
                whole.failed,
                Unit::Millis.show(summary.max)
            ),
            figures: serde_json::json!({
                "ceiling_per_second": ceiling, "per_second": per_second, "milliseconds": summary,
                "seconds": took.as_secs_f64(), "terms": changes, "failed": whole.failed,
            }),
            ..Row::default()
        }
        .figures(&summary, Unit::Millis),
    ])
}

async fn term(lab: &Lab, manager: usize) -> anyhow::Result<u64> {
    let mut control = lab.operator()?.control(&lab.managers[manager].address)?;
    Ok(status(&mut control).await?.term)
}

fn pids(lab: &Lab) -> anyhow::Result<Vec<u32>> {
    lab.managers.iter().map(|manager| manager.pid()).collect()
}
