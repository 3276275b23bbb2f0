//! Typed looks at the replicated state: the object under an id, or nothing.

use bulkhead_proto::wire::{
    Cluster, Image, Kind, Node, Object, Precondition, Role as WireRole, Secret, Service, ServiceSpec, Task,
    Ticket, VersionIs, object::Object as Any, precondition::Precondition as Condition,
};
use bulkhead_proto::{ImageId, KeyId, NodeId, Role, SecretId, ServiceId, TaskId};
use bulkhead_raft::state::{Key, State};

/// The cluster object; none before the first transaction.
pub fn cluster(state: &State) -> Option<&Cluster> {
    match &state.list(Kind::Cluster).next()?.object {
        Some(Any::Cluster(cluster)) => Some(cluster),
        _ => None,
    }
}

/// The cluster object is still as it was read.
pub fn unchanged_cluster(cluster: &Cluster) -> Precondition {
    let id = cluster.id.as_slice().try_into().unwrap_or_default();
    Precondition {
        precondition: Some(Condition::VersionIs(VersionIs {
            object: Some(Key::new(Kind::Cluster, id).to_wire()),
            version: cluster.meta.as_ref().map_or(0, |meta| meta.version),
        })),
    }
}

/// A node.
pub fn node(state: &State, id: NodeId) -> Option<&Node> {
    match &state.get(Key::new(Kind::Node, *id.as_bytes()))?.object {
        Some(Any::Node(node)) => Some(node),
        _ => None,
    }
}

/// All nodes, by id.
pub fn nodes(state: &State) -> impl Iterator<Item = &Node> {
    state.list(Kind::Node).filter_map(|object| match &object.object {
        Some(Any::Node(node)) => Some(node),
        _ => None,
    })
}

/// All managers, by id.
pub fn managers(state: &State) -> impl Iterator<Item = &Node> {
    nodes(state).filter(|node| node.role() == WireRole::Manager)
}

/// The node whose list holds this key.
pub fn node_of_key(state: &State, key: KeyId) -> Option<&Node> {
    nodes(state).find(|node| node.keys.iter().any(|it| it.key_id == key.as_bytes()))
}

/// A task.
pub fn task(state: &State, id: TaskId) -> Option<&Task> {
    match &state.get(Key::new(Kind::Task, *id.as_bytes()))?.object {
        Some(Any::Task(task)) => Some(task),
        _ => None,
    }
}

/// The tasks that a node was given and that are still kept.
pub fn tasks_of(state: &State, node: NodeId) -> impl Iterator<Item = &Task> {
    let target = Key::new(Kind::Node, *node.as_bytes());
    state
        .referrers(target, Kind::Task)
        .filter_map(|object| match &object.object {
            Some(Any::Task(task)) => Some(task),
            _ => None,
        })
}

/// A service.
pub fn service(state: &State, id: ServiceId) -> Option<&Service> {
    match &state.get(Key::new(Kind::Service, *id.as_bytes()))?.object {
        Some(Any::Service(service)) => Some(service),
        _ => None,
    }
}

/// All secrets, by id.
pub fn secrets(state: &State) -> impl Iterator<Item = &Secret> {
    state
        .list(Kind::Secret)
        .filter_map(|object| match &object.object {
            Some(Any::Secret(secret)) => Some(secret),
            _ => None,
        })
}

/// All tickets, by id.
pub fn tickets(state: &State) -> impl Iterator<Item = &Ticket> {
    state
        .list(Kind::Ticket)
        .filter_map(|object| match &object.object {
            Some(Any::Ticket(ticket)) => Some(ticket),
            _ => None,
        })
}

/// The role as the wire writes it.
pub fn wire_role(role: Role) -> WireRole {
    match role {
        Role::Manager => WireRole::Manager,
        Role::Worker => WireRole::Worker,
        Role::Operator => WireRole::Operator,
        Role::Standby => WireRole::Standby,
    }
}

/// The role that the wire names; none where it names none.
pub fn role(wire: WireRole) -> Option<Role> {
    match wire {
        WireRole::Manager => Some(Role::Manager),
        WireRole::Worker => Some(Role::Worker),
        WireRole::Operator => Some(Role::Operator),
        WireRole::Standby => Some(Role::Standby),
        WireRole::Unspecified => None,
    }
}

/// An object as commands carry it.
pub fn object(any: Any) -> Object {
    Object { object: Some(any) }
}

/// A secret.
pub fn secret(state: &State, id: SecretId) -> Option<&Secret> {
    match &state.get(Key::new(Kind::Secret, *id.as_bytes()))?.object {
        Some(Any::Secret(secret)) => Some(secret),
        _ => None,
    }
}

/// An image.
pub fn image(state: &State, id: ImageId) -> Option<&Image> {
    match &state.get(Key::new(Kind::Image, *id.as_bytes()))?.object {
        Some(Any::Image(image)) => Some(image),
        _ => None,
    }
}

/// The spec that a task was made from, and its service.
pub fn spec_of<'a>(state: &'a State, task: &Task) -> Option<(&'a Service, &'a ServiceSpec)> {
    let service = service(state, ServiceId::try_from(task.service_id.as_slice()).ok()?)?;
    let version = service
        .versions
        .iter()
        .find(|it| it.number == task.spec_version)?;
    Some((service, version.spec.as_ref()?))
}
