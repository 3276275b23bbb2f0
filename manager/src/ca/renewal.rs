//! Renewal of a node's own certificate, as one pure decision.
//!
//! The caller proved one of the node's listed keys. A new key is added to the list, and the old one stays until its
//! certificate ends or newer ones push it out, so that a node that never saw the answer can ask again. Once the new one was
//! seen in use nothing is renewed by the old one any more ([`super::clone`]).

use bulkhead_identity::csr::PublicKey;
use bulkhead_identity::{Bundle, Certificate};
use bulkhead_proto::wire::{
    Availability, Change, Cluster, Kind, Node, NodeKey, NodeStatus, Precondition, Role as WireRole,
    VersionIs, change::Change as Step, object::Object as Any, precondition::Precondition as Condition,
};
use bulkhead_proto::{Code, KeyId, NodeId, RequestId, Role, limits};
use bulkhead_raft::state::{Key, State};

use super::{Validity, clone, millis, trust};
use crate::{lock, view};

/// Keys that a node may have at once: the one in use, one under way, and one whose answer was lost.
const KEYS: usize = 3;

/// Why nothing is renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The node or the caller's key is no longer listed.
    #[error("the cluster no longer lists this node's key")]
    NotListed,
    /// A newer key of the node was seen in use.
    #[error("a newer key of this node is in use")]
    Superseded,
    /// The new key is another node's, or was removed.
    #[error("the new key belongs to another node, or was removed from the cluster")]
    KeyTaken,
    /// No operator wants the node to take this role.
    #[error("this node is not to change its role")]
    Role,
}

impl Refusal {
    /// The stable code.
    pub fn code(self) -> Code {
        match self {
            Refusal::NotListed => Code::UnknownCaller,
            Refusal::Superseded => Code::SupersededKey,
            Refusal::KeyTaken => Code::BadCertificateRequest,
            Refusal::Role => Code::Denied,
        }
    }

    /// What to do next.
    pub fn hint(self) -> &'static str {
        match self {
            Refusal::NotListed => "join it again with a new ticket",
            Refusal::Superseded => "ask with the newest certificate",
            Refusal::Role => "`bulkhead node promote` and `node demote` change it",
            Refusal::KeyTaken => "make a new key and ask again",
        }
    }
}

/// What is to be done about a request to renew.
#[derive(Debug, PartialEq)]
pub enum Renewal {
    /// This very request was committed before: hand out what is committed.
    Committed,
    /// Sign, then commit [`with_key`].
    Sign,
}

/// Decides about a caller that proved the key `presented` of `node` and asks for a certificate for `key`.
///
/// # Errors
/// [`Refusal`].
pub fn plan(
    state: &State,
    node: NodeId,
    presented: KeyId,
    key: &PublicKey,
    request: RequestId,
) -> Result<Renewal, Refusal> {
    let record = view::node(state, node).ok_or(Refusal::NotListed)?;
    let listed = |id: KeyId| record.keys.iter().any(|it| it.key_id == id.as_bytes());
    if !listed(presented) {
        return Err(Refusal::NotListed);
    }
    // Else whoever kept a connection of before would get a key that takes the place of the node's.
    if clone::superseded(record, presented).is_some() {
        return Err(Refusal::Superseded);
    }
    let id = key.key_id();
    if listed(id) {
        let same = record
            .meta
            .as_ref()
            .is_some_and(|meta| meta.last_request == request.as_bytes());
        return Ok(if same { Renewal::Committed } else { Renewal::Sign });
    }
    let removed =
        view::cluster(state).is_none_or(|it| it.tombstones.iter().any(|it| it.key_id == id.as_bytes()));
    if removed || view::node_of_key(state, id).is_some() {
        return Err(Refusal::KeyTaken);
    }
    Ok(Renewal::Sign)
}

/// The validity of the certificate that follows one which ends at `ends`. An operator was given its right until then, by
/// a person: a rotation of the root signs it anew, and nothing prolongs it.
pub fn validity(role: Role, cluster: &Cluster, ends: i64, now_ms: i64) -> Validity {
    let full = Validity::of_role(role, cluster, now_ms);
    match role {
        Role::Operator => Validity {
            not_after: ends.min(full.not_after),
            ..full
        },
        Role::Manager | Role::Worker | Role::Standby => full,
    }
}

