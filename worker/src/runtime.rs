//! The client of the launcher: requests over the inherited socket, answers matched by number, events beside them.
//!
//! One task owns the socket; [`Runtime`] is a handle to it. Replies may come in any order, so a kill does not wait
//! for an unpack.

use bulkhead_launcher::connection::Connection;
use bulkhead_launcher::message::{
    DiffId, Envelope, Event, FromLauncher, LayerRecord, NodeFacts, Profile, Refusal, Reply, Request, TaskId,
    TaskSignal, TaskSpec, TaskStatus, UnpackLayer,
};
use futures::future::BoxFuture;
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use tokio::io::AsyncWriteExt;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use zeroize::Zeroizing;

/// Requests without an answer. The launcher unpacks and starts side by side; what is more waits here.
const UNANSWERED: usize = 64;
/// Events that may wait for the agent. One that finds no room is dropped: `List` tells the same.
const EVENTS: usize = 1024;
/// Pages of one list: 200 tasks each, far more than a node can run.
const PAGES: usize = 100;

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The launcher says no, and why.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The launcher is gone. It starts this program, so this program ends too.
    #[error("the launcher has closed its socket")]
    Closed,
    /// The answer does not fit the request: the two programs are of different versions.
    #[error("the launcher's answer to {request} does not fit; launcher and worker must be of one version")]
    Unfitting {
        /// The request.
        request: &'static str,
    },
    /// A secret could not be handed over.
    #[error("the task's secrets could not be handed over")]
    Secrets(#[source] io::Error),
}

/// One request on its way to the launcher.
#[derive(Debug)]
pub struct Call {
    /// What is asked.
    pub request: Request,
    /// What goes beside it.
    pub descriptors: Vec<OwnedFd>,
    /// Who waits for the answer; one that is dropped is [`RuntimeError::Closed`] there.
    pub answer: oneshot::Sender<Result<Answer, Refusal>>,
}

/// A reply, and what comes beside it.
pub type Answer = (Reply, Vec<OwnedFd>);

/// The launcher, as a worker has it: a way to ask, what moves the questions, and what it tells by itself.
pub struct Launcher {
    /// Asks.
    pub runtime: Runtime,
    /// Moves the questions. It ends when the launcher is gone, and the worker with it.
    pub driver: BoxFuture<'static, io::Result<()>>,
    /// What it tells by itself.
    pub events: mpsc::Receiver<Event>,
}

impl std::fmt::Debug for Launcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Launcher").finish_non_exhaustive()
    }
}

impl Launcher {
    /// The one at the other end of a socket.
    ///
    /// # Errors
    /// Where the socket cannot be waited on.
    pub fn connected(connection: Connection) -> io::Result<Self> {
        let (runtime, driver, events) = client(connection)?;
        Ok(Self {
            runtime,
            driver: Box::pin(driver.run()),
            events,
        })
    }

    /// One within this process, for simulations: `serve` answers the calls, and may tell of events, until it ends.
    pub fn within<F>(serve: impl FnOnce(mpsc::Receiver<Call>, mpsc::Sender<Event>) -> F) -> Self
    where
        F: Future<Output = io::Result<()>> + Send + 'static,
    {
        let (calls, waiting) = mpsc::channel(UNANSWERED);
        let (told, events) = mpsc::channel(EVENTS);
        Self {
            runtime: Runtime { calls },
            driver: Box::pin(serve(waiting, told)),
            events,
        }
    }
}

/// A handle to the launcher.
#[derive(Debug, Clone)]
pub struct Runtime {
    calls: mpsc::Sender<Call>,
}

/// The other half of [`Runtime`]: moves messages until the launcher closes the socket or all handles are gone.
#[derive(Debug)]
pub struct Driver {
    socket: AsyncFd<Socket>,
    calls: mpsc::Receiver<Call>,
    events: mpsc::Sender<Event>,
}

/// Makes a client of one end of the socket. The driver must be run for anything to happen.
pub fn client(connection: Connection) -> io::Result<(Runtime, Driver, mpsc::Receiver<Event>)> {
    let (calls, waiting) = mpsc::channel(UNANSWERED);
    let (events, seen) = mpsc::channel(EVENTS);
    let driver = Driver {
        socket: register(connection)?,
        calls: waiting,
        events,
    };
    Ok((Runtime { calls }, driver, seen))
}

impl Runtime {
    /// What this machine offers.
    pub async fn probe(&self) -> Result<NodeFacts, RuntimeError> {
        match self.call(Request::Probe, vec![]).await?.0 {
            Reply::Node(facts) => Ok(facts),
            _ => Err(unfitting("Probe")),
        }
    }

