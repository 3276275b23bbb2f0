use std::time::Duration;

use bulkhead_identity::authority::Authority;
use bulkhead_identity::bundle::Root;
use bulkhead_identity::{Bundle, Certificate, Credentials, Key, Subject, csr};
use bulkhead_proto::NodeId;
use bulkhead_proto::wire::Transaction;
use prost::Message as _;
use rustls::pki_types::{CertificateDer, UnixTime};

use super::*;

pub(super) const NOW: i64 = 1_700_000_000_000;
pub(super) const DEADLINE: i64 = NOW + 60_000;

/// How far a node is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum At {
    Old,
    Trusts,
    Uses,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Here {
    pub(super) role: Role,
    pub(super) at: At,
    pub(super) down: bool,
}

pub(super) struct Roots {
    pub(super) old: Vec<u8>,
    pub(super) new: Vec<u8>,
}

fn authority() -> Authority {
    Authority::generate(ClusterId::from_bytes([9; 16]), NOW).expect("a root")
}

fn roots() -> Roots {
    let root = || authority().root_der().to_vec();
    Roots {
        old: root(),
        new: root(),
    }
}

pub(super) fn id(root: &[u8]) -> Vec<u8> {
    trust::key_id(root).expect("a root").to_wire()
}

pub(super) fn rotation(roots: &Roots, phase: RotationPhase, cross: &[u8]) -> Rotation {
    Rotation {
        phase: phase.into(),
        root: roots.new.clone(),
        root_key: Some(bulkhead_proto::wire::Sealed {
            epoch: 2,
            ..Default::default()
        }),
        cross: cross.to_vec(),
        started_at: NOW,
        deadline: DEADLINE,
        exposed: false,
        external_signer: None,
    }
}

pub(super) fn cluster(roots: &Roots, rotation: Option<Rotation>) -> Cluster {
    Cluster {
        id: vec![9; 16],
        root_certificate: roots.old.clone(),
        root_key: Some(bulkhead_proto::wire::Sealed {
            epoch: 1,
            ..Default::default()
        }),
        rotation,
        ..Default::default()
    }
}

pub(super) fn state(cluster: Cluster, nodes: &[Here], new_root: &[u8], old_root: &[u8]) -> State {
    let nodes = nodes.iter().zip(1u8..).map(|(here, n)| {
        let trusts = match here.at {
            At::Old => vec![old_root.to_vec()],
            At::Trusts | At::Uses => vec![old_root.to_vec(), new_root.to_vec()],
        };
        Any::Node(Node {
            id: vec![n; 16],
            name: format!("node-{n}"),
            role: here.role.into(),
            status: match here.down {
                true => NodeStatus::Down,
                false => NodeStatus::Ready,
            }
            .into(),
            trusts,
            issuer: match here.at {
                At::Uses => new_root.to_vec(),
                At::Old | At::Trusts => old_root.to_vec(),
            },
            ..Default::default()
        })
    });
    holding(std::iter::once(Any::Cluster(cluster)).chain(nodes))
}

fn holding(objects: impl IntoIterator<Item = Any>) -> State {
    let transaction = Transaction {
        level: 1,
        request_id: vec![7; 16],
        changes: objects
            .into_iter()
            .map(|any| Change {
                change: Some(Step::Create(view::object(any))),
            })
            .collect(),
        ..Default::default()
    };
    let mut state = State::default();
    let applied = state
        .apply(1, 1, &transaction.encode_to_vec())
        .expect("a known level");
    assert_eq!(applied.outcome.rejection, None);
    state
}

