//! The rules of `apply` that guard others: preconditions, terms, removed keys, the key ring; and the snapshot's format.

use bulkhead_proto::limits;
use bulkhead_proto::wire::{
    AddTombstone, Change, Cluster, Envelope, JudgeWaiting, KeyRingEpoch, Kind, Node, NodeKey, Object,
    Precondition, RejectionCode, Role, Sealed, Secret, Ticket, TicketUse, Tombstone, Transaction, VersionIs,
    Waiting, change::Change as Step, object::Object as Any, precondition::Precondition as Condition,
};
use prost::Message as _;

use super::{Decoder, Key, State, apply::TOMBSTONES, chunks, object};

const DAY: i64 = 86_400_000;

fn object(any: Any) -> Object {
    Object { object: Some(any) }
}

fn cluster(key_ring: Vec<KeyRingEpoch>) -> Object {
    object(Any::Cluster(Cluster {
        id: vec![1; 16],
        key_ring,
        ..Default::default()
    }))
}

fn epoch(epoch: u32, managers: &[u8]) -> KeyRingEpoch {
    let envelopes = managers.iter().map(|n| Envelope {
        node_id: vec![*n; 16],
        ..Default::default()
    });
    KeyRingEpoch {
        epoch,
        envelopes: envelopes.collect(),
        ..Default::default()
    }
}

fn manager(n: u8, registered: bool) -> Object {
    node(n, Role::Manager, &[], registered)
}

fn node(n: u8, role: Role, keys: &[u8], registered: bool) -> Object {
    let keys = keys.iter().map(|key| NodeKey {
        key_id: vec![*key; 32],
        ..Default::default()
    });
    object(Any::Node(Node {
        id: vec![n; 16],
        name: format!("node-{n}"),
        role: role.into(),
        keys: keys.collect(),
        envelope_key: if registered { vec![n; 32] } else { Vec::new() },
        ..Default::default()
    }))
}

fn tombstone(key: u8, removed_at: i64) -> Step {
    let tombstone = Tombstone {
        key_id: vec![key; 32],
        node_id: vec![key; 16],
        removed_at,
        ..Default::default()
    };
    Step::AddTombstone(AddTombstone {
        tombstone: Some(tombstone),
    })
}

#[derive(Default)]
struct Given {
    preconditions: Vec<Condition>,
    term: u64,
    at: i64,
}

/// Applies at the next index, committed in term 5; gives the code of the refusal.
fn apply(state: &mut State, given: Given, steps: Vec<Step>) -> Option<RejectionCode> {
    let transaction = Transaction {
        level: 1,
        at: given.at,
        term: given.term,
        preconditions: given
            .preconditions
            .into_iter()
            .map(|it| Precondition {
                precondition: Some(it),
            })
            .collect(),
        changes: steps.into_iter().map(|it| Change { change: Some(it) }).collect(),
        ..Default::default()
    };
    let index = state.index() + 1;
    let applied = state
        .apply(index, 5, &transaction.encode_to_vec())
        .expect("a known level");
    applied.outcome.rejection.map(|it| it.code())
}

fn must(state: &mut State, steps: Vec<Step>) {
    assert_eq!(apply(state, Given::default(), steps), None);
}

fn tombstones(state: &State) -> usize {
    match &state.list(Kind::Cluster).next().expect("created").object {
        Some(Any::Cluster(cluster)) => cluster.tombstones.len(),
        _ => unreachable!("the key says cluster"),
    }
}

