//! The session loop against managers over real TLS.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use bulkhead_identity::seam::SystemClock;
use bulkhead_identity::{Certificate, Credentials, Identity, Key};
use bulkhead_launcher::connection::Connection;
use bulkhead_proto::{KeyId, NodeId, Role, TaskId, wire};
use bulkhead_worker::agent::assignment::Packing;
use bulkhead_worker::agent::{Assignments, Fetch, Input, Known, Layer, Output, Seen};
use bulkhead_worker::image::BlobStore;
use bulkhead_worker::session::{Connected, ManagerFetch, Session};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use support::{Cluster, Manager, a_day, random, soon};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use wire::session_down::Message as Down;
use wire::session_up::Message as Up;

/// A session loop, with its agent's ends in the test's hands.
struct Worker {
    identity: Identity,
    managers: watch::Receiver<Vec<wire::ManagerAddress>>,
    connected: watch::Receiver<Option<Connected>>,
    _known: watch::Sender<Known>,
    inputs: mpsc::Receiver<Input>,
    outputs: mpsc::Sender<Output>,
    _launcher: Connection,
    running: JoinHandle<()>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.running.abort();
    }
}

impl Worker {
    fn start(cluster: &Cluster, managers: &[&Manager], known: Known) -> Worker {
        Worker::with(cluster, managers.iter().map(|m| address(m)).collect(), known)
    }

    fn start_at(cluster: &Cluster, addresses: Vec<String>) -> Worker {
        let addresses = addresses.into_iter().map(|address| wire::ManagerAddress {
            address,
            ..Default::default()
        });
        Worker::with(cluster, addresses.collect(), Known::default())
    }

    fn with(cluster: &Cluster, addresses: Vec<wire::ManagerAddress>, known: Known) -> Worker {
        let identity = cluster.identity(NodeId::from_bytes(random()), Role::Worker, a_day());
        let (managers, managers_seen) = watch::channel(addresses);
        let (connected, connected_seen) = watch::channel(None);
        let (known, known_seen) = watch::channel(known);
        let ((to_agent, inputs), (outputs, from_agent)) = (mpsc::channel(1), mpsc::channel(16));
        let (near, far) = Connection::pair().unwrap();
        let (runtime, _driver, _events) = bulkhead_worker::runtime::client(near).unwrap();
        let session = Session {
            identity: identity.clone(),
            description: wire::NodeDescription {
                hostname: "host".into(),
                ..Default::default()
            },
            managers,
            trust: watch::Sender::default(),
            connected,
            runtime,
            known: known_seen,
            inputs: to_agent,
            outputs: from_agent,
            clock: Arc::new(SystemClock::start()),
        };
        Worker {
            identity,
            managers: managers_seen,
            connected: connected_seen,
            _known: known,
            inputs,
            outputs,
            _launcher: far,
            running: tokio::spawn(session.run(1)),
        }
    }

    /// Gives it a new certificate; of which key.
    fn renewed(&self, cluster: &Cluster) -> KeyId {
        let key = Key::generate().unwrap();
        let new = key.key_id();
        let subject = self.identity.subject();
        let certificate = cluster.issue(subject.node, Role::Worker, &key.csr().unwrap(), a_day());
        let credentials = Credentials {
            key,
            certificate: Certificate::from_der(&certificate).unwrap(),
            chain: Vec::new(),
            bundle: cluster.bundle(),
        };
        self.identity.replace(credentials).unwrap();
        new
    }

    async fn input(&mut self) -> Input {
        soon(self.inputs.recv()).await.expect("the session runs")
    }

    async fn welcomed(&mut self) -> Seen {
        match self.input().await {
            Input::Welcome(seen) => seen,
            other => panic!("{other:?}"),
        }
    }
}

fn address(manager: &Manager) -> wire::ManagerAddress {
    wire::ManagerAddress {
        address: manager.address.to_string(),
        ..Default::default()
    }
}

fn assignments(sequence: u64, index: u64) -> wire::Assignments {
    wire::Assignments {
        complete: sequence == 1,
        sequence,
        index,
        ..Default::default()
    }
}

