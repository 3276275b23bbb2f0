//! A worker: its machine with a sandbox and records that outlive its program, its agent as it is, and its session with a manager.

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::Subject;
use bulkhead_identity::seam::Clock;
use bulkhead_manager::authz::Principal;
use bulkhead_manager::dispatcher;
use bulkhead_proto::wire::session_down::Message as Down;
use bulkhead_proto::wire::session_up::Message as Up;
use bulkhead_proto::wire::{NodeDescription, SessionDown, SessionHello, SessionUp, SignOfLife};
use bulkhead_proto::{Caller, ClusterId, Role, limits};
use bulkhead_worker::agent::{Agent, Fetch, Input, Known, Layer, Output, Seen};
use bulkhead_worker::image::{BlobStore, Ingest};
use bulkhead_worker::proxy::Proxy;
use bulkhead_worker::records::Records;
use bulkhead_worker::runtime::Launcher;
use futures::StreamExt as _;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;

use super::manager::{Managers, Reached};
use super::{START_MS, node_id};
use crate::image;
use crate::rules::Rule;
use crate::sandbox::Sandbox;
use crate::sim::Plan;
use crate::sim::dice::Dice;
use crate::sim::record::Record;

/// Bytes of images that a worker keeps.
const IMAGES: u64 = 1 << 20;
/// Messages that wait, of an agent and of a session.
const QUEUE: usize = 16;
/// A manager answers a hello within this time.
const OPEN: Duration = Duration::from_millis(500);
/// What is under way on a connection that nothing comes through any more is dropped after this.
const LOST: Duration = Duration::from_secs(30);

/// A worker's machine.
pub(super) struct Worker {
    number: u64,
    folder: PathBuf,
    seed: u64,
    lives: u64,
    managers: Managers,
    clock: Arc<dyn Clock>,
    sandbox: Sandbox,
    program: Vec<JoinHandle<()>>,
}

impl Worker {
    pub(super) fn new(
        number: u64,
        folder: PathBuf,
        plan: &Plan,
        managers: Managers,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            number,
            folder,
            seed: plan.seed,
            lives: 0,
            managers,
            sandbox: Sandbox::new(clock.clone()),
            clock,
            program: Vec::new(),
        }
    }

    pub(super) fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    /// Starts its program on what its disk holds.
    pub(super) fn start(&mut self, record: &Record) {
        self.lives += 1;
        let dice = Dice::new(self.seed ^ (self.number << 16) ^ (self.lives << 48), 72);
        if let Err(error) = self.run(dice, record.clone()) {
            record.violation(
                Rule::StartsAgain,
                format_args!("w{} does not start: {error}", self.number),
            );
        }
    }

    fn run(&mut self, dice: Dice, record: Record) -> io::Result<()> {
        let sandbox = self.sandbox.clone();
        let launcher = Launcher::within(move |calls, events| sandbox.serve(calls, events));
        let clock = self.clock.clone();
        let agent = Agent::new(
            launcher.runtime.clone(),
            BlobStore::open(&self.folder.join("images"), IMAGES).map_err(io::Error::other)?,
            Records::open(&self.folder.join("records")).map_err(io::Error::other)?,
            Layers,
            Proxy::new(std::net::Ipv4Addr::LOCALHOST.into(), launcher.runtime),
            move || millis(clock.as_ref()),
        );
        let agent = agent.map_err(io::Error::other)?;
        let (inputs, from_session) = mpsc::channel(QUEUE);
        let (to_session, outputs) = mpsc::channel(QUEUE);
        let sessions = Sessions {
            number: self.number,
            managers: self.managers.clone(),
            clock: self.clock.clone(),
            known: agent.known(),
            inputs,
            outputs,
        };
        let (events, number) = (launcher.events, self.number);
        let driver = launcher.driver;
        self.program = vec![
            tokio::spawn(async move { drop(driver.await) }),
            tokio::spawn(async move {
                if let Err(error) = agent.run(from_session, to_session, events).await {
                    record.violation(
                        Rule::StartsAgain,
                        format_args!("the agent of w{number} ended: {error}"),
                    );
                }
            }),
            tokio::spawn(sessions.run(dice)),
        ];
        Ok(())
    }

    /// Ends its program; its tasks run on, but where the machine loses power.
    pub(super) async fn stop(&mut self, power: bool) {
        for task in &self.program {
            task.abort(); // all at once: none sees that another one ended
        }
        for task in self.program.drain(..) {
            let _cancelled = task.await;
        }
        if power {
            self.sandbox.lose_power();
        }
    }
}

