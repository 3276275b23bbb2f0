//! The local socket's own service: status, and how this machine enters and leaves a cluster.

use std::sync::Arc;

use bulkhead_identity::join::{self, Enrolment};
use bulkhead_identity::recovery::RecoveryKey;
use bulkhead_identity::store::{KeyFile, StoreError};
use bulkhead_identity::ticket::Ticket;
use bulkhead_identity::{ConnectInfo, Peer, UnlockKey, csr};
use bulkhead_proto::wire::local_server::{self, LocalServer};
use bulkhead_proto::wire::{self, JoinProgress, LocalStatus, Phase, Role, StepState};
use bulkhead_proto::{Code, NodeId, limits};
use futures::StreamExt as _;
use futures::stream::BoxStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, async_trait};
use zeroize::Zeroizing;

use super::Program;
use super::description::describe;
use super::init::{self, Order};
use super::stage::Stage;
use super::{recover, restore};
use crate::ca::genesis::FirstOperator;
use crate::refusal::{chain, internal, refuse};
use crate::view;

/// Steps of a checklist that wait for a slow reader.
const STEPS: usize = 32;

/// The service. Whoever reaches it was let in by the kernel: root, or this program's own user.
#[derive(Clone)]
pub(super) struct LocalService(Arc<Program>);

impl LocalService {
    pub(super) fn new(program: Arc<Program>) -> Self {
        LocalService(program)
    }

    pub(super) fn into_server(self) -> LocalServer<Self> {
        LocalServer::new(self).max_decoding_message_size(limits::MESSAGE_BYTES)
    }
}

#[async_trait]
impl local_server::Local for LocalService {
    async fn get_status(
        &self,
        _: Request<wire::GetLocalStatusRequest>,
    ) -> Result<Response<LocalStatus>, Status> {
        let mut status = LocalStatus {
            role: view::wire_role(self.0.role).into(),
            ..Default::default()
        };
        match self.0.stage.view() {
            Stage::Empty { detail } => {
                status.set_phase(Phase::Uninitialised);
                status.detail = detail;
            }
            Stage::Entering { detail } => {
                status.set_phase(Phase::Joining);
                status.detail = detail;
            }
            Stage::Standby(standby) => {
                status.set_role(Role::Standby);
                status.set_phase(Phase::Member);
                status.node_id = standby.node().to_wire();
                status.cluster_id = standby.identity.subject().cluster.to_wire();
                status.ready = standby.is_heard();
                status.name = standby.name();
                status.certificate_not_after = standby.identity.current().certificate.not_after_ms();
                status.detail = match status.ready {
                    true => format!("waits for 'bulkhead node promote {}'", status.name),
                    false => "no manager takes it now".to_owned(),
                };
            }
            Stage::Locked(locked) => {
                status.set_phase(Phase::Locked);
                status.node_id = locked.subject.node.to_wire();
                status.cluster_id = locked.subject.cluster.to_wire();
                status.locked_with = locked.generation;
                status.detail = format!("it waits for unlock key {}", locked.generation);
                status.name = locked.name;
            }
            Stage::Member(member) => {
                status.set_role(Role::Manager);
                let voter = member.replica.members().voters.contains(&member.replica.member());
                status.set_phase(if voter { Phase::Member } else { Phase::Joining });
                status.node_id = member.node().to_wire();
                status.cluster_id = member.identity.subject().cluster.to_wire();
                status.ready = voter && member.fresh.is_fresh();
                status.leader = member.replica.leadership().borrow().leading.is_some();
                status.name = member.keys(|keys| keys.name.clone());
                status.certificate_not_after = member.identity.current().certificate.not_after_ms();
                status.epoch = member.keys(|keys| keys.manager.as_ref().map_or(0, |part| part.epoch));
                if !status.ready {
                    "it hears no leader with a quorum, or does not vote yet".clone_into(&mut status.detail);
                }
            }
        }
        Ok(Response::new(status))
    }

