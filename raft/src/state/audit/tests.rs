use bulkhead_proto::audit::Head;
use bulkhead_proto::limits;
use bulkhead_proto::wire::{
    AddTombstone, AuditAction as Action, AuditNote, AuditRecord, Autolock, Availability, Change, CloneSeen,
    Cluster, ClusterSettings, DesiredState, Envelope, ExternalSigner, FormerRoot, KeyRingEpoch, Kind, Label,
    Node, NodeDescription, NodeKey, NodeStatus, Object, RejectionCode, Role, Rotation, RotationPhase, Sealed,
    Secret, SecretReference, Service, ServiceSpec, ServiceVersion, SupersededKey, Task, TaskObserved,
    TaskState, TaskStatus, Ticket, TicketUse, Tombstone, Transaction, change::Change as Step,
    object::Object as Any,
};
use proptest::prelude::*;
use prost::Message as _;

use super::super::{Decoder, Key, State, chunks};

const HOUR: i64 = 3_600_000;

/// The nodes, the ticket and the secret that the tests are about.
const BOSS: u8 = 1;
const WORKER: u8 = 2;
const TICKET: u8 = 5;
const SECRET: u8 = 6;
const SERVICE: u8 = 7;

fn id(n: u8) -> Vec<u8> {
    vec![n; 16]
}

fn object(any: Any) -> Object {
    Object { object: Some(any) }
}

fn create(any: Any) -> Step {
    Step::Create(object(any))
}

fn replace(any: Any) -> Step {
    Step::Replace(object(any))
}

fn delete(kind: Kind, n: u8) -> Step {
    Step::Delete(Key::new(kind, [n; 16]).to_wire())
}

fn actor(n: u8) -> String {
    format!("manager/{}", bulkhead_proto::NodeId::from_bytes([n; 16]))
}

fn transaction(request: u8, at: i64, steps: Vec<Step>) -> Vec<u8> {
    Transaction {
        level: 1,
        request_id: vec![request; 16],
        actor: actor(BOSS),
        at,
        changes: steps
            .into_iter()
            .map(|step| Change { change: Some(step) })
            .collect(),
        ..Default::default()
    }
    .encode_to_vec()
}

fn apply(state: &mut State, request: u8, at: i64, steps: Vec<Step>) -> Option<RejectionCode> {
    let index = state.index() + 1;
    let bytes = transaction(request, at, steps);
    let applied = state.apply(index, 1, &bytes).expect("a known level");
    applied.outcome.rejection.map(|it| it.code())
}

fn must(state: &mut State, steps: Vec<Step>) {
    let request = u8::try_from(state.index() % 200).expect("small");
    assert_eq!(apply(state, request, 1_000, steps), None);
}

fn key(n: u8) -> NodeKey {
    NodeKey {
        key_id: vec![n; 32],
        not_after: 9_000,
        ..Default::default()
    }
}

fn a_node(n: u8, role: Role) -> Node {
    Node {
        id: id(n),
        name: format!("node-{n}"),
        role: role.into(),
        keys: vec![key(n)],
        ..Default::default()
    }
}

fn a_cluster() -> Cluster {
    Cluster {
        id: id(9),
        root_certificate: b"old".to_vec(),
        level: 1,
        ..Default::default()
    }
}

fn a_secret(n: u8) -> Secret {
    Secret {
        id: id(n),
        name: format!("secret-{n}"),
        value: Some(Sealed {
            epoch: 1,
            nonce: vec![1],
            ciphertext: vec![0xC5; 16],
        }),
        ..Default::default()
    }
}

fn a_ticket() -> Ticket {
    Ticket {
        id: id(TICKET),
        role: Role::Worker.into(),
        secret_hash: vec![0xC5; 32],
        expires_at: 5_000,
        uses_left: 2,
        ..Default::default()
    }
}

fn a_service(secrets: &[u8]) -> Service {
    let secrets = secrets.iter().map(|n| SecretReference {
        secret_id: id(*n),
        name: String::new(),
    });
    Service {
        id: id(SERVICE),
        versions: vec![ServiceVersion {
            number: 1,
            spec: Some(ServiceSpec {
                name: "web".into(),
                secrets: secrets.collect(),
                ..Default::default()
            }),
            created_at: 0,
        }],
        ..Default::default()
    }
}

