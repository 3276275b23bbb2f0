//! A manager program that waits to be promoted: a node with a key of its own that holds nothing of the cluster's state.
//!
//! It says each half second that it is there, follows the roots, renews its certificate, and comes back by its key as
//! every node does. Once an operator promoted it, it takes a manager's certificate for a fresh key and starts as one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_identity::comeback::come_back;
use bulkhead_identity::store::{KeyFile, StandbyPart};
use bulkhead_identity::tls::{self, Expect};
use bulkhead_identity::{Bundle, Certificate, Credentials, Identity, Key, UnlockKey, renewal};
use bulkhead_proto::wire::{
    AttendRequest, AttendResponse, ManagerAddress, RenewRequest, RenewResponse, Role as WireRole,
    WithdrawRequest, dispatcher_client::DispatcherClient,
};
use bulkhead_proto::{KeyId, MemberId, NodeId, limits};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::Channel;

use super::error::ProgramError;
use super::init::new_part;
use super::member::Machine;
use crate::refusal::chain;

/// One call. A manager that says nothing is left for the next one.
const CALL: Duration = Duration::from_secs(3);
/// A standby that no manager takes for this long asks whether its certificate is the reason.
const ALONE: Duration = Duration::from_secs(5);
/// And asks again at most this often.
const AGAIN: Duration = Duration::from_secs(15);
/// Renewals are tried again after this.
const RETRY: Duration = Duration::from_secs(2);

/// A running standby.
#[derive(Debug)]
pub(super) struct Standby {
    machine: Machine,
    pub(super) identity: Identity,
    place: StandbyPart,
    keys: Mutex<KeyFile>,
    heard: AtomicBool,
    /// Cancelled once the cluster lists it no more: then it ends, and is forgotten.
    pub(super) left: CancellationToken,
}

/// How a standby ends.
pub(super) enum End {
    /// It left its cluster.
    Left,
    /// It is a manager now; its key file says so.
    Promoted(Box<KeyFile>),
}

impl Standby {
    /// A standby of this key file. What an earlier life as a manager left goes first.
    pub(super) fn new(machine: Machine, keys: KeyFile) -> Result<Self, ProgramError> {
        let Some(place) = keys.standby.clone() else {
            return Err(ProgramError::NotAManager(machine.data));
        };
        machine.clear().map_err(|source| ProgramError::Folder {
            path: machine.data.clone(),
            source,
        })?;
        Ok(Standby {
            identity: Identity::new(keys.credentials.clone())?,
            place,
            keys: Mutex::new(keys),
            heard: AtomicBool::new(false),
            left: CancellationToken::new(),
            machine,
        })
    }

    /// This node.
    pub(super) fn node(&self) -> NodeId {
        self.identity.subject().node
    }

    /// Its name in the cluster.
    pub(super) fn name(&self) -> String {
        self.keys(|keys| keys.name.clone())
    }

    /// Whether a manager answered the last time.
    pub(super) fn is_heard(&self) -> bool {
        self.heard.load(Ordering::Relaxed)
    }

    /// Waits until it is promoted or has left.
    pub(super) async fn run(&self) -> End {
        let (mut last, mut asked, mut tried) = (Instant::now(), None::<Instant>, None::<Instant>);
        let mut line = None;
        loop {
            match self.attend(&mut line).await {
                Some(answer) => {
                    self.heard.store(true, Ordering::Relaxed);
                    last = Instant::now();
                    let due = tried.is_none_or(|at| at.elapsed() > RETRY);
                    match self.follow(&answer, due).await {
                        Ok(Done::Nothing) => {}
                        Ok(Done::Renewed) => tried = None,
                        Ok(Done::Promoted(keys)) => return End::Promoted(keys),
                        Err(error) => {
                            tried = Some(Instant::now());
                            tracing::warn!(
                                error = format!("{error:#}"),
                                "what the cluster wants could not be done"
                            );
                        }
                    }
                }
                None => {
                    self.heard.store(false, Ordering::Relaxed);
                    if last.elapsed() > ALONE && asked.is_none_or(|at| at.elapsed() > AGAIN) {
                        asked = Some(Instant::now());
                        self.come_back_by_key().await;
                    }
                }
            }
            tokio::select! {
                biased;
                () = self.left.cancelled() => return End::Left,
                () = sleep(limits::WORKER_HEARTBEAT) => {}
            }
        }
    }

