//! What the cluster object says of roots: who trusts which, which one signs, and what certificates are handed out with.

use bulkhead_identity::Certificate;
use bulkhead_identity::bundle::{Root, RootError};
use bulkhead_proto::wire::{Cluster, Rotation, RotationPhase, Sealed};
use bulkhead_proto::{KeyId, NodeId};
use bulkhead_raft::state::State;

use crate::view;

/// The roots that nodes trust, oldest first.
pub fn roots(cluster: &Cluster) -> Vec<Vec<u8>> {
    let next = cluster.rotation.as_ref().map(|rotation| rotation.root.clone());
    std::iter::once(cluster.root_certificate.clone())
        .chain(next)
        .collect()
}

/// The root that signs now, and its sealed key.
pub fn issuer(cluster: &Cluster) -> (&[u8], Option<&Sealed>) {
    match issuing(cluster) {
        Some(rotation) => (&rotation.root, rotation.root_key.as_ref()),
        None => (&cluster.root_certificate, cluster.root_key.as_ref()),
    }
}

/// What a certificate is handed out with: who knows only the older root follows it there.
pub fn chain(cluster: &Cluster) -> Vec<Vec<u8>> {
    let cross = match (issuing(cluster), &cluster.former) {
        (Some(rotation), _) => &rotation.cross,
        (None, Some(former)) => &former.cross,
        (None, None) => return Vec::new(),
    };
    (!cross.is_empty()).then(|| cross.clone()).into_iter().collect()
}

/// The root that was rotated away lately, by which managers still meet each other.
pub fn former(cluster: &Cluster) -> Option<&[u8]> {
    let former = cluster.former.as_ref()?;
    (!former.cross.is_empty()).then_some(former.root.as_slice())
}

/// The root that a ticket names: one that every manager can be verified under.
pub fn named(cluster: &Cluster) -> &[u8] {
    match issuing(cluster) {
        // Without a cross-certificate only the new root leads to a manager that has renewed.
        Some(rotation) if rotation.cross.is_empty() => &rotation.root,
        _ => &cluster.root_certificate,
    }
}

/// The id of a root's key.
///
/// # Errors
/// Where it is no root.
pub fn key_id(root: &[u8]) -> Result<KeyId, RootError> {
    Ok(Root::from_der(root)?.key_id())
}

/// Whether the newest certificate of a node is of another root than the one that signs.
pub fn is_due(state: &State, node: NodeId) -> bool {
    let newest = view::node(state, node).and_then(|node| node.keys.last());
    let certificate = newest.and_then(|key| Certificate::from_der(&key.certificate).ok());
    let root = view::cluster(state).and_then(|cluster| Root::from_der(issuer(cluster).0).ok());
    match (certificate, root) {
        (Some(certificate), Some(root)) => !root.is_issuer_of(&certificate),
        _ => false,
    }
}

fn issuing(cluster: &Cluster) -> Option<&Rotation> {
    cluster
        .rotation
        .as_ref()
        .filter(|rotation| rotation.phase() == RotationPhase::Issue)
}
