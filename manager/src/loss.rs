//! What becomes of a cluster that goes on without those who could decide about it: from a backup (restore), or from one
//! manager whose quorum is lost for good (recover). A pure function of a state.
//!
//! The epoch rises, so that no manager of before is listened to and no worker listens to one. The one manager is its only
//! voter, under a fresh member id; the others' records are gone and their keys are dead; tickets are void. The key
//! ring and the root are renewed next, since others could open them: managers that are gone, or who has the backup. Indexes begin far above all that the
//! old epoch can have reached, so that a version, a fence or a member id is never given twice.

use bulkhead_proto::ids::base32_lower;
use bulkhead_proto::wire::{
    self, AddTombstone, Change, Cluster, KeyRingEpoch, Kind, Node, Tombstone, Transaction,
    change::Change as Step, object::Object as Any,
};
use bulkhead_proto::{MemberId, NodeId, limits};
use bulkhead_raft::state::{FatalApply, State};
use prost::Message as _;

use crate::orchestrator::removal;
use crate::view;

/// Indexes of one epoch. At 10,000 commits a second it lasts three years; a restore begins above it in any case.
const EPOCH_INDEXES: u64 = 1_000_000_000_000;

/// What is asked for.
#[derive(Debug)]
pub struct Order<'a> {
    /// The manager that keeps its node id, key and name: the one that recovers. None where another one begins.
    pub keep: Option<NodeId>,
    /// Nodes and operators that must not come back, by name or id.
    pub forget: &'a [String],
    /// The key ring, with envelopes for the one manager. Those of the others stay: as long as they are there, the leader
    /// begins an epoch that they do not open, and then a rotation of the root.
    pub key_ring: Vec<KeyRingEpoch>,
    /// The cluster whose roots it goes on with, where the one in the state has none that signs here.
    pub roots: Option<&'a Cluster>,
    /// The time.
    pub now_ms: i64,
    /// Who asks.
    pub actor: &'a str,
}

/// What it comes to.
#[derive(Debug)]
pub struct Raised {
    /// The state that the new epoch begins with.
    pub state: State,
    /// The manager's Raft member id.
    pub member: MemberId,
    /// What it means for the others.
    pub report: wire::Raised,
}

/// Why a state cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum LossError {
    /// There is no cluster in it.
    #[error("there is no cluster in this state")]
    NoCluster,
    /// One that is to be forgotten is not there.
    #[error("there is no node or operator '{0}' to forget")]
    Unknown(String),
    /// The manager that would be kept is to be forgotten.
    #[error("'{0}' is the manager that goes on: it cannot be forgotten")]
    Kept(String),
    /// The state's own rules refuse.
    #[error("the state refuses: {0}")]
    Rejected(String),
    /// Of a newer program.
    #[error(transparent)]
    Apply(#[from] FatalApply),
}

