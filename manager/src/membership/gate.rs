//! Carries out what [`plan`] decides: the leader's loop, and what it answers to managers that come and go.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::seam::Clock;
use bulkhead_proto::wire::{
    self, JoinRaftRequest, JoinRaftResponse, LeaveRaftResponse, Node, TakeBackRequest, TakeBackResponse,
};
use bulkhead_proto::{Code, NodeId};
use bulkhead_raft::{Member, MembershipError, Reconciled, Replica};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::silence::Silence;
use super::{LeaveError, RaftMembers, Step, TakeBackError, leave, plan, take_back};
use crate::ca::request_id;
use crate::proposer::{ProposeError, Proposer};
use crate::refusal::{not_proposed, refuse};
use crate::view;

/// Finds what no applied entry announces: a member that answers again.
const RESYNC: Duration = Duration::from_millis(500);
/// Characters of a manager's address, host and port.
const ADDRESS_CHARS: usize = 255 + 6;

/// Who may join and leave Raft, on the manager that leads.
#[derive(Debug, Clone)]
pub struct Gate {
    replica: Replica,
    proposer: Proposer,
    clock: Arc<dyn Clock>,
}

impl Gate {
    /// The gate of this manager's replica.
    pub fn new(replica: Replica, proposer: Proposer, clock: Arc<dyn Clock>) -> Self {
        Gate {
            replica,
            proposer,
            clock,
        }
    }

    /// Makes the calling manager a learner and waits, at most 10 s, until it caught up. It is asked again and again by
    /// the joiner, until its replica says that it votes.
    pub async fn join(&self, caller: &Node, request: JoinRaftRequest) -> Result<JoinRaftResponse, Status> {
        self.leading()?;
        let node = NodeId::try_from(caller.id.as_slice());
        let (Ok(node), true) = (node, request.member_id == caller.member_id) else {
            return Err(refuse(
                Code::Denied,
                tonic::Code::PermissionDenied,
                format!(
                    "the caller is member {}, not {}",
                    caller.member_id, request.member_id
                ),
                "join again with a new ticket and an empty data folder",
            ));
        };
        if request.address.is_empty() || request.address.len() > ADDRESS_CHARS {
            return Err(refuse(
                Code::Invalid,
                tonic::Code::InvalidArgument,
                "the advertised address is missing or too long",
                "join with --advertise HOST:PORT",
            ));
        }
        if caller.envelope_key.is_empty() {
            return Err(refuse(
                Code::NotReady,
                tonic::Code::FailedPrecondition,
                "its envelope key is not registered yet",
                "it is tried again by itself",
            ));
        }
        let member = Member {
            node,
            address: request.address,
        };
        self.replica
            .add_learner(request.member_id, member)
            .await
            .map_err(|error| status(&error))?;
        let voter = self.replica.members().voters.contains(&request.member_id);
        let progress = if voter { "votes" } else { "has the log" };
        Ok(JoinRaftResponse {
            voter,
            progress: progress.to_owned(),
        })
    }

    /// Counts the calling manager as a new member, whose store holds nothing yet: it was lost, and with it what the
    /// former member acknowledged. That this commits shows that a quorum does without the former member.
    pub async fn take_back(
        &self,
        actor: &str,
        caller: &Node,
        request: TakeBackRequest,
    ) -> Result<TakeBackResponse, Status> {
        self.leading()?;
        let id = request_id(&request.request_id)?;
        let state = self.replica.state();
        let alive = self.replica.members().alive;
        let planned = take_back(&state, &caller.id, &request.store, &alive).map_err(|error| {
            let (code, hint) = match error {
                TakeBackError::Unknown | TakeBackError::Leaves => (
                    Code::Denied,
                    "empty its data folder, and join it again with a ticket",
                ),
                TakeBackError::Answers(_) => (
                    Code::NotReady,
                    "it is tried again by itself; stop the other program, where there is one",
                ),
                TakeBackError::Store => (Code::Invalid, "use managers of the same version"),
            };
            refuse(code, tonic::Code::FailedPrecondition, error.to_string(), hint)
        })?;
        if let Some((read, change)) = planned {
            let outcome = self
                .proposer
                .client(actor, id, vec![read], vec![change])
                .await
                .map_err(|error| not_proposed(&error))?;
            if let Some(rejection) = outcome.rejection {
                return Err(refuse(
                    Code::Conflict,
                    tonic::Code::Aborted,
                    rejection.detail,
                    "it is tried again by itself",
                ));
            }
            self.replica.wait_applied(outcome.index).await;
        }
        let state = self.replica.state();
        let record = view::managers(&state).find(|it| it.id == caller.id);
        let (Some(record), Some(cluster)) = (record, view::cluster(&state)) else {
            return Err(crate::authz::stale());
        };
        if record.store != request.store {
            return Err(crate::authz::stale()); // another question of the same manager overtook this one
        }
        Ok(TakeBackResponse {
            member_id: record.member_id,
            epoch: cluster.epoch,
            index: state.index(),
        })
    }