/// Whether who proves a listed key, whose certificate ends at `ends`, may come back with it: an operator until then, a
/// node for [`limits::RETURN_GRACE`] longer.
pub fn may_return(role: Role, ends: i64, now_ms: i64) -> bool {
    let grace = match role {
        Role::Operator => 0,
        Role::Manager | Role::Worker | Role::Standby => millis(limits::RETURN_GRACE),
    };
    now_ms <= ends.saturating_add(grace)
}

/// The key of a worker that the state does not know since it is older than that key: a cluster that was restored or
/// recovered lets a listed worker come back with it for a day. The certificate must be of a root of this cluster, and
/// newer than every key that is listed: one that was superseded before stays so.
pub fn reprieve(
    state: &State,
    record: &Node,
    certificate: &[u8],
    chain: &[Vec<u8>],
    now_ms: i64,
) -> Option<NodeKey> {
    let cluster = view::cluster(state)?;
    if cluster.return_until <= now_ms || record.role() != WireRole::Worker || record.quarantined_at != 0 {
        return None;
    }
    let roots = trust::roots(cluster).into_iter();
    let bundle = roots.chain(trust::former(cluster).map(<[u8]>::to_vec)).collect();
    let bundle = Bundle::from_ders(bundle).ok()?;
    let leaf = Certificate::from_der(certificate).ok()?;
    // A certificate that ended is judged at its end; whether that was too long ago is for `may_return` to say.
    let judged = now_ms.min(leaf.not_after_ms());
    let subject = bundle.verify_held(certificate, chain, judged).ok()?.subject();
    let known = |key: &NodeKey| key.not_before >= leaf.not_before_ms();
    let id = leaf.key_id();
    let removed = cluster.tombstones.iter().any(|it| it.key_id == id.as_bytes());
    if subject.node.as_bytes() != record.id.as_slice()
        || subject.role != Role::Worker
        || record.keys.iter().any(known)
        || removed
        || clone::superseded(record, id).is_some()
        || view::node_of_key(state, id).is_some()
    {
        return None;
    }
    Some(NodeKey {
        key_id: id.to_wire(),
        not_before: leaf.not_before_ms(),
        not_after: leaf.not_after_ms(),
        certificate: certificate.to_vec(),
    })
}

/// The role of the certificate that a node asks for with one of the role `presented`: where it names none, that one.
///
/// A manager may have a standby's, which opens less: it needs it before it can become one. A standby's lies on disk in the
/// clear, also beside a manager's locked key file: it opens the way to a manager's only where an operator wants that, or
/// where he did and the answer was lost. A manager whose envelope key is registered had the answer, and one that is
/// drained leaves.
///
/// # Errors
/// Where nobody wants that.
pub fn role(record: &Node, presented: Role, asked: WireRole) -> Result<Role, Refusal> {
    let own = view::role(record.role()).ok_or(Refusal::NotListed)?;
    let asked = view::role(asked).unwrap_or(presented);
    let becomes_manager = match own {
        Role::Standby => record.wanted_role() == WireRole::Manager,
        Role::Manager => {
            let (leaves, registered) = (
                record.availability() == Availability::Drain,
                !record.envelope_key.is_empty(),
            );
            record.wanted_role() != WireRole::Standby && !leaves && !registered
        }
        Role::Worker | Role::Operator => false,
    };
    let may = match (presented, asked) {
        (Role::Standby, Role::Manager) => becomes_manager,
        (Role::Standby, Role::Standby) => {
            own == Role::Standby || becomes_manager || record.wanted_role() == WireRole::Standby
        }
        (Role::Manager, Role::Manager | Role::Standby)
        | (Role::Worker, Role::Worker)
        | (Role::Operator, Role::Operator) => own == presented,
        (Role::Manager | Role::Worker | Role::Operator | Role::Standby, _) => false,
    };
    match may {
        true => Ok(asked),
        false => Err(Refusal::Role),
    }
}

