//! The operator: makes the cluster, uses it while things go wrong, and asks of it what it must give once all is well.
//!
//! Everything goes over the real API, as an operator with a certificate; only `init` goes over a local socket.

mod rotation;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context as _;
use bulkhead_identity::{Bundle, Certificate, Credentials, Identity, Key, local, tls};
use bulkhead_lab::client::new_id;
use bulkhead_proto::wire::control_client::ControlClient;
use bulkhead_proto::wire::local_client::LocalClient;
use bulkhead_proto::wire::{
    BlobHeader, CreateImageRequest, CreateSecretRequest, CreateServiceRequest, CreateTicketRequest,
    EnrolResponse, GetClusterStatusRequest, InitRequest, IssueOperatorRequest, Label, ListRequest,
    ListTasksRequest, PushBlobRequest, RemoveRequest, Role, SecretReference, ServiceSpec, TaskState,
    UpdateServiceRequest, push_blob_request,
};
use bulkhead_proto::{CODE_KEY, Code, limits};
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Channel;

use super::machines::{Addresses, Manager, Worker};
use super::record::{Record, now_us};
use super::{PORT, Plan};
use crate::check::{Action, Operation, Told};
use crate::image;
use crate::rules::Rule;
use crate::sim::dice::Dice;

/// Objects that clients contend for: services without replicas, whose label is the value.
const REGISTERS: usize = 2;
const LABEL: &str = "value";
/// The service that runs in the cluster, and its secret.
const SERVICE: &str = "work";
const SECRET: &str = "password";
const VALUE: &[u8] = b"what no file may hold";
/// The operator who is revoked.
const GUEST: &str = "guest";
/// A manager that is cut off may take a revoked key for so long; a moment more for what is under way.
const SHUT_OUT: Duration = limits::FRESHNESS.saturating_add(Duration::from_millis(100));
/// A manager answers far sooner, even to say that nobody leads.
const CALL: Duration = Duration::from_secs(2);
/// A change is sent again for so long; what became of it is unknown then.
const PATIENCE: Duration = Duration::from_secs(4);
/// The cluster comes up within this time, while nothing goes wrong.
const UP: Duration = Duration::from_secs(60);
/// Once all is well a write is served within this time.
const SERVES: Duration = Duration::from_secs(10);
/// And what was asked for is what runs: workers come back to managers after at most a minute's wait.
const CONVERGES: Duration = Duration::from_secs(90);

type Control = ControlClient<Channel>;

/// How far a run is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// The cluster comes up.
    Rising,
    /// Things go wrong.
    Trouble,
    /// Every fault was taken back.
    Well,
    /// The operator has seen enough.
    Over,
}

/// What the operator shares with whoever drives the run.
pub(super) struct Course {
    pub(super) plan: Plan,
    pub(super) record: Record,
    pub(super) addresses: Rc<Addresses>,
    pub(super) managers: Vec<Rc<Manager>>,
    pub(super) workers: Vec<Rc<Worker>>,
    pub(super) phase: Cell<Phase>,
}

/// The operator's whole part.
pub(super) async fn run(course: Rc<Course>) {
    let (identity, guest) = match Box::pin(timeout(UP, rise(&course))).await {
        Ok(Ok(identities)) => identities,
        Ok(Err(error)) => return give_up(&course, &format!("{error:#}")),
        Err(_) => return give_up(&course, "not in time"),
    };
    course.record.note("the cluster is up");
    course.phase.set(Phase::Trouble);
    let revoked = Rc::new(Cell::new(None));
    let mut clients: Vec<_> = (1..=course.plan.clients)
        .map(|number| {
            let client = Client::new(&course, &identity, number);
            tokio::task::spawn_local(client.run())
        })
        .collect();
    let revoker = Client::new(&course, &identity, 2_000).revoke(revoked.clone());
    clients.push(tokio::task::spawn_local(revoker));
    let rotator = Client::new(&course, &identity, 2_002).rotate();
    clients.push(tokio::task::spawn_local(rotator));
    let following = tokio::task::spawn_local(Client::new(&course, &identity, 2_003).follow());
    let knocking = Client::new(&course, &guest, 2_001).knock(revoked.clone());
    clients.push(tokio::task::spawn_local(knocking));
    while course.phase.get() == Phase::Trouble {
        sleep(Duration::from_millis(20)).await;
    }
    let mut client = Client::new(&course, &identity, 1_000);
    serves(&course, &mut client).await;
    for client in clients {
        client.abort();
        let _cancelled = client.await;
    }
    converges(&course, &mut client).await;
    following.abort();
    let _cancelled = following.await;
    course.phase.set(Phase::Over);
}

