//! Replicas that speak real gRPC over the loopback.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bulkhead_proto::wire::{
    Change, Node, Object, RaftMessage, StoreMark, Transaction, change::Change as Step, object::Object as Any,
    raft_client,
};
use bulkhead_proto::{ClusterId, NodeId};
use bytes::Bytes;
use openraft::errors::RPCError;
use openraft::network::v2::RaftNetworkV2 as _;
use openraft::network::{RPCOption, RaftNetworkFactory as _};
use openraft::raft::{AppendEntriesRequest, VoteRequest};
use prost::Message as _;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Extensions};

use super::message;
use super::{BindPeer, Binding, Dial, DialError, Network, RaftService, Witness, is_gapless};
use crate::file_system::SimFileSystem;
use crate::log_store::Durable;
use crate::runtime::Blocking;
use crate::testing::MemoryStore;
use crate::{Core, Disk, Entry, Member, Reconciled, Replica, Timing, TypeConfig, Vote, log_id};

const CLUSTER: ClusterId = ClusterId::from_bytes([7; 16]);

/// Without certificates: whoever is in the list speaks for any member but 666.
struct AnyButOne;

impl BindPeer for AnyButOne {
    fn speaks_for(&self, _extensions: &Extensions, member: u64) -> bool {
        member != 666
    }
}

struct Plain;

impl Dial for Plain {
    fn channel(&self, _id: u64, member: &Member) -> Result<Channel, DialError> {
        let endpoint = Endpoint::from_shared(format!("http://{}", member.address));
        let endpoint = endpoint.map_err(|error| DialError(error.to_string()))?;
        Ok(endpoint.connect_lazy())
    }
}

struct Manager {
    replica: Replica,
    store: MemoryStore,
    member: Member,
    stop: CancellationToken,
    server: tokio::task::JoinHandle<()>,
}

impl Manager {
    async fn start(id: u64, timing: Timing) -> Self {
        Self::start_with(id, timing, Witness::default()).await
    }

    async fn start_with(id: u64, timing: Timing, witness: Witness) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        let binding = binding(id);
        let store = MemoryStore::default();
        let replica = Replica::start_over(Core {
            member: id,
            log: store.clone(),
            snapshots: Arc::new(store.clone()),
            network: Network::new(Plain, binding, witness.clone()),
            disk: Disk {
                fs: Arc::new(SimFileSystem::new()),
                folder: "/".into(),
            },
            seed: id,
            timing,
            blocking: Blocking::Threads,
        })
        .await
        .expect("a new replica starts");
        let service = RaftService::new(&replica, binding, Arc::new(AnyButOne), witness).into_server();
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        let server = tokio::spawn(async move {
            Server::builder()
                .add_service(service)
                .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopped)
                .await
                .expect("it serves");
        });
        let node = NodeId::from_bytes([u8::try_from(id).expect("small"); 16]);
        Self {
            replica,
            store,
            member: Member { node, address },
            stop,
            server,
        }
    }

    async fn stop(self) {
        self.replica.shutdown().await;
        self.stop.cancel();
        self.server.abort(); // open streams of others would hold it
        let _cancelled = self.server.await;
    }
}

fn binding(member: u64) -> Binding {
    Binding {
        cluster: CLUSTER,
        epoch: 1,
        member,
    }
}

/// Generous, for a busy machine: what is tested is not how fast elections are.
fn timing() -> Timing {
    Timing {
        election_ms: 1_000..2_000,
        heartbeat: Duration::from_millis(100),
        ..Timing::default()
    }
}

fn transaction(n: u32) -> Bytes {
    let mut id = [0; 16];
    id[..4].copy_from_slice(&n.to_be_bytes());
    let node = Node {
        id: id.to_vec(),
        name: format!("node-{n}"),
        ..Default::default()
    };
    let create = Step::Create(Object {
        object: Some(Any::Node(node)),
    });
    let transaction = Transaction {
        level: 1,
        request_id: id.to_vec(),
        changes: vec![Change { change: Some(create) }],
        ..Default::default()
    };
    transaction.encode_to_vec().into()
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future)
        .await
        .unwrap_or_else(|_| panic!("{what} did not happen"))
}