fn a_task(n: u8, node: Option<u8>) -> Task {
    Task {
        id: id(n),
        service_id: id(SERVICE),
        spec_version: 1,
        node_id: node.map(id).unwrap_or_default(),
        desired: DesiredState::Running.into(),
        ..Default::default()
    }
}

/// A cluster with a manager, a worker, a ticket, a secret and a service that uses it.
fn given() -> State {
    let mut state = State::default();
    must(
        &mut state,
        vec![
            create(Any::Cluster(a_cluster())),
            create(Any::Node(a_node(BOSS, Role::Manager))),
            create(Any::Node(a_node(WORKER, Role::Worker))),
            create(Any::Ticket(a_ticket())),
            create(Any::Secret(a_secret(SECRET))),
            create(Any::Service(a_service(&[SECRET]))),
        ],
    );
    state
}

/// The records of one transaction, as action, kind and name of the object, and detail.
fn made(state: &mut State, steps: Vec<Step>) -> Vec<String> {
    let before = state.audit().head().sequence;
    must(state, steps);
    state.audit().since(before).map(|it| line(it)).collect()
}

fn line(record: &AuditRecord) -> String {
    let kind = |of: &Option<bulkhead_proto::wire::ObjectRef>| of.as_ref().map(|it| it.kind().as_str_name());
    [
        bulkhead_proto::audit::word(record.action()).to_owned(),
        kind(&record.object).unwrap_or_default().to_owned(),
        record.name.clone(),
        kind(&record.related).unwrap_or_default().to_owned(),
        record.related_name.clone(),
        record.detail.clone(),
    ]
    .into_iter()
    .filter(|it| !it.is_empty())
    .collect::<Vec<_>>()
    .join(" ")
}

fn tombstone(key: u8, node: u8) -> Step {
    Step::AddTombstone(AddTombstone {
        tombstone: Some(Tombstone {
            key_id: vec![key; 32],
            node_id: id(node),
            removed_at: 1_000,
            ..Default::default()
        }),
    })
}

fn clone_from(address: &str) -> CloneSeen {
    CloneSeen {
        at: 1_000,
        key_id: vec![7; 32],
        address: address.into(),
    }
}

