//! Rotation of the root, as pure decisions: how one begins, and what its leader commits next.
//!
//! `BUNDLE`: every node learns to trust the new root, while the old one signs. `ISSUE`: the new root signs, and every
//! node renews; a certificate comes with the cross-certificate, so that whoever did not learn yet can follow it. Then the
//! old root is dropped, with its key. Nobody is waited for beyond the deadline, and nobody who is down: who was away
//! comes back by its committed key, until the cross-certificate is forgotten.

use std::time::Duration;

use bulkhead_identity::authority::Authority;
use bulkhead_proto::wire::{
    Change, Cluster, ExternalSigner, FormerRoot, Node, NodeStatus, Precondition, Role, Rotation,
    RotationNode, RotationPhase, RotationStatus, SignerStatus, change::Change as Step, object::Object as Any,
};
use bulkhead_proto::{ClusterId, KeyId, limits};
use bulkhead_raft::planted::{Bug, planted};
use bulkhead_raft::state::State;

use super::signer::{self, Signers};
use super::{CaError, trust};
use crate::key_ring::{KeyRing, cluster_place};
use crate::view;

/// What a new rotation is asked to be.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    /// How long nodes are waited for.
    pub deadline: Duration,
    /// Whether the old root's key is known to others: then nothing leads from the old root to the new one.
    pub compromised: bool,
}

/// The root that a rotation leads to.
#[derive(Debug)]
pub enum Next {
    /// Its key is to be sealed in the cluster.
    Here(Box<Authority>),
    /// Its key is with a signer outside, and stays there.
    Outside {
        /// The root, DER.
        root: Vec<u8>,
        /// Who signs.
        signer: ExternalSigner,
    },
}

impl Next {
    /// One that is made now.
    ///
    /// # Errors
    /// Where the system gives no random bytes.
    pub fn generate(cluster: &Cluster, now_ms: i64) -> Result<Self, CaError> {
        let id = ClusterId::try_from(cluster.id.as_slice()).map_err(|_| CaError::NoRoot)?;
        let from = now_ms.saturating_sub(super::millis(limits::CERTIFICATE_BACKDATE));
        Ok(Next::Here(Box::new(Authority::generate(id, from)?)))
    }

    /// The root, DER.
    pub fn root(&self) -> &[u8] {
        match self {
            Next::Here(authority) => authority.root_der(),
            Next::Outside { root, .. } => root,
        }
    }
}

/// The rotation that begins now, from a root whose key is in the cluster to one that is made now.
///
/// # Errors
/// [`CaError`]; nothing was kept then.
pub fn begin(cluster: &Cluster, order: Order, ring: &KeyRing, now_ms: i64) -> Result<Rotation, CaError> {
    let next = Next::generate(cluster, now_ms)?;
    let cross = match order.compromised {
        true => Vec::new(),
        false => {
            let by = trust::present(cluster);
            let crossing = super::crossing(by.root, next.root(), now_ms)?;
            super::sign_here(ring, cluster, by, &crossing)?
        }
    };
    towards(cluster, order, &next, cross, ring, now_ms)
}

/// The rotation that begins now, with the cross-certificate that leads to the new root: none where the old root is not to
/// lead there. A key that comes to the cluster is sealed.
///
/// # Errors
/// [`CaError`]; nothing was kept then.
pub fn towards(
    cluster: &Cluster,
    order: Order,
    next: &Next,
    cross: Vec<u8>,
    ring: &KeyRing,
    now_ms: i64,
) -> Result<Rotation, CaError> {
    let place = cluster_place(cluster).ok_or(CaError::NoRoot)?;
    let (root_key, external_signer) = match next {
        Next::Here(authority) => (Some(ring.seal(cluster, place, authority.key_pkcs8())?), None),
        Next::Outside { signer, .. } => (None, Some(signer.clone())),
    };
    Ok(Rotation {
        phase: RotationPhase::Bundle.into(),
        root: next.root().to_vec(),
        root_key,
        cross,
        started_at: now_ms,
        deadline: now_ms.saturating_add(super::millis(order.deadline)),
        exposed: false,
        external_signer,
    })
}