fn give_up(course: &Course, why: &str) {
    course.record.violation(
        Rule::ServesAgain,
        format_args!("the cluster did not come up: {why}"),
    );
    course.phase.set(Phase::Over);
}

/// Makes the cluster: the first manager by `init`, everybody else with tickets; then an image, a secret and services, and
/// a second operator, who will be revoked.
async fn rise(course: &Course) -> anyhow::Result<(Identity, Identity)> {
    let first = course.managers.first().context("no manager")?;
    let key = Key::generate()?;
    let request = InitRequest {
        listen: format!("0.0.0.0:{PORT}"),
        advertise: course.addresses.manager(1),
        lab: true,
        operator_csr: key.csr()?,
        operator_id: new_id()?,
        operator_name: "admin".into(),
        name: first.name(),
        autolock: false,
    };
    let made = loop {
        // The program may not have opened its socket yet.
        match LocalClient::new(local::connect(&first.socket()))
            .init(request.clone())
            .await
        {
            Err(status) if status.code() == tonic::Code::Unavailable => {
                sleep(Duration::from_millis(10)).await
            }
            made => break made?.into_inner(),
        }
    };
    let answer = made.operator.context("no certificate for the operator")?;
    let identity = identity(key, answer)?;
    let mut control = control(&identity, &course.addresses.manager(1))?;
    for manager in course.managers.iter().skip(1) {
        manager.give_ticket(&ticket(&mut control, Role::Manager).await?)?;
    }
    for worker in &course.workers {
        worker.give_ticket(&ticket(&mut control, Role::Worker).await?)?;
    }
    until(async || {
        let Ok(status) = control.get_cluster_status(GetClusterStatusRequest {}).await else {
            return false;
        };
        let voters = status.get_ref().members.iter().filter(|member| member.voter);
        voters.count() == course.managers.len()
    })
    .await;
    course.record.note("all managers vote");
    furnish(&mut control, course).await?;
    until(async || {
        let Ok(tasks) = tasks(&mut control).await else {
            return false;
        };
        tasks
            .values()
            .filter(|state| **state == TaskState::Running)
            .count()
            == course.workers.len()
    })
    .await;
    let key = Key::generate()?;
    let request = IssueOperatorRequest {
        request_id: new_id()?,
        node_id: new_id()?,
        name: GUEST.into(),
        csr: key.csr()?,
        validity_ms: 0,
    };
    let answer = control.issue_operator(request).await?.into_inner();
    Ok((identity, self::identity(key, answer)?))
}

fn identity(key: Key, answer: EnrolResponse) -> anyhow::Result<Identity> {
    Ok(Identity::new(Credentials {
        key,
        certificate: Certificate::from_der(&answer.certificate)?,
        chain: answer.chain,
        bundle: Bundle::from_ders(answer.roots)?,
    })?)
}

/// To every manager.
fn controls(course: &Course, identity: &Identity) -> Vec<Control> {
    let addresses = course.addresses.managers();
    addresses
        .iter()
        .filter_map(|at| control(identity, at).ok())
        .collect()
}

fn control(identity: &Identity, address: &str) -> anyhow::Result<Control> {
    let channel = tls::channel(identity, address, tls::Expect::AnyManager)?;
    Ok(ControlClient::new(channel)
        .max_decoding_message_size(limits::MESSAGE_BYTES)
        .max_encoding_message_size(limits::MESSAGE_BYTES))
}

async fn ticket(control: &mut Control, role: Role) -> anyhow::Result<String> {
    let request = CreateTicketRequest {
        request_id: new_id()?,
        ticket_id: new_id()?,
        role: role.into(),
        ..Default::default()
    };
    Ok(control.create_ticket(request).await?.into_inner().ticket)
}

