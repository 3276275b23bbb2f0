//! The enrolment service, and renewal: thin shells around the plans.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::comeback::{self, Challenges};
use bulkhead_identity::csr::{self, PublicKey};
use bulkhead_identity::seam::{Clock, Entropy as _, SystemEntropy};
use bulkhead_identity::{Certificate, Subject, UnlockKey};
use bulkhead_proto::wire::enrolment_server::{Enrolment, EnrolmentServer};
use bulkhead_proto::wire::{
    Change, EnrolRequest, EnrolResponse, GetRootRequest, GetRootResponse, Node, NodeKey, Outcome,
    Precondition, RejectionCode, RenewRequest, RenewResponse, ReturnRequest, Role as WireRole, Waiting,
};
use bulkhead_proto::{Code, KeyId, NodeId, RequestId, Role, limits};
use bulkhead_raft::Replica;
use bulkhead_raft::state::State;
use tokio::sync::{Semaphore, SemaphorePermit};
use tonic::{Request, Response, Status};

use super::admission::{self, Admission, Ask};
use super::clone::{self, Shown};
use super::limiter::Limiter;
use super::renewal::{self, Renewal};
use super::trust::{self, chain, roots};
use super::{Ca, CaError, Validity, committed, manager_addresses};
use crate::audit::Notes;
use crate::authz::Principal;
use crate::freshness::Fresh;
use crate::proposer::Proposer;
use crate::refusal::{internal, not_proposed, refuse};
use crate::{lock, view};

/// Wrong secrets that one address may try at once, and then one each this often. A secret has 128 bits, so this only
/// keeps the log readable and the processor free.
const WRONG: (u32, Duration) = (10, Duration::from_secs(6));
/// Renewals of one node at once, and then one each this often: each is an entry of the log.
const RENEWALS: (u32, Duration) = (5, Duration::from_secs(60));
/// Certificates under way at once. A thousand nodes may renew in one moment: each then waits for its turn here, rather
/// than all of them in the queue of the log, behind which this manager could not tell in time that it is fresh.
const UNDER_WAY: usize = 64;
/// A decision that another change overtook is made again so often.
const ATTEMPTS: usize = 8;

/// Admits nodes and renews their certificates.
#[derive(Debug, Clone)]
pub struct EnrolmentService(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    replica: Replica,
    proposer: Proposer,
    fresh: Fresh,
    ca: Ca,
    clock: Arc<dyn Clock>,
    challenges: Challenges,
    notes: Notes,
    wrong: Limiter<IpAddr>,
    renewals: Limiter<NodeId>,
    turns: Semaphore,
}

impl EnrolmentService {
    /// Decides by this replica while it is fresh, and commits through the proposer.
    pub fn new(
        replica: Replica,
        proposer: Proposer,
        fresh: Fresh,
        ca: Ca,
        clock: Arc<dyn Clock>,
        challenges: Challenges,
        notes: Notes,
    ) -> Self {
        Self(Arc::new(Inner {
            replica,
            proposer,
            fresh,
            ca,
            clock,
            challenges,
            notes,
            wrong: Limiter::new(WRONG.0, WRONG.1),
            renewals: Limiter::new(RENEWALS.0, RENEWALS.1),
            turns: Semaphore::new(UNDER_WAY),
        }))
    }

    /// The gRPC service.
    pub fn into_server(self) -> EnrolmentServer<Self> {
        EnrolmentServer::new(self)
            .max_decoding_message_size(4 * limits::CSR_BYTES + (64 << 10))
            .max_encoding_message_size(limits::MESSAGE_BYTES)
    }