    async fn init(
        &self,
        request: Request<wire::InitRequest>,
    ) -> Result<Response<wire::InitResponse>, Status> {
        let actor = actor(&request);
        if self.0.role == bulkhead_proto::Role::Standby {
            return Err(invalid(
                "this program was started as a standby, which joins a cluster that is there",
                "start bulkhead-manager without --standby to begin one",
            ));
        }
        let order = order(request.into_inner())?;
        let entering = self.0.stage.enter().map_err(taken)?;
        let made = init::init(&self.0, order, &actor).await.map_err(|error| {
            tracing::error!(error = format!("{error:#}"), "the cluster was not made");
            refuse(
                Code::CannotListen,
                tonic::Code::FailedPrecondition,
                format!("the cluster was not made: {error:#}"),
                "mend that, and try again; what was begun is taken back",
            )
        })?;
        entering.done(Stage::Member(made.member.clone()));
        Ok(Response::new(wire::InitResponse {
            operator: made.operator,
            node_id: made.member.node().to_wire(),
            name: made.member.keys(|keys| keys.name.clone()),
            unlock_key: made
                .unlock_key
                .map_or_else(String::new, |key| key.to_text().to_string()),
        }))
    }

    type JoinStream = BoxStream<'static, Result<JoinProgress, Status>>;

    async fn join(&self, request: Request<wire::JoinRequest>) -> Result<Response<Self::JoinStream>, Status> {
        let request = request.into_inner();
        let order = JoinOrder::parse(&request)?;
        let entering = self.0.stage.enter().map_err(taken)?;
        let (steps, progress) = mpsc::channel(STEPS);
        let program = self.0.clone();
        // It goes on without its caller: a join whose ticket is used must not end half-way.
        self.0.work.spawn(async move {
            match join_cluster(&program, order, steps).await {
                Some(stage) => entering.done(stage),
                None => drop(entering), // the stage falls back; the last step said why
            }
        });
        Ok(Response::new(ReceiverStream::new(progress).map(Ok).boxed()))
    }

    async fn leave(
        &self,
        request: Request<wire::LeaveRequest>,
    ) -> Result<Response<wire::LeaveResponse>, Status> {
        let member = match self.0.stage.view() {
            Stage::Member(member) => member,
            Stage::Locked(locked) if request.get_ref().force => {
                tracing::info!(target: "audit", told = false, "this manager has left its cluster, locked");
                self.0.stage.left(&self.0.machine.forget());
                return Ok(Response::new(wire::LeaveResponse {
                    told: false,
                    name: locked.name,
                }));
            }
            stage @ (Stage::Locked(_) | Stage::Entering { .. }) => return Err(taken(stage)),
            Stage::Standby(standby) => return leave_as_standby(&standby, request.get_ref().force).await,
            Stage::Empty { .. } => {
                return Err(refuse(
                    Code::NotMember,
                    tonic::Code::FailedPrecondition,
                    "this manager is in no cluster",
                    "nothing is to be done",
                ));
            }
        };
        let told = match super::leaving::leave(&member).await {
            Err(refusal) if !request.get_ref().force => return Err(refusal),
            told => told.is_ok(),
        };
        tracing::info!(target: "audit", told, "this manager has left its cluster");
        let name = member.keys(|keys| keys.name.clone());
        // The answer is under way before the servers end: they end what they began.
        member.left.cancel();
        Ok(Response::new(wire::LeaveResponse { told, name }))
    }

    async fn restore(
        &self,
        request: Request<Streaming<wire::RestoreRequest>>,
    ) -> Result<Response<wire::RestoreResponse>, Status> {
        let actor = actor(&request);
        let mut messages = request.into_inner();
        let first = messages.message().await?.and_then(|first| first.message);
        let Some(wire::restore_request::Message::Order(mut asked)) = first else {
            return Err(invalid("the order is missing", "use the command of this version"));
        };
        let key = Zeroizing::new(std::mem::take(&mut asked.recovery_key));
        let key = RecoveryKey::from_wire(&key)
            .map_err(|error| invalid(error.to_string(), "send the private half, 32 bytes"))?;
        let order = restore_order(asked, actor)?;
        let entering = self.0.stage.enter().map_err(taken)?;
        let backup = restore::receive(&mut messages, &key).await?;
        let restored = restore::restore(&self.0, order, backup)
            .await
            .map_err(|error| recover::refused(&error))?;
        entering.done(Stage::Member(restored.member.clone()));
        Ok(Response::new(wire::RestoreResponse {
            operator: Some(restored.operator),
            node_id: restored.member.node().to_wire(),
            name: restored.member.keys(|keys| keys.name.clone()),
            raised: Some(restored.raised),
        }))
    }

