//! This manager's replica: the one handle by which everything else reads the state and proposes changes to it.

mod leadership;
mod parts;
mod reseal;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_proto::limits;
use bulkhead_proto::wire::{Event, Outcome};
use bytes::Bytes;
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::{ClientWriteError, Fatal as RaftFatal, LinearizableReadError, RaftError};
use openraft::network::{NetSnapshot, RaftNetworkFactory};
use openraft::raft::Precondition;
use openraft::storage::RaftLogStorage;
use openraft::{ChangeMembers, ReadPolicy};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::log_store::LogStore;
use crate::membership::{CAUGHT_UP, Facts, Step, next_step};
use crate::planted::{Bug, planted};
use crate::runtime::watch::{Receiver, Sender};
use crate::runtime::{Runtime, seeded};
use crate::state::{Compacted, State};
use crate::state_machine::{Keeper, StateMachine, View};
use crate::{Command, LogId, Member, Membership, TypeConfig};

pub use leadership::Leadership;
pub use parts::{Core, Disk, Parts, StartError, Timing};
pub use reseal::ResealError;

/// Consensus itself, for the transport.
pub type Raft = openraft::Raft<TypeConfig, StateMachine>;

/// Proposals under way at once. Each may hold a transaction of 1 MiB until it is committed; twice as many would let
/// clients pin 2 GiB on a leader that lost its quorum.
const PROPOSALS: usize = 1_024;
/// Between looks whether all were answered.
const SETTLE_POLL: Duration = Duration::from_millis(2);
/// A proposal that was not answered by then is unknown to its caller.
const PROPOSAL_WAIT: Duration = Duration::from_secs(10);
/// A change of members that was not committed by then is left to the next call.
const MEMBERSHIP_WAIT: Duration = Duration::from_secs(10);
/// A leader that did not hear a quorum for this long does not say that it leads (in election timeouts).
const LEASE_TIMEOUTS: u32 = 2;

/// Why a proposal has no outcome.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Another manager leads; nothing was proposed.
    #[error("this manager does not lead")]
    NotLeader {
        /// Who does, if known.
        leader: Option<u64>,
    },
    /// Too many proposals are under way; nothing was proposed.
    #[error("too many proposals are under way; try again")]
    Busy,
    /// The disk's reserve is reached; nothing was proposed.
    #[error("the leader's disk is full; free some space")]
    Full,
    /// Larger than any transaction; nothing was proposed.
    #[error("a transaction has at most {limit} bytes, this one has {bytes}", limit = limits::TRANSACTION_BYTES)]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// It may or may not be committed: ask again with the same request id.
    #[error("the outcome is unknown; ask again with the same request id")]
    Unknown,
    /// The replica stopped; the outcome is unknown.
    #[error("the replica stopped")]
    Stopped,
}

/// Why a read index was not given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Another manager leads.
    #[error("this manager does not lead")]
    NotLeader {
        /// Who does, if known.
        leader: Option<u64>,
    },
    /// No quorum answered in time.
    #[error("no quorum of managers answered")]
    NoQuorum,
    /// The replica stopped.
    #[error("the replica stopped")]
    Stopped,
}

/// Why a change of members did not happen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    /// Another manager leads.
    #[error("this manager does not lead")]
    NotLeader {
        /// Who does, if known.
        leader: Option<u64>,
    },
    /// Another change is under way, or the members changed meanwhile: ask again.
    #[error("the members are changing; ask again")]
    Changing,
    /// Not done in time; the next call goes on from where this one came.
    #[error("the change of members took too long; ask again")]
    TimedOut,
    /// The replica stopped.
    #[error("the replica stopped")]
    Stopped,
}

/// How far [`Replica::reconcile_voters`] came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reconciled {
    /// The voters are as desired, or what is missing must be waited for.
    Settled,
    /// One step was made; ask again.
    Moved,
}

/// Why the replica is no more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fatal {
    /// The log or the state failed: the disk is full or broken, or an entry is of a newer program.
    #[error("the store failed: {0}")]
    Store(String),
    /// A broken invariant in consensus.
    #[error("consensus panicked")]
    Panicked,
    /// It was shut down.
    #[error("the replica was shut down")]
    Stopped,
}