    async fn admit(&self, request: EnrolRequest, from: Option<IpAddr>) -> Result<EnrolResponse, Status> {
        let request_id = request_id(&request.request_id)?;
        let ask = Ask::from_wire(request, from).map_err(|refusal| self.refused(&refusal, from))?;
        for _ in 0..ATTEMPTS {
            self.fresh()?;
            let state = self.0.replica.state();
            let new = match admission::plan(&state, &ask, self.now()).map_err(|it| self.refused(&it, from))? {
                Admission::Known(node) => {
                    // Fresh as the last thing before a certificate leaves.
                    self.fresh()?;
                    return self.with_unlock_key(&state, hand_out(&state, node, ask.key())?);
                }
                Admission::Waits { waiting, until } => return Ok(to_wait(&state, &waiting, until)),
                Admission::Wait(change, ticket) => {
                    let actor = format!("ticket/{ticket}");
                    let outcome = self
                        .propose(&actor, request_id, Vec::new(), vec![*change])
                        .await?;
                    if outcome.rejection.is_none() {
                        let address = from.map(|it| it.to_string()).unwrap_or_default();
                        let key = ask.key().key_id();
                        tracing::info!(target: "audit", %key, address, actor, index = outcome.index, "node waits for approval");
                    }
                    // That it waits is no secret, and it must hear of it: the use is committed, whatever is fresh now.
                    let state = self.0.replica.state();
                    if let Ok(Admission::Waits { waiting, until }) = admission::plan(&state, &ask, self.now())
                    {
                        return Ok(to_wait(&state, &waiting, until));
                    }
                    continue;
                }
                Admission::New(new) => new,
            };
            let _turn = self.turn().await?;
            let cluster = view::cluster(&state).ok_or_else(|| no_such("there is no cluster here"))?;
            let validity = Validity::of_role(new.role, cluster, self.now());
            let signed = self
                .0
                .ca
                .issue(cluster, new.node, new.role, ask.key(), validity)
                .await
                .map_err(|error| not_signed(&error))?;
            let actor = format!("ticket/{}", new.ticket);
            let (node, role) = (new.node, new.role);
            // No certificate of a root is committed after that root was dropped.
            let conditions = vec![view::unchanged_cluster(cluster)];
            let changes = new.changes(signed, self.now());
            let outcome = self.propose(&actor, request_id, conditions, changes).await?;
            // Whatever became of it: what is handed out, or why not, is read from the committed state.
            if outcome.rejection.is_none() {
                tracing::info!(target: "audit", node = %node, %role, actor, index = outcome.index, "node admitted");
            }
        }
        Err(overtaken())
    }

