//! What operators ask of the cluster: each method reads one view of the state, decides with a pure function of it, and
//! commits what changes.
//!
//! The authorisation layer ran before: who calls is in the request's [`Principal`], and the replica was fresh.

mod audit;
mod backup;
mod change;
mod check;
mod cluster;
mod exposure;
mod health;
mod images;
mod logs;
mod nodes;
mod object;
mod operators;
mod secrets;
mod services;
mod status;
mod tasks;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod tickets;
mod waiting;
mod watch;

use std::sync::Arc;

use bulkhead_identity::seam::{Clock, Entropy};
use bulkhead_identity::ticket::{TICKET_SECRET_BYTES, Ticket as TicketText, TicketSecret};
use bulkhead_proto::wire::control_server::{Control as Service, ControlServer};
use bulkhead_proto::wire::{self, ChangeResponse, Cluster, Kind, RemoveRequest, WatchResponse};
use bulkhead_proto::{Code, RequestId, TaskId, limits};
use bulkhead_raft::Replica;
use bulkhead_raft::state::State;
use futures::FutureExt as _;
use futures::future::{BoxFuture, ready};
use futures::stream::BoxStream;
use tonic::{Request, Response, Status, Streaming};
use zeroize::Zeroizing;

use self::change::{ATTEMPTS, Decision, Plan, is_stale, overtaken, rejected, request_id};
use self::cluster::Asked;
use self::object::{IMAGES, Kept, NODES, OPERATORS, SECRETS, SERVICES, TICKETS, get};
use crate::authz::Principal;
use crate::ca::rotation::Next;
use crate::ca::{self, Ca, CaError};
use crate::dispatcher::assignments::may_still_run;
use crate::freshness::Fresh;
use crate::key_ring::{self, KeyRing};
use crate::lock::{self, LockError};
use crate::proposer::Proposer;
use crate::refusal::{internal, not_proposed, refuse};
use crate::registry::{self, Registry};
use crate::view;

pub use health::health;
pub use logs::LogSource;

/// What the control service works with.
#[derive(Clone)]
pub struct Parts {
    /// Read from.
    pub replica: Replica,
    /// Written through.
    pub proposer: Proposer,
    /// Images' blobs.
    pub registry: Registry,
    /// Seals secrets.
    pub key_ring: KeyRing,
    /// Signs certificates.
    pub ca: Ca,
    /// Logs of workers whose streams end here.
    pub logs: Arc<dyn LogSource>,
    /// The other managers, for the other workers' logs.
    pub peers: Arc<dyn registry::Peers>,
    /// Whether the replica may decide.
    pub fresh: Fresh,
    /// Wall time for expiry.
    pub clock: Arc<dyn Clock>,
    /// Tickets' secrets.
    pub entropy: Arc<dyn Entropy>,
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts")
            .field("replica", &self.replica)
            .finish_non_exhaustive()
    }
}

/// The control service. Clones are handles to the same one.
#[derive(Debug, Clone)]
pub struct Control(Arc<Parts>);

impl Control {
    /// The service over these parts.
    pub fn new(parts: Parts) -> Self {
        Self(Arc::new(parts))
    }

    /// The gRPC service.
    pub fn into_server(self) -> ControlServer<Self> {
        ControlServer::new(self)
            .max_decoding_message_size(limits::MESSAGE_BYTES)
            .max_encoding_message_size(limits::MESSAGE_BYTES)
    }

    fn state(&self) -> State {
        self.0.replica.state()
    }

    fn now(&self) -> i64 {
        i64::try_from(self.0.clock.wall_millis()).unwrap_or(i64::MAX)
    }

    /// Commits what `decide` makes of the newest state, deciding again where others were faster.
    async fn change<T: Kept>(
        &self,
        actor: &str,
        request: &[u8],
        decide: impl Fn(&State) -> Result<Decision, Status>,
    ) -> Result<ChangeResponse, Status> {
        self.change_signed::<T>(actor, request, |state| ready(decide(&state)).boxed())
            .await
    }

