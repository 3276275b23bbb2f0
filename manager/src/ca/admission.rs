//! Admission by ticket, as one pure decision: who asks becomes which node, or why not.
//!
//! The request gives a key, a wish for a name and what the program says of itself. Role and labels come from the
//! ticket alone. A node's id is made from its key, so that two requests with one key meet in one record. With a ticket
//! that asks for approval the key waits in the ticket until an operator judges it; only then is anything signed.

use std::net::IpAddr;

use bulkhead_identity::csr::{self, CsrError, PublicKey};
use bulkhead_identity::ticket::TicketSecret;
use bulkhead_proto::wire::{
    Change, Cluster, EnrolRequest, JudgeWaiting, Label, Node, NodeDescription, NodeKey, Ticket, TicketUse,
    Waiting, change::Change as Step, object::Object as Any,
};
use bulkhead_proto::{ClusterId, Code, NodeId, Role, TicketId, limits};
use bulkhead_raft::state::State;
use sha2::{Digest as _, Sha256};

use super::{genesis, names};
use crate::{lock, view};

/// Characters of one text that a node says of itself.
const TEXT_CHARS: usize = 255;
/// Features that a node says of itself.
const FEATURES: usize = 64;

/// Someone with a ticket and a key.
#[derive(Debug)]
pub struct Ask {
    secret: TicketSecret,
    key: PublicKey,
    csr: Vec<u8>,
    role: Role,
    wish: String,
    description: NodeDescription,
    address: String,
    seen: String,
}

/// Why nobody is admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No ticket has this secret: mistyped, revoked, or of another cluster. Which of them is not said.
    #[error("the cluster knows no such ticket")]
    Unknown,
    /// Its time is over.
    #[error("the ticket expired {0} s ago")]
    Expired(i64),
    /// It admitted as many as it says.
    #[error("the ticket is used up")]
    Used,
    /// The program is of another role.
    #[error("the ticket admits a {ticket}, and a {asked} asks")]
    Role {
        /// The ticket's role.
        ticket: Role,
        /// The asker's.
        asked: String,
    },
    /// The key is a node's already, admitted by another ticket or as something else.
    #[error("this key belongs to another node of the cluster")]
    KeyTaken,
    /// The key was removed from the cluster.
    #[error("this key was removed from the cluster")]
    KeyRemoved,
    /// The ticket is for a node of another name.
    #[error("the ticket is for the node '{ticket}', and this one is to be '{asked}'")]
    Name {
        /// The ticket's name.
        ticket: String,
        /// The asker's wish.
        asked: String,
    },
    /// Another node has the name that the ticket gives.
    #[error("the ticket is for the node '{0}', and the cluster has a node of that name")]
    NameTaken(String),
    /// An operator looked at it, and said no.
    #[error("an operator rejected this node")]
    Rejected,
    /// As many wait as may.
    #[error("{limit} nodes wait for approval with this ticket already", limit = limits::TICKET_WAITING)]
    Crowded,
    /// The certificate request is refused.
    #[error("the certificate request is refused: {0}")]
    Csr(#[from] CsrError),
    /// A manager says where it is reached.
    #[error("a manager needs an address that the others reach, as host:port; this one says '{0}'")]
    Address(String),
    /// The program is too old for the cluster.
    #[error("the cluster uses command level {needed}, this program knows up to {has}")]
    Level {
        /// The cluster's.
        needed: u32,
        /// The program's.
        has: u32,
    },
    /// There is no cluster.
    #[error("there is no cluster here yet")]
    NoCluster,
}

impl Refusal {
    /// The stable code.
    pub fn code(&self) -> Code {
        match self {
            Refusal::Unknown => Code::TicketRefused,
            Refusal::Expired(_) => Code::TicketExpired,
            Refusal::Used => Code::TicketUsed,
            Refusal::Role { .. } => Code::TicketRole,
            Refusal::Name { .. } | Refusal::NameTaken(_) => Code::TicketName,
            Refusal::Rejected => Code::JoinRejected,
            Refusal::Crowded => Code::OverLimit,
            Refusal::KeyTaken | Refusal::KeyRemoved | Refusal::Csr(_) => Code::BadCertificateRequest,
            Refusal::Address(_) => Code::BadField,
            Refusal::Level { .. } => Code::Unsupported,
            Refusal::NoCluster => Code::NotMember,
        }
    }

