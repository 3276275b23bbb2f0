//! The cluster's certificate authority: its beginning, admission by ticket, and renewal.
//!
//! The root's key exists in the clear only inside [`Ca`], while one certificate is signed; or it is not in the cluster at
//! all, but with a signer outside, which is asked for each certificate ([`signer`]).

pub mod admission;
pub mod clone;
pub mod genesis;
pub mod given;
mod lead;
mod limiter;
pub(crate) mod names;
pub mod refound;
pub mod renewal;
pub mod rotation;
mod service;
pub mod signer;
pub mod trust;

use std::time::Duration;

use bulkhead_identity::authority::{Authority, IssueError};
use bulkhead_identity::bundle::Root;
use bulkhead_identity::csr::{self, PublicKey};
use bulkhead_identity::order::{Difference, Order};
use bulkhead_identity::seam::{Entropy as _, SystemEntropy};
use bulkhead_identity::{Certificate, Key, Subject};
use bulkhead_proto::wire::{Cluster, ExternalSigner, ManagerAddress, Node, NodeKey};
use bulkhead_proto::{ClusterId, Code, NodeId, Role, limits};
use bulkhead_raft::state::State;
use tonic::Status;

use self::signer::{SignerError, Signers};
use self::trust::Signatory;
use crate::key_ring::{KeyRing, KeyRingError, cluster_place};
use crate::refusal::{chain, internal, refuse};
use crate::view;

pub use lead::lead;
pub(crate) use limiter::Limiter;
pub use service::EnrolmentService;
pub(crate) use service::request_id;
pub use trust::roots;

/// How long the certificate is valid that a signer outside proves its key with: nobody gets it.
const PROBE_VALIDITY: Duration = Duration::from_secs(60);

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
    /// The signer outside did not sign.
    #[error("the external signer at {url} does not sign")]
    Signer {
        /// Where it is.
        url: String,
        /// Why.
        source: Box<SignerError>,
    },
    /// The root's key is with a signer outside, whom this program does not ask.
    #[error("the root's key is with an external signer")]
    Outside,
}

/// Signs certificates with the root's key, which it takes from the replicated state each time.
#[derive(Debug, Clone)]
pub struct Ca {
    ring: KeyRing,
    /// Who asks signers outside; none in programs that do not.
    signers: Option<Signers>,
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
        Self { ring, signers: None }
    }

    /// The same, which also asks signers outside of the cluster.
    pub fn with_signers(self, signers: Signers) -> Self {
        Self {
            signers: Some(signers),
            ..self
        }
    }

    /// How signers outside fare, where this authority asks them.
    pub(crate) fn signers(&self) -> Option<&Signers> {
        self.signers.as_ref()
    }

    /// The ring that opens the key.
    pub(crate) fn ring(&self) -> &KeyRing {
        &self.ring
    }

    /// Signs a certificate with the key of the root that signs now. Hand it out only from the committed record of its node.
    ///
    /// # Errors
    /// [`CaError`]; where the key is outside, within [`limits::SIGNER_EXCHANGE`].
    pub async fn issue(
        &self,
        cluster: &Cluster,
        node: NodeId,
        role: Role,
        key: &PublicKey,
        validity: Validity,
    ) -> Result<NodeKey, CaError> {
        let order = order(cluster, node, role, key, validity)?;
        let der = self.sign(cluster, trust::issuer(cluster), &order).await?;
        Ok(signed(&order, der)?)
    }

    /// [`Ca::issue`] by a key that is in the cluster, and by no other.
    ///
    /// # Errors
    /// [`CaError`].
    pub fn issue_here(
        &self,
        cluster: &Cluster,
        node: NodeId,
        role: Role,
        key: &PublicKey,
        validity: Validity,
    ) -> Result<NodeKey, CaError> {
        let order = order(cluster, node, role, key, validity)?;
        let der = sign_here(&self.ring, cluster, trust::issuer(cluster), &order)?;
        Ok(signed(&order, der)?)
    }

    /// The certificate, DER, that leads from the present root to the root `next`, signed with the present root's key.
    ///
    /// # Errors
    /// [`CaError`].
    pub async fn cross(&self, cluster: &Cluster, next: &[u8], now_ms: i64) -> Result<Vec<u8>, CaError> {
        let by = trust::present(cluster);
        let order = crossing(by.root, next, now_ms)?;
        self.sign(cluster, by, &order).await
    }

    /// Has a signer outside prove that it holds the key of `root`: it signs a certificate for a key that is forgotten at
    /// once, and for a node that does not exist.
    ///
    /// # Errors
    /// [`CaError`].
    pub async fn probe(&self, root: &[u8], signer: &ExternalSigner) -> Result<(), CaError> {
        let signers = self.signers.as_ref().ok_or(CaError::Outside)?;
        let mut node = [0; 16];
        SystemEntropy.fill(&mut node).map_err(|_| IssueError::Entropy)?;
        let key = Key::generate().map_err(|_| IssueError::Entropy)?;
        let csr = key.csr().map_err(|_| IssueError::Entropy)?;
        let key = csr::public_key(&csr).map_err(|_| IssueError::Key)?;
        let subject = Subject {
            cluster: Root::from_der(root).map_err(IssueError::from)?.cluster(),
            node: NodeId::from_bytes(node),
            role: Role::Worker,
        };
        let validity = Validity::from_now(signers.now_ms(), PROBE_VALIDITY);
        let order = Order::leaf(subject, &key, validity.not_before, validity.not_after)?;
        self.ask(root, signer, &order).await.map(drop)
    }

    async fn sign(&self, cluster: &Cluster, by: Signatory<'_>, order: &Order) -> Result<Vec<u8>, CaError> {
        match by.outside {
            Some(signer) => self.ask(by.root, signer, order).await,
            None => sign_here(&self.ring, cluster, by, order),
        }
    }

    async fn ask(&self, root: &[u8], signer: &ExternalSigner, order: &Order) -> Result<Vec<u8>, CaError> {
        let signers = self.signers.as_ref().ok_or(CaError::Outside)?;
        let signed = signers.sign(signer, root, order).await;
        signed.map_err(|source| CaError::Signer {
            url: signer.url.clone(),
            source: Box::new(source),
        })
    }
}