fn millis(clock: &dyn Clock) -> i64 {
    i64::try_from(clock.wall_millis()).unwrap_or(i64::MAX)
}

/// Layers come from nowhere: fetching them is left to simulations of whole programs.
struct Layers;

impl Fetch for Layers {
    async fn fetch(&self, _layer: Layer, mut ingest: Ingest) -> io::Result<Ingest> {
        let [layer, ..] = image::blobs();
        ingest.write(&layer.content).map_err(io::Error::other)?;
        Ok(ingest)
    }
}

/// The sessions of one program, one after the other, with one manager or another.
struct Sessions {
    number: u64,
    managers: Managers,
    clock: Arc<dyn Clock>,
    known: watch::Receiver<Known>,
    inputs: mpsc::Sender<Input>,
    outputs: mpsc::Receiver<Output>,
}

impl Sessions {
    async fn run(mut self, dice: Dice) {
        let all = self.managers.all.clone();
        let mut at = dice.below(all.len());
        loop {
            let Err(_ended) = self.attend(all[at]).await;
            at = (at + 1) % all.len();
            // What the agent says meanwhile is for no session; a new one is told everything again.
            let wait = sleep(dice.micros(50_000, 250_000));
            tokio::pin!(wait);
            loop {
                tokio::select! {
                    biased;
                    () = &mut wait => break,
                    output = self.outputs.recv() => if output.is_none() { return },
                }
            }
        }
    }

    /// One session, until something ends it.
    async fn attend(&mut self, manager: u64) -> Result<Infallible, Ended> {
        let (up, mut down) = self.open(manager).await.ok_or(Ended)?;
        let known = self.known.borrow().clone();
        let hello = SessionHello {
            description: Some(NodeDescription {
                cpu_millis: 64_000,
                memory_bytes: 64 << 30,
                ..Default::default()
            }),
            seen_epoch: known.seen.epoch,
            seen_index: known.seen.index,
            trusts: Vec::new(),
            task_ids: known.tasks.iter().map(|task| task.to_wire()).collect(),
        };
        up.try_send(message(Up::Hello(hello))).map_err(|_| Ended)?;
        let first = {
            let answered = timeout(OPEN, down.recv());
            tokio::pin!(answered);
            loop {
                tokio::select! {
                    biased;
                    first = &mut answered => break first.map_err(|_| Ended)?,
                    output = self.outputs.recv() => if output.is_none() { return Err(Ended) },
                }
            }
        };
        let Some(Down::Welcome(welcome)) = first.and_then(|it| it.message) else {
            return Err(Ended);
        };
        let seen = Seen {
            epoch: welcome.epoch,
            index: welcome.index,
        };
        if seen < self.known.borrow().seen {
            return Err(Ended);
        }
        self.carry(&up, &mut down, seen).await
    }

