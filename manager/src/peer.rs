//! What managers do for each other beside consensus.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::seam::Clock;
use bulkhead_proto::wire::peer_server::{Peer, PeerServer};
use bulkhead_proto::wire::{
    Availability, BlobChunk, Change, FetchBlobRequest, ForwardRequest, ForwardResponse, HasBlobRequest,
    HasBlobResponse, JoinRaftRequest, JoinRaftResponse, Kind, LeaveRaftRequest, LeaveRaftResponse,
    LivenessReport, LivenessReportResponse, LogUp, Node, OfferBlobRequest, OfferBlobResponse, Precondition,
    ReadIndexRequest, ReadIndexResponse, RegisterEnvelopeKeyRequest, RegisterEnvelopeKeyResponse,
    RejectionCode, RelayLogsRequest, TakeBackRequest, TakeBackResponse, Transaction, VersionIs,
    change::Change as Step, object::Object as Any, precondition::Precondition as Condition,
};
use bulkhead_proto::{Code, NodeId, TaskId, limits};
use bulkhead_raft::state::{Key, State};
use bulkhead_raft::{ProposeError as LogError, Replica};
use futures::stream::BoxStream;
use futures::{Stream, StreamExt as _};
use prost::Message as _;
use tonic::{Request, Response, Status, Streaming};

use crate::authz::Principal;
use crate::ca::renewal::unchanged;
use crate::ca::request_id;
use crate::dispatcher::Sessions;
use crate::freshness::{Fresh, Judgement, is_off};
use crate::key_ring::KeyRing;
use crate::leader::Signs;
use crate::membership::Gate;
use crate::proposer::{ProposeError, Proposer};
use crate::refusal::{internal, not_proposed, refuse};
use crate::registry::Registry;
use crate::view;

/// A change that others overtook is made again so often.
const ATTEMPTS: usize = 8;

/// What the service is made of.
#[derive(Debug)]
pub struct Parts {
    /// The replica that proposes and answers.
    pub replica: Replica,
    /// Changes to the key ring.
    pub proposer: Proposer,
    /// Makes envelopes.
    pub ring: KeyRing,
    /// Blobs.
    pub registry: Registry,
    /// Logs of workers whose stream ends here.
    pub sessions: Sessions,
    /// What followers report.
    pub signs: Signs,
    /// Who joins and leaves Raft.
    pub gate: Gate,
    /// Knows the managers' clocks.
    pub fresh: Fresh,
    /// Time.
    pub clock: Arc<dyn Clock>,
}

/// The gRPC service.
#[derive(Debug, Clone)]
pub struct PeerService(Arc<Parts>);

impl PeerService {
    /// Serves the other managers with these parts.
    pub fn new(parts: Parts) -> Self {
        Self(Arc::new(parts))
    }

    /// The gRPC service.
    pub fn into_server(self) -> PeerServer<Self> {
        PeerServer::new(self)
            .max_decoding_message_size(limits::MESSAGE_BYTES)
            .max_encoding_message_size(limits::MESSAGE_BYTES)
    }

    /// The calling manager's record.
    fn caller<T>(&self, request: &Request<T>) -> Result<Node, Status> {
        let (subject, _) = Principal::of(request)?.node_and_key()?;
        let state = self.0.replica.state();
        view::node(&state, subject.node)
            .cloned()
            .ok_or_else(crate::authz::stale)
    }
}

