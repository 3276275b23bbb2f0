use super::*;
use crate::agent::assignments::tests::{complete, wire_image, wire_task};
use crate::proxy::balancer::Backend;
use crate::runtime::tests::{Far, connected};
use bulkhead_launcher::message::{
    DiffId, ExitCause, ExitRecord, LayerRecord, Profile, Refusal, Reply, Request, TaskId as LaunchId,
};
use std::net::{IpAddr, Ipv4Addr};
use tokio::net::TcpStream;

const BLOB: &[u8] = b"ten bytes!";

struct Managers;

impl Fetch for Managers {
    async fn fetch(&self, _layer: Layer, mut ingest: Ingest) -> io::Result<Ingest> {
        ingest.write(BLOB).map_err(io::Error::other)?;
        Ok(ingest)
    }
}

struct Nowhere;

impl Connect for Nowhere {
    async fn connect(&self, _backend: Backend) -> io::Result<TcpStream> {
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

/// Answers as a launcher does, from memory. A stopped task exits at once.
async fn launcher(far: &Far, hostile: bool) {
    let mut layers: BTreeMap<DiffId, LayerRecord> = BTreeMap::new();
    let mut tasks: BTreeMap<LaunchId, TaskStatus> = BTreeMap::new();
    loop {
        let (envelope, _descriptors) = far.next().await;
        let result = match envelope.request {
            Request::List { .. } => Ok(Reply::Tasks {
                tasks: tasks.values().cloned().collect(),
                more: false,
            }),
            Request::Layers { .. } => Ok(Reply::Layers {
                layers: layers.values().cloned().collect(),
                more: false,
            }),
            Request::UnpackLayer(_) if hostile => {
                Err(Refusal::new(RefusalCode::HostileLayer, "a link leads out"))
            }
            Request::UnpackLayer(layer) => {
                let diff_id = layer.diff_id;
                let record = LayerRecord {
                    diff_id: diff_id.clone(),
                    tree_digest: String::new(),
                    entries: 1,
                    bytes: 1,
                    masks: false,
                };
                layers.insert(diff_id, record.clone());
                Ok(Reply::Layer(record))
            }
            Request::Start(spec) => {
                let status = TaskStatus {
                    task: spec.task.clone(),
                    epoch: spec.epoch,
                    pid: 7,
                    started_at_ms: 1,
                    state: TaskState::Running,
                };
                assert!(tasks.insert(spec.task, status.clone()).is_none(), "started twice");
                Ok(Reply::Started(status))
            }
            Request::RemoveLayer { diff_id } => {
                layers.remove(&diff_id);
                Ok(Reply::Done)
            }
            Request::Inspect { .. } => Ok(Reply::Profile(Box::new(profile()))),
            Request::Signal { task, .. } => {
                let exit = ExitRecord {
                    cause: ExitCause::Signal(15),
                    out_of_memory: false,
                    ended_at_ms: 2,
                    message: String::new(),
                };
                tasks.get_mut(&task).expect("it runs").state = TaskState::Exited(exit);
                Ok(Reply::Done)
            }
            Request::Remove { task } => {
                tasks.remove(&task);
                Ok(Reply::Done)
            }
            other => panic!("not expected: {other:?}"),
        };
        far.reply(envelope.id, result, &[]);
    }
}

fn profile() -> Profile {
    Profile {
        status: vec![("CapEff".into(), "0".into())],
        uid_map: vec![],
        gid_map: vec![],
        namespaces: vec![],
        mounts: vec![],
        limits: vec![],
        layers: vec![],
    }
}

fn update(sequence: u64, desired: wire::DesiredState) -> wire::Assignments {
    let mut image = wire_image();
    image.layers[0].digest = Digest::of(BLOB).as_bytes().to_vec();
    let all = complete(sequence, vec![wire_task(1, desired)]);
    wire::Assignments {
        sequence,
        complete: sequence == 1,
        images: vec![image],
        ..all
    }
}

/// Waits for the report of this state, acknowledging what comes before.
async fn reported(
    outputs: &mut mpsc::Receiver<Output>,
    inputs: &mpsc::Sender<Input>,
    wanted: wire::TaskState,
) -> wire::TaskStatus {
    loop {
        let batch = match outputs.recv().await.expect("the agent runs") {
            Output::Status(batch) => batch,
            Output::Applied(_) => continue,
            other @ Output::EndSession(_) => panic!("a report, not {other:?}"),
        };
        inputs
            .send(Input::Acknowledged(batch.sequence))
            .await
            .expect("the agent runs");
        let status = batch.reports[0].status.clone().expect("status");
        if status.state() == wanted {
            return status;
        }
    }
}

async fn play(hostile: bool, script: impl AsyncFnOnce(mpsc::Sender<Input>, mpsc::Receiver<Output>)) {
    let folder = tempfile::tempdir().expect("folder");
    let (runtime, far, events, _driver) = connected();
    let blobs = BlobStore::open(&folder.path().join("image"), 1 << 20).expect("blobs");
    let records = Records::open(&folder.path().join("records")).expect("records");
    let proxy = Proxy::new(IpAddr::V4(Ipv4Addr::LOCALHOST), Nowhere);
    let agent = Agent::new(runtime, blobs, records, Managers, proxy, || 100).expect("agent");
    let (inputs, from_session) = mpsc::channel(16);
    let (to_session, outputs) = mpsc::channel(16);
    tokio::select! {
        ended = async { tokio::join!(agent.run(from_session, to_session, events), script(inputs, outputs)).0 } => ended.expect("agent"),
        () = launcher(&far, hostile) => unreachable!("it answers for ever"),
    }
}

#[tokio::test]
async fn a_task_lives_from_assignment_to_removal() {
    play(false, async |inputs, mut outputs| {
        let send = async |input| inputs.send(input).await.expect("the agent runs");
        send(Input::Welcome(Seen { epoch: 1, index: 1 })).await;
        send(Input::Assignments(Box::new(update(
            1,
            wire::DesiredState::Running,
        ))))
        .await;
        let running = reported(&mut outputs, &inputs, wire::TaskState::Running).await;
        assert_eq!(running.pid, 7);
        assert_eq!(running.profile, serde_json::to_vec(&profile()).expect("JSON"));
        send(Input::Assignments(Box::new(update(
            2,
            wire::DesiredState::Shutdown,
        ))))
        .await;
        let ended = reported(&mut outputs, &inputs, wire::TaskState::Shutdown).await;
        assert_eq!(ended.signal, Some(15));
    })
    .await;
}

#[tokio::test]
async fn a_restored_cluster_hears_again_what_its_state_may_not_know() {
    play(false, async |inputs, mut outputs| {
        let send = async |input| inputs.send(input).await.expect("the agent runs");
        send(Input::Welcome(Seen { epoch: 1, index: 1 })).await;
        let running = update(1, wire::DesiredState::Running);
        send(Input::Assignments(Box::new(running.clone()))).await;
        reported(&mut outputs, &inputs, wire::TaskState::Running).await;
        // Acknowledged; but the state that the next epoch begins with may be from before.
        send(Input::Welcome(Seen { epoch: 2, index: 1 })).await;
        send(Input::Assignments(Box::new(running))).await;
        reported(&mut outputs, &inputs, wire::TaskState::Running).await;
    })
    .await;
}

#[tokio::test]
async fn a_hostile_layer_rejects_its_task_with_the_reason() {
    play(true, async |inputs, mut outputs| {
        inputs
            .send(Input::Assignments(Box::new(update(
                1,
                wire::DesiredState::Running,
            ))))
            .await
            .expect("the agent runs");
        let rejected = reported(&mut outputs, &inputs, wire::TaskState::Rejected).await;
        assert_eq!(rejected.message, "a link leads out");
    })
    .await;
}

#[tokio::test]
async fn a_manager_that_is_behind_ends_its_session() {
    play(false, async |inputs, mut outputs| {
        for index in [9, 8] {
            inputs
                .send(Input::Welcome(Seen { epoch: 1, index }))
                .await
                .expect("the agent runs");
        }
        assert!(matches!(
            outputs.recv().await,
            Some(Output::EndSession(AssignmentError::Stale { .. }))
        ));
    })
    .await;
}

#[tokio::test]
async fn a_port_in_use_is_said_in_the_tasks_status_until_it_is_free() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("address").port();
    play(false, async |inputs, mut outputs| {
        let mut update = update(1, wire::DesiredState::Running);
        let spec = update.put[0].spec.as_mut().expect("spec");
        spec.ports = vec![wire::PublishedPort {
            host: port.into(),
            target: 80,
        }];
        inputs
            .send(Input::Assignments(Box::new(update)))
            .await
            .expect("the agent runs");
        let mut status = reported(&mut outputs, &inputs, wire::TaskState::Running).await;
        while status.message.is_empty() {
            status = reported(&mut outputs, &inputs, wire::TaskState::Running).await;
        }
        let expected = format!("host port {port} cannot be opened: another program on this node uses it");
        assert!(status.message.starts_with(&expected), "{}", status.message);
        drop(taken);
        while !status.message.is_empty() {
            status = reported(&mut outputs, &inputs, wire::TaskState::Running).await;
        }
        std::net::TcpStream::connect(("127.0.0.1", port)).expect("the proxy listens");
    })
    .await;
}

#[tokio::test]
async fn what_was_seen_before_a_restart_is_reported_again() {
    let folder = tempfile::tempdir().expect("folder");
    let (runtime, far, events, _driver) = connected();
    let records = Records::open(&folder.path().join("records")).expect("records");
    let task = TaskId::from_bytes([1; 16]);
    let running = Observed {
        state: State::Running,
        ..Observed::assigned(5)
    };
    records.put(task, &running).expect("put");
    let blobs = BlobStore::open(&folder.path().join("image"), 1 << 20).expect("blobs");
    let proxy = Proxy::new(IpAddr::V4(Ipv4Addr::LOCALHOST), Nowhere);
    let agent = Agent::new(runtime, blobs, records, Managers, proxy, || 100).expect("agent");
    assert_eq!(agent.known().borrow().tasks, [task]);
    let (inputs, from_session) = mpsc::channel(16);
    let (to_session, mut outputs) = mpsc::channel(16);
    tokio::select! {
        ended = agent.run(from_session, to_session, events) => panic!("{ended:?}"),
        () = launcher(&far, false) => unreachable!("it answers for ever"),
        status = reported(&mut outputs, &inputs, wire::TaskState::Running) => assert_eq!(status.at, 5),
    }
}

#[tokio::test]
async fn what_no_task_needs_is_deleted_after_its_time() {
    let folder = tempfile::tempdir().expect("folder");
    let (runtime, far, events, _driver) = connected();
    let records = Records::open(&folder.path().join("records")).expect("records");
    let blobs = BlobStore::open(&folder.path().join("image"), 1 << 20).expect("blobs");
    let proxy = Proxy::new(IpAddr::V4(Ipv4Addr::LOCALHOST), Nowhere);
    let clock = std::sync::atomic::AtomicI64::new(100);
    let now = || clock.load(std::sync::atomic::Ordering::Relaxed);
    let agent = Agent::new(runtime.clone(), blobs.clone(), records, Managers, proxy, now).expect("agent");
    let (inputs, from_session) = mpsc::channel(16);
    let (to_session, mut outputs) = mpsc::channel(16);
    let script = async {
        let send = async |input| inputs.send(input).await.expect("the agent runs");
        send(Input::Assignments(Box::new(update(
            1,
            wire::DesiredState::Running,
        ))))
        .await;
        reported(&mut outputs, &inputs, wire::TaskState::Running).await;
        let gone = wire::Assignments {
            sequence: 2,
            index: 2,
            remove: vec![vec![1; 16]],
            ..Default::default()
        };
        send(Input::Assignments(Box::new(gone))).await;
        let here = async || {
            (
                blobs.list().expect("list").len(),
                runtime.layers().await.expect("list").len(),
            )
        };
        assert_eq!(here().await, (1, 1));
        let grace = i64::try_from(bulkhead_proto::limits::BLOB_GRACE.as_millis()).expect("small");
        while here().await != (0, 0) {
            clock.fetch_add(grace, std::sync::atomic::Ordering::Relaxed);
            send(Input::Acknowledged(0)).await; // wakes it
        }
    };
    tokio::select! {
        ended = agent.run(from_session, to_session, events) => panic!("{ended:?}"),
        () = launcher(&far, false) => unreachable!("it answers for ever"),
        () = script => {}
    }
}
