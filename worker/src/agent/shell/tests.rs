use super::*;
use crate::agent::assignments::tests::{complete, wire_image, wire_task};
use crate::proxy::balancer::Backend;
use crate::runtime::tests::{Far, connected};
use bulkhead_launcher::message::{
    DiffId, ExitCause, ExitRecord, LayerRecord, Refusal, Reply, Request, TaskId as LaunchId,
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
        let Some(Output::Status(batch)) = outputs.recv().await else {
            panic!("a report")
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
