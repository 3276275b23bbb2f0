//! Clients of the cluster: they write, write conditionally, read and remove, each request with ids of its own, and note
//! what they were told. Others ask the services that run in it.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_lab::client::{Control, Managers, new_id, secret};
use bulkhead_proto::Code;
use bulkhead_proto::code::CODE_KEY;
use bulkhead_proto::wire::{
    CreateServiceRequest, Label, ListRequest, ListServicesResponse, RemoveRequest, ServiceSpec,
    UpdateServiceRequest,
};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::record::{Ack, Fate, Record, Request};
use crate::check::{Action, Operation, Told};

/// The image of the run's own services.
pub(super) const IMAGE: &str = "bulkhead-chaos:probe";
/// Objects that clients contend for: services without replicas, whose label is the value.
pub(super) const REGISTERS: usize = 4;
const LABEL: &str = "value";
/// A manager answers far sooner, even to say that nobody leads.
const CALL: Duration = Duration::from_secs(2);
/// The writer goes to the next manager after this: what it waits for is the cluster, not one manager that stands still.
const HASTE: Duration = Duration::from_millis(400);
/// A write is sent again for so long; what became of it is unknown then.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two tries at managers that refuse at once.
const PAUSE: Duration = Duration::from_millis(5);
/// Secrets that stay; older ones are removed, so that a long run does not fill the store.
const KEPT: usize = 200;

/// Connections of one client to each manager.
pub(super) struct Client {
    managers: Managers,
    record: Arc<Record>,
    random: SmallRng,
    number: u64,
    serial: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Tries {
    One,
    Several,
}

/// What a request came to.
enum Outcome<T> {
    /// It was made; the answer is to the only try, or to one of several.
    Done(T, Tries),
    Refused,
    Unknown,
}

impl Client {
    /// One with a number of its own.
    pub(super) fn new(number: u64, seed: u64, managers: Managers, record: Arc<Record>) -> Self {
        Self {
            managers,
            record,
            random: SmallRng::seed_from_u64(seed ^ number.wrapping_mul(0x9E37_79B9_7F4A_7C15)),
            number,
            serial: 0,
        }
    }

    fn any(&mut self) -> usize {
        self.random.random_range(0..self.managers.count())
    }

    /// Sends a change to one manager after the other until it is answered.
    async fn change<T, F>(&mut self, each: Duration, send: impl Fn(Control) -> F) -> Outcome<T>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let (first, end) = (self.any(), tokio::time::Instant::now() + PATIENCE);
        let mut sent = false;
        for turn in 0.. {
            let Ok(control) = self.managers.control((first + turn) % self.managers.count()) else {
                break;
            };
            if sent {
                self.record.seen().counts.repeats += 1;
            }
            match timeout(each, send(control)).await {
                Ok(Ok(done)) => {
                    let tries = if sent { Tries::Several } else { Tries::One };
                    return Outcome::Done(done.into_inner(), tries);
                }
                // What was sent before may have been made, and others may have changed it since.
                Ok(Err(status)) if is_refusal(&status) && sent => return Outcome::Unknown,
                Ok(Err(status)) if is_refusal(&status) => return Outcome::Refused,
                Ok(Err(_)) | Err(_) => sent = true,
            }
            if tokio::time::Instant::now() > end {
                break;
            }
            sleep(PAUSE).await;
        }
        Outcome::Unknown
    }