    /// Lets the calling manager go: it is no longer wanted as a voter, and the loop moves Raft on.
    pub async fn leave(&self, caller: &Node) -> Result<LeaveRaftResponse, Status> {
        let term = self.leading()?;
        let members = self.replica.members();
        if caller.member_id == self.replica.member() && members.voters.len() > 1 {
            self.replica.hand_over(None).await;
            return Err(refuse(
                Code::NoQuorum,
                tonic::Code::Unavailable,
                "the leader hands over before it leaves",
                "try again in a moment",
            ));
        }
        let step = leave(&self.replica.state(), caller.member_id, &members.alive).map_err(|error| {
            let hint = match error {
                LeaveError::Unknown(_) => "`bulkhead node ls` shows the managers",
                LeaveError::Last => "delete its data folder to end the cluster",
                LeaveError::Quorum { .. } => "bring the others back first, or add a manager",
            };
            refuse(
                Code::Unsafe,
                tonic::Code::FailedPrecondition,
                error.to_string(),
                hint,
            )
        })?;
        self.carry_out(term, step).await.map_err(|error| {
            refuse(
                Code::Conflict,
                tonic::Code::Aborted,
                error.to_string(),
                "try again in a moment",
            )
        })?;
        Ok(LeaveRaftResponse {})
    }

    /// Moves Raft to what is wanted while this manager leads; ends when stopped.
    pub async fn run(self, stop: CancellationToken) {
        let mut applied = self.replica.applied();
        let mut ticks = interval(RESYNC);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silence = Silence::default();
        loop {
            // Cancel-safe: both only say that it is time to look.
            let ticked = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                changed = applied.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    false
                }
                _ = ticks.tick() => true,
            };
            let Ok(term) = self.leading() else {
                silence = Silence::default();
                continue;
            };
            let members = self.replica.members();
            if ticked {
                silence.count(&members.voters, &members.alive);
            }
            if let Some(step) = silence.plan(&self.replica.state(), &members.alive)
                && let Err(error) = self.carry_out(term, step).await
            {
                tracing::debug!(%error, "the managers' status is looked at again");
            }
            let raft = RaftMembers {
                joint: members.joint,
                all: members.voters.union(&members.learners).copied().collect(),
                voters: members.voters,
            };
            let now = i64::try_from(self.clock.wall_millis()).unwrap_or(i64::MAX);
            if let Some(step) = plan(&self.replica.state(), &raft, now)
                && let Err(error) = self.carry_out(term, step).await
            {
                tracing::debug!(%error, "the managers' membership is looked at again");
            }
        }
    }

    async fn carry_out(&self, term: u64, step: Step) -> Result<(), StepError> {
        match step {
            Step::Want {
                changes,
                preconditions,
            } => {
                let outcome = self.proposer.controller(term, preconditions, changes).await?;
                outcome
                    .rejection
                    .map_or(Ok(()), |rejection| Err(StepError::Rejected(rejection)))
            }
            Step::Reconcile { voters, strangers } => {
                while self.replica.reconcile_voters(&voters).await? == Reconciled::Moved {
                    tracing::info!(?voters, "the voters changed");
                }
                for stranger in strangers {
                    self.replica.remove_learner(stranger).await?;
                }
                Ok(())
            }
        }
    }

    fn leading(&self) -> Result<u64, Status> {
        let leadership = *self.replica.leadership().borrow();
        leadership.leading.ok_or_else(|| {
            refuse(
                Code::NoQuorum,
                tonic::Code::Unavailable,
                "this manager does not lead",
                "ask the manager that leads",
            )
        })
    }
}

#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error(transparent)]
    Propose(#[from] ProposeError),
    #[error("the cluster changed meanwhile: {}", .0.detail)]
    Rejected(wire::Rejection),
    #[error(transparent)]
    Membership(#[from] MembershipError),
}

fn status(error: &MembershipError) -> Status {
    refuse(
        Code::NoQuorum,
        tonic::Code::Unavailable,
        error.to_string(),
        "it is tried again by itself",
    )
}