#[test]
fn each_kind_of_change_makes_its_one_record() {
    let worker = |edit: fn(&mut Node)| {
        let mut node = a_node(WORKER, Role::Worker);
        edit(&mut node);
        replace(Any::Node(node))
    };
    let boss = |edit: fn(&mut Node)| {
        let mut node = a_node(BOSS, Role::Manager);
        edit(&mut node);
        replace(Any::Node(node))
    };
    let cluster = |edit: fn(&mut Cluster)| {
        let mut cluster = a_cluster();
        edit(&mut cluster);
        replace(Any::Cluster(cluster))
    };
    let secret = |edit: fn(&mut Secret)| {
        let mut secret = a_secret(SECRET);
        edit(&mut secret);
        replace(Any::Secret(secret))
    };
    let joiner = Node {
        ticket_id: id(TICKET),
        ..a_node(3, Role::Worker)
    };
    let ticket_use = Step::UseTicket(TicketUse {
        ticket_id: id(TICKET),
        waiting: None,
    });
    let check = |what: &str, steps: Vec<Step>, expected: &[&str]| {
        assert_eq!(made(&mut given(), steps), expected, "{what}");
    };
    check(
        "a node joins by a ticket",
        vec![ticket_use.clone(), create(Any::Node(joiner))],
        &["join KIND_NODE node-3 KIND_TICKET"],
    );
    check(
        "a use without a node",
        vec![ticket_use],
        &["change KIND_TICKET uses left: 1"],
    );
    check(
        "an operator is issued",
        vec![create(Any::Node(a_node(4, Role::Operator)))],
        &["issue KIND_NODE node-4"],
    );
    check(
        "a renewal",
        vec![worker(|it| it.keys.push(key(40)))],
        &["renew KIND_NODE node-2"],
    );
    check(
        "a new certificate of the same key",
        vec![worker(|it| it.keys[0].certificate = vec![1])],
        &["renew KIND_NODE node-2"],
    );
    check(
        "a key is forgotten",
        vec![worker(|it| it.keys.clear())],
        &["change KIND_NODE node-2 keys"],
    );
    check(
        "a removal",
        vec![tombstone(2, WORKER), delete(Kind::Node, WORKER)],
        &["remove KIND_NODE node-2"],
    );
    check(
        "a quarantine",
        vec![
            tombstone(2, WORKER),
            worker(|it| {
                it.keys.clear();
                it.quarantined_at = 1_000;
                it.availability = Availability::Drain.into();
            }),
        ],
        &["quarantine KIND_NODE node-2"],
    );
    check(
        "a clone of a worker, which is in quarantine by that",
        vec![
            tombstone(2, WORKER),
            worker(|it| {
                it.keys.clear();
                it.quarantined_at = 1_000;
                it.clone_seen = Some(clone_from("10.0.0.9"));
            }),
        ],
        &["clone KIND_NODE node-2 a superseded key of it was shown from 10.0.0.9; it is in quarantine"],
    );
    check(
        "a clone of a node that is told of alone",
        vec![worker(|it| it.clone_seen = Some(clone_from("")))],
        &["clone KIND_NODE node-2 a superseded key of it was shown"],
    );
    check(
        "that a newer key is in use",
        vec![worker(|it| it.superseded = vec![SupersededKey::default()])],
        &[],
    );
    check(
        "a dead key alone",
        vec![tombstone(60, WORKER)],
        &["change KIND_CLUSTER removed keys"],
    );
    check(
        "labels",
        vec![worker(|it| {
            it.labels = vec![Label {
                key: "zone".into(),
                value: "eu".into(),
            }];
        })],
        &["change KIND_NODE node-2 labels zone=eu"],
    );
    check(
        "a manager's address",
        vec![boss(|it| it.address = "10.0.0.1:7443".into())],
        &["change KIND_NODE node-1 address"],
    );
    check(
        "a manager registers its key",
        vec![
            cluster(|it| {
                it.key_ring = vec![KeyRingEpoch {
                    epoch: 1,
                    envelopes: vec![Envelope {
                        node_id: id(BOSS),
                        ..Default::default()
                    }],
                    ..Default::default()
                }];
            }),
            boss(|it| it.envelope_key = vec![1; 32]),
        ],
        &["key-ring KIND_NODE node-1 registered: every live epoch is enveloped to it"],
    );
    check(
        "a manager opens an epoch",
        vec![boss(|it| it.opened_epoch = 1)],
        &["key-ring KIND_NODE node-1 opens epoch 1"],
    );
    check(
        "an epoch begins",
        vec![cluster(|it| {
            it.key_ring = vec![KeyRingEpoch {
                epoch: 2,
                ..Default::default()
            }]
        })],
        &["key-ring KIND_CLUSTER live epochs: 2"],
    );
    check(
        "voters",
        vec![cluster(|it| it.desired_voters = vec![1, 7])],
        &["voters KIND_CLUSTER members 1, 7"],
    );
    check(
        "settings",
        vec![cluster(|it| {
            it.settings = Some(ClusterSettings {
                node_certificate_validity_ms: 1,
                ..Default::default()
            });
        })],
        &["change KIND_CLUSTER settings"],
    );
    check(
        "autolock",
        vec![cluster(|it| {
            it.autolock = Some(Autolock {
                on: true,
                generation: 2,
                confirmed: 1,
                ..Default::default()
            });
        })],
        &["change KIND_CLUSTER autolock on, unlock key 2, confirmed 1"],
    );
    check(
        "the root's key is sealed anew",
        vec![cluster(|it| it.root_key = Some(Sealed::default()))],
        &["key-ring KIND_CLUSTER the root's key is sealed anew"],
    );
    check(
        "a manager's key file is sealed with another key",
        vec![boss(|it| it.locked_with = 2)],
        &["change KIND_NODE node-1 the unlock key of its key file"],
    );
    check(
        "what has no word",
        vec![cluster(|it| it.lab = true)],
        &["change KIND_CLUSTER other"],
    );
    check(
        "a ticket is revoked",
        vec![delete(Kind::Ticket, TICKET)],
        &["remove KIND_TICKET"],
    );
    check(
        "a secret is stored",
        vec![create(Any::Secret(a_secret(61)))],
        &["create KIND_SECRET secret-61"],
    );
    check(
        "a secret is changed",
        vec![secret(|it| {
            it.value.as_mut().expect("sealed").ciphertext = vec![1]
        })],
        &["change KIND_SECRET secret-6"],
    );
    check(
        "a secret is sealed under another epoch",
        vec![secret(|it| it.value.as_mut().expect("sealed").epoch = 2)],
        &["key-ring KIND_CLUSTER secrets sealed anew under epoch 2"],
    );
    check(
        "a service takes another secret",
        vec![
            create(Any::Secret(a_secret(61))),
            replace(Any::Service(a_service(&[SECRET, 61]))),
        ],
        &[
            "create KIND_SECRET secret-61",
            "grant KIND_SECRET secret-61 KIND_SERVICE web",
        ],
    );
    check(
        "a service and its secret go",
        vec![delete(Kind::Service, SERVICE), delete(Kind::Secret, SECRET)],
        &["remove KIND_SECRET secret-6"],
    );
    check(
        "tasks that use a secret are placed",
        vec![
            create(Any::Task(a_task(80, Some(WORKER)))),
            create(Any::Task(a_task(81, Some(WORKER)))),
        ],
        &["access KIND_SECRET secret-6 KIND_NODE node-2 service web"],
    );
}

