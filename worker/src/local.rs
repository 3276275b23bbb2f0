//! The local socket: how an operator on this machine asks the program for its state, and tells it to join or leave.

use crate::session::Connected;
use bulkhead_identity::{Identity, local};
use bulkhead_proto::code::{CODE_KEY, Code, HINT_KEY};
use bulkhead_proto::{limits, wire};
use std::future::Future;
use std::io;
use std::path::Path;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{AsciiMetadataValue, BinaryMetadataValue};
use tonic::{Request, Response, Status, Streaming};
use wire::local_server::{self, LocalServer};

/// Requests that wait for the program.
const COMMANDS: usize = 4;
/// Steps of a join that wait to be shown.
const STEPS: usize = 16;

/// Where the program stands.
#[derive(Debug, Clone)]
pub enum Standing {
    /// In no cluster.
    Uninitialised,
    /// Being admitted.
    Joining {
        /// How far it came.
        detail: String,
    },
    /// In a cluster.
    Member {
        /// As whom.
        identity: Identity,
        /// The node's name.
        name: String,
        /// With which manager the session is.
        connected: watch::Receiver<Option<Connected>>,
    },
}

/// What the program is told to do.
#[derive(Debug)]
pub enum Command {
    /// Join a cluster.
    Join {
        /// With this ticket, there.
        request: wire::JoinRequest,
        /// Tells the steps; dropping it ends the answer.
        steps: Steps,
    },
    /// Leave the cluster, and tell it.
    Leave {
        /// Even with tasks running.
        force: bool,
        /// The answer.
        answer: oneshot::Sender<Result<wire::LeaveResponse, Status>>,
    },
}

/// The checklist of a join, or the refusal of one.
pub type Steps = mpsc::Sender<Result<wire::JoinProgress, Status>>;

/// A refusal with its stable code and the next step.
pub fn refuse(code: Code, grpc: tonic::Code, message: impl Into<String>, hint: &str) -> Status {
    let mut status = Status::new(grpc, message);
    let metadata = status.metadata_mut();
    metadata.insert(CODE_KEY, AsciiMetadataValue::from_static(code.as_str()));
    metadata.insert_bin(HINT_KEY, BinaryMetadataValue::from_bytes(hint.as_bytes()));
    status
}

#[derive(Debug)]
struct Service {
    standing: watch::Receiver<Standing>,
    commands: mpsc::Sender<Command>,
}

/// Serves the socket until `stop`. Commands come out of the receiver.
pub fn serve<F: Future<Output = ()> + Send + 'static>(
    path: &Path,
    standing: watch::Receiver<Standing>,
    stop: F,
) -> io::Result<(
    impl Future<Output = Result<(), tonic::transport::Error>> + use<F>,
    mpsc::Receiver<Command>,
)> {
    let (commands, told) = mpsc::channel(COMMANDS);
    let incoming = local::listen(path)?;
    let service =
        LocalServer::new(Service { standing, commands }).max_decoding_message_size(limits::MESSAGE_BYTES);
    let server = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, stop);
    Ok((server, told))
}

impl Service {
    async fn tell(&self, command: Command) -> Result<(), Status> {
        self.commands.send(command).await.map_err(|_| ending())
    }
}

fn ending() -> Status {
    refuse(
        Code::NotReady,
        tonic::Code::Unavailable,
        "this worker is ending",
        "try again when it has started anew",
    )
}

#[tonic::async_trait]
impl local_server::Local for Service {
    async fn get_status(
        &self,
        _: Request<wire::GetLocalStatusRequest>,
    ) -> Result<Response<wire::LocalStatus>, Status> {
        Ok(Response::new(status(&self.standing.borrow())))
    }

    async fn init(&self, _: Request<wire::InitRequest>) -> Result<Response<wire::InitResponse>, Status> {
        Err(refuse(
            Code::Unsupported,
            tonic::Code::Unimplemented,
            "a cluster begins on a manager; this program is a worker",
            "run `bulkhead cluster init` with the --socket of a bulkhead-manager",
        ))
    }