    /// The same where deciding may have to wait for a signer outside of the cluster.
    async fn change_signed<'a, T: Kept>(
        &self,
        actor: &str,
        request: &[u8],
        decide: impl Fn(State) -> BoxFuture<'a, Result<Decision, Status>>,
    ) -> Result<ChangeResponse, Status> {
        let request = request_id(request)?;
        for _ in 0..ATTEMPTS {
            let state = self.state();
            let plan = match decide(state.clone()).await? {
                Decision::Done { id, version } => {
                    return Ok(ChangeResponse {
                        index: state.index(),
                        id,
                        version,
                    });
                }
                Decision::Commit(plan) => plan,
            };
            let id = plan.id.clone();
            if let Some(index) = self.commit(actor, request, T::KIND, plan).await? {
                let version = get::<T>(&self.state(), &id).map_or(index, Kept::version);
                return Ok(ChangeResponse { index, id, version });
            }
        }
        Err(overtaken("the object"))
    }

    /// The index of the commit; nothing where the plan was overtaken.
    async fn commit(
        &self,
        actor: &str,
        request: RequestId,
        kind: Kind,
        plan: Plan,
    ) -> Result<Option<u64>, Status> {
        let object = object::id_text(&plan.id);
        let outcome = self
            .0
            .proposer
            .client(actor, request, plan.preconditions, plan.changes)
            .await;
        let outcome = outcome.map_err(|error| not_proposed(&error))?;
        if is_stale(&outcome) {
            return Ok(None);
        }
        if let Some(rejection) = &outcome.rejection {
            return Err(rejected(&self.state(), rejection));
        }
        let kind = kind.as_str_name();
        tracing::info!(target: "audit", actor, kind, object, index = outcome.index, "changed by an operator");
        Ok(Some(outcome.index))
    }

    /// What a request for a rotation comes to. Nothing is kept before who is to sign proved that it can.
    async fn decide_rotation(
        &self,
        state: State,
        request: &wire::RotateRootRequest,
        key: &[u8],
    ) -> Result<Decision, Status> {
        let (old, ca, now) = (cluster(&state)?, &self.0.ca, self.now());
        let behind = ca::rotation::behind(&state).map(|node| node.name.as_str());
        let order = match cluster::may_rotate(old, request, behind)? {
            Asked::Done(decision) => return Ok(decision),
            Asked::Begin(order) => order,
        };
        let next = cluster::next_root(old, request, key, now)?;
        if let Next::Outside { root, signer } = &next {
            let proved = ca.probe(root, signer).await;
            proved.map_err(|error| cluster::no_root(&error))?;
        }
        let cross = match order.compromised {
            true => Vec::new(),
            false => {
                let crossed = ca.cross(old, next.root(), now).await;
                crossed.map_err(|error| cluster::no_way(old, &error))?
            }
        };
        let rotation = ca::rotation::towards(old, order, &next, cross, ca.ring(), now);
        Ok(cluster::begun(
            old,
            rotation.map_err(|error| cluster::no_root(&error))?,
        ))
    }

    /// What it comes to that a root's signer is elsewhere: it has to prove there whose key it holds.
    async fn decide_signer(
        &self,
        state: State,
        request: &wire::MoveSignerRequest,
    ) -> Result<Decision, Status> {
        let old = cluster(&state)?;
        let Some(signer) = cluster::may_move_signer(old, request)? else {
            return Ok(Decision::done(old));
        };
        let mut failed = None;
        for (_, root, _) in ca::signer::outside(old) {
            match self.0.ca.probe(root, &signer).await {
                Ok(()) => return Ok(cluster::moved_signer(old, root, signer)),
                Err(error) => failed = Some(error),
            }
        }
        Err(cluster::no_root(&failed.unwrap_or(CaError::NoRoot)))
    }

    fn renewed_lock(&self, cluster: &Cluster) -> Result<wire::Autolock, LockError> {
        lock::renewed(cluster, &self.0.key_ring, &*self.0.entropy)
    }

    async fn make_ticket(
        &self,
        actor: &str,
        request: wire::CreateTicketRequest,
    ) -> Result<wire::CreateTicketResponse, Status> {
        let asked = request_id(&request.request_id)?;
        for attempt in 0..ATTEMPTS {
            let mut bytes = Zeroizing::new([0; TICKET_SECRET_BYTES]);
            self.0
                .entropy
                .fill(bytes.as_mut())
                .map_err(|error| internal("has no random bytes", &error))?;
            let secret = TicketSecret::new(bytes);
            let plan = tickets::create(&self.state(), &request, &secret, actor, self.now())?;
            // What commits a new secret for a known ticket is another change than the one that made it.
            let mut own = *asked.as_bytes();
            if attempt > 0 {
                self.0
                    .entropy
                    .fill(&mut own)
                    .map_err(|error| internal("has no random bytes", &error))?;
            }
            let Some(index) = self
                .commit(actor, RequestId::from_bytes(own), Kind::Ticket, plan)
                .await?
            else {
                continue;
            };
            let state = self.state();
            let made = get::<wire::Ticket>(&state, &request.ticket_id);
            // A retry may have met its own earlier commit, whose secret nobody knows: then once more.
            if let Some(made) = made.filter(|it| secret.matches(&it.secret_hash)) {
                let expires_at = made.expires_at;
                return Ok(wire::CreateTicketResponse {
                    index,
                    id: request.ticket_id,
                    ticket: TicketText::new(ca::trust::named(cluster(&state)?), secret)
                        .to_text()
                        .to_string(),
                    expires_at,
                    managers: ca::manager_addresses(&state),
                });
            }
        }
        Err(overtaken("the ticket"))
    }
}