#[test]
fn every_precondition_must_hold_and_one_that_is_none_is_refused() {
    let here = || Key::new(Kind::Node, [1; 16]).to_wire();
    let gone = || Key::new(Kind::Node, [2; 16]).to_wire();
    let version = |object, version| {
        Condition::VersionIs(VersionIs {
            object: Some(object),
            version,
        })
    };
    let mut short = here();
    short.id.pop();
    let stale = Some(RejectionCode::Stale);
    let table = [
        (vec![Condition::Exists(here())], None),
        (vec![Condition::Absent(gone())], None),
        (vec![version(here(), 1)], None),
        (vec![Condition::Exists(here()), Condition::Absent(gone())], None),
        (vec![Condition::Exists(gone())], stale),
        (vec![Condition::Absent(here())], stale),
        (vec![version(here(), 2)], stale),
        (vec![version(here(), 0)], stale),
        (vec![version(gone(), 0)], stale),
        (vec![Condition::Exists(here()), Condition::Exists(gone())], stale),
        (vec![Condition::Absent(short)], Some(RejectionCode::Invalid)),
        (
            vec![Condition::VersionIs(VersionIs::default())],
            Some(RejectionCode::Invalid),
        ),
    ];
    for (preconditions, expected) in table {
        let mut state = State::default();
        must(&mut state, vec![Step::Create(manager(1, false))]);
        let given = Given {
            preconditions: preconditions.clone(),
            ..Default::default()
        };
        let refused = apply(&mut state, given, vec![Step::Create(manager(9, false))]);
        assert_eq!(refused, expected, "{preconditions:?}");
        let created = state.get(Key::new(Kind::Node, [9; 16])).is_some();
        assert_eq!(created, expected.is_none(), "{preconditions:?}");
    }
}

#[test]
fn a_plan_is_committed_in_the_term_it_was_made_in_only() {
    // Zero is a client's, which plans in no term.
    for (term, expected) in [
        (0, None),
        (5, None),
        (4, Some(RejectionCode::Term)),
        (6, Some(RejectionCode::Term)),
    ] {
        let given = Given {
            term,
            ..Default::default()
        };
        let refused = apply(
            &mut State::default(),
            given,
            vec![Step::Create(manager(1, false))],
        );
        assert_eq!(refused, expected, "term {term}");
    }
}

#[test]
fn a_removed_key_never_comes_back() {
    let mut state = State::default();
    let worker = |n, keys: &[u8]| node(n, Role::Worker, keys, false);
    must(
        &mut state,
        vec![
            Step::Create(cluster(Vec::new())),
            Step::Create(worker(1, &[1, 2])),
            tombstone(1, 0),
            tombstone(3, 0),
        ],
    );
    let invalid = Some(RejectionCode::Invalid);
    let table = [
        (Step::Create(worker(2, &[3])), invalid),
        (Step::Create(worker(2, &[4, 3])), invalid),
        (Step::Replace(worker(1, &[1, 2, 3])), invalid),
        // The key that the node still lists brings nothing new: its record stays writable until it goes.
        (Step::Replace(worker(1, &[1, 2])), None),
        (Step::Replace(worker(1, &[2])), None),
        // Dropped, it cannot be brought again.
        (Step::Replace(worker(1, &[1, 2])), invalid),
        (Step::Create(worker(2, &[4])), None),
    ];
    for (step, expected) in table {
        let refused = apply(&mut state, Given::default(), vec![step.clone()]);
        assert_eq!(refused, expected, "{step:?}");
    }
    let same = vec![tombstone(9, 0), Step::Create(worker(3, &[9]))];
    assert_eq!(apply(&mut state, Given::default(), same), invalid);
    assert_eq!(tombstones(&state), 2, "a refused transaction adds none");
}

#[test]
fn tombstones_are_bounded_and_forgotten_only_when_their_certificates_are_dead() {
    let mut state = State::default();
    must(&mut state, vec![Step::Create(cluster(Vec::new()))]);
    let validity = i64::try_from(limits::NODE_CERTIFICATE_VALIDITY.as_millis()).expect("days");
    must(
        &mut state,
        vec![tombstone(1, 0), tombstone(1, 7), tombstone(2, DAY)],
    );
    assert_eq!(tombstones(&state), 2, "one for each key");
    let at = |at| Given {
        at,
        ..Default::default()
    };
    let due = validity + 31 * DAY;
    assert_eq!(apply(&mut state, at(due - 1), vec![tombstone(3, due - 1)]), None);
    assert_eq!(tombstones(&state), 3, "not due yet");
    assert_eq!(apply(&mut state, at(due), vec![tombstone(4, due)]), None);
    assert_eq!(tombstones(&state), 3, "the first is forgotten");
    let malformed = Step::AddTombstone(AddTombstone {
        tombstone: Some(Tombstone::default()),
    });
    assert_eq!(
        apply(&mut state, at(due), vec![malformed]),
        Some(RejectionCode::Invalid)
    );
}

