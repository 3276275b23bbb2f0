//! The dispatcher: every fresh manager serves workers from its own replica.

pub mod assignments;
mod attend;
pub mod reports;
mod session;
mod sessions;
#[cfg(test)]
mod tests;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::seam::{Clock, Entropy};
use bulkhead_proto::wire::dispatcher_server::{Dispatcher, DispatcherServer};
use bulkhead_proto::wire::{
    AttendRequest, AttendResponse, BlobChunk, FetchBlobRequest, LivenessReport, LogUp, PushLogsResponse,
    RenewRequest, RenewResponse, SessionDown, SessionUp, WithdrawRequest, WithdrawResponse, WorkerAge,
};
use bulkhead_proto::{Code, limits};
use bulkhead_raft::Replica;
use futures::Stream;
use futures::stream::BoxStream;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::audit::Notes;
use crate::authz::Principal;
use crate::ca::renewal::unchanged;
use crate::ca::{EnrolmentService, request_id};
use crate::freshness::Fresh;
use crate::key_ring::KeyRing;
use crate::leader::Signs;
use crate::orchestrator::removal;
use crate::peers::Peers;
use crate::proposer::Proposer;
use crate::refusal::{not_proposed, refuse};
use crate::registry::{self, Registry};
use crate::view;

pub use reports::{Committer, Reports, reports};
pub use session::carry;
pub use sessions::{LogParts, Sessions};

/// Messages that wait for a worker's stream.
const DOWN: usize = 16;
/// The first part of a log names its stream within this time.
const FIRST_PART: Duration = Duration::from_secs(5);
/// A withdrawal that other changes of the node overtook is planned anew this often.
const WITHDRAWALS: usize = 5;
/// How often a follower tells the leader of the workers that it hears. A worker's time is five of it.
const REPORT: Duration = Duration::from_millis(250);

/// What sessions are made of.
#[derive(Debug)]
pub struct Desk {
    /// The state.
    pub replica: Replica,
    /// Changes of node records.
    pub proposer: Proposer,
    /// Asked before anything leaves.
    pub fresh: Fresh,
    /// Opens secrets.
    pub ring: KeyRing,
    /// Who is connected.
    pub sessions: Sessions,
    /// Signs of life.
    pub signs: Signs,
    /// Reports of tasks; its [`Committer`] must run.
    pub reports: Reports,
    /// Where refusals are noted.
    pub notes: Notes,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Request ids.
    pub entropy: Arc<dyn Entropy>,
}

/// What the dispatcher is made of.
#[derive(Debug)]
pub struct Parts {
    /// Where workers have their sessions.
    pub desk: Arc<Desk>,
    /// Blobs of images.
    pub registry: Registry,
    /// Renews certificates.
    pub enrolment: EnrolmentService,
}

/// The gRPC service.
#[derive(Debug, Clone)]
pub struct DispatcherService(Arc<Parts>);

impl DispatcherService {
    /// Serves workers with these parts.
    pub fn new(parts: Parts) -> Self {
        Self(Arc::new(parts))
    }

    /// The gRPC service.
    pub fn into_server(self) -> DispatcherServer<Self> {
        DispatcherServer::new(self)
            .max_decoding_message_size(limits::MESSAGE_BYTES)
            .max_encoding_message_size(limits::MESSAGE_BYTES)
    }
}

