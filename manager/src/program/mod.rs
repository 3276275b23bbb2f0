//! The manager program: waits on its local socket until it is told to make or join a cluster, and is a member of it from
//! then on, also after each restart.

mod admission;
mod binding;
mod demotion;
mod description;
mod error;
mod init;
mod leaving;
mod local;
mod member;
mod offline;
mod record;
mod recover;
mod renewal;
mod reseal;
mod restore;
mod stage;
mod standby;
mod take_back;
mod tasks;
mod trust;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_identity::UnlockKey;
use bulkhead_identity::join::Attempts;
use bulkhead_identity::local::{self as socket, LocalConnection};
use bulkhead_identity::store::{KeyFile, StoreError};
use bulkhead_proto::Role;
use bulkhead_proto::wire::JoinRequest;
use bulkhead_raft::transport::RolledBack;
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use zeroize::Zeroizing;

use self::local::{JoinOrder, LocalService};
use self::member::Member;
use self::stage::{Stage, Stages};
use self::standby::Standby;
use crate::refusal::chain;

pub use self::error::ProgramError;
pub use self::member::{Machine, Started};

/// How a manager is started.
#[derive(Debug, Clone)]
pub struct Config {
    /// Its data folder, for this program alone.
    pub data: PathBuf,
    /// Its local socket.
    pub socket: PathBuf,
    /// Join by itself, where it is in no cluster yet.
    pub join: Option<Join>,
    /// Where the unlock key is, for a manager that is to start by itself although autolock is on.
    pub unlock_key_file: Option<PathBuf>,
    /// What it joins as. A program that is in a cluster is what its key file says.
    pub role: Role,
}

/// A join without anybody at a terminal.
#[derive(Debug, Clone)]
pub struct Join {
    /// Managers, `host:port`.
    pub addresses: Vec<String>,
    /// Where the ticket will be.
    pub ticket_file: PathBuf,
    /// Where to listen.
    pub listen: String,
    /// What to tell others.
    pub advertise: String,
    /// The wished name.
    pub name: String,
}

/// A ticket file that is not there yet, and a join that failed, are looked at again after this.
const JOIN_RETRY: Duration = Duration::from_secs(1);
/// Local connections that wait to be served.
const BACKLOG: usize = 64;
/// How long a manager that ends waits for the answers to what was proposed here; after a hand-over it takes milliseconds.
const SETTLE: Duration = Duration::from_secs(1);
/// Bytes of a file with a ticket or an unlock key.
const TEXT_FILE_BYTES: u64 = 4_096;

/// What one program is made of.
pub(crate) struct Program {
    machine: Machine,
    /// What it joins as: a manager or a standby.
    role: Role,
    stage: Arc<Stages>,
    attempts: Attempts,
    work: Work,
    stop: CancellationToken,
    /// Why the program must end.
    failed: mpsc::Sender<ProgramError>,
}

/// Work that the program owns and ends with it.
struct Work(Mutex<JoinSet<()>>);

impl Work {
    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let mut set = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while set.try_join_next().is_some() {} // what ended is forgotten
        set.spawn(work);
    }

    async fn end(&self) {
        let mut set = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        while set.join_next().await.is_some() {}
    }
}

/// Runs a manager until `stop`.
///
/// # Errors
/// [`ProgramError`], with its exit code.
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), ProgramError> {
    run_on(Machine::real(config.data.clone()), config, stop).await
}

/// Runs a manager on this machine until `stop`.
///
/// # Errors
/// [`ProgramError`], with its exit code.
pub async fn run_on(machine: Machine, config: Config, stop: CancellationToken) -> Result<(), ProgramError> {
    let incoming = socket::listen(&config.socket).map_err(|source| match source.kind() {
        std::io::ErrorKind::AddrInUse => ProgramError::InUse(config.data.clone()),
        _ => ProgramError::Socket {
            path: config.socket.clone(),
            source,
        },
    })?;
    let (failed, mut failures) = mpsc::channel(4);
    let attempts = Attempts::kept(&machine.joining(), config.role);
    let program = Arc::new(Program {
        machine,
        role: config.role,
        stage: Arc::new(Stages::new()),
        attempts,
        work: Work(Mutex::default()),
        stop: stop.clone(),
        failed,
    });
    resume(&program, config.unlock_key_file.as_deref()).await?;
    if matches!(program.stage.view(), Stage::Empty { .. }) {
        program.work.spawn(join_by_itself(program.clone(), config.join));
    } else {
        // It ended between the key file and the end of its wait.
        program.attempts.forget();
    }
    program.work.spawn(serve_local(program.clone(), incoming));
    tracing::info!(socket = %config.socket.display(), "waiting on the local socket");
    let ended = tokio::select! {
        biased;
        () = stop.cancelled() => Ok(()),
        error = failures.recv() => error.map_or(Ok(()), Err),
    };
    stop.cancel();
    program.work.end().await;
    ended
}

