//! The loop on a real replica of one member, with a clock that the test moves.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bulkhead_identity::Unswapped;
use bulkhead_identity::seam::{Entropy as _, SystemEntropy};
use bulkhead_proto::wire::{
    Availability, Change, Cluster, ForwardResponse, Node, ServiceSpec, Task, TaskObserved, TaskState,
    TaskStatus, change::Change as Step,
};
use bulkhead_proto::{ClusterId, RequestId, ServiceId};
use bulkhead_raft::encryption::{DataKey, Sealing};
use bulkhead_raft::file_system::RealFileSystem;
use bulkhead_raft::log_store::Options;
use bulkhead_raft::transport::{Binding, Dial, DialError, Network};
use bulkhead_raft::{Member, Parts, Timing};
use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::task::JoinHandle;
use tonic::transport::Channel;

use super::*;
use crate::orchestrator::{Stored, revision};
use crate::proposer::{Forward, ForwardError};

struct Nobody;

impl Dial for Nobody {
    fn channel(&self, _: u64, _: &Member) -> Result<Channel, DialError> {
        Err(DialError("there is no other member".into()))
    }
}

impl Forward for Nobody {
    fn forward(&self, _: u64, _: Bytes) -> BoxFuture<'_, Result<ForwardResponse, ForwardError>> {
        std::future::ready(Err(ForwardError::NotSent)).boxed()
    }
}

/// Milliseconds, moved by the test.
#[derive(Debug)]
struct Hand(AtomicU64);

impl Clock for Hand {
    fn wall_millis(&self) -> u64 {
        1_700_000_000_000 + self.0.load(Ordering::Relaxed)
    }

    fn monotonic(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

struct Cell {
    replica: Replica,
    proposer: Proposer,
    signs: Signs,
    clock: Arc<Hand>,
    stop: CancellationToken,
    leader: JoinHandle<()>,
    _folder: tempfile::TempDir,
}

const SERVICE: ServiceId = ServiceId::from_bytes([9; 16]);

impl Cell {
    async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let binding = Binding {
            cluster: ClusterId::from_bytes([1; 16]),
            epoch: 1,
            member: 1,
        };
        let replica = Replica::start(Parts {
            member: 1,
            fs: Arc::new(RealFileSystem),
            folder: folder.path().join("raft"),
            sealing: Sealing {
                keys: Arc::new(DataKey::new(Unswapped::new([7; 32])).into()),
                store: [1; 16],
                cluster_epoch: 1,
                member: 1,
            },
            entropy: Arc::new(SystemEntropy),
            network: Network::new(Nobody, binding, Default::default()),
            timing: Timing::default(),
            log: Options {
                segment_bytes: 1 << 20,
                ..Options::default()
            },
            blocking: Default::default(),
            witness: Default::default(),
        })
        .await
        .expect("a replica");
        let me = Member {
            node: NodeId::from_bytes([8; 16]),
            address: "127.0.0.1:1".into(),
        };
        replica.initialise(me).await.expect("the first voter");
        let clock = Arc::new(Hand(AtomicU64::new(10_000)));
        let proposer = Proposer::new(
            replica.clone(),
            Arc::new(Nobody),
            clock.clone(),
            Arc::new(SystemEntropy),
            "manager/m".into(),
        );
        let (signs, stop) = (Signs::default(), CancellationToken::new());
        let leader = tokio::spawn(run(
            replica.clone(),
            proposer.clone(),
            signs.clone(),
            clock.clone(),
            Fresh::new(replica.clone(), clock.clone()),
            stop.clone(),
        ));
        let cell = Self {
            replica,
            proposer,
            signs,
            clock,
            stop,
            leader,
            _folder: folder,
        };
        let cluster = Cluster {
            id: vec![1; 16],
            epoch: 1,
            level: 1,
            ..Default::default()
        };
        cell.commit(Step::Create(bulkhead_proto::wire::Object {
            object: Some(Any::Cluster(cluster)),
        }))
        .await;
        cell
    }

    async fn commit(&self, change: Step) {
        let mut request = [0; 16];
        SystemEntropy.fill(&mut request).expect("random");
        let change = Change { change: Some(change) };
        let proposed = self
            .proposer
            .client("local/0", RequestId::from_bytes(request), vec![], vec![change]);
        assert_eq!(proposed.await.expect("it leads").rejection, None);
    }

    /// An admitted worker that was never heard.
    async fn worker(&self, number: u8) -> NodeId {
        let node = Node {
            id: vec![number; 16],
            name: format!("n{number}"),
            role: Role::Worker.into(),
            availability: Availability::Active.into(),
            status: NodeStatus::Unknown.into(),
            ..Default::default()
        };
        self.commit(Step::Create(node.into_object())).await;
        NodeId::from_bytes([number; 16])
    }

    async fn service(&self, replicas: u32) {
        let spec = ServiceSpec {
            name: "web".into(),
            replicas,
            ..Default::default()
        };
        self.commit(Step::Create(revision::create(SERVICE, spec, 0).into_object()))
            .await;
    }

    fn hear(&self, nodes: &[NodeId]) {
        nodes
            .iter()
            .for_each(|node| self.signs.heard(*node, self.clock.monotonic()));
    }

    fn pass_time(&self, millis: u64) {
        self.clock.0.fetch_add(millis, Ordering::Relaxed);
    }

    fn tasks(&self) -> Vec<Task> {
        let state = self.replica.state();
        View::of(&state).tasks.into_iter().cloned().collect()
    }

    fn status(&self, node: NodeId) -> NodeStatus {
        let state = self.replica.state();
        View::nodes_of(&state).nodes[&node.as_bytes()[..]].status()
    }

    /// Waits for what the loop commits.
    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let mut applied = self.replica.applied();
        let waited = tokio::time::timeout(Duration::from_secs(20), async {
            while !holds(self) {
                applied.changed().await.expect("it runs");
            }
        });
        assert!(waited.await.is_ok(), "{what}: {:?}", self.tasks());
    }

