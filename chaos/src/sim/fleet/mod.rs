//! Workers for the simulated cluster: each manager has its controllers and its dispatcher as they are, each worker its agent
//! and its records, and between them is the simulated network. What wraps these in gRPC and TLS is left to simulations of whole
//! programs ([`crate::wire`]); without it a thousand workers are few.
//!
//! Services are scaled, tasks end by themselves, workers die, lose power and are cut off, while managers are broken as ever.
//! In the end what runs must be what was asked for, each task with its secret.

mod manager;
mod state;
mod worker;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::seam::Clock;
use bulkhead_launcher::message::ExitCause;
use bulkhead_manager::orchestrator::Step as Planned;
use bulkhead_proto::RequestId;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use self::manager::Managers;
use self::state::{SERVICES, asked, founded, gap, node_id};
use self::worker::Worker;
use super::Plan;
use super::client::id;
use super::cluster::Cluster;
use super::dice::Dice;
use super::record::Record;
use crate::rules::Rule;
use crate::sandbox;

/// The number of the first worker, among the nodes on the network.
pub(super) const FIRST: u64 = 1_000;
/// The wall clock when a run begins, in milliseconds since 1970.
const START_MS: u64 = 1_767_225_600_000;
/// Once all is well, what was asked for runs within this time.
const SETTLES: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(100);
/// The dice of strikes are those of parts from here on.
const FIRST_PART: u64 = 300_000;
/// The operator's number, among those who write.
const OPERATOR: u64 = 2_000_000;

/// The clocks of every machine: right, and the same everywhere.
#[derive(Clone, Copy, Debug)]
struct Paused(Instant);

impl Clock for Paused {
    fn wall_millis(&self) -> u64 {
        START_MS + u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX - START_MS)
    }

    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }
}

/// The workers of a run, and what managers have for them.
pub(super) struct Fleet {
    plan: Plan,
    record: Record,
    managers: Managers,
    workers: BTreeMap<u64, Worker>,
    /// Workers that do not run, and until when.
    down: BTreeMap<u64, Instant>,
    /// Workers that are cut off, and until when.
    cut: BTreeMap<u64, Instant>,
    clock: Arc<dyn Clock>,
    strikes: u32,
    requests: u64,
    keeper: JoinHandle<()>,
    // Last: the workers' records are in it.
    _folder: tempfile::TempDir,
}

impl Fleet {
    /// Makes the cluster object, its nodes and its services, and starts every worker.
    ///
    /// # Panics
    /// Where no folder can be made for what workers keep.
    pub(super) async fn begin(plan: &Plan, cluster: &Cluster, record: &Record) -> Self {
        let folder = sandbox::folder().expect("a folder for temporary files");
        let clock: Arc<dyn Clock> = Arc::new(Paused(Instant::now()));
        let founded = founded(plan, clock.as_ref());
        let managers = Managers::new(plan, cluster, clock.clone(), founded.rings);
        let keeper = tokio::spawn(managers.clone().keep());
        let workers = (FIRST..FIRST + plan.workers).map(|number| {
            let below = folder.path().join(number.to_string());
            (
                number,
                Worker::new(number, below, plan, managers.clone(), clock.clone()),
            )
        });
        let mut fleet = Self {
            plan: plan.clone(),
            record: record.clone(),
            workers: workers.collect(),
            managers,
            down: BTreeMap::new(),
            cut: BTreeMap::new(),
            clock,
            strikes: 0,
            requests: 0,
            keeper,
            _folder: folder,
        };
        let made = timeout(SETTLES, async {
            while fleet.managers.proposer().is_none() {
                sleep(LOOK).await; // until a program has an office
            }
            fleet.commit(founded.all).await
        });
        if let Err(why) = made.await.unwrap_or_else(|_| Err("no manager is there".into())) {
            record.violation(
                Rule::ServesAgain,
                format_args!("there is no cluster object: {why}"),
            );
            return fleet;
        }
        for worker in fleet.workers.values_mut() {
            worker.start(record);
        }
        fleet
    }

