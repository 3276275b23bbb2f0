//! From a request to a commit: what is decided from one view of the state is proposed under the condition that it still
//! holds, decided again if it did not, and answered from the state after it.

use bulkhead_proto::wire::{
    Change, Image, Kind, Node, ObjectRef, Outcome, Precondition, Rejection, RejectionCode, Secret, Service,
    Task, VersionIs, change, precondition,
};
use bulkhead_proto::{Code, RequestId};
use bulkhead_raft::state::{Key, State};
use tonic::Status;

use super::object::{Kept, get, id_text, label};
use crate::refusal::refuse;

/// A change that others overtook is decided anew this often. Nodes report several times a second; five in a row is a
/// quarrel that a person should see.
pub(super) const ATTEMPTS: usize = 5;

/// What a request comes to in one view of the state.
#[derive(Debug)]
pub(super) enum Decision {
    /// It stands already: a retry, or the same again.
    Done {
        /// The object.
        id: Vec<u8>,
        /// Its version.
        version: u64,
    },
    /// These changes, under these conditions.
    Commit(Plan),
}

impl Decision {
    pub(super) fn done<T: Kept>(object: &T) -> Self {
        Decision::Done {
            id: object.id().to_vec(),
            version: object.version(),
        }
    }
}

impl From<Plan> for Decision {
    fn from(plan: Plan) -> Self {
        Decision::Commit(plan)
    }
}

/// Changes that are committed together.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// The object that the answer names.
    pub(super) id: Vec<u8>,
    pub(super) preconditions: Vec<Precondition>,
    pub(super) changes: Vec<Change>,
}

impl Plan {
    pub(super) fn about(id: &[u8]) -> Self {
        Self {
            id: id.to_vec(),
            ..Self::default()
        }
    }

    /// Holds only while the object is as it was read.
    pub(super) fn unless_changed<T: Kept>(mut self, read: &T) -> Self {
        self.preconditions.push(Precondition {
            precondition: Some(precondition::Precondition::VersionIs(VersionIs {
                object: Some(read.reference()),
                version: read.version(),
            })),
        });
        self
    }

    pub(super) fn create<T: Kept>(self, object: T) -> Self {
        self.with(change::Change::Create(object.object()))
    }

    pub(super) fn replace<T: Kept>(self, object: T) -> Self {
        self.with(change::Change::Replace(object.object()))
    }

    pub(super) fn delete<T: Kept>(self, object: &T) -> Self {
        self.with(change::Change::Delete(object.reference()))
    }

    pub(super) fn with(mut self, change: change::Change) -> Self {
        self.changes.push(Change { change: Some(change) });
        self
    }
}

/// A request's own id.
pub(super) fn request_id(bytes: &[u8]) -> Result<RequestId, Status> {
    RequestId::try_from(bytes).map_err(|error| malformed(&error.to_string()))
}

/// The id that a client chose for what it creates.
pub(super) fn new_id(bytes: &[u8]) -> Result<[u8; 16], Status> {
    let wrong = |_| {
        malformed(&format!(
            "an object id has 16 bytes, this one has {}",
            bytes.len()
        ))
    };
    bytes.try_into().map_err(wrong)
}

fn malformed(what: &str) -> Status {
    refuse(
        Code::Invalid,
        tonic::Code::InvalidArgument,
        what,
        "use a client of this cluster's version",
    )
}

/// Whether the decision was overtaken.
pub(super) fn is_stale(outcome: &Outcome) -> bool {
    outcome
        .rejection
        .as_ref()
        .is_some_and(|it| it.code() == RejectionCode::Stale)
}

/// Why the commit was refused.
pub(super) fn rejected(state: &State, rejection: &Rejection) -> Status {
    let object = rejection.object.as_ref();
    let what = object.map_or_else(|| "the object".to_owned(), |it| describe(state, it));
    let (code, grpc, message, hint) = match rejection.code() {
        RejectionCode::Stale => return overtaken(&what),
        RejectionCode::Referenced => return in_use(&what, &users(state, object)),
        RejectionCode::NameTaken => (
            Code::NameTaken,
            tonic::Code::AlreadyExists,
            "another object of this kind has the name".to_owned(),
            "choose another name, or remove the other object first",
        ),
        RejectionCode::Exists => (
            Code::Conflict,
            tonic::Code::AlreadyExists,
            format!("{what} exists, made by another request"),
            "send the request with a new object id",
        ),
        RejectionCode::NotFound => (
            Code::NotFound,
            tonic::Code::NotFound,
            format!("{what} is no longer there"),
            "list the objects again",
        ),
        RejectionCode::Dangling => (
            Code::UnknownReference,
            tonic::Code::FailedPrecondition,
            format!("it refers to {what}, which is not there"),
            "create what it refers to first",
        ),
        RejectionCode::Unspecified | RejectionCode::Ticket | RejectionCode::Invalid | RejectionCode::Term => {
            (
                Code::Invalid,
                tonic::Code::InvalidArgument,
                format!("{what}: {}", rejection.detail),
                "correct the request",
            )
        }
    };
    refuse(code, grpc, message, hint)
}

/// The object changed between reading and writing it.
pub(super) fn overtaken(what: &str) -> Status {
    refuse(
        Code::Conflict,
        tonic::Code::Aborted,
        format!("{what} changed meanwhile"),
        "look at it again, and repeat the change if it still makes sense",
    )
}

/// Something still needs what should go.
pub(super) fn in_use(what: &str, users: &[String]) -> Status {
    const SHOWN: usize = 10;
    let by = match users {
        [] => "another object".to_owned(),
        [..] if users.len() > SHOWN => {
            format!("{} and {} more", users[..SHOWN].join(", "), users.len() - SHOWN)
        }
        [..] => users.join(", "),
    };
    refuse(
        Code::InUse,
        tonic::Code::FailedPrecondition,
        format!("{what} is used by {by}"),
        "change or remove what uses it first",
    )
}

fn describe(state: &State, object: &ObjectRef) -> String {
    fn named<T: Kept>(noun: &str, state: &State, id: &[u8]) -> Option<String> {
        get::<T>(state, id).map(|it| format!("{noun} {}", label(it)))
    }
    let id = &object.id;
    let described = match object.kind() {
        Kind::Service => named::<Service>("service", state, id),
        Kind::Secret => named::<Secret>("secret", state, id),
        Kind::Image => named::<Image>("image", state, id),
        Kind::Node => named::<Node>("node", state, id),
        Kind::Unspecified | Kind::Cluster | Kind::Ticket | Kind::Task => None,
    };
    described.unwrap_or_else(|| format!("object {}", id_text(id)))
}

/// Who refers to an object, as a person knows them.
pub(super) fn users(state: &State, object: Option<&ObjectRef>) -> Vec<String> {
    let Some(key) = object.and_then(Key::from_wire) else {
        return Vec::new();
    };
    let services = state
        .referrers(key, Kind::Service)
        .filter_map(|it| Service::of(it));
    let tasks = state.referrers(key, Kind::Task).filter_map(|it| Task::of(it));
    services
        .map(|it| format!("service {}", label(it)))
        .chain(tasks.map(|it| format!("task {}", label(it))))
        .collect()
}
