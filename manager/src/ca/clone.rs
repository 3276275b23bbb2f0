//! The alarm about copies of a node: who opens a connection with a key whose successor was seen in use is not the node.
//!
//! A node writes its newer key to disk before it uses it, and from then on connects with that one alone. So once a manager
//! saw the newer key, the older one comes from a copy of the node's disk or memory, or from an old backup that was put
//! back. What is no reason: a key whose successor nobody has used yet, since that answer may be lost or the node may have
//! stopped before it wrote it; and a connection that was opened before, or was being opened then.
//!
//! A worker or standby that has a clone is put into quarantine: nobody can tell which of the two is the node. A manager
//! is not, since whoever has one old key of it could take the cluster's quorum with it; that is for an operator. Operators'
//! keys are none of this: a context may lie on several machines, each of which renews by itself.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_identity::Certificate;
use bulkhead_identity::seam::{Clock, Entropy};
use bulkhead_proto::wire::{
    Change, CloneSeen, Node, NodeKey, Precondition, RejectionCode, Role as WireRole, SupersededKey,
    change::Change as Step, object::Object as Any,
};
use bulkhead_proto::{Code, KeyId, NodeId, RequestId, Role, limits};
use bulkhead_raft::Replica;
use bulkhead_raft::state::State;
use tokio::sync::Notify;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::millis;
use super::renewal::unchanged;
use crate::orchestrator::removal;
use crate::proposer::Proposer;
use crate::refusal::refuse;
use crate::view;

/// Clones that wait to be told of. One that finds no room is told of when it calls again.
const WAITING: usize = 64;
/// Attempts to commit one alarm, and the pause between: several elections.
const ATTEMPTS: usize = 20;
const PAUSE: Duration = Duration::from_millis(200);

/// Marks in a node's record that it uses `key`: those of its older keys that are of the same role are superseded from now
/// on, unless they were before.
pub fn seen(record: &mut Node, key: KeyId, now_ms: i64) {
    let Some(place) = record.keys.iter().position(|it| it.key_id == key.as_bytes()) else {
        return;
    };
    let older = record.keys[..place]
        .iter()
        .filter(|it| !record.superseded.iter().any(|known| known.key_id == it.key_id));
    let older: Vec<&NodeKey> = older.collect();
    if older.is_empty() {
        return; // nearly always
    }
    let role = role_of(&record.keys[place]);
    if role.is_none_or(|role| role == Role::Operator) {
        return;
    }
    let superseded = older
        .into_iter()
        .filter(|it| role_of(it) == role)
        .map(|it| SupersededKey {
            key_id: it.key_id.clone(),
            at: now_ms,
            until: it.not_after.saturating_add(millis(limits::RETURN_GRACE)),
        });
    let superseded: Vec<SupersededKey> = superseded.collect();
    record.superseded.extend(superseded);
    record.superseded.retain(|it| it.until > now_ms);
    let surplus = record.superseded.len().saturating_sub(limits::SUPERSEDED_KEYS);
    record.superseded.drain(..surplus);
}

fn role_of(key: &NodeKey) -> Option<Role> {
    let certificate = Certificate::from_der(&key.certificate).ok()?;
    Some(certificate.subject().role)
}

/// The node's superseded key of this id.
pub fn superseded(record: &Node, key: KeyId) -> Option<&SupersededKey> {
    record.superseded.iter().find(|it| it.key_id == key.as_bytes())
}

/// Whether a connection that was opened at `opened_ms` with this key is a clone's.
pub fn is_clone(key: &SupersededKey, opened_ms: i64) -> bool {
    opened_ms > key.at.saturating_add(millis(limits::SUPERSEDED_GRACE))
}

/// What a caller with a superseded key hears.
pub(crate) fn refused() -> Status {
    refuse(
        Code::SupersededKey,
        tonic::Code::PermissionDenied,
        "a newer key of this node is in use: who shows this one is a copy of it, or was put back from an old one",
        "an operator looks at `bulkhead node ls`; a machine that is trusted joins again with a new ticket",
    )
}