fn order(
    cluster: &Cluster,
    node: NodeId,
    role: Role,
    key: &PublicKey,
    validity: Validity,
) -> Result<Order, CaError> {
    let cluster = ClusterId::try_from(cluster.id.as_slice()).map_err(|_| CaError::NoRoot)?;
    let subject = Subject { cluster, node, role };
    Ok(Order::leaf(
        subject,
        key,
        validity.not_before,
        validity.not_after,
    )?)
}

/// What is ordered of the key of `root`, so that who knows only that one follows to the root `next`.
pub(crate) fn crossing(root: &[u8], next: &[u8], now_ms: i64) -> Result<Order, IssueError> {
    let from = now_ms.saturating_sub(millis(limits::CERTIFICATE_BACKDATE));
    Order::cross(&Root::from_der(root)?, &Root::from_der(next)?, from)
}

/// Signs with a key that is sealed in the cluster.
pub(crate) fn sign_here(
    ring: &KeyRing,
    cluster: &Cluster,
    by: Signatory<'_>,
    order: &Order,
) -> Result<Vec<u8>, CaError> {
    if by.outside.is_some() {
        return Err(CaError::Outside);
    }
    let place = cluster_place(cluster).ok_or(CaError::NoRoot)?;
    let pkcs8 = ring.open(cluster, place, by.key.ok_or(CaError::NoRoot)?)?;
    Ok(Authority::from_parts(by.root, &pkcs8)?.sign(order)?)
}

/// The record of a certificate that was signed as ordered.
fn signed(order: &Order, der: Vec<u8>) -> Result<NodeKey, IssueError> {
    let certificate = Certificate::from_der(&der).map_err(Difference::from)?;
    let subject = certificate.subject();
    tracing::info!(
        target: "audit",
        node = %subject.node,
        role = %subject.role,
        key = %certificate.key_id(),
        not_after = certificate.not_after_ms(),
        "certificate signed"
    );
    Ok(NodeKey {
        key_id: certificate.key_id().to_wire(),
        not_before: order.not_before_ms(),
        not_after: order.not_after_ms(),
        certificate: der,
    })
}

/// How a manager says that nothing was signed. What a signer outside says is told: the caller may be who runs it.
pub(crate) fn signing_refused(what: &'static str, error: &CaError) -> Status {
    match error {
        CaError::Signer { source, .. } => refuse(
            Code::SignerFails,
            tonic::Code::Unavailable,
            chain(error),
            source.hint(),
        ),
        other => internal(what, other),
    }
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
