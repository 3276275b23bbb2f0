//! What a manager has beside its replica: the controllers that plan while it leads, and the dispatcher that workers have their
//! sessions with. Both end with its program.

use std::collections::BTreeMap;
use std::future::{Future, pending};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_identity::seam::Clock;
use bulkhead_manager::Fresh;
use bulkhead_manager::audit::Notes;
use bulkhead_manager::dispatcher::{Desk, Sessions, reports};
use bulkhead_manager::freshness::FRESH_FOR;
use bulkhead_manager::key_ring::KeyRing;
use bulkhead_manager::leader::{self, Signs};
use bulkhead_manager::proposer::{Forward, ForwardError, Proposer};
use bulkhead_proto::limits;
use bulkhead_proto::wire::ForwardResponse;
use bulkhead_raft::runtime::Gate;
use bulkhead_raft::state::State;
use bulkhead_raft::{ProposeError, Replica};
use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::node_id;
use crate::sim::Plan;
use crate::sim::cluster::{Cluster, Live};
use crate::sim::dice::Dice;
use crate::sim::network::Switch;

/// Programs are looked at this often.
const LOOK: Duration = Duration::from_millis(1);
/// A follower tells the leader of its workers this often, as managers do.
const REPORT: Duration = Duration::from_millis(250);

/// The offices of the managers that run. Clones share them.
#[derive(Clone)]
pub(super) struct Managers {
    live: Live,
    pub(super) switch: Switch,
    clock: Arc<dyn Clock>,
    seed: u64,
    /// The managers' ids; workers try them all.
    pub(super) all: Arc<[u64]>,
    rings: Arc<BTreeMap<u64, KeyRing>>,
    offices: Arc<Mutex<BTreeMap<u64, Office>>>,
}

/// What one program of a manager has for workers.
struct Office {
    life: u64,
    desk: Arc<Desk>,
    gate: Gate,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

/// A manager that a worker has reached.
pub(super) struct Reached {
    pub(super) desk: Arc<Desk>,
    pub(super) gate: Gate,
    /// Cancelled when its program ends.
    pub(super) stop: CancellationToken,
}

impl Managers {
    pub(super) fn new(
        plan: &Plan,
        cluster: &Cluster,
        clock: Arc<dyn Clock>,
        rings: BTreeMap<u64, KeyRing>,
    ) -> Self {
        Self {
            live: cluster.live.clone(),
            switch: cluster.switch.clone(),
            clock,
            seed: plan.seed,
            all: (1..=plan.members).collect(),
            rings: Arc::new(rings),
            offices: Arc::default(),
        }
    }

    fn offices(&self) -> MutexGuard<'_, BTreeMap<u64, Office>> {
        self.offices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens an office for each program that begins, and closes that of each that ended.
    pub(super) async fn keep(self) {
        loop {
            for member in self.all.iter().copied() {
                let now = self.live.life(member);
                let open = self.offices().get(&member).map(|it| it.life);
                if now.as_ref().map(|(life, _)| *life) == open {
                    continue;
                }
                let old = self.offices().remove(&member);
                if let Some(old) = old {
                    old.close();
                }
                if let Some((life, replica)) = now {
                    let office = self.open(member, life, replica);
                    self.offices().insert(member, office);
                }
            }
            sleep(LOOK).await;
        }
    }

    fn open(&self, member: u64, life: u64, replica: Replica) -> Office {
        let entropy = Arc::new(Dice::new(self.seed ^ (member << 32) ^ (life << 48), 71));
        let (clock, signs) = (self.clock.clone(), Signs::default());
        let (gate, stop) = (self.live.gate(member), CancellationToken::new());
        let actor = format!("manager/{}", node_id(member));
        let forward = Arc::new(Wire {
            managers: self.clone(),
            me: member,
        });
        let proposer = Proposer::new(replica.clone(), forward, clock.clone(), entropy.clone(), actor);
        let fresh = Fresh::new(replica.clone(), clock.clone());
        let (handle, committer) = reports(proposer.clone(), entropy.clone(), node_id(member));
        let sessions = Sessions::default();
        let ring = self.rings.get(&member).or_else(|| self.rings.values().next());
        let desk = Arc::new(Desk {
            replica: replica.clone(),
            proposer: proposer.clone(),
            fresh: fresh.clone(),
            ring: ring.expect("every manager has one").clone(),
            sessions: sessions.clone(),
            signs: signs.clone(),
            reports: handle,
            notes: Notes::default(),
            clock: clock.clone(),
            entropy,
        });
        let tell = self.clone().tell(member, replica.clone(), signs.clone());
        let follow = self.clone().follow(member, replica.clone(), fresh.clone());
        let (waked, woken) = (sessions.clone(), replica.clone());
        let (ends, planned) = (stop.clone(), stop.clone());
        let all: [BoxFuture<'static, ()>; 5] = [
            leader::run(replica, proposer, signs, clock, fresh, planned).boxed(),
            committer.run(stop.clone()).boxed(),
            async move { waked.run(woken, ends).await }.boxed(),
            tell.boxed(),
            follow.boxed(),
        ];
        let tasks = all.map(|task| tokio::spawn(gate.clone().hold(task)));
        Office {
            life,
            desk,
            gate,
            stop,
            tasks: tasks.into(),
        }
    }