    async fn turn(&self) -> Result<SemaphorePermit<'_>, Status> {
        // It is never closed.
        self.0
            .turns
            .acquire()
            .await
            .map_err(|closed| internal("the certificate authority ends", &closed))
    }

    fn unlock_key(&self, state: &State) -> Result<Option<UnlockKey>, Status> {
        let Some(cluster) = view::cluster(state) else {
            return Ok(None);
        };
        lock::wanted(cluster, self.0.ca.ring())
            .map_err(|error| internal("cannot open the unlock key", &error))
    }

    /// A manager that is admitted under autolock gets the unlock key, so that it writes no key of its own in the clear. One
    /// that registered its envelope key had it: what a joiner waited with stood on its disk, and is worth nothing any more.
    fn with_unlock_key(&self, state: &State, mut answer: EnrolResponse) -> Result<EnrolResponse, Status> {
        let node = NodeId::try_from(answer.node_id.as_slice()).ok();
        let joins = node
            .and_then(|node| view::node(state, node))
            .is_some_and(|it| it.envelope_key.is_empty());
        if answer.role() == WireRole::Manager
            && joins
            && let Some(key) = self.unlock_key(state)?
        {
            answer.unlock_generation = key.generation();
            answer.unlock_key = key.expose().to_vec();
        }
        Ok(answer)
    }

    async fn propose(
        &self,
        actor: &str,
        request: RequestId,
        conditions: Vec<Precondition>,
        changes: Vec<Change>,
    ) -> Result<Outcome, Status> {
        let proposed = self.0.proposer.client(actor, request, conditions, changes);
        proposed.await.map_err(|error| not_proposed(&error))
    }

    /// A certificate for the caller's own node, for the key in the request.
    pub async fn renew(&self, caller: &Principal, request: RenewRequest) -> Result<RenewResponse, Status> {
        let (subject, presented) = caller.node_and_key()?;
        let asked = Asked {
            key: asked_key(&request.csr)?,
            role: request.role(),
            request: request_id(&request.request_id)?,
        };
        let given = self.reissue(&caller.actor, subject, presented, &asked).await?;
        let state = self.0.replica.state();
        let mut answer = renewed(&state, subject.node, &asked.key)?;
        // Who becomes a manager writes its keys under the unlock key from the start.
        if (subject.role, given) == (Role::Standby, Role::Manager)
            && let Some(key) = self.unlock_key(&state)?
        {
            self.fresh()?;
            answer.unlock_generation = key.generation();
            answer.unlock_key = key.expose().to_vec();
        }
        Ok(answer)
    }

    /// Commits a certificate of this node for a new key, and gives its role. `presented` is a listed key that the node
    /// proved, with a certificate of this subject.
    async fn reissue(
        &self,
        actor: &str,
        subject: Subject,
        presented: KeyId,
        asked: &Asked,
    ) -> Result<Role, Status> {
        let (node, key, request) = (subject.node, &asked.key, asked.request);
        let refused = |refusal: renewal::Refusal| {
            tracing::warn!(target: "audit", node = %node, reason = %refusal, "renewal refused");
            self.0
                .notes
                .refused(actor, None, format_args!("renewal: {refusal}"));
            refuse(
                refusal.code(),
                tonic::Code::PermissionDenied,
                refusal.to_string(),
                refusal.hint(),
            )
        };
        // What a rotation asks of a node is once for each root.
        if !trust::is_due(&self.0.replica.state(), node) {
            let now = self.0.clock.monotonic();
            if !self.0.renewals.allows(node, now) {
                return Err(too_often("this node renewed too often"));
            }
            self.0.renewals.spend(node, now);
        }
        let _turn = self.turn().await?;
        for _ in 0..ATTEMPTS {
            self.fresh()?;
            let state = self.0.replica.state();
            let plan = renewal::plan(&state, node, presented, key, request).map_err(refused)?;
            let (Some(record), Some(cluster)) = (view::node(&state, node), view::cluster(&state)) else {
                return Err(no_such("the node is not there"));
            };
            let role = renewal::role(record, subject.role, asked.role).map_err(refused)?;
            if plan == Renewal::Committed {
                return Ok(role);
            }
            let used = record.keys.iter().find(|it| it.key_id == presented.as_bytes());
            let ends = used.map_or(0, |it| it.not_after);
            let validity = renewal::validity(role, cluster, ends, self.now());
            let signed = self
                .0
                .ca
                .issue(cluster, node, role, key, validity)
                .await
                .map_err(|error| not_signed(&error))?;
            let (preconditions, changes) =
                renewal::with_key(record, cluster, presented, signed, role, self.now());
            let outcome = self
                .0
                .proposer
                .client(actor, request, preconditions, changes)
                .await
                .map_err(|error| not_proposed(&error))?;
            if applied(&outcome)? {
                if record.role() != view::wire_role(role) {
                    tracing::info!(target: "audit", node = %node, %role, "certificate of another role");
                }
                self.fresh()?;
                return Ok(role);
            }
        }
        Err(overtaken())
    }

    /// Takes a node back that proves its last committed key.
    async fn take_back(
        &self,
        request: ReturnRequest,
        from: Option<IpAddr>,
        opened_ms: i64,
    ) -> Result<EnrolResponse, Status> {
        let asked = Asked {
            key: asked_key(&request.csr)?,
            role: WireRole::Unspecified,
            request: request_id(&request.request_id)?,
        };
        let refused = |reason: &str| {
            let address = from.map(|it| it.to_string()).unwrap_or_default();
            tracing::warn!(target: "audit", address, reason, "return refused");
            self.0
                .notes
                .refused("anonymous", from, format_args!("return: {reason}"));
            if let Some(from) = from {
                self.was_wrong(from);
            }
            refuse(
                Code::UnknownCaller,
                tonic::Code::PermissionDenied,
                reason,
                "join it again with a new ticket",
            )
        };
        if !self
            .0
            .challenges
            .holds(&request.challenge, self.0.clock.monotonic())
        {
            return Err(refused("the challenge is not this manager's, or too old"));
        }
        self.fresh()?;
        let state = self.0.replica.state();
        let unlisted = || refused("the cluster does not list this node with this key");
        let node = NodeId::try_from(request.node_id.as_slice()).map_err(|_| unlisted())?;
        let presented = KeyId::try_from(request.key_id.as_slice()).map_err(|_| unlisted())?;
        let record = view::node(&state, node).ok_or_else(unlisted)?;
        if clone::superseded(record, presented).is_some() {
            return Err(match shows(&request, presented) {
                true => {
                    let address = from.map(|it| it.to_string()).unwrap_or_default();
                    tracing::warn!(target: "audit", %node, address, "return with a superseded key refused");
                    self.0.notes.saw_clone(Shown {
                        node,
                        key: presented,
                        address: from,
                        opened_ms,
                    });
                    clone::refused()
                }
                false => refused("the signature is not of the key that it names"),
            });
        }
        let listed = record.keys.iter().find(|it| it.key_id == presented.as_bytes());
        let reprieved = match listed {
            Some(_) => None,
            None => renewal::reprieve(&state, record, &request.certificate, &request.chain, self.now())
                .filter(|it| it.key_id == presented.as_bytes()),
        };
        let held = listed.or(reprieved.as_ref());
        let certificate = held.and_then(|it| Certificate::from_der(&it.certificate).ok());
        let certificate = certificate.ok_or_else(unlisted)?;
        if !comeback::proves(&certificate, &request.challenge, &request.csr, &request.signature) {
            return Err(refused("the signature is not of the node's committed key"));
        }
        if !renewal::may_return(certificate.subject().role, certificate.not_after_ms(), self.now()) {
            return Err(refused("it was away for too long after its certificate ended"));
        }
        let actor = format!("return/{node}");
        if let Some(key) = reprieved {
            self.list_again(&actor, &state, record, key).await?;
        }
        // A manager that was to become a standby comes back as what its key proves; its record says the rest.
        let subject = certificate.subject();
        self.reissue(&actor, subject, presented, &asked).await?;
        tracing::info!(target: "audit", node = %node, "node came back by its committed key");
        hand_out(&self.0.replica.state(), node, &asked.key)
    }

    /// Commits a key that this state is too old to know; then it is one of the node's like any other.
    async fn list_again(
        &self,
        actor: &str,
        state: &State,
        record: &Node,
        key: NodeKey,
    ) -> Result<(), Status> {
        let mut id = [0; 16];
        SystemEntropy
            .fill(&mut id)
            .map_err(|error| internal("has no random bytes", &error))?;
        let presented = KeyId::try_from(key.key_id.as_slice()).map_err(|_| no_such("the key has no id"))?;
        let cluster = view::cluster(state).ok_or_else(|| no_such("there is no cluster here"))?;
        let (preconditions, changes) =
            renewal::with_key(record, cluster, presented, key, Role::Worker, self.now());
        let outcome = self
            .0
            .proposer
            .client(actor, RequestId::from_bytes(id), preconditions, changes)
            .await
            .map_err(|error| not_proposed(&error))?;
        if !applied(&outcome)? {
            return Err(overtaken());
        }
        tracing::warn!(
            target: "audit",
            actor,
            key = %presented,
            index = outcome.index,
            "a key that is newer than this state was listed again"
        );
        Ok(())
    }

    fn refused(&self, refusal: &admission::Refusal, from: Option<IpAddr>) -> Status {
        let address = from.map(|it| it.to_string()).unwrap_or_default();
        tracing::warn!(target: "audit", address, reason = %refusal, "enrolment refused");
        self.0
            .notes
            .refused("anonymous", from, format_args!("join: {}", said(refusal.code())));
        if let (admission::Refusal::Unknown, Some(from)) = (refusal, from) {
            self.was_wrong(from);
        }
        let grpc = match refusal {
            admission::Refusal::Csr(_) | admission::Refusal::Address(_) => tonic::Code::InvalidArgument,
            admission::Refusal::NoCluster | admission::Refusal::Level { .. } => {
                tonic::Code::FailedPrecondition
            }
            _ => tonic::Code::PermissionDenied,
        };
        refuse(refusal.code(), grpc, refusal.to_string(), refusal.hint())
    }

    /// A guess at a ticket or a key; the one that was too many is told once, so that a flood of them is one line.
    fn was_wrong(&self, from: IpAddr) {
        let now = self.0.clock.monotonic();
        self.0.wrong.spend(from, now);
        if !self.0.wrong.allows(from, now) {
            tracing::warn!(target: "audit", address = %from, "too many wrong tickets or proofs: not listened to for a while");
        }
    }

    fn fresh(&self) -> Result<(), Status> {
        match self.0.fresh.is_fresh() && !self.0.fresh.clock_is_off() {
            true => Ok(()),
            false => Err(crate::authz::stale()),
        }
    }

    fn now(&self) -> i64 {
        i64::try_from(self.0.clock.wall_millis()).unwrap_or(i64::MAX)
    }
}

