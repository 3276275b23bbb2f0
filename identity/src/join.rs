//! Joining a cluster with a ticket, as a checklist of small steps whose failures say what to do next.
//!
//! The order keeps the ticket's secret safe: it is said only over a connection that chains to the root that the ticket
//! names. Several addresses are tried in turn with one key and one request id, so that an answer that was lost on the
//! way is asked for again and does not use the ticket twice; so does the next call with the same [`Attempts`].
//!
//! With a ticket that asks for approval the joiner waits and asks again until an operator has judged it. What it needs
//! for that is on disk ([`Attempts::kept`]), so that a program that ends in between goes on waiting as the same node.

mod attempts;

use std::time::Duration;

use bulkhead_proto::code::{CODE_KEY, Code, HINT_KEY};
use bulkhead_proto::limits::CLOCK_SKEW;
use bulkhead_proto::wire::{self, enrolment_client::EnrolmentClient};
use bulkhead_proto::wire::{
    EnrolRequest, EnrolResponse, JoinProgress, ManagerAddress, NodeDescription, StepState,
};
use bulkhead_proto::{ClusterId, KeyId, MemberId, RequestId, Role};
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::Status;
use x509_parser::time::ASN1Time;

use crate::dial::{self, DialError};
use crate::seam::Clock;
use crate::ticket::Ticket;
use crate::{Bundle, Certificate, Credentials, Key, UnlockKey, tls};

pub use self::attempts::Attempts;

/// Addresses that one join tries.
pub const ADDRESSES: usize = 16;
/// The ticket's use is committed by a majority before the answer comes; an election may lie between.
const ENROL: Duration = Duration::from_secs(15);
/// Between two questions whether an operator has judged us.
const APPROVAL_POLL: Duration = Duration::from_secs(1);
/// An answer with a certificate, roots and the managers.
const ANSWER_BYTES: usize = 64 << 10;
/// Characters of a manager's own words that are passed on.
const WORDS: usize = 512;

/// What a joiner asks.
#[derive(Debug)]
pub struct Enrolment {
    /// The ticket.
    pub ticket: Ticket,
    /// Managers, `host:port`, tried in turn.
    pub addresses: Vec<String>,
    /// What this program is: a certificate of another role is of no use to it.
    pub role: Role,
    /// What the node says of itself.
    pub description: NodeDescription,
    /// Managers: where it will listen, `IP:PORT`; nobody else is told.
    pub listen: String,
    /// Managers: where others reach it, `host:port`. Empty for others.
    pub advertise: String,
    /// The wished name; empty for one of the cluster's choosing.
    pub name: String,
}

/// What a joiner got.
#[derive(Debug)]
pub struct Enrolled {
    /// Key, certificate and roots.
    pub credentials: Credentials,
    /// The name that the cluster gave.
    pub name: String,
    /// Managers: the Raft member id.
    pub member: Option<MemberId>,
    /// The cluster epoch.
    pub epoch: u64,
    /// The commit index of the node's record.
    pub index: u64,
    /// The managers.
    pub managers: Vec<ManagerAddress>,
    /// Managers, where autolock is on: what the key file is to be sealed with.
    pub lock: Option<UnlockKey>,
}

/// Why a join failed. `Display` says what happened and [`hint`](Self::hint) what to do next.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// No addresses, or too many.
    #[error("a join takes 1 to {ADDRESSES} manager addresses")]
    Addresses,
    /// No connection, or the wrong one.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The clocks differ.
    #[error("this machine's clock says {ours}, the manager's says {theirs}")]
    Clock {
        /// Our time.
        ours: String,
        /// The manager's.
        theirs: String,
    },
    /// No key.
    #[error("no key could be made: the system gave no random bytes")]
    Entropy,
    /// The manager says no.
    #[error("the manager at {address} refuses: {message}")]
    Refused {
        /// Who said it.
        address: String,
        /// The stable code, where it gave one.
        code: Option<Code>,
        /// Its words.
        message: String,
        /// The next step, in its words.
        hint: String,
    },
    /// The manager cannot answer now, or its answer was lost.
    #[error("the manager at {address} gives no answer: {message}")]
    Unanswered {
        /// Who was asked.
        address: String,
        /// What came instead.
        message: String,
    },
    /// Nobody approved.
    #[error("no operator approved this node before its ticket ended")]
    Lapsed,
    /// The ticket is for another role.
    #[error("the ticket makes a {got}, and this program is a {wanted}")]
    Role {
        /// What this program is.
        wanted: Role,
        /// What the certificate says.
        got: Role,
    },
    /// The answer does not fit what was asked.
    #[error("the manager at {address} gave a certificate that is of no use: {what}")]
    Certificate {
        /// Who gave it.
        address: String,
        /// What is wrong with it.
        what: String,
    },
}