    /// Whoever a worker reaches there; nobody where no program runs.
    pub(super) fn reached(&self, member: u64) -> Option<Reached> {
        let offices = self.offices();
        let office = offices.get(&member)?;
        Some(Reached {
            desk: office.desk.clone(),
            gate: office.gate.clone(),
            stop: office.stop.clone(),
        })
    }

    /// Of the manager that leads, or of any.
    pub(super) fn proposer(&self) -> Option<Proposer> {
        let leader = self.live.leader().map(|(member, _)| member);
        let offices = self.offices();
        let office = leader
            .and_then(|it| offices.get(&it))
            .or_else(|| offices.values().next())?;
        Some(office.desk.proposer.clone())
    }

    /// The newest state that a manager has.
    pub(super) fn newest(&self) -> Option<State> {
        let replicas = self.live.members().into_iter().filter_map(|it| self.live.get(it));
        replicas.map(|it| it.state()).max_by_key(State::index)
    }

    /// Nothing comes through between a node and the managers, or everything again.
    pub(super) fn cut_off(&self, node: u64, cut: bool) {
        for member in self.all.iter() {
            self.switch.clog((node, *member), cut);
            self.switch.clog((*member, node), cut);
        }
    }

    /// Ends all offices.
    pub(super) async fn close(self) {
        let offices = std::mem::take(&mut *self.offices());
        for office in offices.into_values() {
            for task in office.close() {
                let _cancelled = task.await;
            }
        }
    }

    /// A question of one manager to another, and its answer. It never comes where nothing comes through.
    async fn ask<T, F>(&self, from: u64, to: u64, question: impl FnOnce(Replica) -> F + Send) -> Option<T>
    where
        F: Future<Output = T> + Send,
    {
        if !self.switch.carries(from, to).await {
            pending::<()>().await;
        }
        let (_, there) = self.live.life(to)?;
        let answer = self.live.gate(to).hold(question(there)).await;
        if !self.switch.carries(to, from).await {
            pending::<()>().await;
        }
        Some(answer)
    }

    /// Keeps a replica fresh.
    async fn follow(self, me: u64, replica: Replica, fresh: Fresh) {
        let mut ticks = interval(limits::FRESHNESS_PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            let (managers, replica, fresh) = (self.clone(), replica.clone(), fresh.clone());
            // Questions overlap: a slow answer holds no other question up.
            tokio::spawn(async move {
                let sent = managers.clock.monotonic();
                let index = timeout(FRESH_FOR, async {
                    let leader = replica.leadership().borrow().leader?;
                    if leader == me {
                        return replica.read_index().await.ok();
                    }
                    let question = |there: Replica| async move { there.read_index().await.ok() };
                    managers.ask(me, leader, question).await?
                });
                if let Ok(Some(index)) = index.await {
                    fresh.answered(sent, index);
                }
            });
        }
    }

    /// Tells the leader of the workers that are heard here.
    async fn tell(self, me: u64, replica: Replica, signs: Signs) {
        let mut ticks = interval(REPORT);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let leader = replica.leadership().borrow().leader;
            let Some(leader) = leader.filter(|it| *it != me) else {
                continue;
            };
            let ages = signs.ages(self.clock.monotonic());
            let said = async {
                if self.switch.carries(me, leader).await
                    && let Some(there) = self.reached(leader)
                {
                    there.desk.signs.reported(me, ages, self.clock.monotonic());
                }
            };
            let _late = timeout(REPORT, said).await;
        }
    }
}

impl Office {
    fn close(self) -> Vec<JoinHandle<()>> {
        self.stop.cancel();
        for task in &self.tasks {
            task.abort();
        }
        self.tasks
    }
}

/// Takes transactions from one manager to another.
struct Wire {
    managers: Managers,
    me: u64,
}

impl Forward for Wire {
    fn forward(
        &self,
        member: u64,
        transaction: Bytes,
    ) -> BoxFuture<'_, Result<ForwardResponse, ForwardError>> {
        let propose = |there: Replica| async move { there.propose(transaction).await };
        let asked = self.managers.ask(self.me, member, propose);
        async move {
            match asked.await {
                None => Err(ForwardError::NotSent),
                Some(Ok(outcome)) => Ok(ForwardResponse {
                    outcome: Some(outcome),
                    leader: 0,
                }),
                Some(Err(ProposeError::NotLeader { leader })) => Ok(ForwardResponse {
                    outcome: None,
                    leader: leader.unwrap_or(0),
                }),
                Some(Err(ProposeError::Unknown | ProposeError::Stopped)) => Err(ForwardError::Unknown),
                Some(Err(error)) => Err(ForwardError::Refused(error)),
            }
        }
        .boxed()
    }
}