#[test]
fn ordinary_changes_make_none() {
    let worker = |edit: fn(&mut Node)| {
        let mut node = a_node(WORKER, Role::Worker);
        edit(&mut node);
        vec![replace(Any::Node(node))]
    };
    for (what, steps) in [
        ("an unplaced task", vec![create(Any::Task(a_task(80, None)))]),
        ("more replicas", {
            let mut service = a_service(&[SECRET]);
            service.versions[0].spec.as_mut().expect("has one").replicas = 9;
            vec![replace(Any::Service(service))]
        }),
        (
            "a secret is used no more",
            vec![replace(Any::Service(a_service(&[])))],
        ),
        ("status", worker(|it| it.status = NodeStatus::Down.into())),
        (
            "availability",
            worker(|it| it.availability = Availability::Drain.into()),
        ),
        ("a worker's address", worker(|it| it.address = "10.0.0.2".into())),
        (
            "what a node says of itself",
            worker(|it| {
                it.description = Some(NodeDescription::default());
                it.trusts = vec![vec![1; 32]];
                it.issuer = vec![1; 32];
                it.clock_ahead_ms = 5;
                it.clock_measured_at = 6;
            }),
        ),
        ("nothing", worker(|_| {})),
        ("an absent object goes", vec![delete(Kind::Secret, 99)]),
    ] {
        assert_eq!(made(&mut given(), steps), Vec::<String>::new(), "{what}");
    }
    let mut state = given();
    must(&mut state, vec![create(Any::Task(a_task(80, Some(WORKER))))]);
    let status = TaskStatus {
        state: TaskState::Running.into(),
        ..Default::default()
    };
    let report = Step::TaskObserved(TaskObserved {
        task_id: id(80),
        node_id: id(WORKER),
        status: Some(status),
    });
    assert_eq!(made(&mut state, vec![report]), Vec::<String>::new(), "a report");
}