#[tonic::async_trait]
impl Enrolment for EnrolmentService {
    async fn get_root(&self, _: Request<GetRootRequest>) -> Result<Response<GetRootResponse>, Status> {
        let state = self.0.replica.state();
        let cluster = view::cluster(&state).ok_or_else(|| no_such("there is no cluster here yet"))?;
        let challenge = self.0.challenges.draw(&SystemEntropy, self.0.clock.monotonic());
        Ok(Response::new(GetRootResponse {
            roots: roots(cluster),
            cluster_id: cluster.id.clone(),
            now: self.now(),
            challenge: challenge.map_err(|error| internal("has no random bytes", &error))?,
            former: cluster.former.iter().map(|it| it.root.clone()).collect(),
        }))
    }

    async fn enrol(&self, request: Request<EnrolRequest>) -> Result<Response<EnrolResponse>, Status> {
        let from = Principal::of(&request)?.address.map(|address| address.ip());
        if from.is_some_and(|from| !self.0.wrong.allows(from, self.0.clock.monotonic())) {
            self.0
                .notes
                .refused("anonymous", from, "join: too many wrong tickets");
            return Err(too_often("too many wrong tickets came from this address"));
        }
        let answer = self.admit(request.into_inner(), from).await?;
        Ok(Response::new(answer))
    }