    /// Writes secrets, one after the other, until it is dropped.
    pub(super) async fn write(mut self, pause: Duration) {
        let mut kept = std::collections::VecDeque::new();
        loop {
            self.serial += 1;
            let name = format!("chaos-{}-{}", self.number, self.serial);
            let Ok(request) = secret(name.clone().into_bytes()) else {
                continue;
            };
            let request = bulkhead_proto::wire::CreateSecretRequest {
                name: name.clone(),
                ..request
            };
            let fate = |created| Fate {
                created,
                removed: None,
            };
            self.record.seen().secrets.insert(name.clone(), fate(false));
            let sent_us = self.record.now_us();
            let outcome = self
                .change(HASTE, |mut control| {
                    let request = request.clone();
                    async move { control.create_secret(request).await }
                })
                .await;
            let done_us = self.record.now_us();
            {
                let mut seen = self.record.seen();
                match outcome {
                    Outcome::Done(..) => {
                        seen.counts.accepted += 1;
                        seen.acks.push(Ack { sent_us, done_us });
                        seen.secrets.insert(name.clone(), fate(true));
                        kept.push_back(name);
                    }
                    Outcome::Refused => seen.counts.refused += 1,
                    Outcome::Unknown => seen.counts.unknown += 1,
                }
            }
            if kept.len() > KEPT
                && let Some(oldest) = kept.pop_front()
            {
                self.remove(oldest).await;
            }
            sleep(pause).await;
        }
    }

    async fn remove(&mut self, name: String) {
        let Ok(request_id) = new_id() else { return };
        let set = |record: &Record, acknowledged| {
            if let Some(fate) = record.seen().secrets.get_mut(&name) {
                fate.removed = Some(acknowledged);
            }
        };
        set(&self.record, false);
        let request = RemoveRequest {
            request_id,
            selector: name.clone(),
            ..RemoveRequest::default()
        };
        let outcome = self
            .change(HASTE, |mut control| {
                let request = request.clone();
                async move { control.remove_secret(request).await }
            })
            .await;
        match outcome {
            Outcome::Done(..) => {
                set(&self.record, true);
                self.record.seen().counts.accepted += 1;
            }
            // That it is not there is said of one that a request before removed, too.
            Outcome::Refused | Outcome::Unknown => self.record.seen().counts.unknown += 1,
        }
    }

    /// Reads and changes the registers until it is dropped.
    pub(super) async fn contend(mut self, pause: Duration) {
        loop {
            let register = self.random.random_range(0..REGISTERS);
            let read = self.read(register).await;
            if let Some((spec, version, value)) = read
                && self.random.random_bool(0.6)
            {
                self.swap(register, spec, version, value).await;
            }
            sleep(pause).await;
        }
    }

    /// Looks at a register, at any manager.
    async fn read(&mut self, register: usize) -> Option<(ServiceSpec, u64, u64)> {
        let at = self.any();
        let called = self.record.now_us();
        let request = ListRequest {
            selector: name(register),
            after: Vec::new(),
        };
        let mut control = self.managers.control(at).ok()?;
        let answer = timeout(CALL, control.list_services(request)).await;
        let returned = self.record.now_us();
        let Ok(Ok(answer)) = answer else {
            self.record.seen().counts.unread += 1;
            return None;
        };
        let ListServicesResponse { index, services, .. } = answer.into_inner();
        let service = services.into_iter().next().and_then(|it| it.service)?;
        let version = service.meta.as_ref().map(|it| it.version)?;
        let spec = service.versions.last()?.spec.clone()?;
        let value = spec
            .labels
            .iter()
            .find(|it| it.key == LABEL)?
            .value
            .parse()
            .ok()?;
        let mut seen = self.record.seen();
        seen.counts.reads += 1;
        seen.registers.entry(register).or_default().push(Operation {
            called,
            returned,
            action: Action::Read { value: Some(value) },
            told: Told::Done,
            index: Some(index),
        });
        Some((spec, version, value))
    }

