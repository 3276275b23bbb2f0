//! What the replicated state says about a caller's key, and when that may have changed.

use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_identity::bundle::Root;
use bulkhead_identity::{Certificate, Subject};
use bulkhead_proto::KeyId;
use bulkhead_proto::wire::{Kind, event, object::Object as Any};
use bulkhead_raft::Replica;
use bulkhead_raft::state::State;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::KeyState;
use crate::ca::trust;
use crate::view;

/// The key lists of all nodes. Clones are handles to the same one.
#[derive(Debug, Clone)]
pub struct Listing {
    replica: Replica,
    changed: watch::Sender<u64>,
    /// The root that signs no more, as of a version of the cluster object.
    former: Arc<Mutex<(u64, Option<Root>)>>,
}

impl Listing {
    /// The lists as this replica has them: [`Listing::run`] must run for streams to close at a removal.
    pub fn new(replica: Replica) -> Self {
        let index = replica.index();
        Self {
            replica,
            changed: watch::Sender::new(index),
            former: Arc::default(),
        }
    }

    /// Wakes open streams when a node or the cluster object changed, and at no other commit.
    pub async fn run(&self, stop: CancellationToken) {
        let mut applied = self.replica.applied();
        let mut seen = *self.changed.borrow();
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                changed = applied.changed() => if changed.is_err() { return },
            }
            let index = *applied.borrow_and_update();
            // What is compacted may have been a removal.
            let events = self.replica.events_since(seen);
            seen = index;
            if events.is_err() || events.is_ok_and(|events| events.iter().any(|it| concerns(it))) {
                self.changed.send_replace(index);
            }
        }
    }

    /// The key as the state has it now.
    pub fn of(&self, subject: &Subject, key: KeyId) -> KeyState {
        key_state(&self.replica.state(), subject, key)
    }

    /// Whether the certificate's root was rotated away, and opens nothing any more. One whose root this replica does
    /// not know yet was not; to Raft methods one of a root that was not compromised still leads, since a manager that
    /// was off must count for the quorum before it can be taken back.
    pub(super) fn is_dropped(&self, certificate: &Certificate, raft: bool) -> bool {
        let state = self.replica.state();
        let Some(cluster) = view::cluster(&state) else {
            return false;
        };
        let version = cluster.meta.as_ref().map_or(0, |meta| meta.version);
        let mut known = self.former.lock().unwrap_or_else(PoisonError::into_inner);
        if known.0 != version {
            let former = cluster.former.as_ref();
            *known = (version, former.and_then(|it| Root::from_der(&it.root).ok()));
        }
        let dropped = known
            .1
            .as_ref()
            .is_some_and(|root| root.is_issuer_of(certificate));
        dropped && !(raft && trust::former(cluster).is_some())
    }

    /// The reason, once `ended` gives one; it is asked again whenever a node or the cluster object changed.
    pub(super) async fn until<T>(&self, ended: impl Fn() -> Option<T>) -> T {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(reason) = ended() {
                return reason;
            }
            if changed.changed().await.is_err() {
                std::future::pending::<()>().await; // the sender is this list's own
            }
        }
    }
}

fn concerns(event: &bulkhead_proto::wire::Event) -> bool {
    match &event.change {
        Some(event::Change::Put(object)) => matches!(object.object, Some(Any::Node(_) | Any::Cluster(_))),
        Some(event::Change::Deleted(reference)) => reference.kind() == Kind::Node,
        None => false,
    }
}

fn key_state(state: &State, subject: &Subject, key: KeyId) -> KeyState {
    let id = key.as_bytes();
    if view::cluster(state).is_some_and(|it| it.tombstones.iter().any(|it| it.key_id == id)) {
        return KeyState::Tombstoned;
    }
    let listed = view::node(state, subject.node).is_some_and(|node| {
        node.role() == view::wire_role(subject.role) && node.keys.iter().any(|it| it.key_id == id)
    });
    match listed {
        true => KeyState::Listed,
        false => KeyState::Unknown,
    }
}