/// The one transaction: the node as it was read, with the key last in its list. A standby that takes a manager's
/// certificate is a manager by that; a manager with a standby's stays one until it has left the quorum.
///
/// It holds while the cluster is as it was when the key was signed, so that no certificate of a root is committed after that
/// root was dropped.
pub fn with_key(
    record: &Node,
    cluster: &Cluster,
    presented: KeyId,
    key: NodeKey,
    role: Role,
    now_ms: i64,
) -> (Vec<Precondition>, Vec<Change>) {
    let mut node = record.clone();
    let in_use = |it: &NodeKey| it.key_id == presented.as_bytes();
    // The newest key of its other role stays, whatever a node with two renews: with a standby's it finds the way back from a
    // demotion, and no standby's key takes a manager's own away.
    let other = match role {
        Role::Manager if record.wanted_role() == WireRole::Standby => newest(record, Role::Standby),
        Role::Standby if record.role() == WireRole::Manager => newest(record, Role::Manager),
        Role::Manager | Role::Standby | Role::Worker | Role::Operator => None,
    };
    let stays = |it: &NodeKey| in_use(it) || Some(&it.key_id) == other;
    // The node proved that it has this one: those before it are superseded.
    clone::seen(&mut node, presented, now_ms);
    let superseded = node.keys.iter().position(in_use).unwrap_or(0);
    let mut place = 0;
    node.keys.retain(|it| {
        place += 1;
        let holds = place > superseded && it.not_after >= now_ms;
        it.key_id != key.key_id && (holds || stays(it))
    });
    // Two of them stay at most, so that there is always another.
    while node.keys.len() >= KEYS
        && let Some(oldest) = node.keys.iter().position(|it| !stays(it))
    {
        node.keys.remove(oldest);
    }
    // A key that is certified anew is the newest again: its first answer was late.
    node.superseded.retain(|it| it.key_id != key.key_id);
    node.keys.push(key);
    if record.role() == WireRole::Standby && role == Role::Manager {
        node.set_role(WireRole::Manager);
        node.set_wanted_role(WireRole::Unspecified);
        node.set_status(NodeStatus::Unknown);
        node.locked_with = lock::generation(cluster);
    }
    let replace = Step::Replace(view::object(Any::Node(node)));
    (
        vec![unchanged(record), view::unchanged_cluster(cluster)],
        vec![Change {
            change: Some(replace),
        }],
    )
}

/// The newest key that the node has for this role.
fn newest(record: &Node, role: Role) -> Option<&Vec<u8>> {
    let of_role =
        |it: &&NodeKey| Certificate::from_der(&it.certificate).is_ok_and(|it| it.subject().role == role);
    record.keys.iter().rfind(of_role).map(|it| &it.key_id)
}