    async fn swap(&mut self, register: usize, spec: ServiceSpec, version: u64, from: u64) {
        self.serial += 1;
        let to = self.number << 40 | self.serial;
        let Ok(request_id) = new_id() else { return };
        let request = UpdateServiceRequest {
            request_id,
            selector: name(register),
            spec: Some(ServiceSpec {
                labels: vec![value(to)],
                ..spec
            }),
            version,
        };
        let called = self.record.now_us();
        self.record.seen().sends(register, called, (from, to));
        let outcome = self
            .change(CALL, |mut control| {
                let request = request.clone();
                async move { control.update_service(request).await }
            })
            .await;
        let returned = self.record.now_us();
        let mut seen = self.record.seen();
        match outcome {
            Outcome::Done(change, tries) => {
                seen.counts.accepted += 1;
                // Which of several tries made it is not said: the answer's index may be a later one.
                let index = (tries == Tries::One).then_some(change.index);
                seen.heard(register, to, returned, Some(index));
            }
            // A version can be old without the value being another one: it says nothing about the value.
            Outcome::Refused => {
                seen.counts.refused += 1;
                seen.heard(register, to, returned, None);
            }
            Outcome::Unknown => seen.counts.unknown += 1,
        }
    }
}

/// Makes the registers.
pub(super) async fn make_registers(control: &mut Control, record: &Record) -> anyhow::Result<()> {
    for register in 0..REGISTERS {
        let first = register as u64 + 1;
        let called = record.now_us();
        let request = CreateServiceRequest {
            request_id: new_id()?,
            service_id: new_id()?,
            spec: Some(ServiceSpec {
                name: name(register),
                image_name: IMAGE.to_owned(),
                labels: vec![value(first)],
                ..ServiceSpec::default()
            }),
        };
        let change = control.create_service(request).await?.into_inner();
        let operation = Operation {
            called,
            returned: record.now_us(),
            action: Action::Swap {
                from: None,
                to: first,
            },
            told: Told::Done,
            index: Some(change.index),
        };
        record
            .seen()
            .registers
            .entry(register)
            .or_default()
            .push(operation);
    }
    Ok(())
}

pub(super) fn name(register: usize) -> String {
    format!("chaos-register-{register}")
}

fn value(of: u64) -> Label {
    Label {
        key: LABEL.to_owned(),
        value: of.to_string(),
    }
}

/// Whether a change surely was not made: another one came first, or what it is about is not there. Of everything else it
/// may have been.
fn is_refusal(status: &tonic::Status) -> bool {
    let code = status.metadata().get(CODE_KEY).and_then(|it| it.to_str().ok());
    let refusals = [Code::Conflict, Code::NotFound, Code::NameTaken];
    code.is_some_and(|code| refusals.iter().any(|it| it.as_str() == code))
}

/// Asks a service again and again, until it is dropped: each time one of the nodes where it was last seen to run, as whoever
/// stands before it would. `address` says where a node is now.
pub(super) async fn ask(
    service: String,
    port: u16,
    address: impl Fn(usize) -> Ipv4Addr,
    pause: Duration,
    record: Arc<Record>,
) {
    for turn in 0.. {
        let at_us = record.now_us();
        let known = record.seen().places.get(&service).cloned();
        let Some(places) = known else {
            sleep(pause).await; // nobody has looked yet
            continue;
        };
        let node = places.get(turn % places.len().max(1)).copied();
        let answered = match node {
            Some(node) => get(address(node), port).await,
            None => false,
        };
        {
            let mut seen = record.seen();
            seen.counts.requests += 1;
            seen.counts.unanswered += u64::from(!answered);
            seen.requests.push(Request {
                node,
                at_us,
                answered,
            });
        }
        sleep(pause).await;
    }
}

/// Whether a request for the first page is answered well.
pub(super) async fn get(address: Ipv4Addr, port: u16) -> bool {
    let asked = async {
        let mut stream = TcpStream::connect((address, port)).await?;
        let request = format!("GET / HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut line = Vec::new();
        // No page of a test is longer; what is, is cut here.
        stream.take(1 << 16).read_to_end(&mut line).await?;
        std::io::Result::Ok(line)
    };
    match timeout(CALL, asked).await {
        Ok(Ok(answer)) => answer.starts_with(b"HTTP/1.") && answer.get(9) == Some(&b'2'),
        _ => false,
    }
}