#[tokio::test]
async fn a_session_begins_with_who_the_node_is_and_what_it_knows() {
    let cluster = Cluster::new();
    let mut manager = Manager::start(&cluster).await;
    let task = TaskId::from_bytes([3; 16]);
    let known = Known {
        seen: Seen { epoch: 1, index: 5 },
        tasks: vec![task],
    };
    let mut worker = Worker::start(&cluster, &[&manager], known);
    let mut session = manager.session().await;
    assert_eq!(session.node, worker.identity.subject().node);
    assert_eq!((session.hello.seen_epoch, session.hello.seen_index), (1, 5));
    assert_eq!(session.hello.task_ids, [task.to_wire()]);
    assert_eq!(session.hello.description.as_ref().unwrap().hostname, "host");
    assert!(worker.connected.borrow().is_none(), "not before the welcome");
    session.welcome(1, 5).await;
    assert_eq!(worker.welcomed().await, Seen { epoch: 1, index: 5 });
    soon(worker.connected.wait_for(Option::is_some)).await.unwrap();
    session.hear_alive(3).await;

    session.say(Down::Assignments(assignments(1, 6))).await;
    assert!(matches!(worker.input().await, Input::Assignments(update) if update.index == 6));
    worker.outputs.send(Output::Applied(1)).await.unwrap();
    let batch = wire::StatusBatch {
        reports: vec![],
        sequence: 7,
    };
    worker.outputs.send(Output::Status(batch.clone())).await.unwrap();
    assert_eq!(session.hear().await, Up::Applied(wire::Applied { sequence: 1 }));
    assert_eq!(session.hear().await, Up::Status(batch));
    session
        .say(Down::StatusAck(wire::StatusAck { sequence: 7 }))
        .await;
    assert!(matches!(worker.input().await, Input::Acknowledged(7)));
}

#[tokio::test]
async fn a_gap_begins_a_new_session_with_the_complete_state() {
    let cluster = Cluster::new();
    let mut manager = Manager::start(&cluster).await;
    let mut worker = Worker::start(&cluster, &[&manager], Known::default());
    // The agent's own judgement, of updates as they come through the session.
    let mut state = Assignments::new(Seen::default());
    let first = manager.session().await;
    first.welcome(1, 1).await;
    state.welcome(worker.welcomed().await).unwrap();
    for sequence in [1, 3] {
        first
            .say(Down::Assignments(assignments(sequence, sequence)))
            .await;
        let Input::Assignments(update) = worker.input().await else {
            panic!("assignments")
        };
        if let Err(error) = state.apply(*update) {
            assert_eq!(sequence, 3);
            worker.outputs.send(Output::EndSession(error)).await.unwrap();
        }
    }
    first.ended().await;
    let second = manager.session().await;
    second.welcome(1, 4).await;
    state.welcome(worker.welcomed().await).unwrap();
    second.say(Down::Assignments(assignments(1, 4))).await;
    let Input::Assignments(update) = worker.input().await else {
        panic!("assignments")
    };
    state.apply(*update).expect("complete again");
}

#[tokio::test]
async fn an_older_manager_is_refused_and_another_one_tried() {
    let cluster = Cluster::new();
    let (mut old, mut new) = (Manager::start(&cluster).await, Manager::start(&cluster).await);
    let known = Known {
        seen: Seen { epoch: 2, index: 50 },
        tasks: vec![],
    };
    let mut worker = Worker::start(&cluster, &[&old, &new], known);
    let refused = async {
        // An older epoch and an older index of the same epoch, both refused without a word to the agent.
        for (epoch, index) in [(1, 99), (2, 49)] {
            let session = old.session().await;
            session.welcome(epoch, index).await;
            session.ended().await;
        }
    };
    let ignored = async {
        loop {
            // Until both refusals were seen, the other one does not answer in time either.
            let session = new.session().await;
            session.say(Down::Beat(wire::Beat::default())).await; // no welcome: refused as well
            session.ended().await;
        }
    };
    tokio::select! {
        () = refused => {}
        () = ignored => unreachable!("it answers for ever"),
    }
    assert!(
        worker.inputs.try_recv().is_err(),
        "nothing of it reached the agent"
    );
    let session = new.session().await;
    session.welcome(2, 50).await;
    assert_eq!(worker.welcomed().await, Seen { epoch: 2, index: 50 });
}

#[tokio::test]
async fn another_nodes_welcome_is_refused() {
    let cluster = Cluster::new();
    let mut manager = Manager::start(&cluster).await;
    let mut worker = Worker::start(&cluster, &[&manager], Known::default());
    let session = manager.session().await;
    session.welcome_as(NodeId::from_bytes([9; 16]), 1, 1).await;
    session.ended().await;
    assert!(worker.inputs.try_recv().is_err());
}

#[tokio::test]
async fn a_foreign_clusters_manager_is_never_told_anything() {
    let (cluster, foreign) = (Cluster::new(), Cluster::new());
    let (mut manager, mut stranger) = (Manager::start(&cluster).await, Manager::start(&foreign).await);
    let mut worker = Worker::start(&cluster, &[&stranger, &manager], Known::default());
    let session = manager.session().await;
    session.welcome(1, 1).await;
    worker.welcomed().await;
    assert!(stranger.sessions.try_recv().is_err());
}