async fn leads(replica: &Replica) {
    let mut leadership = replica.leadership();
    within("leading", leadership.wait_for(|it| it.leading.is_some()))
        .await
        .expect("it runs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn learners_become_voters_a_snapshot_reaches_one_that_lags_and_leadership_moves() {
    let timing = Timing {
        snapshot_every: 50,
        keep: 5,
        ..timing()
    };
    let (one, two) = (
        Manager::start(1, timing.clone()).await,
        Manager::start(2, timing.clone()).await,
    );
    one.replica
        .initialise(one.member.clone())
        .await
        .expect("the first time");
    leads(&one.replica).await;
    for n in 0..120 {
        let outcome = one.replica.propose(transaction(n)).await.expect("it leads alone");
        assert_eq!(outcome.rejection, None);
        assert!(
            one.replica.index() >= outcome.index,
            "published before it is answered"
        );
    }
    within("a purge", async {
        while one.store.purged().is_none() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;

    // The log's start is gone, so only a snapshot can bring the second one up.
    one.replica
        .add_learner(2, two.member.clone())
        .await
        .expect("it catches up");
    let desired = BTreeSet::from([1, 2]);
    while one
        .replica
        .reconcile_voters(&desired)
        .await
        .expect("both are there")
        == Reconciled::Moved
    {}
    assert_eq!(one.replica.members().voters, desired);
    let last = one.replica.propose(transaction(1_000)).await.expect("both vote");
    within("applying", two.replica.wait_applied(last.index)).await;
    assert_eq!(two.replica.state().digest(), one.replica.state().digest());
    assert!(two.replica.events_since(1).is_err(), "a snapshot tells no events");
    let read = one.replica.read_index().await.expect("a quorum answers");
    assert!(read >= last.index);
    let refused = two.replica.propose(transaction(1_001)).await;
    assert_eq!(refused, Err(crate::ProposeError::NotLeader { leader: Some(1) }));

    one.replica.hand_over(Some(2)).await;
    leads(&two.replica).await;
    two.replica
        .propose(transaction(1_002))
        .await
        .expect("it leads now");
    let alone = BTreeSet::from([2]);
    within("removal", async {
        while two.replica.reconcile_voters(&alone).await != Ok(Reconciled::Settled) {}
    })
    .await;
    assert_eq!(two.replica.members().voters, alone);
    one.stop().await;
    two.replica
        .propose(transaction(1_003))
        .await
        .expect("alone it is a quorum");
    two.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_is_not_for_this_member_or_not_from_its_sender_is_refused() {
    let manager = Manager::start(1, timing()).await;
    let channel = Plain.channel(1, &manager.member).expect("an address");
    let mut client = raft_client::RaftClient::new(channel);
    let vote = message::encode_vote(&VoteRequest::new(Vote::new(9, 2), None));
    let good = binding(2).seal(1, vote.clone(), &Witness::default());
    let with = |change: fn(&mut RaftMessage)| {
        let mut message = good.clone();
        change(&mut message);
        message
    };
    let table = [
        (with(|it| it.cluster_id = vec![8; 16]), Code::FailedPrecondition),
        (with(|it| it.cluster_id.clear()), Code::FailedPrecondition),
        (with(|it| it.epoch = 2), Code::FailedPrecondition),
        (with(|it| it.to = 3), Code::FailedPrecondition),
        (with(|it| it.from = 666), Code::PermissionDenied),
        // The candidate named inside is 2.
        (with(|it| it.from = 3), Code::PermissionDenied),
        (
            with(|it| it.payload = vec![0xff; 9].into()),
            Code::InvalidArgument,
        ),
    ];
    for (message, code) in table {
        for asked in [
            client.vote(message.clone()).await,
            client.pre_vote(message.clone()).await,
        ] {
            assert_eq!(asked.expect_err("refused").code(), code, "{message:?}");
        }
        let appended = client.append(tokio_stream::once(message.clone())).await;
        assert!(appended.is_err(), "{message:?}");
        let installed = client.install_snapshot(tokio_stream::once(message.clone())).await;
        assert!(installed.is_err(), "{message:?}");
        assert!(client.transfer_leader(message).await.is_err());
    }
    assert_eq!(manager.replica.members().term, 0, "nothing of it was heard");
    let answer = client
        .vote(good)
        .await
        .expect("it is for this member")
        .into_inner();
    assert_eq!((answer.from, answer.to), (1, 2));
    manager.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_others_remember_more_of_takes_no_message_and_says_so() {
    let (witness, durable) = (Witness::default(), Durable::default());
    durable.set(5, (5, 8));
    witness.opened(1, durable);
    let manager = Manager::start_with(1, timing(), witness.clone()).await;
    let channel = Plain.channel(1, &manager.member).expect("an address");
    let mut client = raft_client::RaftClient::new(channel);
    let vote = message::encode_vote(&VoteRequest::new(Vote::new(9, 2), None));
    let mut message = binding(2).seal(1, vote, &Witness::default());
    let known = |last_index| StoreMark {
        member: 1,
        vote_term: 5,
        last_term: 5,
        last_index,
    };
    message.known = vec![known(9)];
    let refused = client
        .vote(message.clone())
        .await
        .expect_err("it had entry 9 before");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let found = within("it finds out", witness.rolled_back()).await;
    assert!(found.to_string().contains("entry 9 of term 5"), "{found}");
    // For good: also what nobody objects to is not heard any more.
    message.known = vec![known(8)];
    assert!(client.vote(message.clone()).await.is_err());
    assert!(client.append(tokio_stream::once(message)).await.is_err());
    assert_eq!(manager.replica.members().term, 0, "nothing of it was heard");
    manager.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_later_append_of_a_stream_is_checked_like_the_first() {
    let manager = Manager::start(1, timing()).await;
    let channel = Plain.channel(1, &manager.member).expect("an address");
    let mut client = raft_client::RaftClient::new(channel);
    let append = || {
        message::encode_append(openraft::raft::AppendEntriesRequest {
            vote: Vote::new_committed(3, 2),
            prev_log_id: None,
            entries: Vec::new(),
            leader_commit: None,
        })
    };
    let good = binding(2).seal(1, append(), &Witness::default());
    let other = binding(666).seal(1, append(), &Witness::default());
    let mut answers = client
        .append(tokio_stream::iter([good.clone(), other, good]))
        .await
        .expect("the first is good")
        .into_inner();
    let first = within("an answer", answers.message()).await;
    assert_eq!(first.expect("answered").map(|it| it.to), Some(2));
    let second = within("a refusal", answers.message()).await;
    assert_eq!(second.expect_err("refused").code(), Code::PermissionDenied);
    manager.stop().await;
}

#[test]
fn an_index_that_none_can_follow_is_no_way_to_a_panic() {
    let append = |prev: Option<u64>, entries: &[u64]| AppendEntriesRequest {
        vote: Vote::new_committed(3, 2),
        prev_log_id: prev.map(|index| log_id(3, index)),
        entries: entries
            .iter()
            .map(|index| Entry {
                log_id: log_id(3, *index),
                payload: openraft::EntryPayload::Blank,
            })
            .collect(),
        leader_commit: None,
    };
    assert!(is_gapless(&append(Some(u64::MAX), &[])));
    assert!(!is_gapless(&append(Some(u64::MAX), &[0])));
    assert!(is_gapless(&append(Some(u64::MAX - 1), &[u64::MAX])));
    assert!(!is_gapless(&append(Some(u64::MAX - 1), &[u64::MAX, 0])));
}

/// A leader may go on with a stream of entries whose next ones it has purged meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_append_that_would_leave_a_hole_is_refused_and_the_replica_goes_on() {
    let manager = Manager::start(1, timing()).await;
    let channel = Plain.channel(1, &manager.member).expect("an address");
    let mut client = raft_client::RaftClient::new(channel);
    let entry = |index| Entry {
        log_id: log_id(3, index),
        payload: openraft::EntryPayload::Blank,
    };
    let append = |entries: &[u64]| {
        let append = message::encode_append(AppendEntriesRequest {
            vote: Vote::new_committed(3, 2),
            prev_log_id: None,
            entries: entries.iter().map(|index| entry(*index)).collect(),
            leader_commit: None,
        });
        binding(2).seal(1, append, &Witness::default())
    };
    for broken in [&[1][..], &[0, 2], &[0, 0]] {
        let mut answers = client
            .append(tokio_stream::iter([append(&[0]), append(broken)]))
            .await
            .expect("the first is good")
            .into_inner();
        let first = within("an answer", answers.message()).await;
        assert!(first.expect("answered").is_some());
        let second = within("a refusal", answers.message()).await;
        assert_eq!(
            second.expect_err("refused").code(),
            Code::FailedPrecondition,
            "{broken:?}"
        );
        let only = client.append(tokio_stream::iter([append(broken)])).await;
        assert_eq!(
            only.expect_err("refused").code(),
            Code::FailedPrecondition,
            "{broken:?}"
        );
    }
    assert_eq!(manager.replica.members().last_log, Some(0));
    manager.stop().await;
}

/// A replica without others, for what needs none.
#[tokio::test]
async fn a_full_disk_refuses_proposals_and_no_others() {
    let fs = SimFileSystem::new();
    let store = MemoryStore::default();
    let replica = Replica::start_over(Core {
        member: 1,
        log: store.clone(),
        snapshots: Arc::new(store),
        network: Network::new(Plain, binding(1), Witness::default()),
        disk: Disk {
            fs: Arc::new(fs.clone()),
            folder: "/".into(),
        },
        seed: 1,
        timing: timing(),
        blocking: Blocking::Inline,
    })
    .await
    .expect("a new replica starts");
    let me = Member {
        node: NodeId::from_bytes([1; 16]),
        address: "127.0.0.1:1".into(),
    };
    replica.initialise(me).await.expect("the first time");
    leads(&replica).await;
    replica.propose(transaction(1)).await.expect("there is room");
    fs.set_capacity(Some(1));
    within("Full", async {
        while replica.propose(transaction(2)).await != Err(crate::ProposeError::Full) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    fs.set_capacity(None);
    within("room", async {
        while replica.propose(transaction(3)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let too_large = vec![0; bulkhead_proto::limits::TRANSACTION_BYTES + 1];
    let refused = replica.propose(too_large.into()).await;
    assert!(matches!(refused, Err(crate::ProposeError::TooLarge { .. })));
    replica.shutdown().await;
    assert_eq!(replica.stopped().await, crate::Fatal::Stopped);
    assert_eq!(
        replica.propose(transaction(4)).await,
        Err(crate::ProposeError::Stopped)
    );
}

#[tokio::test]
async fn an_entry_of_a_newer_level_stops_the_replica() {
    let store = MemoryStore::default();
    let replica = Replica::start_over(Core {
        member: 1,
        log: store.clone(),
        snapshots: Arc::new(store),
        network: Network::new(Plain, binding(1), Witness::default()),
        disk: Disk {
            fs: Arc::new(SimFileSystem::new()),
            folder: "/".into(),
        },
        seed: 1,
        timing: timing(),
        blocking: Blocking::Inline,
    })
    .await
    .expect("a new replica starts");
    let me = Member {
        node: NodeId::from_bytes([1; 16]),
        address: "127.0.0.1:1".into(),
    };
    replica.initialise(me).await.expect("the first time");
    leads(&replica).await;
    let newer = Transaction {
        level: 99,
        ..Default::default()
    };
    let refused = replica.propose(newer.encode_to_vec().into()).await;
    assert!(refused.is_err(), "{refused:?}");
    let fatal = within("stopping", replica.stopped()).await;
    assert!(
        matches!(&fatal, crate::Fatal::Store(why) if why.contains("level 99")),
        "{fatal:?}"
    );
}

#[tokio::test]
async fn who_cannot_be_reached_is_asked_again_only_when_consensus_has_something_to_send() {
    // Consensus waits after failures inside the stream of its requests: one that is never asked for never waits.
    let asked = Arc::new(AtomicBool::new(false));
    let seen = asked.clone();
    let requests = futures::stream::once(async move {
        seen.store(true, Ordering::Relaxed);
        AppendEntriesRequest::<TypeConfig> {
            vote: Vote::new(1, 1),
            prev_log_id: None,
            entries: Vec::new(),
            leader_commit: None,
        }
    });
    let nobody = Member {
        node: NodeId::from_bytes([2; 16]),
        address: "127.0.0.1:1".into(),
    };
    let mut peer = Network::new(Plain, binding(1), Witness::default())
        .new_client(2, &nobody)
        .await;
    let option = RPCOption::new(Duration::from_secs(1));
    let sent = peer.stream_append(Box::pin(requests), option).await;
    assert!(matches!(sent.map(drop), Err(RPCError::Unreachable(_))));
    assert!(
        asked.load(Ordering::Relaxed),
        "it failed before anything was to be sent"
    );
}