#[test]
fn each_step_of_a_rotation_makes_its_record() {
    let mut state = given();
    let rotation = |phase: RotationPhase, cross: &[u8]| {
        Some(Rotation {
            phase: phase.into(),
            root: b"new".to_vec(),
            cross: cross.to_vec(),
            ..Default::default()
        })
    };
    let mut step = |edit: &dyn Fn(&mut Cluster)| {
        let mut cluster = a_cluster();
        edit(&mut cluster);
        made(&mut state, vec![replace(Any::Cluster(cluster))])
    };
    let one = |detail: &str| vec![format!("rotate KIND_CLUSTER {detail}")];
    assert_eq!(
        step(&|it| it.rotation = rotation(RotationPhase::Bundle, b"x")),
        one("begun")
    );
    assert_eq!(
        step(&|it| it.rotation = rotation(RotationPhase::Issue, b"x")),
        one("the new root signs")
    );
    let ended = |it: &mut Cluster| {
        it.root_certificate = b"new".to_vec();
        it.root_key = Some(Sealed::default());
    };
    assert_eq!(
        step(&|it| {
            ended(it);
            it.former = vec![FormerRoot::default()];
        }),
        one("ended: the old root is dropped, and its key")
    );
    assert_eq!(step(&ended), one("a former root is forgotten"));
    let again = |it: &mut Cluster| {
        ended(it);
        it.rotation = rotation(RotationPhase::Bundle, b"");
    };
    assert_eq!(step(&again), one("begun, as compromised"));
    assert_eq!(step(&ended), one("cancelled"));
    let outside = |url: &str| {
        let signer = Some(ExternalSigner {
            url: url.to_owned(),
            ..Default::default()
        });
        move |it: &mut Cluster| {
            it.root_certificate = b"outside".to_vec();
            it.external_signer.clone_from(&signer);
        }
    };
    assert_eq!(
        step(&outside("https://one.example:1")),
        one("ended: the old root is dropped, and its key")
    );
    assert_eq!(
        step(&outside("https://two.example:1")),
        one("the root's external signer is elsewhere")
    );
}

#[test]
fn a_record_says_who_when_and_by_which_request_and_nothing_secret() {
    let mut state = given();
    let index = state.index() + 1;
    let before = state.audit().head().sequence;
    assert_eq!(
        apply(&mut state, 77, 5 * HOUR, vec![create(Any::Secret(a_secret(61)))]),
        None
    );
    let record = state.audit().since(before).next().expect("one");
    assert_eq!(
        (
            record.index,
            record.at,
            record.actor.as_str(),
            record.actor_name.as_str()
        ),
        (index, 5 * HOUR, actor(BOSS).as_str(), "node-1")
    );
    assert_eq!((record.request_id.clone(), record.count), (vec![77; 16], 1));
    // The ciphertexts and hashes of these tests.
    for record in state.audit().records() {
        assert!(
            !record.encode_to_vec().windows(8).any(|it| it == [0xC5; 8]),
            "{record:?}"
        );
    }
}

#[test]
fn what_is_refused_or_tried_again_makes_no_record() {
    let mut state = given();
    let head = state.audit().head();
    let name_taken = Secret {
        id: id(62),
        ..a_secret(SECRET)
    };
    let steps = vec![create(Any::Secret(a_secret(61))), create(Any::Secret(name_taken))];
    assert_eq!(
        apply(&mut state, 70, 1_000, steps),
        Some(RejectionCode::NameTaken)
    );
    assert_eq!(state.audit().head(), head);
    let steps = vec![create(Any::Secret(a_secret(61)))];
    assert_eq!(apply(&mut state, 71, 1_000, steps.clone()), None);
    let head = state.audit().head();
    assert_eq!(apply(&mut state, 71, 2_000, steps), None, "a retry");
    assert_eq!(state.audit().head(), head);
}

fn note(action: Action, count: u64) -> Step {
    Step::Note(AuditNote {
        action: action.into(),
        actor: "anonymous".into(),
        address: "10.0.0.9".into(),
        detail: "x".repeat(2 * limits::AUDIT_TEXT_CHARS),
        count,
    })
}

#[test]
fn a_note_is_written_once_cut_and_only_of_what_leaves_no_object() {
    let mut state = given();
    let before = state.audit().head().sequence;
    assert_eq!(apply(&mut state, 70, 1_000, vec![note(Action::Refuse, 3)]), None);
    assert_eq!(
        apply(&mut state, 70, 2_000, vec![note(Action::Refuse, 3)]),
        None,
        "a retry"
    );
    let made: Vec<_> = state.audit().since(before).cloned().collect();
    assert_eq!(made.len(), 1);
    assert_eq!(
        (
            made[0].actor.as_str(),
            made[0].count,
            made[0].related_name.as_str()
        ),
        ("anonymous", 3, "node-1")
    );
    assert_eq!(made[0].detail.len(), limits::AUDIT_TEXT_CHARS);
    for (action, count) in [
        (Action::Join, 1),
        (Action::KeyRing, 1),
        (Action::Remove, 1),
        (Action::Unspecified, 1),
        (Action::Refuse, 0),
    ] {
        let refused = apply(&mut state, 71, 1_000, vec![note(action, count)]);
        assert_eq!(refused, Some(RejectionCode::Invalid), "{action:?} {count}");
    }
}