#[tokio::test]
async fn a_silent_manager_is_given_up() {
    let cluster = Cluster::new();
    let mut manager = Manager::start(&cluster).await;
    let mut worker = Worker::start(&cluster, &[&manager], Known::default());
    let first = manager.session().await;
    first.welcome(1, 1).await;
    worker.welcomed().await;
    // Held open, but without a beat.
    let second = manager.session().await;
    second.welcome(1, 1).await;
    worker.welcomed().await;
    first.ended().await;
}

#[tokio::test]
async fn the_list_of_managers_is_kept_up_to_date_and_used() {
    let cluster = Cluster::new();
    let (mut one, mut two) = (Manager::start(&cluster).await, Manager::start(&cluster).await);
    let mut worker = Worker::start(&cluster, &[&one], Known::default());
    let session = one.session().await;
    session.welcome(1, 1).await;
    worker.welcomed().await;
    let list = wire::Managers {
        managers: vec![address(&two)],
        roots: vec![],
        issuer: vec![],
    };
    session.say(Down::Managers(list)).await;
    soon(worker.managers.wait_for(|list| list == &[address(&two)]))
        .await
        .unwrap();
    drop(session); // that manager ends
    two.session().await.welcome(1, 1).await;
    worker.welcomed().await;
}

#[tokio::test]
async fn a_new_certificate_begins_a_new_session() {
    let cluster = Cluster::new();
    let mut manager = Manager::start(&cluster).await;
    // As one that is cut off: it takes connections and never says a word.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialled = Arc::new(AtomicUsize::new(0));
    let (address, count) = (silent.local_addr().unwrap(), dialled.clone());
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = silent.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            held.push(stream);
        }
    });
    let mut worker = Worker::start_at(&cluster, vec![manager.address.to_string(), address.to_string()]);
    let first = manager.session().await;
    first.welcome(1, 1).await;
    worker.welcomed().await;
    let before = dialled.load(Ordering::SeqCst);
    let new = worker.renewed(&cluster);
    assert_ne!(first.key, new);
    let second = manager.session().await;
    assert_eq!(second.key, new);
    first.ended().await;
    assert_eq!(
        dialled.load(Ordering::SeqCst),
        before,
        "the manager that was just heard has the first turn"
    );
}

/// The manager sees the certificate that the session was opened with, and a rotation of the root waits for the new one.
#[tokio::test]
async fn a_certificate_that_comes_while_a_session_is_opened_begins_a_new_one() {
    let cluster = Cluster::new();
    let mut manager = Manager::start(&cluster).await;
    let worker = Worker::start(&cluster, &[&manager], Known::default());
    let first = manager.session().await;
    let new = worker.renewed(&cluster);
    first.welcome(1, 1).await;
    assert_ne!(first.key, new);
    first.beat(); // so it lasts as long as this end of it
    assert_eq!(manager.session().await.key, new);
}

#[tokio::test]
async fn a_broken_blob_transfer_goes_on_where_it_ended() {
    let cluster = Cluster::new();
    let mut manager = Manager::start(&cluster).await;
    let worker = Worker::start(&cluster, &[&manager], Known::default());
    let folder = tempfile::tempdir().unwrap();
    let blobs = BlobStore::open(folder.path(), 1 << 20).unwrap();
    let bytes: Vec<u8> = (0..300_000u32).map(|n| n.to_le_bytes()[1]).collect();
    let blob = manager.add_blob(&bytes);
    let layer = Layer {
        blob,
        size: bytes.len() as u64,
        packing: Packing::Plain,
        diff: blob,
    };
    let fetch = ManagerFetch::new(worker.connected.clone());
    *manager.shared.break_after.lock().unwrap() = 100_000;
    let ingest = blobs.receive(blob, layer.size).unwrap();
    let (ingest, _session) = tokio::join!(soon(fetch.fetch(layer, ingest)), async {
        let session = manager.session().await; // a fetch waits for one
        session.welcome(1, 1).await;
        session
    });
    ingest.unwrap().finish().expect("the right bytes");
    assert_eq!(*manager.shared.offsets.lock().unwrap(), [0, 100_000]);

    // More bytes than announced are refused at once, and not asked for again.
    let ingest = blobs.receive(blob, 10).unwrap();
    let short = Layer { size: 10, ..layer };
    let error = soon(fetch.fetch(short, ingest))
        .await
        .expect_err("too many bytes");
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
    assert_eq!(manager.shared.offsets.lock().unwrap().len(), 3);
}
