use super::*;
use bulkhead_identity::Subject;
use bulkhead_identity::authority::Authority;
use bulkhead_proto::ClusterId;
use bulkhead_proto::wire::{Availability, NodeStatus};

use crate::testing::{Founded, apply, create, key};

const AT: i64 = 1_700_000_000_000;
const HOUR: i64 = 3_600_000;
const NODE: NodeId = NodeId::from_bytes([5; 16]);

/// Keys of one node, with certificates of these roles.
fn keys(roles: &[Role]) -> Vec<NodeKey> {
    let cluster = ClusterId::from_bytes([9; 16]);
    let authority = Authority::generate(cluster, 0).expect("a root");
    let listed = roles.iter().map(|&role| {
        let (_, public) = key();
        let subject = Subject {
            cluster,
            node: NODE,
            role,
        };
        NodeKey {
            certificate: authority.issue(&subject, &public, AT, AT + HOUR).expect("a leaf"),
            key_id: public.key_id().to_wire(),
            not_before: AT,
            not_after: AT + HOUR,
        }
    });
    listed.collect()
}

fn id(key: &NodeKey) -> KeyId {
    KeyId::try_from(key.key_id.as_slice()).expect("an id")
}

#[test]
fn a_key_supersedes_the_older_ones_of_its_role_once_it_is_used() {
    const W: Role = Role::Worker;
    const M: Role = Role::Manager;
    const S: Role = Role::Standby;
    for (roles, used, want, what) in [
        (&[W][..], 0, &[][..], "its only key"),
        (
            &[W, W],
            0,
            &[],
            "the answer may be lost, or the node stopped before it was on disk",
        ),
        (&[W, W], 1, &[0], "the newer one is in use"),
        (&[W, W, W], 1, &[0], "a third that nobody used yet"),
        (
            &[W, W, W],
            2,
            &[0, 1],
            "and one that was never used is superseded, too",
        ),
        (&[S, M], 1, &[], "a manager's key supersedes no standby's"),
        (&[S, M, S], 2, &[0], "nor a standby's a manager's"),
        (&[M, M], 1, &[0], "a manager's"),
        (
            &[Role::Operator; 2],
            1,
            &[],
            "a context may lie on several machines",
        ),
    ] {
        let listed = keys(roles);
        let mut record = Node {
            keys: listed.clone(),
            ..Default::default()
        };
        seen(&mut record, id(&listed[used]), AT);
        let got: Vec<&[u8]> = record.superseded.iter().map(|it| &it.key_id[..]).collect();
        let want: Vec<&[u8]> = want.iter().map(|&n: &usize| &listed[n].key_id[..]).collect();
        assert_eq!(got, want, "{what}");
        assert_eq!(record.keys, listed, "connections that stand go on: {what}");
        // Seen again later it changes nothing, so that the same record is not written with each session.
        let once = record.clone();
        seen(&mut record, id(&listed[used]), AT + 1_000);
        assert_eq!(record, once, "{what}");
    }
}

#[test]
fn few_superseded_keys_are_remembered_and_none_that_opens_nothing_any_more() {
    let listed = keys(&[Role::Worker; 20]);
    let mut record = Node::default();
    for key in &listed {
        record.keys.drain(..record.keys.len().saturating_sub(1)); // what a renewal leaves
        record.keys.push(key.clone());
        seen(&mut record, id(key), AT);
        assert!(record.superseded.len() <= limits::SUPERSEDED_KEYS);
    }
    let newest: Vec<&[u8]> = record.superseded.iter().map(|it| &it.key_id[..]).collect();
    let want: Vec<&[u8]> = listed[11..19].iter().map(|it| &it.key_id[..]).collect();
    assert_eq!(newest, want);
    let ended = AT + HOUR + millis(limits::RETURN_GRACE);
    record
        .keys
        .extend(keys(&[Role::Worker; 2]).into_iter().map(|it| NodeKey {
            not_after: ended + HOUR,
            ..it
        }));
    // The roots of the two calls differ, their role does not.
    let last = id(record.keys.last().expect("there"));
    seen(&mut record, last, ended);
    assert!(record.superseded.iter().all(|it| it.until > ended), "{record:?}");
}

