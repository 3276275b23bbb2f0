//! The program as a member of a cluster: agent, session and renewal, until one of them ends or the node leaves.

use crate::agent::{Agent, AgentError};
use crate::config::Config;
use crate::image::{BlobError, BlobStore};
use crate::keep::Keep;
use crate::local::{Command, Standing, Steps, refuse};
use crate::proxy::Proxy;
use crate::records::{RecordError, Records};
use crate::renewal;
use crate::runtime::{Runtime, RuntimeError};
use crate::session::{Connected, ManagerFetch, Session, Trust};
use crate::trust;
use bulkhead_identity::seam::{Clock, Entropy};
use bulkhead_launcher::message::{Event, TaskState};
use bulkhead_proto::{Code, wire};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::Status;
use wire::dispatcher_client::DispatcherClient;

/// Bytes of image blobs that one node keeps.
const IMAGE_BYTES: u64 = 64 << 30;
/// How long `join` waits for the first session. The node goes on trying after that.
const FIRST_SESSION: Duration = Duration::from_secs(30);
/// How long a manager is waited for that is told that this node leaves.
const WITHDRAW: Duration = Duration::from_secs(15);
/// Messages between session and agent.
const QUEUE: usize = 16;

/// What a member is made of, beside its keys.
#[derive(Debug)]
pub struct Parts {
    /// The command line.
    pub config: Config,
    /// What it says of itself.
    pub description: wire::NodeDescription,
    /// The launcher.
    pub runtime: Runtime,
    /// What the launcher tells by itself.
    pub events: mpsc::Receiver<Event>,
    /// The machine's clocks.
    pub clock: Arc<dyn Clock>,
    /// The machine's random source.
    pub entropy: Arc<dyn Entropy>,
}