    async fn r#return(&self, request: Request<ReturnRequest>) -> Result<Response<EnrolResponse>, Status> {
        let caller = Principal::of(&request)?;
        let from = caller.address.map(|address| address.ip());
        if from.is_some_and(|from| !self.0.wrong.allows(from, self.0.clock.monotonic())) {
            self.0
                .notes
                .refused("anonymous", from, "return: too many wrong proofs");
            return Err(too_often("too many wrong proofs came from this address"));
        }
        let answer = self
            .take_back(request.into_inner(), from, caller.opened_ms)
            .await?;
        Ok(Response::new(answer))
    }
}

/// Whether who asks to come back has the key that it names, whatever certificate it has for it: a superseded one need not be
/// of a root that is still known.
fn shows(request: &ReturnRequest, presented: KeyId) -> bool {
    Certificate::from_der(&request.certificate).is_ok_and(|certificate| {
        certificate.key_id() == presented
            && comeback::proves(&certificate, &request.challenge, &request.csr, &request.signature)
    })
}

/// A certificate that a node asks for.
struct Asked {
    key: PublicKey,
    /// Unspecified: the node's own.
    role: WireRole,
    request: RequestId,
}

/// A code as the audit log says it: the refusal's own words may be the asker's.
fn said(code: Code) -> String {
    format!("{} {}", code.as_str(), code.title())
}