/// Many removed keys of one node.
fn removals(node: u8, count: usize) -> Vec<Step> {
    let removal = |n: usize| {
        let mut key_id = vec![node; 32];
        key_id[..8].copy_from_slice(&n.to_be_bytes());
        Step::AddTombstone(AddTombstone {
            tombstone: Some(Tombstone {
                key_id,
                node_id: vec![node; 16],
                ..Default::default()
            }),
        })
    };
    (0..count).map(removal).collect()
}

#[test]
fn room_for_tombstones_is_made_by_forgetting_a_worker_never_a_manager() {
    let mut state = State::default();
    let founded = vec![
        Step::Create(cluster(Vec::new())),
        Step::Create(manager(1, false)),
        Step::Create(node(2, Role::Worker, &[], false)),
    ];
    must(&mut state, founded);
    must(&mut state, removals(2, 2));
    // The node may go in the same transaction, before its keys.
    let mut leaving = removals(1, TOMBSTONES - 2);
    leaving.insert(0, Step::Delete(Key::new(Kind::Node, [1; 16]).to_wire()));
    must(&mut state, leaving);
    for n in [3, 4] {
        must(&mut state, vec![tombstone(n, 0)]); // of nobody known: kept like a manager's
        assert_eq!(tombstones(&state), TOMBSTONES);
    }
    assert_eq!(
        apply(&mut state, Given::default(), vec![tombstone(5, 0)]),
        Some(RejectionCode::Invalid)
    );
}

#[test]
fn an_object_that_one_transaction_changes_often_is_told_once() {
    let mut state = State::default();
    must(&mut state, vec![Step::Create(cluster(Vec::new()))]);
    let transaction = Transaction {
        level: 1,
        changes: removals(1, 9)
            .into_iter()
            .map(|it| Change { change: Some(it) })
            .collect(),
        ..Default::default()
    };
    let applied = state
        .apply(9, 5, &transaction.encode_to_vec())
        .expect("a known level");
    assert_eq!((applied.events.len(), tombstones(&state)), (1, 9));
}

#[test]
fn an_epoch_of_the_key_ring_leaves_no_registered_manager_out() {
    let founded = || {
        let mut state = State::default();
        let first = vec![
            Step::Create(cluster(vec![epoch(1, &[1])])),
            Step::Create(manager(1, true)),
            Step::Create(manager(2, false)),
            Step::Create(node(3, Role::Worker, &[], false)),
        ];
        must(&mut state, first);
        state
    };
    let ring = |ring| Step::Replace(cluster(ring));
    let registers = || Step::Replace(manager(2, true));
    let invalid = Some(RejectionCode::Invalid);
    let table = [
        (vec![ring(vec![epoch(1, &[1]), epoch(2, &[1])])], None),
        (vec![ring(vec![epoch(1, &[1]), epoch(2, &[])])], invalid),
        // An epoch that stands loses nobody either.
        (vec![ring(vec![epoch(1, &[])])], invalid),
        (vec![registers(), ring(vec![epoch(1, &[1, 2])])], None),
        (vec![ring(vec![epoch(1, &[1, 2])]), registers()], None),
        (
            vec![registers(), ring(vec![epoch(1, &[1, 2]), epoch(2, &[1])])],
            invalid,
        ),
        // The last envelopes of an old epoch go with the epoch.
        (vec![ring(vec![epoch(2, &[1])])], None),
    ];
    for (steps, expected) in table {
        let refused = apply(&mut founded(), Given::default(), steps.clone());
        assert_eq!(refused, expected, "{steps:?}");
    }
    let unenveloped = vec![
        Step::Create(cluster(vec![epoch(1, &[])])),
        Step::Create(manager(1, true)),
    ];
    assert_eq!(
        apply(&mut State::default(), Given::default(), unenveloped),
        invalid
    );
}

