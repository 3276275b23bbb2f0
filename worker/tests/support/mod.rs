//! A manager in this process, over real TLS: it admits, and says on its sessions what a test tells it to.
#![allow(dead_code, reason = "each test program uses a part of this")]
#![allow(
    unreachable_pub,
    reason = "shared by several test programs, each of which is a crate of its own"
)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use bulkhead_identity::seam::{Clock, Entropy, SystemClock, SystemEntropy};
use bulkhead_identity::ticket::{TICKET_SECRET_BYTES, Ticket, TicketSecret};
use bulkhead_identity::{
    Authority, Bundle, Certificate, ConnectInfo, Credentials, Identity, Key, Peer, Subject, csr, tls,
};
use bulkhead_proto::{ClusterId, Digest, KeyId, NodeId, Role, wire};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};
use wire::dispatcher_server::{Dispatcher, DispatcherServer};
use wire::enrolment_server::{Enrolment, EnrolmentServer};
use wire::session_down::Message as Down;
use wire::session_up::Message as Up;

pub const DAY_MS: i64 = 86_400_000;
/// Nothing here takes longer, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the manager notes as the last message of a log stream, however it ended.
pub const CLOSED: &str = "closed";

pub fn now_ms() -> i64 {
    i64::try_from(SystemClock::start().wall_millis()).unwrap()
}

pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemEntropy.fill(&mut bytes).unwrap();
    bytes
}

/// Waits, but not for ever.
pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what)
        .await
        .expect("it happens in time")
}

/// A cluster's root.
pub struct Cluster {
    pub authority: Authority,
    pub id: ClusterId,
}

impl Cluster {
    pub fn new() -> Arc<Cluster> {
        let id = ClusterId::from_bytes(random());
        let authority = Authority::generate(id, now_ms()).unwrap();
        Arc::new(Cluster { authority, id })
    }

    pub fn bundle(&self) -> Bundle {
        Bundle::from_ders(vec![self.authority.root_der().to_vec()]).unwrap()
    }

    pub fn issue(&self, node: NodeId, role: Role, csr_der: &[u8], valid: (i64, i64)) -> Vec<u8> {
        let subject = Subject {
            cluster: self.id,
            node,
            role,
        };
        let key = csr::public_key(csr_der).unwrap();
        self.authority.issue(&subject, &key, valid.0, valid.1).unwrap()
    }

    pub fn identity(&self, node: NodeId, role: Role, valid: (i64, i64)) -> Identity {
        let key = Key::generate().unwrap();
        let certificate = self.issue(node, role, &key.csr().unwrap(), valid);
        Identity::new(Credentials {
            key,
            certificate: Certificate::from_der(&certificate).unwrap(),
            chain: Vec::new(),
            bundle: self.bundle(),
        })
        .unwrap()
    }
}

/// Valid since a minute ago, for a day.
pub fn a_day() -> (i64, i64) {
    (now_ms() - 60_000, now_ms() + DAY_MS)
}

/// A session as a worker has begun it.
pub struct Session {
    pub hello: wire::SessionHello,
    pub key: KeyId,
    pub node: NodeId,
    up: Streaming<wire::SessionUp>,
    down: mpsc::Sender<Result<wire::SessionDown, Status>>,
}

impl Session {
    pub async fn say(&self, message: Down) {
        let message = wire::SessionDown {
            message: Some(message),
        };
        self.down.send(Ok(message)).await.expect("the worker listens");
    }

    /// Gives signs of freshness from now on, as a manager does.
    pub fn beat(&self) {
        let down = self.down.clone();
        tokio::spawn(async move {
            let beat = || wire::SessionDown {
                message: Some(Down::Beat(wire::Beat::default())),
            };
            while down.send(Ok(beat())).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        });
    }

    /// Whether the worker has gone from this stream.
    pub async fn ended(mut self) {
        soon(async { while let Ok(Some(_)) = self.up.message().await {} }).await;
    }

    pub async fn welcome(&self, epoch: u64, index: u64) {
        self.welcome_as(self.node, epoch, index).await;
    }

    pub async fn welcome_as(&self, node: NodeId, epoch: u64, index: u64) {
        let welcome = wire::Welcome {
            epoch,
            index,
            node_id: node.to_wire(),
            name: "worker-1".into(),
            heartbeat_ms: 50,
        };
        self.say(Down::Welcome(welcome)).await;
    }

    /// The next message that is no sign of life.
    pub async fn hear(&mut self) -> Up {
        soon(async {
            loop {
                let message = self
                    .up
                    .message()
                    .await
                    .expect("the stream works")
                    .expect("it is open");
                match message.message.expect("a message") {
                    Up::Alive(_) => {}
                    other => return other,
                }
            }
        })
        .await
    }

    /// Signs of life.
    pub async fn hear_alive(&mut self, count: usize) {
        soon(async {
            let mut heard = 0;
            while heard < count {
                let message = self
                    .up
                    .message()
                    .await
                    .expect("the stream works")
                    .expect("it is open");
                heard += usize::from(matches!(message.message, Some(Up::Alive(_))));
            }
        })
        .await
    }