    /// Unpacks a layer from its blob.
    pub async fn unpack(&self, layer: UnpackLayer, blob: OwnedFd) -> Result<LayerRecord, RuntimeError> {
        match self.call(Request::UnpackLayer(layer), vec![blob]).await?.0 {
            Reply::Layer(record) => Ok(record),
            _ => Err(unfitting("UnpackLayer")),
        }
    }

    /// Compares an unpacked layer with its recorded tree digest.
    pub async fn verify_layer(&self, diff_id: DiffId) -> Result<LayerRecord, RuntimeError> {
        match self.call(Request::VerifyLayer { diff_id }, vec![]).await?.0 {
            Reply::Layer(record) => Ok(record),
            _ => Err(unfitting("VerifyLayer")),
        }
    }

    /// Deletes an unused layer.
    pub async fn remove_layer(&self, diff_id: DiffId) -> Result<(), RuntimeError> {
        self.done("RemoveLayer", Request::RemoveLayer { diff_id }).await
    }

    /// All unpacked layers.
    pub async fn layers(&self) -> Result<Vec<LayerRecord>, RuntimeError> {
        let mut all: Vec<LayerRecord> = Vec::new();
        for _ in 0..PAGES {
            let after = all.last().map(|record| record.diff_id.clone());
            let Reply::Layers { layers, more } = self.call(Request::Layers { after }, vec![]).await?.0 else {
                return Err(unfitting("Layers"));
            };
            all.extend(layers);
            if !more {
                return Ok(all);
            }
        }
        Err(unfitting("Layers"))
    }

    /// Starts a task; `secrets` in the order of `spec.secrets`. Back once its program was executed.
    pub async fn start(&self, spec: TaskSpec, secrets: &[&[u8]]) -> Result<TaskStatus, RuntimeError> {
        let request = Request::Start(Box::new(spec));
        let reply = if secrets.is_empty() {
            self.call(request, vec![]).await?.0
        } else {
            // One buffer, so that the borrowed values need not outlive the hand-over; it wipes itself.
            let values = Zeroizing::new(secrets.concat());
            let (near, far) = std::os::unix::net::UnixStream::pair().map_err(RuntimeError::Secrets)?;
            near.set_nonblocking(true).map_err(RuntimeError::Secrets)?;
            let mut near = UnixStream::from_std(near).map_err(RuntimeError::Secrets)?;
            let hand_over = async move {
                near.write_all(&values).await // dropping it ends the stream
            };
            // The answer decides: a task whose values did not all arrive is refused, and a far end that has read
            // them may already be closed.
            let (answer, _handed) = tokio::join!(self.call(request, vec![far.into()]), hand_over);
            answer?.0
        };
        match reply {
            Reply::Started(status) => Ok(status),
            _ => Err(unfitting("Start")),
        }
    }

    /// Asks a task to end, or kills it.
    pub async fn signal(&self, task: TaskId, signal: TaskSignal) -> Result<(), RuntimeError> {
        self.done("Signal", Request::Signal { task, signal }).await
    }

    /// One TCP socket inside the task's network namespace, not connected.
    pub async fn socket(&self, task: TaskId) -> Result<OwnedFd, RuntimeError> {
        let (reply, descriptors) = self.call(Request::Sockets { task, count: 1 }, vec![]).await?;
        match (reply, <[OwnedFd; 1]>::try_from(descriptors)) {
            (Reply::Sockets, Ok([socket])) => Ok(socket),
            _ => Err(unfitting("Sockets")),
        }
    }

    /// The sandbox of a running task, as the kernel reports it.
    pub async fn inspect(&self, task: TaskId) -> Result<Profile, RuntimeError> {
        match self.call(Request::Inspect { task }, vec![]).await?.0 {
            Reply::Profile(profile) => Ok(*profile),
            _ => Err(unfitting("Inspect")),
        }
    }

    /// The task's log files, older first.
    pub async fn logs(&self, task: TaskId) -> Result<Vec<OwnedFd>, RuntimeError> {
        match self.call(Request::Logs { task }, vec![]).await? {
            (Reply::Logs, files) if !files.is_empty() && files.len() <= 2 => Ok(files),
            _ => Err(unfitting("Logs")),
        }
    }

    /// All tasks that the launcher knows.
    pub async fn tasks(&self) -> Result<Vec<TaskStatus>, RuntimeError> {
        let mut all: Vec<TaskStatus> = Vec::new();
        for _ in 0..PAGES {
            let after = all.last().map(|status| status.task.clone());
            let Reply::Tasks { tasks, more } = self.call(Request::List { after }, vec![]).await?.0 else {
                return Err(unfitting("List"));
            };
            all.extend(tasks);
            if !more {
                return Ok(all);
            }
        }
        Err(unfitting("List"))
    }