#[tonic::async_trait]
impl Dispatcher for DispatcherService {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<SessionDown, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<SessionUp>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let caller = Principal::of(&request)?;
        let (subject, _) = caller.node_and_key()?;
        let (out, down) = mpsc::channel(DOWN);
        // It ends with the stream: when the worker leaves, the layer ends it, or the server stops.
        tokio::spawn(session::carry(
            self.0.desk.clone(),
            caller,
            subject.node,
            request.into_inner(),
            out,
        ));
        Ok(Response::new(Box::pin(ReceiverStream::new(down))))
    }

    type FetchBlobStream = BoxStream<'static, Result<BlobChunk, Status>>;

    async fn fetch_blob(
        &self,
        request: Request<FetchBlobRequest>,
    ) -> Result<Response<Self::FetchBlobStream>, Status> {
        let caller = Principal::of(&request)?;
        let (subject, _) = caller.node_and_key()?;
        let request = request.into_inner();
        let digest = registry::digest(&request.digest)?;
        if !assignments::needs_blob(&self.0.desk.replica.state(), subject.node, &digest) {
            tracing::warn!(target: "audit", node = %subject.node, %digest, "blob refused");
            let from = caller.address.map(|it| it.ip());
            self.0
                .desk
                .notes
                .refused(&caller.actor, from, "blob: no task of this node needs it");
            return Err(refuse(
                Code::Denied,
                tonic::Code::PermissionDenied,
                "no task of this node needs this blob",
                "a worker fetches what its assignments name",
            ));
        }
        Ok(Response::new(self.0.registry.fetch(request).await?))
    }

    async fn attend(&self, request: Request<AttendRequest>) -> Result<Response<AttendResponse>, Status> {
        let caller = Principal::of(&request)?;
        let answer = attend::attend(&self.0.desk, &caller, request.into_inner())?;
        Ok(Response::new(answer))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        let caller = Principal::of(&request)?;
        Ok(Response::new(
            self.0.enrolment.renew(&caller, request.into_inner()).await?,
        ))
    }

    async fn withdraw(
        &self,
        request: Request<WithdrawRequest>,
    ) -> Result<Response<WithdrawResponse>, Status> {
        let caller = Principal::of(&request)?;
        let (subject, _) = caller.node_and_key()?;
        let id = request_id(&request.get_ref().request_id)?;
        for _ in 0..WITHDRAWALS {
            let state = self.0.desk.replica.state();
            let Some(node) = view::node(&state, subject.node) else {
                return Ok(Response::new(WithdrawResponse { index: state.index() }));
            };
            // A manager leaves by the leader's arithmetic, whatever other key its record lists.
            if node.role() != view::wire_role(subject.role) {
                tracing::warn!(target: "audit", node = %subject.node, "withdrawal refused");
                let from = caller.address.map(|it| it.ip());
                self.0.desk.notes.refused(
                    &caller.actor,
                    from,
                    "withdraw: the key is not of this node's role",
                );
                return Err(refuse(
                    Code::Denied,
                    tonic::Code::PermissionDenied,
                    "this node has another role than the certificate that was shown",
                    "a manager leaves with `bulkhead cluster leave` on its own machine",
                ));
            }
            let now = i64::try_from(self.0.desk.clock.wall_millis()).unwrap_or(i64::MAX);
            let changes = removal::whole(&state, subject.node, node, now);
            let outcome = self
                .0
                .desk
                .proposer
                .client(&caller.actor, id, vec![unchanged(node)], changes)
                .await
                .map_err(|error| not_proposed(&error))?;
            // Overtaken by a report or a placement, most likely: then it is planned again.
            if outcome.rejection.is_none() {
                tracing::info!(target: "audit", node = %subject.node, "this worker left the cluster");
                return Ok(Response::new(WithdrawResponse { index: outcome.index }));
            }
        }
        Err(refuse(
            Code::Conflict,
            tonic::Code::Aborted,
            "the node changed again and again meanwhile",
            "try again",
        ))
    }

    async fn push_logs(
        &self,
        request: Request<Streaming<LogUp>>,
    ) -> Result<Response<PushLogsResponse>, Status> {
        let (subject, _) = Principal::of(&request)?.node_and_key()?;
        let mut parts = request.into_inner();
        let first = timeout(FIRST_PART, parts.message())
            .await
            .map_err(|_| unasked())??;
        let first = first.ok_or_else(unasked)?;
        let stream = first.stream;
        // Only what this manager asked of this very worker.
        let reader = self
            .0
            .desk
            .sessions
            .answered(subject.node, stream)
            .ok_or_else(unasked)?;
        let mut next = Some(first);
        while let Some(part) = next {
            if part.stream != stream || reader.send(part).await.is_err() {
                break; // nobody reads any more
            }
            next = tokio::select! {
                biased;
                () = reader.closed() => None,
                part = parts.message() => part?,
            };
        }
        self.0.desk.sessions.ended(stream);
        Ok(Response::new(PushLogsResponse {}))
    }
}

fn unasked() -> Status {
    refuse(
        Code::Denied,
        tonic::Code::PermissionDenied,
        "this manager asked this worker for no such log",
        "a worker opens a log stream when its session asks for one",
    )
}

/// Tells the leader how long ago this manager heard of its workers. The leader itself needs no report.
pub async fn report_liveness(
    replica: Replica,
    peers: Peers,
    signs: Signs,
    clock: Arc<dyn Clock>,
    stop: CancellationToken,
) {
    let mut ticks = interval(REPORT);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let leader = replica.leadership().borrow().leader;
        let Some(leader) = leader.filter(|it| *it != replica.member()) else {
            continue;
        };
        let Some(mut client) = peers.client(leader) else {
            continue;
        };
        let workers = signs
            .ages(clock.monotonic())
            .into_iter()
            .map(|(node, age)| WorkerAge {
                node_id: node.to_wire(),
                age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
                ..Default::default()
            });
        let report = LivenessReport {
            workers: workers.collect(),
            member: replica.member(),
        };
        // What does not arrive is said again; the leader gives a lost reporter's workers more time.
        let _ = timeout(REPORT, client.report_liveness(report)).await;
    }
}
