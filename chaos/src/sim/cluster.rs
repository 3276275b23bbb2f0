//! The machines of a run: each a disk that outlives its program, and a replica while that runs.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_identity::Unswapped;
use bulkhead_proto::NodeId;
use bulkhead_raft::encryption::{DataKey, Sealing};
use bulkhead_raft::file_system::{Fault, SimFileSystem};
use bulkhead_raft::log_store::{Flushing, Options};
use bulkhead_raft::runtime::{Blocking, Gate};
use bulkhead_raft::{Fatal, Member, Parts, Reconciled, Replica, Timing};
use futures::FutureExt as _;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::Plan;
use super::dice::Dice;
use super::network::{End, Port, Switch};
use super::record::{Record, What};
use super::replace::Wanted;
use crate::rules::Rule;

/// The folder of log and snapshot on each disk.
const FOLDER: &str = "/raft";

/// A program that runs, or is stopped.
#[derive(Clone, Debug)]
struct Running {
    life: u64,
    replica: Replica,
    gate: Gate,
}

/// The replicas that run, for clients. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Live(Arc<Mutex<BTreeMap<u64, Running>>>);

impl Live {
    fn with<T>(&self, act: impl FnOnce(&mut BTreeMap<u64, Running>) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn members(&self) -> Vec<u64> {
        self.with(|live| live.keys().copied().collect())
    }

    pub(super) fn get(&self, member: u64) -> Option<Replica> {
        self.with(|live| live.get(&member).map(|it| it.replica.clone()))
    }

    /// The replica of a member, and which of its programs it is.
    pub(super) fn life(&self, member: u64) -> Option<(u64, Replica)> {
        self.with(|live| live.get(&member).map(|it| (it.life, it.replica.clone())))
    }

    /// What a member's program runs behind; open where it does not run.
    pub(super) fn gate(&self, member: u64) -> Gate {
        self.with(|live| live.get(&member).map(|it| it.gate.clone()))
            .unwrap_or_default()
    }

    /// The replica that may act as the leader of the newest term.
    pub(super) fn leader(&self) -> Option<(u64, Replica)> {
        self.with(|live| {
            let leading = live.iter().filter_map(|(member, it)| {
                let term = it.replica.leadership().borrow().leading?;
                Some((term, *member, it.replica.clone()))
            });
            leading
                .max_by_key(|(term, ..)| *term)
                .map(|(_, member, replica)| (member, replica))
        })
    }

    /// The newest term that anybody knows.
    fn newest_term(&self) -> u64 {
        self.with(|live| live.values().map(|it| it.replica.members().term).max())
            .unwrap_or(0)
    }

    fn insert(&self, end: End, replica: Replica, gate: Gate) {
        let life = end.life;
        self.with(|live| live.insert(end.member, Running { life, replica, gate }));
    }

    fn remove(&self, end: End) {
        self.with(|live| {
            if live.get(&end.member).is_some_and(|it| it.life == end.life) {
                live.remove(&end.member);
            }
        });
    }
}

struct Machine {
    disk: SimFileSystem,
    /// While it is closed no flush of the disk ends.
    stall: Gate,
    life: u64,
    running: Option<(Replica, Gate, Vec<JoinHandle<()>>)>,
}

impl Machine {
    fn new() -> Self {
        Self {
            disk: SimFileSystem::new(),
            stall: Gate::default(),
            life: 0,
            running: None,
        }
    }
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
    /// The members that the cluster is to have.
    pub(super) wanted: Wanted,
    machines: BTreeMap<u64, Machine>,
    /// Faults that go on by themselves.
    later: Vec<JoinHandle<()>>,
}

pub(super) fn member(id: u64) -> Member {
    let mut node = [0; 16];
    node[8..].copy_from_slice(&id.to_be_bytes());
    Member {
        node: NodeId::from_bytes(node),
        address: format!("m{id}"),
    }
}

/// Flushes that take 50 µs to `slowest`, and as long as the disk is stalled.
fn delayed(dice: Dice, slowest: u64, stall: Gate) -> Flushing {
    Flushing::Delayed(Arc::new(move || {
        let (delay, stall) = (dice.micros(50, slowest), stall.clone());
        async move {
            sleep(delay).await;
            stall.passes().await;
        }
        .boxed()
    }))
}

impl Cluster {
    pub(super) fn new(plan: Plan, record: Record) -> Self {
        let switch = Switch::new(Dice::new(plan.seed, 1), record.clone());
        let machines = (1..=plan.members).map(|id| (id, Machine::new()));
        Self {
            dice: Dice::new(plan.seed, 2),
            machines: machines.collect(),
            live: Live::default(),
            wanted: Wanted::new(1..=plan.members),
            later: Vec::new(),
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
        let gate = Gate::default();
        let parts = Parts {
            member: id,
            fs: Arc::new(machine.disk.mounted()),
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
                events: self.plan.events,
                ..Timing::default()
            },
            log: Options {
                segment_bytes: self.plan.segment_bytes,
                flushing: delayed(flushes, self.plan.flush_micros, machine.stall.clone()),
                ..Options::default()
            },
            blocking: Blocking::Inline,
            witness: Default::default(),
        };
        // A folder that a simulated power loss took away is made again; whatever was acknowledged in it was synced.
        match gate.clone().hold(Replica::start(parts)).await {
            Ok(replica) => {
                self.switch.plug(end, replica.raft().clone(), gate.clone());
                self.live.insert(end, replica.clone(), gate.clone());
                self.record.note(format_args!("m{id} runs"));
                self.record.event(What::Runs { member: id });
                let watchers = self.watch(end, &replica);
                if let Some(machine) = self.machines.get_mut(&id) {
                    machine.running = Some((replica, gate, watchers));
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
        let (record, seen, live) = (self.record.clone(), replica.clone(), self.live.clone());
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
                        Some(term) => {
                            record.leads(id, term);
                            // One that was deposed meanwhile need not know what its successor acknowledged.
                            if live.newest_term() <= term {
                                record.serves(id, term, state.index());
                            }
                        }
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
            Ending::Killed => machine.disk.kill(),
            Ending::PowerLost => machine.disk.crash(&mut |count| dice.below(count)),
        }
        machine.stall.open();
        if let Some((replica, gate, watchers)) = machine.running.take() {
            self.record.event(What::Ends { member: id });
            for watcher in watchers {
                watcher.abort();
            }
            // What is left of it finds its files dead and its network gone, also where it was stopped.
            gate.open();
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

    /// The machines that there are.
    pub(super) fn machines(&self) -> Vec<u64> {
        self.machines.keys().copied().collect()
    }

    /// Stops a program: nothing of it runs, and it does not know, until so much time went by.
    pub(super) fn pause(&mut self, id: u64, length: Duration) {
        if let Some((_, gate, _)) = self.machines.get(&id).and_then(|it| it.running.as_ref()) {
            let gate = gate.clone();
            gate.close();
            self.afterwards(async move {
                sleep(length).await;
                gate.open();
            });
        }
    }

    /// No flush of a disk ends before so much time went by.
    pub(super) fn stall(&mut self, id: u64, length: Duration) {
        if let Some(machine) = self.machines.get(&id) {
            let stall = machine.stall.clone();
            stall.close();
            self.afterwards(async move {
                sleep(length).await;
                stall.open();
            });
        }
    }

    /// A fault that goes on by itself, until all is well.
    pub(super) fn afterwards(&mut self, fault: impl Future<Output = ()> + Send + 'static) {
        self.later.push(tokio::spawn(fault));
    }

    /// What goes on by itself ends; programs and disks go on.
    pub(super) fn calm(&mut self) {
        for fault in self.later.drain(..) {
            fault.abort();
        }
        for machine in self.machines.values() {
            machine.stall.open();
            if let Some((_, gate, _)) = &machine.running {
                gate.open();
            }
        }
    }

    /// A machine is lost with its disk; another one takes its place, under an id that nobody had. Its id; none where the
    /// cluster could not do without the lost one now.
    pub(super) async fn replace(&mut self, id: u64) -> Option<u64> {
        let whole = self.down().is_empty() && self.wanted.all_vote(&self.live);
        if !whole || self.machines.len() < 3 {
            return None;
        }
        self.stop(id, Ending::PowerLost).await;
        self.machines.remove(&id);
        let new = self.wanted.replace(id);
        self.machines.insert(new, Machine::new());
        self.boot(new).await;
        Some(new)
    }

    pub(super) fn set_fault(&self, id: u64, fault: Fault) {
        if let Some(machine) = self.machines.get(&id) {
            machine.disk.set_fault(fault);
        }
    }

    /// The same after so many more changes of the disk, which may be in the midst of a flush.
    pub(super) fn set_fault_after(&self, id: u64, changes: u64, fault: Fault) {
        if let Some(machine) = self.machines.get(&id) {
            machine.disk.set_fault_after(changes, fault);
        }
    }
}