#[test]
fn the_snapshot_format_stays_what_it_is() {
    let mut state = State::default();
    let secret = object(Any::Secret(Secret {
        id: vec![1; 16],
        name: "db".into(),
        ..Default::default()
    }));
    must(&mut state, vec![Step::Create(secret)]);
    let parts: Vec<Vec<u8>> = chunks(&state).collect();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let golden: Vec<String> = parts.iter().map(|part| hex(part)).collect();
    assert_eq!(
        golden,
        [
            concat!(
                "4248535441544532",
                "0100000000000000",
                "0100000000000000",
                "5d831b3723343250ee84a53bf261867d71575f02f888e7e6f4a387710ec9314c",
                "0000000000000000",
                "0000000000000000000000000000000000000000000000000000000000000000",
                "0100000000000000"
            ),
            "1e221c0a04080110011210010101010101010101010101010101011a026462",
            concat!(
                "46080110012001421408041210010101010101010101010101010101014a026462880101",
                "920120a6d3c52f1cda1d37695375a75db751e2d7dcbab21497cc05b0435eb56f357ec4"
            )
        ]
    );
    let mut decoder = Decoder::new(&parts[0]).expect("a header");
    parts[1..]
        .iter()
        .for_each(|part| decoder.push(part).expect("a chunk"));
    assert_eq!(decoder.finish().expect("whole").digest(), state.digest());
}

#[test]
fn nothing_is_sealed_under_an_epoch_that_is_no_more() {
    let sealed = |epoch| {
        Some(Sealed {
            epoch,
            ..Default::default()
        })
    };
    let secret = |n: u8, epoch| {
        object(Any::Secret(Secret {
            id: vec![n; 16],
            name: format!("secret-{n}"),
            value: sealed(epoch),
            ..Default::default()
        }))
    };
    let with_root = |ring: &[u32], root| {
        object(Any::Cluster(Cluster {
            id: vec![1; 16],
            key_ring: ring.iter().map(|it| epoch(*it, &[])).collect(),
            root_key: sealed(root),
            ..Default::default()
        }))
    };
    let stale = Some(RejectionCode::Stale);
    let mut state = State::default();
    must(
        &mut state,
        vec![Step::Create(with_root(&[1, 2], 1)), Step::Create(secret(1, 1))],
    );
    let mut refused = |step| assert_eq!(apply(&mut state, Given::default(), vec![step]), stale);
    refused(Step::Replace(with_root(&[2], 1)));
    refused(Step::Replace(with_root(&[2], 2))); // the secret is still there
    refused(Step::Create(secret(2, 3)));
    must(&mut state, vec![Step::Replace(secret(1, 2))]);
    must(&mut state, vec![Step::Replace(with_root(&[2], 2))]);
    let late = vec![Step::Create(secret(3, 1))];
    assert_eq!(
        apply(&mut state, Given::default(), late),
        stale,
        "planned before the epoch went"
    );
    must(&mut state, vec![Step::Create(secret(3, 2))]);
}

fn ticket(edit: impl FnOnce(&mut Ticket)) -> State {
    let mut state = State::default();
    let mut ticket = Ticket {
        id: vec![1; 16],
        expires_at: 100,
        uses_left: 2,
        ..Default::default()
    };
    edit(&mut ticket);
    let made = apply(
        &mut state,
        Given::default(),
        vec![Step::Create(object(Any::Ticket(ticket)))],
    );
    assert_eq!(made, None);
    state
}

fn uses(waiting: Option<u8>) -> Step {
    Step::UseTicket(TicketUse {
        ticket_id: vec![1; 16],
        waiting: waiting.map(|key| Waiting {
            key_id: vec![key; 32],
            ..Default::default()
        }),
    })
}