/// Every way in which three managers and two workers can stand, in both phases, before and after the deadline.
#[test]
fn a_phase_ends_when_all_who_are_up_are_through_or_late_and_a_majority_of_managers_is() {
    let roots = roots();
    let (old, new) = (id(&roots.old), id(&roots.new));
    let roles = [
        Role::Manager,
        Role::Manager,
        Role::Manager,
        Role::Worker,
        Role::Worker,
    ];
    let (mut moved, mut waited) = (0, 0);
    for code in 0..6_usize.pow(5) {
        let here: Vec<Here> = (0..5)
            .map(|n| {
                let digit = code / 6_usize.pow(n) % 6;
                Here {
                    role: roles[n as usize],
                    at: [At::Old, At::Trusts, At::Uses][digit % 3],
                    down: digit >= 3,
                }
            })
            .collect();
        for (phase, needs) in [
            (RotationPhase::Bundle, At::Trusts),
            (RotationPhase::Issue, At::Uses),
        ] {
            let cluster = cluster(&roots, Some(rotation(&roots, phase, b"cross")));
            let state = state(cluster.clone(), &here, &new, &old);
            let through = |here: &&Here| here.at >= needs;
            let managers = here[..3].iter().filter(through).count();
            let all = here.iter().filter(|it| !it.down).all(|it| it.at >= needs);
            for late in [false, true] {
                let now = if late { DEADLINE } else { DEADLINE - 1 };
                // One that is down but was through before still counts for the majority: it has what it needs.
                let due = managers >= 2 && (all || late);
                let next = next(&state, &cluster, Signer::Signs, now);
                assert_eq!(next.is_some(), due, "{here:?} {phase:?} late {late}");
                *if due { &mut moved } else { &mut waited } += 1;
            }
        }
    }
    assert!(moved > 1_000 && waited > 1_000, "{moved} {waited}");
}

#[test]
fn a_rotation_ends_with_exactly_the_new_root_and_its_key() {
    let roots = roots();
    let (old, new) = (id(&roots.old), id(&roots.new));
    let through = [Here {
        role: Role::Manager,
        at: At::Uses,
        down: false,
    }];
    let begun = cluster(&roots, Some(rotation(&roots, RotationPhase::Bundle, b"cross")));
    assert_eq!(trust::roots(&begun), [roots.old.clone(), roots.new.clone()]);
    assert_eq!(trust::issuer(&begun).root, roots.old);
    assert!(trust::chain(&begun).is_empty());

    let (issuing, _) = next(
        &state(begun.clone(), &through, &new, &old),
        &begun,
        Signer::Signs,
        NOW,
    )
    .expect("due");
    assert_eq!(trust::roots(&issuing).len(), 2);
    assert_eq!(trust::issuer(&issuing).root, roots.new);
    assert_eq!(trust::issuer(&issuing).key.map(|sealed| sealed.epoch), Some(2));
    assert_eq!(trust::chain(&issuing), [b"cross".to_vec()]);
    assert_eq!(trust::named(&issuing), roots.old);

    let (ended, _) = next(
        &state(issuing.clone(), &through, &new, &old),
        &issuing,
        Signer::Signs,
        NOW,
    )
    .expect("due");
    assert_eq!(trust::roots(&ended), std::slice::from_ref(&roots.new));
    assert_eq!(trust::issuer(&ended).key.map(|sealed| sealed.epoch), Some(2));
    assert_eq!(trust::chain(&ended), [b"cross".to_vec()], "for who was away");
    assert_eq!(trust::named(&ended), roots.new);
    let former = ended.former.first().expect("the old root");
    assert_eq!((&former.root, ended.rotation.as_ref()), (&roots.old, None));

    let after = state(ended.clone(), &through, &new, &old);
    assert!(next(&after, &ended, Signer::Signs, former.until - 1).is_none());
    let (forgotten, _) = next(&after, &ended, Signer::Signs, former.until).expect("due");
    assert_eq!(
        (trust::chain(&forgotten), forgotten.former.first()),
        (Vec::new(), None)
    );
    assert!(
        next(
            &state(forgotten.clone(), &through, &new, &old),
            &forgotten,
            Signer::Signs,
            i64::MAX
        )
        .is_none()
    );
}