/// The members as this manager knows them.
#[derive(Clone, Debug, Default)]
pub struct Members {
    /// Voters of all configurations (a joint one has two).
    pub voters: BTreeSet<u64>,
    /// Members that do not vote.
    pub learners: BTreeSet<u64>,
    /// Node and address of each.
    pub nodes: BTreeMap<u64, Member>,
    /// The last entry that each has; empty but on the leader.
    pub matched: BTreeMap<u64, Option<u64>>,
    /// The term.
    pub term: u64,
    /// The last entry of this manager's log.
    pub last_log: Option<u64>,
    /// The leader, if known.
    pub leader: Option<u64>,
    /// The entry that set the membership.
    pub log_index: Option<u64>,
    /// Whether two configurations hold at once: a change is under way, or a crash left one.
    pub joint: bool,
    /// Members that answered within two election timeouts, this one included; empty but on the leader.
    pub alive: BTreeSet<u64>,
}

/// A manager's replica. Clones are handles to the same one.
#[derive(Clone)]
pub struct Replica(Arc<Inner>);

struct Inner {
    member: u64,
    raft: Raft,
    view: Arc<View>,
    leadership: Receiver<Leadership>,
    room: watch::Receiver<bool>,
    lease: Duration,
    proposals: Semaphore,
    watcher: Mutex<Option<JoinHandle<()>>>,
    keeper: Keeper,
    /// The log on disk, until the replica stops; none where it is kept otherwise.
    store: Mutex<Option<LogStore>>,
}

impl fmt::Debug for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replica")
            .field("member", &self.0.member)
            .finish_non_exhaustive()
    }
}

impl Replica {
    /// Opens the log and the snapshot in a folder and starts.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start<N>(parts: Parts<N>) -> Result<Self, StartError>
    where
        N: RaftNetworkFactory<TypeConfig>,
        N::Network: NetSnapshot<TypeConfig, SnapshotData = State>,
    {
        let (core, recovered) = parts.open().await?;
        let store = core.log.clone();
        let replica = seeded(core.seed, Self::assemble(core, recovered.purged)).await?;
        *replica.0.store.lock().unwrap_or_else(PoisonError::into_inner) = Some(store);
        Ok(replica)
    }

    /// Starts over an open log: [`Replica::start`] without the files.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start_over<L, N>(core: Core<L, N>) -> Result<Self, StartError>
    where
        L: RaftLogStorage<TypeConfig>,
        N: RaftNetworkFactory<TypeConfig>,
        N::Network: NetSnapshot<TypeConfig, SnapshotData = State>,
    {
        seeded(core.seed, Self::assemble(core, None)).await
    }

    /// `purged`: the last entry that only the snapshot can hold.
    async fn assemble<L, N>(core: Core<L, N>, purged: Option<LogId>) -> Result<Self, StartError>
    where
        L: RaftLogStorage<TypeConfig>,
        N: RaftNetworkFactory<TypeConfig>,
        N::Network: NetSnapshot<TypeConfig, SnapshotData = State>,
    {
        let config = Arc::new(core.timing.config()?);
        let lease = Duration::from_millis(core.timing.election_ms.end) * LEASE_TIMEOUTS;
        let (machine, view) = StateMachine::load(core.snapshots, core.blocking, core.timing.events)
            .map_err(StartError::Snapshot)?;
        if let Some(purged) = purged.filter(|purged| machine.last() < Some(*purged)) {
            return Err(StartError::NoSnapshot { purged: purged.index });
        }
        let keeper = machine.keeper();
        let raft = Raft::new(core.member, config, core.network, core.log, machine)
            .await
            .map_err(StartError::Raft)?;
        let leadership = Sender::new(Leadership::default());
        let leadership_seen = leadership.subscribe();
        let (room, room_seen) = watch::channel(core.disk.has_room());
        let watcher = leadership::Watcher {
            member: core.member,
            raft: raft.clone(),
            view: view.clone(),
            leadership,
            room,
            disk: core.disk,
            lease,
            tick: core.timing.heartbeat,
        };
        let watcher = <Runtime as openraft::AsyncRuntime>::spawn(watcher.run());
        Ok(Self(Arc::new(Inner {
            member: core.member,
            raft,
            view,
            leadership: leadership_seen,
            room: room_seen,
            lease,
            proposals: Semaphore::new(PROPOSALS),
            watcher: Mutex::new(Some(watcher)),
            keeper,
            store: Mutex::default(),
        })))
    }