/// An image, a secret, the registers, and a service with as many replicas as there are workers.
async fn furnish(control: &mut Control, course: &Course) -> anyhow::Result<()> {
    let blobs = image::blobs();
    for blob in &blobs {
        let header = BlobHeader {
            digest: blob.digest.as_bytes().to_vec(),
            size: blob.content.len() as u64,
        };
        let parts = [
            push_blob_request::Message::Header(header),
            push_blob_request::Message::Data(blob.content.clone()),
        ]
        .map(|message| PushBlobRequest {
            message: Some(message),
        });
        control.push_blob(tokio_stream::iter(parts)).await?;
    }
    let manifest = &blobs[2];
    let request = CreateImageRequest {
        request_id: new_id()?,
        image_id: new_id()?,
        name: image::NAME.into(),
        manifest_digest: manifest.digest.as_bytes().to_vec(),
        manifest_size: manifest.content.len() as u64,
    };
    // A manager that has just become one may not take copies yet.
    until(async || control.create_image(request.clone()).await.is_ok()).await;
    control
        .create_secret(CreateSecretRequest {
            request_id: new_id()?,
            secret_id: new_id()?,
            name: SECRET.into(),
            value: VALUE.to_vec(),
            labels: Vec::new(),
        })
        .await?;
    for register in 0..REGISTERS {
        let first = register as u64 + 1;
        let spec = ServiceSpec {
            labels: vec![value(first)],
            ..spec(&name(register), 0)
        };
        let called = now_us();
        let change = create_service(control, spec).await?;
        course.record.operation(
            register,
            Operation {
                called,
                returned: now_us(),
                action: Action::Swap {
                    from: None,
                    to: first,
                },
                told: Told::Done,
                index: Some(change),
            },
        );
    }
    let work = ServiceSpec {
        secrets: vec![SecretReference {
            secret_id: Vec::new(),
            name: SECRET.into(),
        }],
        ..spec(SERVICE, course.workers.len())
    };
    create_service(control, work).await.map(drop)
}

async fn create_service(control: &mut Control, spec: ServiceSpec) -> anyhow::Result<u64> {
    let request = CreateServiceRequest {
        request_id: new_id()?,
        service_id: new_id()?,
        spec: Some(spec),
    };
    Ok(control.create_service(request).await?.into_inner().index)
}

fn spec(name: &str, replicas: usize) -> ServiceSpec {
    ServiceSpec {
        name: name.into(),
        image_name: image::NAME.into(),
        replicas: u32::try_from(replicas).unwrap_or(u32::MAX),
        ..ServiceSpec::default()
    }
}

fn name(register: usize) -> String {
    format!("register-{register}")
}

fn value(of: u64) -> Label {
    Label {
        key: LABEL.to_owned(),
        value: of.to_string(),
    }
}

/// The tasks of the service that shall not be over, by id.
async fn tasks(control: &mut Control) -> Result<BTreeMap<Vec<u8>, TaskState>, tonic::Status> {
    let request = ListTasksRequest {
        service: SERVICE.into(),
        ..ListTasksRequest::default()
    };
    let tasks = control.list_tasks(request).await?.into_inner().tasks;
    let state = |task: bulkhead_proto::wire::Task| {
        let state = task
            .status
            .as_ref()
            .map_or(TaskState::Unspecified, |it| it.state());
        (task.id, state)
    };
    Ok(tasks.into_iter().filter_map(|it| it.task).map(state).collect())
}

async fn until(mut holds: impl AsyncFnMut() -> bool) {
    while !holds().await {
        sleep(Duration::from_millis(100)).await;
    }
}

/// A write must be served soon.
async fn serves(course: &Course, client: &mut Client) {
    let served = timeout(SERVES, async {
        while !client.write().await {
            sleep(Duration::from_millis(20)).await;
        }
    });
    match served.await {
        Ok(()) => course.record.note("a write is served"),
        Err(_) => course
            .record
            .violation(Rule::ServesAgain, "no write was served after everything healed"),
    }
}