impl JoinError {
    /// The stable code of the failure.
    pub fn code(&self) -> Code {
        match self {
            Self::Dial(DialError::WrongRoot { .. }) => Code::RootMismatch,
            Self::Dial(DialError::FormerRoot { .. }) => Code::TicketOld,
            Self::Lapsed => Code::TicketExpired,
            Self::Dial(DialError::Name { .. } | DialError::Tcp { .. }) | Self::Unanswered { .. } => {
                Code::Unreachable
            }
            Self::Dial(DialError::Tls { .. } | DialError::Protocol { .. }) => Code::WrongPeer,
            Self::Dial(DialError::Address(_)) | Self::Addresses => Code::Invalid,
            Self::Clock { .. } => Code::ClockSkew,
            Self::Role { .. } => Code::TicketRole,
            Self::Refused { code, .. } => code.unwrap_or(Code::JoinFailed),
            Self::Entropy | Self::Certificate { .. } => Code::JoinFailed,
        }
    }

    /// What to do next.
    pub fn hint(&self) -> String {
        let fixed = match self {
            Self::Dial(error) => error.hint(),
            Self::Addresses => "give --join HOST:PORT of one or more managers",
            Self::Clock { .. } => {
                "set both clocks, best by NTP, then join again; this manager did not hear the ticket"
            }
            Self::Entropy => "check that the getrandom system call is allowed",
            Self::Refused {
                code: Some(Code::TicketExpired | Code::TicketUsed | Code::TicketRefused),
                hint,
                ..
            } if hint.is_empty() => "make a new one on a manager: bulkhead cluster ticket create",
            Self::Refused { hint, .. } if !hint.is_empty() => hint,
            Self::Refused { .. } => "read the manager's log for the reason",
            Self::Unanswered { .. } => {
                "check `bulkhead cluster status` there, then join again in the same way; it may have admitted this node \
                 all the same, which used the ticket once: as long as this program runs, it is the same node when it \
                 asks again"
            }
            Self::Lapsed => {
                "make a new ticket, with a longer --ttl: bulkhead cluster ticket create --approve"
            }
            Self::Role { .. } => {
                "make a ticket of this program's role: bulkhead cluster ticket create --role ROLE"
            }
            Self::Certificate { .. } => {
                "the manager may run another version; read its log before joining again, since the ticket was used"
            }
        };
        fixed.to_owned()
    }

    /// Whether another manager may say yes where this one failed.
    fn is_worth_another(&self) -> bool {
        matches!(self, Self::Dial(_) | Self::Unanswered { .. } | Self::Clock { .. })
    }
}

/// Joins, and reports each step as it starts and ends. On disk is nothing but what a wait for approval needs.
///
/// Whoever is admitted calls [`Attempts::forget`] once what it got is on disk: until then it asks as the same node.
///
/// # Errors
/// [`JoinError`] of the last address that was tried.
pub async fn enrol(
    request: Enrolment,
    attempts: &Attempts,
    clock: &dyn Clock,
    steps: mpsc::Sender<JoinProgress>,
) -> Result<Enrolled, JoinError> {
    if request.addresses.is_empty() || request.addresses.len() > ADDRESSES {
        return Err(JoinError::Addresses);
    }
    let (key, request_id) = attempts.of(&request)?;
    let joiner = Joiner {
        key,
        request_id,
        request: &request,
        clock,
    };
    let steps = Steps(Some(steps));
    let asked = joiner.ask_all(&steps).await;
    let answered = match asked {
        Ok(answered) if answered.answer.waits_until != 0 => {
            attempts.keep(&request);
            Box::pin(joiner.until_judged(answered, &steps)).await
        }
        asked => asked,
    };
    match answered {
        Ok(answered) => joiner.accept(answered, &steps).await,
        Err(error) => {
            // Had an earlier try been admitted, this one would be, too: the key is of no use, as one that was removed.
            if !error.is_worth_another() && error.code() != Code::Busy {
                attempts.forget();
            }
            Err(error)
        }
    }
}

