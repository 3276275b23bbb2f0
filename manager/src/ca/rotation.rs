//! Rotation of the root, as pure decisions: how one begins, and what its leader commits next.
//!
//! `BUNDLE`: every node learns to trust the new root, while the old one signs. `ISSUE`: the new root signs, and every
//! node renews; a certificate comes with the cross-certificate, so that whoever did not learn yet can follow it. Then the
//! old root is dropped, with its key. Nobody is waited for beyond the deadline, and nobody who is down: who was away
//! comes back by its committed key, until the cross-certificate is forgotten.

use std::time::Duration;

use bulkhead_identity::authority::{Authority, IssueError};
use bulkhead_identity::bundle::Root;
use bulkhead_proto::wire::{
    Change, Cluster, FormerRoot, Node, NodeStatus, Precondition, Role, Rotation, RotationNode, RotationPhase,
    RotationStatus, change::Change as Step, object::Object as Any,
};
use bulkhead_proto::{ClusterId, KeyId, limits};
use bulkhead_raft::state::{Key, State};

use super::{CaError, trust};
use crate::key_ring::KeyRing;
use crate::view;

/// What a new rotation is asked to be.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    /// How long nodes are waited for.
    pub deadline: Duration,
    /// Whether the old root's key is known to others: then nothing leads from the old root to the new one.
    pub compromised: bool,
}

/// The rotation that begins now, to a new root or to the `given` one: its key sealed, and the cross-certificate.
///
/// # Errors
/// [`CaError`]; nothing was kept then.
pub fn begin(
    cluster: &Cluster,
    order: Order,
    given: Option<Authority>,
    ring: &KeyRing,
    now_ms: i64,
) -> Result<Rotation, CaError> {
    let id = ClusterId::try_from(cluster.id.as_slice()).map_err(|_| CaError::NoRoot)?;
    let from = now_ms.saturating_sub(super::millis(limits::CERTIFICATE_BACKDATE));
    let next = match given {
        Some(given) => given,
        None => Authority::generate(id, from)?,
    };
    let cross = match order.compromised {
        true => Vec::new(),
        false => {
            let sealed = cluster.root_key.as_ref().ok_or(CaError::NoRoot)?;
            let place = Key::new(bulkhead_proto::wire::Kind::Cluster, *id.as_bytes());
            let pkcs8 = ring.open(cluster, place, sealed)?;
            let old = Authority::from_parts(&cluster.root_certificate, &pkcs8)?;
            let root = Root::from_der(next.root_der()).map_err(IssueError::from)?;
            old.cross(&root, from)?
        }
    };
    let place = Key::new(bulkhead_proto::wire::Kind::Cluster, *id.as_bytes());
    Ok(Rotation {
        phase: RotationPhase::Bundle.into(),
        root: next.root_der().to_vec(),
        root_key: Some(ring.seal(cluster, place, next.key_pkcs8())?),
        cross,
        started_at: now_ms,
        deadline: now_ms.saturating_add(super::millis(order.deadline)),
        exposed: false,
    })
}

/// The cluster with this rotation. What is kept of the former root stays: who knows only that one still finds back, also
/// when the rotation is taken back.
pub fn begun(cluster: &Cluster, rotation: Rotation) -> Cluster {
    Cluster {
        rotation: Some(rotation),
        ..cluster.clone()
    }
}

/// Why a rotation is not taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoWayBack {
    /// None is under way.
    NoRotation,
    /// Nodes have certificates of the new root already.
    Issuing,
}

/// The cluster with its present root alone again: nothing was signed with the new one, whose key is gone then, and is to
/// leave the managers' logs, too.
///
/// # Errors
/// [`NoWayBack`].
pub fn cancelled(cluster: &Cluster) -> Result<Cluster, NoWayBack> {
    let rotation = cluster.rotation.as_ref().ok_or(NoWayBack::NoRotation)?;
    match rotation.phase() {
        RotationPhase::Bundle => Ok(Cluster {
            rotation: None,
            root_exposed: cluster.root_exposed || rotation.exposed,
            reseal: cluster.reseal + 1,
            ..cluster.clone()
        }),
        RotationPhase::Issue | RotationPhase::Unspecified => Err(NoWayBack::Issuing),
    }
}

/// What the leader commits next, if anything is due.
pub fn plan(state: &State, now_ms: i64) -> Option<(Precondition, Change, &'static str)> {
    let cluster = view::cluster(state)?;
    let (next, what) = next(state, cluster, now_ms)?;
    let change = Change {
        change: Some(Step::Replace(view::object(Any::Cluster(next)))),
    };
    Some((view::unchanged_cluster(cluster), change, what))
}