    /// Acknowledges reports until one of this state came.
    pub async fn until(&mut self, task: &[u8], state: wire::TaskState) -> wire::TaskStatus {
        soon(self.until_ever(task, state)).await
    }

    async fn until_ever(&mut self, task: &[u8], state: wire::TaskState) -> wire::TaskStatus {
        loop {
            let message = self
                .up
                .message()
                .await
                .expect("the stream works")
                .expect("it is open");
            let Some(Up::Status(batch)) = message.message else {
                continue;
            };
            self.say(Down::StatusAck(wire::StatusAck {
                sequence: batch.sequence,
            }))
            .await;
            for report in batch.reports {
                let status = report.status.expect("status");
                if report.task_id == task && status.state() == state {
                    return status;
                }
                assert!(
                    report.task_id != task
                        || status.state() < wire::TaskState::Complete
                        || status.state() == state,
                    "{status:?}"
                );
            }
        }
    }
}

/// What the manager has, and what came to it.
pub struct Manager {
    pub address: SocketAddr,
    pub cluster: Arc<Cluster>,
    pub node: NodeId,
    pub sessions: mpsc::Receiver<Session>,
    pub logs: mpsc::Receiver<wire::LogUp>,
    pub renewals: mpsc::Receiver<NodeId>,
    pub shared: Arc<Shared>,
    serving: JoinHandle<()>,
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

pub struct Shared {
    cluster: Arc<Cluster>,
    node: NodeId,
    address: SocketAddr,
    /// Blobs by digest.
    pub blobs: Mutex<BTreeMap<Digest, Vec<u8>>>,
    /// Offsets that were asked for.
    pub offsets: Mutex<Vec<u64>>,
    /// After this many bytes each blob stream breaks, until it is 0.
    pub break_after: Mutex<usize>,
    pub ticket: TicketSecret,
    sessions: mpsc::Sender<Session>,
    logs: mpsc::Sender<wire::LogUp>,
    renewals: mpsc::Sender<NodeId>,
}

impl Manager {
    pub async fn start(cluster: &Arc<Cluster>) -> Manager {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let node = NodeId::from_bytes(random());
        let identity = cluster.identity(node, Role::Manager, a_day());
        let ((sessions_to, sessions), (logs_to, logs), (renewals_to, renewals)) =
            (mpsc::channel(16), mpsc::channel(1024), mpsc::channel(16));
        let shared = Arc::new(Shared {
            cluster: cluster.clone(),
            node,
            address,
            blobs: Mutex::default(),
            offsets: Mutex::default(),
            break_after: Mutex::default(),
            ticket: TicketSecret::new(random::<TICKET_SECRET_BYTES>().into()),
            sessions: sessions_to,
            logs: logs_to,
            renewals: renewals_to,
        });
        let server = tonic::transport::Server::builder()
            .add_service(DispatcherServer::from_arc(shared.clone()))
            .add_service(EnrolmentServer::from_arc(shared.clone()))
            .serve_with_incoming(tls::incoming(listener, identity, Arc::new(SystemClock::start())));
        Manager {
            address,
            cluster: cluster.clone(),
            node,
            sessions,
            logs,
            renewals,
            shared,
            serving: tokio::spawn(async move { server.await.expect("the fake manager serves") }),
        }
    }

    pub async fn session(&mut self) -> Session {
        soon(self.sessions.recv()).await.expect("the manager runs")
    }

    pub fn ticket(&self) -> String {
        let secret = TicketSecret::from_wire(self.shared.ticket.expose()).unwrap();
        Ticket::new(self.cluster.authority.root_der(), secret)
            .to_text()
            .to_string()
    }

    pub fn add_blob(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        self.shared.blobs.lock().unwrap().insert(digest, bytes.to_vec());
        digest
    }
}

/// Notes the end of a log stream, however it comes.
struct Closed(mpsc::Sender<wire::LogUp>, u64);

impl Drop for Closed {
    fn drop(&mut self) {
        let closed = wire::LogUp {
            stream: self.1,
            lines: vec![],
            error: CLOSED.into(),
        };
        let _ = self.0.try_send(closed); // a test that is over does not ask
    }
}

fn caller<T>(request: &Request<T>) -> Result<(NodeId, KeyId), Status> {
    match request.extensions().get::<ConnectInfo>().map(|info| &info.peer) {
        Some(Peer::Node(certificate)) if certificate.subject().role == Role::Worker => {
            Ok((certificate.subject().node, certificate.key_id()))
        }
        _ => Err(Status::unauthenticated("no worker's certificate")),
    }
}

type Answer<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Dispatcher for Shared {
    type SessionStream = Answer<wire::SessionDown>;

    async fn session(
        &self,
        request: Request<Streaming<wire::SessionUp>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (node, key) = caller(&request)?;
        let mut up = request.into_inner();
        let Some(Up::Hello(hello)) = up.message().await?.and_then(|first| first.message) else {
            return Err(Status::invalid_argument("no hello"));
        };
        let (down, out) = mpsc::channel(64);
        let session = Session {
            hello,
            key,
            node,
            up,
            down,
        };
        self.sessions
            .send(session)
            .await
            .map_err(|_| Status::unavailable("ending"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(out))))
    }

