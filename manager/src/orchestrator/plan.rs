//! What a plan is made of: changes that belong together, and under which conditions they hold.

use bulkhead_proto::wire::{self, change, object::Object as Any, precondition};

/// What a pass wants committed.
#[derive(Debug, Default)]
pub struct Plan {
    /// Independent of each other: a pass may commit some and find the rest again.
    pub steps: Vec<Step>,
    /// When to plan again even if nothing changes, in milliseconds since 1970.
    pub wake_at_ms: Option<i64>,
}

/// Changes that are committed together or not at all.
#[derive(Debug, Default, PartialEq)]
pub struct Step {
    /// What the plan was made from, where a change of it would make the step wrong.
    pub preconditions: Vec<wire::Precondition>,
    /// The changes, in order.
    pub changes: Vec<wire::Change>,
}

/// An object of the state: its kind, id and version, and itself as any object.
pub trait Stored: Clone {
    /// The object's reference.
    fn reference(&self) -> wire::ObjectRef;
    /// Its metadata.
    fn meta(&self) -> Option<&wire::Meta>;
    /// Without metadata, which only `apply` writes.
    fn into_object(self) -> wire::Object;
}

macro_rules! stored {
    ($($kind:ident)*) => {$(
        impl Stored for wire::$kind {
            fn reference(&self) -> wire::ObjectRef {
                wire::ObjectRef { kind: wire::Kind::$kind.into(), id: self.id.clone() }
            }
            fn meta(&self) -> Option<&wire::Meta> {
                self.meta.as_ref()
            }
            fn into_object(mut self) -> wire::Object {
                self.meta = None;
                wire::Object { object: Some(Any::$kind(self)) }
            }
        }
    )*};
}

stored!(Node Service Task);

impl Plan {
    /// Takes over what another plan wants.
    pub fn append(&mut self, other: Plan) {
        self.steps.extend(other.steps);
        other.wake_at_ms.into_iter().for_each(|at| self.wake_at(at));
    }

    /// Asks for another pass at this time at the latest.
    pub fn wake_at(&mut self, at_ms: i64) {
        self.wake_at_ms = Some(self.wake_at_ms.map_or(at_ms, |known| known.min(at_ms)));
    }
}

impl Step {
    /// Holds only while the object is as it was read.
    pub fn unless_changed(&mut self, read: &impl Stored) {
        let is = wire::VersionIs {
            object: Some(read.reference()),
            version: read.meta().map_or(0, |meta| meta.version),
        };
        self.preconditions.push(wire::Precondition {
            precondition: Some(precondition::Precondition::VersionIs(is)),
        });
    }

    /// Adds an object.
    pub fn create(&mut self, object: impl Stored) {
        self.change(change::Change::Create(object.into_object()));
    }

    /// Writes an object anew.
    pub fn replace(&mut self, object: impl Stored) {
        self.change(change::Change::Replace(object.into_object()));
    }

    /// Deletes an object.
    pub fn delete(&mut self, object: &impl Stored) {
        self.change(change::Change::Delete(object.reference()));
    }

    fn change(&mut self, change: change::Change) {
        self.changes.push(wire::Change { change: Some(change) });
    }
}