#[test]
fn nothing_leads_from_a_compromised_root_to_the_new_one() {
    let roots = roots();
    let (old, new) = (id(&roots.old), id(&roots.new));
    let through = [Here {
        role: Role::Manager,
        at: At::Uses,
        down: false,
    }];
    let begun = cluster(&roots, Some(rotation(&roots, RotationPhase::Issue, b"")));
    assert!(trust::chain(&begun).is_empty());
    assert_eq!(trust::named(&begun), roots.new);
    let (ended, _) = next(
        &state(begun.clone(), &through, &new, &old),
        &begun,
        Signer::Signs,
        NOW,
    )
    .expect("due");
    assert!(trust::chain(&ended).is_empty());
    let shown = status(&state(ended.clone(), &through, &new, &old), None, NOW);
    assert_eq!(shown.former_until, 0, "nobody comes back");
    assert_eq!(
        ended.former.first().map(|former| &former.root),
        Some(&roots.old),
        "what it proved is closed"
    );
}

/// A manager's, by this root.
fn certificate(root: &Authority) -> Certificate {
    pair(root).1
}

fn pair(root: &Authority) -> (Key, Certificate) {
    let key = Key::generate().expect("a key");
    let public = csr::public_key(&key.csr().expect("a request")).expect("our own");
    let subject = Subject {
        cluster: root.cluster(),
        node: NodeId::from_bytes([1; 16]),
        role: bulkhead_proto::Role::Manager,
    };
    let der = root
        .issue(&subject, &public, NOW, NOW + 1_000_000)
        .expect("signed");
    (key, Certificate::from_der(&der).expect("of the profile"))
}

/// The cluster once a rotation to `next` has ended.
fn rotated(cluster: &Cluster, by: &Authority, next: &Authority, compromised: bool) -> Cluster {
    let next = Root::from_der(next.root_der()).expect("a root");
    let rotation = Rotation {
        root: next.der().to_vec(),
        cross: match compromised {
            true => Vec::new(),
            false => by.cross(&next, NOW).expect("signed"),
        },
        ..Default::default()
    };
    Cluster {
        former: formers(cluster, &rotation, NOW),
        root_certificate: rotation.root,
        ..cluster.clone()
    }
}

#[test]
fn who_missed_several_rotations_finds_back_over_all_of_them() {
    let all: Vec<Authority> = (0..8).map(|_| authority()).collect();
    let of = |root: &Authority| Bundle::from_ders(vec![root.root_der().to_vec()]).expect("a root");
    let leaf = |root: &Authority| CertificateDer::from(certificate(root).der().to_vec());
    let at = UnixTime::since_unix_epoch(Duration::from_millis(NOW as u64 + 500_000));
    let believed = |cluster: &Cluster, by: &Authority, signs: &Authority| {
        let chain: Vec<CertificateDer<'_>> = trust::chain(cluster).into_iter().map(Into::into).collect();
        of(by).verify_manager(&leaf(signs), &chain, at).is_ok()
    };
    let mut cluster = Cluster {
        root_certificate: all[0].root_der().to_vec(),
        ..Default::default()
    };
    for (number, pair) in all.windows(2).enumerate() {
        cluster = rotated(&cluster, &pair[0], &pair[1], false);
        for (missed, old) in all[..=number].iter().rev().enumerate() {
            let finds = believed(&cluster, old, &pair[1]);
            assert_eq!(finds, missed < limits::FORMER_ROOTS, "{number}: {missed}");
        }
    }
    let back = Rotation {
        phase: RotationPhase::Issue.into(),
        root: all[5].root_der().to_vec(),
        cross: b"back".to_vec(),
        ..Default::default()
    };
    let chain = trust::chain(&begun(&cluster, back));
    let by_5 = &cluster.former[1];
    assert_eq!((chain[0].as_slice(), chain.len()), (&b"back"[..], 4));
    assert!(
        !chain.contains(&by_5.cross),
        "nothing leads away from the root that signs"
    );
    let back = rotated(&cluster, &all[7], &all[5], false);
    let place = |former: &FormerRoot| all.iter().position(|it| it.root_der() == former.root);
    let kept: Vec<_> = back.former.iter().map(place).collect();
    assert_eq!(kept, [7, 6, 4, 3].map(Some), "not the one that it led back to");
    for old in &all[3..] {
        assert!(believed(&back, old, &all[5]));
    }
    // With a compromised root's key anybody could lead on from it.
    let last = authority();
    let after = rotated(&rotated(&cluster, &all[7], &last, true), &last, &all[0], false);
    assert!(believed(&after, &last, &all[0]));
    for old in [&all[5], &all[6], &all[7]] {
        assert!(!believed(&after, old, &all[0]));
    }
}