/// The cluster with this rotation. What is kept of the former root stays: who knows only that one still finds back, also
/// when the rotation is taken back.
pub fn begun(cluster: &Cluster, rotation: Rotation) -> Cluster {
    Cluster {
        rotation: Some(rotation),
        root_exposed: is_exposed(cluster),
        ..cluster.clone()
    }
}

/// Whether somebody could open the key of the present root who is a manager no more. A key that is outside nobody could.
pub fn is_exposed(cluster: &Cluster) -> bool {
    cluster.root_exposed && cluster.external_signer.is_none()
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
/// A new root whose signer is outside may never sign again, and then the rotation would never end. So it is also taken back
/// while that one signs, as long as not `most_renewed` of the managers: those that did come back by their keys.
///
/// # Errors
/// [`NoWayBack`].
pub fn cancelled(cluster: &Cluster, most_renewed: impl FnOnce() -> bool) -> Result<Cluster, NoWayBack> {
    let rotation = cluster.rotation.as_ref().ok_or(NoWayBack::NoRotation)?;
    let may = match rotation.phase() {
        RotationPhase::Bundle => true,
        // Without a cross-certificate the old root is not to be believed any more.
        RotationPhase::Issue | RotationPhase::Unspecified => {
            rotation.external_signer.is_some() && !rotation.cross.is_empty() && !most_renewed()
        }
    };
    match may {
        true => Ok(Cluster {
            rotation: None,
            root_exposed: (cluster.root_exposed || rotation.exposed) && cluster.external_signer.is_none(),
            reseal: cluster.reseal + 1,
            ..cluster.clone()
        }),
        false => Err(NoWayBack::Issuing),
    }
}

/// Whether most managers have a certificate of the root that a rotation leads to: then it ends by its deadline.
pub fn most_renewed(state: &State) -> bool {
    let rotation = view::cluster(state).and_then(|cluster| cluster.rotation.as_ref());
    let Some(root) = rotation.and_then(|it| trust::key_id(&it.root).ok()) else {
        return false;
    };
    let renewed = view::managers(state).filter(|node| node.issuer == root.as_bytes());
    renewed.count() > view::managers(state).count() / 2
}

/// Whether a new root whose key is outside of the cluster can begin to sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signer {
    /// It signed when it was asked last, or the key is in the cluster.
    Signs,
    /// It failed, or was not asked yet: the old root signs on, and the rotation can still be taken back.
    Fails,
}

impl Signer {
    /// The one of the rotation that is under way, as this manager knows it.
    pub fn of(state: &State, signers: Option<&Signers>) -> Self {
        let rotation = view::cluster(state).and_then(|cluster| cluster.rotation.as_ref());
        let Some(rotation) = rotation.filter(|it| it.external_signer.is_some()) else {
            return Signer::Signs;
        };
        let root = trust::key_id(&rotation.root).ok();
        match root
            .zip(signers)
            .is_some_and(|(root, signers)| signers.works(root))
        {
            true => Signer::Signs,
            false => Signer::Fails,
        }
    }
}

/// What the leader commits next, if anything is due.
pub fn plan(state: &State, signer: Signer, now_ms: i64) -> Option<(Precondition, Change, &'static str)> {
    let cluster = view::cluster(state)?;
    let (next, what) = next(state, cluster, signer, now_ms)?;
    let change = Change {
        change: Some(Step::Replace(view::object(Any::Cluster(next)))),
    };
    Some((view::unchanged_cluster(cluster), change, what))
}