fn next(state: &State, cluster: &Cluster, now_ms: i64) -> Option<(Cluster, &'static str)> {
    let Some(rotation) = &cluster.rotation else {
        // Who was away longer than this joins again with a ticket.
        if cluster.former.as_ref()?.until > now_ms {
            return None;
        }
        let new = Cluster {
            former: None,
            ..cluster.clone()
        };
        return Some((new, "the former root is forgotten"));
    };
    let nodes: Vec<RotationNode> = nodes(state, cluster).collect();
    let waits = nodes.iter().any(|node| node.waited_for && !node.lags.is_empty());
    // Whatever the deadline says: with fewer managers than this nobody would be left to decide anything.
    let managers = || nodes.iter().filter(|node| node.role() == Role::Manager);
    let done = managers().filter(|node| node.lags.is_empty()).count();
    if done <= managers().count() / 2 || (waits && now_ms < rotation.deadline) {
        return None;
    }
    let mut new = cluster.clone();
    if rotation.phase() == RotationPhase::Bundle {
        new.rotation = Some(Rotation {
            phase: RotationPhase::Issue.into(),
            ..rotation.clone()
        });
        return Some((new, "the new root signs"));
    }
    new.former = Some(FormerRoot {
        root: cluster.root_certificate.clone(),
        cross: rotation.cross.clone(),
        until: now_ms.saturating_add(super::millis(limits::RETURN_GRACE)),
    });
    new.root_certificate.clone_from(&rotation.root);
    new.root_key.clone_from(&rotation.root_key);
    new.rotation = None;
    // The old root's sealed key is to leave the managers' logs, too.
    new.reseal += 1;
    Some((new, "the old root is dropped, and its key"))
}

/// A manager without a certificate of the root that signs now: it missed the last rotation, and is not back yet.
pub fn behind(state: &State) -> Option<&Node> {
    let root = trust::key_id(trust::issuer(view::cluster(state)?).0).ok()?;
    // One that never said has just joined.
    view::managers(state)
        .find(|node| !node.issuer.is_empty() && node.issuer != root.as_bytes() && node.quarantined_at == 0)
}

/// How far each node is.
fn nodes<'a>(state: &'a State, cluster: &'a Cluster) -> impl Iterator<Item = RotationNode> + 'a {
    let rotation = cluster.rotation.as_ref();
    let id = rotation.and_then(|rotation| trust::key_id(&rotation.root).ok());
    let phase = rotation.map_or(RotationPhase::Unspecified, Rotation::phase);
    view::nodes(state)
        .filter(move |_| id.is_some())
        .map(move |node| judged(node, phase, id))
}

fn judged(node: &Node, phase: RotationPhase, root: Option<KeyId>) -> RotationNode {
    let is = |bytes: &[u8]| root.is_some_and(|root| root.as_bytes() == bytes);
    let trusts = node.trusts.iter().any(|id| is(id));
    let uses = is(&node.issuer);
    let down = node.status() == NodeStatus::Down;
    // An operator speaks only while a command runs, and comes back by itself with the next one.
    let cut_off = node.quarantined_at != 0;
    let waited_for = !down && !cut_off && node.role() != Role::Operator;
    let lags = match phase {
        RotationPhase::Bundle if !trusts => "does not trust the new root yet",
        RotationPhase::Issue if !uses => "has no certificate of the new root yet",
        _ => "",
    };
    let lags = match (lags, down, node.role()) {
        ("", ..) => String::new(),
        _ if cut_off => "is in quarantine".to_owned(),
        (_, _, Role::Operator) => "renews with its next command".to_owned(),
        (_, true, _) => "is down; it comes back by its key".to_owned(),
        (lags, ..) => lags.to_owned(),
    };
    RotationNode {
        node_id: node.id.clone(),
        name: node.name.clone(),
        role: node.role,
        trusts,
        uses,
        waited_for,
        lags,
    }
}

/// The rotation as people look at it.
pub fn status(state: &State, now_ms: i64) -> RotationStatus {
    let id = |root: &[u8]| trust::key_id(root).map_or_else(|_| Vec::new(), KeyId::to_wire);
    let Some(cluster) = view::cluster(state) else {
        return RotationStatus::default();
    };
    let rotation = cluster.rotation.clone().unwrap_or_default();
    RotationStatus {
        index: state.index(),
        phase: rotation.phase,
        issuer: id(trust::issuer(cluster).0),
        next: id(&rotation.root),
        started_at: rotation.started_at,
        deadline: rotation.deadline,
        nodes: nodes(state, cluster).collect(),
        former_until: match (trust::former(cluster), &cluster.former) {
            (Some(_), Some(former)) => former.until,
            _ => 0,
        },
        now: now_ms,
    }
}

#[cfg(test)]
mod protocol;
#[cfg(test)]
mod tests;