    async fn recover(
        &self,
        request: Request<wire::RecoverRequest>,
    ) -> Result<Response<wire::RecoverResponse>, Status> {
        let actor = actor(&request);
        let member = match self.0.stage.view() {
            Stage::Member(member) => member,
            stage @ (Stage::Locked(_) | Stage::Entering { .. }) => return Err(taken(stage)),
            Stage::Empty { .. } | Stage::Standby(_) => {
                return Err(refuse(
                    Code::NotMember,
                    tonic::Code::FailedPrecondition,
                    "this program has no state of a cluster",
                    "recover at a manager that still has its data folder; without one, restore a backup",
                ));
            }
        };
        let request = request.into_inner();
        forgettable(&request.forget)?;
        let order = recover::Order {
            forget: request.forget,
            actor,
        };
        let raised = recover::preview(&member, &order)?;
        let answer = wire::RecoverResponse {
            raised: Some(raised),
            name: member.keys(|keys| keys.name.clone()),
            cluster_id: member.identity.subject().cluster.to_wire(),
        };
        if !request.dry_run {
            // Before the answer: whoever asks how far it is must not meet the member that ends.
            self.0.stage.is(Stage::Entering {
                detail: "goes on alone".to_owned(),
            });
            if member.recover.try_send(order).is_err() {
                return Err(refuse(
                    Code::Busy,
                    tonic::Code::Aborted,
                    "a recovery is under way",
                    "`bulkhead health --socket` shows when it is done",
                ));
            }
        }
        Ok(Response::new(answer))
    }

    async fn unlock(
        &self,
        request: Request<wire::UnlockRequest>,
    ) -> Result<Response<wire::UnlockResponse>, Status> {
        let actor = actor(&request);
        let text = Zeroizing::new(request.into_inner().unlock_key);
        let key = text.parse::<UnlockKey>().map_err(|error| {
            refuse(
                Code::WrongUnlockKey,
                tonic::Code::InvalidArgument,
                error.to_string(),
                "copy the key whole; a manager that runs shows it: `bulkhead cluster unlock-key show`",
            )
        })?;
        let Stage::Locked(locked) = self.0.stage.view() else {
            return Err(refuse(
                Code::Invalid,
                tonic::Code::FailedPrecondition,
                "this manager is not locked",
                "nothing is to be done",
            ));
        };
        let keys = match KeyFile::open(&self.0.machine.keys(), Some(&key)) {
            Ok(keys) => keys,
            Err(error) => {
                tracing::warn!(target: "audit", actor, reason = chain(&error), "unlocking refused");
                return Err(not_unlocked(&error, key.generation()));
            }
        };
        let entering = self.0.stage.unlock(locked).map_err(taken)?;
        tracing::info!(target: "audit", actor, generation = key.generation(), "unlocked");
        match self.0.go_on(keys).await {
            Ok(member) => {
                member.notes.unlocked(&actor, key.generation());
                let answer = wire::UnlockResponse {
                    node_id: member.node().to_wire(),
                    name: member.keys(|keys| keys.name.clone()),
                };
                entering.done(Stage::Member(member));
                Ok(Response::new(answer))
            }
            // As at a start without a lock: the program ends, and its exit code says why.
            Err(error) => {
                let reason = chain(&error);
                let _ending = self.0.failed.try_send(error); // a full queue has a reason to end already
                Err(refuse(
                    Code::Internal,
                    tonic::Code::Internal,
                    format!("it is unlocked, but does not start: {reason}"),
                    "read the manager's log",
                ))
            }
        }
    }
}

fn not_unlocked(error: &StoreError, given: u32) -> Status {
    match error {
        StoreError::WrongUnlockKey { generation, .. } if *generation != given => refuse(
            Code::WrongUnlockKey,
            tonic::Code::PermissionDenied,
            format!("this is unlock key {given}; the manager is locked with unlock key {generation}"),
            format!(
                "where another manager runs: `bulkhead cluster unlock-key show --generation {generation}`"
            ),
        ),
        StoreError::WrongUnlockKey { .. } => refuse(
            Code::WrongUnlockKey,
            tonic::Code::PermissionDenied,
            "this is another cluster's unlock key, or the key file is damaged",
            "where another manager runs: `bulkhead cluster unlock-key show`",
        ),
        error => internal("cannot read its key file", error),
    }
}

async fn leave_as_standby(
    standby: &super::standby::Standby,
    force: bool,
) -> Result<Response<wire::LeaveResponse>, Status> {
    let told = match standby.withdraw().await {
        Err(refusal) if !force => return Err(refusal),
        told => told.is_ok(),
    };
    tracing::info!(target: "audit", told, "this standby has left its cluster");
    standby.left.cancel();
    let name = standby.name();
    Ok(Response::new(wire::LeaveResponse { told, name }))
}

