use std::collections::BTreeMap;
use std::time::Duration;

use bulkhead_identity::comeback::{ComebackError, come_back};
use bulkhead_identity::seam::SystemEntropy;
use bulkhead_identity::tls::Expect;
use bulkhead_identity::{Certificate, Credentials};
use bulkhead_proto::wire::control_client::ControlClient;
use bulkhead_proto::wire::dispatcher_client::DispatcherClient;
use bulkhead_proto::wire::enrolment_client::EnrolmentClient;
use bulkhead_proto::wire::peer_client::PeerClient;
use bulkhead_proto::wire::raft_client::RaftClient;
use bulkhead_proto::wire::{
    AssignedSecret, Assignments, Change, Cluster, DesiredState, EnrolRequest, GetRootRequest, Image,
    ImageLayer, ListRequest, LogRequest, Node, Object, RaftMessage, ReadIndexRequest, RenewRequest,
    ReturnRequest, Role as WireRole, Secret, SecretReference, Service, ServiceSpec, ServiceVersion,
    SessionHello, SignOfLife, StatusBatch, Task, TaskObserved, TaskReport, TaskState, TaskStatus,
    Transaction, WithdrawRequest, change::Change as Step, object::Object as Any,
    session_down::Message as Down, session_up::Message as Up,
};
use bulkhead_proto::wire::{Kind, SessionDown};
use bulkhead_proto::{CODE_KEY, Digest, NodeId, Role, TaskId};
use bulkhead_raft::state::{Key, State};
use futures::StreamExt as _;
use prost::Message as _;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::Streaming;

use super::assignments::{Told, needs_blob, plan};
use super::reports::{ReportError, check};
use super::*;
use crate::ca::{Ca, Validity};
use crate::testing::{Manager, create, key};
use crate::view;

const NODE: NodeId = NodeId::from_bytes([1; 16]);
const OTHER: NodeId = NodeId::from_bytes([2; 16]);

fn node(id: NodeId) -> Any {
    Any::Node(Node {
        id: id.to_wire(),
        name: id.to_string(),
        ..Default::default()
    })
}

/// A secret and an image of the same number, and a service that uses both.
fn service(n: u8, environment: Vec<String>) -> [Any; 3] {
    let spec = ServiceSpec {
        name: format!("service-{n}"),
        image_id: vec![n; 16],
        environment,
        secrets: vec![SecretReference {
            secret_id: vec![n; 16],
            name: "password".into(),
        }],
        ..Default::default()
    };
    [
        Any::Secret(Secret {
            id: vec![n; 16],
            name: format!("secret-{n}"),
            ..Default::default()
        }),
        Any::Image(Image {
            id: vec![n; 16],
            name: format!("image:{n}"),
            layers: vec![ImageLayer {
                digest: vec![n; 32],
                ..Default::default()
            }],
            ..Default::default()
        }),
        Any::Service(Service {
            id: vec![n; 16],
            versions: vec![ServiceVersion {
                number: 1,
                spec: Some(spec),
                created_at: 0,
            }],
            ..Default::default()
        }),
    ]
}