/// Raises the epoch. `people` makes the one manager's record, and the records of others that begin with it, from the
/// state without those that are gone.
///
/// # Errors
/// [`LossError`], and what `people` says.
pub fn raise<E: From<LossError>>(
    from: &State,
    order: Order<'_>,
    people: impl FnOnce(&State) -> Result<Vec<Node>, E>,
) -> Result<Raised, E> {
    let cluster = view::cluster(from).ok_or(LossError::NoCluster)?.clone();
    let epoch = cluster.epoch + 1;
    let mut report = wire::Raised {
        epoch,
        from_index: from.index(),
        return_until: order
            .now_ms
            .saturating_add(i64::try_from(limits::RECOVERY_GRACE.as_millis()).unwrap_or(i64::MAX)),
        ..Default::default()
    };
    let mut forget = Vec::new();
    for selector in order.forget {
        let node = find(from, selector)?;
        if order.keep.is_some_and(|keep| node.id == keep.as_bytes()) {
            return Err(LossError::Kept(selector.clone()).into());
        }
        report.forgotten.push(node.name.clone());
        forget.push(node);
    }

    let mut changes: Vec<Change> = Vec::new();
    for node in forget.iter().filter(|node| node.role() != wire::Role::Manager) {
        changes.extend(removal::whole(from, id(node), node, order.now_ms));
    }
    for node in view::managers(from) {
        let kept = order.keep.is_some_and(|keep| node.id == keep.as_bytes());
        if !kept {
            report.managers.push(node.name.clone());
            changes.extend(
                node.keys
                    .iter()
                    .map(|key| tombstone(node, &key.key_id, order.now_ms)),
            );
        }
        // A member id is for ever, so the manager that goes on gets a new record, too.
        changes.push(step(Step::Delete(reference(Kind::Node, node.id.as_slice()))));
    }
    for ticket in view::tickets(from) {
        report.tickets += 1;
        changes.push(step(Step::Delete(reference(Kind::Ticket, ticket.id.as_slice()))));
    }
    let gone = |node: &&Node| !forget.iter().any(|it| it.id == node.id);
    let returns = |node: &&wire::Node| matches!(node.role(), wire::Role::Worker | wire::Role::Standby);
    let workers = view::nodes(from).filter(returns);
    let workers = workers.filter(gone).filter(|node| node.quarantined_at == 0);
    report.workers = workers.map(|node| node.name.clone()).collect();
    report.managers.sort();
    report.workers.sort();

    let mut run = Run {
        state: from.clone(),
        next: (epoch - 1).saturating_mul(EPOCH_INDEXES).max(from.index()) + 1,
        cluster: &cluster,
        order: &order,
    };
    for some in changes.chunks(limits::CHANGES) {
        run.apply(some.to_vec())?;
    }
    let people = people(&run.state)?;
    let member = MemberId(run.next);
    // As the state has it now: the tombstones of a moment ago are part of it.
    let own = view::cluster(&run.state).ok_or(LossError::NoCluster)?;
    let roots = order.roots.unwrap_or(own);
    let new = Cluster {
        root_certificate: roots.root_certificate.clone(),
        root_key: roots.root_key.clone(),
        external_signer: roots.external_signer.clone(),
        rotation: roots.rotation.clone(),
        former: roots.former.clone(),
        epoch,
        key_ring: order.key_ring.clone(),
        desired_voters: vec![member.0],
        root_exposed: true,
        return_until: report.return_until,
        ..own.clone()
    };
    let records = people
        .into_iter()
        .map(|node| Step::Create(view::object(Any::Node(node))));
    let all = std::iter::once(Step::Replace(view::object(Any::Cluster(new)))).chain(records);
    run.apply(all.map(step).collect())?;
    report.index = run.state.index();
    Ok(Raised {
        state: run.state,
        member,
        report,
    })
}

/// Transactions in a row, each of which must be taken.
struct Run<'a> {
    state: State,
    next: u64,
    cluster: &'a Cluster,
    order: &'a Order<'a>,
}

impl Run<'_> {
    fn apply(&mut self, changes: Vec<Change>) -> Result<(), LossError> {
        let transaction = Transaction {
            level: self.cluster.level.max(1),
            at: self.order.now_ms,
            actor: self.order.actor.to_owned(),
            changes,
            ..Default::default()
        };
        let applied = self.state.apply(self.next, 0, &transaction.encode_to_vec())?;
        self.next += 1;
        match applied.outcome.rejection {
            None => Ok(()),
            Some(rejection) => Err(LossError::Rejected(rejection.detail)),
        }
    }
}

fn step(step: Step) -> Change {
    Change { change: Some(step) }
}

fn reference(kind: Kind, id: &[u8]) -> wire::ObjectRef {
    wire::ObjectRef {
        kind: kind.into(),
        id: id.to_vec(),
    }
}

fn tombstone(node: &Node, key_id: &[u8], now_ms: i64) -> Change {
    step(Step::AddTombstone(AddTombstone {
        tombstone: Some(Tombstone {
            key_id: key_id.to_vec(),
            node_id: node.id.clone(),
            removed_at: now_ms,
            ..Default::default()
        }),
    }))
}