fn judge(key: u8, admit: bool) -> Step {
    Step::JudgeWaiting(JudgeWaiting {
        ticket_id: vec![1; 16],
        key_id: vec![key; 32],
        admit,
    })
}

fn joins(n: u8) -> Step {
    let mut joining = node(n, Role::Worker, &[n], false);
    if let Some(Any::Node(node)) = &mut joining.object {
        node.ticket_id = vec![1; 16];
    }
    Step::Create(joining)
}

#[test]
fn a_ticket_for_one_node_makes_no_other() {
    let mut state = ticket(|it| it.for_node = "node-4".into());
    let refused = apply(&mut state, Given::default(), vec![uses(None), joins(3)]);
    assert_eq!(refused, Some(RejectionCode::Ticket));
    assert_eq!(
        apply(&mut state, Given::default(), vec![uses(None), joins(4)]),
        None
    );
}

#[test]
fn nobody_joins_unapproved_with_a_ticket_that_asks_for_approval() {
    let at = |at| Given {
        at,
        ..Given::default()
    };
    let mut state = ticket(|it| it.approve = true);
    let mut check = |given, steps, want, what: &str| {
        assert_eq!(apply(&mut state, given, steps), want, "{what}");
    };
    let ticket = Some(RejectionCode::Ticket);
    check(
        at(0),
        vec![uses(None), joins(3)],
        ticket,
        "as with another ticket",
    );
    check(at(0), vec![joins(3)], ticket, "without the ticket's use");
    check(
        at(0),
        vec![judge(3, true), joins(3)],
        Some(RejectionCode::NotFound),
        "it does not wait",
    );
    check(at(0), vec![uses(Some(3))], None, "it waits");
    check(at(0), vec![uses(Some(3))], ticket, "it waits once");
    check(
        at(0),
        vec![judge(3, true), joins(4)],
        ticket,
        "another's approval",
    );
    check(
        at(0),
        vec![judge(3, false), joins(3)],
        ticket,
        "a rejection is no approval",
    );
    check(
        at(100),
        vec![judge(3, true), joins(3)],
        ticket,
        "the ticket ended",
    );
    check(at(0), vec![judge(3, true), joins(3)], None, "approved");
    check(
        at(0),
        vec![judge(3, true)],
        Some(RejectionCode::NotFound),
        "it waits no more",
    );
    check(at(0), vec![uses(Some(5))], None, "the second use");
    check(at(0), vec![judge(5, false)], None, "rejected");
    check(
        at(0),
        vec![uses(Some(5))],
        ticket,
        "a rejected key, and no use is left",
    );
}

#[test]
fn who_waits_and_who_was_rejected_are_bounded() {
    let mut state = ticket(|it| {
        it.approve = true;
        it.uses_left = 1_000;
    });
    let most = u8::try_from(limits::TICKET_WAITING).expect("small");
    for key in 0..most {
        assert_eq!(apply(&mut state, Given::default(), vec![uses(Some(key))]), None);
    }
    let refused = apply(&mut state, Given::default(), vec![uses(Some(most))]);
    assert_eq!(refused, Some(RejectionCode::Ticket));
    for key in 0..=most {
        if key == most {
            assert_eq!(apply(&mut state, Given::default(), vec![uses(Some(key))]), None);
        }
        assert_eq!(apply(&mut state, Given::default(), vec![judge(key, false)]), None);
    }
    let found = state.list(Kind::Ticket).next().expect("there");
    let Some(Any::Ticket(found)) = &found.object else {
        panic!("a ticket");
    };
    assert_eq!(
        (found.waiting.len(), found.rejected.len()),
        (0, limits::TICKET_WAITING)
    );
}

#[test]
fn nobody_waits_with_a_ticket_that_asks_for_no_approval() {
    let mut state = ticket(|_| ());
    let refused = apply(&mut state, Given::default(), vec![uses(Some(3))]);
    assert_eq!(refused, Some(RejectionCode::Invalid));
}

