//! Stores as a replica left them, read and begun again.

use std::time::Duration;

use bulkhead_identity::Unswapped;
use bulkhead_proto::wire::{Change, Object, Secret, Transaction, change, object};
use bulkhead_proto::{ClusterId, NodeId};
use bytes::Bytes;
use prost::Message as _;
use tonic::transport::Channel;

use super::*;
use crate::encryption::{DataKey, KEY_BYTES};
use crate::file_system::SimFileSystem;
use crate::log_store::Flushing;
use crate::log_store::tests::Counting;
use crate::runtime::Blocking;
use crate::transport::{Binding, Dial, DialError, Network};
use crate::{Parts, Replica, StartError, Timing};

const PATIENCE: Duration = Duration::from_secs(20);

/// Nobody else is there.
struct Alone;

impl Dial for Alone {
    fn channel(&self, _: u64, _: &Member) -> Result<Channel, DialError> {
        Err(DialError("nobody is there".into()))
    }
}

pub(crate) fn store(fs: &SimFileSystem, folder: &str, epoch: u64, member: u64) -> Store {
    Store {
        fs: Arc::new(fs.clone()),
        folder: folder.into(),
        sealing: Sealing {
            keys: Arc::new(DataKey::new(Unswapped::new([1; KEY_BYTES])).into()),
            store: [u8::try_from(epoch).expect("small"); 16],
            cluster_epoch: epoch,
            member,
        },
        entropy: Arc::new(Counting::default()),
        log: Options {
            segment_bytes: 64 << 10,
            flushing: Flushing::Inline,
            ..Options::default()
        },
    }
}

pub(crate) fn me() -> Member {
    Member {
        node: NodeId::from_bytes([7; 16]),
        address: "127.0.0.1:7443".into(),
    }
}

pub(crate) async fn start(store: &Store) -> Replica {
    try_start(store).await.expect("it starts")
}

async fn try_start(store: &Store) -> Result<Replica, StartError> {
    let binding = Binding {
        cluster: ClusterId::from_bytes([7; 16]),
        epoch: store.sealing.cluster_epoch,
        member: store.sealing.member,
    };
    Replica::start(Parts {
        member: store.sealing.member,
        fs: store.fs.clone(),
        folder: store.folder.clone(),
        sealing: store.sealing.clone(),
        entropy: store.entropy.clone(),
        network: Network::new(Alone, binding, Default::default()),
        timing: Timing::default(),
        log: store.log.clone(),
        blocking: Blocking::Inline,
        witness: Default::default(),
    })
    .await
}

pub(crate) async fn leads(replica: &Replica) {
    let mut leadership = replica.leadership();
    let leads = leadership.wait_for(|now| now.leading.is_some());
    tokio::time::timeout(PATIENCE, leads)
        .await
        .expect("in time")
        .expect("it runs");
}

pub(crate) fn secret(n: u8) -> Bytes {
    let secret = Secret {
        id: vec![n; 16],
        name: format!("secret-{n}"),
        ..Default::default()
    };
    let create = change::Change::Create(Object {
        object: Some(object::Object::Secret(secret)),
    });
    let transaction = Transaction {
        level: 1,
        request_id: vec![n; 16],
        changes: vec![Change { change: Some(create) }],
        ..Default::default()
    };
    transaction.encode_to_vec().into()
}

async fn write(replica: &Replica, n: u8) -> u64 {
    let outcome = replica.propose(secret(n)).await.expect("committed");
    assert_eq!(outcome.rejection, None);
    outcome.index
}

/// Lets whoever still reads the log end.
async fn read(store: &Store) -> Held {
    for _ in 0..1_000 {
        match store.read() {
            Err(OfflineError::Open(OpenError::Locked { .. })) => tokio::task::yield_now().await,
            read => return read.expect("readable"),
        }
    }
    panic!("the log is never let go");
}

#[tokio::test]
async fn a_log_that_begins_after_what_no_snapshot_holds_is_a_loss() {
    let fs = SimFileSystem::new();
    let store = store(&fs, "/raft", 1, 1);
    let replica = start(&store).await;
    replica.initialise(me()).await.expect("it runs");
    leads(&replica).await;
    write(&replica, 1).await;
    replica.reseal().await.expect("a snapshot, and no log before it");
    replica.shutdown().await;
    drop(replica);
    read(&store).await;
    fs.unlink(&store.folder.join("snapshot")).expect("it is there");
    let lost = try_start(&store)
        .await
        .map(drop)
        .expect_err("what it acknowledged is gone");
    assert!(matches!(lost, StartError::NoSnapshot { .. }), "{lost}");
    assert!(lost.is_loss());
}

#[tokio::test]
async fn what_a_replica_wrote_is_read_and_goes_on_in_a_store_of_the_next_epoch() {
    let fs = SimFileSystem::new();
    let old = store(&fs, "/raft", 1, 1);
    let replica = start(&old).await;
    replica.initialise(me()).await.expect("it runs");
    leads(&replica).await;
    write(&replica, 1).await;
    let last = write(&replica, 2).await;
    let before = replica.state();
    replica.shutdown().await;
    drop(replica);
    let held = read(&old).await;
    assert_eq!((held.state.index(), held.state.digest()), (last, before.digest()));
    assert!(held.committed <= Some(last));

    let mut state = held.state;
    let jump = 1_000_000_000;
    state.apply(jump, 0, &secret(3)).expect("a known level");
    let new = store(&fs, "/raft-2", 2, jump);
    new.plant(&state, me()).expect("an empty folder");
    let replica = start(&new).await;
    leads(&replica).await;
    assert_eq!(replica.state().digest(), state.digest());
    assert!(write(&replica, 4).await > jump);
    assert_eq!(replica.members().voters, BTreeSet::from([jump]));
    let digest = replica.state().digest();
    replica.shutdown().await;
    drop(replica);

    // And again after a restart.
    assert_eq!(read(&new).await.state.digest(), digest);
    let replica = start(&new).await;
    leads(&replica).await;
    assert_eq!(replica.state().digest(), digest);
    replica.shutdown().await;
}

#[tokio::test]
async fn a_store_of_another_epoch_member_or_content_is_refused() {
    let fs = SimFileSystem::new();
    let planted = store(&fs, "/raft", 2, 5);
    planted.plant(&State::default(), me()).expect("an empty folder");
    for foreign in [store(&fs, "/raft", 1, 5), store(&fs, "/raft", 2, 6)] {
        assert!(matches!(
            foreign.read(),
            Err(OfflineError::Open(OpenError::Foreign { .. }))
        ));
    }
    let replica = start(&planted).await;
    leads(&replica).await;
    write(&replica, 1).await;
    replica.shutdown().await;
    drop(replica);
    read(&planted).await;
    assert!(matches!(
        planted.plant(&State::default(), me()),
        Err(OfflineError::Occupied(_))
    ));
}