/// A clone, as one connection showed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Whose key it has.
    pub node: NodeId,
    /// Which one.
    pub key: KeyId,
    /// Where it connected from.
    pub address: Option<IpAddr>,
    /// When, milliseconds since 1970 by the clock of the manager that it connected to.
    pub opened_ms: i64,
}

/// The one transaction that tells of a clone, and puts its node into quarantine unless it is a manager. Nothing where the
/// state knows of no such clone, or was told of one of this node before: so a flood of calls is one record.
pub fn alarm(state: &State, shown: &Shown, now_ms: i64) -> Option<(Vec<Precondition>, Vec<Change>)> {
    let record = view::node(state, shown.node)?;
    let key = superseded(record, shown.key)?;
    if record.clone_seen.is_some() || !is_clone(key, shown.opened_ms) {
        return None;
    }
    let told = Node {
        clone_seen: Some(CloneSeen {
            at: now_ms,
            key_id: shown.key.to_wire(),
            address: shown.address.map_or_else(String::new, |it| it.to_string()),
        }),
        ..record.clone()
    };
    let changes = match record.role() {
        WireRole::Worker | WireRole::Standby if record.quarantined_at == 0 => {
            removal::quarantine(state, shown.node, &told, now_ms)
        }
        WireRole::Worker | WireRole::Standby | WireRole::Manager => vec![Change {
            change: Some(Step::Replace(view::object(Any::Node(told)))),
        }],
        WireRole::Operator | WireRole::Unspecified => return None,
    };
    Some((vec![unchanged(record)], changes))
}

/// Where clones are told of; whoever saw one does not wait. Clones of the handle tell in the same place; [`Alarms::run`] must
/// run.
#[derive(Debug, Clone, Default)]
pub struct Alarms(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// One of each node.
    waiting: Mutex<BTreeMap<NodeId, Shown>>,
    more: Notify,
}

impl Alarms {
    /// Tells of a clone. One that finds no room, or waits already, is passed over: it is seen again when it calls again.
    pub fn raise(&self, shown: Shown) {
        let mut waiting = self.waiting();
        if waiting.len() < WAITING {
            waiting.entry(shown.node).or_insert(shown);
            self.0.more.notify_one();
        }
    }

    /// Commits what it is told of, until it is stopped. `own` is this manager's principal.
    pub async fn run(
        self,
        replica: Replica,
        proposer: Proposer,
        own: String,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
        stop: CancellationToken,
    ) {
        let told = async {
            loop {
                let next = self.waiting().pop_first();
                match next {
                    Some((_, shown)) => commit(&replica, &proposer, &own, &shown, &*clock, &*entropy).await,
                    None => self.0.more.notified().await,
                }
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = told => {}
        }
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<NodeId, Shown>> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Planned anew each time: another manager may have told of it, and the node's own reports come between.
async fn commit(
    replica: &Replica,
    proposer: &Proposer,
    own: &str,
    shown: &Shown,
    clock: &dyn Clock,
    entropy: &dyn Entropy,
) {
    for _ in 0..ATTEMPTS {
        let now_ms = i64::try_from(clock.wall_millis()).unwrap_or(i64::MAX);
        let Some((preconditions, changes)) = alarm(&replica.state(), shown, now_ms) else {
            return;
        };
        let mut id = [0; 16];
        let outcome = match entropy.fill(&mut id) {
            Ok(()) => {
                let request = RequestId::from_bytes(id);
                proposer.client(own, request, preconditions, changes).await.ok()
            }
            Err(_) => None,
        };
        match outcome.map(|it| it.rejection) {
            Some(None) => {
                let Shown {
                    node, key, address, ..
                } = shown;
                tracing::error!(target: "audit", %node, %key, ?address, "a superseded key of a node was shown");
                return;
            }
            Some(Some(rejection)) if rejection.code() != RejectionCode::Stale => {
                tracing::error!(detail = rejection.detail, "the alarm about a clone was rejected");
                return;
            }
            Some(Some(_)) | None => sleep(PAUSE).await,
        }
    }
    tracing::error!(node = %shown.node, "the alarm about a clone could not be committed");
}

#[cfg(test)]
mod tests;
