use bulkhead_proto::wire::{
    Change, Cluster, Image, Kind, Node, Object, RejectionCode, Role, Secret, SecretReference, Service,
    ServiceSpec, ServiceVersion, Task, TaskObserved, TaskState, TaskStatus, Ticket, TicketUse, Transaction,
    change::Change as Step, object::Object as Any,
};
use proptest::prelude::*;
use prost::Message as _;

use super::{Decoder, EventRing, FatalApply, Key, State, chunks};

fn id(n: u8) -> Vec<u8> {
    vec![n; 16]
}

fn object(any: Any) -> Object {
    Object { object: Some(any) }
}

fn secret(n: u8, name: &str) -> Object {
    object(Any::Secret(Secret {
        id: id(n),
        name: name.into(),
        ..Default::default()
    }))
}

fn service(n: u8, secret: u8) -> Object {
    let secrets = vec![SecretReference {
        secret_id: id(secret),
        name: "s".into(),
    }];
    let spec = ServiceSpec {
        name: format!("service-{n}"),
        secrets,
        ..Default::default()
    };
    let versions = vec![ServiceVersion {
        number: 1,
        spec: Some(spec),
        created_at: 0,
    }];
    object(Any::Service(Service {
        id: id(n),
        versions,
        ..Default::default()
    }))
}

fn node(n: u8) -> Object {
    object(Any::Node(Node {
        id: id(n),
        name: format!("node-{n}"),
        ..Default::default()
    }))
}

fn task(n: u8, service: u8, node: u8, state: TaskState) -> Object {
    let status = Some(TaskStatus {
        state: state.into(),
        ..Default::default()
    });
    object(Any::Task(Task {
        id: id(n),
        service_id: id(service),
        node_id: id(node),
        status,
        ..Default::default()
    }))
}

fn delete(kind: Kind, n: u8) -> Step {
    Step::Delete(Key::new(kind, [n; 16]).to_wire())
}

fn observed(task: u8, node: u8, state: TaskState) -> Step {
    let status = Some(TaskStatus {
        state: state.into(),
        ..Default::default()
    });
    Step::TaskObserved(TaskObserved {
        task_id: id(task),
        node_id: id(node),
        status,
    })
}

fn transaction(request: u8, steps: Vec<Step>) -> Vec<u8> {
    let changes = steps
        .into_iter()
        .map(|step| Change { change: Some(step) })
        .collect();
    Transaction {
        level: 1,
        request_id: vec![request],
        at: 1_000,
        changes,
        ..Default::default()
    }
    .encode_to_vec()
}

/// Applies at the next index; gives the code of the refusal.
fn apply(state: &mut State, request: u8, steps: Vec<Step>) -> Option<RejectionCode> {
    let index = state.index() + 1;
    let applied = state
        .apply(index, 1, &transaction(request, steps))
        .expect("a known level");
    assert_eq!((applied.outcome.index, state.index()), (index, index));
    applied.outcome.rejection.map(|it| it.code())
}

fn state_of(state: &State, n: u8) -> TaskState {
    match &state.get(Key::new(Kind::Task, [n; 16])).expect("created").object {
        Some(Any::Task(task)) => task.status.as_ref().expect("has one").state(),
        _ => unreachable!("the key says task"),
    }
}

/// A manager that stood still has copies of requests whose callers went to another one long ago.
#[test]
fn a_late_copy_of_a_request_does_not_bring_back_what_was_removed() {
    let mut state = State::default();
    assert_eq!(apply(&mut state, 1, vec![Step::Create(secret(1, "db"))]), None);
    assert_eq!(apply(&mut state, 2, vec![delete(Kind::Secret, 1)]), None);
    let mut decoder = None;
    for chunk in chunks(&state) {
        match &mut decoder {
            None => decoder = Some(Decoder::new(&chunk).expect("a header")),
            Some(decoder) => decoder.push(&chunk).expect("a chunk"),
        }
    }
    let restored = decoder.expect("a header").finish().expect("whole");
    for mut state in [state, restored] {
        let late = apply(&mut state, 1, vec![Step::Create(secret(1, "db"))]);
        assert_eq!(late, Some(RejectionCode::NotFound));
        assert_eq!(state.get(Key::new(Kind::Secret, [1; 16])), None);
        // Another request may take the name, and the id.
        assert_eq!(apply(&mut state, 3, vec![Step::Create(secret(1, "db"))]), None);
    }
}