    type FetchBlobStream = Answer<wire::BlobChunk>;

    async fn fetch_blob(
        &self,
        request: Request<wire::FetchBlobRequest>,
    ) -> Result<Response<Self::FetchBlobStream>, Status> {
        caller(&request)?;
        let request = request.into_inner();
        let digest = Digest::from_bytes(request.digest.try_into().unwrap());
        let blob = self.blobs.lock().unwrap().get(&digest).cloned();
        let blob = blob.ok_or_else(|| Status::not_found("no such blob"))?;
        self.offsets.lock().unwrap().push(request.offset);
        let rest = &blob[usize::try_from(request.offset).unwrap()..];
        let end = match std::mem::take(&mut *self.break_after.lock().unwrap()) {
            0 => rest.len(),
            end => end.min(rest.len()),
        };
        let mut answer: Vec<_> = rest[..end]
            .chunks(64 << 10)
            .map(|data| {
                Ok(wire::BlobChunk {
                    data: data.to_vec().into(),
                })
            })
            .collect();
        if end < rest.len() {
            answer.push(Err(Status::unavailable("broken, as the test asked")));
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(answer))))
    }

    async fn attend(
        &self,
        _: Request<wire::AttendRequest>,
    ) -> Result<Response<wire::AttendResponse>, Status> {
        Err(Status::permission_denied("a worker is no standby"))
    }

    async fn renew(
        &self,
        request: Request<wire::RenewRequest>,
    ) -> Result<Response<wire::RenewResponse>, Status> {
        let (node, _) = caller(&request)?;
        let certificate = self
            .cluster
            .issue(node, Role::Worker, &request.into_inner().csr, a_day());
        self.renewals
            .send(node)
            .await
            .map_err(|_| Status::unavailable("ending"))?;
        Ok(Response::new(wire::RenewResponse {
            certificate,
            roots: vec![self.cluster.authority.root_der().to_vec()],
            index: 1,
            chain: Vec::new(),
            ..Default::default()
        }))
    }

    async fn withdraw(
        &self,
        request: Request<wire::WithdrawRequest>,
    ) -> Result<Response<wire::WithdrawResponse>, Status> {
        caller(&request)?;
        Ok(Response::new(wire::WithdrawResponse { index: 1 }))
    }

    async fn push_logs(
        &self,
        request: Request<Streaming<wire::LogUp>>,
    ) -> Result<Response<wire::PushLogsResponse>, Status> {
        caller(&request)?;
        let mut parts = request.into_inner();
        // A stream that the worker gives up ends this call where it stands.
        let mut closed = Closed(self.logs.clone(), 0);
        while let Some(part) = parts.next().await {
            let part = part?;
            closed.1 = part.stream;
            self.logs
                .send(part)
                .await
                .map_err(|_| Status::unavailable("ending"))?;
        }
        Ok(Response::new(wire::PushLogsResponse {}))
    }
}

#[tonic::async_trait]
impl Enrolment for Shared {
    async fn get_root(
        &self,
        _: Request<wire::GetRootRequest>,
    ) -> Result<Response<wire::GetRootResponse>, Status> {
        Ok(Response::new(wire::GetRootResponse {
            roots: vec![self.cluster.authority.root_der().to_vec()],
            cluster_id: self.cluster.id.to_wire(),
            now: now_ms(),
            challenge: b"challenge".to_vec(),
            ..Default::default()
        }))
    }

    async fn enrol(
        &self,
        request: Request<wire::EnrolRequest>,
    ) -> Result<Response<wire::EnrolResponse>, Status> {
        let request = request.into_inner();
        if request.ticket_secret != self.ticket.expose() || request.role() != wire::Role::Worker {
            return Err(Status::permission_denied("not this ticket"));
        }
        let node = NodeId::from_bytes(random());
        Ok(Response::new(wire::EnrolResponse {
            certificate: self.cluster.issue(node, Role::Worker, &request.csr, a_day()),
            roots: vec![self.cluster.authority.root_der().to_vec()],
            cluster_id: self.cluster.id.to_wire(),
            node_id: node.to_wire(),
            role: wire::Role::Worker.into(),
            member_id: 0,
            managers: vec![wire::ManagerAddress {
                node_id: self.node.to_wire(),
                address: self.address.to_string(),
                member_id: 1,
            }],
            epoch: 1,
            index: 1,
            name: request.name,
            chain: Vec::new(),
            ..Default::default()
        }))
    }

    async fn r#return(
        &self,
        _: Request<wire::ReturnRequest>,
    ) -> Result<Response<wire::EnrolResponse>, Status> {
        Err(Status::permission_denied("nobody was away"))
    }
}