#[test]
fn a_certificate_of_a_root_that_was_rotated_away_opens_nothing_and_of_the_newest_raft_alone() {
    let all: Vec<Authority> = (0..4).map(|_| authority()).collect();
    let mut cluster = Cluster {
        root_certificate: all[0].root_der().to_vec(),
        ..Default::default()
    };
    for pair in all.windows(2) {
        cluster = rotated(&cluster, &pair[0], &pair[1], false);
    }
    let opens = |cluster: &Cluster, raft| -> Vec<bool> {
        let dropped = trust::dropped(cluster);
        let opens = |root| !trust::is_dropped(cluster, &dropped, &certificate(root), raft);
        all.iter().map(opens).collect()
    };
    assert_eq!(opens(&cluster, false), [false, false, false, true]);
    assert_eq!(opens(&cluster, true), [false, false, true, true]);
    let back = |at: usize| {
        begun(
            &cluster,
            Rotation {
                root: all[at].root_der().to_vec(),
                ..Default::default()
            },
        )
    };
    for raft in [false, true] {
        assert_eq!(opens(&back(2), raft), [false, false, true, true]);
    }
    assert_eq!(opens(&back(0), false), [true, false, false, true]);
}

/// Else a second rotation could begin, after which the others would not meet it over Raft.
#[test]
fn a_manager_that_trusts_the_new_root_and_still_uses_the_old_one_is_behind() {
    let (old, new) = (authority(), authority());
    let founded = Cluster {
        id: vec![9; 16],
        root_certificate: old.root_der().to_vec(),
        ..Default::default()
    };
    let cluster = rotated(&founded, &old, &new, false);
    let says = |cluster: &Cluster, key: Key, certificate: Certificate| {
        let current = Credentials {
            key,
            certificate,
            chain: Vec::new(),
            bundle: Bundle::from_ders(trust::roots(cluster)).expect("a root"),
        };
        trust::said(cluster, &Node::default(), &current, NOW).issuer
    };
    for (root, certified) in [(&old, &old), (&new, &new)] {
        let (key, certificate) = pair(certified);
        assert_eq!(says(&cluster, key, certificate), id(root.root_der()));
    }
    let state = |issuer: Vec<u8>| {
        let node = Node {
            id: vec![1; 16],
            name: "m1".into(),
            role: Role::Manager.into(),
            issuer,
            ..Default::default()
        };
        holding([Any::Cluster(cluster.clone()), Any::Node(node)])
    };
    assert!(behind(&state(id(old.root_der()))).is_some());
    assert!(behind(&state(id(new.root_der()))).is_none());
}

#[test]
fn the_status_says_of_each_node_why_it_lags() {
    let roots = roots();
    let (old, new) = (id(&roots.old), id(&roots.new));
    let node = |role, at, down| Here { role, at, down };
    let nodes = [
        node(Role::Manager, At::Uses, false),
        node(Role::Worker, At::Trusts, false),
        node(Role::Worker, At::Trusts, true),
        node(Role::Operator, At::Old, false),
    ];
    let cluster = cluster(&roots, Some(rotation(&roots, RotationPhase::Issue, b"cross")));
    let status = status(&state(cluster, &nodes, &new, &old), None, NOW);
    let said: Vec<(&str, bool)> = status
        .nodes
        .iter()
        .map(|node| (node.lags.as_str(), node.waited_for))
        .collect();
    assert_eq!(
        said,
        [
            ("", true),
            ("has no certificate of the new root yet", true),
            ("is down; it comes back by its key", false),
            ("renews with its next command", false),
        ]
    );
    assert_eq!((status.issuer, status.next), (new.clone(), new));
}