#[test]
fn an_access_is_said_again_only_after_a_while() {
    let mut state = given();
    let mut n = 100;
    let mut place = |at: i64| {
        n += 1;
        let before = state.audit().head().sequence;
        let steps = vec![create(Any::Task(a_task(n, Some(WORKER))))];
        assert_eq!(apply(&mut state, n, at, steps), None);
        state.audit().since(before).count()
    };
    assert_eq!((place(0), place(1), place(HOUR - 1)), (1, 0, 0));
    assert_eq!((place(HOUR), place(HOUR + 1)), (1, 0));
    // A clock that was ahead and was set right hides nothing until its time comes.
    assert_eq!(
        (place(1_000 * HOUR), place(2 * HOUR), place(2 * HOUR + 1)),
        (1, 1, 0)
    );
}

/// One task on each of so many nodes, with so many secrets. Gives each record's name, node and count.
fn placed_at_once(state: &mut State, nodes: u16, secrets: u16) -> Vec<(String, String, u64)> {
    let wide = |n: u16| {
        let mut id = id(200);
        id[14..].copy_from_slice(&n.to_be_bytes());
        id
    };
    let references = (0..secrets).map(|n| SecretReference {
        secret_id: wide(n),
        name: String::new(),
    });
    let mut service = a_service(&[]);
    service.versions[0].spec.as_mut().expect("has one").secrets = references.collect();
    let mut steps: Vec<Step> = (0..secrets)
        .map(|n| {
            create(Any::Secret(Secret {
                id: wide(n),
                name: format!("s{n}"),
                ..a_secret(0)
            }))
        })
        .collect();
    steps.extend((0..nodes).map(|n| {
        create(Any::Node(Node {
            id: wide(n),
            name: format!("n{n}"),
            ..Default::default()
        }))
    }));
    must(state, steps);
    must(state, vec![replace(Any::Service(service))]);
    let place = |task: u16, node: u16| {
        create(Any::Task(Task {
            id: wide(task),
            node_id: wide(node),
            ..a_task(0, None)
        }))
    };
    let before = state.audit().head().sequence;
    must(state, (0..nodes).map(|n| place(n, n)).collect());
    let of = |it: &AuditRecord| (it.name.clone(), it.related_name.clone(), it.count);
    state.audit().since(before).map(|it| of(it)).collect()
}

#[test]
fn many_accesses_at_once_do_not_flush_the_log_and_each_is_counted() {
    let check = |nodes: u16, secrets: u16, named: usize, by_secret: usize, rest: usize| {
        let records = placed_at_once(&mut given(), nodes, secrets);
        let count = |secret: bool, node: bool| {
            let alike = |it: &&(String, String, u64)| it.0.is_empty() != secret && it.1.is_empty() != node;
            records.iter().filter(alike).count()
        };
        assert_eq!(
            (count(true, true), count(true, false), count(false, false)),
            (named, by_secret, rest),
            "{nodes} nodes, {secrets} secrets"
        );
        let counted: u64 = records.iter().map(|it| it.2).sum();
        assert_eq!(counted, u64::from(nodes) * u64::from(secrets));
        assert_eq!(records.len(), named + by_secret + rest);
    };
    check(16, 16, 256, 0, 0);
    check(20, 20, 256, 20, 0);
    check(257, 1, 256, 1, 0);
    check(256, 64, 256, 64, 0);
    check(2, 300, 256, 256, 1);
}