#[test]
fn a_role_changes_only_where_an_operator_wants_it() {
    let of = |role: Role, wanted: Role| {
        object(Any::Node(Node {
            id: vec![2; 16],
            name: "node-2".into(),
            role: role.into(),
            wanted_role: wanted.into(),
            ..Default::default()
        }))
    };
    let member = |state: &State| match &state.list(Kind::Node).next().expect("there").object {
        Some(Any::Node(node)) => node.member_id,
        _ => panic!("a node"),
    };
    let change = |state: &mut State, to| apply(state, Given::default(), vec![Step::Replace(to)]);
    const NONE: Role = Role::Unspecified;
    for (from, wanted, to) in [
        (Role::Standby, NONE, Role::Manager),
        (Role::Worker, Role::Manager, Role::Manager),
        (Role::Operator, Role::Manager, Role::Manager),
        (Role::Standby, Role::Worker, Role::Worker),
        (Role::Manager, NONE, Role::Standby),
        (Role::Manager, Role::Worker, Role::Worker),
    ] {
        let mut state = State::default();
        apply(&mut state, Given::default(), vec![Step::Create(of(from, wanted))]);
        let refused = change(&mut state, of(to, NONE));
        assert_eq!(
            refused,
            Some(RejectionCode::Invalid),
            "{from:?} {wanted:?} {to:?}"
        );
    }

    let mut state = State::default();
    let made = vec![
        Step::Create(cluster(Vec::new())),
        Step::Create(of(Role::Standby, Role::Manager)),
    ];
    assert_eq!(apply(&mut state, Given::default(), made), None);
    assert_eq!(member(&state), 0);
    assert_eq!(change(&mut state, of(Role::Manager, Role::Standby)), None);
    let first = member(&state);
    assert_eq!(first, state.index(), "a member id is never used twice");

    // While it counts, it stays a manager.
    let voters = |voters: &[u64]| {
        object(Any::Cluster(Cluster {
            id: vec![1; 16],
            desired_voters: voters.to_vec(),
            ..Default::default()
        }))
    };
    assert_eq!(change(&mut state, voters(&[first])), None);
    assert_eq!(
        change(&mut state, of(Role::Standby, Role::Manager)),
        Some(RejectionCode::Invalid)
    );
    assert_eq!(change(&mut state, voters(&[])), None);
    assert_eq!(change(&mut state, of(Role::Standby, Role::Manager)), None);
    assert_eq!(member(&state), 0);
    assert_eq!(change(&mut state, of(Role::Manager, NONE)), None);
    assert!(member(&state) > first);
}

#[test]
fn a_secret_that_is_sealed_anew_is_still_the_one_that_its_maker_asked_for() {
    let secret = |epoch, size| {
        object(Any::Secret(Secret {
            id: vec![1; 16],
            name: "db".into(),
            value: Some(Sealed {
                epoch,
                ..Default::default()
            }),
            size,
            ..Default::default()
        }))
    };
    let request = |state: &mut State, id: u8, step: Step| {
        let transaction = Transaction {
            level: 1,
            request_id: vec![id; 16],
            changes: vec![Change { change: Some(step) }],
            ..Default::default()
        };
        let index = state.index() + 1;
        let applied = state.apply(index, 5, &transaction.encode_to_vec());
        applied
            .expect("a known level")
            .outcome
            .rejection
            .map(|it| it.code())
    };
    let mut state = State::default();
    assert_eq!(request(&mut state, 1, Step::Create(secret(1, 5))), None);
    assert_eq!(request(&mut state, 2, Step::Replace(secret(2, 5))), None);
    let again = request(&mut state, 1, Step::Create(secret(1, 5)));
    assert_eq!(again, None, "the answer was lost, and the retry finds itself");
    assert_eq!(request(&mut state, 3, Step::Replace(secret(3, 6))), None);
    let other = request(&mut state, 1, Step::Create(secret(1, 5)));
    assert_eq!(other, Some(RejectionCode::Exists), "that was a change");
}