/// Both ways to a root whose key is outside of the cluster, and what becomes of its signer.
#[test]
fn a_new_root_outside_signs_once_its_signer_does_and_takes_its_place_in_the_cluster() {
    let roots = roots();
    let (old, new) = (id(&roots.old), id(&roots.new));
    let signer = ExternalSigner {
        url: "https://signer.example:8443".into(),
        ca: vec![1],
    };
    let through = [Here {
        role: Role::Manager,
        at: At::Uses,
        down: false,
    }];
    let outside = Rotation {
        root_key: None,
        external_signer: Some(signer.clone()),
        ..rotation(&roots, RotationPhase::Bundle, b"cross")
    };
    let begun = Cluster {
        root_exposed: true,
        ..cluster(&roots, Some(outside))
    };
    let step = |from: &Cluster, signer, now| {
        let state = state(from.clone(), &through, &new, &old);
        next(&state, from, signer, now).map(|(next, _)| next)
    };
    // However late it is, and then it can still be taken back.
    for now in [NOW, DEADLINE, DEADLINE + 1_000_000] {
        assert_eq!(step(&begun, Signer::Fails, now), None);
    }
    let back = cancelled(&begun, || true).expect("nothing was signed");
    assert!(back.rotation.is_none() && back.root_exposed && back.external_signer.is_none());

    let issuing = step(&begun, Signer::Signs, NOW).expect("due");
    assert_eq!(trust::issuer(&issuing).outside, Some(&signer));
    // It may never sign again: then there is a way back until most managers went on.
    let back = cancelled(&issuing, || false).expect("most managers stayed");
    assert_eq!(trust::issuer(&back).root, roots.old);
    assert_eq!(cancelled(&issuing, || true), Err(NoWayBack::Issuing));
    assert!(most_renewed(&state(issuing.clone(), &through, &new, &old)));
    let stays = [Here {
        at: At::Trusts,
        ..through[0]
    }];
    assert!(!most_renewed(&state(issuing.clone(), &stays, &new, &old)));
    let mut compromised = issuing.clone();
    compromised.rotation.get_or_insert_default().cross.clear();
    assert_eq!(cancelled(&compromised, || false), Err(NoWayBack::Issuing));
    // From here on a signer that fails keeps nodes from renewing, and those that did are through.
    let ended = step(&issuing, Signer::Fails, NOW).expect("due");
    assert_eq!(ended.root_certificate, roots.new);
    assert_eq!((&ended.root_key, &ended.external_signer), (&None, &Some(signer)));
    assert!(!ended.root_exposed, "nobody in the cluster ever had its key");
    assert!(!is_exposed(&Cluster {
        root_exposed: true,
        ..ended.clone()
    }));

    let away = Cluster {
        rotation: Some(Rotation {
            root: roots.old.clone(),
            ..rotation(&roots, RotationPhase::Bundle, b"cross")
        }),
        ..ended
    };
    let back = cancelled(&away, || true).expect("nothing was signed");
    assert!(back.external_signer.is_some() && back.root_key.is_none());
    let step = |from: &Cluster| {
        let state = state(from.clone(), &through, &old, &new);
        next(&state, from, Signer::Signs, NOW).expect("due").0
    };
    let ended = step(&step(&away));
    assert_eq!(ended.root_certificate, roots.old);
    assert!(ended.root_key.is_some() && ended.external_signer.is_none());
}

#[test]
fn a_rotation_says_what_it_waits_for() {
    let roots = roots();
    let rotation = rotation(&roots, RotationPhase::Bundle, b"cross");
    let signer = |root: &[u8], failing_since, worked_at| SignerStatus {
        root: id(root),
        failing_since,
        reason: "it does not answer".into(),
        worked_at,
        ..Default::default()
    };
    let said = |signers: &[SignerStatus]| paused(&rotation, signers);
    assert_eq!(said(&[]), "", "its key is in the cluster");
    assert_eq!(said(&[signer(&roots.old, NOW, 0)]), "", "another root's");
    assert_eq!(said(&[signer(&roots.new, 0, NOW)]), "");
    assert!(said(&[signer(&roots.new, 0, 0)]).contains("not asked yet"));
    assert!(said(&[signer(&roots.new, NOW, NOW)]).contains("it does not answer"));
}