#[test]
fn a_name_is_held_by_one_object_and_free_after_its_deletion() {
    let mut state = State::default();
    assert_eq!(apply(&mut state, 1, vec![Step::Create(secret(1, "db"))]), None);
    assert_eq!(
        apply(&mut state, 2, vec![Step::Create(secret(2, "db"))]),
        Some(RejectionCode::NameTaken)
    );
    assert_eq!(
        apply(&mut state, 3, vec![Step::Create(secret(1, "other"))]),
        Some(RejectionCode::Exists)
    );
    assert_eq!(apply(&mut state, 4, vec![delete(Kind::Secret, 1)]), None);
    assert_eq!(apply(&mut state, 5, vec![delete(Kind::Secret, 1)]), None);
    assert_eq!(apply(&mut state, 6, vec![Step::Create(secret(2, "db"))]), None);
    assert!(state.by_name(Kind::Secret, "db").is_some());
}

#[test]
fn a_refused_transaction_leaves_nothing_behind() {
    let mut state = State::default();
    let before = state.digest();
    let steps = vec![Step::Create(secret(1, "db")), Step::Create(service(2, 9))];
    assert_eq!(apply(&mut state, 1, steps), Some(RejectionCode::Dangling));
    assert_eq!(state.digest(), before);
    assert!(state.get(Key::new(Kind::Secret, [1; 16])).is_none());
}

#[test]
fn what_is_referred_to_stays() {
    let mut state = State::default();
    assert_eq!(
        apply(
            &mut state,
            1,
            vec![Step::Create(secret(1, "db")), Step::Create(service(2, 1))]
        ),
        None
    );
    assert_eq!(
        apply(&mut state, 2, vec![delete(Kind::Secret, 1)]),
        Some(RejectionCode::Referenced)
    );
    assert_eq!(
        state
            .referrers(Key::new(Kind::Secret, [1; 16]), Kind::Service)
            .count(),
        1
    );
    assert_eq!(
        apply(
            &mut state,
            3,
            vec![delete(Kind::Service, 2), delete(Kind::Secret, 1)]
        ),
        None
    );
    assert!(
        state
            .list(Kind::Service)
            .chain(state.list(Kind::Secret))
            .next()
            .is_none()
    );
}

#[test]
fn a_node_goes_when_only_ended_tasks_ran_there_and_their_records_stay() {
    let mut state = State::default();
    let steps = vec![
        secret(1, "db"),
        service(2, 1),
        node(3),
        task(5, 2, 3, TaskState::Running),
    ];
    let steps = steps.into_iter().map(Step::Create).collect();
    assert_eq!(apply(&mut state, 1, steps), None);
    let remove = || delete(Kind::Node, 3);
    assert_eq!(
        apply(&mut state, 2, vec![remove()]),
        Some(RejectionCode::Referenced)
    );
    let lost = || Step::Replace(task(5, 2, 3, TaskState::Lost));
    assert_eq!(apply(&mut state, 3, vec![lost(), remove()]), None);
    assert_eq!(
        apply(&mut state, 4, vec![lost()]),
        None,
        "the record can change still"
    );
    let node_key = Key::new(Kind::Node, [3; 16]);
    assert_eq!(state.referrers(node_key, Kind::Task).count(), 1);
    let late = Step::Create(task(6, 2, 3, TaskState::Assigned));
    assert_eq!(
        apply(&mut state, 5, vec![late]),
        Some(RejectionCode::Dangling),
        "no task starts on a node that is gone"
    );
}