/// What a manager said, and the roots that it was verified under.
struct Answered {
    address: String,
    answer: EnrolResponse,
    bundle: Bundle,
}

struct Joiner<'a> {
    key: Key,
    request_id: RequestId,
    request: &'a Enrolment,
    clock: &'a dyn Clock,
}

impl Joiner<'_> {
    /// The answer of the first manager that gives one.
    async fn ask_all(&self, steps: &Steps) -> Result<Answered, JoinError> {
        let mut last = JoinError::Addresses;
        for address in &self.request.addresses {
            match self.enrol_at(address, steps).await {
                Err(error) if error.is_worth_another() => last = error,
                answered => return answered,
            }
        }
        Err(last)
    }

    /// Asks again until an operator has said yes or no, or the ticket ended. Managers that cannot answer now are waited
    /// for: who waits is committed.
    async fn until_judged(&self, first: Answered, steps: &Steps) -> Result<Answered, JoinError> {
        const STEP: &str = "approval";
        let until = first.answer.waits_until;
        steps
            .report(
                STEP,
                StepState::Waiting,
                to_approve(&first.answer, self.key.key_id()),
                None,
            )
            .await;
        let silent = Steps(None);
        loop {
            tokio::time::sleep(APPROVAL_POLL).await;
            let judged = match Box::pin(self.ask_all(&silent)).await {
                Ok(answered) if answered.answer.waits_until != 0 => continue,
                Err(error) if error.is_worth_another() || error.code() == Code::Busy => {
                    match self.now_ms() > until {
                        true => Err(JoinError::Lapsed),
                        false => continue,
                    }
                }
                judged => judged,
            };
            match &judged {
                Ok(_) => steps.report(STEP, StepState::Done, String::new(), None).await,
                Err(error) => {
                    steps
                        .report(STEP, StepState::Failed, chain(error), Some(error))
                        .await
                }
            }
            return judged;
        }
    }

    async fn enrol_at(&self, address: &str, steps: &Steps) -> Result<Answered, JoinError> {
        let found = steps
            .run("name", address, async { Ok(dial::resolve(address).await?) })
            .await?;
        let stream = steps
            .run("tcp", address, async {
                Ok(dial::connect(address, &found).await?)
            })
            .await?;
        let asked = self.now_ms();
        // On the heap: what a handshake holds makes large futures.
        let roots =
            Box::pin(async { Ok(tls::fetch_roots_over(address, stream, &self.request.ticket).await?) });
        let (bundle, cluster, theirs) = steps.run("root", address, roots).await?;
        let ours = asked.midpoint(self.now_ms());
        steps
            .run("clock", address, async { compare_clocks(ours, theirs) })
            .await?;
        let answer = steps
            .run(
                "ticket",
                address,
                Box::pin(self.say_secret(address, &bundle, cluster)),
            )
            .await?;
        Ok(Answered {
            address: address.to_owned(),
            answer,
            bundle,
        })
    }

    /// The one place where the secret leaves, over a connection that chains to the ticket's root.
    async fn say_secret(
        &self,
        address: &str,
        bundle: &Bundle,
        cluster: ClusterId,
    ) -> Result<EnrolResponse, JoinError> {
        let config = std::sync::Arc::new(tls::anonymous_config(bundle, tls::Expect::AnyManager));
        let stream = tls::open(address, config, cluster).await?;
        let channel = tls::over(address, stream).await?;
        let mut client = EnrolmentClient::new(channel).max_decoding_message_size(ANSWER_BYTES);
        let message = EnrolRequest {
            ticket_secret: self.request.ticket.secret().expose().to_vec(),
            csr: self.key.csr().map_err(|_| JoinError::Entropy)?,
            description: Some(self.request.description.clone()),
            advertise: self.request.advertise.clone(),
            request_id: self.request_id.to_wire(),
            name: self.request.name.clone(),
            role: match self.request.role {
                Role::Manager => wire::Role::Manager,
                Role::Worker => wire::Role::Worker,
                Role::Operator => wire::Role::Operator,
                Role::Standby => wire::Role::Standby,
            }
            .into(),
        };
        match timeout(ENROL, client.enrol(message)).await {
            Ok(answer) => answer
                .map(tonic::Response::into_inner)
                .map_err(|status| refusal(address, &status)),
            Err(_) => Err(JoinError::Unanswered {
                address: address.to_owned(),
                message: format!("none within {} s", ENROL.as_secs()),
            }),
        }
    }

    async fn accept(&self, answered: Answered, steps: &Steps) -> Result<Enrolled, JoinError> {
        let Answered {
            address,
            answer,
            bundle: pinned,
        } = answered;
        let now = UnixTime::since_unix_epoch(Duration::from_millis(self.clock.wall_millis()));
        steps
            .run("certificate", &address, async {
                check(&self.key, self.request.role, &answer, &pinned, now, &address)
            })
            .await
            .map(|(certificate, bundle)| Enrolled {
                credentials: Credentials {
                    key: self.key.clone(),
                    certificate,
                    chain: answer.chain,
                    bundle,
                },
                name: answer.name,
                member: (answer.member_id != 0).then_some(MemberId(answer.member_id)),
                epoch: answer.epoch,
                index: answer.index,
                managers: answer.managers,
                lock: UnlockKey::from_bytes(answer.unlock_generation, &answer.unlock_key),
            })
    }

    fn now_ms(&self) -> i64 {
        i64::try_from(self.clock.wall_millis()).unwrap_or(i64::MAX)
    }
}