    /// What to do next.
    pub fn hint(&self) -> String {
        match self {
            Refusal::Unknown => {
                "copy the ticket again, or make a new one with `bulkhead cluster ticket create`".into()
            }
            Refusal::Expired(_) | Refusal::Used => {
                "make a new ticket with `bulkhead cluster ticket create`".into()
            }
            Refusal::Role { asked, .. } => {
                format!("make a ticket for it with `bulkhead cluster ticket create --role {asked}`")
            }
            Refusal::Name { ticket, asked } => format!(
                "join without --name, or with --name {ticket}; a ticket for it is made with `bulkhead cluster ticket \
                 create --for-node {asked}`"
            ),
            Refusal::NameTaken(name) => {
                format!(
                    "if it is to be replaced, `bulkhead node rm {name}` first; the ticket is still good then"
                )
            }
            Refusal::Rejected => "ask whoever runs the cluster; then join with a new ticket".into(),
            Refusal::Crowded => {
                "judge those with `bulkhead node approve` and `node reject`: `bulkhead node ls` shows them"
                    .into()
            }
            Refusal::KeyTaken | Refusal::KeyRemoved => {
                "start it with an empty data folder, so that it makes a key of its own".into()
            }
            Refusal::Csr(_) => "send a PKCS#10 request with a P-256 key and nothing else".into(),
            Refusal::Address(_) => "give `--advertise HOST:PORT`".into(),
            Refusal::Level { .. } => "install the cluster's version of the program".into(),
            Refusal::NoCluster => "begin one with `bulkhead cluster init`, or ask another manager".into(),
        }
    }
}

/// What is to be done about an asker.
#[derive(Debug, PartialEq)]
pub enum Admission {
    /// The key was admitted by this ticket before: hand out what is committed.
    Known(NodeId),
    /// Sign, then commit [`NewNode::changes`].
    New(Box<NewNode>),
    /// Commit this; then the key waits for an operator's word.
    Wait(Box<Change>, TicketId),
    /// The key waits since then.
    Waits {
        /// Who it will be.
        waiting: Box<Waiting>,
        /// When the ticket ends, and the wait with it.
        until: i64,
    },
}

/// A node to be admitted.
#[derive(Debug, PartialEq)]
pub struct NewNode {
    /// Made from its key.
    pub node: NodeId,
    /// From the ticket.
    pub role: Role,
    /// By which ticket.
    pub ticket: TicketId,
    name: String,
    labels: Vec<Label>,
    description: NodeDescription,
    address: String,
    locked_with: u32,
    /// The key that an operator approved, where the ticket asks for that.
    approved: Option<Vec<u8>>,
}

impl NewNode {
    /// The one transaction: the ticket's use, or the approval, and the node with its certificate.
    pub fn changes(self, key: NodeKey, now_ms: i64) -> Vec<Change> {
        let node = Node {
            labels: self.labels,
            description: Some(self.description),
            address: self.address,
            ticket_id: self.ticket.to_wire(),
            locked_with: self.locked_with,
            ..genesis::record(self.node, self.role, self.name, key, now_ms)
        };
        let ticket_id = self.ticket.to_wire();
        let right = match self.approved {
            None => Step::UseTicket(TicketUse {
                ticket_id,
                waiting: None,
            }),
            Some(key_id) => Step::JudgeWaiting(JudgeWaiting {
                ticket_id,
                key_id,
                admit: true,
            }),
        };
        [right, Step::Create(view::object(Any::Node(node)))]
            .map(|step| Change { change: Some(step) })
            .into()
    }
}