#[test]
fn a_ticket_admits_as_often_as_it_says_and_a_retry_counts_once() {
    let mut state = State::default();
    let ticket = Ticket {
        id: id(1),
        uses_left: 1,
        expires_at: 2_000,
        ..Default::default()
    };
    let spend = || {
        Step::UseTicket(TicketUse {
            ticket_id: id(1),
            waiting: None,
        })
    };
    assert_eq!(
        apply(&mut state, 1, vec![Step::Create(object(Any::Ticket(ticket)))]),
        None
    );
    assert_eq!(apply(&mut state, 2, vec![spend(), Step::Create(node(1))]), None);
    assert_eq!(apply(&mut state, 2, vec![spend(), Step::Create(node(1))]), None);
    assert_eq!(
        apply(&mut state, 3, vec![spend(), Step::Create(node(2))]),
        Some(RejectionCode::Ticket)
    );
    assert!(state.by_name(Kind::Node, "node-2").is_none());
    let expired = Ticket {
        id: id(2),
        uses_left: 1,
        expires_at: 1_000,
        ..Default::default()
    };
    assert_eq!(
        apply(&mut state, 4, vec![Step::Create(object(Any::Ticket(expired)))]),
        None
    );
    let spend = Step::UseTicket(TicketUse {
        ticket_id: id(2),
        waiting: None,
    });
    assert_eq!(apply(&mut state, 5, vec![spend]), Some(RejectionCode::Ticket));
}

#[test]
fn another_node_under_the_request_of_the_last_one_is_no_retry() {
    let mut state = State::default();
    let ticket = Ticket {
        id: id(1),
        uses_left: 1,
        expires_at: i64::MAX,
        ..Default::default()
    };
    assert_eq!(
        apply(&mut state, 1, vec![Step::Create(object(Any::Ticket(ticket)))]),
        None
    );
    let join = |n| {
        vec![
            Step::UseTicket(TicketUse {
                ticket_id: id(1),
                waiting: None,
            }),
            Step::Create(node(n)),
        ]
    };
    assert_eq!(apply(&mut state, 2, join(7)), None);
    assert_eq!(
        apply(&mut state, 2, join(7)),
        None,
        "the same join again is a retry"
    );
    assert_eq!(apply(&mut state, 2, join(8)), Some(RejectionCode::Ticket));
    assert_eq!(state.list(Kind::Node).count(), 1);
}

#[test]
fn a_task_never_goes_back_and_only_its_owner_reports() {
    let mut state = State::default();
    let steps = vec![
        secret(1, "db"),
        service(2, 1),
        node(3),
        node(4),
        task(5, 2, 3, TaskState::Assigned),
    ];
    assert_eq!(
        apply(&mut state, 1, steps.into_iter().map(Step::Create).collect()),
        None
    );
    let mut report = |node, reported, expected| {
        assert_eq!(apply(&mut state, 9, vec![observed(5, node, reported)]), None);
        assert_eq!(state_of(&state, 5), expected);
    };
    report(4, TaskState::Failed, TaskState::Assigned);
    report(3, TaskState::Running, TaskState::Running);
    report(3, TaskState::Starting, TaskState::Running);
    report(3, TaskState::Failed, TaskState::Failed);
    report(3, TaskState::Rejected, TaskState::Failed);
    let claim = Step::Replace(task(5, 2, 3, TaskState::Running));
    assert_eq!(apply(&mut state, 10, vec![claim]), None);
    assert_eq!(state_of(&state, 5), TaskState::Failed);
}

#[test]
fn an_unknown_level_stops_the_replica_unchanged() {
    let mut state = State::default();
    let bytes = Transaction {
        level: 2,
        ..Default::default()
    }
    .encode_to_vec();
    assert_eq!(
        state.apply(1, 1, &bytes).expect_err("too new"),
        FatalApply::UnknownLevel { index: 1, level: 2 }
    );
    assert_eq!(state.index(), 0);
}

#[test]
fn a_ring_says_when_it_forgot() {
    let mut state = State::default();
    let mut ring = EventRing::new(0, 2);
    for n in 1..=4 {
        let bytes = transaction(n, vec![Step::Create(node(n))]);
        ring.push(state.apply(n.into(), 1, &bytes).expect("a known level").events);
    }
    assert_eq!(ring.since(1).expect_err("gone").floor, 2);
    let seen: Vec<u64> = ring
        .since(2)
        .expect("kept")
        .iter()
        .map(|event| event.index)
        .collect();
    assert_eq!(seen, [3, 4]);
    assert!(ring.since(4).expect("kept").is_empty());
}