#[tonic::async_trait]
impl Peer for PeerService {
    async fn forward(&self, request: Request<ForwardRequest>) -> Result<Response<ForwardResponse>, Status> {
        let caller = Principal::of(&request)?;
        let bytes = request.into_inner().transaction;
        let at = check_forwarded(&bytes).map_err(|reason| {
            tracing::warn!(target: "audit", actor = caller.actor, reason, "forwarded transaction refused");
            refuse(
                Code::Denied,
                tonic::Code::PermissionDenied,
                reason,
                "use managers of the same version",
            )
        })?;
        // Apply judges by this time what is expired: one of a wrong clock never reaches it.
        let now = i64::try_from(self.0.clock.wall_millis()).unwrap_or(i64::MAX);
        let clocks = self.0.fresh.clocks();
        let ahead_ms = clocks
            .ahead_of_median_ms(at.saturating_sub(now), self.0.clock.monotonic())
            .ok_or_else(clocks_unknown)?;
        if is_off(ahead_ms) {
            tracing::warn!(target: "audit", actor = caller.actor, ahead_ms, "forwarded transaction refused: its time is wrong");
            return Err(refuse(
                Code::ClockSkew,
                tonic::Code::FailedPrecondition,
                format!("the time of this transaction is {ahead_ms} ms ahead of the managers' clocks"),
                "set the clock of the manager that sends it",
            ));
        }
        // The bytes go into the log as they came: its principal is the one that the first manager authorised.
        let answer = match self.0.proposer.forwarded(bytes).await {
            Ok(outcome) => ForwardResponse {
                outcome: Some(outcome),
                leader: self.0.replica.member(),
            },
            Err(LogError::NotLeader { leader }) => ForwardResponse {
                outcome: None,
                leader: leader.unwrap_or(0),
            },
            Err(LogError::Busy) => return Err(not_proposed(&ProposeError::Busy)),
            Err(LogError::Full) => return Err(not_proposed(&ProposeError::Full)),
            Err(LogError::TooLarge { bytes }) => return Err(not_proposed(&ProposeError::TooLarge { bytes })),
            Err(LogError::Unknown | LogError::Stopped) => return Err(not_proposed(&ProposeError::Unknown)),
        };
        Ok(Response::new(answer))
    }

    async fn read_index(
        &self,
        request: Request<ReadIndexRequest>,
    ) -> Result<Response<ReadIndexResponse>, Status> {
        let (subject, _) = Principal::of(&request)?.node_and_key()?;
        let term = self.0.replica.leadership().borrow().term;
        let index = self.0.replica.read_index().await.map_err(|error| {
            refuse(
                Code::NoQuorum,
                tonic::Code::Unavailable,
                error.to_string(),
                "ask the manager that leads",
            )
        })?;
        let now = i64::try_from(self.0.clock.wall_millis()).unwrap_or(i64::MAX);
        let ahead = request.into_inner().now.saturating_sub(now);
        let all = managers(&self.0.replica.state());
        let Judgement {
            asker_ahead_ms,
            hand_over,
        } = self
            .0
            .fresh
            .clocks()
            .manager(subject.node, ahead, all, self.0.clock.monotonic());
        if let Some(median) = hand_over {
            tracing::error!(
                ahead_ms = median,
                "the others' clocks are off this manager's: it hands over; set its clock"
            );
            self.0.replica.hand_over(None).await;
        }
        let ahead_ms = asker_ahead_ms.ok_or_else(clocks_unknown)?;
        Ok(Response::new(ReadIndexResponse {
            index,
            now,
            term,
            ahead_ms,
        }))
    }

    async fn report_liveness(
        &self,
        request: Request<LivenessReport>,
    ) -> Result<Response<LivenessReportResponse>, Status> {
        // Whose report it is says the certificate, not the message.
        let member = self.caller(&request)?.member_id;
        let ages = request.into_inner().workers.into_iter().filter_map(|worker| {
            let node = NodeId::try_from(worker.node_id.as_slice()).ok()?;
            Some((node, Duration::from_millis(worker.age_ms)))
        });
        self.0.signs.reported(member, ages, self.0.clock.monotonic());
        Ok(Response::new(LivenessReportResponse {}))
    }