    /// Asks the cluster to list this node no more.
    pub(super) async fn withdraw(&self) -> Result<(), Status> {
        let (mut last, mut asked) = (Status::unavailable("no manager answers"), false);
        for mut client in self.managers() {
            let request_id = self.random().map_err(|_| Status::internal("no random bytes"))?;
            match timeout(CALL, client.withdraw(WithdrawRequest { request_id })).await {
                Ok(Ok(_)) => return Ok(()),
                // Listed no more: the one before did it, and its answer was lost.
                Ok(Err(status)) if asked && status.code() == tonic::Code::PermissionDenied => return Ok(()),
                Ok(Err(status)) => last = status,
                Err(_) => {}
            }
            asked = true;
        }
        Err(last)
    }

    /// The answer of the manager of the line that stands, or of the first one that takes this node; that line is kept.
    async fn attend(&self, line: &mut Option<Line>) -> Option<AttendResponse> {
        let current = self.identity.current();
        let key = current.key.key_id();
        // A new certificate is seen with a new connection.
        let standing = line.take().filter(|it| it.key == key).map(|it| it.client);
        for mut client in standing.into_iter().chain(self.managers()) {
            let request = AttendRequest {
                trusts: current.bundle.key_ids(),
            };
            match timeout(CALL, client.attend(request)).await {
                Ok(Ok(answer)) => {
                    *line = Some(Line { client, key });
                    return Some(answer.into_inner());
                }
                Ok(Err(status)) => tracing::debug!(%status, "a manager does not take this standby"),
                Err(_) => tracing::debug!("a manager takes too long"),
            }
        }
        None
    }

    async fn follow(&self, answer: &AttendResponse, due: bool) -> anyhow::Result<Done> {
        self.keep_managers(&answer.managers)?;
        let current = self.identity.current();
        if !answer.roots.is_empty() && current.bundle.ders() != answer.roots {
            let bundle = Bundle::from_ders(answer.roots.clone())?;
            self.renewed(current.with_bundle(bundle))?;
            tracing::info!(target: "audit", "this standby trusts other roots now");
        }
        match next(
            answer,
            &self.identity.current(),
            self.machine.now_ms(),
            self.jitter(),
        ) {
            Next::Nothing => Ok(Done::Nothing),
            _ if !due => Ok(Done::Nothing),
            Next::Renew => {
                let (key, response) = self.ask(WireRole::Standby).await?;
                self.renewed(credentials(key, response)?)?;
                tracing::info!(target: "audit", node = %self.node(), "certificate renewed");
                Ok(Done::Renewed)
            }
            Next::Promote => {
                let (key, response) = self.ask(WireRole::Manager).await?;
                let member = MemberId(response.member_id);
                let part = new_part(&self.machine, member, response.epoch, self.place.clone())?;
                // Under autolock nothing of a manager is ever on its disk in the clear.
                let lock = UnlockKey::from_bytes(response.unlock_generation, &response.unlock_key);
                let keys = KeyFile {
                    credentials: Arc::new(credentials(key, response)?),
                    name: self.name(),
                    managers: answer.managers.clone(),
                    manager: Some(part),
                    standby: None,
                    lock,
                };
                keys.save(&self.machine.keys())?;
                tracing::info!(target: "audit", node = %self.node(), raft.member = member.0, "promoted to manager");
                Ok(Done::Promoted(Box::new(keys)))
            }
        }
    }

    /// A certificate of this role for a fresh key.
    async fn ask(&self, role: WireRole) -> anyhow::Result<(Key, RenewResponse)> {
        let key = Key::generate()?;
        let request = RenewRequest {
            csr: key.csr()?,
            request_id: self.random()?,
            role: role.into(),
        };
        let mut last = anyhow::anyhow!("no manager answers");
        for mut client in self.managers() {
            match timeout(CALL * 5, client.renew(request.clone())).await {
                Ok(Ok(answer)) => return Ok((key, answer.into_inner())),
                Ok(Err(status)) => last = status.into(),
                Err(_) => {}
            }
        }
        Err(last)
    }