fn id(node: &Node) -> NodeId {
    NodeId::try_from(node.id.as_slice()).expect("the key of an object of the state")
}

fn find<'a>(state: &'a State, selector: &str) -> Result<&'a Node, LossError> {
    let by_id = base32_lower().decode(selector.as_bytes()).ok();
    view::nodes(state)
        .find(|node| node.name == selector || by_id.as_ref() == Some(&node.id))
        .ok_or_else(|| LossError::Unknown(selector.chars().take(limits::NAME_CHARS).collect()))
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::wire::{NodeKey, Role, Task, TaskState, TaskStatus, Ticket};

    use super::*;
    use crate::ca::genesis::record;
    use crate::testing::{Founded, apply, create};

    const NOW: i64 = 1_700_000_000_000;

    fn key(n: u8) -> NodeKey {
        NodeKey {
            key_id: vec![n; 32],
            ..Default::default()
        }
    }

    fn node(n: u8, role: bulkhead_proto::Role, name: &str) -> Node {
        record(NodeId::from_bytes([n; 16]), role, name.into(), key(n), NOW)
    }

    /// Manager 1 and operator `admin` as the cluster began, managers 3 and 4, workers 5 and 6, standby 8, two tickets; worker 6 has
    /// a task.
    fn lost() -> Founded {
        use bulkhead_proto::Role::{Manager, Standby, Worker};
        let mut founded = Founded::new(NOW);
        let tickets = [1_u8, 2].map(|n| {
            create(Any::Ticket(Ticket {
                id: vec![n; 16],
                ..Default::default()
            }))
        });
        let nodes = [
            node(3, Manager, "manager-2"),
            node(4, Manager, "manager-3"),
            node(5, Worker, "worker-1"),
            node(6, Worker, "worker-2"),
            node(8, Standby, "standby-1"),
        ]
        .map(|node| create(Any::Node(node)));
        let service = create(Any::Service(wire::Service {
            id: vec![7; 16],
            versions: vec![wire::ServiceVersion {
                number: 1,
                spec: Some(wire::ServiceSpec {
                    name: "web".into(),
                    ..Default::default()
                }),
                ..Default::default()
            }],
            ..Default::default()
        }));
        let task = create(Any::Task(Task {
            id: vec![8; 16],
            service_id: vec![7; 16],
            node_id: vec![6; 16],
            status: Some(TaskStatus {
                state: TaskState::Running.into(),
                ..Default::default()
            }),
            ..Default::default()
        }));
        let all = nodes.into_iter().chain(tickets).chain([service, task]);
        apply(&mut founded.state, 20, all.collect());
        founded
    }

    fn order<'a>(founded: &Founded, forget: &'a [String]) -> Order<'a> {
        let cluster = view::cluster(&founded.state).expect("a cluster");
        Order {
            keep: Some(founded.node),
            forget,
            key_ring: cluster.key_ring.clone(),
            roots: None,
            now_ms: NOW,
            actor: "local/0",
        }
    }

    fn own(founded: &Founded) -> Node {
        view::node(&founded.state, founded.node).expect("listed").clone()
    }

    fn recovered(founded: &Founded, forget: &[&str]) -> Result<Raised, LossError> {
        let forget: Vec<String> = forget.iter().map(|name| (*name).to_owned()).collect();
        raise(&founded.state, order(founded, &forget), |_| {
            Ok(vec![own(founded)])
        })
    }

    #[test]
    fn one_manager_goes_on_under_a_fresh_id_and_the_others_are_gone() {
        let founded = lost();
        let raised = recovered(&founded, &[]).expect("raised");
        let cluster = view::cluster(&raised.state).expect("a cluster");
        assert_eq!((cluster.epoch, raised.report.epoch), (2, 2));
        let managers: Vec<&Node> = view::managers(&raised.state).collect();
        let [manager] = managers.as_slice() else {
            panic!("{managers:?}");
        };
        assert_eq!(manager.member_id, raised.member.0);
        assert!(raised.member.0 > EPOCH_INDEXES && raised.state.index() == raised.member.0);
        assert_eq!(cluster.desired_voters, [raised.member.0]);
        assert_eq!(
            manager.keys,
            own(&founded).keys,
            "it keeps its key and certificate"
        );
        let dead: Vec<&[u8]> = cluster.tombstones.iter().map(|it| it.key_id.as_slice()).collect();
        assert_eq!(dead, [[3; 32], [4; 32]], "and the others' are dead");
        assert!(cluster.tombstones.iter().all(|it| it.role() == Role::Manager));
        assert_eq!(view::tickets(&raised.state).count(), 0);
        assert!(cluster.root_exposed && cluster.return_until > NOW);
        let report = raised.report;
        assert_eq!(report.managers, ["manager-2", "manager-3"]);
        assert_eq!(report.workers, ["standby-1", "worker-1", "worker-2"]);
        assert_eq!((report.tickets, report.from_index), (2, 20));
    }

    #[test]
    fn it_can_be_done_again_and_nothing_is_numbered_twice() {
        let founded = lost();
        let first = recovered(&founded, &[]).expect("raised");
        let again = Founded {
            state: first.state,
            ..founded
        };
        let second = recovered(&again, &[]).expect("raised");
        assert!(second.member.0 > first.member.0);
        assert_eq!(view::cluster(&second.state).expect("a cluster").epoch, 3);
    }

    #[test]
    fn who_is_forgotten_is_gone_with_keys_and_tasks() {
        let founded = lost();
        let raised = recovered(&founded, &["worker-2", "admin", "manager-2"]).expect("raised");
        let names: Vec<&str> = view::nodes(&raised.state)
            .map(|node| node.name.as_str())
            .collect();
        assert_eq!(names, ["manager-1", "worker-1", "standby-1"]);
        let cluster = view::cluster(&raised.state).expect("a cluster");
        assert!(cluster.tombstones.iter().any(|it| it.key_id == [6; 32]));
        let task =
            view::task(&raised.state, bulkhead_proto::TaskId::from_bytes([8; 16])).expect("its record stays");
        assert_eq!(task.status.as_ref().map(TaskStatus::state), Some(TaskState::Lost));
        assert_eq!(raised.report.workers, ["standby-1", "worker-1"]);
        let by_id = base32_lower().encode(&[5; 16]);
        assert_eq!(
            recovered(&founded, &[&by_id]).expect("raised").report.forgotten,
            ["worker-1"]
        );
    }

    #[test]
    fn what_cannot_be_forgotten_is_named() {
        let founded = lost();
        assert!(matches!(
            recovered(&founded, &["worker-9"]),
            Err(LossError::Unknown(name)) if name == "worker-9"
        ));
        assert!(matches!(
            recovered(&founded, &["manager-1"]),
            Err(LossError::Kept(name)) if name == "manager-1"
        ));
        let nothing = raise(&State::default(), order(&founded, &[]), |_| {
            Ok::<_, LossError>(Vec::new())
        });
        assert!(matches!(nothing, Err(LossError::NoCluster)));
    }

    #[test]
    fn another_manager_takes_the_place_of_all() {
        let founded = lost();
        let raised = raise(
            &founded.state,
            Order {
                keep: None,
                key_ring: Vec::new(),
                roots: None,
                ..order(&founded, &[])
            },
            |state| {
                assert_eq!(view::managers(state).count(), 0, "its name is free");
                Ok::<_, LossError>(vec![node(9, bulkhead_proto::Role::Manager, "manager-1")])
            },
        );
        let raised = raised.expect("raised");
        let cluster = view::cluster(&raised.state).expect("a cluster");
        assert_eq!(cluster.tombstones.len(), 3);
        assert_eq!(raised.report.managers, ["manager-1", "manager-2", "manager-3"]);
    }
}