    async fn register_envelope_key(
        &self,
        request: Request<RegisterEnvelopeKeyRequest>,
    ) -> Result<Response<RegisterEnvelopeKeyResponse>, Status> {
        let caller = Principal::of(&request)?;
        let (subject, _) = caller.node_and_key()?;
        let request = request.into_inner();
        let id = request_id(&request.request_id)?;
        for _ in 0..ATTEMPTS {
            let state = self.0.replica.state();
            let change = match enveloped(&state, &self.0.ring, subject.node, &request.public_key)? {
                Registration::Done => {
                    return Ok(Response::new(RegisterEnvelopeKeyResponse {
                        index: state.index(),
                    }));
                }
                Registration::Commit(preconditions, changes) => (preconditions, changes),
            };
            let outcome = self
                .0
                .proposer
                .client(&caller.actor, id, change.0, change.1)
                .await
                .map_err(|error| not_proposed(&error))?;
            match outcome.rejection {
                None => {
                    tracing::info!(target: "audit", node = %subject.node, "key ring enveloped to a manager");
                    return Ok(Response::new(RegisterEnvelopeKeyResponse {
                        index: outcome.index,
                    }));
                }
                Some(rejection) if rejection.code() == RejectionCode::Stale => {}
                Some(rejection) => {
                    return Err(refuse(
                        Code::Conflict,
                        tonic::Code::FailedPrecondition,
                        rejection.detail,
                        "join again with a new ticket",
                    ));
                }
            }
        }
        Err(not_proposed(&ProposeError::Busy))
    }

    async fn join_raft(
        &self,
        request: Request<JoinRaftRequest>,
    ) -> Result<Response<JoinRaftResponse>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(
            self.0.gate.join(&caller, request.into_inner()).await?,
        ))
    }

    async fn leave_raft(
        &self,
        request: Request<LeaveRaftRequest>,
    ) -> Result<Response<LeaveRaftResponse>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(self.0.gate.leave(&caller).await?))
    }

    async fn take_back(
        &self,
        request: Request<TakeBackRequest>,
    ) -> Result<Response<TakeBackResponse>, Status> {
        let caller = self.caller(&request)?;
        let actor = Principal::of(&request)?.actor.clone();
        let answer = self
            .0
            .gate
            .take_back(&actor, &caller, request.into_inner())
            .await?;
        tracing::warn!(
            target: "audit",
            actor,
            raft.member = answer.member_id,
            "a manager whose store is lost is a new member now"
        );
        Ok(Response::new(answer))
    }

    async fn has_blob(&self, request: Request<HasBlobRequest>) -> Result<Response<HasBlobResponse>, Status> {
        Ok(Response::new(self.0.registry.has(request.into_inner()).await?))
    }

    type PullBlobStream = BoxStream<'static, Result<BlobChunk, Status>>;

    async fn pull_blob(
        &self,
        request: Request<FetchBlobRequest>,
    ) -> Result<Response<Self::PullBlobStream>, Status> {
        Ok(Response::new(self.0.registry.pull(request.into_inner()).await?))
    }

    async fn offer_blob(
        &self,
        request: Request<Streaming<OfferBlobRequest>>,
    ) -> Result<Response<OfferBlobResponse>, Status> {
        Ok(Response::new(self.0.registry.offer(request.into_inner()).await?))
    }

    type RelayLogsStream = Pin<Box<dyn Stream<Item = Result<LogUp, Status>> + Send>>;

    async fn relay_logs(
        &self,
        request: Request<RelayLogsRequest>,
    ) -> Result<Response<Self::RelayLogsStream>, Status> {
        let none = || {
            refuse(
                Code::NotFound,
                tonic::Code::NotFound,
                "the worker of this task has no session with this manager",
                "ask the other managers",
            )
        };
        let request = request.into_inner().request.ok_or_else(none)?;
        let task = TaskId::try_from(request.task_id.as_slice()).map_err(|_| none())?;
        let state = self.0.replica.state();
        let node = view::task(&state, task).and_then(|task| NodeId::try_from(task.node_id.as_slice()).ok());
        let parts = self
            .0
            .sessions
            .logs(node.ok_or_else(none)?, request)
            .ok_or_else(none)?;
        Ok(Response::new(Box::pin(parts.map(Ok))))
    }
}