/// The cluster object of a state that the layer found fresh.
fn cluster(state: &State) -> Result<&Cluster, Status> {
    view::cluster(state).ok_or_else(|| {
        refuse(
            Code::NotMember,
            tonic::Code::FailedPrecondition,
            "there is no cluster here yet",
            "begin one with `bulkhead cluster init`",
        )
    })
}

type Answer<T> = Result<Response<T>, Status>;

fn split<T>(request: Request<T>) -> Result<(String, T), Status> {
    let actor = Principal::of(&request)?.actor;
    Ok((actor, request.into_inner()))
}

macro_rules! list {
    ($self:ident, $request:ident, $category:expr, $show:expr, $response:ident { $field:ident }) => {{
        let state = $self.state();
        let ($field, next) = $category.page(&state, &$request.into_inner(), $show)?;
        Ok(Response::new(wire::$response {
            index: state.index(),
            $field,
            next,
        }))
    }};
}

#[tonic::async_trait]
impl Service for Control {
    async fn get_cluster_status(
        &self,
        _: Request<wire::GetClusterStatusRequest>,
    ) -> Answer<wire::ClusterStatus> {
        let replica = &self.0.replica;
        let status = status::status(
            &self.state(),
            &replica.members(),
            replica.member(),
            self.0.fresh.is_fresh(),
            self.0.ca.signers(),
        );
        Ok(Response::new(status))
    }