impl Ask {
    /// Reads a request. `seen` is where the connection comes from.
    ///
    /// # Errors
    /// [`Refusal`], where the request alone is enough to refuse it.
    pub fn from_wire(request: EnrolRequest, seen: Option<IpAddr>) -> Result<Self, Refusal> {
        let role = view::role(request.role());
        let secret = TicketSecret::from_wire(&zeroize::Zeroizing::new(request.ticket_secret))
            .map_err(|_| Refusal::Unknown)?;
        let key = csr::public_key(&request.csr)?;
        let role = role.ok_or_else(|| Refusal::Role {
            ticket: Role::Worker,
            asked: "program that does not say its role".into(),
        })?;
        let description = bounded(request.description.unwrap_or_default());
        let address = match role {
            Role::Manager | Role::Standby => advertised(&request.advertise)?,
            Role::Worker => published(&description, seen),
            Role::Operator => String::new(),
        };
        Ok(Self {
            secret,
            key,
            csr: request.csr,
            role,
            wish: request.name.chars().take(TEXT_CHARS).collect(),
            description,
            address,
            seen: seen.map_or_else(String::new, |ip| ip.to_string()),
        })
    }

    /// The asker's key.
    pub fn key(&self) -> &PublicKey {
        &self.key
    }
}

/// Decides about an asker. Apply checks the ticket once more, at the commit.
///
/// # Errors
/// [`Refusal`].
pub fn plan(state: &State, ask: &Ask, now_ms: i64) -> Result<Admission, Refusal> {
    let cluster = view::cluster(state).ok_or(Refusal::NoCluster)?;
    let id = ClusterId::try_from(cluster.id.as_slice()).map_err(|_| Refusal::NoCluster)?;
    let key = ask.key.key_id();
    let ticket = ticket(state, &ask.secret).ok_or(Refusal::Unknown)?;
    let ticket_id = TicketId::try_from(ticket.id.as_slice()).map_err(|_| Refusal::Unknown)?;
    let role = view::role(ticket.role()).ok_or(Refusal::Unknown)?;
    if role != ask.role {
        return Err(Refusal::Role {
            ticket: role,
            asked: ask.role.to_string(),
        });
    }
    if cluster.tombstones.iter().any(|it| it.key_id == key.as_bytes()) {
        return Err(Refusal::KeyRemoved);
    }
    if let Some(node) = view::node_of_key(state, key) {
        let same = node.ticket_id == ticket.id && node.role() == ticket.role();
        return match NodeId::try_from(node.id.as_slice()) {
            Ok(id) if same => Ok(Admission::Known(id)),
            _ => Err(Refusal::KeyTaken),
        };
    }
    if ticket.rejected.iter().any(|it| it == key.as_bytes()) {
        return Err(Refusal::Rejected);
    }
    if ticket.expires_at <= now_ms {
        return Err(Refusal::Expired((now_ms - ticket.expires_at) / 1_000));
    }
    if let Some(waiting) = ticket.waiting.iter().find(|it| it.key_id == key.as_bytes()) {
        return Ok(Admission::Waits {
            waiting: Box::new(waiting.clone()),
            until: ticket.expires_at,
        });
    }
    if ticket.uses_left == 0 {
        return Err(Refusal::Used);
    }
    if matches!(role, Role::Manager | Role::Standby) && ask.description.level < cluster.level {
        return Err(Refusal::Level {
            needed: cluster.level,
            has: ask.description.level,
        });
    }
    let new = NewNode {
        node: node_id(id, key.as_bytes()),
        role,
        ticket: ticket_id,
        name: name(state, ticket, role, ask)?,
        labels: ticket.labels.clone(),
        description: ask.description.clone(),
        address: ask.address.clone(),
        locked_with: locked_with(cluster, role),
        approved: None,
    };
    match ticket.approve {
        false => Ok(Admission::New(Box::new(new))),
        true if ticket.waiting.len() >= limits::TICKET_WAITING => Err(Refusal::Crowded),
        true => Ok(Admission::Wait(Box::new(wait(ask, new, now_ms)), ticket_id)),
    }
}

