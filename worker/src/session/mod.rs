//! The worker's one stream with a manager: signs of life and reports up, assignments and requests down.
//!
//! It decides only whom to speak with and when to give a manager up; what assignments mean is the agent's. A session
//! ends with the first thing that does not fit, and the next one begins with the complete state, so a lost message
//! costs a new session and nothing else.

mod budget;
mod fetch;
mod log_streams;
mod retry;

pub use fetch::ManagerFetch;

use crate::agent::{AssignmentError, Input, Known, Output, Seen};
use crate::runtime::Runtime;
use bulkhead_identity::bundle::ROOTS;
use bulkhead_identity::certificate::CERTIFICATE_BYTES;
use bulkhead_identity::follow::Told;
use bulkhead_identity::seam::Clock;
use bulkhead_identity::{DialError, Identity, tls};
use bulkhead_proto::limits::{self, SESSION_SILENCE};
use bulkhead_proto::wire;
use log_streams::LogStreams;
use retry::Retry;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use wire::dispatcher_client::DispatcherClient;
use wire::session_down::Message as Down;
use wire::session_up::Message as Up;

/// The pace of signs of life that a manager may ask for.
const HEARTBEATS: std::ops::RangeInclusive<Duration> = Duration::from_millis(50)..=limits::WORKER_HEARTBEAT;
/// Messages on their way up. A full queue holds reports back, never signs of life of a stream that still moves.
const QUEUE: usize = 16;
/// Managers of one cluster, and characters of an address.
const MANAGERS: (usize, usize) = (64, 300);

/// The manager that this node has a session with.
#[derive(Debug, Clone)]
pub struct Connected {
    /// Its address, as it was dialled.
    pub manager: String,
    /// The connection, for what is asked beside the stream.
    pub channel: Channel,
}

/// The roots of the cluster as a manager told them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trust {
    /// DER; none while no manager has spoken.
    pub roots: Vec<Vec<u8>>,
    /// Key id of the root that signs now.
    pub issuer: Vec<u8>,
}