/// Whether the answer is a certificate for our key, of the ticket's cluster and our role, under roots that include the
/// one the ticket names.
fn check(
    key: &Key,
    role: Role,
    answer: &EnrolResponse,
    pinned: &Bundle,
    now: UnixTime,
    address: &str,
) -> Result<(Certificate, Bundle), JoinError> {
    let refuse = |what: String| JoinError::Certificate {
        address: address.to_owned(),
        what,
    };
    let bundle = Bundle::from_ders(answer.roots.clone()).map_err(|error| refuse(error.to_string()))?;
    let named = pinned.ders();
    if !bundle.ders().iter().any(|root| named.contains(root)) {
        return Err(refuse("its roots leave out the one that the ticket names".into()));
    }
    let leaf = CertificateDer::from(answer.certificate.as_slice());
    let certificate = bundle
        .verify_client(&leaf, &[], now)
        .map_err(|error| refuse(error.to_string()))?;
    if certificate.key_id() != key.key_id() {
        return Err(refuse("it is for another key".into()));
    }
    let got = certificate.subject().role;
    if got != role {
        return Err(JoinError::Role { wanted: role, got });
    }
    if (got == Role::Manager) != (answer.member_id != 0) {
        return Err(refuse("managers, and only they, get a member id".into()));
    }
    Ok((certificate, bundle))
}

/// What an operator is to do, and how he knows this node.
fn to_approve(answer: &EnrolResponse, key: KeyId) -> String {
    let name = printable(&answer.name);
    let until = time_text(answer.waits_until);
    format!("for 'bulkhead node approve {name}', until {until}; this node's key is {key}")
}

fn time_text(millis: i64) -> String {
    match ASN1Time::from_timestamp(millis / 1000) {
        Ok(time) => time.to_string(),
        Err(_) => format!("{millis} ms since 1970"),
    }
}

fn compare_clocks(ours_ms: i64, theirs_ms: i64) -> Result<(), JoinError> {
    let apart = Duration::from_millis(ours_ms.abs_diff(theirs_ms));
    if apart <= CLOCK_SKEW {
        return Ok(());
    }
    Err(JoinError::Clock {
        ours: time_text(ours_ms),
        theirs: time_text(theirs_ms),
    })
}