fn next(state: &State, cluster: &Cluster, signer: Signer, now_ms: i64) -> Option<(Cluster, &'static str)> {
    let Some(rotation) = &cluster.rotation else {
        // Who was away longer than this joins again with a ticket.
        if cluster.former.iter().all(|former| former.until > now_ms) {
            return None;
        }
        let mut new = cluster.clone();
        new.former.retain(|former| former.until > now_ms);
        return Some((new, "a former root is forgotten"));
    };
    let nodes: Vec<RotationNode> = nodes(state, cluster).collect();
    let waits = nodes.iter().any(|node| node.waited_for && !node.lags.is_empty());
    // Whatever the deadline says: with fewer managers than this nobody would be left to decide anything.
    let managers = || nodes.iter().filter(|node| node.role() == Role::Manager);
    let done = managers().filter(|node| node.lags.is_empty()).count();
    let few = done <= managers().count() / 2 && !planted(Bug::RotationNeedsNoMajority);
    let early = now_ms < rotation.deadline || planted(Bug::RotationHasNoDeadline);
    if (few || (waits && early)) && !planted(Bug::RotationWaitsForNobody) {
        return None;
    }
    let mut new = cluster.clone();
    if rotation.phase() == RotationPhase::Bundle {
        if signer == Signer::Fails {
            return None;
        }
        new.rotation = Some(Rotation {
            phase: RotationPhase::Issue.into(),
            ..rotation.clone()
        });
        return Some((new, "the new root signs"));
    }
    new.former = match planted(Bug::RotationForgetsFormerRoot) {
        true => Vec::new(),
        false => formers(cluster, rotation, now_ms),
    };
    new.root_certificate.clone_from(&rotation.root);
    if !planted(Bug::RotationKeepsOldKey) {
        new.root_key.clone_from(&rotation.root_key);
    }
    new.external_signer.clone_from(&rotation.external_signer);
    new.rotation = None;
    new.root_exposed = is_exposed(&new);
    // The old root's sealed key is to leave the managers' logs, too.
    new.reseal += 1;
    Some((new, "the old root is dropped, and its key"))
}

/// What is kept of the roots that lead to the new one once this rotation ended, newest first.
fn formers(cluster: &Cluster, rotation: &Rotation, now_ms: i64) -> Vec<FormerRoot> {
    let dropped = FormerRoot {
        root: cluster.root_certificate.clone(),
        cross: rotation.cross.clone(),
        until: now_ms.saturating_add(super::millis(limits::RETURN_GRACE)),
    };
    std::iter::once(&dropped)
        .chain(trust::formers(cluster, Some(rotation)))
        .take(limits::FORMER_ROOTS)
        .cloned()
        .collect()
}

/// A manager without a certificate of the root that signs now: it missed the last rotation, and is not back yet.
pub fn behind(state: &State) -> Option<&Node> {
    let root = trust::key_id(trust::issuer(view::cluster(state)?).root).ok()?;
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

/// How the signers outside fare of which this cluster has roots.
pub fn signers(cluster: &Cluster, signers: Option<&Signers>) -> Vec<SignerStatus> {
    let status = |(id, _, signer): (KeyId, &[u8], &ExternalSigner)| Some(signers?.status(id, signer));
    signer::outside(cluster).into_iter().filter_map(status).collect()
}

/// Why a rotation does not go on, if it does not: by what this manager knows of the new root's signer.
fn paused(rotation: &Rotation, signers: &[SignerStatus]) -> String {
    let id = trust::key_id(&rotation.root).map_or_else(|_| Vec::new(), KeyId::to_wire);
    let Some(signer) = signers.iter().find(|it| it.root == id) else {
        return String::new();
    };
    match (signer.failing_since, signer.worked_at) {
        (0, 0) => "the new root's signer was not asked yet".to_owned(),
        (0, _) => String::new(),
        _ => format!("the new root's signer fails: {}", signer.reason),
    }
}

/// The rotation as people look at it.
pub fn status(state: &State, signers: Option<&Signers>, now_ms: i64) -> RotationStatus {
    let id = |root: &[u8]| trust::key_id(root).map_or_else(|_| Vec::new(), KeyId::to_wire);
    let Some(cluster) = view::cluster(state) else {
        return RotationStatus::default();
    };
    let rotation = cluster.rotation.clone().unwrap_or_default();
    let signers = self::signers(cluster, signers);
    RotationStatus {
        index: state.index(),
        phase: rotation.phase,
        issuer: id(trust::issuer(cluster).root),
        next: id(&rotation.root),
        started_at: rotation.started_at,
        deadline: rotation.deadline,
        nodes: nodes(state, cluster).collect(),
        former_until: match (trust::former(cluster), cluster.former.first()) {
            (Some(_), Some(former)) => former.until,
            _ => 0,
        },
        now: now_ms,
        paused: paused(&rotation, &signers),
        signers,
    }
}

#[cfg(test)]
mod protocol;
#[cfg(test)]
mod tests;