impl Trust {
    /// As the decision takes it.
    pub(crate) fn told(&self) -> Told<'_> {
        Told {
            roots: &self.roots,
            former: None,
            issuer: &self.issuer,
        }
    }
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("the address cannot be used")]
    Dial(#[from] DialError),
    #[error("the manager refused")]
    Refused(#[from] Box<tonic::Status>),
    #[error("the manager did not answer in time")]
    Late,
    #[error("the manager closed the stream")]
    Closed,
    #[error("the manager was silent for {} ms", SESSION_SILENCE.as_millis())]
    Silent,
    #[error("the manager sent {0}, which does not fit")]
    Unfitting(&'static str),
    #[error(transparent)]
    Assignments(#[from] AssignmentError),
    #[error("this node has a new certificate")]
    Rekeyed,
    #[error("the agent has ended")]
    AgentEnded,
}

/// What a session is made of.
#[derive(Debug)]
pub struct Session {
    /// Who this node is.
    pub identity: Identity,
    /// What it says of itself.
    pub description: wire::NodeDescription,
    /// Addresses of managers; a session keeps them up to date.
    pub managers: watch::Sender<Vec<wire::ManagerAddress>>,
    /// What the cluster trusts, and which root signs; a session keeps it up to date.
    pub trust: watch::Sender<Trust>,
    /// With whom the session is, for others.
    pub connected: watch::Sender<Option<Connected>>,
    /// For logs.
    pub runtime: Runtime,
    /// What the agent knows.
    pub known: watch::Receiver<Known>,
    /// To the agent.
    pub inputs: mpsc::Sender<Input>,
    /// From the agent.
    pub outputs: mpsc::Receiver<Output>,
    /// For signs of life.
    pub clock: Arc<dyn Clock>,
}

impl Session {
    /// Keeps a session with some manager until the agent ends. `seed` spreads the workers over managers and times.
    pub async fn run(mut self, seed: u64) {
        let mut retry = Retry::new(seed);
        loop {
            let managers: Vec<String> = self
                .managers
                .borrow()
                .iter()
                .map(|one| one.address.clone())
                .collect();
            let mut worked = false;
            match retry.next(&managers) {
                None => tracing::error!("no manager's address is known: join the cluster again"),
                Some(manager) => {
                    let open = retry.open(managers.len());
                    let end = self.attend(manager, open, &mut worked).await;
                    self.connected.send_replace(None);
                    match end {
                        End::AgentEnded => return,
                        End::Rekeyed => {
                            tracing::info!("beginning a new session with the new certificate");
                            retry.stay();
                            continue;
                        }
                        end => tracing::warn!(manager, error = %chain(&end), "the session ended"),
                    }
                }
            }
            let wait = retry.wait(worked, managers.len());
            // What the agent says meanwhile is for no session; a new one is told everything again.
            let sleep = tokio::time::sleep(wait);
            tokio::pin!(sleep);
            loop {
                tokio::select! {
                    biased;
                    () = &mut sleep => break,
                    output = self.outputs.recv() => if output.is_none() { return },
                }
            }
        }
    }

    /// One session. Sets `worked` once the manager was accepted.
    async fn attend(&mut self, manager: &str, open: Duration, worked: &mut bool) -> End {
        // From before the stream is opened: a certificate that comes meanwhile is not the one that it is opened with.
        let rekeyed = self.identity.changed();
        match self.begin(manager, open).await {
            Err(end) => end,
            Ok((stream, welcome)) => {
                *worked = true;
                match self.carry(manager, stream, welcome, rekeyed).await {
                    Err(end) => end,
                    Ok(never) => match never {},
                }
            }
        }
    }

    /// Opens the stream and hears the manager's first word. The agent is not needed for it, but may not be held up.
    async fn begin(&mut self, manager: &str, open: Duration) -> Result<(Stream, wire::Welcome), End> {
        let channel = tls::channel(&self.identity, manager, tls::Expect::AnyManager)?;
        let (up, messages) = mpsc::channel(QUEUE);
        let known = self.known.borrow().clone();
        let hello = Up::Hello(wire::SessionHello {
            description: Some(self.description.clone()),
            seen_epoch: known.seen.epoch,
            seen_index: known.seen.index,
            trusts: self.identity.current().bundle.key_ids(),
            task_ids: known.tasks.iter().map(|task| task.to_wire()).collect(),
        });
        up.try_send(message(hello)).map_err(|_| End::Closed)?;
        let mut client = DispatcherClient::new(channel.clone())
            .max_decoding_message_size(limits::MESSAGE_BYTES)
            .max_encoding_message_size(limits::MESSAGE_BYTES);
        let opened = async move {
            let opened = client.session(ReceiverStream::new(messages)).await;
            let mut down = opened.map_err(Box::new)?.into_inner();
            let first = down.message().await.map_err(Box::new)?.ok_or(End::Closed)?;
            Ok::<_, End>((down, first))
        };
        let opened = timeout(open, opened);
        tokio::pin!(opened);
        let (down, first) = loop {
            tokio::select! {
                biased;
                opened = &mut opened => break opened.map_err(|_| End::Late)??,
                output = self.outputs.recv() => if output.is_none() { return Err(End::AgentEnded) },
            }
        };
        let Some(Down::Welcome(welcome)) = first.message else {
            return Err(End::Unfitting("another first message than a welcome"));
        };
        if welcome.node_id != self.identity.subject().node.as_bytes() {
            return Err(End::Unfitting("another node's welcome"));
        }
        let (seen, got) = (self.known.borrow().seen, seen(&welcome));
        if got < seen {
            return Err(AssignmentError::Stale { seen, got }.into());
        }
        Ok((Stream { up, down, channel }, welcome))
    }

    /// Moves messages until something ends the session.
    async fn carry(
        &mut self,
        manager: &str,
        Stream {
            up,
            mut down,
            channel,
        }: Stream,
        welcome: wire::Welcome,
        mut rekeyed: watch::Receiver<u64>,
    ) -> Result<std::convert::Infallible, End> {
        while self.outputs.try_recv().is_ok() {} // of an earlier session
        tracing::info!(manager, node.name = welcome.name, "session with a manager");
        let mut logs = LogStreams::new(self.runtime.clone(), channel.clone());
        let asked = Duration::from_millis(welcome.heartbeat_ms);
        let pace = if asked.is_zero() {
            limits::WORKER_HEARTBEAT
        } else {
            asked
        };
        let mut heartbeat = tokio::time::interval(pace.clamp(*HEARTBEATS.start(), *HEARTBEATS.end()));
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let mut clock = ClockWatch::default();
        // What the agent has no room for yet; the stream waits meanwhile.
        let mut pending = Some(Input::Welcome(seen(&welcome)));
        self.connected.send_replace(Some(Connected {
            manager: manager.to_owned(),
            channel,
        }));
        loop {
            // Each branch is cancel-safe: a message is taken whole or stays where it is.
            tokio::select! {
                biased;
                _ = heartbeat.tick() => {
                    let now = i64::try_from(self.clock.wall_millis()).unwrap_or(i64::MAX);
                    // No room: nothing has moved since the last one, and silence will end the session.
                    let _ = up.try_send(message(Up::Alive(wire::SignOfLife { now })));
                }
                _ = rekeyed.changed() => return Err(End::Rekeyed),
                room = self.inputs.reserve(), if pending.is_some() => {
                    let room = room.map_err(|_| End::AgentEnded)?;
                    if let Some(input) = pending.take() {
                        room.send(input);
                    }
                    heard = Instant::now(); // it was this side that did not listen
                }
                output = next_output(&up, &mut self.outputs) => {
                    let (room, output) = output?;
                    room.send(message(match output {
                        Output::Status(batch) => Up::Status(batch),
                        Output::Applied(sequence) => Up::Applied(wire::Applied { sequence }),
                        Output::EndSession(error) => return Err(error.into()),
                    }));
                }
                down = down.message(), if pending.is_none() => {
                    heard = Instant::now();
                    let down = down.map_err(Box::new)?.ok_or(End::Closed)?;
                    match down.message {
                        Some(Down::Beat(beat)) => clock.heard(manager, beat.now, self.clock.wall_millis()),
                        Some(Down::Assignments(update)) => pending = Some(Input::Assignments(Box::new(update))),
                        Some(Down::StatusAck(ack)) => pending = Some(Input::Acknowledged(ack.sequence)),
                        Some(Down::Managers(list)) => self.learn(list)?,
                        Some(Down::Logs(request)) => logs.begin(request),
                        Some(Down::LogCancel(cancel)) => logs.cancel(cancel.stream),
                        Some(Down::Welcome(_)) => return Err(End::Unfitting("a second welcome")),
                        None => return Err(End::Unfitting("a message of a kind unknown here")),
                    }
                }
                () = tokio::time::sleep_until(heard + SESSION_SILENCE), if pending.is_none() => return Err(End::Silent),
            }
        }
    }

    fn learn(&self, message: wire::Managers) -> Result<(), End> {
        let list = &message.managers;
        let fits = |address: &str| !address.is_empty() && address.len() <= MANAGERS.1;
        if list.is_empty() || list.len() > MANAGERS.0 || !list.iter().all(|one| fits(&one.address)) {
            return Err(End::Unfitting("an empty or oversized list of managers"));
        }
        let fits = |root: &Vec<u8>| root.len() <= CERTIFICATE_BYTES;
        if message.roots.len() > ROOTS || !message.roots.iter().all(fits) {
            return Err(End::Unfitting("an oversized list of roots"));
        }
        self.managers.send_if_modified(|old| {
            let news = old != list;
            list.clone_into(old);
            news
        });
        let trust = Trust {
            roots: message.roots,
            issuer: message.issuer,
        };
        self.trust.send_if_modified(|old| {
            let news = *old != trust;
            *old = trust;
            news
        });
        Ok(())
    }
}

/// Says once a session that this machine's clock is far off its manager's: certificates are judged by it here.
#[derive(Debug, Default)]
struct ClockWatch {
    said: bool,
}

impl ClockWatch {
    fn heard(&mut self, manager: &str, theirs: i64, ours: u64) {
        let ahead_ms = i64::try_from(ours).unwrap_or(i64::MAX).saturating_sub(theirs);
        if !self.said && u128::from(ahead_ms.unsigned_abs()) > limits::CLOCK_SKEW.as_millis() {
            self.said = true;
            tracing::warn!(
                manager,
                ahead_ms,
                "this machine's clock is far off the manager's: set it"
            );
        }
    }
}

/// An open stream.
struct Stream {
    up: mpsc::Sender<wire::SessionUp>,
    down: tonic::Streaming<wire::SessionDown>,
    channel: Channel,
}

/// The agent's next message, taken only when there is room to send it.
async fn next_output<'a>(
    up: &'a mpsc::Sender<wire::SessionUp>,
    outputs: &mut mpsc::Receiver<Output>,
) -> Result<(mpsc::Permit<'a, wire::SessionUp>, Output), End> {
    let room = up.reserve().await.map_err(|_| End::Closed)?;
    let output = outputs.recv().await.ok_or(End::AgentEnded)?;
    Ok((room, output))
}

fn message(message: Up) -> wire::SessionUp {
    wire::SessionUp {
        message: Some(message),
    }
}

fn seen(welcome: &wire::Welcome) -> Seen {
    Seen {
        epoch: welcome.epoch,
        index: welcome.index,
    }
}

/// An error with its causes, for the log.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