/// A status that asks for patience is told from one that says no.
fn refusal(address: &str, status: &Status) -> JoinError {
    let address = address.to_owned();
    let metadata = status.metadata();
    let code = metadata
        .get(CODE_KEY)
        .and_then(|value| Code::parse(value.to_str().ok()?));
    let message = printable(status.message());
    let again = matches!(
        status.code(),
        tonic::Code::Unavailable
            | tonic::Code::DeadlineExceeded
            | tonic::Code::Cancelled
            | tonic::Code::Unknown
    );
    if again {
        return JoinError::Unanswered { address, message };
    }
    let hint = metadata.get_bin(HINT_KEY).and_then(|value| value.to_bytes().ok());
    let hint = hint
        .map(|bytes| printable(&String::from_utf8_lossy(&bytes)))
        .unwrap_or_default();
    JoinError::Refused {
        address,
        code,
        message,
        hint,
    }
}

/// Another's words, cut, and without what would move a terminal's cursor.
fn printable(words: &str) -> String {
    words.chars().filter(|c| !c.is_control()).take(WORDS).collect()
}

/// Where progress goes, if anywhere. A listener that went away does not end the join.
struct Steps(Option<mpsc::Sender<JoinProgress>>);

impl Steps {
    async fn run<T>(
        &self,
        step: &str,
        address: &str,
        work: impl Future<Output = Result<T, JoinError>>,
    ) -> Result<T, JoinError> {
        self.report(step, StepState::Started, address.to_owned(), None)
            .await;
        let done = work.await;
        match &done {
            Ok(_) => self.report(step, StepState::Done, address.to_owned(), None).await,
            Err(error) => {
                self.report(step, StepState::Failed, chain(error), Some(error))
                    .await
            }
        }
        done
    }

    async fn report(&self, step: &str, state: StepState, detail: String, error: Option<&JoinError>) {
        let Some(listener) = &self.0 else { return };
        let progress = JoinProgress {
            step: step.to_owned(),
            state: state.into(),
            detail,
            hint: error.map(JoinError::hint).unwrap_or_default(),
            code: error.map(|e| e.code().as_str().to_owned()).unwrap_or_default(),
            ..JoinProgress::default()
        };
        let _ = listener.send(progress).await; // see above
    }
}