/// What runs on the machines becomes what was asked for, and every task has its secret.
async fn converges(course: &Course, client: &mut Client) {
    let mut last = String::new();
    let converged = timeout(
        CONVERGES,
        until(async || match client.gap().await {
            None => true,
            Some(gap) => {
                last = gap;
                false
            }
        }),
    );
    match converged.await {
        Ok(()) => {
            course.record.note("what was asked for runs");
            course.record.count(|counts| counts.settled += 1);
        }
        Err(_) => course.record.violation(
            Rule::WhatIsAskedForRuns,
            format_args!("{last} long after everything healed"),
        ),
    }
}

/// One client of the API.
struct Client {
    course: Rc<Course>,
    identity: Identity,
    controls: Vec<Control>,
    /// Of the identity, when they were made.
    version: u64,
    dice: Dice,
    number: u64,
    serial: u64,
}

/// What a request came to.
enum Outcome<T> {
    /// It was made; whether this is the answer to the only try.
    Done(T, bool),
    Refused,
    Unknown,
}

impl Client {
    fn new(course: &Rc<Course>, identity: &Identity, number: u64) -> Self {
        Self {
            identity: identity.clone(),
            controls: controls(course, identity),
            version: *identity.changed().borrow(),
            dice: Dice::new(course.plan.seed, 100 + number),
            course: course.clone(),
            number,
            serial: 0,
        }
    }

    async fn run(mut self) {
        loop {
            sleep(self.dice.micros(20_000, 400_000)).await;
            match self.dice.below(10) {
                0..=3 => drop(self.write().await),
                4 => self.scale().await,
                _ => self.contend().await,
            }
        }
    }

    /// Connections of an older key are refused once its root was rotated away.
    fn refresh(&mut self) {
        let version = *self.identity.changed().borrow();
        if version != self.version {
            self.version = version;
            self.controls = controls(&self.course, &self.identity);
        }
    }