/// Why a member cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum MemberError {
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The records cannot be opened.
    #[error(transparent)]
    Records(#[from] RecordError),
    /// The blob store cannot be opened.
    #[error(transparent)]
    Blobs(#[from] BlobError),
    /// The key file cannot be removed.
    #[error("could not remove the key file")]
    Forget(#[source] std::io::Error),
    /// A part of the program ended that should not.
    #[error("a part of this program ended unexpectedly; please report it with this log")]
    Ended,
}

/// Runs until the node has left the cluster, or cannot go on. `joined` is the checklist that waits for a first session.
pub async fn run(
    parts: Parts,
    keep: Keep,
    standing: &watch::Sender<Standing>,
    commands: &mut mpsc::Receiver<Command>,
    joined: Option<Steps>,
) -> Result<(), MemberError> {
    let keep = Arc::new(keep);
    let (connected, _) = watch::channel(None);
    standing.send_replace(Standing::Member {
        identity: keep.identity().clone(),
        name: keep.name(),
        connected: connected.subscribe(),
    });
    let (runtime, entropy) = (parts.runtime.clone(), parts.entropy.clone());
    let key_file = parts.config.key_file();
    let mut running = start(parts, &keep, &connected)?;
    if let Some(steps) = joined {
        let node = keep.identity().subject().node.to_wire();
        running.spawn(first_session(steps, connected.subscribe(), node));
    }
    loop {
        tokio::select! {
            biased;
            ended = running.join_next() => match ended {
                Some(Ok(Ok(Part::Finished))) => {}
                Some(Ok(Err(error))) => return Err(error),
                Some(Ok(Ok(Part::Needed)) | Err(_)) | None => return Err(MemberError::Ended),
            },
            command = commands.recv() => match command {
                None => return Err(MemberError::Ended),
                Some(Command::Join { steps, .. }) => {
                    let refusal = refuse(
                        Code::AlreadyMember,
                        tonic::Code::FailedPrecondition,
                        format!("this worker is the node '{}' of a cluster", keep.name()),
                        "to join another cluster, run `bulkhead cluster leave` on it first",
                    );
                    drop(steps.send(Err(refusal)).await); // whoever asked may have left
                }
                Some(Command::Leave { force, answer }) => match may_leave(&runtime, force, &keep.name()).await {
                    Err(refusal) => drop(answer.send(Err(refusal))),
                    Ok(()) => {
                        let told = match withdraw(&connected, entropy.as_ref()).await {
                            Err(refusal) if !force => {
                                drop(answer.send(Err(refusal)));
                                continue;
                            }
                            told => told.is_ok(),
                        };
                        // First the key: what is left of a membership without one is cleared at the next start.
                        std::fs::remove_file(&key_file).map_err(MemberError::Forget)?;
                        tracing::info!(target: "audit", told, "this node has left its cluster");
                        drop(answer.send(Ok(wire::LeaveResponse { told, name: keep.name() })));
                        return Ok(());
                    }
                },
            },
        }
    }
}

/// How a part of the program ended.
enum Part {
    /// It had done its work.
    Finished,
    /// It should have run on.
    Needed,
}

fn start(
    parts: Parts,
    keep: &Arc<Keep>,
    connected: &watch::Sender<Option<Connected>>,
) -> Result<JoinSet<Result<Part, MemberError>>, MemberError> {
    let config = &parts.config;
    let records = Records::open(&config.records())?;
    let blobs = BlobStore::open(&config.images(), IMAGE_BYTES)?;
    let clock = parts.clock.clone();
    let agent = Agent::new(
        parts.runtime.clone(),
        blobs,
        records,
        ManagerFetch::new(connected.subscribe()),
        Proxy::new(config.publish_address, parts.runtime.clone()),
        move || i64::try_from(clock.wall_millis()).unwrap_or(i64::MAX),
    )?;
    let (inputs, from_session) = mpsc::channel(QUEUE);
    let (to_session, outputs) = mpsc::channel(QUEUE);
    let (managers, mut learned) = watch::channel(keep.managers());
    let (trust, trusted) = watch::channel(Trust::default());
    let session = Session {
        identity: keep.identity().clone(),
        description: parts.description,
        managers,
        trust,
        connected: connected.clone(),
        runtime: parts.runtime,
        known: agent.known(),
        inputs,
        outputs,
        clock: parts.clock.clone(),
    };
    let mut seed = [0; 8];
    // Without randomness workers merely begin at the same manager.
    let _ = parts.entropy.fill(&mut seed);

    let mut running = JoinSet::new();
    running.spawn(async move {
        agent.run(from_session, to_session, parts.events).await?;
        Ok(Part::Needed)
    });
    running.spawn(async move {
        session.run(u64::from_le_bytes(seed)).await;
        Ok(Part::Needed)
    });
    let (keeper, renewing) = (keep.clone(), connected.subscribe());
    let (clock, entropy) = (parts.clock.clone(), parts.entropy.clone());
    let issuer = trusted.clone();
    running.spawn(async move {
        renewal::run(&keeper, renewing, issuer, clock.as_ref(), entropy.as_ref()).await;
        Ok(Part::Needed)
    });
    let (keeper, lost) = (keep.clone(), connected.subscribe());
    running.spawn(async move {
        trust::run(&keeper, trusted, lost, parts.entropy.as_ref()).await;
        Ok(Part::Needed)
    });
    let keeper = keep.clone();
    running.spawn(async move {
        while learned.changed().await.is_ok() {
            let managers = learned.borrow_and_update().clone();
            if let Err(error) = keeper.set_managers(managers) {
                tracing::warn!(error = %crate::session::chain(&error), "the list of managers could not be kept");
            }
        }
        Ok(Part::Needed)
    });
    Ok(running)
}

/// The last step of a join: the first session.
async fn first_session(
    steps: Steps,
    mut connected: watch::Receiver<Option<Connected>>,
    node: Vec<u8>,
) -> Result<Part, MemberError> {
    let step = |state: wire::StepState, detail: String, hint: &str| wire::JoinProgress {
        step: "stream".into(),
        state: state.into(),
        detail,
        hint: hint.into(),
        node_id: node.clone(),
        ..wire::JoinProgress::default()
    };
    let started = step(
        wire::StepState::Started,
        "waits for a session with a manager".into(),
        "",
    );
    drop(steps.send(Ok(started)).await); // whoever asked may have left
    let manager = async {
        let connected = connected.wait_for(Option::is_some).await.ok()?;
        connected.as_ref().map(|connected| connected.manager.clone())
    };
    let last = match timeout(FIRST_SESSION, manager).await.ok().flatten() {
        Some(manager) => step(
            wire::StepState::Done,
            format!("session with the manager at {manager}"),
            "",
        ),
        None => step(
            wire::StepState::Failed,
            format!("no manager began a session within {} s", FIRST_SESSION.as_secs()),
            "the node is admitted and goes on trying; its log says why it does not succeed",
        ),
    };
    drop(steps.send(Ok(last)).await); // as above
    Ok(Part::Finished)
}

/// Asks a manager to remove this node.
async fn withdraw(connected: &watch::Sender<Option<Connected>>, entropy: &dyn Entropy) -> Result<(), Status> {
    let unheard = || {
        refuse(
            Code::NoQuorum,
            tonic::Code::Unavailable,
            "no manager could be told that this node leaves",
            "try again once a manager answers, or leave with --force and remove the node with `bulkhead node rm`",
        )
    };
    let channel = connected.borrow().as_ref().map(|it| it.channel.clone());
    let mut client = DispatcherClient::new(channel.ok_or_else(unheard)?);
    let mut request_id = vec![0; 16];
    entropy.fill(&mut request_id).map_err(|_| unheard())?;
    let asked = client.withdraw(wire::WithdrawRequest { request_id });
    match timeout(WITHDRAW, asked).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => {
            tracing::warn!(%error, "the cluster was not told that this node leaves");
            Err(unheard())
        }
        Err(_) => Err(unheard()),
    }
}

async fn may_leave(runtime: &Runtime, force: bool, name: &str) -> Result<(), Status> {
    if force {
        return Ok(());
    }
    let tasks = runtime.tasks().await.map_err(|error: RuntimeError| {
        refuse(
            Code::Internal,
            tonic::Code::Internal,
            error.to_string(),
            "see this worker's log",
        )
    })?;
    match tasks
        .iter()
        .filter(|task| !matches!(task.state, TaskState::Exited(_)))
        .count()
    {
        0 => Ok(()),
        count => Err(refuse(
            Code::InUse,
            tonic::Code::FailedPrecondition,
            format!("{count} tasks run on the node '{name}'"),
            &format!(
                "move them with `bulkhead node drain {name}`, or end them with `bulkhead cluster leave --force`"
            ),
        )),
    }
}
