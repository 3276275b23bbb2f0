//! The cluster's certificate authority: its beginning, admission by ticket, and renewal.
//!
//! The root's key exists in the clear only inside [`Ca::issue`], while one certificate is signed.

pub mod admission;
pub mod genesis;
pub mod given;
mod lead;
mod limiter;
pub(crate) mod names;
pub mod renewal;
pub mod rotation;
mod service;
pub mod trust;

use std::time::Duration;

use bulkhead_identity::authority::{Authority, IssueError};
use bulkhead_identity::csr::PublicKey;
use bulkhead_identity::{Certificate, Subject};
use bulkhead_proto::wire::{Cluster, Kind, ManagerAddress, Node, NodeKey};
use bulkhead_proto::{ClusterId, NodeId, Role, limits};
use bulkhead_raft::state::{Key, State};

use crate::key_ring::{KeyRing, KeyRingError};
use crate::view;

pub use lead::lead;
pub(crate) use limiter::Limiter;
pub use service::EnrolmentService;
pub(crate) use service::request_id;
pub use trust::roots;

/// Why a certificate was not signed. Each is this manager's or the cluster's fault, none the asker's.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// There is no cluster object yet, or it has no root key.
    #[error("the cluster has no root key")]
    NoRoot,
    /// The root's key does not open here.
    #[error("the root's key does not open")]
    KeyRing(#[from] KeyRingError),
    /// Signing failed.
    #[error("the certificate could not be signed")]
    Issue(#[from] IssueError),
}

/// Signs certificates with the root's key, which it takes from the replicated state each time.
#[derive(Debug, Clone)]
pub struct Ca {
    ring: KeyRing,
}

/// From when to when a certificate is valid; milliseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// Its first moment.
    pub not_before: i64,
    /// Its last moment.
    pub not_after: i64,
}

impl Validity {
    /// A validity that begins a little before now, for clocks that lag.
    pub fn from_now(now_ms: i64, validity: Duration) -> Self {
        Self {
            not_before: now_ms.saturating_sub(millis(limits::CERTIFICATE_BACKDATE)),
            not_after: now_ms.saturating_add(millis(validity)),
        }
    }

    /// The validity of a new certificate for this role, as the cluster is set.
    pub fn of_role(role: Role, cluster: &Cluster, now_ms: i64) -> Self {
        let set = cluster
            .settings
            .as_ref()
            .map_or(0, |it| it.node_certificate_validity_ms);
        let validity = match (role, set) {
            (Role::Operator, _) => limits::OPERATOR_CERTIFICATE_VALIDITY,
            (_, 0) => limits::NODE_CERTIFICATE_VALIDITY,
            (_, set) => Duration::from_millis(set),
        };
        Self::from_now(now_ms, validity)
    }
}

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

impl Ca {
    /// An authority whose key this ring opens.
    pub fn new(ring: KeyRing) -> Self {
        Self { ring }
    }

    /// The ring that opens the key.
    pub(crate) fn ring(&self) -> &KeyRing {
        &self.ring
    }

    /// Signs a certificate. Hand it out only from the committed record of its node.
    ///
    /// # Errors
    /// [`CaError`].
    pub fn issue(
        &self,
        cluster: &Cluster,
        node: NodeId,
        role: Role,
        key: &PublicKey,
        validity: Validity,
    ) -> Result<NodeKey, CaError> {
        let id = ClusterId::try_from(cluster.id.as_slice()).map_err(|_| CaError::NoRoot)?;
        let (root, sealed) = trust::issuer(cluster);
        let pkcs8 = self.ring.open(
            cluster,
            Key::new(Kind::Cluster, *id.as_bytes()),
            sealed.ok_or(CaError::NoRoot)?,
        )?;
        let authority = Authority::from_parts(root, &pkcs8)?;
        let subject = Subject {
            cluster: id,
            node,
            role,
        };
        Ok(sign(&authority, &subject, key, validity)?)
    }
}

fn sign(
    authority: &Authority,
    subject: &Subject,
    key: &PublicKey,
    validity: Validity,
) -> Result<NodeKey, IssueError> {
    let der = authority.issue(subject, key, validity.not_before, validity.not_after)?;
    let certificate = Certificate::from_der(&der).map_err(|_| IssueError::Validity)?;
    tracing::info!(
        target: "audit",
        node = %subject.node,
        role = %subject.role,
        key = %key.key_id(),
        not_after = certificate.not_after_ms(),
        "certificate signed"
    );
    Ok(NodeKey {
        key_id: key.key_id().to_wire(),
        not_before: certificate.not_before_ms(),
        not_after: certificate.not_after_ms(),
        certificate: der,
    })
}

/// Where the managers are reached.
pub fn manager_addresses(state: &State) -> Vec<ManagerAddress> {
    view::managers(state)
        .filter(|node| !node.address.is_empty())
        .map(|node| ManagerAddress {
            node_id: node.id.clone(),
            address: node.address.clone(),
            member_id: node.member_id,
        })
        .collect()
}

/// The committed certificate of a key of this node.
pub(crate) fn committed<'a>(node: &'a Node, key: &PublicKey) -> Option<&'a [u8]> {
    let id = key.key_id();
    let found = node.keys.iter().find(|it| it.key_id == id.as_bytes())?;
    Some(&found.certificate)
}
