//! Workers without tasks, many in this process: each has a key, a certificate and a session of its own, over its own
//! mutual TLS, and follows roots and renewals as a worker does.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bulkhead_identity::join::{self, Attempts, Enrolment};
use bulkhead_identity::seam::SystemClock;
use bulkhead_identity::tls::{self, Expect};
use bulkhead_identity::{Bundle, Certificate, Credentials, Identity, Key};
use bulkhead_proto::wire::dispatcher_client::DispatcherClient;
use bulkhead_proto::wire::session_down::Message as Down;
use bulkhead_proto::wire::session_up::Message as Up;
use bulkhead_proto::wire::{self, NodeDescription, RenewRequest};
use bulkhead_proto::{Role, limits};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic::transport::Channel;

use bulkhead_lab::client::new_id;

/// Joins under way at once.
const JOINS: usize = 16;
/// Steps of a join, and messages of a session, that may wait.
const QUEUE: usize = 64;
/// Between two tries of a session, as a worker waits.
const AGAIN: Duration = Duration::from_millis(200);
/// A renewal that was put off is asked for again after this.
const PAUSE: Duration = Duration::from_millis(5);
/// A worker that cannot join, or renew, for so long ends the measurement.
const PATIENCE: Duration = Duration::from_secs(30);

/// One simulated worker.
#[derive(Debug)]
pub(crate) struct Simulated {
    pub(crate) name: String,
    pub(crate) identity: Identity,
    manager: String,
    work: Option<JoinHandle<()>>,
    sessions: watch::Receiver<Sessions>,
}

/// The sessions of one worker, one after the other.
#[derive(Debug, Clone, Copy, Default)]
struct Sessions {
    begun: usize,
    /// Whether the last one stands.
    stands: bool,
}

impl Drop for Simulated {
    fn drop(&mut self) {
        if let Some(work) = &self.work {
            work.abort();
        }
    }
}

/// Joins so many workers with a ticket for as many, each at the first manager of one of the lists in turn. Where a session
/// fails, a worker tries the next manager of its list.
pub(crate) async fn join_all(
    ticket: &str,
    lists: &[Vec<String>],
    names: &str,
    count: usize,
) -> anyhow::Result<Vec<Simulated>> {
    let one = |number: usize| {
        let managers = lists[number % lists.len()].clone();
        let name = format!("{names}-{number}");
        async move { Simulated::join(ticket, managers, name).await }
    };
    stream::iter((0..count).map(one))
        .buffered(JOINS)
        .try_collect()
        .await
}

impl Simulated {
    async fn join(ticket: &str, managers: Vec<String>, name: String) -> anyhow::Result<Self> {
        let manager = managers.first().context("a manager to join at")?.clone();
        let enrolment = || {
            anyhow::Ok(Enrolment {
                ticket: ticket.parse().context("a ticket")?,
                addresses: vec![manager.clone()],
                role: Role::Worker,
                description: NodeDescription {
                    hostname: name.clone(),
                    ..Default::default()
                },
                advertise: String::new(),
                listen: String::new(),
                name: name.clone(),
            })
        };
        let (attempts, clock) = (Attempts::default(), SystemClock::start());
        let end = Instant::now() + PATIENCE;
        let joined = loop {
            let (steps, mut said) = mpsc::channel(QUEUE);
            let joined = Box::pin(join::enrol(enrolment()?, &attempts, &clock, steps));
            let told = async { while said.recv().await.is_some() {} };
            match tokio::join!(joined, told).0 {
                // As a program does that joins by itself.
                Err(_) if Instant::now() < end => sleep(AGAIN).await,
                joined => break joined.context("a simulated worker did not join")?,
            }
        };
        let identity = Identity::new(Arc::new(joined.credentials))?;
        let (sessions, seen) = watch::channel(Sessions::default());
        let work = tokio::spawn(attend(identity.clone(), managers, sessions));
        Ok(Self {
            name: joined.name,
            identity,
            manager,
            work: Some(work),
            sessions: seen,
        })
    }

    /// Waits until its session stands, or stands no more.
    pub(crate) async fn until(&mut self, stands: bool) -> anyhow::Result<()> {
        self.sessions.wait_for(|now| now.stands == stands).await?;
        Ok(())
    }

    /// How many sessions it has begun.
    pub(crate) fn begun(&self) -> usize {
        self.sessions.borrow().begun
    }

    /// Waits until a session stands that began after the first so many.
    pub(crate) async fn until_after(&mut self, begun: usize) -> anyhow::Result<()> {
        self.sessions
            .wait_for(|now| now.stands && now.begun > begun)
            .await?;
        Ok(())
    }

