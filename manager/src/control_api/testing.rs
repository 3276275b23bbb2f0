//! Objects and states for the tests of this module.

use bulkhead_proto::wire::{
    Image, Node, Object, Role, Secret, Service, ServiceSpec, ServiceVersion, Task, Transaction, change,
    object::Object as Any,
};
use bulkhead_proto::{CODE_KEY, Code, HINT_KEY};
use bulkhead_raft::state::{LEVEL, State};
use prost::Message as _;
use tonic::Status;

use super::change::{Decision, Plan};

fn of(any: Any) -> Object {
    Object { object: Some(any) }
}

pub(super) fn node(id: u8, name: &str, role: Role) -> Object {
    of(Any::Node(Node {
        id: vec![id; 16],
        name: name.into(),
        role: role.into(),
        ..Default::default()
    }))
}

pub(super) fn secret(id: u8, name: &str) -> Object {
    of(Any::Secret(Secret {
        id: vec![id; 16],
        name: name.into(),
        ..Default::default()
    }))
}

pub(super) fn image(id: u8, name: &str) -> Object {
    of(Any::Image(Image {
        id: vec![id; 16],
        name: name.into(),
        manifest_digest: vec![id; 32],
        ..Default::default()
    }))
}

pub(super) fn service(id: u8, name: &str, replicas: u32, edit: impl FnOnce(&mut ServiceSpec)) -> Object {
    let mut spec = ServiceSpec {
        name: name.into(),
        replicas,
        ..Default::default()
    };
    edit(&mut spec);
    of(Any::Service(Service {
        id: vec![id; 16],
        versions: vec![ServiceVersion {
            number: 1,
            spec: Some(spec),
            created_at: 0,
        }],
        ..Default::default()
    }))
}

pub(super) fn task(id: u8, service: u8, edit: impl FnOnce(&mut Task)) -> Object {
    let mut task = Task {
        id: vec![id; 16],
        service_id: vec![service; 16],
        ..Default::default()
    };
    edit(&mut task);
    of(Any::Task(task))
}

/// A state with a cluster and these objects.
pub(super) fn state(objects: impl IntoIterator<Item = Object>) -> State {
    let cluster = of(Any::Cluster(bulkhead_proto::wire::Cluster {
        id: vec![0xC1; 16],
        root_certificate: b"a root".to_vec(),
        level: LEVEL,
        ..Default::default()
    }));
    let mut state = State::default();
    for object in [cluster].into_iter().chain(objects) {
        let plan = Plan::default().with(change::Change::Create(object));
        applied(&mut state, &[0xEE; 16], plan);
    }
    state
}

/// Commits the plan as a request's; a rejected one fails the test.
pub(super) fn applied(state: &mut State, request: &[u8], plan: Plan) {
    let transaction = Transaction {
        level: LEVEL,
        request_id: request.to_vec(),
        at: 1,
        preconditions: plan.preconditions,
        changes: plan.changes,
        ..Default::default()
    };
    let index = state.index() + 1;
    let applied = state
        .apply(index, 1, &transaction.encode_to_vec())
        .expect("a known level");
    assert_eq!(applied.outcome.rejection, None);
}

/// The plan of a decision that changes something.
pub(super) fn plan(decision: Decision) -> Plan {
    match decision {
        Decision::Commit(plan) => plan,
        Decision::Done { .. } => panic!("a change was expected"),
    }
}

/// Checks code, message and hint of a refusal.
#[track_caller]
pub(super) fn refused(status: &Status, code: Code, message: &str, hint: &str) {
    let named = status.metadata().get(CODE_KEY).and_then(|it| it.to_str().ok());
    assert_eq!(named, Some(code.as_str()), "{status:?}");
    assert!(
        status.message().contains(message),
        "'{}' lacks '{message}'",
        status.message()
    );
    let said = status
        .metadata()
        .get_bin(HINT_KEY)
        .expect("a hint")
        .to_bytes()
        .expect("base64");
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains(hint), "'{said}' lacks '{hint}'");
}