/// Who waits with a ticket, as the node that an operator makes of it.
///
/// # Errors
/// [`Refusal`]: the ticket ended meanwhile, or another node has the name that it gives.
pub fn approve(state: &State, ticket: &Ticket, waiting: &Waiting, now_ms: i64) -> Result<NewNode, Refusal> {
    if ticket.expires_at <= now_ms {
        return Err(Refusal::Expired((now_ms - ticket.expires_at) / 1_000));
    }
    let cluster = view::cluster(state).ok_or(Refusal::NoCluster)?;
    let role = view::role(ticket.role()).ok_or(Refusal::Unknown)?;
    let name = match ticket.for_node.as_str() {
        "" => names::free(state, &waiting.name, role),
        name => names::only(state, name).ok_or_else(|| Refusal::NameTaken(name.to_owned()))?,
    };
    Ok(NewNode {
        node: NodeId::try_from(waiting.node_id.as_slice()).map_err(|_| Refusal::Unknown)?,
        role,
        ticket: TicketId::try_from(ticket.id.as_slice()).map_err(|_| Refusal::Unknown)?,
        name,
        labels: ticket.labels.clone(),
        description: waiting.description.clone().unwrap_or_default(),
        address: waiting.address.clone(),
        locked_with: locked_with(cluster, role),
        approved: Some(waiting.key_id.clone()),
    })
}

/// A manager is given the unlock key with its certificate.
fn locked_with(cluster: &Cluster, role: Role) -> u32 {
    match role {
        Role::Manager => lock::generation(cluster),
        Role::Worker | Role::Operator | Role::Standby => 0,
    }
}

/// The ticket's use by someone who is to be approved. What the sandbox found is said again with the first session.
fn wait(ask: &Ask, new: NewNode, now_ms: i64) -> Change {
    let mut description = new.description;
    description.features.clear();
    let waiting = Waiting {
        key_id: ask.key.key_id().to_wire(),
        node_id: new.node.to_wire(),
        csr: ask.csr.clone(),
        name: new.name,
        description: Some(description),
        address: new.address,
        seen: ask.seen.clone(),
        since: now_ms,
    };
    let ticket_use = TicketUse {
        ticket_id: new.ticket.to_wire(),
        waiting: Some(waiting),
    };
    Change {
        change: Some(Step::UseTicket(ticket_use)),
    }
}

/// The ticket's name for its node; else what the node wishes, or its host's name, as far as that is free.
fn name(state: &State, ticket: &Ticket, role: Role, ask: &Ask) -> Result<String, Refusal> {
    match ticket.for_node.as_str() {
        "" if ask.wish.is_empty() => Ok(names::free(state, &ask.description.hostname, role)),
        "" => Ok(names::free(state, &ask.wish, role)),
        given if !ask.wish.is_empty() && ask.wish != given => Err(Refusal::Name {
            ticket: given.to_owned(),
            asked: ask.wish.clone(),
        }),
        given => names::only(state, given).ok_or_else(|| Refusal::NameTaken(given.to_owned())),
    }
}

/// The ticket with this secret. Each one is compared, and in constant time.
fn ticket<'a>(state: &'a State, secret: &TicketSecret) -> Option<&'a Ticket> {
    view::tickets(state).fold(None, |found, ticket| match secret.matches(&ticket.secret_hash) {
        true => Some(ticket),
        false => found,
    })
}

fn node_id(cluster: ClusterId, key: &[u8; 32]) -> NodeId {
    let hash: [u8; 32] = Sha256::new()
        .chain_update(b"bulkhead node id 1")
        .chain_update(cluster.as_bytes())
        .chain_update(key)
        .finalize()
        .into();
    NodeId::from_bytes(hash[..16].try_into().expect("half of a hash"))
}

/// `host:port` as a manager is dialled, or a refusal.
fn advertised(text: &str) -> Result<String, Refusal> {
    let valid = text.len() <= TEXT_CHARS
        && text.rsplit_once(':').is_some_and(|(host, port)| {
            let bracketed = host.starts_with('[') && host.ends_with(']');
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
            let host_ok = match bracketed {
                true => host[1..host.len() - 1].parse::<std::net::Ipv6Addr>().is_ok(),
                false => !host.is_empty() && host.chars().all(plain),
            };
            let unspecified = host.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified());
            host_ok && !unspecified && port.parse::<u16>().is_ok_and(|port| port != 0)
        });
    match valid {
        true => Ok(text.to_owned()),
        false => Err(Refusal::Address(text.chars().take(100).collect())),
    }
}

