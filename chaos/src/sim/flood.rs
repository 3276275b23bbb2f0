//! A cluster in this process that writes as fast as the processors let it, on real time: whoever has work never waits.
//!
//! It is made for what a paused clock cannot show: consensus, apply, snapshots and purges that compete for processors for
//! minutes. openraft#2116 (a purge that overtakes what is still to be applied) was found so.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bulkhead_proto::wire::{Kind, Sealed, Secret, change::Change as Step};
use bulkhead_raft::log_store::Options;
use bulkhead_raft::state::{Key, State};
use bulkhead_raft::{Replica, Timing};
use openraft::async_runtime::WatchReceiver as _;
use tokio::runtime::Builder;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::client::{id, object, register_of, secret, transaction};
use super::cluster::{Cluster, Ending, Live};
use super::record::{Record, What};
use super::{Plan, agree};
use crate::rules::Rule;

/// Clients, each of which writes its next value once the last one was acknowledged. Fewer than a replica takes at once.
const CLIENTS: u64 = 1_000;
/// What one write carries.
const VALUE_BYTES: usize = 1_024;
/// A write that was not acknowledged is followed by another one after this time.
const AGAIN: Duration = Duration::from_millis(5);
/// Between two looks at the snapshots: far less than one takes to come.
const LOOK: Duration = Duration::from_millis(100);

/// What came of it.
#[derive(Clone, Debug)]
pub struct Course {
    /// For how long clients wrote.
    pub took: Duration,
    /// What each acknowledged write took, in microseconds, sorted.
    pub latencies: Vec<u32>,
    /// Writes that were not acknowledged.
    pub failed: u64,
    /// Terms that had a leader after the first one.
    pub leader_changes: usize,
    /// Snapshots that the members made.
    pub snapshots: usize,
    /// Rules that broke.
    pub violations: Vec<String>,
}

/// Three managers that make a snapshot after so many entries, written to for so long.
///
/// # Panics
/// Where the system has no threads for it.
pub fn run(length: Duration, snapshot_every: u64) -> Course {
    let plan = Plan {
        members: 3,
        faults: false,
        snapshot_every,
        keep: Timing::default().keep,
        events: Timing::default().events,
        flush_micros: 500,
        segment_bytes: Options::default().segment_bytes,
        ..Plan::of(0)
    };
    let runtime = Builder::new_multi_thread().enable_time().build();
    runtime
        .expect("threads for the cluster")
        .block_on(flood(plan, length))
}

async fn flood(plan: Plan, length: Duration) -> Course {
    let record = Record::new(false);
    let mut cluster = Cluster::new(plan, record.clone());
    cluster.found().await;
    let clients = if record.violated() { 0 } else { CLIENTS };
    let stop = Arc::new(AtomicBool::new(false));
    let start = Instant::now();
    let clients: Vec<JoinHandle<Writer>> = (1..=clients)
        .map(|number| tokio::spawn(Writer::new(number, &cluster.live).run(stop.clone())))
        .collect();
    let mut snapshots = BTreeSet::new();
    while start.elapsed() < length && !record.violated() {
        sleep(LOOK).await;
        for replica in replicas(&cluster) {
            let last = replica.raft().metrics().borrow_watched().snapshot;
            snapshots.extend(last.map(|it| (replica.member(), it.index)));
        }
    }
    stop.store(true, Ordering::Relaxed);
    let took = start.elapsed();
    let mut writers = Vec::new();
    for client in clients {
        match client.await {
            Ok(writer) => writers.push(writer),
            Err(_) => record.violation(Rule::NoPanic, "a client panicked"),
        }
    }
    if replicas(&cluster).len() < cluster.machines().len() {
        record.violation(Rule::StartsAgain, "a replica stopped by itself");
    }
    agree(&cluster, &record).await;
    for replica in replicas(&cluster) {
        let state = replica.state();
        for writer in &writers {
            writer.check(replica.member(), &state, &record);
        }
    }
    for id in cluster.live.members() {
        cluster.stop(id, Ending::Killed).await;
    }
    let report = record.report(0);
    let leaders = report.events.iter();
    let leaders = leaders.filter(|event| matches!(event.what, What::Leads { .. }));
    let leader_changes = leaders.count().saturating_sub(1);
    let failed = writers.iter().map(|it| it.failed).sum();
    let mut latencies: Vec<u32> = writers.into_iter().flat_map(|it| it.latencies).collect();
    latencies.sort_unstable();
    Course {
        took,
        latencies,
        failed,
        leader_changes,
        snapshots: snapshots.len(),
        violations: report.violations.iter().map(ToString::to_string).collect(),
    }
}

fn replicas(cluster: &Cluster) -> Vec<Replica> {
    let members = cluster.live.members();
    members
        .into_iter()
        .filter_map(|id| cluster.live.get(id))
        .collect()
}

/// One client, and the object that it alone writes.
struct Writer {
    number: u64,
    live: Live,
    /// The last value that was sent, and the last one that was acknowledged.
    sent: u32,
    acknowledged: u32,
    failed: u64,
    latencies: Vec<u32>,
}

impl Writer {
    fn new(number: u64, live: &Live) -> Self {
        Self {
            number,
            live: live.clone(),
            sent: 0,
            acknowledged: 0,
            failed: 0,
            latencies: Vec::new(),
        }
    }

    fn object(&self) -> Secret {
        Secret {
            value: Some(Sealed {
                ciphertext: vec![0xA5; VALUE_BYTES],
                ..Sealed::default()
            }),
            ..secret(id(self.number, 0), self.sent)
        }
    }

    async fn run(mut self, stop: Arc<AtomicBool>) -> Self {
        while !stop.load(Ordering::Relaxed) {
            let Some((_, leader)) = self.live.leader() else {
                sleep(AGAIN).await;
                continue;
            };
            self.sent += 1;
            let key = Key::new(Kind::Secret, id(self.number, 0));
            let step = match leader.state().get(key) {
                Some(_) => Step::Replace(object(self.object())),
                None => Step::Create(object(self.object())),
            };
            let bytes = transaction(id(self.number, self.sent.into()), Vec::new(), step);
            let begun = Instant::now();
            match leader.propose(bytes).await {
                Ok(outcome) if outcome.rejection.is_none() => {
                    self.acknowledged = self.sent;
                    self.latencies
                        .push(u32::try_from(begun.elapsed().as_micros()).unwrap_or(u32::MAX));
                }
                _ => {
                    self.failed += 1;
                    sleep(AGAIN).await;
                }
            }
        }
        self
    }

    /// What was acknowledged last is there, or what was sent after it.
    fn check(&self, member: u64, state: &State, record: &Record) {
        let there = register_of(state, id(self.number, 0)).map_or(0, |(_, value)| value);
        if !(u64::from(self.acknowledged)..=u64::from(self.sent)).contains(&there) {
            record.violation(
                Rule::AcknowledgedIsKept,
                format_args!(
                    "m{member} has value {there} of client {}, which was told that {} is there",
                    self.number, self.acknowledged
                ),
            );
        }
    }
}
