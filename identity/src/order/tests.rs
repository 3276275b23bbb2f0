use bulkhead_proto::NodeId;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyUsagePurpose, date_time_ymd};

use super::*;
use crate::testing::{CLUSTER, HOUR_MS, authority, now_ms, subject};
use crate::{Authority, Key, csr};

const YEAR_MS: i64 = 365 * 24 * HOUR_MS;

fn public(key: &Key) -> PublicKey {
    csr::public_key(&key.csr().expect("a request")).expect("our own")
}

fn root(authority: &Authority) -> Root {
    Root::from_der(authority.root_der()).expect("a root")
}

/// A root with a name that is chosen.
fn named(name: &str) -> Authority {
    let key = Key::generate().expect("a key");
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, CLUSTER.to_string());
    params.distinguished_name.push(DnType::CommonName, name);
    (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2090, 1, 1));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let der = params.self_signed(&key).expect("signed").der().to_vec();
    Authority::from_parts(&der, key.pkcs8()).expect("its own key")
}

/// The same order with something else in it.
fn with(order: &Order, change: impl FnOnce(&mut Order)) -> Order {
    let mut other = order.clone();
    change(&mut other);
    other
}

#[test]
fn what_was_ordered_is_taken_and_each_difference_has_its_name() {
    use Difference as D;
    let signs = named("a root");
    let (root, key) = (root(&signs), public(&Key::generate().expect("a key")));
    let now = now_ms();
    let leaf = |subject: Subject, key: &PublicKey| What::Leaf {
        subject,
        key: key.clone(),
    };
    let wanted = subject(Role::Worker, 1);
    let order = Order::leaf(wanted, &key, now, now + HOUR_MS).expect("ordered");
    let sent = |other: &Order| signs.sign(other).expect("signed");
    assert_eq!(order.check(&root, &sent(&order)), Ok(()));

    let other_key = public(&Key::generate().expect("a key"));
    let differs = |change: &dyn Fn(&mut Order)| {
        let der = sent(&with(&order, change));
        order.check(&root, &der).expect_err("it differs")
    };
    assert_eq!(differs(&|it| it.what = leaf(wanted, &other_key)), D::Key);
    assert_eq!(
        differs(&|it| it.what = leaf(subject(Role::Manager, 1), &key)),
        D::Role {
            wanted: Role::Worker,
            got: Role::Manager
        }
    );
    assert_eq!(
        differs(&|it| it.what = leaf(subject(Role::Worker, 2), &key)),
        D::Subject
    );
    assert_eq!(differs(&|it| it.serial[5] ^= 1), D::Serial);
    type Edit = fn(&mut Order);
    let times: [(&str, Edit); 4] = [
        ("expired", |it| {
            it.not_before_ms -= YEAR_MS;
            it.not_after_ms -= YEAR_MS;
        }),
        ("ten years", |it| it.not_after_ms += 10 * YEAR_MS),
        ("a second longer", |it| it.not_after_ms += 1_000),
        ("a second earlier", |it| it.not_before_ms -= 1_000),
    ];
    for (what, change) in times {
        assert!(matches!(differs(&change), D::Validity { .. }), "{what}");
    }
    // An authority, however it is made.
    for der in [
        signs.root_der().to_vec(),
        signs
            .cross(&self::root(&named("another")), now)
            .expect("a cross-certificate"),
    ] {
        assert!(matches!(order.check(&root, &der), Err(D::Profile(_))));
    }
    // Another root, with another name, or with the same.
    let by = |authority: &Authority| authority.sign(&order).expect("signed");
    assert_eq!(order.check(&root, &by(&named("another"))), Err(D::Issuer));
    assert_eq!(order.check(&root, &by(&named("a root"))), Err(D::Signature));
    let mut torn = sent(&order);
    *torn.last_mut().expect("bytes") ^= 1;
    assert!(matches!(
        order.check(&root, &torn),
        Err(D::Signature | D::Profile(_))
    ));
    for nothing in [Vec::new(), b"no certificate".to_vec(), vec![0x30; 1 << 16]] {
        assert!(matches!(order.check(&root, &nothing), Err(D::Profile(_))));
    }
}

#[test]
fn a_cross_certificate_is_of_the_next_roots_name_and_key_and_has_a_level_less() {
    use Difference as D;
    let (signs, next) = (authority(), authority());
    let (root, next_root) = (root(&signs), self::root(&next));
    let now = now_ms();
    let order = Order::cross(&root, &next_root, now).expect("ordered");
    let der = signs.sign(&order).expect("signed");
    assert_eq!(order.check(&root, &der), Ok(()));
    let other = with(&order, |it| it.what = What::Cross(self::root(&authority())));
    let other = signs.sign(&other).expect("signed");
    assert_eq!(order.check(&root, &other), Err(D::Subject));
    let longer = with(&order, |it| it.not_after_ms -= HOUR_MS);
    let longer = signs.sign(&longer).expect("signed");
    assert!(matches!(order.check(&root, &longer), Err(D::Validity { .. })));
    // A root has a level more than a cross-certificate.
    assert_eq!(
        order.check(&root, next.root_der()),
        Err(D::Cross(RootError::Levels))
    );
    let key = public(&Key::generate().expect("a key"));
    let leaf = signs.issue(&subject(Role::Manager, 1), &key, now, now + HOUR_MS);
    let leaf = leaf.expect("signed");
    assert!(matches!(order.check(&root, &leaf), Err(D::Cross(_))));
    // Of the same name, with another key.
    let (one, two) = (self::root(&named("next")), self::root(&named("next")));
    let order = Order::cross(&root, &one, now).expect("ordered");
    let other = with(&order, |it| it.what = What::Cross(two));
    let der = signs.sign(&other).expect("signed");
    assert_eq!(order.check(&root, &der), Err(D::Key));
}

#[test]
fn a_certificate_of_another_cluster_is_not_what_was_ordered() {
    let elsewhere = ClusterId::from_bytes([8; 16]);
    let other = Authority::generate(elsewhere, now_ms() - HOUR_MS).expect("a root");
    let key = public(&Key::generate().expect("a key"));
    let order = |cluster| {
        let subject = Subject {
            cluster,
            node: NodeId::from_bytes([1; 16]),
            role: Role::Worker,
        };
        Order::leaf(subject, &key, now_ms(), now_ms() + HOUR_MS).expect("ordered")
    };
    let der = other.sign(&order(elsewhere)).expect("signed");
    let own = authority();
    assert_eq!(
        order(CLUSTER).check(&root(&own), &der),
        Err(Difference::Cluster(elsewhere))
    );
    assert!(
        own.sign(&order(elsewhere)).is_err(),
        "it signs for its own cluster alone"
    );
    assert!(Order::cross(&root(&own), &root(&other), now_ms()).is_err());
}