/// All managers must write the same, whatever version they run: a test that fails here means another command level.
#[test]
fn the_records_of_these_transactions_stay_what_they_are() {
    let mut state = given();
    let worker = |edit: fn(&mut Node)| {
        let mut node = a_node(WORKER, Role::Worker);
        edit(&mut node);
        vec![replace(Any::Node(node))]
    };
    let cluster = |edit: fn(&mut Cluster)| {
        let mut cluster = a_cluster();
        edit(&mut cluster);
        vec![replace(Any::Cluster(cluster))]
    };
    let rotation = |phase: RotationPhase| {
        Some(Rotation {
            phase: phase.into(),
            root: b"new".to_vec(),
            cross: b"x".to_vec(),
            ..Default::default()
        })
    };
    let joiner = Node {
        ticket_id: id(TICKET),
        ..a_node(3, Role::Worker)
    };
    let ticket_use = Step::UseTicket(TicketUse {
        ticket_id: id(TICKET),
        waiting: None,
    });
    let resealed = Secret {
        value: Some(Sealed {
            epoch: 2,
            nonce: vec![1],
            ciphertext: vec![2],
        }),
        ..a_secret(SECRET)
    };
    let rotating = |phase| {
        vec![replace(Any::Cluster(Cluster {
            rotation: rotation(phase),
            ..a_cluster()
        }))]
    };
    let transactions = [
        vec![ticket_use.clone(), create(Any::Node(joiner))],
        vec![ticket_use],
        vec![create(Any::Node(a_node(4, Role::Operator)))],
        worker(|it| it.keys.push(key(40))),
        worker(|it| it.wanted_role = Role::Manager.into()),
        worker(|it| {
            it.labels = vec![Label {
                key: "zone".into(),
                value: "eu".into(),
            }];
        }),
        worker(|it| it.opened_epoch = 1),
        cluster(|it| it.desired_voters = vec![1, 7]),
        cluster(|it| it.settings = Some(ClusterSettings::default())),
        cluster(|it| {
            it.autolock = Some(Autolock {
                on: true,
                generation: 2,
                ..Default::default()
            });
        }),
        cluster(|it| {
            it.key_ring = vec![KeyRingEpoch {
                epoch: 2,
                ..Default::default()
            }];
        }),
        rotating(RotationPhase::Bundle),
        rotating(RotationPhase::Issue),
        cluster(|it| it.root_certificate = b"new".to_vec()),
        vec![replace(Any::Secret(resealed))],
        vec![
            create(Any::Task(a_task(80, Some(WORKER)))),
            create(Any::Task(a_task(81, Some(3)))),
        ],
        vec![note(Action::Refuse, 3)],
        worker(|it| it.quarantined_at = 1_000),
        vec![tombstone(2, WORKER)],
        vec![delete(Kind::Ticket, TICKET)],
        vec![delete(Kind::Node, 4)],
    ];
    for steps in transactions {
        must(&mut state, steps);
    }
    placed_at_once(&mut state, 2, 300);
    assert_eq!(
        state.audit().head().to_string(),
        "1146:99ed6c56c37cd3c65753dcdfdc29abda4bd949bc503af582dd4f3e7d4f0c29b2"
    );
}

fn followed(state: &State) -> Head {
    let mut head = state.audit().anchor();
    for record in state.audit().records() {
        head.follow(record).expect("the next");
    }
    head
}

fn restored(state: &State) -> Result<State, super::super::SnapshotError> {
    let mut parts = chunks(state);
    let mut decoder = Decoder::new(&parts.next().expect("a header"))?;
    for part in parts {
        decoder.push(&part)?;
    }
    decoder.finish()
}

/// Notes of one transaction.
const OF_ONE: usize = 1_000;

#[test]
fn the_oldest_go_first_and_the_rest_still_begins_somewhere() {
    let mut state = given();
    let mut request = 100;
    while state.audit().head().sequence < u64::try_from(limits::AUDIT_RECORDS).expect("small") + 50 {
        let note = || Change {
            change: Some(note(Action::Refuse, 1)),
        };
        let notes = (0..OF_ONE).map(|_| note()).collect();
        request += 1;
        let transaction = Transaction {
            level: 1,
            request_id: vec![request],
            changes: notes,
            ..Default::default()
        };
        let index = state.index() + 1;
        state
            .apply(index, 1, &transaction.encode_to_vec())
            .expect("a known level");
    }
    assert_eq!(state.audit().records().len(), limits::AUDIT_RECORDS);
    let anchor = state.audit().anchor();
    assert!(anchor.sequence >= 50);
    assert_eq!(followed(&state), state.audit().head());
    let first = state.audit().since(0).next().expect("one").sequence;
    assert_eq!(first, anchor.sequence + 1);
    assert_eq!(
        state.audit().since(first).next().expect("one").sequence,
        first + 1
    );
    assert_eq!(state.audit().since(u64::MAX).count(), 0);
    let again = restored(&state).expect("whole");
    assert_eq!(
        (again.audit().anchor(), again.audit().head()),
        (anchor, state.audit().head())
    );
    assert_eq!(again.digest(), state.digest());
}