    /// Makes this replica the first voter of a new cluster. On one that was ever initialised it changes nothing.
    ///
    /// # Errors
    /// [`Fatal`] where the replica stopped.
    pub async fn initialise(&self, me: Member) -> Result<(), Fatal> {
        let members = BTreeMap::from([(self.0.member, me)]);
        match self.0.raft.initialize(members).await {
            Ok(()) | Err(RaftError::APIError(_)) => Ok(()), // the only refusal: there is a cluster already
            Err(RaftError::Fatal(error)) => Err(fatal(&error)),
        }
    }

    /// This replica's member id.
    pub fn member(&self) -> u64 {
        self.0.member
    }

    /// The newest applied state: a pointer copy that never changes.
    pub fn state(&self) -> State {
        self.0.view.state()
    }

    /// The commit index of the newest applied state.
    pub fn index(&self) -> u64 {
        self.0.view.index()
    }

    /// Wakes when more was applied; the number is the index. What changed is in [`Replica::events_since`].
    pub fn applied(&self) -> Receiver<u64> {
        self.0.view.applied()
    }

    /// Waits until the state is at this index or later. Bound it in time: a replica that is cut off waits on.
    pub async fn wait_applied(&self, index: u64) {
        // It fails only when the view is gone, which this handle keeps.
        let mut applied = self.0.view.applied();
        let _gone = applied.wait_for(|_| self.has_applied(index)).await;
    }

    /// Whether the state is at this index or later.
    pub fn has_applied(&self, index: u64) -> bool {
        self.index() >= index || planted(Bug::ReadsBeforeApplied)
    }

    /// The index after which all changes are kept.
    pub fn events_from(&self) -> u64 {
        self.0.view.events_from()
    }

    /// The changes after an index.
    ///
    /// # Errors
    /// [`Compacted`] where they are no longer all known.
    pub fn events_since(&self, index: u64) -> Result<Vec<Arc<Event>>, Compacted> {
        self.0.view.events_since(index)
    }

    /// Who leads, and whether this replica may act as the leader.
    pub fn leadership(&self) -> Receiver<Leadership> {
        self.0.leadership.clone()
    }