    async fn update_cluster(&self, request: Request<wire::UpdateClusterRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let decide = |state: &State| {
            let old = cluster(state)?;
            cluster::update(old, &request, || self.renewed_lock(old))
        };
        self.change::<Cluster>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn get_unlock_key(
        &self,
        request: Request<wire::GetUnlockKeyRequest>,
    ) -> Answer<wire::GetUnlockKeyResponse> {
        let (actor, request) = split(request)?;
        let state = self.state();
        let key = cluster::unlock_key(
            cluster(&state)?,
            &self.0.key_ring,
            request.generation,
            state.index(),
        )?;
        let shown = Plan::default().with(audit::shown(&actor, key.generation));
        let mut own = [0; 16];
        self.0
            .entropy
            .fill(&mut own)
            .map_err(|error| internal("has no random bytes", &error))?;
        // On record before it leaves; where that cannot be, nobody sees it.
        self.commit(&actor, RequestId::from_bytes(own), Kind::Cluster, shown)
            .await?;
        tracing::info!(target: "audit", actor, generation = key.generation, "unlock key shown");
        Ok(Response::new(key))
    }

    async fn rotate_unlock_key(
        &self,
        request: Request<wire::RotateUnlockKeyRequest>,
    ) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let decide = |state: &State| {
            let old = cluster(state)?;
            cluster::rotate_unlock_key(old, &request, || self.renewed_lock(old))
        };
        self.change::<Cluster>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn confirm_unlock_key(
        &self,
        request: Request<wire::ConfirmUnlockKeyRequest>,
    ) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let decide = |state: &State| cluster::confirm_unlock_key(cluster(state)?, &request);
        self.change::<Cluster>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn rotate_key_ring(&self, request: Request<wire::RotateKeyRingRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let (ring, now) = (&self.0.key_ring, self.now());
        let decide = |state: &State| {
            let old = cluster(state)?;
            cluster::rotate_key_ring(old, &request, || {
                ring.with_next_epoch(old, &key_ring::holders(state), now)
            })
        };
        self.change::<Cluster>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn rotate_root(&self, request: Request<wire::RotateRootRequest>) -> Answer<ChangeResponse> {
        let (actor, mut request) = split(request)?;
        let key = Zeroizing::new(std::mem::take(&mut request.root_key));
        let decide = |state: State| self.decide_rotation(state, &request, &key).boxed();
        self.change_signed::<Cluster>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn get_rotation(&self, _: Request<wire::GetRotationRequest>) -> Answer<wire::RotationStatus> {
        let status = ca::rotation::status(&self.state(), self.0.ca.signers(), self.now());
        Ok(Response::new(status))
    }

    async fn move_signer(&self, request: Request<wire::MoveSignerRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let decide = |state: State| self.decide_signer(state, &request).boxed();
        self.change_signed::<Cluster>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn cancel_rotation(&self, request: Request<wire::CancelRotationRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let decide =
            |state: &State| cluster::cancel(cluster(state)?, &request, || ca::rotation::most_renewed(state));
        self.change::<Cluster>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn set_recovery_key(
        &self,
        request: Request<wire::SetRecoveryKeyRequest>,
    ) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let decide = |state: &State| backup::set_key(cluster(state)?, &request, self.now());
        self.change::<Cluster>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    type CreateBackupStream = BoxStream<'static, Result<wire::BackupChunk, Status>>;

    async fn create_backup(
        &self,
        request: Request<wire::CreateBackupRequest>,
    ) -> Answer<Self::CreateBackupStream> {
        let (actor, _) = split(request)?;
        backup::create(&self.0, &actor, self.now()).map(Response::new)
    }

    async fn list_nodes(&self, request: Request<wire::ListRequest>) -> Answer<wire::ListNodesResponse> {
        let (state, request) = (self.state(), request.into_inner());
        let (nodes, next) = NODES.page(&state, &request, Clone::clone)?;
        let waiting = match request.selector.is_empty() && request.after.is_empty() {
            true => waiting::all(&state, self.now()),
            false => Vec::new(),
        };
        Ok(Response::new(wire::ListNodesResponse {
            index: state.index(),
            nodes,
            next,
            waiting,
        }))
    }

    async fn approve_node(&self, request: Request<RemoveRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let (ca, now) = (&self.0.ca, self.now());
        let decide = |state: State| {
            let request = &request;
            async move { waiting::approve(&state, cluster(&state)?, request, ca, now).await }.boxed()
        };
        let approved = self
            .change_signed::<wire::Node>(&actor, &request.request_id, decide)
            .await?;
        let node = object::id_text(&approved.id);
        tracing::info!(target: "audit", actor, node, index = approved.index, "node approved");
        Ok(Response::new(approved))
    }

    async fn reject_node(&self, request: Request<RemoveRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let decide = |state: &State| waiting::reject(state, &request);
        let rejected = self
            .change::<wire::Node>(&actor, &request.request_id, decide)
            .await?;
        let node = object::id_text(&rejected.id);
        tracing::info!(target: "audit", actor, node, index = rejected.index, "node rejected");
        Ok(Response::new(rejected))
    }

    async fn update_node(&self, request: Request<wire::UpdateNodeRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let decide = |state: &State| nodes::update(state, &request);
        self.change::<wire::Node>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn remove_node(&self, request: Request<RemoveRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let members = self.0.replica.members();
        let decide = |state: &State| nodes::remove(state, &request, &members, self.now());
        self.change::<wire::Node>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn quarantine_node(&self, request: Request<RemoveRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let members = self.0.replica.members();
        let decide = |state: &State| nodes::quarantine(state, &request, &members, self.now());
        self.change::<wire::Node>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn promote_node(&self, request: Request<RemoveRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let decide = |state: &State| nodes::promote(state, &request);
        self.change::<wire::Node>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn demote_node(&self, request: Request<RemoveRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let decide = |state: &State| nodes::demote(state, &request);
        self.change::<wire::Node>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn create_ticket(
        &self,
        request: Request<wire::CreateTicketRequest>,
    ) -> Answer<wire::CreateTicketResponse> {
        let (actor, request) = split(request)?;
        self.make_ticket(&actor, request).await.map(Response::new)
    }

    async fn list_tickets(&self, request: Request<wire::ListRequest>) -> Answer<wire::ListTicketsResponse> {
        list!(
            self,
            request,
            TICKETS,
            tickets::shown,
            ListTicketsResponse { tickets }
        )
    }

    async fn revoke_ticket(&self, request: Request<RemoveRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let decide = |state: &State| tickets::revoke(state, &request);
        self.change::<wire::Ticket>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn revoke_all_tickets(
        &self,
        request: Request<wire::RevokeAllTicketsRequest>,
    ) -> Answer<wire::RevokeAllTicketsResponse> {
        let (actor, request) = split(request)?;
        let asked = request_id(&request.request_id)?;
        let state = self.state();
        let ids: Vec<Vec<u8>> = TICKETS
            .all(&state)
            .take(limits::CHANGES)
            .map(|it| it.id.clone())
            .collect();
        let plan = tickets::revoke_all(&state);
        let index = match plan.changes.is_empty() {
            true => state.index(),
            false => self
                .commit(&actor, asked, Kind::Ticket, plan)
                .await?
                .ok_or_else(|| overtaken("the list of tickets"))?,
        };
        Ok(Response::new(wire::RevokeAllTicketsResponse { index, ids }))
    }

    async fn issue_operator(
        &self,
        request: Request<wire::IssueOperatorRequest>,
    ) -> Answer<wire::EnrolResponse> {
        let (actor, request) = split(request)?;
        let key = operators::key(&request)?;
        let (ca, now) = (&self.0.ca, self.now());
        let decide = |state: State| {
            let (request, key) = (&request, &key);
            async move { operators::issue(&state, request, key, cluster(&state)?, ca, now).await }.boxed()
        };
        self.change_signed::<wire::Node>(&actor, &request.request_id, decide)
            .await?;
        // Fresh as the last thing before a certificate leaves. The commit stands, so "nothing was done" would be wrong.
        if !self.0.fresh.is_fresh() {
            return Err(crate::authz::lost_touch());
        }
        operators::hand_out(&self.state(), &request.node_id, &key).map(Response::new)
    }

    async fn list_operators(&self, request: Request<wire::ListRequest>) -> Answer<wire::ListNodesResponse> {
        let state = self.state();
        let (nodes, next) = OPERATORS.page(&state, &request.into_inner(), Clone::clone)?;
        Ok(Response::new(wire::ListNodesResponse {
            index: state.index(),
            nodes,
            next,
            waiting: Vec::new(),
        }))
    }

    async fn revoke_operator(&self, request: Request<RemoveRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let decide = |state: &State| nodes::revoke(state, &OPERATORS, &request, self.now());
        self.change::<wire::Node>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn create_secret(&self, request: Request<wire::CreateSecretRequest>) -> Answer<ChangeResponse> {
        let (actor, mut request) = split(request)?;
        let value = Zeroizing::new(std::mem::take(&mut request.value));
        let ring = &self.0.key_ring;
        let decide = |state: &State| secrets::create(state, &request, &value, cluster(state)?, ring);
        self.change::<wire::Secret>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn list_secrets(&self, request: Request<wire::ListRequest>) -> Answer<wire::ListSecretsResponse> {
        list!(
            self,
            request,
            SECRETS,
            secrets::shown,
            ListSecretsResponse { secrets }
        )
    }

    async fn remove_secret(&self, request: Request<RemoveRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let decide = |state: &State| secrets::remove(state, &request);
        self.change::<wire::Secret>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn get_exposure(&self, request: Request<wire::GetExposureRequest>) -> Answer<wire::Exposure> {
        exposure::exposure(&self.state(), &request.into_inner()).map(Response::new)
    }

    async fn create_service(&self, request: Request<wire::CreateServiceRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let decide = |state: &State| services::create(state, &request, self.now());
        self.change::<wire::Service>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn update_service(&self, request: Request<wire::UpdateServiceRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let decide = |state: &State| services::update(state, &request, self.now());
        self.change::<wire::Service>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn list_services(&self, request: Request<wire::ListRequest>) -> Answer<wire::ListServicesResponse> {
        let state = self.state();
        let show = |service: &wire::Service| services::summary(&state, service);
        let (services, next) = SERVICES.page(&state, &request.into_inner(), show)?;
        Ok(Response::new(wire::ListServicesResponse {
            index: state.index(),
            services,
            next,
        }))
    }

    async fn remove_service(&self, request: Request<RemoveRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let decide = |state: &State| services::remove(state, &request);
        self.change::<wire::Service>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn list_tasks(&self, request: Request<wire::ListTasksRequest>) -> Answer<wire::ListTasksResponse> {
        let state = self.state();
        let (tasks, next) = tasks::list(&state, &request.into_inner())?;
        Ok(Response::new(wire::ListTasksResponse {
            index: state.index(),
            tasks,
            next,
        }))
    }

    async fn explain(&self, request: Request<wire::ExplainRequest>) -> Answer<wire::ExplainResponse> {
        tasks::explain(&self.state(), &request.into_inner()).map(Response::new)
    }

    async fn push_blob(
        &self,
        request: Request<Streaming<wire::PushBlobRequest>>,
    ) -> Answer<wire::PushBlobResponse> {
        self.0
            .registry
            .push(request.into_inner())
            .await
            .map(Response::new)
    }

    async fn create_image(&self, request: Request<wire::CreateImageRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let manifest = registry::digest(&request.manifest_digest)?;
        // A name that is taken is refused before anything is copied.
        let described = match images::standing(&self.state(), &request)? {
            Some(_) => None,
            None => {
                let described = self.0.registry.describe(manifest, request.manifest_size).await;
                let described = described.map_err(|error| images::refused(manifest, &error))?;
                let copied = self.0.registry.replicate(&described.blobs).await;
                copied.map_err(|error| images::not_copied(&error))?;
                Some(described)
            }
        };
        let decide = |state: &State| match (images::standing(state, &request)?, &described) {
            (Some(standing), _) => Ok(standing),
            (None, Some(described)) => Ok(images::create(&request, described.clone())?.into()),
            (None, None) => Err(overtaken("the image")),
        };
        self.change::<wire::Image>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    async fn list_images(&self, request: Request<wire::ListRequest>) -> Answer<wire::ListImagesResponse> {
        list!(self, request, IMAGES, Clone::clone, ListImagesResponse { images })
    }

    async fn remove_image(&self, request: Request<RemoveRequest>) -> Answer<ChangeResponse> {
        let (actor, request) = split(request)?;
        let decide = |state: &State| images::remove(state, &request);
        self.change::<wire::Image>(&actor, &request.request_id, decide)
            .await
            .map(Response::new)
    }

    type LogsStream = BoxStream<'static, Result<wire::LogsResponse, Status>>;

    async fn logs(&self, request: Request<wire::LogsRequest>) -> Answer<Self::LogsStream> {
        let replica = self.0.replica.clone();
        let live: logs::Live = Arc::new(move |task: &[u8]| {
            let found = TaskId::try_from(task);
            found.is_ok_and(|id| view::task(&replica.state(), id).is_some_and(may_still_run))
        });
        let parts = &self.0;
        logs::logs(
            &self.state(),
            &request.into_inner(),
            &parts.logs,
            &parts.peers,
            &live,
        )
        .map(Response::new)
    }

    type WatchStream = BoxStream<'static, Result<WatchResponse, Status>>;

    async fn watch(&self, request: Request<wire::WatchRequest>) -> Answer<Self::WatchStream> {
        watch::watch(self.0.replica.clone(), &request.into_inner()).map(Response::new)
    }

    async fn list_audit(&self, request: Request<wire::ListAuditRequest>) -> Answer<wire::ListAuditResponse> {
        Ok(Response::new(audit::list(
            &self.state(),
            request.into_inner().after,
        )))
    }
}