#[test]
fn only_a_connection_that_was_opened_well_after_the_successor_was_seen_is_a_clones() {
    let grace = millis(limits::SUPERSEDED_GRACE);
    let key = SupersededKey {
        at: AT,
        ..Default::default()
    };
    for (opened, clone, what) in [
        (AT - HOUR, false, "stands since before"),
        (
            AT + grace,
            false,
            "was being opened then, with the clock of another manager",
        ),
        (AT + grace + 1, true, "later"),
    ] {
        assert_eq!(is_clone(&key, opened), clone, "{what}");
    }
}

/// A node whose key was superseded at `AT`, and what shows it well after that.
fn cloned(role: WireRole) -> (State, Shown) {
    let listed = keys(&[Role::Worker; 2]);
    let mut record = Node {
        id: NODE.to_wire(),
        name: "five".into(),
        keys: listed.clone(),
        envelope_key: vec![1; if role == WireRole::Manager { 32 } else { 0 }],
        ..Default::default()
    };
    record.set_role(role);
    record.set_status(NodeStatus::Ready);
    record.set_availability(Availability::Active);
    record.superseded.push(SupersededKey {
        key_id: listed[0].key_id.clone(),
        at: AT,
        until: AT + HOUR,
    });
    let mut founded = Founded::new(AT);
    apply(&mut founded.state, 9, vec![create(Any::Node(record))]);
    let shown = Shown {
        node: NODE,
        key: id(&listed[0]),
        address: Some([10, 0, 0, 9].into()),
        opened_ms: AT + 2 * millis(limits::SUPERSEDED_GRACE),
    };
    (founded.state, shown)
}

#[test]
fn a_clone_of_a_worker_puts_it_into_quarantine_and_one_of_a_manager_is_only_told_of() {
    for (role, quarantined) in [
        (WireRole::Worker, true),
        (WireRole::Standby, true),
        (WireRole::Manager, false),
    ] {
        let (mut state, shown) = cloned(role);
        let before = view::node(&state, NODE).expect("there").clone();
        let (_, changes) = alarm(&state, &shown, AT + HOUR).expect("a clone");
        apply(&mut state, 10, changes);
        let after = view::node(&state, NODE).expect("the record stays");
        let told = after.clone_seen.as_ref().expect("told");
        assert_eq!(
            (told.at, told.address.as_str(), told.key_id.as_slice()),
            (AT + HOUR, "10.0.0.9", &shown.key.as_bytes()[..])
        );
        assert_eq!(after.quarantined_at != 0, quarantined, "{role:?}");
        assert_eq!(after.keys.is_empty(), quarantined, "{role:?}");
        if !quarantined {
            assert_eq!(
                (&after.keys, &after.envelope_key),
                (&before.keys, &before.envelope_key)
            );
        }
        // However often it calls, from wherever: one record of each node.
        let elsewhere = Shown {
            address: Some([10, 0, 0, 10].into()),
            opened_ms: shown.opened_ms + HOUR,
            ..shown
        };
        assert_eq!(alarm(&state, &elsewhere, AT + 2 * HOUR), None, "{role:?}");
    }
}

#[test]
fn what_is_no_clone_raises_no_alarm() {
    let (state, shown) = cloned(WireRole::Worker);
    let ask = |state: &State, shown: Shown| alarm(state, &shown, AT + HOUR).is_some();
    assert!(ask(&state, shown.clone()));
    for (what, shown) in [
        (
            "a connection of before",
            Shown {
                opened_ms: AT,
                ..shown.clone()
            },
        ),
        (
            "a key that is in use",
            Shown {
                key: id(&view::node(&state, NODE).expect("there").keys[1]),
                ..shown.clone()
            },
        ),
        (
            "a key of nobody",
            Shown {
                key: KeyId::from_bytes([1; 32]),
                ..shown.clone()
            },
        ),
        (
            "a node that is gone",
            Shown {
                node: NodeId::from_bytes([6; 16]),
                ..shown.clone()
            },
        ),
    ] {
        assert!(!ask(&state, shown), "{what}");
    }
    let (state, shown) = cloned(WireRole::Operator);
    assert!(!ask(&state, shown), "an operator's");
}
