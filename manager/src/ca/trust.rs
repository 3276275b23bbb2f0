//! What the cluster object says of roots: who trusts which, which one signs, and what certificates are handed out with.

use bulkhead_identity::bundle::{Root, RootError};
use bulkhead_identity::follow::Told;
use bulkhead_identity::{Bundle, Certificate, Credentials};
use bulkhead_proto::wire::{Cluster, ExternalSigner, FormerRoot, Node, Rotation, RotationPhase, Sealed};
use bulkhead_proto::{KeyId, NodeId, limits};
use bulkhead_raft::planted::{Bug, planted};
use bulkhead_raft::state::State;

use super::clone;
use crate::view;

/// The roots that nodes trust, oldest first.
pub fn roots(cluster: &Cluster) -> Vec<Vec<u8>> {
    let next = match planted(Bug::RotationTellsNobody) {
        true => issuing(cluster),
        false => cluster.rotation.as_ref(),
    };
    let next = next.map(|rotation| rotation.root.clone());
    std::iter::once(cluster.root_certificate.clone())
        .chain(next)
        .collect()
}

/// A root, and where its key is: sealed in the cluster, or with a signer outside.
#[derive(Debug, Clone, Copy)]
pub struct Signatory<'a> {
    /// The root, DER.
    pub root: &'a [u8],
    /// Its key, where the cluster has it.
    pub key: Option<&'a Sealed>,
    /// Who signs with it, where the cluster does not have it.
    pub outside: Option<&'a ExternalSigner>,
}

/// The root that signs now.
pub fn issuer(cluster: &Cluster) -> Signatory<'_> {
    issuing(cluster).map_or_else(|| present(cluster), next)
}

/// The cluster's root, until a rotation ends.
pub fn present(cluster: &Cluster) -> Signatory<'_> {
    Signatory {
        root: &cluster.root_certificate,
        key: cluster.root_key.as_ref(),
        outside: cluster.external_signer.as_ref(),
    }
}

/// The root that a rotation leads to.
pub fn next(rotation: &Rotation) -> Signatory<'_> {
    Signatory {
        root: &rotation.root,
        key: rotation.root_key.as_ref(),
        outside: rotation.external_signer.as_ref(),
    }
}

/// What a certificate is handed out with, newest first: who knows only an older root follows it there, over as many rotations
/// as it missed. A root that was compromised leads nowhere, and no older one leads past it.
pub fn chain(cluster: &Cluster) -> Vec<Vec<u8>> {
    if planted(Bug::CertificateWithoutCross) {
        return Vec::new();
    }
    let next = issuing(cluster);
    let older = formers(cluster, next).map(|former| &former.cross);
    next.map(|rotation| &rotation.cross)
        .into_iter()
        .chain(older)
        .take_while(|cross| !cross.is_empty())
        .take(limits::FORMER_ROOTS)
        .cloned()
        .collect()
}

/// What is kept of the roots that lead to the one of this rotation, or to the present one, newest first. One that the
/// rotation leads back to is none of them.
pub fn formers<'a>(cluster: &'a Cluster, to: Option<&Rotation>) -> impl Iterator<Item = &'a FormerRoot> {
    let to = to.and_then(|rotation| key_id(&rotation.root).ok());
    let former = cluster.former.iter();
    former.filter(move |it| to.is_none() || key_id(&it.root).ok() != to)
}

/// The root that was rotated away last, by which managers still meet each other. Where a rotation leads back to it, it is
/// none: it is among those that are trusted.
pub fn former(cluster: &Cluster) -> Option<&[u8]> {
    let newest = cluster.former.first()?;
    let away = formers(cluster, cluster.rotation.as_ref()).next() == Some(newest);
    (away && !newest.cross.is_empty() && !planted(Bug::ForgetsFormerRoot)).then_some(newest.root.as_slice())
}

/// The roots that were rotated away, as far as they are kept, newest first, compromised or not.
pub fn dropped(cluster: &Cluster) -> Vec<Root> {
    let former = formers(cluster, cluster.rotation.as_ref());
    former.filter_map(|it| Root::from_der(&it.root).ok()).collect()
}

/// What a manager is told by the cluster object.
///
/// # Errors
/// Where the root that signs is no root.
pub fn told<T>(cluster: &Cluster, act: impl FnOnce(&Told<'_>) -> T) -> Result<T, RootError> {
    Ok(act(&Told {
        roots: &roots(cluster),
        former: former(cluster),
        issuer: key_id(issuer(cluster).root)?.as_bytes(),
    }))
}

/// Whether a certificate is of one of the [`dropped`] roots, and opens nothing any more. To Raft methods one of the newest, if
/// that was not compromised, still leads: a manager that was off must count for the quorum before it can be taken back.
pub fn is_dropped(cluster: &Cluster, dropped: &[Root], certificate: &Certificate, raft: bool) -> bool {
    let issuer = dropped.iter().find(|root| root.is_issuer_of(certificate));
    issuer.is_some_and(|root| !(raft && former(cluster) == Some(root.der())))
}

/// The key id of the cluster's root under which a certificate is believed; empty where it is of none of them.
pub fn used(cluster: &Cluster, certificate: &Certificate) -> Vec<u8> {
    let bundle = Bundle::from_ders(roots(cluster)).ok();
    let root = bundle.as_ref().and_then(|bundle| bundle.issuer_of(certificate));
    root.map_or_else(Vec::new, |root| root.key_id().to_wire())
}

/// A manager's record with what it trusts and uses. One that missed a rotation says so by the root that it still uses: it has
/// to be back before the next one ([`super::rotation::behind`]).
pub fn said(cluster: &Cluster, record: &Node, current: &Credentials, now_ms: i64) -> Node {
    let issued = |root: &&Root| root.is_issuer_of(&current.certificate);
    let dropped = dropped(cluster);
    let mut known = current.bundle.roots().iter().chain(&dropped);
    let mut said = Node {
        trusts: current.bundle.key_ids(),
        issuer: known
            .find(issued)
            .map_or_else(|| record.issuer.clone(), |root| root.key_id().to_wire()),
        ..record.clone()
    };
    clone::seen(&mut said, current.certificate.key_id(), now_ms);
    said
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
    let root = view::cluster(state).and_then(|cluster| Root::from_der(issuer(cluster).root).ok());
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