#[test]
fn a_request_finds_itself_although_the_leader_went_on_with_the_cluster_since() {
    let step = |state: &mut State, request: u8, term: u64, reseal: u32| {
        let cluster = object(Any::Cluster(Cluster {
            id: vec![1; 16],
            reseal,
            ..Default::default()
        }));
        let known = state.list(Kind::Cluster).next();
        let version = known
            .and_then(|it| object::meta(it))
            .map_or(0, |meta| meta.version);
        let read = Condition::VersionIs(VersionIs {
            object: Some(Key::new(Kind::Cluster, [1; 16]).to_wire()),
            version,
        });
        let (preconditions, change) = match known {
            None => (Vec::new(), Step::Create(cluster)),
            Some(_) => (vec![read], Step::Replace(cluster)),
        };
        let transaction = Transaction {
            level: 1,
            request_id: vec![request; 16],
            term,
            preconditions: preconditions
                .into_iter()
                .map(|it| Precondition {
                    precondition: Some(it),
                })
                .collect(),
            changes: vec![Change { change: Some(change) }],
            ..Default::default()
        };
        let index = state.index() + 1;
        let applied = state.apply(index, 5, &transaction.encode_to_vec());
        assert_eq!(applied.expect("a known level").outcome.rejection, None);
        let Some(Any::Cluster(cluster)) = &state.list(Kind::Cluster).next().expect("made").object else {
            unreachable!("the key says cluster")
        };
        (cluster.reseal, cluster.requests.clone())
    };
    let mut state = State::default();
    step(&mut state, 1, 0, 1);
    step(&mut state, 2, 0, 2);
    assert_eq!(step(&mut state, 3, 5, 3).0, 3, "the leader's step");
    let (reseal, requests) = step(&mut state, 2, 0, 9);
    assert_eq!(reseal, 3, "the retry changes nothing");
    assert_eq!(
        requests,
        [vec![1; 16], vec![2; 16]],
        "a leader's step is no request"
    );
    for request in 10..60 {
        step(&mut state, request, 0, u32::from(request));
    }
    assert_eq!(step(&mut state, 60, 0, 0).1.len(), 16);
}

#[test]
fn a_manager_with_another_store_is_another_member() {
    let mut state = State::default();
    let given = Given::default;
    let create = |object| Step::Create(object);
    assert_eq!(
        apply(&mut state, given(), vec![create(cluster(vec![epoch(1, &[2])]))]),
        None
    );
    assert_eq!(apply(&mut state, given(), vec![create(manager(2, true))]), None);
    assert_eq!(
        apply(
            &mut state,
            given(),
            vec![create(node(3, Role::Worker, &[], false))]
        ),
        None
    );
    let record = |state: &State, n: u8| {
        let object = state.get(Key::new(Kind::Node, [n; 16]));
        match object.and_then(|it| it.object.clone()) {
            Some(Any::Node(node)) => node,
            other => panic!("{other:?}"),
        }
    };
    let with_store = |state: &State, n: u8, store: u8, opened_epoch: u32| {
        let node = Node {
            store: vec![store; 16],
            opened_epoch,
            ..record(state, n)
        };
        Step::Replace(object(Any::Node(node)))
    };
    let before = record(&state, 2).member_id;

    // Before it proved anything, and only a manager.
    let proved = vec![with_store(&state, 2, 7, 1)];
    assert_eq!(apply(&mut state, given(), proved), Some(RejectionCode::Invalid));
    let worker = vec![with_store(&state, 3, 7, 0)];
    assert_eq!(apply(&mut state, given(), worker), Some(RejectionCode::Invalid));
    assert_eq!(record(&state, 2).member_id, before);

    let lost = vec![with_store(&state, 2, 7, 0)];
    assert_eq!(apply(&mut state, given(), lost), None);
    let after = record(&state, 2).member_id;
    assert!(after > before && after == state.index());
    // The same store is the same member, whatever else changes.
    let proves = vec![with_store(&state, 2, 7, 1)];
    assert_eq!(apply(&mut state, given(), proves), None);
    assert_eq!(record(&state, 2).member_id, after);
}
