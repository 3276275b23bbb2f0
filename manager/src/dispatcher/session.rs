//! One worker's session: assignments down, reports and signs of life up. The layer before the service ends the stream
//! when the worker's key is removed or this replica cannot tell any more; then nothing takes what is sent here.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::bundle::ROOTS;
use bulkhead_proto::wire::{
    AssignedSecret, Beat, Cluster, Kind, ManagerAddress, Managers, Node, SessionDown, SessionHello,
    SessionUp, StatusAck, Welcome, change::Change as Step, object::Object as Any,
    session_down::Message as Down, session_up::Message as Up,
};
use bulkhead_proto::wire::{Change, RejectionCode};
use bulkhead_proto::{Code, KeyId, NodeId, RequestId, SecretId, limits};
use bulkhead_raft::planted::{Bug, planted};
use bulkhead_raft::state::{Key, State};
use futures::stream::FuturesOrdered;
use futures::{Stream, StreamExt as _};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tonic::Status;

use super::Desk;
use super::assignments::{self, Told, Update};
use super::reports;
use super::sessions::Entry;
use crate::authz::Principal;
use crate::ca::admission::{bounded, published};
use crate::ca::renewal::unchanged;
use crate::ca::{clone, manager_addresses, trust};
use crate::refusal::refuse;
use crate::view;

/// The first message comes within this time.
const HELLO: Duration = Duration::from_secs(5);
/// A worker that takes nothing for this long has lost its session.
const SEND: Duration = Duration::from_secs(5);
/// A sign of this manager's freshness. A worker leaves after three that do not come.
const BEAT: Duration = Duration::from_millis(500);
/// Between attempts to keep what a worker says of itself.
const AGAIN: Duration = Duration::from_millis(500);
/// Batches of reports of one worker on their way to the log. More hold back the reading of its stream.
const BATCHES: usize = 16;

type Out = mpsc::Sender<Result<SessionDown, Status>>;

/// Why a session ended.
#[derive(Debug)]
enum End {
    /// The worker closed it, or the layer did.
    Gone,
    /// The worker opened another one.
    Replaced,
    /// Nothing was heard of the worker.
    Silent,
    /// The worker is told why.
    Refused(Status),
}

/// A session under way.
struct Session {
    desk: Arc<Desk>,
    node: NodeId,
    out: Out,
    told: Told,
    complete: bool,
    sequence: u64,
    managers: Vec<ManagerAddress>,
    /// Version of the cluster object whose roots the worker was told.
    cluster: u64,
}

/// Carries the session of a worker until it ends: what the worker says comes by `up`, and what it is told goes out by `out`.
pub async fn carry(
    desk: Arc<Desk>,
    caller: Principal,
    node: NodeId,
    mut up: impl Stream<Item = Result<SessionUp, Status>> + Send + Unpin,
    out: Out,
) {
    let notes = desk.notes.clone();
    let end = match hello(&mut up).await {
        Ok(hello) => {
            let mut session = Session {
                desk,
                node,
                out: out.clone(),
                told: Told::default(),
                complete: true,
                sequence: 0,
                managers: Vec::new(),
                cluster: 0,
            };
            session.run(hello, &caller, up).await
        }
        Err(end) => Err(end),
    };
    match end {
        Ok(()) | Err(End::Gone) => tracing::info!(node = %node, "session ended"),
        Err(End::Replaced) => {
            tracing::info!(node = %node, "session replaced by a newer one of the same worker");
            let status = refuse(
                Code::Conflict,
                tonic::Code::Aborted,
                "this worker opened another session",
                "run one worker per data folder",
            );
            let _ = out.try_send(Err(status)); // the end of the stream says it, too
        }
        Err(End::Silent) => {
            tracing::warn!(node = %node, "session ended: nothing was heard of the worker");
            let status = refuse(
                Code::Unreachable,
                tonic::Code::Unavailable,
                format!(
                    "this manager heard nothing of this worker for {} ms",
                    limits::SESSION_SILENCE.as_millis()
                ),
                "the worker tries another manager; if that repeats, see whether the network loses what workers send",
            );
            let _ = out.try_send(Err(status));
        }
        Err(End::Refused(status)) => {
            tracing::warn!(target: "audit", node = %node, reason = status.message(), "session refused");
            // A replica that cannot tell now refuses nobody for good.
            if status.code() == tonic::Code::PermissionDenied {
                let from = caller.address.map(|it| it.ip());
                notes.refused(
                    &caller.actor,
                    from,
                    "session: a message that no worker of this version sends",
                );
            }
            let _ = out.try_send(Err(status));
        }
    }
}

async fn hello(
    up: &mut (impl Stream<Item = Result<SessionUp, Status>> + Unpin),
) -> Result<SessionHello, End> {
    let first = timeout(HELLO, up.next()).await.map_err(|_| End::Gone)?;
    match first.and_then(Result::ok).and_then(|it| it.message) {
        Some(Up::Hello(hello)) => Ok(hello),
        _ => Err(unfitting("the first message of a session is a hello")),
    }
}

