//! How a cluster begins: everything that its first transaction holds.

use bulkhead_identity::authority::{Authority, IssueError};
use bulkhead_identity::csr::PublicKey;
use bulkhead_identity::order::Order;
use bulkhead_identity::seam::{Entropy, EntropyError};
use bulkhead_identity::{Subject, UnlockKey};
use bulkhead_proto::wire::{
    Availability, Change, Cluster, ClusterSettings, Kind, Node, NodeDescription, NodeKey, NodeStatus,
    change::Change as Step, object::Object as Any,
};
use bulkhead_proto::{ClusterId, NodeId, Role, limits};
use bulkhead_raft::state::{Key, LEVEL, State};

use super::{Validity, names, signed};
use crate::key_ring::{self, KeyRingError};
use crate::{lock, view};

/// The first manager.
#[derive(Debug)]
pub struct FirstManager {
    /// Its node id: random, drawn by the caller.
    pub node: NodeId,
    /// The wished name.
    pub name: String,
    /// Where the others reach it: host:port.
    pub advertise: String,
    /// Its key.
    pub key: PublicKey,
    /// Its public X25519 key.
    pub envelope_key: [u8; 32],
    /// What it says of itself.
    pub description: NodeDescription,
}

/// The first operator.
#[derive(Debug)]
pub struct FirstOperator {
    /// Its id, drawn by the client.
    pub node: NodeId,
    /// The wished name.
    pub name: String,
    /// The key of its certificate request.
    pub key: PublicKey,
}

/// How a cluster is to be.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wishes<'a> {
    /// Faults may be injected.
    pub lab: bool,
    /// Autolock is on from the beginning, with this key.
    pub lock: Option<&'a UnlockKey>,
}

/// What a cluster begins with. The root's key is in `changes` alone, sealed.
#[derive(Debug)]
pub struct Genesis {
    /// The cluster's id.
    pub cluster: ClusterId,
    /// The root certificate, DER.
    pub root: Vec<u8>,
    /// The first manager's certificate and name; good as soon as `changes` are committed.
    pub manager: Member,
    /// The first operator's, where one was asked for.
    pub operator: Option<Member>,
    /// The changes of the first transaction.
    pub changes: Vec<Change>,
}

/// A node that the cluster begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its id.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Its certificate, DER.
    pub certificate: Vec<u8>,
}

/// Why no cluster can begin.
#[derive(Debug, thiserror::Error)]
pub enum GenesisError {
    /// The root or a certificate could not be made.
    #[error("the cluster's certificates cannot be made")]
    Issue(#[from] IssueError),
    /// The key ring could not be made.
    #[error("the cluster's key ring cannot be made")]
    KeyRing(#[from] KeyRingError),
    /// No random bytes.
    #[error(transparent)]
    Entropy(#[from] EntropyError),
}

/// Makes a cluster: its id, root, key ring, first manager, and first operator if asked.
///
/// # Errors
/// [`GenesisError`]; nothing was kept then.
pub fn genesis(
    manager: FirstManager,
    operator: Option<FirstOperator>,
    wishes: Wishes<'_>,
    now_ms: i64,
    entropy: &dyn Entropy,
) -> Result<Genesis, GenesisError> {
    let mut id = [0; 16];
    entropy.fill(&mut id)?;
    let cluster = ClusterId::from_bytes(id);
    let authority = Authority::generate(cluster, now_ms)?;
    let place = Key::new(Kind::Cluster, id);
    let root_key = (place, authority.key_pkcs8());
    let unlock_key = wishes.lock.map(|lock| (place, &lock.expose()[..]));
    let sealed: Vec<_> = [root_key].into_iter().chain(unlock_key).collect();
    let (epoch, sealed) = key_ring::begin(
        &id,
        (manager.node, &manager.envelope_key),
        &sealed,
        now_ms,
        entropy,
    )?;
    let mut sealed = sealed.into_iter();
    let root_key = sealed.next();
    let object = Cluster {
        id: id.to_vec(),
        epoch: 1,
        lab: wishes.lab,
        root_certificate: authority.root_der().to_vec(),
        root_key,
        settings: Some(ClusterSettings {
            node_certificate_validity_ms: u64::try_from(limits::NODE_CERTIFICATE_VALIDITY.as_millis())
                .unwrap_or(u64::MAX),
            task_history: u32::try_from(limits::TASK_HISTORY).unwrap_or(u32::MAX),
            ..Default::default()
        }),
        level: LEVEL,
        key_ring: vec![epoch],
        desired_voters: vec![1],
        autolock: wishes
            .lock
            .zip(sealed.next())
            .map(|(key, sealed)| lock::first(key, sealed)),
        ..Default::default()
    };
    let admit = |node, role, key: &PublicKey| {
        let validity = Validity::of_role(role, &object, now_ms);
        let subject = Subject { cluster, node, role };
        let order = Order::leaf(subject, key, validity.not_before, validity.not_after)?;
        signed(&order, authority.sign(&order)?)
    };
    let nothing = State::default();
    let name = names::free(&nothing, &manager.name, Role::Manager);
    let key = admit(manager.node, Role::Manager, &manager.key)?;
    let mut nodes = vec![Node {
        address: manager.advertise,
        envelope_key: manager.envelope_key.to_vec(),
        member_id: 1,
        opened_epoch: 1,
        locked_with: lock::generation(&object),
        description: Some(manager.description),
        ..record(manager.node, Role::Manager, name, key, now_ms)
    }];
    if let Some(operator) = operator {
        let mut name = names::free(&nothing, &operator.name, Role::Operator);
        if name == nodes[0].name {
            name = names::free(&nothing, &format!("operator-{name}"), Role::Operator);
        }
        let key = admit(operator.node, Role::Operator, &operator.key)?;
        nodes.push(record(operator.node, Role::Operator, name, key, now_ms));
    }
    let member = |node: &Node| Member {
        node: NodeId::try_from(node.id.as_slice()).expect("made from a node id"),
        name: node.name.clone(),
        certificate: node.keys[0].certificate.clone(),
    };
    Ok(Genesis {
        cluster,
        root: object.root_certificate.clone(),
        manager: member(&nodes[0]),
        operator: nodes.get(1).map(member),
        changes: std::iter::once(Any::Cluster(object))
            .chain(nodes.into_iter().map(Any::Node))
            .map(|any| Change {
                change: Some(Step::Create(view::object(any))),
            })
            .collect(),
    })
}

/// A new node with its first key.
pub(crate) fn record(node: NodeId, role: Role, name: String, key: NodeKey, now_ms: i64) -> Node {
    Node {
        id: node.to_wire(),
        name,
        role: view::wire_role(role).into(),
        availability: Availability::Active.into(),
        keys: vec![key],
        status: NodeStatus::Unknown.into(),
        status_since: now_ms,
        ..Default::default()
    }
}