    async fn carry(
        &mut self,
        up: &mpsc::Sender<SessionUp>,
        down: &mut mpsc::Receiver<SessionDown>,
        seen: Seen,
    ) -> Result<Infallible, Ended> {
        while self.outputs.try_recv().is_ok() {} // of an earlier session
        let mut heartbeat = interval(limits::WORKER_HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let mut pending = Some(Input::Welcome(seen));
        loop {
            // Each branch is cancel-safe: a message is taken whole or stays where it is.
            tokio::select! {
                biased;
                _ = heartbeat.tick() => {
                    let now = millis(self.clock.as_ref());
                    let _full = up.try_send(message(Up::Alive(SignOfLife { now })));
                }
                room = self.inputs.reserve(), if pending.is_some() => {
                    if let Some(input) = pending.take() {
                        room.map_err(|_| Ended)?.send(input);
                    }
                    heard = Instant::now();
                }
                output = next(up, &mut self.outputs) => {
                    let (room, output) = output?;
                    room.send(message(match output {
                        Output::Status(batch) => Up::Status(batch),
                        Output::Applied(sequence) => Up::Applied(bulkhead_proto::wire::Applied { sequence }),
                        Output::EndSession(_) => return Err(Ended),
                    }));
                }
                told = down.recv(), if pending.is_none() => {
                    heard = Instant::now();
                    match told.ok_or(Ended)?.message {
                        Some(Down::Assignments(update)) => pending = Some(Input::Assignments(Box::new(update))),
                        Some(Down::StatusAck(ack)) => pending = Some(Input::Acknowledged(ack.sequence)),
                        _ => {}
                    }
                }
                () = sleep_until(heard + limits::SESSION_SILENCE), if pending.is_none() => return Err(Ended),
            }
        }
    }

    /// A stream to a manager that serves, and from it.
    async fn open(&self, manager: u64) -> Option<(mpsc::Sender<SessionUp>, mpsc::Receiver<SessionDown>)> {
        let switch = &self.managers.switch;
        if !switch.carries(self.number, manager).await {
            sleep(OPEN).await;
            return None;
        }
        let Reached { desk, gate, stop } = self.managers.reached(manager)?;
        // As the layer before the service has it.
        if gate.is_closed() || !desk.fresh.is_fresh() {
            return None;
        }
        let (up, said) = mpsc::channel(QUEUE);
        let (hears, up_there) = mpsc::channel(QUEUE);
        let (out, told) = mpsc::channel(QUEUE);
        let (hear, down) = mpsc::channel(QUEUE);
        let node = node_id(self.number);
        let caller = Principal {
            caller: Caller::Worker,
            subject: Some(Subject {
                cluster: ClusterId::from_bytes([1; 16]), // that it is the cluster's own was for TLS to see
                node,
                role: Role::Worker,
            }),
            key_id: None,
            certificate: None,
            actor: format!("worker/{node}"),
            address: None,
            opened_ms: i64::try_from(START_MS).unwrap_or(0),
        };
        let (here, there) = (self.number, manager);
        tokio::spawn(pipe(self.managers.clone(), (here, there), said, hears, Some));
        tokio::spawn(pipe(self.managers.clone(), (there, here), told, hear, Result::ok));
        let carried = dispatcher::carry(desk, caller, node, ReceiverStream::new(up_there).map(Ok), out);
        let carried = async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {} // with its program
                () = carried => {}
            }
        };
        tokio::spawn(gate.hold(carried));
        Some((up, down))
    }
}

/// A session ended.
struct Ended;

/// Takes what is said at one end to the other, in order. What is lost in a cut is the connection's end, which nobody is told.
async fn pipe<T, U>(
    managers: Managers,
    (from, to): (u64, u64),
    mut said: mpsc::Receiver<T>,
    hear: mpsc::Sender<U>,
    read: impl Fn(T) -> Option<U>,
) {
    while let Some(message) = said.recv().await {
        if !managers.switch.carries(from, to).await {
            let _never = timeout(LOST, pending::<()>()).await;
            return;
        }
        let Some(message) = read(message) else { return };
        if hear.send(message).await.is_err() {
            return;
        }
    }
}

/// The agent's next message, taken only when there is room to send it.
async fn next<'a>(
    up: &'a mpsc::Sender<SessionUp>,
    outputs: &mut mpsc::Receiver<Output>,
) -> Result<(mpsc::Permit<'a, SessionUp>, Output), Ended> {
    let room = up.reserve().await.map_err(|_| Ended)?;
    let output = outputs.recv().await.ok_or(Ended)?;
    Ok((room, output))
}

fn message(message: Up) -> SessionUp {
    SessionUp {
        message: Some(message),
    }
}