    async fn unlock(
        &self,
        _: Request<wire::UnlockRequest>,
    ) -> Result<Response<wire::UnlockResponse>, Status> {
        Err(refuse(
            Code::Unsupported,
            tonic::Code::Unimplemented,
            "a worker is never locked: what it keeps is its own key alone",
            "name the --socket of a bulkhead-manager",
        ))
    }

    type JoinStream = ReceiverStream<Result<wire::JoinProgress, Status>>;

    async fn join(&self, request: Request<wire::JoinRequest>) -> Result<Response<Self::JoinStream>, Status> {
        let (steps, shown) = mpsc::channel(STEPS);
        let request = request.into_inner();
        self.tell(Command::Join { request, steps }).await?;
        Ok(Response::new(ReceiverStream::new(shown)))
    }

    async fn leave(
        &self,
        request: Request<wire::LeaveRequest>,
    ) -> Result<Response<wire::LeaveResponse>, Status> {
        let (answer, answered) = oneshot::channel();
        let force = request.into_inner().force;
        self.tell(Command::Leave { force, answer }).await?;
        Ok(Response::new(answered.await.map_err(|_| ending())??))
    }

    async fn restore(
        &self,
        _: Request<Streaming<wire::RestoreRequest>>,
    ) -> Result<Response<wire::RestoreResponse>, Status> {
        Err(refuse(
            Code::Unsupported,
            tonic::Code::Unimplemented,
            "a cluster is restored on a manager; this program is a worker",
            "run `bulkhead cluster restore` with the --socket of a bulkhead-manager; workers come back by themselves",
        ))
    }

    async fn recover(
        &self,
        _: Request<wire::RecoverRequest>,
    ) -> Result<Response<wire::RecoverResponse>, Status> {
        Err(refuse(
            Code::Unsupported,
            tonic::Code::Unimplemented,
            "a cluster is recovered from a manager; this program is a worker",
            "run `bulkhead cluster recover` with the --socket of a manager that is left; workers come back by themselves",
        ))
    }
}

fn status(standing: &Standing) -> wire::LocalStatus {
    let role = wire::Role::Worker.into();
    let outside = |phase: wire::Phase, detail: &str| wire::LocalStatus {
        phase: phase.into(),
        role,
        detail: detail.into(),
        ..Default::default()
    };
    match standing {
        Standing::Uninitialised => outside(
            wire::Phase::Uninitialised,
            "waits for `bulkhead cluster join --ticket-file FILE ADDRESS`",
        ),
        Standing::Joining { detail } => outside(wire::Phase::Joining, detail),
        Standing::Member {
            identity,
            name,
            connected,
        } => {
            let connected = connected.borrow();
            let subject = identity.subject();
            wire::LocalStatus {
                phase: wire::Phase::Member.into(),
                role,
                node_id: subject.node.to_wire(),
                cluster_id: subject.cluster.to_wire(),
                ready: connected.is_some(),
                detail: match &*connected {
                    Some(connected) => format!("has a session with the manager at {}", connected.manager),
                    None => "looks for a manager; its tasks run on".into(),
                },
                name: name.clone(),
                certificate_not_after: identity.current().certificate.not_after_ms(),
                ..Default::default()
            }
        }
    }
}

/// Steps as the enrolment tells them, for an answer that may also end in a refusal. What is waited for is where the
/// program stands.
pub(crate) async fn forward(
    mut from: mpsc::Receiver<wire::JoinProgress>,
    to: Option<Steps>,
    standing: &watch::Sender<Standing>,
) {
    while let Some(step) = from.recv().await {
        tracing::info!(step = step.step, state = ?step.state(), detail = step.detail, "joining");
        if step.state() == wire::StepState::Waiting {
            let detail = format!("waits {}", step.detail);
            standing.send_replace(Standing::Joining { detail });
        }
        if let Some(to) = &to {
            // Whoever asked may have left; the join goes on.
            drop(to.send(Ok(step)).await);
        }
    }
}
