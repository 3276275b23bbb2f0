//! The core simulation: real replicas over real log stores, on simulated disks and a simulated network, in one thread with
//! a paused clock. One seed decides everything, so a failure can be run again.
//!
//! First everything goes wrong, and nothing that was acknowledged may be lost or contradicted; then the faults stop, and
//! the cluster must serve again within seconds.

mod client;
mod cluster;
pub(crate) mod dice;
mod fleet;
pub mod flood;
mod nemesis;
mod network;
pub mod partition;
mod record;
mod replace;
pub mod rotation;
mod shape;
pub mod shrink;
pub mod sweep;
#[cfg(test)]
mod tests;
mod watched;

use std::collections::BTreeSet;
use std::future::Future;
use std::time::Duration;

use serde::Serialize;
use tokio::runtime::Builder;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::rules::Rule;
use client::Client;
use cluster::Cluster;
use dice::Dice;
use fleet::Fleet;
use nemesis::{Nemesis, heal};
use record::Record;
pub use record::{Counts, Event, Fault, Report, What};
pub use shape::Shape;
use watched::Watcher;

/// Clients that watch, beside those that write and read.
const WATCHERS: u64 = 4;

/// What a run is like. [`Plan::of`] derives one from a seed.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Decides everything.
    pub seed: u64,
    /// Managers.
    pub members: u64,
    /// Workers; without any, there are no tasks and none who plan them.
    pub workers: u64,
    /// Clients.
    pub clients: u64,
    /// How long things go wrong, in simulated time.
    pub trouble: Duration,
    /// A snapshot after this many entries.
    pub snapshot_every: u64,
    /// Entries kept below a snapshot.
    pub keep: u64,
    /// The slowest flush of a disk, in microseconds.
    pub flush_micros: u64,
    /// Bytes of a segment of the log.
    pub segment_bytes: u64,
    /// Changes that each member keeps for watches that resume.
    pub events: usize,
    /// Whether anything goes wrong; without, it is load alone.
    pub faults: bool,
    /// Strikes that are left out, by their numbers: for the shortest run that still fails.
    pub without: BTreeSet<u32>,
    /// Whether each message on the network is recorded, too.
    pub every_message: bool,
}

impl Plan {
    /// The plan of a seed: three managers or five, snapshots often or rarely, disks fast or slow.
    pub fn of(seed: u64) -> Self {
        let dice = Dice::new(seed, 0);
        Self {
            seed,
            members: if dice.percent(30) { 5 } else { 3 },
            workers: 0,
            clients: 3,
            trouble: Duration::from_secs(3),
            // Less than what is kept below one: then it is followers that need them; or more: then it is whoever starts again.
            snapshot_every: match dice.below(4) {
                0 => 10,
                1 => 40,
                _ => 400,
            },
            keep: 20,
            flush_micros: if dice.percent(20) { 30_000 } else { 3_000 },
            segment_bytes: 64 << 10,
            events: if dice.percent(50) { 8 } else { 1_000 },
            faults: true,
            without: BTreeSet::new(),
            every_message: false,
        }
    }
}

/// Runs a plan from beginning to end.
pub fn run(plan: Plan) -> Report {
    alone(plan.seed, simulate(plan))
}

/// Runs a simulation in this thread, on a clock that jumps from one event to the next.
fn alone<T>(seed: u64, simulation: impl Future<Output = T>) -> T {
    let runtime = Builder::new_current_thread()
        .enable_all() // a task's secrets are handed over on a pair of sockets
        .start_paused(true)
        .build()
        .expect("the system has a few descriptors");
    runtime.block_on(bulkhead_raft::runtime::seeded(seed, simulation))
}