    /// Proposes what an operator wants; why it was not done, or may not have been.
    fn commit(&mut self, planned: Planned) -> impl Future<Output = Result<(), String>> + Send + 'static {
        self.requests += 1;
        let request = RequestId::from_bytes(id(OPERATOR, self.requests));
        let proposer = self.managers.proposer();
        async move {
            let proposer = proposer.ok_or("no manager is there")?;
            let asked = proposer.client("operator", request, planned.preconditions, planned.changes);
            let outcome = asked.await.map_err(|error| error.to_string())?;
            match outcome.rejection {
                None => Ok(()),
                Some(rejection) => Err(rejection.detail),
            }
        }
    }

    /// Lets go on what was struck for long enough.
    fn look(&mut self) {
        let now = Instant::now();
        for number in due(&mut self.down, now) {
            if let Some(worker) = self.workers.get_mut(&number) {
                worker.start(&self.record);
            }
        }
        for number in due(&mut self.cut, now) {
            self.managers.cut_off(number, false);
        }
    }

    /// Something of workers or services. Each strike has dice of its own, and the number of the managers' strike beside it.
    pub(super) async fn strike(&mut self) {
        self.look();
        self.strikes += 1;
        if self.plan.without.contains(&self.strikes) {
            return;
        }
        let dice = Dice::new(self.plan.seed, FIRST_PART + u64::from(self.strikes));
        let Some(number) = dice.pick(&self.workers.keys().copied().collect::<Vec<_>>()) else {
            return;
        };
        let until = Instant::now() + dice.micros(200_000, 5_000_000);
        match dice.below(6) {
            0 | 1 if !self.down.contains_key(&number) => {
                let power = dice.percent(50);
                self.record.note(format_args!(
                    "w{number} {}",
                    if power { "loses power" } else { "dies" }
                ));
                if let Some(worker) = self.workers.get_mut(&number) {
                    worker.stop(power).await;
                }
                self.down.insert(number, until);
                self.struck();
            }
            2 => {
                self.record.note(format_args!("w{number} is cut off"));
                self.managers.cut_off(number, true);
                self.cut.insert(number, until);
                self.struck();
            }
            3 => {
                let sandbox = self.workers.get(&number).map(Worker::sandbox);
                if let Some(sandbox) = sandbox
                    && let Some(task) = sandbox.running().first()
                {
                    self.record.note(format_args!("a task of w{number} ends"));
                    sandbox.end(task, ExitCause::Code(1));
                    self.struck();
                }
            }
            _ => self.scale(&dice),
        }
    }

    fn struck(&self) {
        self.record.count(|counts| counts.worker_faults += 1);
    }

    /// Asks for another number of replicas.
    fn scale(&mut self, dice: &Dice) {
        let service = dice.below(SERVICES);
        let replicas = dice.below(usize::try_from(self.plan.workers).unwrap_or(1) * 2 + 1);
        let Some(state) = self.managers.newest() else {
            return;
        };
        let Some(change) = asked(&state, service, replicas, self.clock.as_ref()) else {
            return;
        };
        let (asked, record) = (self.commit(change), self.record.clone());
        tokio::spawn(async move {
            // What was refused or is not known is looked at in the end as it is then.
            let told = asked.await;
            record.note(format_args!(
                "service {service} shall have {replicas} replicas: {told:?}"
            ));
        });
    }

    /// Everything works again.
    pub(super) fn heal(&mut self) {
        for number in std::mem::take(&mut self.cut).into_keys() {
            self.managers.cut_off(number, false);
        }
        for number in std::mem::take(&mut self.down).into_keys() {
            if let Some(worker) = self.workers.get_mut(&number) {
                worker.start(&self.record);
            }
        }
    }

    /// What was asked for becomes what runs.
    pub(super) async fn settle(&mut self) {
        let end = Instant::now() + SETTLES;
        loop {
            let gap = match self.managers.newest() {
                None => Some("there is no state".to_owned()),
                Some(state) => gap(&state, &self.workers),
            };
            let Some(gap) = gap else {
                return self.record.count(|counts| counts.settled += 1);
            };
            if Instant::now() > end {
                return self.record.violation(Rule::WhatIsAskedForRuns, gap);
            }
            sleep(LOOK).await;
            if self.record.violated() {
                return;
            }
        }
    }

    /// Ends every worker.
    pub(super) async fn end(mut self) {
        for worker in self.workers.values_mut() {
            worker.stop(false).await;
        }
        self.keeper.abort();
        let _cancelled = self.keeper.await;
        self.managers.close().await;
    }
}

/// What is due, taken out.
fn due(all: &mut BTreeMap<u64, Instant>, now: Instant) -> Vec<u64> {
    let due = all.extract_if(.., |_, until| *until <= now);
    due.map(|(number, _)| number).collect()
}
