//! The program: in no cluster until it joins one, then a member, until its launcher or a signal ends it.

use crate::config::Config;
use crate::description::description;
use crate::keep::{Keep, KeepError};
use crate::local::{self, Command, Standing, Steps, refuse};
use crate::member::{self, MemberError};
use crate::runtime::{Launcher, Runtime, RuntimeError};
use bulkhead_identity::join::{self, Attempts, Enrolment};
use bulkhead_identity::seam::{Clock, Entropy, SystemClock, SystemEntropy};
use bulkhead_identity::ticket::Ticket;
use bulkhead_launcher::connection::Connection;
use bulkhead_launcher::message::{Event, TaskSignal, TaskState};
use bulkhead_proto::{Code, Role, limits, wire};
use std::future::Future;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

/// How often to look for the ticket file, and first wait after a failed join by itself.
const LOOK: Duration = Duration::from_millis(500);
/// Longest wait after a failed join by itself.
const LONGEST: Duration = Duration::from_secs(15);
/// How long the last answers on the local socket may take.
const DRAIN: Duration = Duration::from_secs(1);
/// How long tasks of an earlier membership may take to go.
const CLEAR: Duration = Duration::from_secs(30);
/// Steps of a join on their way to whoever asked.
const STEPS: usize = 16;

/// Why the program ends.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The launcher's socket.
    #[error("the launcher's socket cannot be used")]
    Launcher(#[source] io::Error),
    /// The launcher says no.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The local socket.
    #[error("the local socket cannot be opened")]
    Local(#[source] io::Error),
    /// The local socket broke.
    #[error("the local socket failed")]
    Served(#[from] tonic::transport::Error),
    /// The key file.
    #[error(transparent)]
    Keep(#[from] KeepError),
    /// The member.
    #[error(transparent)]
    Member(#[from] MemberError),
    /// What an earlier membership left.
    #[error("could not remove the records of an earlier membership")]
    Clear(#[source] io::Error),
}

/// What a worker needs of the machine that it runs on.
#[derive(Debug)]
pub struct Machine {
    /// Its clocks.
    pub clock: Arc<dyn Clock>,
    /// Its random source.
    pub entropy: Arc<dyn Entropy>,
    /// Its launcher.
    pub launcher: Launcher,
}

/// Runs until `stop`, until the launcher closes its socket, or until the node has left its cluster; the launcher starts
/// it again then. Tasks run on under their supervisors.
pub async fn run(
    config: Config,
    launcher: Connection,
    stop: impl Future<Output = ()>,
) -> Result<(), ProgramError> {
    let machine = Machine {
        clock: Arc::new(SystemClock::start()),
        entropy: Arc::new(SystemEntropy),
        launcher: Launcher::connected(launcher).map_err(ProgramError::Launcher)?,
    };
    run_on(machine, config, stop).await
}

/// As [`run`], on this machine.
pub async fn run_on(
    machine: Machine,
    config: Config,
    stop: impl Future<Output = ()>,
) -> Result<(), ProgramError> {
    let Machine {
        clock,
        entropy,
        launcher,
    } = machine;
    let Launcher {
        runtime,
        driver,
        events,
    } = launcher;
    let driver = tokio::spawn(driver);
    let (standing, watched) = watch::channel(Standing::Uninitialised);
    let (drain, drained) = oneshot::channel::<()>();
    let drained = async { drop(drained.await) };
    let (server, commands) = local::serve(&config.socket(), watched, drained).map_err(ProgramError::Local)?;
    let mut server = std::pin::pin!(server);
    let ended = tokio::select! {
        biased;
        () = stop => {
            tracing::info!("ending as asked; tasks run on");
            Ok(())
        }
        driven = driver => match driven {
            Ok(Err(error)) => Err(ProgramError::Launcher(error)),
            Ok(Ok(())) | Err(_) => {
                tracing::info!("the launcher has closed its socket; ending, tasks run on");
                Ok(())
            }
        },
        served = &mut server => Err(served.err().map_or_else(
            || ProgramError::Local(io::ErrorKind::BrokenPipe.into()),
            ProgramError::Served,
        )),
        lived = live(config, Parts { runtime, events, clock, entropy }, &standing, commands) => lived,
    };
    drop(drain);
    // A client that reads no answer is not waited for.
    let _ = timeout(DRAIN, server).await;
    ended
}

/// What a member is made of that is the machine's.
struct Parts {
    runtime: Runtime,
    events: mpsc::Receiver<Event>,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
}

async fn live(
    config: Config,
    machine: Parts,
    standing: &watch::Sender<Standing>,
    mut commands: mpsc::Receiver<Command>,
) -> Result<(), ProgramError> {
    let facts = machine.runtime.probe().await?;
    let mut description = description(&facts);
    if !config.publish_address.is_unspecified() {
        description.publish_address = config.publish_address.to_string();
    }
    let (keep, joined) = match Keep::open(&config.key_file())? {
        Some(keep) => {
            // It may have ended between the key file and the end of its wait for approval.
            Attempts::kept(&config.joining_file(), Role::Worker).forget();
            (keep, None)
        }
        None => {
            clear(&config, &machine.runtime).await?;
            let clock = machine.clock.as_ref();
            Box::pin(uninitialised(
                &config,
                &description,
                clock,
                standing,
                &mut commands,
            ))
            .await?
        }
    };
    let parts = member::Parts {
        config,
        description,
        runtime: machine.runtime,
        events: machine.events,
        clock: machine.clock,
        entropy: machine.entropy,
    };
    Ok(member::run(parts, keep, standing, &mut commands, joined).await?)
}

/// In no cluster nothing may run, and what was known of one is void.
async fn clear(config: &Config, runtime: &Runtime) -> Result<(), ProgramError> {
    match std::fs::remove_dir_all(config.records()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(ProgramError::Clear(error)),
        Ok(()) | Err(_) => {}
    }
    let cleared = timeout(CLEAR, async {
        loop {
            let tasks = runtime.tasks().await?;
            if tasks.is_empty() {
                return Ok(());
            }
            for task in tasks {
                tracing::warn!(task.id = %task.task, "removing a task that no cluster wants");
                match task.state {
                    TaskState::Exited(_) => runtime.remove(task.task).await?,
                    // It may be starting, or have ended meanwhile: the next round tells.
                    TaskState::Starting | TaskState::Running => {
                        drop(runtime.signal(task.task, TaskSignal::Kill).await);
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    match cleared.await {
        Ok(cleared) => cleared,
        Err(_elapsed) => Err(ProgramError::Clear(io::ErrorKind::TimedOut.into())),
    }
}

/// Waits until the node is admitted. The checklist goes on with the first session.
async fn uninitialised(
    config: &Config,
    description: &wire::NodeDescription,
    clock: &dyn Clock,
    standing: &watch::Sender<Standing>,
    commands: &mut mpsc::Receiver<Command>,
) -> Result<(Keep, Option<Steps>), ProgramError> {
    tracing::info!(socket = %config.socket().display(), "in no cluster; waiting for `bulkhead cluster join` on the local socket");
    let attempts = Attempts::kept(&config.joining_file(), Role::Worker);
    let joiner = Joiner {
        config,
        description,
        clock,
        attempts: &attempts,
        standing,
    };
    let mut by_itself = std::pin::pin!(joiner.join_by_itself());
    loop {
        standing.send_replace(Standing::Uninitialised);
        tokio::select! {
            biased;
            command = commands.recv() => match command {
                None => return Err(MemberError::Ended.into()),
                Some(Command::Leave { answer, .. }) => drop(answer.send(Err(refuse(
                    Code::NotMember,
                    tonic::Code::FailedPrecondition,
                    "this worker is in no cluster",
                    "there is nothing to leave",
                )))),
                Some(Command::Join { request, steps }) => {
                    let mut joined = Box::pin(joiner.enrol(request, Some(steps.clone())));
                    // It may wait for an operator, for days; whoever asks for something else hears so.
                    let joined = loop {
                        tokio::select! {
                            biased;
                            joined = &mut joined => break joined?,
                            command = commands.recv() => turn_away(command.ok_or(MemberError::Ended)?).await,
                        }
                    };
                    if let Some(keep) = joined {
                        return Ok((keep, Some(steps)));
                    }
                }
            },
            keep = &mut by_itself => return Ok((keep?, None)),
        }
    }
}

/// Says no while a join is under way.
async fn turn_away(command: Command) {
    let refusal = refuse(
        Code::NotReady,
        tonic::Code::FailedPrecondition,
        "this worker is entering a cluster now",
        "wait for it; a wait for approval ends with `bulkhead node approve` or `node reject` at the cluster",
    );
    match command {
        Command::Join { steps, .. } => drop(steps.send(Err(refusal)).await), // whoever asked may have left
        Command::Leave { answer, .. } => drop(answer.send(Err(refusal))),
    }
}

/// What joins are made from.
#[derive(Clone, Copy)]
struct Joiner<'a> {
    config: &'a Config,
    description: &'a wire::NodeDescription,
    clock: &'a dyn Clock,
    attempts: &'a Attempts,
    standing: &'a watch::Sender<Standing>,
}

impl Joiner<'_> {
    /// One join. `None` when it failed, which the steps have told.
    async fn enrol(
        self,
        request: wire::JoinRequest,
        steps: Option<Steps>,
    ) -> Result<Option<Keep>, ProgramError> {
        let refused = |code, message: String, hint: &str| {
            tracing::warn!(message, hint, "could not join");
            refuse(code, tonic::Code::FailedPrecondition, message, hint)
        };
        let failed = match request.ticket.parse::<Ticket>() {
            Err(error) => refused(
                Code::BadTicket,
                error.to_string(),
                "copy it whole, from `bulkhead cluster ticket create --role worker`",
            ),
            Ok(ticket) => {
                self.standing.send_replace(Standing::Joining {
                    detail: "is being admitted".into(),
                });
                let (to, from) = mpsc::channel(STEPS);
                // Without a wish it is called after its host, which its description says.
                let wished = Some(request.name).filter(|name| !name.is_empty());
                let enrolment = Enrolment {
                    role: Role::Worker,
                    ticket,
                    addresses: request.addresses,
                    name: wished.or_else(|| self.config.name.clone()).unwrap_or_default(),
                    description: self.description.clone(),
                    listen: String::new(),
                    advertise: String::new(),
                };
                let (enrolled, ()) = tokio::join!(
                    join::enrol(enrolment, self.attempts, self.clock, to),
                    local::forward(from, steps.clone(), self.standing)
                );
                match enrolled {
                    Ok(enrolled) => {
                        let keep = Keep::create(&self.config.key_file(), enrolled)?;
                        self.attempts.forget();
                        return Ok(Some(keep));
                    }
                    Err(error) => refused(error.code(), error.to_string(), &error.hint()),
                }
            }
        };
        self.standing.send_replace(Standing::Uninitialised);
        if let Some(steps) = steps {
            drop(steps.send(Err(failed)).await); // whoever asked may have left
        }
        Ok(None)
    }

    /// Goes on with a join that waited for approval when the program ended; then joins with the ticket file of the command
    /// line, over and over; for ever without one.
    async fn join_by_itself(self) -> Result<Keep, ProgramError> {
        let mut wait = LOOK;
        loop {
            let request = match (self.attempts.pending(), &self.config.ticket_file) {
                (Some(pending), _) => Some(pending),
                (None, None) => return std::future::pending().await,
                (None, Some(file)) => read_ticket(file).map(|ticket| wire::JoinRequest {
                    ticket,
                    addresses: self.config.join.clone(),
                    ..Default::default()
                }),
            };
            if let Some(request) = request {
                if let Some(keep) = Box::pin(self.enrol(request, None)).await? {
                    return Ok(keep);
                }
                wait = (wait * 2).min(LONGEST);
            }
            tokio::time::sleep(wait).await;
        }
    }
}

/// The ticket, once the file is there and has a whole line in it.
fn read_ticket(path: &Path) -> Option<String> {
    let mut text = String::new();
    let file = std::fs::File::open(path).ok()?;
    file.take(limits::TICKET_BYTES as u64 + 2)
        .read_to_string(&mut text)
        .ok()?;
    let ticket = text.trim();
    (!ticket.is_empty()).then(|| ticket.to_owned())
}