fn task(n: u8, service: u8, node: NodeId, state: TaskState) -> Task {
    Task {
        id: vec![n; 16],
        service_id: vec![service; 16],
        node_id: node.to_wire(),
        spec_version: 1,
        desired: DesiredState::Running.into(),
        status: Some(TaskStatus {
            state: state.into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn apply(state: &mut State, steps: Vec<Step>) {
    let transaction = Transaction {
        level: 1,
        changes: steps
            .into_iter()
            .map(|step| bulkhead_proto::wire::Change { change: Some(step) })
            .collect(),
        ..Default::default()
    };
    let index = state.index() + 1;
    let applied = state
        .apply(index, 1, &transaction.encode_to_vec())
        .expect("known level");
    assert_eq!(applied.outcome.rejection, None);
}

fn put(any: Any) -> Step {
    Step::Create(Object { object: Some(any) })
}

fn observed(task: u8, node: NodeId, state: TaskState) -> Step {
    Step::TaskObserved(TaskObserved {
        task_id: vec![task; 16],
        node_id: node.to_wire(),
        status: Some(TaskStatus {
            state: state.into(),
            ..Default::default()
        }),
    })
}

/// Services 1 and 2; task 1 of the first on NODE, task 2 of the second on OTHER.
fn state() -> State {
    let mut state = State::default();
    let objects = [node(NODE), node(OTHER)]
        .into_iter()
        .chain(service(1, vec![]))
        .chain(service(2, vec![]));
    apply(&mut state, objects.map(put).collect());
    let tasks = [
        task(1, 1, NODE, TaskState::Assigned),
        task(2, 2, OTHER, TaskState::Assigned),
    ];
    apply(&mut state, tasks.map(|task| put(Any::Task(task))).into());
    state
}

/// Opens every secret as its own number.
fn send(update: super::assignments::Update, complete: bool, sequence: u64) -> (Told, Vec<Assignments>) {
    let secrets = update
        .secrets
        .iter()
        .map(|id| AssignedSecret {
            id: id.to_wire(),
            ..Default::default()
        })
        .collect();
    update.into_parts(complete, 1, sequence, secrets)
}

#[test]
fn a_worker_is_told_what_its_own_tasks_need_and_nothing_else() {
    let state = state();
    let update = plan(&state, NODE, &Told::default());
    assert_eq!(update.put.len(), 1);
    assert_eq!(update.put[0].service_name, "service-1");
    assert_eq!(
        update
            .secrets
            .iter()
            .map(|it| it.as_bytes()[0])
            .collect::<Vec<_>>(),
        [1]
    );
    assert_eq!(update.images.iter().map(|it| it.id[0]).collect::<Vec<_>>(), [1]);
    let (told, _) = send(update, true, 1);
    assert!(plan(&state, NODE, &told).is_empty());
    assert!(plan(&state, NodeId::from_bytes([3; 16]), &Told::default()).is_empty());
    let blob = |n: u8| needs_blob(&state, NODE, &Digest::from_bytes([n; 32]));
    assert!(blob(1) && !blob(2));
}

#[test]
fn its_own_reports_are_not_told_back_and_an_ended_task_is_never_wanted_again() {
    let mut state = state();
    let (told, _) = send(plan(&state, NODE, &Told::default()), true, 1);
    apply(&mut state, vec![observed(1, NODE, TaskState::Running)]);
    assert!(plan(&state, NODE, &told).is_empty());
    apply(&mut state, vec![observed(1, NODE, TaskState::Failed)]);
    let update = plan(&state, NODE, &told);
    let desired = update.put[0].task.as_ref().map(|it| it.desired());
    assert_eq!(desired, Some(DesiredState::Shutdown));
    assert_eq!((update.forget.len(), update.secrets.len()), (1, 0));
    assert!(!needs_blob(&state, NODE, &Digest::from_bytes([1; 32])));
    // A worker that begins anew hears the same, without the secret.
    let anew = plan(&state, NODE, &Told::default());
    assert_eq!((anew.put.len(), anew.secrets.len(), anew.images.len()), (1, 0, 0));
    let (told, _) = send(update, false, 2);
    apply(
        &mut state,
        vec![Step::Delete(Key::new(Kind::Task, [1; 16]).to_wire())],
    );
    let update = plan(&state, NODE, &told);
    assert_eq!(update.remove, [TaskId::from_bytes([1; 16])]);
}

#[test]
fn a_secret_that_did_not_open_is_tried_again() {
    let state = state();
    let (told, parts) = plan(&state, NODE, &Told::default()).into_parts(true, 1, 1, Vec::new());
    assert!(parts[0].secrets.is_empty() && parts[0].put.len() == 1);
    assert_eq!(plan(&state, NODE, &told).secrets.len(), 1);
}

#[test]
fn a_large_update_is_cut_into_messages_that_belong_together() {
    let mut state = State::default();
    let large = vec!["x".repeat(60 << 10)];
    apply(
        &mut state,
        [node(NODE)]
            .into_iter()
            .chain(service(1, large))
            .map(put)
            .collect(),
    );
    let tasks = (0..100).map(|n| put(Any::Task(task(n, 1, NODE, TaskState::Assigned))));
    apply(&mut state, tasks.collect());
    let (_, parts) = send(plan(&state, NODE, &Told::default()), true, 5);
    assert!((3..10).contains(&parts.len()), "{}", parts.len());
    assert!(
        parts
            .iter()
            .all(|part| part.encoded_len() < limits::MESSAGE_BYTES && part.complete)
    );
    assert_eq!(parts.iter().map(|part| part.put.len()).sum::<usize>(), 100);
    let sequences: Vec<_> = parts.iter().map(|part| part.sequence).collect();
    assert_eq!(sequences, (5..).take(parts.len()).collect::<Vec<_>>());
    let (last, first) = parts.split_last().expect("some");
    assert!(!last.more && first.iter().all(|part| part.more));
    let hundred_small = {
        let mut state = State::default();
        apply(
            &mut state,
            [node(NODE)]
                .into_iter()
                .chain(service(1, vec![]))
                .map(put)
                .collect(),
        );
        let tasks = (0..100).map(|n| put(Any::Task(task(n, 1, NODE, TaskState::Assigned))));
        apply(&mut state, tasks.collect());
        send(plan(&state, NODE, &Told::default()), true, 1).1
    };
    assert_eq!(hundred_small.len(), 1);
}

fn report(task: u8, state: i32) -> StatusBatch {
    StatusBatch {
        reports: vec![TaskReport {
            task_id: vec![task; 16],
            status: Some(TaskStatus {
                state,
                message: "m".repeat(5_000),
                profile: vec![0; 1 << 20],
                ..Default::default()
            }),
        }],
        sequence: 1,
    }
}

#[test]
fn only_the_owner_reports_and_no_state_falls() {
    let mut state = state();
    apply(&mut state, vec![observed(1, NODE, TaskState::Running)]);
    let count = |node, task, to: TaskState| check(&state, node, report(task, to.into())).map(|it| it.len());
    assert_eq!(count(NODE, 1, TaskState::Complete), Ok(1));
    assert_eq!(
        count(NODE, 1, TaskState::Starting),
        Ok(0),
        "older than what is known"
    );
    assert_eq!(count(NODE, 9, TaskState::Running), Ok(0), "gone meanwhile");
    assert_eq!(
        count(NODE, 2, TaskState::Running),
        Err(ReportError::Foreign(TaskId::from_bytes([2; 16])))
    );
    for wrong in [
        TaskState::Unspecified,
        TaskState::Pending,
        TaskState::Assigned,
        TaskState::Lost,
    ] {
        assert!(
            matches!(count(NODE, 1, wrong), Err(ReportError::State { .. })),
            "{wrong:?}"
        );
    }
    assert!(matches!(
        check(&state, NODE, report(1, 55)),
        Err(ReportError::State { .. })
    ));
    let many = StatusBatch {
        reports: vec![TaskReport::default(); 3_000],
        sequence: 1,
    };
    assert_eq!(check(&state, NODE, many), Err(ReportError::Long(3_000)));
    let kept = check(&state, NODE, report(1, TaskState::Failed.into())).expect("its own");
    let status = kept[0].status.as_ref().expect("kept");
    assert_eq!((status.message.len(), status.profile.len()), (1_024, 0));
}

#[tokio::test]
async fn a_log_is_answered_by_the_worker_that_was_asked_and_dropping_it_cancels() {
    let sessions = Sessions::default();
    assert!(
        sessions.logs(NODE, LogRequest::default()).is_none(),
        "no session here"
    );
    let mut entry = sessions.enter(NODE);
    let _other = sessions.enter(OTHER);
    let mut parts = sessions.logs(NODE, LogRequest::default()).expect("asked");
    let Some(Down::Logs(asked)) = entry.aside.recv().await else {
        panic!("the request comes down")
    };
    assert!(sessions.answered(OTHER, asked.stream).is_none());
    assert!(sessions.answered(NODE, asked.stream + 1).is_none());
    let answer = sessions.answered(NODE, asked.stream).expect("it was asked");
    let part = LogUp {
        stream: asked.stream,
        ..Default::default()
    };
    answer.send(part.clone()).await.expect("read");
    assert_eq!(parts.next().await, Some(part));
    drop(parts);
    assert!(answer.is_closed());
    assert!(matches!(entry.aside.recv().await, Some(Down::LogCancel(it)) if it.stream == asked.stream));
    assert!(sessions.answered(NODE, asked.stream).is_none());
}

#[tokio::test]
async fn a_newer_session_of_a_worker_replaces_the_old_and_outlives_it() {
    let sessions = Sessions::default();
    let old = sessions.enter(NODE);
    let new = sessions.enter(NODE);
    assert!(old.replaced.is_cancelled() && !new.replaced.is_cancelled());
    drop(old);
    assert!(sessions.has(NODE));
    drop(new);
    assert!(!sessions.has(NODE));
}

/// A worker's end of a session, with its signs of life.
struct Worker {
    up: mpsc::Sender<SessionUp>,
    down: Streaming<SessionDown>,
    alive: JoinHandle<()>,
}

impl Worker {
    async fn begin(manager: &Manager, identity: &bulkhead_identity::Identity) -> Self {
        let (up, messages) = mpsc::channel(16);
        let hello = Up::Hello(SessionHello::default());
        up.send(message(hello)).await.expect("room");
        let mut client = DispatcherClient::new(manager.channel(identity));
        let down = client
            .session(ReceiverStream::new(messages))
            .await
            .expect("a session")
            .into_inner();
        let signs = up.clone();
        let alive = tokio::spawn(async move {
            let mut ticks = interval(limits::WORKER_HEARTBEAT);
            loop {
                ticks.tick().await;
                let sign = Up::Alive(SignOfLife::default());
                if signs.send(message(sign)).await.is_err() {
                    return;
                }
            }
        });
        Self { up, down, alive }
    }

    async fn next(&mut self) -> Result<Option<Down>, Status> {
        let next = timeout(Duration::from_secs(10), self.down.message())
            .await
            .expect("in time")?;
        Ok(next.map(|it| it.message.expect("a kind")))
    }

    /// The next assignments; beats pass.
    async fn assignments(&mut self) -> Assignments {
        loop {
            match self.next().await.expect("open").expect("open") {
                Down::Assignments(it) => return it,
                Down::Beat(_) | Down::Welcome(_) | Down::Managers(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// The status with which the session ends.
    async fn end(&mut self) -> Status {
        loop {
            match self.next().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("ended without a reason"),
                Err(status) => return status,
            }
        }
    }
}

fn message(message: Up) -> SessionUp {
    SessionUp {
        message: Some(message),
    }
}

fn code(status: &Status) -> &str {
    status
        .metadata()
        .get(CODE_KEY)
        .and_then(|it| it.to_str().ok())
        .unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operators_right_ends_when_it_was_given_until() {
    let manager = Manager::start().await;
    let operator = manager
        .admitted_for(Role::Operator, "an-hour", Duration::from_secs(3_600))
        .await;
    let ends = operator.current().certificate.not_after_ms();
    let (own, _) = key();
    let request = RenewRequest {
        csr: own.csr().expect("signed"),
        request_id: vec![5; 16],
        ..Default::default()
    };
    let renewed = DispatcherClient::new(manager.channel(&operator))
        .renew(request)
        .await;
    let renewed = renewed.expect("it is listed").into_inner();
    let renewed = Certificate::from_der(&renewed.certificate).expect("of the profile");
    assert_eq!(renewed.not_after_ms(), ends);
    let back = come_back(
        &operator.current(),
        &manager.address,
        Expect::AnyManager,
        &SystemEntropy,
    )
    .await;
    assert_eq!(back.expect("it is listed").certificate.not_after_ms(), ends);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restore_a_worker_comes_back_with_a_key_that_the_state_is_too_old_for() {
    let manager = Manager::start().await;
    let one = manager.admitted(Role::Worker, "one").await;
    let listed = one.current().certificate.clone();
    let state = manager.replica.state();
    let cluster = view::cluster(&state).expect("founded").clone();
    // What it was given after the backup was made.
    let (own, public) = key();
    let validity = Validity {
        not_before: listed.not_before_ms() + 30_000,
        not_after: listed.not_after_ms(),
    };
    let newer = Ca::new(manager.ring.clone())
        .issue_here(&cluster, one.subject().node, Role::Worker, &public, validity)
        .expect("signed");
    let credentials = Credentials {
        key: own,
        certificate: Certificate::from_der(&newer.certificate).expect("of the profile"),
        chain: Vec::new(),
        bundle: manager.bundle.clone(),
    };
    let ask = async |credentials: &Credentials| {
        come_back(credentials, &manager.address, Expect::AnyManager, &SystemEntropy).await
    };
    let refused = ask(&credentials).await.expect_err("no restore");
    assert!(refused_with(&refused, "BH-E0046"), "{refused:?}");
    let restored = Cluster {
        return_until: i64::try_from(manager.clock.wall_millis()).expect("this age") + 60_000,
        ..cluster
    };
    let replace = Step::Replace(view::object(Any::Cluster(restored)));
    manager
        .commit(vec![Change {
            change: Some(replace),
        }])
        .await;
    // The certificate alone is public: the key must be proved.
    let (stranger, _) = key();
    let forged = Credentials {
        key: stranger,
        certificate: credentials.certificate.clone(),
        chain: Vec::new(),
        bundle: manager.bundle.clone(),
    };
    let refused = ask(&forged).await.expect_err("another key");
    assert!(refused_with(&refused, "BH-E0046"), "{refused:?}");
    let back = ask(&credentials).await.expect("it proves a newer key");
    assert_eq!(back.certificate.subject(), one.subject());
    let state = manager.replica.state();
    let record = view::node(&state, one.subject().node).expect("listed");
    assert!(record.keys.iter().any(|it| it.key_id == newer.key_id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_committed_key_brings_its_own_node_back() {
    let manager = Manager::start().await;
    let (one, two) = (
        manager.admitted(Role::Worker, "one").await,
        manager.admitted(Role::Worker, "two").await,
    );
    let ask = async |credentials: &Credentials| {
        come_back(credentials, &manager.address, Expect::AnyManager, &SystemEntropy).await
    };
    let back = ask(&one.current()).await.expect("it is listed");
    assert_eq!(back.certificate.subject(), one.subject());
    // Its certificate says who it would be; the key is one's own, and not listed for that node.
    let (stranger, _) = key();
    let as_two = |key| Credentials {
        key,
        certificate: two.current().certificate.clone(),
        chain: Vec::new(),
        bundle: manager.bundle.clone(),
    };
    let of_one = bulkhead_identity::Key::from_pkcs8(one.current().key.pkcs8()).expect("a key");
    for forged in [as_two(stranger), as_two(of_one)] {
        let refused = ask(&forged).await.expect_err("not that node's key");
        assert!(refused_with(&refused, "BH-E0046"), "{refused:?}");
    }
    manager.remove(two.subject().node).await;
    let refused = ask(&two.current()).await.expect_err("removed");
    assert!(refused_with(&refused, "BH-E0046"), "{refused:?}");

    // A request without a challenge of this manager, and one whose signature is another's.
    let mut client = EnrolmentClient::new(manager.anonymous());
    let root = client
        .get_root(GetRootRequest {})
        .await
        .expect("open to anyone")
        .into_inner();
    let (own, _) = key();
    for challenge in [vec![0; 56], root.challenge] {
        let forged = ReturnRequest {
            node_id: one.subject().node.to_wire(),
            key_id: one.current().key.key_id().to_wire(),
            csr: own.csr().expect("signed"),
            challenge,
            signature: vec![7; 70],
            request_id: vec![6; 16],
            ..Default::default()
        };
        let refused = client.r#return(forged).await.expect_err("no proof");
        assert_eq!(code(&refused), "BH-E0046");
    }
}

fn refused_with(error: &ComebackError, wanted: &str) -> bool {
    matches!(error, ComebackError::Refused(status) if code(status) == wanted)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_admits_one_key_and_the_same_key_again() {
    let manager = Manager::start().await;
    let ticket = manager.ticket(WireRole::Worker, 1).await;
    let mut client = EnrolmentClient::new(manager.anonymous());
    let (own, _) = key();
    let request = |secret: &[u8], csr: Vec<u8>| EnrolRequest {
        ticket_secret: secret.to_vec(),
        csr,
        role: WireRole::Worker.into(),
        request_id: vec![5; 16],
        name: "w".into(),
        ..Default::default()
    };
    let csr = own.csr().expect("signed");
    let wrong = client
        .enrol(request(&[0; 16], csr.clone()))
        .await
        .expect_err("a wrong ticket");
    assert_eq!(
        (wrong.code(), code(&wrong)),
        (tonic::Code::PermissionDenied, "BH-E0081")
    );
    let first = client
        .enrol(request(&ticket, csr.clone()))
        .await
        .expect("admitted")
        .into_inner();
    let again = client
        .enrol(request(&ticket, csr))
        .await
        .expect("the same key")
        .into_inner();
    assert_eq!(
        (&first.certificate, &first.node_id),
        (&again.certificate, &again.node_id)
    );
    assert_eq!((first.managers.len(), first.role()), (1, WireRole::Worker));
    let other = client
        .enrol(request(&ticket, key().0.csr().expect("signed")))
        .await
        .expect_err("used up");
    assert_eq!(code(&other), "BH-E0083");

    // The certificate works, for what a worker may do and for nothing else.
    let worker = crate::testing::identity(own, &first.certificate, &manager.bundle);
    let channel = manager.channel(&worker);
    let denied = |status: Status| assert_eq!(status.code(), tonic::Code::PermissionDenied, "{status:?}");
    denied(
        ControlClient::new(channel.clone())
            .list_nodes(ListRequest::default())
            .await
            .expect_err("no operator"),
    );
    denied(
        PeerClient::new(channel.clone())
            .read_index(ReadIndexRequest::default())
            .await
            .expect_err("no manager"),
    );
    denied(
        RaftClient::new(channel.clone())
            .vote(RaftMessage::default())
            .await
            .expect_err("no manager"),
    );
    let mut dispatcher = DispatcherClient::new(channel);
    let (renewed_key, _) = key();
    let renewed = dispatcher
        .renew(RenewRequest {
            csr: renewed_key.csr().expect("signed"),
            request_id: vec![6; 16],
            ..Default::default()
        })
        .await
        .expect("its own certificate")
        .into_inner();
    let renewed = crate::testing::identity(renewed_key, &renewed.certificate, &manager.bundle);
    assert_eq!(renewed.subject(), worker.subject());
    Worker::begin(&manager, &renewed).await.assignments().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_reaches_the_node_that_needs_it_and_no_other() {
    let manager = Manager::start().await;
    let one = manager.admitted(Role::Worker, "worker-1").await;
    let two = manager.admitted(Role::Worker, "worker-2").await;
    let (mut first, mut second) = (
        Worker::begin(&manager, &one).await,
        Worker::begin(&manager, &two).await,
    );
    assert!(first.assignments().await.complete && second.assignments().await.complete);

    let state = manager.replica.state();
    let cluster = view::cluster(&state).expect("begun");
    let mut objects = BTreeMap::new();
    for (n, any) in (0..).zip(service(7, vec![])) {
        objects.insert(n, any);
    }
    if let Some(Any::Secret(secret)) = objects.get_mut(&0) {
        let place = Key::new(Kind::Secret, [7; 16]);
        secret.value = Some(manager.ring.seal(cluster, place, b"hunter2").expect("sealed"));
    }
    manager.commit(objects.into_values().map(create).collect()).await;
    let mine = task(7, 7, one.subject().node, TaskState::Assigned);
    manager.commit(vec![create(Any::Task(mine))]).await;

    let got = first.assignments().await;
    assert_eq!((got.put.len(), got.images.len(), got.complete), (1, 1, false));
    assert_eq!(
        got.secrets
            .iter()
            .map(|it| it.value.as_slice())
            .collect::<Vec<_>>(),
        [b"hunter2"]
    );

    // A report is acknowledged once it is committed.
    let batch = |sequence| StatusBatch {
        sequence,
        ..report(7, TaskState::Running.into())
    };
    first.up.send(message(Up::Status(batch(3)))).await.expect("open");
    loop {
        match first.next().await.expect("open").expect("open") {
            Down::StatusAck(ack) => break assert_eq!(ack.sequence, 3),
            Down::Assignments(it) => panic!("its own report is told back: {it:?}"),
            _ => {}
        }
    }
    let state = manager.replica.state();
    let seen = view::task(&state, TaskId::from_bytes([7; 16])).and_then(|it| it.status.clone());
    assert_eq!(seen.expect("reported").state(), TaskState::Running);

    // The other node hears nothing of it, and ends its session when it reports on it.
    second.up.send(message(Up::Status(batch(1)))).await.expect("open");
    loop {
        match second.next().await {
            Ok(Some(Down::Assignments(it))) => panic!("another node's task: {it:?}"),
            Ok(Some(_)) => {}
            Ok(None) => panic!("ended without a reason"),
            Err(status) => break assert_eq!(status.code(), tonic::Code::PermissionDenied, "{status:?}"),
        }
    }
    // It may not fetch the blobs of that image either.
    let request = FetchBlobRequest {
        digest: vec![7; 32],
        offset: 0,
    };
    let mut client = DispatcherClient::new(manager.channel(&two));
    let refused = client.fetch_blob(request).await.expect_err("not its task");
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standbys_key_opens_nothing_of_the_manager_that_its_node_became() {
    let manager = Manager::start().await;
    let old = manager.admitted(Role::Standby, "m2").await;
    let mut client = DispatcherClient::new(manager.channel(&old));
    let promoted: [fn(&mut Node); 3] = [
        |node| node.set_wanted_role(WireRole::Manager),
        |node| {
            node.set_role(WireRole::Manager);
            node.set_wanted_role(WireRole::Unspecified);
        },
        |node| node.envelope_key = vec![1; 32],
    ];
    for change in promoted {
        let mut node = view::node(&manager.replica.state(), old.subject().node)
            .expect("it is there")
            .clone();
        change(&mut node);
        manager
            .commit(vec![Change {
                change: Some(Step::Replace(Object {
                    object: Some(Any::Node(node)),
                })),
            }])
            .await;
    }
    let withdraw = || WithdrawRequest {
        request_id: vec![5; 16],
    };
    let refused = client.withdraw(withdraw()).await.expect_err("a manager");
    assert_eq!(code(&refused), "BH-E0045", "{refused:?}");
    assert!(view::node(&manager.replica.state(), old.subject().node).is_some());
    for role in [WireRole::Manager, WireRole::Standby, WireRole::Unspecified] {
        let renew = RenewRequest {
            csr: key().0.csr().expect("signed"),
            request_id: vec![role as u8 + 1; 16],
            role: role.into(),
        };
        let refused = client.renew(renew).await.expect_err("it was taken");
        assert_eq!(code(&refused), "BH-E0045", "{role:?} {refused:?}");
    }

    let standby = manager.admitted(Role::Standby, "m3").await;
    let mut client = DispatcherClient::new(manager.channel(&standby));
    client.withdraw(withdraw()).await.expect("its own record");
    assert!(view::node(&manager.replica.state(), standby.subject().node).is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_ends_when_its_key_is_removed_or_a_newer_one_begins() {
    let manager = Manager::start().await;
    let identity = manager.admitted(Role::Worker, "worker-1").await;
    let mut old = Worker::begin(&manager, &identity).await;
    old.assignments().await;
    let mut new = Worker::begin(&manager, &identity).await;
    new.assignments().await;
    assert_eq!(old.end().await.code(), tonic::Code::Aborted);
    manager.remove(identity.subject().node).await;
    assert_eq!(new.end().await.code(), tonic::Code::PermissionDenied);
    let mut client = DispatcherClient::new(manager.channel(&identity));
    let (_up, messages) = mpsc::channel(1);
    let refused = client
        .session(ReceiverStream::new(messages))
        .await
        .expect_err("removed");
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_ends_with_the_certificate_that_began_it() {
    let manager = Manager::start().await;
    // Certificates count whole seconds, so this one lasts between one and two.
    let validity = Duration::from_secs(2);
    let identity = manager.admitted_for(Role::Worker, "worker-1", validity).await;
    let mut worker = Worker::begin(&manager, &identity).await;
    worker.assignments().await;
    let end = worker.end().await;
    assert_eq!(
        (end.code(), code(&end)),
        (tonic::Code::PermissionDenied, "BH-E0047")
    );
}

/// Where the network loses what a worker sends, the worker hears its manager all the same, and would stay for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_ends_when_nothing_is_heard_of_its_worker() {
    let manager = Manager::start().await;
    let identity = manager.admitted(Role::Worker, "worker-1").await;
    let mut worker = Worker::begin(&manager, &identity).await;
    worker.assignments().await;
    worker.alive.abort();
    let end = timeout(Duration::from_secs(30), worker.end()).await;
    let end = end.expect("the manager ends it");
    assert_eq!(
        (end.code(), code(&end)),
        (tonic::Code::Unavailable, "BH-E0042"),
        "{end:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manager_that_hears_no_leader_serves_no_session() {
    let manager = Manager::start().await;
    let identity = manager.admitted(Role::Worker, "worker-1").await;
    let mut worker = Worker::begin(&manager, &identity).await;
    worker.assignments().await;
    manager.replica.shutdown().await;
    assert_eq!(worker.end().await.code(), tonic::Code::Unavailable);
    let (_up, messages) = mpsc::channel(1);
    let mut client = DispatcherClient::new(manager.channel(&identity));
    let refused = client
        .session(ReceiverStream::new(messages))
        .await
        .expect_err("it cannot tell");
    assert_eq!(
        (refused.code(), code(&refused)),
        (tonic::Code::Unavailable, "BH-E0049")
    );
}