    /// Sends a change to one manager after the other until it is answered.
    async fn change<T, F>(&mut self, send: impl Fn(Control) -> F) -> Outcome<T>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let (first, end) = (self.dice.below(self.controls.len()), Instant::now() + PATIENCE);
        let mut sent = false;
        for turn in 0.. {
            self.refresh();
            let control = self.controls[(first + turn) % self.controls.len()].clone();
            if sent {
                self.course.record.count(|counts| counts.repeats += 1);
            }
            match timeout(CALL, send(control)).await {
                Ok(Ok(done)) => return Outcome::Done(done.into_inner(), !sent),
                // What was sent before may have been made, and others may have changed it since.
                Ok(Err(status)) if is_refusal(&status) && sent => return Outcome::Unknown,
                Ok(Err(status)) if is_refusal(&status) => return Outcome::Refused,
                Ok(Err(_)) | Err(_) => sent = true,
            }
            if Instant::now() > end {
                break;
            }
            sleep(Duration::from_millis(20)).await;
        }
        Outcome::Unknown
    }

    /// Revokes the guest at some time.
    async fn revoke(mut self, revoked: Rc<Cell<Option<Instant>>>) {
        let half = self.course.plan.trouble.as_micros() / 2;
        sleep(
            self.dice
                .micros(0, u64::try_from(half).unwrap_or(u64::MAX).max(1)),
        )
        .await;
        let Ok(request_id) = new_id() else { return };
        let request = RemoveRequest {
            request_id,
            selector: GUEST.into(),
            ..RemoveRequest::default()
        };
        loop {
            let outcome = self
                .change(|mut control| {
                    let request = request.clone();
                    async move { control.revoke_operator(request).await }
                })
                .await;
            if matches!(outcome, Outcome::Done(..)) {
                self.course.record.note("the guest is revoked");
                return revoked.set(Some(Instant::now()));
            }
        }
    }

    /// Asks some manager again and again, as the guest.
    async fn knock(mut self, revoked: Rc<Cell<Option<Instant>>>) {
        loop {
            sleep(self.dice.micros(20_000, 200_000)).await;
            let at = self.dice.below(self.controls.len());
            let out = revoked.get().is_some_and(|since| since.elapsed() > SHUT_OUT);
            let served = timeout(CALL, self.controls[at].list_secrets(ListRequest::default())).await;
            let record = &self.course.record;
            match (out, served) {
                (true, Ok(Ok(_))) => record.violation(
                    Rule::NobodyRevokedIsServed,
                    format_args!("m{} served an operator who was revoked before", at + 1),
                ),
                (true, Ok(Err(_))) => record.guest(|counts| counts.1 += 1),
                (false, Ok(Ok(_))) => record.guest(|counts| counts.0 += 1),
                (_, Err(_)) | (false, Ok(Err(_))) => {}
            }
        }
    }

    /// Creates a secret; whether that was acknowledged.
    async fn write(&mut self) -> bool {
        self.serial += 1;
        let name = format!("s-{}-{}", self.number, self.serial);
        let (Ok(request_id), Ok(secret_id)) = (new_id(), new_id()) else {
            return false;
        };
        let request = CreateSecretRequest {
            request_id,
            secret_id,
            name: name.clone(),
            value: name.clone().into_bytes(),
            labels: Vec::new(),
        };
        let outcome = self
            .change(|mut control| {
                let request = request.clone();
                async move { control.create_secret(request).await }
            })
            .await;
        let record = &self.course.record;
        match outcome {
            Outcome::Done(change, _) => {
                record.note(format_args!("secret {name} is made"));
                record.created(&name, change.index);
                record.count(|counts| counts.accepted += 1);
                return true;
            }
            Outcome::Refused => {
                record.refused(&name);
                record.count(|counts| counts.refused += 1);
            }
            Outcome::Unknown => record.count(|counts| counts.unknown += 1),
        }
        false
    }

    /// A service as some manager tells it: spec, version, and the index of what it tells.
    async fn read(&mut self, name: String) -> Option<(ServiceSpec, u64, u64)> {
        self.refresh();
        let at = self.dice.below(self.controls.len());
        let newest = self.course.record.newest();
        let request = ListRequest {
            selector: name,
            after: Vec::new(),
        };
        let answer = timeout(CALL, self.controls[at].list_services(request)).await;
        let answer = answer.ok()?.ok()?.into_inner();
        self.course.record.count(|counts| counts.reads += 1);
        if answer.index < newest {
            self.course.record.violation(
                Rule::FreshReads,
                format_args!(
                    "a read with index {} missed the write acknowledged at {newest}",
                    answer.index
                ),
            );
        }
        let service = answer.services.into_iter().next().and_then(|it| it.service)?;
        let version = service.meta.as_ref()?.version;
        Some((service.versions.last()?.spec.clone()?, version, answer.index))
    }

    async fn update(&mut self, spec: ServiceSpec, version: u64) -> Outcome<u64> {
        let Ok(request_id) = new_id() else {
            return Outcome::Unknown;
        };
        let request = UpdateServiceRequest {
            request_id,
            selector: spec.name.clone(),
            spec: Some(spec),
            version,
        };
        let outcome = self
            .change(|mut control| {
                let request = request.clone();
                async move { control.update_service(request).await }
            })
            .await;
        match outcome {
            Outcome::Done(change, only) => Outcome::Done(change.index, only),
            Outcome::Refused => Outcome::Refused,
            Outcome::Unknown => Outcome::Unknown,
        }
    }

    /// Asks for another number of replicas.
    async fn scale(&mut self) {
        let Some((mut spec, version, _)) = self.read(SERVICE.into()).await else {
            return;
        };
        spec.replicas = u32::try_from(self.dice.below(5)).unwrap_or(1);
        let replicas = spec.replicas;
        if let Outcome::Done(..) = self.update(spec, version).await {
            self.course
                .record
                .note(format_args!("{replicas} replicas are asked for"));
        }
    }

    /// Reads a register, and mostly changes it.
    async fn contend(&mut self) {
        let register = self.dice.below(REGISTERS);
        let called = now_us();
        let Some((spec, version, index)) = self.read(name(register)).await else {
            return;
        };
        let label = spec.labels.iter().find(|it| it.key == LABEL);
        let Some(from) = label.and_then(|it| it.value.parse().ok()) else {
            return;
        };
        self.course.record.operation(
            register,
            Operation {
                called,
                returned: now_us(),
                action: Action::Read { value: Some(from) },
                told: Told::Done,
                index: Some(index),
            },
        );
        if self.dice.percent(60) {
            self.swap(register, spec, version, from).await;
        }
    }

    async fn swap(&mut self, register: usize, spec: ServiceSpec, version: u64, from: u64) {
        self.serial += 1;
        let to = self.number << 40 | self.serial;
        let spec = ServiceSpec {
            labels: vec![value(to)],
            ..spec
        };
        let sent = Operation {
            called: now_us(),
            returned: u64::MAX,
            action: Action::Swap { from: Some(from), to },
            told: Told::Unknown,
            index: None,
        };
        let record = self.course.record.clone();
        let number = record.operation(register, sent);
        let (told, index) = match self.update(spec, version).await {
            Outcome::Done(index, only) => {
                self.course.record.count(|counts| counts.swaps += 1);
                // Which of several tries made it is not said: the answer's index may be a later one.
                (Told::Done, only.then_some(index))
            }
            // A version can be old without the value being another one: it says nothing about the value.
            Outcome::Refused => return record.heard(register, number, None),
            Outcome::Unknown => (Told::Unknown, None),
        };
        let heard = Operation {
            returned: now_us(),
            told,
            index,
            ..sent
        };
        record.heard(register, number, Some(heard));
    }

    /// How what runs differs from what was asked for.
    async fn gap(&mut self) -> Option<String> {
        self.refresh();
        for (number, control) in (1..).zip(&mut self.controls) {
            match timeout(CALL, control.get_cluster_status(GetClusterStatusRequest {})).await {
                Ok(Ok(status)) if status.get_ref().roots.len() == 1 => {}
                Ok(Ok(_)) => {
                    return Some(format!(
                        "m{number} says that the root is rotated: {}",
                        rotation::lagging(control).await
                    ));
                }
                Ok(Err(status)) => return Some(format!("m{number} does not answer: {}", status.message())),
                Err(_) => return Some(format!("m{number} does not answer")),
            }
        }
        let Some((spec, ..)) = self.read(SERVICE.into()).await else {
            return Some("the service cannot be read".into());
        };
        let at = self.dice.below(self.controls.len());
        let tasks = match timeout(CALL, tasks(&mut self.controls[at])).await {
            Ok(Ok(tasks)) => tasks,
            Ok(Err(status)) => return Some(format!("tasks cannot be listed: {}", status.message())),
            Err(_) => return Some("tasks cannot be listed".into()),
        };
        let wanted: Vec<String> = tasks
            .iter()
            .filter(|(_, state)| **state == TaskState::Running)
            .filter_map(|(id, _)| Some(bulkhead_proto::TaskId::try_from(id.as_slice()).ok()?.to_string()))
            .collect();
        if wanted.len() != spec.replicas as usize {
            return Some(format!(
                "{} of {} tasks are said to run",
                wanted.len(),
                spec.replicas
            ));
        }
        let sandboxes = self.course.workers.iter().map(|worker| &worker.sandbox);
        let mut running: Vec<String> = sandboxes
            .clone()
            .flat_map(|it| it.running())
            .map(|task| task.as_str().to_owned())
            .collect();
        running.sort_unstable();
        let mut wanted = wanted;
        wanted.sort_unstable();
        if running != wanted {
            return Some(format!("{running:?} run and {wanted:?} should"));
        }
        let with_secret = sandboxes
            .flat_map(|it| it.secrets())
            .filter(|(task, name, held)| {
                running.iter().any(|it| it == task.as_str()) && name == SECRET && held == VALUE
            })
            .count();
        (with_secret != running.len())
            .then(|| format!("{with_secret} of {} tasks have their secret", running.len()))
    }
}

/// Whether a change surely was not made: another one came first, or what it is about is not there. Of everything else it
/// may have been.
fn is_refusal(status: &tonic::Status) -> bool {
    let code = status.metadata().get(CODE_KEY).and_then(|it| it.to_str().ok());
    let refusals = [Code::Conflict, Code::NotFound, Code::NameTaken];
    code.is_some_and(|code| refusals.iter().any(|it| it.as_str() == code))
}