fn actor<T>(request: &Request<T>) -> String {
    match request.extensions().get::<ConnectInfo>() {
        Some(ConnectInfo {
            peer: Peer::Local { uid },
            ..
        }) => format!("local/{uid}"),
        _ => "local".to_owned(),
    }
}

fn invalid(message: impl AsRef<str>, hint: &str) -> Status {
    refuse(Code::Invalid, tonic::Code::InvalidArgument, message, hint)
}

fn taken(stage: Stage) -> Status {
    let (code, message, hint) = match stage {
        Stage::Locked(_) => (
            Code::Locked,
            "this manager waits for its unlock key",
            "`bulkhead cluster unlock`; where the key is lost for good: `bulkhead cluster leave --force`, and join again",
        ),
        Stage::Entering { .. } => (
            Code::NotReady,
            "this manager is entering a cluster now",
            "wait for it; a wait for approval ends with `bulkhead node approve` or `node reject` at the cluster",
        ),
        Stage::Empty { .. } | Stage::Member(_) | Stage::Standby(_) => (
            Code::AlreadyMember,
            "this manager is in a cluster already",
            "`bulkhead cluster leave` first, or use another data folder",
        ),
    };
    refuse(code, tonic::Code::FailedPrecondition, message, hint)
}

/// Where to listen, and what to tell others, of which the latter may be derived from the former.
fn addresses(listen: &str, advertise: &str) -> Result<(String, String), Status> {
    let listen = if listen.is_empty() {
        format!("0.0.0.0:{}", limits::MANAGER_PORT)
    } else {
        listen.to_owned()
    };
    let address: std::net::SocketAddr = listen.parse().map_err(|_| {
        invalid(
            format!("{listen} is no address to listen on"),
            "give --listen IP:PORT",
        )
    })?;
    let advertise = if advertise.is_empty() {
        listen.clone()
    } else {
        advertise.to_owned()
    };
    if address.ip().is_unspecified() && advertise == listen {
        return Err(invalid(
            "other nodes cannot reach this manager at an unspecified address",
            "give --advertise HOST:PORT as others reach it",
        ));
    }
    match advertise.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && host.len() <= 255 && port.parse::<u16>().is_ok() => {
            Ok((listen, advertise))
        }
        _ => Err(invalid(
            format!("{advertise} is not HOST:PORT"),
            "give --advertise HOST:PORT as others reach it",
        )),
    }
}

fn order(request: wire::InitRequest) -> Result<Order, Status> {
    let (listen, advertise) = addresses(&request.listen, &request.advertise)?;
    let operator = match request.operator_csr.as_slice() {
        [] => None,
        csr => Some(first_operator(csr, &request.operator_id, request.operator_name)?),
    };
    Ok(Order {
        listen,
        advertise,
        lab: request.lab,
        autolock: request.autolock,
        name: request.name,
        operator,
    })
}

fn forgettable(forget: &[String]) -> Result<(), Status> {
    match forget.len() > limits::FORGET_ENTRIES {
        true => Err(invalid(
            format!("{} nodes are to be forgotten", forget.len()),
            "name fewer at once, and remove the others afterwards: `bulkhead node rm`",
        )),
        false => Ok(()),
    }
}

fn restore_order(asked: wire::RestoreOrder, actor: String) -> Result<restore::Order, Status> {
    let (listen, advertise) = addresses(&asked.listen, &asked.advertise)?;
    forgettable(&asked.forget)?;
    Ok(restore::Order {
        listen,
        advertise,
        name: asked.name,
        forget: asked.forget,
        operator: first_operator(&asked.operator_csr, &asked.operator_id, asked.operator_name)?,
        actor,
    })
}

/// An operator that a cluster begins with.
fn first_operator(csr: &[u8], id: &[u8], name: String) -> Result<FirstOperator, Status> {
    let key = csr::public_key(csr).map_err(|error| {
        refuse(
            Code::BadCertificateRequest,
            tonic::Code::InvalidArgument,
            error.to_string(),
            "send a PKCS#10 request of a P-256 key, with nothing asked for",
        )
    })?;
    let node = NodeId::try_from(id)
        .map_err(|error| invalid(error.to_string(), "send an operator id of 16 bytes"))?;
    Ok(FirstOperator { node, name, key })
}