#[test]
fn a_damaged_snapshot_is_refused() {
    let mut state = State::default();
    assert_eq!(apply(&mut state, 1, vec![Step::Create(secret(1, "db"))]), None);
    let mut parts: Vec<_> = chunks(&state).collect();
    assert!(Decoder::new(&parts[0]).expect("a header").finish().is_err());
    let last = parts[1].len() - 1;
    parts[1][last] ^= 1;
    let mut decoder = Decoder::new(&parts[0]).expect("a header");
    assert!(decoder.push(&parts[1]).and_then(|()| decoder.finish()).is_err());
}

fn any_step() -> impl Strategy<Value = Step> {
    let small = || 0..4u8;
    let states = prop::sample::select(vec![
        TaskState::Pending,
        TaskState::Preparing,
        TaskState::Running,
        TaskState::Failed,
        TaskState::Lost,
    ]);
    let image = |n: u8| {
        object(Any::Image(Image {
            id: id(n),
            name: format!("image-{n}"),
            ..Default::default()
        }))
    };
    let any_object = prop_oneof![
        small().prop_map(node),
        small().prop_map(image),
        (small(), small()).prop_map(|(n, name)| secret(n, &format!("s{name}"))),
        (small(), small()).prop_map(|(n, s)| service(n, s)),
        (small(), small(), small(), states.clone()).prop_map(|(n, s, on, state)| task(n, s, on, state)),
        Just(Object::default()),
    ];
    prop_oneof![
        4 => any_object.clone().prop_map(Step::Create),
        2 => any_object.prop_map(Step::Replace),
        2 => (0..9i32, small()).prop_map(|(kind, n)| Step::Delete(bulkhead_proto::wire::ObjectRef { kind, id: id(n) })),
        2 => (small(), small(), states).prop_map(|(t, n, state)| observed(t, n, state)),
        1 => prop::collection::vec(any::<u8>(), 0..20).prop_map(|ticket_id| Step::UseTicket(TicketUse { ticket_id, waiting: None })),
    ]
}

proptest! {
    #[test]
    fn replicas_agree_and_a_snapshot_is_the_state(
        log in prop::collection::vec((0..20u8, prop::collection::vec(any_step(), 0..4)), 0..60),
    ) {
        let (mut one, mut other) = (State::default(), State::default());
        for (request, steps) in log {
            apply(&mut one, request, steps.clone());
            apply(&mut other, request, steps);
            prop_assert_eq!(one.digest(), other.digest());
        }
        let mut parts = chunks(&one);
        let mut decoder = Decoder::new(&parts.next().expect("a header")).expect("its own header");
        for part in parts {
            decoder.push(&part).expect("its own record");
        }
        let restored = decoder.finish().expect("whole");
        prop_assert_eq!(restored.index(), one.index());
        prop_assert_eq!(&restored.objects, &one.objects);
        prop_assert_eq!(&restored.names, &one.names);
        prop_assert_eq!(&restored.references, &one.references);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _applied_or_fatal = State::default().apply(1, 1, &bytes);
    }
}

#[test]
fn a_manager_gets_a_member_id_that_nobody_chose_or_had() {
    let manager = |n: u8, asked: u64| {
        object(Any::Node(Node {
            id: id(n),
            name: format!("manager-{n}"),
            role: Role::Manager.into(),
            member_id: asked,
            ..Default::default()
        }))
    };
    let member = |state: &State, n: u8| match &state.get(Key::new(Kind::Node, [n; 16])).expect("there").object
    {
        Some(Any::Node(node)) => node.member_id,
        _ => unreachable!("the key says node"),
    };
    let mut state = State::default();
    state.skip(1);
    let cluster = object(Any::Cluster(Cluster {
        id: id(0),
        ..Default::default()
    }));
    assert_eq!(
        apply(
            &mut state,
            1,
            vec![Step::Create(cluster), Step::Create(manager(1, 7))]
        ),
        None
    );
    assert_eq!(apply(&mut state, 2, vec![Step::Create(manager(2, 1))]), None);
    assert_eq!(apply(&mut state, 3, vec![Step::Replace(manager(2, 1))]), None);
    assert_eq!((member(&state, 1), member(&state, 2)), (1, 3));
    let worker = object(Any::Node(Node {
        id: id(2),
        name: "manager-2".into(),
        role: Role::Worker.into(),
        ..Default::default()
    }));
    assert_eq!(
        apply(&mut state, 4, vec![Step::Replace(worker)]),
        Some(RejectionCode::Invalid)
    );
}