/// Goes on as the member that the key file says, if there is one. A locked one that no key at hand opens waits.
async fn resume(program: &Arc<Program>, unlock_key_file: Option<&Path>) -> Result<(), ProgramError> {
    let path = program.machine.keys();
    let unlock = unlock_key_file.and_then(unlock_key);
    let keys = match KeyFile::open(&path, unlock.as_ref()) {
        Err(error @ StoreError::WrongUnlockKey { .. }) => {
            tracing::error!(%error, "the unlock key's file is of no use");
            KeyFile::load(&path)
        }
        opened => opened,
    };
    match keys {
        Ok(keys) => {
            go_on_as(program.clone(), keys).await?;
        }
        Err(StoreError::Missing(_)) => {}
        Err(StoreError::Locked(locked)) => {
            tracing::warn!(
                node = locked.name,
                unlock_key = locked.generation,
                "locked: `bulkhead cluster unlock`"
            );
            program.stage.locked(locked);
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// Goes on as the member or standby that the key file says.
fn go_on_as(program: Arc<Program>, keys: KeyFile) -> BoxFuture<'static, Result<(), ProgramError>> {
    async move {
        let stage = match keys.subject().role {
            Role::Standby => Stage::Standby(program.stand_by(keys)?),
            Role::Manager | Role::Worker | Role::Operator => Stage::Member(program.go_on(keys).await?),
        };
        program.stage.is(stage);
        Ok(())
    }
    .boxed()
}

/// The unlock key in a file. A bad one is not fatal: the program then waits for a person.
fn unlock_key(path: &Path) -> Option<UnlockKey> {
    let file = path.display();
    let Some(text) = read_text(path) else {
        tracing::error!(%file, "there is no unlock key in this file");
        return None;
    };
    let parsed = text.parse::<UnlockKey>();
    parsed
        .inspect_err(|error| tracing::error!(%file, %error, "the unlock key's file is of no use"))
        .ok()
}

/// Why a member ends.
enum End {
    Stop,
    Left,
    Demoted,
    Recover(recover::Order),
    /// Its store is older than what others remember of it.
    RolledBack(RolledBack),
    Failure(ProgramError),
}

impl Program {
    /// Starts as a member that was one before, and becomes a voter again if it is none. One whose store is lost comes
    /// back as a new member.
    async fn go_on(self: &Arc<Self>, keys: KeyFile) -> Result<Arc<Member>, ProgramError> {
        let lock = keys.lock.clone();
        let member = match self.start(keys).await {
            Err(ProgramError::Replica(lost)) if lost.is_loss() => {
                let keys = KeyFile::open(&self.machine.keys(), lock.as_ref())?;
                self.start(take_back::take_back(&self.machine, keys, chain(&lost)).await?)
                    .await?
            }
            started => started?,
        };
        let (joining, stop) = (member.clone(), self.stop.clone());
        self.work
            .spawn(async move { admission::become_voter(&joining, &stop).await });
        Ok(member)
    }

    /// Starts as a member and looks after it until the program ends.
    async fn start(self: &Arc<Self>, keys: KeyFile) -> Result<Arc<Member>, ProgramError> {
        let local = LocalService::new(self.clone());
        let stop = self.stop.child_token();
        let (recover, mut recoveries) = mpsc::channel(1);
        let (member, mut tasks) = Member::start(self.machine.clone(), keys, local, recover, stop).await?;
        tracing::info!(node.id = %member.node(), raft.member = member.replica.member(), "a member of the cluster");
        let renewing = (member.clone(), tasks.stop());
        tasks.spawn("renewal", async move {
            renewal::renew(&renewing.0, &renewing.1).await
        });
        let following = (member.clone(), tasks.stop());
        tasks.spawn(
            "trust",
            async move { trust::follow(&following.0, &following.1).await },
        );
        let resealing = (member.clone(), tasks.stop());
        tasks.spawn("resealing", async move {
            reseal::follow(&resealing.0, &resealing.1).await
        });
        let demoting = (member.clone(), tasks.stop());
        tasks.spawn("demotion", async move {
            demotion::follow(&demoting.0, &demoting.1).await
        });
        let (program, watched) = (self.clone(), member.clone());
        self.work.spawn(async move {
            let end = tokio::select! {
                biased;
                () = program.stop.cancelled() => End::Stop,
                () = watched.left.cancelled() => End::Left,
                () = watched.demoted.cancelled() => End::Demoted,
                Some(order) = recoveries.recv() => End::Recover(order),
                found = watched.witness.rolled_back() => End::RolledBack(found),
                fatal = watched.replica.stopped() => End::Failure(ProgramError::Stopped(fatal)),
                name = tasks.ended_early() => End::Failure(ProgramError::Piece(name)),
            };
            let (left, demoted) = (matches!(end, End::Left), matches!(end, End::Demoted));
            let (mut recovery, mut lost) = (None, None);
            match end {
                // Whatever was asked to end by the stop may be seen here first.
                End::Failure(error) if !program.stop.is_cancelled() => {
                    let _ending = program.failed.try_send(error); // a full queue has a reason to end already
                }
                End::Recover(order) => recovery = Some(order),
                End::RolledBack(found) => {
                    program.stage.is(Stage::Entering {
                        detail: "its store was put back from a copy: it asks to be taken back".to_owned(),
                    });
                    lost = Some(found);
                }
                End::Stop | End::Left | End::Demoted | End::Failure(_) => {}
            }
            if !left && !demoted && watched.replica.leadership().borrow().leading.is_some() {
                watched.replica.hand_over(None).await;
                // Before the others are not heard any more: a caller would otherwise wait for as long as the end takes.
                watched.replica.settled(SETTLE).await;
            }
            tasks.end().await;
            watched.replica.shutdown().await;
            let lock = watched.keys(|keys| keys.lock.clone());
            drop(watched); // its store is let go
            if left {
                program.stage.left(&program.machine.forget());
            }
            if let Some(order) = recovery {
                recover::carry_out(&program, order, lock.as_ref()).await;
            }
            if demoted {
                program.is_standby_now().await;
            }
            if let Some(lost) = lost {
                program.begin_anew(lost, lock.as_ref()).await;
            }
        });
        Ok(member)
    }

    /// Goes on as a new member, whose store holds nothing yet.
    async fn begin_anew(self: &Arc<Self>, lost: RolledBack, lock: Option<&UnlockKey>) {
        let begun = async {
            let keys = KeyFile::open(&self.machine.keys(), lock)?;
            let keys = take_back::take_back(&self.machine, keys, lost.to_string()).await?;
            go_on_as(self.clone(), keys).await
        };
        if let Err(error) = begun.await {
            let _ending = self.failed.try_send(error); // a full queue has a reason to end already
        }
    }

    /// The manager's key file gives way to the standby's; its store goes with the first step as one.
    async fn is_standby_now(self: &Arc<Self>) {
        let machine = &self.machine;
        let keys = KeyFile::load(&machine.next_keys()).map_err(ProgramError::from);
        let renamed = std::fs::rename(machine.next_keys(), machine.keys());
        let resumed = match (keys, renamed) {
            (Ok(keys), Ok(())) => go_on_as(self.clone(), keys).await,
            (Err(error), _) => Err(error),
            (_, Err(source)) => Err(ProgramError::Folder {
                path: machine.data.clone(),
                source,
            }),
        };
        if let Err(error) = resumed {
            let _ending = self.failed.try_send(error); // a full queue has a reason to end already
        }
    }

    /// Waits as a standby until the program ends, it is promoted, or it left.
    fn stand_by(self: &Arc<Self>, keys: KeyFile) -> Result<Arc<Standby>, ProgramError> {
        let standby = Arc::new(Standby::new(self.machine.clone(), keys)?);
        tracing::info!(node.id = %standby.node(), "a standby of the cluster");
        let (program, waiting) = (self.clone(), standby.clone());
        self.work.spawn(async move {
            let end = tokio::select! {
                biased;
                () = program.stop.cancelled() => return,
                end = waiting.run() => end,
            };
            match end {
                standby::End::Left => program.stage.left(&program.machine.forget()),
                standby::End::Promoted(keys) => {
                    if let Err(error) = go_on_as(program.clone(), *keys).await {
                        let _ending = program.failed.try_send(error); // a full queue has a reason to end already
                    }
                }
            }
        });
        Ok(standby)
    }
}

/// Hands each local connection to whoever serves it now: the member with its whole API, or the program alone.
async fn serve_local<S>(program: Arc<Program>, mut incoming: S)
where
    S: futures::Stream<Item = std::io::Result<LocalConnection>> + Unpin + Send + 'static,
{
    let (waiting, connections) = mpsc::channel(BACKLOG);
    let server = Server::builder()
        .add_service(LocalService::new(program.clone()).into_server())
        .serve_with_incoming_shutdown(
            ReceiverStream::new(connections).map(Ok::<_, std::io::Error>),
            program.stop.clone().cancelled_owned(),
        );
    program.work.spawn(async move {
        if let Err(error) = server.await {
            tracing::error!(error = crate::refusal::chain(&error), "the local server failed");
        }
    });
    loop {
        let connection = tokio::select! {
            biased;
            () = program.stop.cancelled() => return,
            connection = incoming.next() => connection,
        };
        let Some(Ok(connection)) = connection else { return };
        let server = match program.stage.view() {
            Stage::Member(member) => member.local.clone(),
            Stage::Empty { .. } | Stage::Entering { .. } | Stage::Locked(_) | Stage::Standby(_) => {
                waiting.clone()
            }
        };
        // A caller that finds the queue full is turned away; it tries again.
        let _full = server.try_send(connection);
    }
}

/// Goes on with a join that waited for approval when the program ended; then joins with the ticket in a file, as soon as
/// it is there, and again until it worked.
async fn join_by_itself(program: Arc<Program>, join: Option<Join>) {
    while let Some(request) = next_request(&program, join.as_ref()) {
        if let Some(request) = request
            && try_once(&program, &request).await
        {
            return;
        }
        tokio::select! {
            biased;
            () = program.stop.cancelled() => return,
            () = sleep(JOIN_RETRY) => {}
        }
    }
}

/// What to join with now, if it is there; nothing once there is nothing to wait for.
fn next_request(program: &Program, join: Option<&Join>) -> Option<Option<JoinRequest>> {
    if let Some(pending) = program.attempts.pending() {
        return Some(Some(pending));
    }
    let join = join?;
    Some(read_text(&join.ticket_file).map(|ticket| JoinRequest {
        ticket: ticket.to_string(),
        addresses: join.addresses.clone(),
        listen: join.listen.clone(),
        advertise: join.advertise.clone(),
        name: join.name.clone(),
    }))
}

/// One try; whether there is nothing more to try.
async fn try_once(program: &Arc<Program>, request: &JoinRequest) -> bool {
    let order = match JoinOrder::parse(request) {
        Ok(order) => order,
        Err(status) => {
            tracing::error!(reason = status.message(), "cannot join");
            return true;
        }
    };
    let Ok(entering) = program.stage.enter() else {
        return true;
    };
    let (steps, mut progress) = mpsc::channel(BACKLOG);
    let joined = local::join_cluster(program, order, steps);
    let told = async {
        while let Some(step) = progress.recv().await {
            tracing::info!(
                step = step.step,
                detail = step.detail,
                hint = step.hint,
                "joining"
            );
        }
    };
    match tokio::join!(joined, told) {
        (Some(stage), ()) => {
            entering.done(stage);
            true
        }
        (None, ()) => false, // the stage falls back
    }
}

/// The text of a file with a secret in it, once it is there and whole.
fn read_text(path: &Path) -> Option<Zeroizing<String>> {
    use std::io::Read as _;
    let mut text = Zeroizing::new(String::new());
    let file = std::fs::File::open(path).ok()?;
    file.take(TEXT_FILE_BYTES).read_to_string(&mut text).ok()?;
    Some(text).filter(|text| !text.trim().is_empty())
}