impl Session {
    async fn run(
        &mut self,
        hello: SessionHello,
        caller: &Principal,
        mut up: impl Stream<Item = Result<SessionUp, Status>> + Unpin,
    ) -> Result<(), End> {
        self.welcome(&hello).await?;
        let mut entry = self.desk.sessions.enter(self.node);
        self.alive();
        let mut jobs = JoinSet::new();
        jobs.spawn(describe(self.desk.clone(), caller.clone(), self.node, hello));
        let mut acks = FuturesOrdered::new();
        let mut beats = interval(BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut due = true;
        let mut heard = Instant::now();
        loop {
            if due {
                due = !self.assign().await?;
            }
            let Entry {
                wake,
                aside,
                replaced,
                ..
            } = &mut entry;
            // Each branch is cancel-safe: a message is taken whole or stays where it is.
            tokio::select! {
                biased;
                () = replaced.cancelled() => return Err(End::Replaced),
                () = self.out.closed() => return Err(End::Gone),
                _ = beats.tick() => {
                    self.beat().await?;
                    due = true;
                }
                () = wake.notified() => due = true,
                Some(message) = aside.recv() => self.send(message).await?,
                Some(committed) = acks.next() => match committed {
                    Some(sequence) => {
                        if acks.len() + 1 == BATCHES {
                            heard = Instant::now(); // it was this side that did not listen
                        }
                        self.send(Down::StatusAck(StatusAck { sequence })).await?;
                    }
                    None => return Err(End::Refused(crate::authz::stale())),
                },
                Some(_) = jobs.join_next() => {}
                message = up.next(), if acks.len() < BATCHES => {
                    let message = message.and_then(Result::ok).ok_or(End::Gone)?;
                    heard = Instant::now();
                    self.alive();
                    match message.message {
                        Some(Up::Alive(alive)) => self.clock_says(alive.now),
                        Some(Up::Applied(_)) => {}
                        Some(Up::Status(batch)) => {
                            let sequence = batch.sequence;
                            let state = self.desk.replica.state();
                            let observed = reports::check(&state, self.node, batch).map_err(|error| {
                                unfitting(&error.to_string())
                            })?;
                            let reports = self.desk.reports.clone();
                            let lost = planted(Bug::AcknowledgesLostReports);
                            acks.push_back(async move {
                                (lost || reports.commit(observed).await).then_some(sequence)
                            });
                        }
                        Some(Up::Hello(_)) => return Err(unfitting("a second hello")),
                        None => return Err(unfitting("a message of a kind unknown here")),
                    }
                }
                () = sleep_until(heard + limits::SESSION_SILENCE), if acks.len() < BATCHES => return Err(End::Silent),
            }
        }
    }

    async fn welcome(&mut self, hello: &SessionHello) -> Result<(), End> {
        let state = self.desk.replica.state();
        let (Some(node), Some(cluster)) = (view::node(&state, self.node), view::cluster(&state)) else {
            return Err(End::Refused(crate::authz::stale()));
        };
        // The worker would refuse an older manager anyway; so it hears why.
        if (cluster.epoch, state.index()) < (hello.seen_epoch, hello.seen_index) {
            return Err(End::Refused(crate::authz::stale()));
        }
        let welcome = Welcome {
            epoch: cluster.epoch,
            index: state.index(),
            node_id: self.node.to_wire(),
            name: node.name.clone(),
            heartbeat_ms: u64::try_from(limits::WORKER_HEARTBEAT.as_millis()).unwrap_or(u64::MAX),
        };
        self.send(Down::Welcome(welcome)).await
    }

    async fn beat(&mut self) -> Result<(), End> {
        if !self.desk.fresh.is_fresh() {
            return Ok(());
        }
        let state = self.desk.replica.state();
        let managers = manager_addresses(&state);
        if let Some(cluster) = view::cluster(&state)
            && !managers.is_empty()
        {
            let version = cluster.meta.as_ref().map_or(0, |meta| meta.version);
            if managers != self.managers || version != self.cluster {
                self.managers.clone_from(&managers);
                self.cluster = version;
                let issuer =
                    trust::key_id(trust::issuer(cluster).root).map_or_else(|_| Vec::new(), KeyId::to_wire);
                let list = Managers {
                    managers,
                    roots: trust::roots(cluster),
                    issuer,
                };
                self.send(Down::Managers(list)).await?;
            }
        }
        let now = i64::try_from(self.desk.clock.wall_millis()).unwrap_or(i64::MAX);
        let index = state.index();
        self.send(Down::Beat(Beat { index, now })).await
    }

    /// Tells the worker what is new for it. `false` where this has to be tried again: the replica is not fresh, or a
    /// secret did not open.
    async fn assign(&mut self) -> Result<bool, End> {
        if !self.desk.fresh.is_fresh() {
            return Ok(false);
        }
        let state = self.desk.replica.state();
        let update = assignments::plan(&state, self.node, &self.told);
        if update.is_empty() && !self.complete {
            return Ok(true);
        }
        let Some(cluster) = view::cluster(&state) else {
            return Ok(false);
        };
        let secrets = self.open(&state, cluster, &update);
        let all = secrets.len() == update.secrets.len();
        let (told, parts) = update.into_parts(self.complete, state.index(), self.sequence + 1, secrets);
        for part in parts {
            let secret = !part.secrets.is_empty();
            self.sequence = part.sequence;
            // Once more, as the last thing before a secret leaves: of this replica, and of what is committed by now.
            if !self.desk.fresh.is_fresh() || (secret && !self.still_needed(&part.secrets)) {
                return Err(End::Refused(crate::authz::stale()));
            }
            self.send(Down::Assignments(part)).await?;
        }
        self.told = told;
        self.complete = false;
        Ok(all)
    }

    fn open(&self, state: &State, cluster: &Cluster, update: &Update) -> Vec<AssignedSecret> {
        let open = |id: &SecretId| {
            let secret = view::secret(state, *id)?;
            let place = Key::new(Kind::Secret, *id.as_bytes());
            match self.desk.ring.open(cluster, place, secret.value.as_ref()?) {
                Ok(mut value) => Some(AssignedSecret {
                    id: id.to_wire(),
                    name: secret.name.clone(),
                    value: std::mem::take(&mut *value), // wiped by whoever holds the message; no second copy here
                }),
                Err(error) => {
                    tracing::error!(secret = %id, %error, "a secret cannot be opened");
                    None
                }
            }
        };
        update.secrets.iter().filter_map(open).collect()
    }

    fn still_needed(&self, secrets: &[AssignedSecret]) -> bool {
        let state = self.desk.replica.state();
        secrets.iter().all(|secret| {
            SecretId::try_from(secret.id.as_slice())
                .is_ok_and(|id| assignments::needs_secret(&state, self.node, id))
        })
    }

    fn clock_says(&self, now: i64) {
        let own = i64::try_from(self.desk.clock.wall_millis()).unwrap_or(i64::MAX);
        let clocks = self.desk.fresh.clocks();
        clocks.worker(self.node, now.saturating_sub(own), self.desk.clock.monotonic());
    }

    fn alive(&self) {
        self.desk.signs.heard(self.node, self.desk.clock.monotonic());
    }

    async fn send(&self, message: Down) -> Result<(), End> {
        let message = SessionDown {
            message: Some(message),
        };
        match timeout(SEND, self.out.send(Ok(message))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(End::Gone),
        }
    }
}

fn unfitting(what: &str) -> End {
    End::Refused(refuse(
        Code::Denied,
        tonic::Code::PermissionDenied,
        what,
        "use the cluster's version of the worker",
    ))
}

/// Keeps what the worker says of itself in its record, and the root of the certificate that it came with.
async fn describe(desk: Arc<Desk>, caller: Principal, node: NodeId, hello: SessionHello) {
    let description = bounded(hello.description.unwrap_or_default());
    let address = published(&description, caller.address.map(|it| it.ip()));
    let mut trusts = hello.trusts;
    trusts.retain(|id| KeyId::try_from(id.as_slice()).is_ok());
    trusts.truncate(ROOTS);
    loop {
        let state = desk.replica.state();
        let (Some(record), Some(cluster)) = (view::node(&state, node), view::cluster(&state)) else {
            return;
        };
        let used = caller.certificate.as_ref();
        let mut new = Node {
            description: Some(description.clone()),
            address: address.clone(),
            trusts: trusts.clone(),
            issuer: used.map_or_else(Vec::new, |it| trust::used(cluster, it)),
            ..record.clone()
        };
        if let Some(key) = caller.key_id {
            clone::seen(&mut new, key, desk.now_ms());
        }
        if new == *record {
            return;
        }
        let change = Change {
            change: Some(Step::Replace(view::object(Any::Node(new)))),
        };
        let Some(request) = desk.request_id() else {
            return;
        };
        match desk
            .proposer
            .client(&caller.actor, request, vec![unchanged(record)], vec![change])
            .await
        {
            Ok(outcome) => match outcome.rejection {
                Some(rejection) if rejection.code() == RejectionCode::Stale => {}
                _ => return,
            },
            // A rotation waits for it, so it is said until it is kept or the session ends.
            Err(error) => {
                tracing::debug!(node = %node, %error, "a node's description is not kept yet");
                sleep(AGAIN).await;
            }
        }
    }
}

impl Desk {
    pub(super) fn request_id(&self) -> Option<RequestId> {
        let mut id = [0; 16];
        self.entropy.fill(&mut id).ok()?;
        Some(RequestId::from_bytes(id))
    }

    pub(super) fn now_ms(&self) -> i64 {
        i64::try_from(self.clock.wall_millis()).unwrap_or(i64::MAX)
    }
}
