//! What every object has in common: its key, name, metadata and the objects it refers to.

use bulkhead_proto::wire::{Kind, Meta, Object, ObjectRef, TaskState, object::Object as Any};

/// Kind and id of an object; ordered by kind, then id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Key {
    kind: Kind,
    id: [u8; 16],
}

impl Key {
    pub(super) const MIN: Key = Key {
        kind: Kind::Unspecified,
        id: [0; 16],
    };
    pub(super) const MAX: Key = Key {
        kind: Kind::Task,
        id: [0xff; 16],
    };

    /// The key of this kind and id.
    pub const fn new(kind: Kind, id: [u8; 16]) -> Self {
        Self { kind, id }
    }

    /// The object's kind.
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// The object's id.
    pub const fn id(&self) -> &[u8; 16] {
        &self.id
    }

    /// The reference as messages carry it.
    pub fn to_wire(self) -> ObjectRef {
        ObjectRef {
            kind: self.kind.into(),
            id: self.id.to_vec(),
        }
    }

    /// A reference from outside: a known kind and an id of sixteen bytes, or nothing.
    pub fn from_wire(reference: &ObjectRef) -> Option<Self> {
        let kind = Kind::try_from(reference.kind).ok()?;
        if kind == Kind::Unspecified {
            return None;
        }
        parse(kind, &reference.id)
    }

    pub(super) const fn first(kind: Kind) -> Self {
        Self { kind, id: [0; 16] }
    }

    pub(super) const fn last(kind: Kind) -> Self {
        Self { kind, id: [0xff; 16] }
    }

    pub(super) fn prefix(kind: Kind, prefix: &[u8]) -> Option<Self> {
        let mut id = [0; 16];
        id.get_mut(..prefix.len())?.copy_from_slice(prefix);
        Some(Self { kind, id })
    }
}

fn parse(kind: Kind, id: &[u8]) -> Option<Key> {
    Some(Key {
        kind,
        id: id.try_into().ok()?,
    })
}

/// The object's key, if its id has the right length.
pub(super) fn key(object: &Object) -> Option<Key> {
    let (kind, id) = match object.object.as_ref()? {
        Any::Cluster(it) => (Kind::Cluster, &it.id),
        Any::Node(it) => (Kind::Node, &it.id),
        Any::Ticket(it) => (Kind::Ticket, &it.id),
        Any::Secret(it) => (Kind::Secret, &it.id),
        Any::Image(it) => (Kind::Image, &it.id),
        Any::Service(it) => (Kind::Service, &it.id),
        Any::Task(it) => (Kind::Task, &it.id),
    };
    parse(kind, id)
}

/// The name that is unique in its kind. The cluster's is fixed, so that there is never a second.
pub(super) fn name(object: &Object) -> Option<&str> {
    match object.object.as_ref()? {
        Any::Cluster(_) => Some("cluster"),
        Any::Node(it) => Some(&it.name),
        Any::Secret(it) => Some(&it.name),
        Any::Image(it) => Some(&it.name),
        Any::Service(it) => Some(it.versions.last()?.spec.as_ref()?.name.as_str()),
        Any::Ticket(_) | Any::Task(_) => None,
    }
}

/// The ids an object refers to, as it gives them; an empty one refers to nothing.
fn targets(object: &Object) -> Vec<(Kind, &[u8])> {
    let mut targets: Vec<(Kind, &[u8])> = Vec::new();
    match &object.object {
        Some(Any::Service(service)) => {
            for spec in service
                .versions
                .iter()
                .filter_map(|version| version.spec.as_ref())
            {
                targets.push((Kind::Image, &spec.image_id));
                targets.extend(
                    spec.secrets
                        .iter()
                        .map(|it| (Kind::Secret, it.secret_id.as_slice())),
                );
            }
        }
        Some(Any::Task(task)) => {
            targets.push((Kind::Service, &task.service_id));
            targets.push((Kind::Node, &task.node_id));
        }
        // A node outlives the ticket that admitted it, so its ticket id is history and no reference.
        Some(Any::Cluster(_) | Any::Node(_) | Any::Ticket(_) | Any::Secret(_) | Any::Image(_)) | None => {}
    }
    targets.retain(|(_, id)| !id.is_empty());
    targets
}

/// The objects that this one refers to.
pub(super) fn references(object: &Object) -> Vec<Key> {
    targets(object)
        .into_iter()
        .filter_map(|(kind, id)| parse(kind, id))
        .collect()
}

/// Whether the object cannot do without `target`, which it refers to. The node of an ended task is history: it may be
/// removed, and the task's record still says where it ran.
pub(super) fn needs(object: &Object, target: Key) -> bool {
    match &object.object {
        Some(Any::Task(task)) if target.kind == Kind::Node => {
            let state = task.status.as_ref().map_or(0, |status| status.state);
            state < i32::from(TaskState::Complete)
        }
        _ => true,
    }
}

/// Whether every id that the object refers to has the length of an id.
pub(super) fn references_well_formed(object: &Object) -> bool {
    targets(object).iter().all(|(_, id)| id.len() == 16)
}

/// The object's metadata.
pub(super) fn meta(object: &Object) -> Option<&Meta> {
    match object.object.as_ref()? {
        Any::Cluster(it) => it.meta.as_ref(),
        Any::Node(it) => it.meta.as_ref(),
        Any::Ticket(it) => it.meta.as_ref(),
        Any::Secret(it) => it.meta.as_ref(),
        Any::Image(it) => it.meta.as_ref(),
        Any::Service(it) => it.meta.as_ref(),
        Any::Task(it) => it.meta.as_ref(),
    }
}

pub(super) fn set_meta(object: &mut Object, meta: Meta) {
    let slot = match &mut object.object {
        Some(Any::Cluster(it)) => &mut it.meta,
        Some(Any::Node(it)) => &mut it.meta,
        Some(Any::Ticket(it)) => &mut it.meta,
        Some(Any::Secret(it)) => &mut it.meta,
        Some(Any::Image(it)) => &mut it.meta,
        Some(Any::Service(it)) => &mut it.meta,
        Some(Any::Task(it)) => &mut it.meta,
        None => return,
    };
    *slot = Some(meta);
}