    /// Proposes a transaction as the leader and waits until it is applied here.
    ///
    /// # Errors
    /// [`ProposeError`]; only [`ProposeError::Unknown`] and [`ProposeError::Stopped`] may have been committed.
    pub async fn propose(&self, transaction: Bytes) -> Result<Outcome, ProposeError> {
        if transaction.len() > limits::TRANSACTION_BYTES {
            return Err(ProposeError::TooLarge {
                bytes: transaction.len(),
            });
        }
        if !*self.0.room.borrow() {
            return Err(ProposeError::Full);
        }
        let _slot = self.0.proposals.try_acquire().map_err(|_| ProposeError::Busy)?;
        let write = self.0.raft.client_write(Command(transaction));
        match timeout(PROPOSAL_WAIT, write).await {
            Ok(Ok(written)) if planted(Bug::CallsMadeRefused) && written.data.0.index.is_multiple_of(61) => {
                Err(ProposeError::Busy)
            }
            Ok(Ok(written)) if planted(Bug::AnswersEarlierIndex) => Ok(Outcome {
                index: written.data.0.index.saturating_sub(1),
                ..written.data.0
            }),
            Ok(Ok(written)) => Ok(written.data.0),
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(leader)))) => {
                Err(ProposeError::NotLeader {
                    leader: leader.leader_id,
                })
            }
            Ok(Err(RaftError::APIError(_))) | Err(_) if planted(Bug::CallsUnknownMade) => Ok(Outcome {
                index: self.index(),
                rejection: None,
            }),
            Ok(Err(_)) | Err(_) if planted(Bug::CallsUnknownRefused) => Err(ProposeError::Busy),
            Ok(Err(RaftError::APIError(_))) | Err(_) => Err(ProposeError::Unknown),
            Ok(Err(RaftError::Fatal(_))) => Err(ProposeError::Stopped),
        }
    }

    /// Waits until every proposal here has its answer, at most this long; whether it has. For a replica that is about to stop,
    /// once it handed over: until it stops hearing the others, it learns what became of each.
    pub async fn settled(&self, limit: Duration) -> bool {
        let all = async {
            while self.0.proposals.available_permits() < PROPOSALS {
                sleep(SETTLE_POLL).await;
            }
        };
        timeout(limit, all).await.is_ok()
    }

    /// The index that a read must have applied to see everything committed before the call. A quorum was asked.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn read_index(&self) -> Result<u64, ReadError> {
        if planted(Bug::ReadsWithoutQuorum) && self.members().leader == Some(self.0.member) {
            return Ok(self.index());
        }
        let asked = self.0.raft.get_read_log_id(ReadPolicy::ReadIndex);
        match timeout(limits::FRESHNESS, asked).await {
            Ok(Ok((read, _))) if planted(Bug::ReadsTooOld) => Ok(read.index().saturating_sub(3)),
            Ok(Ok((read, _))) => Ok(read.index()),
            Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(_))))
                if planted(Bug::ReadsAtFollower) =>
            {
                Ok(self.index())
            }
            Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(leader)))) => {
                Err(ReadError::NotLeader {
                    leader: leader.leader_id,
                })
            }
            Ok(Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)))) | Err(_) => {
                Err(ReadError::NoQuorum)
            }
            Ok(Err(RaftError::Fatal(_))) => Err(ReadError::Stopped),
        }
    }

    /// The members as of now.
    pub fn members(&self) -> Members {
        let metrics = self.0.raft.metrics().borrow_watched().clone();
        let membership = metrics.membership_config.membership();
        let index = |id: Option<crate::LogId>| id.map(|id| id.index);
        Members {
            voters: membership.voter_ids().collect(),
            learners: membership.learner_ids().collect(),
            nodes: membership
                .nodes()
                .map(|(id, member)| (*id, member.clone()))
                .collect(),
            matched: metrics
                .replication
                .unwrap_or_default()
                .into_iter()
                .map(|(id, matched)| (id, index(matched)))
                .collect(),
            term: metrics.current_term,
            last_log: metrics.last_log_index,
            leader: metrics.current_leader,
            log_index: index(*metrics.membership_config.log_id()),
            joint: membership.get_joint_config().len() > 1,
            alive: metrics
                .heartbeat
                .iter()
                .flatten()
                .filter(|(_, at)| at.is_some_and(|at| openraft::Instant::elapsed(&*at) <= self.0.lease))
                .map(|(id, _)| *id)
                // A leader always hears itself.
                .chain(metrics.heartbeat.is_some().then_some(self.0.member))
                .collect(),
        }
    }

    /// Adds a member that receives the log but does not vote, or gives one its new address; waits, at most 10 s, until
    /// it has caught up. As the leader only.
    ///
    /// # Errors
    /// [`MembershipError`]; the learner may have been added where it says `TimedOut`.
    pub async fn add_learner(&self, id: u64, member: Member) -> Result<(), MembershipError> {
        let waited = timeout(MEMBERSHIP_WAIT, async {
            let known = self.members().nodes.get(&id).cloned();
            if known.as_ref() != Some(&member) {
                let nodes = BTreeMap::from([(id, member)]);
                let change = match known {
                    None => ChangeMembers::AddNodes(nodes),
                    Some(_) => ChangeMembers::SetNodes(nodes),
                };
                self.change_members(change, true).await?;
            }
            self.caught_up(id).await
        });
        waited.await.unwrap_or(Err(MembershipError::TimedOut))
    }

    async fn caught_up(&self, id: u64) -> Result<(), MembershipError> {
        let mut metrics = self.0.raft.metrics();
        loop {
            let members = self.members();
            if members.leader != Some(self.0.member) {
                return Err(MembershipError::NotLeader {
                    leader: members.leader,
                });
            }
            let matched = members.matched.get(&id).copied().flatten();
            if matched.is_some_and(|matched| matched + CAUGHT_UP >= members.last_log.unwrap_or(0)) {
                return Ok(());
            }
            metrics.changed().await.map_err(|_| MembershipError::Stopped)?;
        }
    }

    /// Removes a member that does not vote. As the leader only.
    ///
    /// # Errors
    /// [`MembershipError`].
    pub async fn remove_learner(&self, id: u64) -> Result<(), MembershipError> {
        if !self.members().learners.contains(&id) {
            return Ok(());
        }
        let change = ChangeMembers::RemoveNodes(BTreeSet::from([id]));
        timeout(MEMBERSHIP_WAIT, self.change_members(change, true))
            .await
            .unwrap_or(Err(MembershipError::TimedOut))
    }

    /// Makes at most one step from the present voters towards the desired ones. As the leader only; call it again
    /// until it answers [`Reconciled::Settled`].
    ///
    /// # Errors
    /// [`MembershipError`]; whatever was half done, the next call goes on from there.
    pub async fn reconcile_voters(&self, desired: &BTreeSet<u64>) -> Result<Reconciled, MembershipError> {
        let members = self.members();
        if members.leader != Some(self.0.member) {
            return Err(MembershipError::NotLeader {
                leader: members.leader,
            });
        }
        let membership: Membership = {
            let metrics = self.0.raft.metrics();
            let metrics = metrics.borrow_watched();
            metrics.membership_config.membership().clone()
        };
        let facts = Facts {
            membership: &membership,
            matched: &members.matched,
            last_log: members.last_log,
            leader: self.0.member,
        };
        let (change, keep_as_learner) = match next_step(&facts, desired) {
            None => return Ok(Reconciled::Settled),
            Some(Step::Flatten) => (ChangeMembers::AddVoterIds(BTreeSet::new()), true),
            Some(Step::Promote(id)) => (ChangeMembers::AddVoterIds(BTreeSet::from([id])), true),
            Some(Step::Remove(id)) => (ChangeMembers::RemoveVoters(BTreeSet::from([id])), false),
        };
        timeout(MEMBERSHIP_WAIT, self.change_members(change, keep_as_learner))
            .await
            .unwrap_or(Err(MembershipError::TimedOut))?;
        Ok(Reconciled::Moved)
    }

    /// Proposes a change, on the condition that the membership is still the one that it was planned for.
    async fn change_members(
        &self,
        change: ChangeMembers<u64, Member>,
        keep_as_learner: bool,
    ) -> Result<(), MembershipError> {
        let last_membership_log_id = *self.0.raft.metrics().borrow_watched().membership_config.log_id();
        let unchanged = Precondition::LastMembershipLogId {
            last_membership_log_id,
        };
        let changed = self
            .0
            .raft
            .change_membership_if(change, keep_as_learner, [unchanged])
            .await;
        match changed {
            Ok(_) => Ok(()),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(leader))) => {
                Err(MembershipError::NotLeader {
                    leader: leader.leader_id,
                })
            }
            Err(RaftError::APIError(_)) => Err(MembershipError::Changing),
            Err(RaftError::Fatal(_)) => Err(MembershipError::Stopped),
        }
    }

    /// Asks that another voter lead: this one, or the one that has most of the log. Not waited for.
    pub async fn hand_over(&self, to: Option<u64>) {
        leadership::hand_over(self.0.member, &self.0.raft, to).await;
    }

    /// Resolves when the replica is no more. Whatever it says but `Stopped` must end the process.
    pub async fn stopped(&self) -> Fatal {
        let mut metrics = self.0.raft.metrics();
        loop {
            if let Err(error) = &metrics.borrow_watched().running_state {
                return fatal(error);
            }
            if metrics.changed().await.is_err() {
                // The core is gone; its last word was looked at above unless it had none.
                return match &metrics.borrow_watched().running_state {
                    Err(error) => fatal(error),
                    Ok(()) => Fatal::Panicked,
                };
            }
        }
    }

    /// Stops the replica and waits until it stopped.
    pub async fn shutdown(&self) {
        if let Err(error) = self.0.raft.shutdown().await {
            tracing::warn!(%error, "consensus did not stop cleanly");
        }
        // The folder's lock goes with the last handle.
        *self.0.store.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let watcher = self
            .0
            .watcher
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(watcher) = watcher {
            watcher.abort();
            let _cancelled = watcher.await; // that it was cancelled is what was asked
        }
    }

    /// Consensus itself: for transports, which hand it what other members say.
    pub fn raft(&self) -> &Raft {
        &self.0.raft
    }
}

fn fatal(error: &RaftFatal<TypeConfig>) -> Fatal {
    match error {
        RaftFatal::StorageError(error) => Fatal::Store(error.to_string()),
        RaftFatal::Panicked => Fatal::Panicked,
        RaftFatal::Stopped => Fatal::Stopped,
    }
}