    async fn come_back_by_key(&self) {
        let current = self.identity.current();
        for manager in self.keys(|keys| keys.managers.clone()) {
            let entropy = &*self.machine.entropy;
            let credentials = match come_back(&current, &manager.address, Expect::AnyManager, entropy).await {
                Ok(credentials) => credentials,
                Err(error) => {
                    tracing::info!(
                        manager = manager.address,
                        error = chain(&error),
                        "not taken back there"
                    );
                    continue;
                }
            };
            match self.renewed(credentials) {
                Ok(()) => {
                    tracing::info!(target: "audit", "this standby came back by its committed key");
                    return;
                }
                Err(error) => tracing::error!(error = chain(&error), "new credentials could not be kept"),
            }
        }
    }

    fn managers(&self) -> Vec<DispatcherClient<Channel>> {
        let known = self.keys(|keys| keys.managers.clone());
        clients(&self.identity, &known)
    }

    fn keep_managers(&self, managers: &[ManagerAddress]) -> Result<(), ProgramError> {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        if managers.is_empty() || keys.managers == managers {
            return Ok(());
        }
        let old = std::mem::replace(&mut keys.managers, managers.to_vec());
        if let Err(error) = keys.save(&self.machine.keys()) {
            keys.managers = old;
            return Err(error.into());
        }
        Ok(())
    }

    /// Takes up credentials, or other roots: first on disk, then in every new handshake.
    fn renewed(&self, credentials: Credentials) -> Result<(), ProgramError> {
        let credentials = Arc::new(credentials);
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut keys.credentials, credentials.clone());
        if let Err(error) = keys.save(&self.machine.keys()) {
            keys.credentials = old;
            return Err(error.into());
        }
        Ok(self.identity.replace(credentials)?)
    }

    fn keys<T>(&self, look: impl FnOnce(&KeyFile) -> T) -> T {
        look(&self.keys.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn random(&self) -> anyhow::Result<Vec<u8>> {
        let mut bytes = vec![0; 16];
        self.machine.entropy.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// The same for the life of a certificate, another for each node.
    fn jitter(&self) -> u64 {
        let key = self.identity.current().key.key_id();
        let (first, _) = key.as_bytes().split_at(8);
        first.try_into().map_or(0, u64::from_le_bytes)
    }
}

/// A connection with a manager, under one certificate.
struct Line {
    client: DispatcherClient<Channel>,
    key: KeyId,
}

enum Done {
    Nothing,
    Renewed,
    Promoted(Box<KeyFile>),
}

/// What a standby does about what it heard.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Nothing,
    Renew,
    Promote,
}

/// A promotion whose certificate got lost on the way is asked for again: then the record says manager already.
fn next(answer: &AttendResponse, current: &Credentials, now_ms: i64, jitter: u64) -> Next {
    if answer.wanted_role() == WireRole::Manager || answer.role() == WireRole::Manager {
        return Next::Promote;
    }
    let certificate = &current.certificate;
    let due = renewal::due_at(certificate.not_before_ms(), certificate.not_after_ms(), jitter);
    let used = current
        .bundle
        .issuer_of(certificate)
        .map(|root| root.key_id().to_wire());
    let other_root = !answer.issuer.is_empty() && used.as_ref() != Some(&answer.issuer);
    match now_ms >= due || other_root {
        true => Next::Renew,
        false => Next::Nothing,
    }
}

fn credentials(key: Key, response: RenewResponse) -> anyhow::Result<Credentials> {
    Ok(Credentials {
        certificate: Certificate::from_der(&response.certificate)?,
        chain: response.chain,
        bundle: Bundle::from_ders(response.roots)?,
        key,
    })
}

/// Who can be asked, as this node.
pub(super) fn clients(identity: &Identity, managers: &[ManagerAddress]) -> Vec<DispatcherClient<Channel>> {
    managers
        .iter()
        .filter_map(|manager| tls::channel(identity, &manager.address, Expect::AnyManager).ok())
        .map(|channel| DispatcherClient::new(channel).max_decoding_message_size(limits::MESSAGE_BYTES))
        .collect()
}