    async fn end(self) {
        self.stop.cancel();
        self.leader.await.expect("it ends when asked");
        self.replica.shutdown().await;
    }
}

fn assigned(cell: &Cell, count: usize) -> bool {
    let tasks = cell.tasks();
    tasks.len() == count && tasks.iter().all(|task| !task.node_id.is_empty())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[expect(clippy::disallowed_methods, reason = "a test measures real time")]
async fn a_hundred_tasks_are_assigned_in_a_few_commits() {
    let cell = Cell::start().await;
    let worker = cell.worker(1).await;
    cell.hear(&[worker]);
    cell.until("the worker is ready", |cell| {
        cell.status(worker) == NodeStatus::Ready
    })
    .await;
    let (before, start) = (cell.replica.index(), Instant::now());
    cell.service(100).await;
    cell.until("all are assigned", |cell| assigned(cell, 100)).await;
    let commits = cell.replica.index() - before;
    assert!(commits <= 4, "the service, its tasks, their places: {commits}");
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    cell.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_workers_tasks_move_and_it_is_ready_when_heard_again() {
    let cell = Cell::start().await;
    let (one, two) = (cell.worker(1).await, cell.worker(2).await);
    cell.hear(&[one, two]);
    cell.until("both are ready", |cell| {
        [one, two]
            .iter()
            .all(|node| cell.status(*node) == NodeStatus::Ready)
    })
    .await;
    cell.service(2).await;
    cell.until("both are assigned", |cell| assigned(cell, 2)).await;
    cell.pass_time(2_600);
    cell.hear(&[one]);
    cell.until("the second is down and its task moved", |cell| {
        let live = |task: &&Task| {
            let state = task.status.as_ref().map(TaskStatus::state);
            state.is_some_and(|state| state < TaskState::Complete)
        };
        cell.status(two) == NodeStatus::Down
            && cell.tasks().iter().filter(live).count() == 2
            && cell
                .tasks()
                .iter()
                .filter(live)
                .all(|task| task.node_id == [1; 16])
    })
    .await;
    assert_eq!(cell.status(one), NodeStatus::Ready);
    cell.hear(&[two]);
    cell.until("it is back", |cell| cell.status(two) == NodeStatus::Ready)
        .await;
    cell.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_report_wakes_the_loop_and_an_end_is_followed() {
    let cell = Cell::start().await;
    let worker = cell.worker(1).await;
    cell.hear(&[worker]);
    cell.service(1).await;
    cell.until("it is assigned", |cell| assigned(cell, 1)).await;
    let task = cell.tasks().remove(0);
    let report = TaskObserved {
        task_id: task.id.clone(),
        node_id: task.node_id.clone(),
        status: Some(TaskStatus {
            state: TaskState::Failed.into(),
            ..Default::default()
        }),
    };
    cell.commit(Step::TaskObserved(report)).await;
    cell.until("a successor", |cell| assigned(cell, 2)).await;
    let next = cell
        .tasks()
        .into_iter()
        .find(|task| task.attempt == 2)
        .expect("made");
    assert!(next.fence > task.fence && next.start_after > 0);
    cell.end().await;
}
