//! The machines of a run: each a disk that outlives its program, and a replica while that runs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_identity::Unswapped;
use bulkhead_proto::NodeId;
use bulkhead_raft::encryption::{DataKey, Sealing};
use bulkhead_raft::file_system::{Fault, SimFileSystem};
use bulkhead_raft::log_store::{Flushing, Options};
use bulkhead_raft::runtime::Blocking;
use bulkhead_raft::{Fatal, Member, Parts, Reconciled, Replica, Timing};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::Plan;
use super::dice::Dice;
use super::network::{End, Port, Switch};
use super::record::{Record, What};
use crate::rules::Rule;

/// The folder of log and snapshot on each disk.
const FOLDER: &str = "/raft";

/// The replicas that run, for clients. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Live(Arc<Mutex<BTreeMap<u64, (u64, Replica)>>>);

impl Live {
    fn with<T>(&self, act: impl FnOnce(&mut BTreeMap<u64, (u64, Replica)>) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn members(&self) -> Vec<u64> {
        self.with(|live| live.keys().copied().collect())
    }

    pub(super) fn get(&self, member: u64) -> Option<Replica> {
        self.with(|live| live.get(&member).map(|(_, replica)| replica.clone()))
    }

    /// The replica of a member, and which of its programs it is.
    pub(super) fn life(&self, member: u64) -> Option<(u64, Replica)> {
        self.with(|live| live.get(&member).cloned())
    }

    /// The replica that may act as the leader of the newest term.
    pub(super) fn leader(&self) -> Option<(u64, Replica)> {
        self.with(|live| {
            let leading = live.iter().filter_map(|(member, (_, replica))| {
                let term = replica.leadership().borrow().leading?;
                Some((term, *member, replica.clone()))
            });
            leading
                .max_by_key(|(term, ..)| *term)
                .map(|(_, member, replica)| (member, replica))
        })
    }

    fn insert(&self, end: End, replica: Replica) {
        self.with(|live| live.insert(end.member, (end.life, replica)));
    }

    fn remove(&self, end: End) {
        self.with(|live| {
            if live.get(&end.member).is_some_and(|(life, _)| *life == end.life) {
                live.remove(&end.member);
            }
        });
    }
}

struct Machine {
    disk: SimFileSystem,
    life: u64,
    running: Option<(Replica, Vec<JoinHandle<()>>)>,
}

/// How a program ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ending {
    /// Killed: what it wrote, synced or not, is with the system.
    Killed,
    /// The machine lost power: of what was not synced, any part is gone.
    PowerLost,
}

/// All machines.
pub(super) struct Cluster {
    plan: Plan,
    dice: Dice,
    record: Record,
    pub(super) switch: Switch,
    pub(super) live: Live,
    machines: BTreeMap<u64, Machine>,
}

fn member(id: u64) -> Member {
    let mut node = [0; 16];
    node[8..].copy_from_slice(&id.to_be_bytes());
    Member {
        node: NodeId::from_bytes(node),
        address: format!("m{id}"),
    }
}

impl Cluster {
    pub(super) fn new(plan: Plan, record: Record) -> Self {
        let switch = Switch::new(Dice::new(plan.seed, 1), record.clone());
        let machines = (1..=plan.members).map(|id| {
            let machine = Machine {
                disk: SimFileSystem::new(),
                life: 0,
                running: None,
            };
            (id, machine)
        });
        Self {
            dice: Dice::new(plan.seed, 2),
            machines: machines.collect(),
            live: Live::default(),
            plan,
            record,
            switch,
        }
    }

    /// Starts every machine, and makes them one cluster of voters: learners first.
    pub(super) async fn found(&mut self) {
        for id in 1..=self.plan.members {
            self.boot(id).await;
        }
        let Some(first) = self.live.get(1) else { return };
        if let Err(error) = first.initialise(member(1)).await {
            return self
                .record
                .violation(Rule::ServesAgain, format_args!("no cluster: {error}"));
        }
        let desired: BTreeSet<u64> = (1..=self.plan.members).collect();
        let late = Instant::now() + Duration::from_secs(30);
        while first.members().voters != desired {
            if Instant::now() > late {
                return self.record.violation(
                    Rule::ServesAgain,
                    format_args!("not all became voters: {:?}", first.members()),
                );
            }
            for id in 2..=self.plan.members {
                if let Err(error) = first.add_learner(id, member(id)).await {
                    self.record.note(format_args!("m{id} is no learner yet: {error}"));
                    sleep(Duration::from_millis(50)).await;
                }
            }
            while first.reconcile_voters(&desired).await == Ok(Reconciled::Moved) {}
        }
        self.record.note("all vote");
    }