#[test]
fn a_damaged_record_of_a_snapshot_is_found() {
    let state = given();
    let parts: Vec<Vec<u8>> = chunks(&state).collect();
    let records = parts.last().expect("records");
    for bit in 0..records.len() * 8 {
        let mut damaged = records.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let mut decoder = Decoder::new(&parts[0]).expect("a header");
        let taken = parts[1..parts.len() - 1]
            .iter()
            .map(Vec::as_slice)
            .chain([damaged.as_slice()])
            .try_for_each(|part| decoder.push(part))
            .and_then(|()| decoder.finish());
        if let Ok(taken) = taken {
            // A flip that the decoding passes over.
            let same = taken
                .audit()
                .records()
                .zip(state.audit().records())
                .all(|(one, other)| one == other);
            assert!(same, "bit {bit}");
        }
    }
    let mut decoder = Decoder::new(&parts[0]).expect("a header");
    parts[1..parts.len() - 1]
        .iter()
        .for_each(|part| decoder.push(part).expect("objects"));
    assert!(decoder.finish().is_err(), "without its records");
}

fn any_step() -> impl Strategy<Value = Step> {
    let small = || 0..4u8;
    let roles = prop::sample::select(vec![Role::Manager, Role::Worker, Role::Operator]);
    let any_object = prop_oneof![
        (small(), small(), roles).prop_map(|(n, k, role)| Any::Node(Node {
            keys: vec![key(k)],
            ..a_node(n, role)
        })),
        small().prop_map(|n| Any::Secret(a_secret(n))),
        (small(), small()).prop_map(|(one, two)| Any::Service(a_service(&[one, two]))),
        (small(), prop::option::of(small())).prop_map(|(n, node)| Any::Task(a_task(n, node))),
        (any::<bool>(), small()).prop_map(|(lab, voter)| Any::Cluster(Cluster {
            lab,
            desired_voters: vec![u64::from(voter)],
            ..a_cluster()
        })),
        Just(Any::Ticket(a_ticket())),
    ];
    prop_oneof![
        4 => any_object.clone().prop_map(create),
        3 => any_object.prop_map(replace),
        2 => (1..8i32, small()).prop_map(|(kind, n)| Step::Delete(bulkhead_proto::wire::ObjectRef { kind, id: id(n) })),
        1 => (small(), small()).prop_map(|(key, node)| tombstone(key, node)),
        1 => Just(note(Action::Refuse, 1)),
        1 => Just(Step::UseTicket(TicketUse { ticket_id: id(TICKET), waiting: None })),
    ]
}

proptest! {
    /// Wherever a replica got its state from, it goes on to the same head.
    #[test]
    fn replicas_and_one_from_a_snapshot_have_the_same_log(
        log in prop::collection::vec((0..30u8, 0..3 * HOUR, prop::collection::vec(any_step(), 0..4)), 1..40),
        cut in 0..40usize,
    ) {
        let (mut one, mut other, mut late) = (State::default(), State::default(), None);
        for (n, (request, at, steps)) in log.into_iter().enumerate() {
            if n == cut {
                late = Some(restored(&one).expect("whole"));
            }
            apply(&mut one, request, at, steps.clone());
            apply(&mut other, request, at, steps.clone());
            if let Some(late) = &mut late {
                apply(late, request, at, steps);
                prop_assert_eq!(late.digest(), one.digest());
            }
            prop_assert_eq!(one.audit().head(), other.audit().head());
            prop_assert_eq!(one.digest(), other.digest());
            prop_assert_eq!(followed(&one), one.audit().head());
        }
    }
}