/// Every manager whose clock counts.
fn managers(state: &State) -> BTreeSet<NodeId> {
    view::managers(state)
        .filter(|node| node.quarantined_at == 0)
        .filter_map(|node| NodeId::try_from(node.id.as_slice()).ok())
        .collect()
}

/// A leader that was just elected cannot tell yet whose clock is right.
fn clocks_unknown() -> Status {
    refuse(
        Code::NoQuorum,
        tonic::Code::Unavailable,
        "the clocks of too few managers are known yet to say whether this one is right",
        "it is tried again by itself",
    )
}

/// Only what a client asked for is forwarded: a controller's plan belongs to its own term and leader. Gives its time.
fn check_forwarded(bytes: &[u8]) -> Result<i64, &'static str> {
    if bytes.len() > limits::TRANSACTION_BYTES {
        return Err("the transaction is over its limit");
    }
    let transaction = Transaction::decode(bytes).map_err(|_| "this is no transaction")?;
    match transaction {
        Transaction { term: 1.., .. } => Err("a controller's transaction is never forwarded"),
        Transaction { level, .. } if level == 0 || level > bulkhead_raft::state::LEVEL => {
            Err("the transaction's command level is unknown here")
        }
        Transaction { actor, .. } if actor.is_empty() => Err("the transaction names no principal"),
        Transaction { request_id, .. } if request_id.len() != 16 => Err("the transaction has no request id"),
        Transaction { at, .. } => Ok(at),
    }
}

/// What is to be done about a manager's envelope key.
enum Registration {
    Done,
    Commit(Vec<Precondition>, Vec<Change>),
}

/// The manager's key in its record, and an envelope of every live epoch for it: one transaction.
fn enveloped(state: &State, ring: &KeyRing, node: NodeId, public: &[u8]) -> Result<Registration, Status> {
    let (Some(record), Some(cluster)) = (view::node(state, node), view::cluster(state)) else {
        return Err(crate::authz::stale());
    };
    if record.availability() == Availability::Drain {
        return Err(refuse(
            Code::Denied,
            tonic::Code::PermissionDenied,
            "this manager is leaving the quorum: nothing is enveloped to it any more",
            "wait until it has left",
        ));
    }
    let has =
        |it: &bulkhead_proto::wire::KeyRingEpoch| it.envelopes.iter().any(|it| it.node_id == node.as_bytes());
    match record.envelope_key.as_slice() {
        [] => {}
        known if known != public => {
            return Err(refuse(
                Code::Denied,
                tonic::Code::PermissionDenied,
                "this manager registered another envelope key before",
                "remove it and join it again with an empty data folder",
            ));
        }
        _ if cluster.key_ring.iter().all(has) => return Ok(Registration::Done),
        _ => {}
    }
    let mut new_cluster = cluster.clone();
    new_cluster.key_ring = ring
        .enveloped_for(cluster, node, public)
        .map_err(|error| internal("cannot open the key ring", &error))?;
    let new_node = Node {
        envelope_key: public.to_vec(),
        ..record.clone()
    };
    let id = cluster.id.as_slice().try_into().unwrap_or_default();
    let same_cluster = Precondition {
        precondition: Some(Condition::VersionIs(VersionIs {
            object: Some(Key::new(Kind::Cluster, id).to_wire()),
            version: cluster.meta.as_ref().map_or(0, |meta| meta.version),
        })),
    };
    let changes = [Any::Cluster(new_cluster), Any::Node(new_node)].map(|any| Change {
        change: Some(Step::Replace(view::object(any))),
    });
    Ok(Registration::Commit(
        vec![unchanged(record), same_cluster],
        changes.into(),
    ))
}