/// Where a worker's published ports answer: where it says, or where its connection comes from.
pub(crate) fn published(description: &NodeDescription, seen: Option<IpAddr>) -> String {
    let said = description.publish_address.parse::<IpAddr>().ok();
    said.or(seen).map_or_else(String::new, |ip| ip.to_string())
}

/// What a node says of itself, cut to what is kept.
pub(crate) fn bounded(mut description: NodeDescription) -> NodeDescription {
    let cut = |text: &mut String| {
        *text = text
            .chars()
            .filter(|c| !c.is_control())
            .take(TEXT_CHARS)
            .collect()
    };
    [
        &mut description.hostname,
        &mut description.architecture,
        &mut description.operating_system,
        &mut description.kernel,
        &mut description.program_version,
        &mut description.publish_address,
    ]
    .into_iter()
    .for_each(cut);
    description.features.truncate(FEATURES);
    for feature in &mut description.features {
        cut(&mut feature.name);
        cut(&mut feature.state);
    }
    description
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_identity::Key as IdentityKey;
    use bulkhead_proto::wire::{Role as WireRole, Tombstone, Transaction};
    use prost::Message as _;

    const NOW: i64 = 1_000_000;

    fn commit(state: &mut State, changes: Vec<Change>) {
        let transaction = Transaction {
            level: 1,
            at: NOW,
            changes,
            ..Default::default()
        };
        let index = state.index() + 1;
        let applied = state
            .apply(index, 1, &transaction.encode_to_vec())
            .expect("known level");
        assert_eq!(applied.outcome.rejection, None);
    }

    fn create(any: Any) -> Change {
        Change {
            change: Some(Step::Create(view::object(any))),
        }
    }

    fn ticket_of(n: u8, role: WireRole, uses_left: u32, expires_at: i64) -> Change {
        create(Any::Ticket(Ticket {
            id: vec![n; 16],
            role: role.into(),
            secret_hash: secret(n).hash().to_vec(),
            expires_at,
            uses_left,
            labels: vec![Label {
                key: "zone".into(),
                value: "a".into(),
            }],
            ..Default::default()
        }))
    }

    fn secret(n: u8) -> TicketSecret {
        TicketSecret::new(zeroize::Zeroizing::new([n; 16]))
    }

    fn state() -> State {
        let mut state = State::default();
        let cluster = create(Any::Cluster(Cluster {
            id: vec![9; 16],
            level: 1,
            ..Default::default()
        }));
        let changes = vec![
            cluster,
            ticket_of(1, WireRole::Worker, 1, NOW + 1),
            ticket_of(2, WireRole::Manager, 1, NOW + 1),
            ticket_of(3, WireRole::Worker, 0, NOW + 1),
            ticket_of(4, WireRole::Worker, 1, NOW),
        ];
        commit(&mut state, changes);
        state
    }

    fn request(n: u8, role: WireRole, csr: Vec<u8>) -> EnrolRequest {
        EnrolRequest {
            ticket_secret: vec![n; 16],
            csr,
            role: role.into(),
            name: "web".into(),
            advertise: "10.0.0.1:7443".into(),
            description: Some(NodeDescription {
                level: 1,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn csr() -> Vec<u8> {
        IdentityKey::generate().expect("random").csr().expect("signed")
    }

    fn decide(state: &State, request: EnrolRequest) -> Result<Admission, Refusal> {
        plan(state, &Ask::from_wire(request, None)?, NOW)
    }

    /// Signs nothing: the plan does not look into the certificate.
    fn admit(state: &mut State, request: EnrolRequest) -> NodeId {
        let ask = Ask::from_wire(request, None).expect("well formed");
        let Ok(Admission::New(new)) = plan(state, &ask, NOW) else {
            panic!("admitted");
        };
        let node = new.node;
        let key = NodeKey {
            key_id: ask.key().key_id().to_wire(),
            ..Default::default()
        };
        commit(state, new.changes(key, NOW));
        node
    }

    #[test]
    fn a_ticket_gives_role_and_labels_and_the_request_neither() {
        let mut state = state();
        let node = admit(&mut state, request(1, WireRole::Worker, csr()));
        let node = view::node(&state, node).expect("admitted");
        assert_eq!(
            (node.role(), node.name.as_str(), node.labels.len()),
            (WireRole::Worker, "web", 1)
        );
        assert_eq!(node.member_id, 0);
    }

    #[test]
    fn a_retry_of_the_same_key_finds_itself_even_when_the_ticket_is_used_up() {
        let mut state = state();
        let csr = csr();
        let node = admit(&mut state, request(1, WireRole::Worker, csr.clone()));
        assert_eq!(
            decide(&state, request(1, WireRole::Worker, csr)),
            Ok(Admission::Known(node))
        );
    }

    #[test]
    fn managers_get_distinct_member_ids_and_names() {
        let mut state = state();
        commit(&mut state, vec![ticket_of(5, WireRole::Manager, 2, NOW + 1)]);
        let nodes = [(); 2].map(|()| admit(&mut state, request(5, WireRole::Manager, csr())));
        let [one, two] = nodes.map(|id| view::node(&state, id).expect("admitted").clone());
        assert!(one.member_id > 1 && two.member_id > one.member_id);
        assert_eq!((one.name.as_str(), two.name.as_str()), ("web", "web-2"));
    }

    #[test]
    fn who_may_not_join_is_told_why() {
        let mut state = state();
        let csr = csr();
        admit(&mut state, request(2, WireRole::Manager, csr.clone()));
        commit(&mut state, vec![ticket_of(6, WireRole::Manager, 1, NOW + 1)]);
        let removed = IdentityKey::generate().expect("random");
        let tombstone = Tombstone {
            key_id: removed.key_id().to_wire(),
            ..Default::default()
        };
        commit(
            &mut state,
            vec![Change {
                change: Some(Step::AddTombstone(bulkhead_proto::wire::AddTombstone {
                    tombstone: Some(tombstone),
                })),
            }],
        );
        let role = |ticket, asked: &str| Refusal::Role {
            ticket,
            asked: asked.into(),
        };
        let worker = |n| request(n, WireRole::Worker, self::csr());
        let short = EnrolRequest {
            ticket_secret: vec![1; 15],
            ..worker(1)
        };
        let nowhere = EnrolRequest {
            advertise: "0.0.0.0:7443".into(),
            ..request(6, WireRole::Manager, self::csr())
        };
        let old = EnrolRequest {
            description: None,
            ..request(6, WireRole::Manager, self::csr())
        };
        for (request, refusal) in [
            (worker(7), Refusal::Unknown),
            (short, Refusal::Unknown),
            (worker(3), Refusal::Used),
            (worker(4), Refusal::Expired(0)),
            (worker(2), role(Role::Manager, "worker")),
            (
                request(1, WireRole::Manager, self::csr()),
                role(Role::Worker, "manager"),
            ),
            (
                request(1, WireRole::Operator, self::csr()),
                role(Role::Worker, "operator"),
            ),
            (
                request(1, WireRole::Unspecified, self::csr()),
                role(Role::Worker, "program that does not say its role"),
            ),
            (request(6, WireRole::Manager, csr), Refusal::KeyTaken),
            (
                request(1, WireRole::Worker, removed.csr().expect("signed")),
                Refusal::KeyRemoved,
            ),
            (
                request(1, WireRole::Worker, b"no request".to_vec()),
                Refusal::Csr(CsrError::Encoding),
            ),
            (nowhere, Refusal::Address("0.0.0.0:7443".into())),
            (old, Refusal::Level { needed: 1, has: 0 }),
        ] {
            let got = decide(&state, request).expect_err("refused");
            assert_eq!(got, refusal);
            assert!(!got.hint().is_empty() && got.code().as_str().starts_with("BH-E"));
        }
    }

    fn ticket_with(n: u8, edit: impl FnOnce(&mut Ticket)) -> Change {
        let mut change = ticket_of(n, WireRole::Worker, 2, NOW + 1);
        if let Some(Step::Create(object)) = &mut change.change
            && let Some(Any::Ticket(ticket)) = &mut object.object
        {
            edit(ticket);
        }
        change
    }

    #[test]
    fn a_ticket_for_a_node_gives_its_name_and_fits_no_other() {
        let mut state = state();
        commit(&mut state, vec![ticket_with(7, |it| it.for_node = "db".into())]);
        let named = |name: &str| EnrolRequest {
            name: name.into(),
            ..request(7, WireRole::Worker, csr())
        };
        let other = Refusal::Name {
            ticket: "db".into(),
            asked: "web".into(),
        };
        assert_eq!(decide(&state, named("web")), Err(other));
        let node = admit(&mut state, named(""));
        assert_eq!(view::node(&state, node).expect("admitted").name, "db");
        assert_eq!(decide(&state, named("db")), Err(Refusal::NameTaken("db".into())));
    }

    #[test]
    fn whoever_needs_approval_waits_and_is_signed_nothing() {
        let mut state = state();
        commit(&mut state, vec![ticket_with(7, |it| it.approve = true)]);
        let csr = csr();
        let ask = |csr: &[u8]| request(7, WireRole::Worker, csr.to_vec());
        let Ok(Admission::Wait(change, _)) = decide(&state, ask(&csr)) else {
            panic!("it waits");
        };
        commit(&mut state, vec![*change]);
        let Ok(Admission::Waits { waiting, until }) = decide(&state, ask(&csr)) else {
            panic!("it still waits");
        };
        assert_eq!((waiting.name.as_str(), until), ("web", NOW + 1));

        let ticket = view::tickets(&state)
            .find(|it| it.approve)
            .expect("there")
            .clone();
        assert_eq!(
            approve(&state, &ticket, &waiting, NOW + 1),
            Err(Refusal::Expired(0)),
            "who waits lapses with the ticket"
        );
        let new = approve(&state, &ticket, &waiting, NOW).expect("approved");
        let node = new.node;
        let key = NodeKey {
            key_id: waiting.key_id.clone(),
            ..Default::default()
        };
        commit(&mut state, new.changes(key, NOW));
        assert_eq!(decide(&state, ask(&csr)), Ok(Admission::Known(node)));
    }

    #[test]
    fn a_rejected_key_is_told_so() {
        let mut state = state();
        commit(&mut state, vec![ticket_with(7, |it| it.approve = true)]);
        let csr = csr();
        let Ok(Admission::Wait(change, ticket)) = decide(&state, request(7, WireRole::Worker, csr.clone()))
        else {
            panic!("it waits");
        };
        commit(&mut state, vec![*change]);
        let judgement = JudgeWaiting {
            ticket_id: ticket.to_wire(),
            key_id: csr::public_key(&csr).expect("a key").key_id().to_wire(),
            admit: false,
        };
        let judgement = Change {
            change: Some(Step::JudgeWaiting(judgement)),
        };
        commit(&mut state, vec![judgement]);
        let refused = decide(&state, request(7, WireRole::Worker, csr));
        assert_eq!(refused, Err(Refusal::Rejected));
    }

    #[test]
    fn an_address_is_one_that_others_can_dial() {
        for good in [
            "10.0.0.1:7443",
            "manager-1.example.org:1",
            "[::1]:7443",
            "m_1:65535",
        ] {
            assert_eq!(advertised(good).as_deref(), Ok(good));
        }
        for bad in [
            "",
            "10.0.0.1",
            ":7443",
            "a:0",
            "a:65536",
            "[::]:1x",
            "a b:1",
            "http://a:1",
            "::1:7443",
            "0.0.0.0:1",
        ] {
            assert!(advertised(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_a_node_says_of_itself_is_cut() {
        let description = bounded(NodeDescription {
            hostname: "x\n".repeat(1_000),
            features: vec![Default::default(); 1_000],
            ..Default::default()
        });
        assert_eq!(
            (description.hostname.len(), description.features.len()),
            (TEXT_CHARS, FEATURES)
        );
        assert!(!description.hostname.contains('\n'));
    }
}
