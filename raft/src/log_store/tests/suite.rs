//! openraft's own suite for log stores, with the least state machine that it runs with.

use std::time::Duration;

use futures::{FutureExt as _, Stream, StreamExt as _};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::{RaftSnapshotBuilder, StorageError};

use super::*;
use crate::type_config::{Answer, Member, StoredMembership};

type Meta = openraft::alias::SnapshotMetaOf<TypeConfig>;
type Snapshot = openraft::alias::SnapshotOf<TypeConfig, ()>;

/// The suite makes memberships of members without an address.
impl Default for Member {
    fn default() -> Self {
        Self {
            node: bulkhead_proto::NodeId::from_bytes([0; 16]),
            address: String::new(),
        }
    }
}

#[derive(Default)]
struct Machine {
    last: Option<LogId>,
    membership: StoredMembership,
    snapshot: Option<Meta>,
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotData = ();
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.last, self.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + Send,
    {
        while let Some(next) = entries.next().await {
            let (entry, responder) = next?;
            self.last = Some(entry.log_id);
            if let EntryPayload::Membership(membership) = entry.payload {
                self.membership = StoredMembership::new(Some(entry.log_id), membership);
            }
            if let Some(responder) = responder {
                responder.send(Answer(Default::default()));
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        let meta = Meta {
            last_log_id: self.last,
            last_membership: self.membership.clone(),
        };
        self.snapshot = Some(meta.clone());
        Builder(meta)
    }

    async fn install_snapshot(&mut self, meta: &Meta, (): ()) -> Result<(), io::Error> {
        self.last = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.snapshot = Some(meta.clone());
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        Ok(self.snapshot.clone().map(|meta| Snapshot { meta, snapshot: () }))
    }
}

struct Builder(Meta);

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    type SnapshotData = ();

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        Ok(Snapshot {
            meta: self.0.clone(),
            snapshot: (),
        })
    }
}

/// Makes empty stores.
struct Fresh(Flushing);

impl StoreBuilder<TypeConfig, LogStore, Machine> for Fresh {
    async fn build(&self) -> Result<((), LogStore, Machine), StorageError<TypeConfig>> {
        let options = Options {
            flushing: self.0.clone(),
            ..options()
        };
        let fs = Arc::new(SimFileSystem::new());
        let (store, _) = LogStore::open(fs, &folder(), sealing(), Arc::new(Counting::default()), options)
            .expect("an empty store");
        Ok(((), store, Machine::default()))
    }
}

#[tokio::test]
async fn openrafts_suite_passes_with_a_thread() {
    Suite::test_all(Fresh(Flushing::Thread)).await.expect("the suite");
}

#[tokio::test]
async fn openrafts_suite_passes_inline() {
    Suite::test_all(Fresh(Flushing::Inline)).await.expect("the suite");
}

#[tokio::test(start_paused = true)]
async fn openrafts_suite_passes_with_delayed_flushes() {
    let delay = || tokio::time::sleep(Duration::from_millis(3)).boxed();
    Suite::test_all(Fresh(Flushing::Delayed(Arc::new(delay))))
        .await
        .expect("the suite");
}