    /// Starts a machine's program on what its disk holds.
    pub(super) async fn boot(&mut self, id: u64) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        machine.life += 1;
        let end = End {
            member: id,
            life: machine.life,
        };
        let seed = self.plan.seed ^ (id << 32) ^ (machine.life << 48);
        let entropy = Dice::new(seed, 3);
        let flushes = Dice::new(seed, 4);
        let slowest = self.plan.flush_micros;
        let parts = Parts {
            member: id,
            fs: Arc::new(machine.disk.clone()),
            folder: FOLDER.into(),
            sealing: Sealing {
                keys: Arc::new(DataKey::new(Unswapped::new([7; 32])).into()),
                store: [id.to_le_bytes()[0]; 16],
                cluster_epoch: 1,
                member: id,
            },
            entropy: Arc::new(entropy),
            network: Port {
                switch: self.switch.clone(),
                me: end,
            },
            timing: Timing {
                snapshot_every: self.plan.snapshot_every,
                keep: self.plan.keep,
                snapshot_wait: Duration::from_secs(5),
                ..Timing::default()
            },
            log: Options {
                segment_bytes: 64 << 10,
                flushing: Flushing::Delayed(Arc::new(move || flushes.micros(50, slowest))),
                ..Options::default()
            },
            blocking: Blocking::Inline,
            witness: Default::default(),
        };
        // A folder that a simulated power loss took away is made again; whatever was acknowledged in it was synced.
        match Replica::start(parts).await {
            Ok(replica) => {
                self.switch.plug(end, replica.raft().clone());
                self.live.insert(end, replica.clone());
                self.record.note(format_args!("m{id} runs"));
                self.record.event(What::Runs { member: id });
                let watchers = self.watch(end, &replica);
                if let Some(machine) = self.machines.get_mut(&id) {
                    machine.running = Some((replica, watchers));
                }
            }
            Err(error) => {
                let chain = std::iter::successors(std::error::Error::source(&error), |it| it.source());
                let why: Vec<String> = chain.map(ToString::to_string).collect();
                self.record.violation(
                    Rule::StartsAgain,
                    format_args!("m{id} does not start: {error} {why:?}"),
                );
            }
        }
    }

    /// Everything that a replica shows is looked at.
    fn watch(&self, end: End, replica: &Replica) -> Vec<JoinHandle<()>> {
        let id = end.member;
        // Looked at each simulated millisecond: waiting on the replica's watches would wake in no fixed order.
        let (record, seen) = (self.record.clone(), replica.clone());
        let looking = tokio::spawn(async move {
            let (mut index, mut leads) = (None, None);
            loop {
                let state = seen.state();
                if index.replace(state.index()) != Some(state.index()) {
                    record.state(id, &state);
                }
                let leading = seen.leadership().borrow().leading;
                if leads != leading {
                    leads = leading;
                    match leading {
                        Some(term) => record.leads(id, term),
                        None => record.event(What::Follows { member: id }),
                    }
                }
                sleep(Duration::from_millis(1)).await;
            }
        });
        let (record, seen, live, switch) = (
            self.record.clone(),
            replica.clone(),
            self.live.clone(),
            self.switch.clone(),
        );
        let end_of = tokio::spawn(async move {
            match seen.stopped().await {
                Fatal::Panicked => record.violation(Rule::NoPanic, format_args!("m{id}: consensus panicked")),
                Fatal::Store(why) => {
                    record.count(|counts| counts.disk_failures += 1);
                    record.note(format_args!("m{id} stopped: {why}"));
                }
                Fatal::Stopped => {}
            }
            // As its program does: it ends.
            record.event(What::Ends { member: id });
            switch.unplug(end);
            live.remove(end);
        });
        vec![looking, end_of]
    }

    /// Ends a machine's program.
    pub(super) async fn stop(&mut self, id: u64, how: Ending) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        let end = End {
            member: id,
            life: machine.life,
        };
        self.switch.unplug(end);
        self.live.remove(end);
        let dice = self.dice.clone();
        match how {
            Ending::Killed => machine.disk.crash(&mut |_| 1), // everything written stays
            Ending::PowerLost => machine.disk.crash(&mut |count| dice.below(count)),
        }
        if let Some((replica, watchers)) = machine.running.take() {
            self.record.event(What::Ends { member: id });
            for watcher in watchers {
                watcher.abort();
            }
            // What is left of it finds its files dead and its network gone.
            replica.shutdown().await;
        }
    }

    /// Machines whose program does not run.
    pub(super) fn down(&self) -> Vec<u64> {
        let live = self.live.members();
        self.machines
            .keys()
            .copied()
            .filter(|id| !live.contains(id))
            .collect()
    }

    /// Starts a machine that is down, or whose replica stopped by itself.
    pub(super) async fn restart(&mut self, id: u64) {
        self.stop(id, Ending::Killed).await;
        self.boot(id).await;
    }

    pub(super) fn set_fault(&self, id: u64, fault: Fault) {
        if let Some(machine) = self.machines.get(&id) {
            machine.disk.set_fault(fault);
        }
    }
}