/// An error with its causes, for people.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use bulkhead_proto::wire::enrolment_server::{Enrolment as Service, EnrolmentServer};
    use bulkhead_proto::wire::{GetRootRequest, GetRootResponse};
    use tokio::net::TcpListener;
    use tokio_util::task::AbortOnDropHandle;
    use tonic::metadata::MetadataValue;
    use tonic::{Request, Response};
    use zeroize::Zeroizing;

    use super::*;
    use crate::seam::SystemClock;
    use crate::testing::{HOUR_MS, authority, credentials, now_ms, subject};
    use crate::ticket::TicketSecret;
    use crate::{Authority, Identity, csr};

    /// A manager that admits whoever knows the secret, and writes down what it hears.
    #[derive(Clone)]
    struct Manager {
        authority: Arc<Authority>,
        role: Role,
        clock_ahead_ms: i64,
        refusal: Option<(tonic::Code, Code)>,
        /// Answers that say to wait, before the one that is a certificate.
        waits: Arc<Mutex<u32>>,
        former: Vec<Vec<u8>>,
        heard: Arc<Mutex<Vec<EnrolRequest>>>,
    }

    #[tonic::async_trait]
    impl Service for Manager {
        async fn get_root(&self, _: Request<GetRootRequest>) -> Result<Response<GetRootResponse>, Status> {
            let roots = vec![self.authority.root_der().to_vec()];
            Ok(Response::new(GetRootResponse {
                roots,
                former: self.former.clone(),
                now: now_ms() + self.clock_ahead_ms,
                ..Default::default()
            }))
        }

        async fn enrol(&self, request: Request<EnrolRequest>) -> Result<Response<EnrolResponse>, Status> {
            let request = request.into_inner();
            self.heard.lock().expect("heard").push(request.clone());
            if let Some((grpc, code)) = self.refusal {
                let mut status = Status::new(grpc, "the ticket\x1b[2J expired");
                status
                    .metadata_mut()
                    .insert(CODE_KEY, code.as_str().parse().expect("ASCII"));
                status
                    .metadata_mut()
                    .insert_bin(HINT_KEY, MetadataValue::from_bytes("make another".as_bytes()));
                return Err(status);
            }
            let mut waits = self.waits.lock().expect("waits");
            if *waits > 0 {
                *waits -= 1;
                return Ok(Response::new(EnrolResponse {
                    waits_until: now_ms() + HOUR_MS,
                    name: "n9".into(),
                    ..Default::default()
                }));
            }
            let key = csr::public_key(&request.csr).expect("a request");
            let end = now_ms() + HOUR_MS;
            Ok(Response::new(EnrolResponse {
                certificate: self
                    .authority
                    .issue(&subject(self.role, 9), &key, now_ms(), end)
                    .expect("a leaf"),
                roots: vec![self.authority.root_der().to_vec()],
                member_id: if self.role == Role::Manager { 7 } else { 0 },
                name: "n9".into(),
                ..Default::default()
            }))
        }

        async fn r#return(
            &self,
            _: Request<bulkhead_proto::wire::ReturnRequest>,
        ) -> Result<Response<EnrolResponse>, Status> {
            Err(Status::unimplemented(""))
        }
    }

    impl Manager {
        fn new(role: Role) -> Self {
            let (authority, heard) = (Arc::new(authority()), Arc::default());
            Self {
                authority,
                role,
                clock_ahead_ms: 0,
                refusal: None,
                waits: Arc::default(),
                former: Vec::new(),
                heard,
            }
        }

        async fn serve(&self) -> (String, AbortOnDropHandle<()>) {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let address = listener.local_addr().expect("an address").to_string();
            let identity =
                Identity::new(credentials(&self.authority, Role::Manager, 1)).expect("credentials");
            let stream = tls::incoming(listener, identity, Arc::new(crate::seam::SystemClock::start()));
            let server = tonic::transport::Server::builder().add_service(EnrolmentServer::new(self.clone()));
            let task =
                tokio::spawn(async move { server.serve_with_incoming(stream).await.expect("a server") });
            (address, AbortOnDropHandle::new(task))
        }

        fn ticket(&self) -> Ticket {
            Ticket::new(
                self.authority.root_der(),
                TicketSecret::new(Zeroizing::new([0xAB; 16])),
            )
        }
    }

    /// A worker's request.
    fn request(addresses: &[&str], ticket: Ticket) -> Enrolment {
        Enrolment {
            ticket,
            addresses: addresses.iter().map(|&address| address.to_owned()).collect(),
            role: Role::Worker,
            description: NodeDescription::default(),
            listen: String::new(),
            advertise: String::new(),
            name: String::new(),
        }
    }

    /// Joins as a worker; gives the outcome and `step:state` of all that was reported.
    async fn join(addresses: &[&str], ticket: Ticket) -> (Result<Enrolled, JoinError>, Vec<JoinProgress>) {
        let request = request(addresses, ticket);
        let (send, mut receive) = mpsc::channel(64);
        let outcome = enrol(request, &Attempts::default(), &SystemClock::start(), send).await;
        let mut steps = Vec::new();
        while let Some(step) = receive.recv().await {
            steps.push(step);
        }
        (outcome, steps)
    }

    #[tokio::test]
    async fn a_worker_joins_and_says_each_step() {
        let manager = Manager::new(Role::Worker);
        let (address, _server) = manager.serve().await;
        let (outcome, steps) = join(&[&address], manager.ticket()).await;
        let enrolled = outcome.expect("joined");
        assert_eq!(
            enrolled.credentials.certificate.subject(),
            subject(Role::Worker, 9)
        );
        assert_eq!((enrolled.name.as_str(), enrolled.member), ("n9", None));
        Identity::new(enrolled.credentials).expect("parts that belong together");
        let done: Vec<_> = steps
            .iter()
            .filter(|step| step.state() == StepState::Done)
            .map(|step| step.step.as_str())
            .collect();
        assert_eq!(done, ["name", "tcp", "root", "clock", "ticket", "certificate"]);
        assert_eq!(manager.heard.lock().expect("heard")[0].ticket_secret, [0xAB; 16]);
    }

    #[tokio::test]
    async fn whoever_asks_again_after_a_lost_answer_is_the_same_node() {
        let mut manager = Manager::new(Role::Worker);
        manager.refusal = Some((tonic::Code::Unavailable, Code::NoQuorum));
        let (address, _server) = manager.serve().await;
        let (attempts, clock) = (Attempts::default(), SystemClock::start());
        let ask = async |name: &str| {
            let mut request = request(&[&address], manager.ticket());
            request.name = name.to_owned();
            let (send, _receive) = mpsc::channel(64);
            enrol(request, &attempts, &clock, send)
                .await
                .expect_err("no answer");
            let heard = manager.heard.lock().expect("heard").pop().expect("it was asked");
            let key = crate::csr::public_key(&heard.csr).expect("a request").key_id();
            (heard.request_id, key)
        };
        let first = ask("a").await;
        assert_eq!(ask("a").await, first);
        assert_ne!(ask("b").await, first, "what is wished for is another node");
    }

    #[tokio::test]
    async fn whoever_was_refused_asks_with_another_key() {
        let mut manager = Manager::new(Role::Worker);
        manager.refusal = Some((tonic::Code::PermissionDenied, Code::TicketRefused));
        let (address, _server) = manager.serve().await;
        let (attempts, clock) = (Attempts::default(), SystemClock::start());
        let mut keys = Vec::new();
        for _ in 0..2 {
            let (send, _receive) = mpsc::channel(64);
            let request = request(&[&address], manager.ticket());
            enrol(request, &attempts, &clock, send)
                .await
                .expect_err("refused");
            let heard = manager.heard.lock().expect("heard").pop().expect("it was asked");
            keys.push(crate::csr::public_key(&heard.csr).expect("a request").key_id());
        }
        assert_ne!(keys[0], keys[1]);
    }

    #[tokio::test]
    async fn an_address_that_does_not_answer_is_followed_by_the_next() {
        let manager = Manager::new(Role::Worker);
        let (address, _server) = manager.serve().await;
        let free = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port")
            .local_addr()
            .expect("an address");
        let (outcome, steps) = join(&[&free.to_string(), &address], manager.ticket()).await;
        outcome.expect("joined at the second");
        let failed: Vec<_> = steps
            .iter()
            .filter(|step| step.state() == StepState::Failed)
            .collect();
        assert_eq!(failed.len(), 1);
        assert!(
            failed[0].step == "tcp" && failed[0].hint.contains("port"),
            "{failed:?}"
        );
    }

    #[tokio::test]
    async fn whoever_has_another_root_never_hears_the_secret() {
        let (impostor, ours) = (Manager::new(Role::Worker), Manager::new(Role::Worker));
        let (address, _server) = impostor.serve().await;
        let (outcome, _) = join(&[&address], ours.ticket()).await;
        assert_eq!(outcome.expect_err("another root").code(), Code::RootMismatch);
        assert!(impostor.heard.lock().expect("heard").is_empty());
    }

    #[tokio::test]
    async fn a_ticket_of_a_root_that_was_rotated_away_is_told_from_a_wrong_one() {
        let (old, mut now) = (Manager::new(Role::Worker), Manager::new(Role::Worker));
        let other = Manager::new(Role::Worker).authority;
        now.former = [other, old.authority.clone()]
            .map(|it| it.root_der().to_vec())
            .into();
        let (address, _server) = now.serve().await;
        let (outcome, _) = join(&[&address], old.ticket()).await;
        let error = outcome.expect_err("an old ticket");
        assert_eq!(error.code(), Code::TicketOld);
        assert!(
            error.to_string().contains("older than the cluster's root"),
            "{error}"
        );
        assert!(now.heard.lock().expect("heard").is_empty(), "the secret stays");
    }

    #[tokio::test]
    async fn whoever_waits_for_approval_is_the_same_node_after_a_restart() {
        let manager = Manager::new(Role::Worker);
        *manager.waits.lock().expect("waits") = u32::MAX;
        let (address, _server) = manager.serve().await;
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("joining");
        let clock = SystemClock::start();
        let attempts = Attempts::kept(&file, Role::Worker);
        assert!(attempts.pending().is_none());
        let (send, mut steps) = mpsc::channel::<JoinProgress>(64);
        let waits = async {
            while let Some(step) = steps.recv().await {
                if step.state() == StepState::Waiting {
                    return step.detail;
                }
            }
            String::new()
        };
        // The program ends while it waits.
        let detail = tokio::select! {
            biased;
            detail = waits => detail,
            ended = enrol(request(&[&address], manager.ticket()), &attempts, &clock, send) => {
                panic!("it waits: {ended:?}")
            }
        };
        let heard = manager.heard.lock().expect("heard").pop().expect("it asked");
        let key = crate::csr::public_key(&heard.csr).expect("a request").key_id();
        assert!(
            detail.contains("node approve n9") && detail.contains(&key.to_string()),
            "{detail}"
        );

        *manager.waits.lock().expect("waits") = 1;
        let attempts = Attempts::kept(&file, Role::Worker);
        let pending = attempts.pending().expect("it goes on");
        let ticket = pending.ticket.parse().expect("a ticket");
        let addresses: Vec<&str> = pending.addresses.iter().map(String::as_str).collect();
        let (send, _steps) = mpsc::channel(64);
        let enrolled = enrol(request(&addresses, ticket), &attempts, &clock, send).await;
        let enrolled = enrolled.expect("approved");
        assert_eq!(enrolled.credentials.certificate.key_id(), key);
        // What it got may not reach the disk: then the next life asks as the same node.
        assert!(Attempts::kept(&file, Role::Worker).pending().is_some());
        let copy = folder.path().join("another name of the file");
        std::fs::hard_link(&file, &copy).expect("a link");
        attempts.forget();
        assert!(!file.exists() && attempts.pending().is_none());
        let left = std::fs::read(&copy).expect("its bytes");
        assert!(
            !left.is_empty() && left.iter().all(|&byte| byte == 0),
            "the key is written over"
        );
    }

    #[tokio::test]
    async fn whoever_repeats_the_root_without_its_keys_never_hears_the_secret() {
        // It answers GetRoot with the true root, but its own certificate is another authority's.
        let ours = Manager::new(Role::Worker);
        let impostor = Manager::new(Role::Worker);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let identity =
            Identity::new(credentials(&impostor.authority, Role::Manager, 1)).expect("credentials");
        let stream = tls::incoming(listener, identity, Arc::new(crate::seam::SystemClock::start()));
        let server = tonic::transport::Server::builder().add_service(EnrolmentServer::new(ours.clone()));
        let task = tokio::spawn(async move { server.serve_with_incoming(stream).await.expect("a server") });
        let _server = AbortOnDropHandle::new(task);
        let (outcome, _) = join(&[&address], ours.ticket()).await;
        assert_eq!(outcome.expect_err("an impostor").code(), Code::WrongPeer);
        assert!(ours.heard.lock().expect("heard").is_empty());
    }

    #[tokio::test]
    async fn each_refusal_has_its_code_and_next_step() {
        for (change, code, hint) in [
            (
                (|m| m.clock_ahead_ms = 31_000) as fn(&mut Manager),
                Code::ClockSkew,
                "NTP",
            ),
            (|m| m.clock_ahead_ms = -31_000, Code::ClockSkew, "NTP"),
            (|m| m.role = Role::Manager, Code::TicketRole, "role"),
            (
                |m| m.refusal = Some((tonic::Code::PermissionDenied, Code::TicketExpired)),
                Code::TicketExpired,
                "make another",
            ),
            (
                |m| m.refusal = Some((tonic::Code::Unavailable, Code::NoQuorum)),
                Code::Unreachable,
                "used the ticket",
            ),
        ] {
            let mut manager = Manager::new(Role::Worker);
            change(&mut manager);
            let (address, _server) = manager.serve().await;
            let (outcome, steps) = join(&[&address], manager.ticket()).await;
            let error = outcome.expect_err("refused");
            assert_eq!(error.code(), code, "{error}");
            let last = steps.last().expect("a step");
            assert_eq!(last.state(), StepState::Failed);
            assert!(last.hint.contains(hint) && error.hint() == last.hint, "{last:?}");
            assert!(!last.detail.contains('\x1b') && !format!("{error:?}{last:?}").contains("171, 171"));
            assert_eq!(
                manager.heard.lock().expect("heard").is_empty(),
                code == Code::ClockSkew
            );
        }
    }
}