    /// Forgets an ended task.
    pub async fn remove(&self, task: TaskId) -> Result<(), RuntimeError> {
        self.done("Remove", Request::Remove { task }).await
    }

    async fn done(&self, name: &'static str, request: Request) -> Result<(), RuntimeError> {
        match self.call(request, vec![]).await?.0 {
            Reply::Done => Ok(()),
            _ => Err(unfitting(name)),
        }
    }

    async fn call(&self, request: Request, descriptors: Vec<OwnedFd>) -> Result<Answer, RuntimeError> {
        let (answer, answered) = oneshot::channel();
        let call = Call {
            request,
            descriptors,
            answer,
        };
        self.calls.send(call).await.map_err(|_| RuntimeError::Closed)?;
        Ok(answered.await.map_err(|_| RuntimeError::Closed)??)
    }
}

fn unfitting(request: &'static str) -> RuntimeError {
    RuntimeError::Unfitting { request }
}

impl Driver {
    /// Moves messages. Ends without error when the launcher or every handle is gone; requests still unanswered then
    /// fail with [`RuntimeError::Closed`].
    pub async fn run(self) -> io::Result<()> {
        let Driver {
            socket,
            mut calls,
            events,
        } = self;
        let mut unanswered = BTreeMap::new();
        let mut outgoing: Option<(Envelope, Vec<OwnedFd>)> = None;
        let mut next = 0u64;
        loop {
            // Each branch is cancel-safe: readiness is kept, and a call leaves its queue only when it is taken.
            tokio::select! {
                biased;
                ready = socket.readable() => {
                    let received = ready?.try_io(|socket| socket.get_ref().0.receive::<FromLauncher>());
                    match received {
                        Err(_would_block) => {}
                        Ok(message) => match message? {
                            None => return Ok(()),
                            Some((message, descriptors)) => deliver(message, descriptors, &mut unanswered, &events),
                        },
                    }
                }
                ready = socket.writable(), if outgoing.is_some() => {
                    let mut ready = ready?;
                    let Some((envelope, descriptors)) = &outgoing else { continue };
                    let beside: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
                    match ready.try_io(|socket| socket.get_ref().0.send(envelope, &beside)) {
                        Err(_would_block) => {}
                        Ok(Ok(())) => outgoing = None,
                        // Over its limit: nothing was sent, and only this request is at fault.
                        Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidInput => {
                            refuse(&mut unanswered, envelope.id);
                            outgoing = None;
                        }
                        Ok(Err(error)) => return Err(error),
                    }
                }
                call = calls.recv(), if outgoing.is_none() && unanswered.len() < UNANSWERED => {
                    let Some(call) = call else { return Ok(()) };
                    next += 1;
                    unanswered.insert(next, call.answer);
                    outgoing = Some((Envelope { id: next, request: call.request }, call.descriptors));
                }
            }
        }
    }
}

type Unanswered = BTreeMap<u64, oneshot::Sender<Result<Answer, Refusal>>>;

fn deliver(
    message: FromLauncher,
    descriptors: Vec<OwnedFd>,
    unanswered: &mut Unanswered,
    events: &mpsc::Sender<Event>,
) {
    match message {
        FromLauncher::Reply { id, result } => match unanswered.remove(&id) {
            // Who asked may have given up meanwhile; the descriptors close then.
            Some(answer) => drop(answer.send(result.map(|reply| (reply, descriptors)))),
            None => tracing::warn!(id, "the launcher answered a request that was not made"),
        },
        FromLauncher::Event(event) => {
            if events.try_send(event).is_err() {
                tracing::warn!("an event of the launcher found no room; the next listing tells the same");
            }
        }
    }
}

fn refuse(unanswered: &mut Unanswered, id: u64) {
    if let Some(answer) = unanswered.remove(&id) {
        let code = bulkhead_launcher::message::RefusalCode::Invalid;
        let refusal = Refusal::new(
            code,
            "the request is larger than the launcher takes; shorten arguments and environment",
        );
        drop(answer.send(Err(refusal))); // who asked may have given up
    }
}

#[allow(
    deprecated,
    reason = "deprecated for types that may close their descriptor early; a `Socket` owns its own until it is dropped"
)]
fn register(connection: Connection) -> io::Result<AsyncFd<Socket>> {
    AsyncFd::new(Socket(connection))
}

/// Gives tokio the descriptor number that it registers.
#[derive(Debug)]
struct Socket(Connection);

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

#[cfg(test)]
pub(crate) mod tests;