    /// It falls silent, as a machine that lost its power.
    pub(crate) fn die(&mut self) {
        if let Some(work) = self.work.take() {
            work.abort();
        }
    }

    /// A way to ask a manager something as this worker.
    pub(crate) fn dispatcher(&self, manager: &str) -> anyhow::Result<DispatcherClient<Channel>> {
        let channel = tls::channel(&self.identity, manager, Expect::AnyManager)?;
        Ok(DispatcherClient::new(channel).max_decoding_message_size(limits::MESSAGE_BYTES))
    }

    /// Which manager it joined at.
    pub(crate) fn manager(&self) -> &str {
        &self.manager
    }
}

/// Sessions, one after the other.
async fn attend(identity: Identity, managers: Vec<String>, sessions: watch::Sender<Sessions>) {
    let mut at = 0;
    loop {
        // Whatever ended it, the next one begins with what is true then.
        if session(&identity, &managers[at], &sessions).await.is_err() {
            at = (at + 1) % managers.len();
        }
        sessions.send_modify(|now| now.stands = false);
        sleep(AGAIN).await;
    }
}

/// One session, until the manager ends it or the worker has new credentials.
async fn session(
    identity: &Identity,
    manager: &str,
    sessions: &watch::Sender<Sessions>,
) -> anyhow::Result<()> {
    let channel = tls::channel(identity, manager, Expect::AnyManager)?;
    let mut client = DispatcherClient::new(channel).max_decoding_message_size(limits::MESSAGE_BYTES);
    let (up, messages) = mpsc::channel(QUEUE);
    let hello = wire::SessionHello {
        trusts: identity.current().bundle.key_ids(),
        ..Default::default()
    };
    up.send(message(Up::Hello(hello))).await?;
    let mut down = client.session(ReceiverStream::new(messages)).await?.into_inner();
    let mut pulse = interval(limits::WORKER_HEARTBEAT);
    pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            heard = down.message() => match heard?.context("the stream ended")?.message {
                Some(Down::Welcome(_)) => sessions.send_modify(|now| {
                    *now = Sessions {
                        begun: now.begun + 1,
                        stands: true,
                    };
                }),
                Some(Down::Managers(told)) if follow(identity, &told, &mut client).await? => return Ok(()),
                _ => {}
            },
            _ = pulse.tick() => up.send(message(Up::Alive(wire::SignOfLife { now: 0 }))).await?,
        }
    }
}

fn message(message: Up) -> wire::SessionUp {
    wire::SessionUp {
        message: Some(message),
    }
}

/// Trusts and uses what the manager says; whether that changed, which asks for a new session.
async fn follow(
    identity: &Identity,
    told: &wire::Managers,
    client: &mut DispatcherClient<Channel>,
) -> anyhow::Result<bool> {
    let current = identity.current();
    if current.bundle.ders() != told.roots {
        let bundle = Bundle::from_ders(told.roots.clone())?;
        identity.replace(Arc::new(current.with_bundle(bundle)))?;
        return Ok(true);
    }
    let used = current.bundle.issuer_of(&current.certificate);
    if used.is_some_and(|root| root.key_id().to_wire() == told.issuer) {
        return Ok(false);
    }
    renew(identity, client).await?;
    Ok(true)
}

/// A new key and certificate; how often a manager put it off.
pub(crate) async fn renew(
    identity: &Identity,
    client: &mut DispatcherClient<Channel>,
) -> anyhow::Result<usize> {
    let key = Key::generate()?;
    let request = RenewRequest {
        csr: key.csr()?,
        request_id: new_id()?,
        ..Default::default()
    };
    let (end, mut put_off) = (Instant::now() + PATIENCE, 0);
    let answer = loop {
        match client.renew(request.clone()).await {
            Ok(answer) => break answer.into_inner(),
            Err(status) if status.code() == Code::Unavailable && Instant::now() < end => {
                put_off += 1;
                sleep(PAUSE).await;
            }
            Err(status) => return Err(status).context("a simulated worker was not certified anew"),
        }
    };
    let credentials = Credentials {
        key,
        certificate: Certificate::from_der(&answer.certificate)?,
        chain: answer.chain,
        bundle: Bundle::from_ders(answer.roots)?,
    };
    if credentials.certificate.subject() != identity.subject() {
        bail!("a certificate of another node");
    }
    identity.replace(Arc::new(credentials))?;
    Ok(put_off)
}