/// The key that a certificate request gives.
fn asked_key(csr: &[u8]) -> Result<PublicKey, Status> {
    csr::public_key(csr).map_err(|error| {
        let refusal = admission::Refusal::Csr(error);
        refuse(
            refusal.code(),
            tonic::Code::InvalidArgument,
            refusal.to_string(),
            refusal.hint(),
        )
    })
}

/// What a joiner hears until an operator has judged it: nothing that is signed.
fn to_wait(state: &State, waiting: &Waiting, until: i64) -> EnrolResponse {
    EnrolResponse {
        node_id: waiting.node_id.clone(),
        name: waiting.name.clone(),
        index: state.index(),
        waits_until: until,
        ..Default::default()
    }
}

/// What a joiner gets, all of it from the committed state.
fn hand_out(state: &State, node: NodeId, key: &PublicKey) -> Result<EnrolResponse, Status> {
    let gone = || no_such("the node was removed meanwhile");
    let (node, cluster) = (
        view::node(state, node).ok_or_else(gone)?,
        view::cluster(state).ok_or_else(gone)?,
    );
    Ok(EnrolResponse {
        certificate: committed(node, key).ok_or_else(gone)?.to_vec(),
        roots: roots(cluster),
        chain: chain(cluster),
        cluster_id: cluster.id.clone(),
        node_id: node.id.clone(),
        role: node.role,
        member_id: node.member_id,
        managers: manager_addresses(state),
        epoch: cluster.epoch,
        index: state.index(),
        name: node.name.clone(),
        ..Default::default()
    })
}

fn renewed(state: &State, node: NodeId, key: &PublicKey) -> Result<RenewResponse, Status> {
    let gone = || no_such("the node was removed meanwhile");
    let (node, cluster) = (
        view::node(state, node).ok_or_else(gone)?,
        view::cluster(state).ok_or_else(gone)?,
    );
    Ok(RenewResponse {
        certificate: committed(node, key).ok_or_else(gone)?.to_vec(),
        roots: roots(cluster),
        chain: chain(cluster),
        index: state.index(),
        member_id: node.member_id,
        epoch: cluster.epoch,
        ..Default::default()
    })
}

/// Whether it was done; a plan that another change overtook is made again.
fn applied(outcome: &Outcome) -> Result<bool, Status> {
    match &outcome.rejection {
        None => Ok(true),
        Some(rejection) if rejection.code() == RejectionCode::Stale => Ok(false),
        Some(rejection) => Err(refuse(
            Code::Conflict,
            tonic::Code::FailedPrecondition,
            &rejection.detail,
            "try again",
        )),
    }
}

/// The request id of a change.
///
/// # Errors
/// Where there is none, since then a retry could be done twice.
pub(crate) fn request_id(bytes: &[u8]) -> Result<RequestId, Status> {
    RequestId::try_from(bytes).map_err(|error| {
        refuse(
            Code::Invalid,
            tonic::Code::InvalidArgument,
            error.to_string(),
            "send 16 random bytes, the same on each retry",
        )
    })
}

/// What a signer outside says is for operators: who asks here may be anybody with a ticket.
fn not_signed(error: &CaError) -> Status {
    match error {
        CaError::Signer { .. } => refuse(
            Code::SignerFails,
            tonic::Code::Unavailable,
            "the cluster's external signer does not sign now",
            "try again; `bulkhead cluster ca status` says why",
        ),
        other => internal("cannot sign certificates now", other),
    }
}

fn overtaken() -> Status {
    refuse(
        Code::Busy,
        tonic::Code::Aborted,
        "other changes came before this one each time",
        "try again",
    )
}

fn too_often(what: &str) -> Status {
    refuse(
        Code::Busy,
        tonic::Code::ResourceExhausted,
        what,
        "wait a minute and try again",
    )
}

fn no_such(what: &str) -> Status {
    refuse(
        Code::NotMember,
        tonic::Code::FailedPrecondition,
        what,
        "ask another manager",
    )
}