async fn simulate(plan: Plan) -> Report {
    // With workers states hold keys, which are drawn anew: what a run compares is what happened.
    let record = match plan.workers {
        0 => Record::new(plan.every_message),
        _ => Record::without_states(),
    };
    let seed = plan.seed;
    let mut cluster = Cluster::new(plan.clone(), record.clone());
    cluster.found().await;
    if !record.violated() {
        let mut fleet = match plan.workers {
            0 => None,
            _ => Some(Fleet::begin(&plan, &cluster, &record).await),
        };
        let clients = clients(&plan, &cluster, &record);
        let keeper = tokio::spawn(replace::keep(
            cluster.live.clone(),
            cluster.wanted.clone(),
            record.clone(),
        ));
        trouble(&plan, &mut cluster, fleet.as_mut(), &record).await;
        if let Some(fleet) = &mut fleet {
            fleet.heal();
        }
        recover(&plan, &mut cluster, &record).await;
        for client in clients {
            client.abort();
            if client.await.is_err_and(|ended| ended.is_panic()) {
                record.violation(Rule::NoPanic, "a client panicked");
            }
        }
        if let Some(mut fleet) = fleet {
            fleet.settle().await;
            fleet.end().await;
        }
        agree(&cluster, &record).await;
        keeper.abort();
        let _cancelled = keeper.await;
        record.check_registers();
    }
    for id in cluster.live.members() {
        cluster.stop(id, cluster::Ending::Killed).await;
    }
    record.report(seed)
}

fn clients(plan: &Plan, cluster: &Cluster, record: &Record) -> Vec<JoinHandle<()>> {
    let client = |number| Client {
        number,
        dice: Dice::new(plan.seed, 100 + number),
        live: cluster.live.clone(),
        record: record.clone(),
        written: 0,
    };
    let watcher = |number| Watcher::new(Dice::new(plan.seed, 200 + number), &cluster.live, record);
    let clients = (1..=plan.clients).map(|number| tokio::spawn(client(number).run()));
    let watchers = (1..=WATCHERS).map(|number| tokio::spawn(watcher(number).run()));
    clients.chain(watchers).collect()
}

/// Things go wrong.
async fn trouble(plan: &Plan, cluster: &mut Cluster, mut fleet: Option<&mut Fleet>, record: &Record) {
    let mut nemesis = Nemesis::new(plan, record.clone());
    let pauses = Dice::new(plan.seed, 5);
    let over = Instant::now() + plan.trouble;
    while Instant::now() < over && !record.violated() {
        sleep(pauses.micros(50_000, 700_000)).await;
        if plan.faults {
            nemesis.strike(cluster).await;
            if let Some(fleet) = &mut fleet {
                fleet.strike().await;
            }
        }
    }
}

/// Everything works again; a write must be served within ten seconds.
async fn recover(plan: &Plan, cluster: &mut Cluster, record: &Record) {
    heal(cluster);
    record.note("all is well again");
    record.event(What::AllIsWell);
    for id in cluster.down() {
        cluster.restart(id).await;
    }
    let mut client = Client {
        number: 1_000,
        dice: Dice::new(plan.seed, 6),
        live: cluster.live.clone(),
        record: record.clone(),
        written: 0,
    };
    let served = timeout(Duration::from_secs(10), async {
        loop {
            if let Some((_, leader)) = client.live.leader()
                && client.write(&leader).await.is_some()
            {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
    });
    if served.await.is_err() {
        let members: Vec<_> = cluster
            .live
            .members()
            .into_iter()
            .filter_map(|id| Some((id, cluster.live.get(id)?.members())))
            .collect();
        record.violation(
            Rule::ServesAgain,
            format_args!("no write was served after everything healed: {members:?}"),
        );
    }
}

/// All replicas come to one state, and it holds the history.
async fn agree(cluster: &Cluster, record: &Record) {
    let replicas: Vec<_> = cluster
        .live
        .members()
        .into_iter()
        .filter_map(|id| cluster.live.get(id))
        .collect();
    let agreed = timeout(Duration::from_secs(20), async {
        loop {
            let last = replicas.iter().filter_map(|it| it.members().last_log).max();
            let states: Vec<_> = replicas.iter().map(bulkhead_raft::Replica::state).collect();
            if states.iter().all(|state| Some(state.index()) == last) {
                return states;
            }
            sleep(Duration::from_millis(20)).await;
        }
    });
    let Ok(states) = agreed.await else {
        let at: Vec<_> = replicas
            .iter()
            .map(|it| (it.member(), it.index(), it.members()))
            .collect();
        return record.violation(
            Rule::Converges,
            format_args!("the replicas did not come to one state: {at:?}"),
        );
    };
    for (replica, state) in replicas.iter().zip(states) {
        record.state(replica.member(), &state);
        record.check_history(replica.member(), &state);
    }
}