/// What a join is asked to do.
pub(super) struct JoinOrder {
    pub(super) ticket: Ticket,
    pub(super) addresses: Vec<String>,
    pub(super) listen: String,
    pub(super) advertise: String,
    pub(super) name: String,
}

impl JoinOrder {
    pub(super) fn parse(request: &wire::JoinRequest) -> Result<Self, Status> {
        let (listen, advertise) = addresses(&request.listen, &request.advertise)?;
        let ticket = request.ticket.trim().parse::<Ticket>().map_err(|error| {
            refuse(
                Code::BadTicket,
                tonic::Code::InvalidArgument,
                error.to_string(),
                "copy the ticket whole, or make a new one: bulkhead cluster ticket create --role manager",
            )
        })?;
        Ok(JoinOrder {
            ticket,
            addresses: request.addresses.clone(),
            listen,
            advertise,
            name: request.name.clone(),
        })
    }
}

/// Enrols, starts as a member and waits until it votes, or as a standby; the last step says how it ended.
pub(super) async fn join_cluster(
    program: &Arc<Program>,
    order: JoinOrder,
    steps: mpsc::Sender<JoinProgress>,
) -> Option<Stage> {
    let enrolment = Enrolment {
        ticket: order.ticket,
        addresses: order.addresses,
        role: program.role,
        description: describe(),
        listen: order.listen.clone(),
        advertise: order.advertise.clone(),
        name: order.name,
    };
    let (told, telling) = mpsc::channel(STEPS);
    let joining = async {
        let joining = join::enrol(enrolment, &program.attempts, &*program.machine.clock, told);
        // It may wait for an operator, for days.
        tokio::select! {
            biased;
            () = program.stop.cancelled() => None,
            joined = joining => Some(joined),
        }
    };
    let enrolled = match tokio::join!(joining, tell(program, telling, &steps)) {
        (Some(Ok(enrolled)), ()) => enrolled,
        (Some(Err(error)), ()) => {
            tracing::warn!(error = chain(&error), "not joined");
            return None;
        }
        (None, ()) => return None,
    };
    let say = async |step: &str, state: StepState, detail: String, hint: &str, node: Option<NodeId>| {
        let step = JoinProgress {
            step: step.to_owned(),
            state: state.into(),
            detail,
            hint: hint.to_owned(),
            node_id: node.map(NodeId::to_wire).unwrap_or_default(),
            ..JoinProgress::default()
        };
        let _gone = steps.send(step).await; // whoever asked may have left; the join goes on
    };
    let name = enrolled.name.clone();
    let keys = init::keys_of_joiner(program, enrolled, order.listen, order.advertise);
    let started = match (program.role, keys) {
        (_, Err(error)) => Err(error),
        (bulkhead_proto::Role::Standby, Ok(keys)) => program.stand_by(keys).map(Stage::Standby),
        (_, Ok(keys)) => {
            let detail = "receives the log and the key ring".to_owned();
            say("raft", StepState::Started, detail, "", None).await;
            program.start(keys).await.map(Stage::Member)
        }
    };
    match started {
        Ok(Stage::Member(member)) => {
            super::admission::become_voter(&member, &program.stop).await;
            member.until_fresh().await;
            let detail = "this manager votes".to_owned();
            say("raft", StepState::Done, detail, "", Some(member.node())).await;
            Some(Stage::Member(member))
        }
        Ok(Stage::Standby(standby)) => {
            let detail = format!("waits for 'bulkhead node promote {name}'");
            say("standby", StepState::Done, detail, "", Some(standby.node())).await;
            Some(Stage::Standby(standby))
        }
        Ok(stage @ (Stage::Empty { .. } | Stage::Entering { .. } | Stage::Locked(_))) => Some(stage),
        Err(error) => {
            let error = chain(&error);
            tracing::error!(error, "not joined");
            let hint = "mend that, empty the data folder, and join with a new ticket";
            say("raft", StepState::Failed, error, hint, None).await;
            None
        }
    }
}

/// Passes the steps on; what is waited for shows in the status, too.
async fn tell(program: &Program, mut from: mpsc::Receiver<JoinProgress>, to: &mpsc::Sender<JoinProgress>) {
    while let Some(step) = from.recv().await {
        program.stage.entering(match step.state() {
            StepState::Waiting => format!("waits {}", step.detail),
            _ => String::new(),
        });
        let _gone = to.send(step).await; // whoever asked may have left; the join goes on
    }
}