/// The node is still as it was read.
pub fn unchanged(record: &Node) -> Precondition {
    let id = record.id.as_slice().try_into().unwrap_or_default();
    Precondition {
        precondition: Some(Condition::VersionIs(VersionIs {
            object: Some(Key::new(Kind::Node, id).to_wire()),
            version: record.meta.as_ref().map_or(0, |meta| meta.version),
        })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_identity::Key as IdentityKey;
    use bulkhead_proto::wire::{SupersededKey, Tombstone, Transaction};
    use prost::Message as _;

    use crate::ca::{Ca, genesis};
    use crate::testing::{Founded, apply, create};

    const NODE: NodeId = NodeId::from_bytes([1; 16]);
    const REQUEST: RequestId = RequestId::from_bytes([7; 16]);

    fn listed(id: KeyId, not_after: i64) -> NodeKey {
        NodeKey {
            key_id: id.to_wire(),
            not_after,
            ..Default::default()
        }
    }

    fn key_id(n: u8) -> KeyId {
        KeyId::from_bytes([n; 32])
    }

    fn public() -> PublicKey {
        let csr = IdentityKey::generate().expect("random").csr().expect("signed");
        bulkhead_identity::csr::public_key(&csr).expect("our own")
    }

    fn state(tombstone: KeyId, others: KeyId) -> State {
        let cluster = Any::Cluster(Cluster {
            id: vec![9; 16],
            tombstones: vec![Tombstone {
                key_id: tombstone.to_wire(),
                ..Default::default()
            }],
            ..Default::default()
        });
        let node = |id: NodeId, keys| {
            Any::Node(Node {
                id: id.to_wire(),
                name: id.to_string(),
                keys,
                ..Default::default()
            })
        };
        let other = node(NodeId::from_bytes([2; 16]), vec![listed(others, 100)]);
        let mut state = State::default();
        let transaction = Transaction {
            level: 1,
            request_id: REQUEST.to_wire(),
            changes: [cluster, node(NODE, vec![listed(key_id(1), 100)]), other]
                .map(|any| Change {
                    change: Some(Step::Create(view::object(any))),
                })
                .into(),
            ..Default::default()
        };
        let applied = state
            .apply(1, 1, &transaction.encode_to_vec())
            .expect("known level");
        assert_eq!(applied.outcome.rejection, None);
        state
    }

    #[test]
    fn a_certificate_of_another_role_is_for_whom_an_operator_wants_to_have_it() {
        let record = |own: WireRole, wanted: WireRole| Node {
            role: own.into(),
            wanted_role: wanted.into(),
            ..Default::default()
        };
        const NONE: WireRole = WireRole::Unspecified;
        const MANAGER: WireRole = WireRole::Manager;
        const STANDBY: WireRole = WireRole::Standby;
        for (own, wanted, presented, asked, given) in [
            (WireRole::Worker, NONE, Role::Worker, NONE, Ok(Role::Worker)),
            (
                WireRole::Worker,
                MANAGER,
                Role::Worker,
                MANAGER,
                Err(Refusal::Role),
            ),
            (WireRole::Worker, NONE, Role::Worker, STANDBY, Err(Refusal::Role)),
            (
                WireRole::Operator,
                NONE,
                Role::Operator,
                MANAGER,
                Err(Refusal::Role),
            ),
            (STANDBY, NONE, Role::Standby, NONE, Ok(Role::Standby)),
            (STANDBY, NONE, Role::Standby, MANAGER, Err(Refusal::Role)),
            (STANDBY, MANAGER, Role::Standby, MANAGER, Ok(Role::Manager)),
            (STANDBY, MANAGER, Role::Manager, MANAGER, Err(Refusal::Role)),
            (MANAGER, NONE, Role::Manager, NONE, Ok(Role::Manager)),
            (MANAGER, NONE, Role::Manager, STANDBY, Ok(Role::Standby)),
            (MANAGER, STANDBY, Role::Manager, MANAGER, Ok(Role::Manager)),
        ] {
            assert_eq!(
                role(&record(own, wanted), presented, asked),
                given,
                "{own:?} {wanted:?} {presented} {asked:?}"
            );
        }
    }

    #[test]
    fn a_standbys_key_is_no_way_to_a_managers_certificate_once_that_was_taken() {
        let manager = |wanted: WireRole, registered: bool| Node {
            role: WireRole::Manager.into(),
            wanted_role: wanted.into(),
            envelope_key: vec![1; if registered { 32 } else { 0 }],
            ..Default::default()
        };
        const NONE: WireRole = WireRole::Unspecified;
        for (wanted, registered, asked, given) in [
            // The answer to a promotion was lost.
            (NONE, false, WireRole::Manager, Ok(Role::Manager)),
            (NONE, false, NONE, Ok(Role::Standby)),
            // An old copy of a disk.
            (NONE, true, WireRole::Manager, Err(Refusal::Role)),
            (NONE, true, NONE, Err(Refusal::Role)),
            (NONE, true, WireRole::Standby, Err(Refusal::Role)),
            // What lies beside a locked key file while the manager leaves the quorum.
            (WireRole::Standby, true, WireRole::Manager, Err(Refusal::Role)),
            (WireRole::Standby, false, WireRole::Manager, Err(Refusal::Role)),
            (WireRole::Standby, true, WireRole::Standby, Ok(Role::Standby)),
            (WireRole::Standby, true, NONE, Ok(Role::Standby)),
        ] {
            let mut record = manager(wanted, registered);
            assert_eq!(
                role(&record, Role::Standby, asked),
                given,
                "{wanted:?} {registered} {asked:?}"
            );
            record.set_availability(Availability::Drain);
            let leaving = role(&record, Role::Standby, WireRole::Manager);
            assert_eq!(leaving, Err(Refusal::Role), "{wanted:?} {registered}");
        }
    }

    #[test]
    fn only_a_listed_key_renews_and_only_for_a_key_of_its_own() {
        let (free, removed, others) = (public(), public(), public());
        let state = state(removed.key_id(), others.key_id());
        let ask = |node, presented, key: &PublicKey| plan(&state, node, presented, key, REQUEST);
        assert_eq!(ask(NODE, key_id(1), &free), Ok(Renewal::Sign));
        assert_eq!(ask(NODE, key_id(2), &free), Err(Refusal::NotListed));
        assert_eq!(
            ask(NodeId::from_bytes([3; 16]), key_id(1), &free),
            Err(Refusal::NotListed)
        );
        assert_eq!(ask(NODE, others.key_id(), &free), Err(Refusal::NotListed));
        assert_eq!(ask(NODE, key_id(1), &removed), Err(Refusal::KeyTaken));
        assert_eq!(ask(NODE, key_id(1), &others), Err(Refusal::KeyTaken));
        let other = NodeId::from_bytes([2; 16]);
        assert_eq!(ask(other, others.key_id(), &others), Ok(Renewal::Committed));
        let again = plan(
            &state,
            other,
            others.key_id(),
            &others,
            RequestId::from_bytes([8; 16]),
        );
        assert_eq!(again, Ok(Renewal::Sign));
    }

    #[test]
    fn nothing_is_renewed_by_a_key_whose_successor_was_seen_and_a_late_answer_counts_again() {
        let superseded = |n: u8| SupersededKey {
            key_id: key_id(n).to_wire(),
            at: 10,
            until: 1_000,
        };
        let record = Node {
            id: NODE.to_wire(),
            name: "it".into(),
            keys: vec![
                listed(key_id(1), 100),
                listed(key_id(2), 100),
                listed(key_id(3), 100),
            ],
            superseded: vec![superseded(1), superseded(2)],
            ..Default::default()
        };
        let mut state = State::default();
        let cluster = Cluster {
            id: vec![9; 16],
            ..Default::default()
        };
        let objects = [Any::Cluster(cluster), Any::Node(record.clone())];
        apply(&mut state, 1, objects.map(create).into());
        let ask = |presented| plan(&state, NODE, key_id(presented), &public(), REQUEST);
        assert_eq!(ask(1), Err(Refusal::Superseded));
        assert_eq!(ask(2), Err(Refusal::Superseded));
        assert_eq!(ask(3), Ok(Renewal::Sign));
        // The answer for the second key was under way all the time, and is asked for once more by the third.
        let (_, changes) = with_key(
            &record,
            &Cluster::default(),
            key_id(3),
            listed(key_id(2), 200),
            Role::Worker,
            50,
        );
        let Some(Step::Replace(object)) = &changes[0].change else {
            panic!("replaces")
        };
        let Some(Any::Node(node)) = &object.object else {
            panic!("a node")
        };
        assert_eq!(node.keys, [listed(key_id(3), 100), listed(key_id(2), 200)]);
        assert_eq!(
            node.superseded,
            [superseded(1)],
            "whoever uses the second key now is the node"
        );
    }

    #[test]
    fn nothing_prolongs_an_operators_right() {
        let (cluster, now) = (Cluster::default(), 1_000_000_000);
        let hour = now + 3_600_000;
        assert_eq!(validity(Role::Operator, &cluster, hour, now).not_after, hour);
        let full = |role| Validity::of_role(role, &cluster, now).not_after;
        let later = validity(Role::Operator, &cluster, i64::MAX, now);
        assert_eq!(later.not_after, full(Role::Operator));
        let grace = millis(limits::RETURN_GRACE);
        assert!(may_return(Role::Operator, now, now) && !may_return(Role::Operator, now, now + 1));
        for role in [Role::Manager, Role::Worker] {
            assert_eq!(validity(role, &cluster, hour, now).not_after, full(role));
            assert!(may_return(role, now, now + grace) && !may_return(role, now, now + grace + 1));
        }
    }

    #[test]
    fn a_key_whose_successor_was_proved_is_forgotten() {
        let record = Node {
            keys: (1..4).map(|n| listed(key_id(n), 100)).collect(),
            ..Default::default()
        };
        let (conditions, changes) = with_key(
            &record,
            &Cluster::default(),
            key_id(3),
            listed(key_id(4), 100),
            Role::Worker,
            50,
        );
        let about = |condition: &Precondition| match &condition.precondition {
            Some(Condition::VersionIs(it)) => it.object.as_ref().map(|it| it.kind()),
            _ => None,
        };
        let about: Vec<Option<Kind>> = conditions.iter().map(about).collect();
        assert_eq!(
            about,
            [Some(Kind::Node), Some(Kind::Cluster)],
            "as it was when it was signed"
        );
        let Some(Step::Replace(object)) = &changes[0].change else {
            panic!("replaces")
        };
        let Some(Any::Node(node)) = &object.object else {
            panic!("a node")
        };
        assert_eq!(node.keys, [listed(key_id(3), 100), listed(key_id(4), 100)]);
    }

    #[test]
    fn the_key_in_use_stays_and_the_list_is_bounded() {
        let mut record = Node {
            keys: vec![listed(key_id(1), 100)],
            ..Default::default()
        };
        for n in 2..10 {
            let (_, changes) = with_key(
                &record,
                &Cluster::default(),
                key_id(1),
                listed(key_id(n), 100),
                Role::Worker,
                50,
            );
            let Some(Step::Replace(object)) = &changes[0].change else {
                panic!("replaces")
            };
            let Some(Any::Node(node)) = &object.object else {
                panic!("a node")
            };
            record = node.clone();
            assert!(record.keys.len() <= KEYS);
            assert_eq!(
                record.keys.last().map(|it| it.key_id.clone()),
                Some(key_id(n).to_wire())
            );
            assert!(record.keys.iter().any(|it| it.key_id == key_id(1).as_bytes()));
        }
        let (_, changes) = with_key(
            &record,
            &Cluster::default(),
            key_id(9),
            listed(key_id(9), 300),
            Role::Worker,
            200,
        );
        let Some(Step::Replace(object)) = &changes[0].change else {
            panic!("replaces")
        };
        let Some(Any::Node(node)) = &object.object else {
            panic!("a node")
        };
        assert_eq!(
            node.keys,
            [listed(key_id(9), 300)],
            "expired ones are dropped, the renewed one is there once"
        );
    }

    /// A worker whose listed key has a certificate from second 100 on, in a cluster that lets workers come back until
    /// `until`, and a certificate of it from `from` on for another key.
    fn reprieved(until: i64, from: i64, role: Role) -> (State, Vec<u8>) {
        let mut founded = Founded::new(AT);
        let mut cluster = view::cluster(&founded.state).expect("founded").clone();
        cluster.return_until = AT + until;
        let ca = Ca::new(founded.ring.clone());
        let issue = |from: i64| {
            let validity = Validity {
                not_before: AT + from,
                not_after: AT + from + 1_000_000,
            };
            ca.issue_here(&cluster, NODE_5, role, &public(), validity)
                .expect("signed")
        };
        let record = genesis::record(NODE_5, role, "five".into(), issue(100_000), AT);
        let newer = issue(from).certificate;
        let replace = Step::Replace(view::object(Any::Cluster(cluster)));
        let changes = vec![
            create(Any::Node(record)),
            Change {
                change: Some(replace),
            },
        ];
        apply(&mut founded.state, 9, changes);
        (founded.state, newer)
    }

    const NODE_5: NodeId = NodeId::from_bytes([5; 16]);
    const AT: i64 = 1_700_000_000_000;

    #[test]
    fn a_worker_comes_back_with_a_key_that_is_newer_than_the_state_for_a_day() {
        let ask = |(state, certificate): &(State, Vec<u8>), now: i64| {
            let record = view::node(state, NODE_5).expect("listed");
            reprieve(state, record, certificate, &[], AT + now)
        };
        let day = reprieved(500_000, 200_000, Role::Worker);
        let key = ask(&day, 300_000).expect("newer, and in time");
        let leaf = Certificate::from_der(&day.1).expect("signed");
        assert_eq!(
            (key.key_id, key.not_before),
            (leaf.key_id().to_wire(), leaf.not_before_ms())
        );
        // Ended meanwhile: judged at its end.
        let long = reprieved(5_000_000, 200_000, Role::Worker);
        assert!(ask(&long, 4_000_000).is_some());
        for (what, case, now) in [
            ("too late", day, 500_000),
            (
                "superseded before",
                reprieved(500_000, 50_000, Role::Worker),
                300_000,
            ),
            ("no worker", reprieved(500_000, 200_000, Role::Manager), 300_000),
            ("no such time", reprieved(0, 200_000, Role::Worker), 300_000),
        ] {
            assert_eq!(ask(&case, now), None, "{what}");
        }
    }

    #[test]
    fn nobody_comes_back_with_what_is_not_of_this_node_and_root() {
        let (state, good) = reprieved(500_000, 200_000, Role::Worker);
        let (_, of_another_root) = reprieved(500_000, 200_000, Role::Worker);
        let record = view::node(&state, NODE_5).expect("listed");
        let ask = |state: &State, record: &Node, certificate: &[u8]| {
            reprieve(state, record, certificate, &[], AT + 300_000)
        };
        assert!(ask(&state, record, &good).is_some());
        assert_eq!(ask(&state, record, &of_another_root), None, "another root");
        assert_eq!(ask(&state, record, b"no certificate"), None);
        let other = Node {
            id: vec![6; 16],
            ..record.clone()
        };
        assert_eq!(ask(&state, &other, &good), None, "another node");
        let quarantined = Node {
            quarantined_at: 1,
            ..record.clone()
        };
        assert_eq!(ask(&state, &quarantined, &good), None, "in quarantine");
        let mut removed = state.clone();
        let key_id = Certificate::from_der(&good).expect("signed").key_id().to_wire();
        let tombstone = Step::AddTombstone(bulkhead_proto::wire::AddTombstone {
            tombstone: Some(Tombstone {
                key_id,
                node_id: vec![5; 16],
                ..Default::default()
            }),
        });
        let change = Change {
            change: Some(tombstone),
        };
        apply(&mut removed, 10, vec![change]);
        assert_eq!(ask(&removed, record, &good), None, "a removed key");
        let key_id = Certificate::from_der(&good).expect("signed").key_id().to_wire();
        let superseded = Node {
            superseded: vec![SupersededKey {
                key_id,
                ..Default::default()
            }],
            ..record.clone()
        };
        assert_eq!(ask(&state, &superseded, &good), None, "a superseded key");
    }

    /// A manager that is to be demoted: its own key, and those of a standby whose answers may have been lost.
    #[test]
    fn no_key_of_a_standby_takes_a_managers_own_away() {
        let cluster_id = bulkhead_proto::ClusterId::from_bytes([9; 16]);
        let authority = bulkhead_identity::authority::Authority::generate(cluster_id, 0).expect("a root");
        let keys: Vec<NodeKey> = [Role::Manager, Role::Standby, Role::Standby, Role::Standby]
            .map(|role| {
                let (subject, public) = (
                    bulkhead_identity::Subject {
                        cluster: cluster_id,
                        node: NODE,
                        role,
                    },
                    public(),
                );
                let certificate = authority.issue(&subject, &public, 0, 100_000).expect("a leaf");
                NodeKey {
                    certificate,
                    ..listed(public.key_id(), 100_000)
                }
            })
            .into();
        let (own, wanted) = (WireRole::Manager, WireRole::Standby);
        // Which are listed, which one is shown, the role of the last one, and which are listed then.
        for (has, shown, role, kept, what) in [
            (
                &[0, 1, 2][..],
                0,
                Role::Standby,
                &[0, 2, 3][..],
                "its third answer is lost",
            ),
            (&[0, 1, 2], 1, Role::Standby, &[0, 1, 3], "a superseded copy"),
            (&[0, 1, 2], 2, Role::Standby, &[0, 2, 3], "the one it has"),
            (&[1, 2, 0], 0, Role::Manager, &[2, 0, 3], "its own renewal"),
            (
                &[0, 1],
                1,
                Role::Standby,
                &[0, 1, 3],
                "it supersedes none of another role",
            ),
        ] {
            let mut record = Node {
                keys: has.iter().map(|&n: &usize| keys[n].clone()).collect(),
                ..Default::default()
            };
            record.set_role(own);
            record.set_wanted_role(wanted);
            let presented = KeyId::try_from(keys[shown].key_id.as_slice()).expect("an id");
            let (_, changes) = with_key(&record, &Cluster::default(), presented, keys[3].clone(), role, 50);
            let Some(Step::Replace(object)) = &changes[0].change else {
                panic!("replaces")
            };
            let Some(Any::Node(node)) = &object.object else {
                panic!("a node")
            };
            let want: Vec<NodeKey> = kept.iter().map(|&n: &usize| keys[n].clone()).collect();
            assert_eq!(node.keys, want, "{what}");
        }
    }
}
