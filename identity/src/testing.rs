//! What the tests of this crate share: one authority, and credentials that it signed.

use bulkhead_proto::{ClusterId, NodeId, Role};

use crate::seam::{Clock as _, SystemClock};
use crate::{Authority, Bundle, Certificate, Credentials, Key, Subject, csr};

pub(crate) const CLUSTER: ClusterId = ClusterId::from_bytes([7; 16]);
pub(crate) const HOUR_MS: i64 = 3_600_000;

pub(crate) fn now_ms() -> i64 {
    i64::try_from(SystemClock::start().wall_millis()).expect("a date")
}

pub(crate) fn authority() -> Authority {
    Authority::generate(CLUSTER, now_ms() - HOUR_MS).expect("a root")
}

pub(crate) fn subject(role: Role, node: u8) -> Subject {
    Subject {
        cluster: CLUSTER,
        node: NodeId::from_bytes([node; 16]),
        role,
    }
}

pub(crate) fn issue(authority: &Authority, key: &Key, subject: Subject, from_ms: i64, to_ms: i64) -> Vec<u8> {
    let public = csr::public_key(&key.csr().expect("a request")).expect("our own request");
    authority
        .issue(&subject, &public, now_ms() + from_ms, now_ms() + to_ms)
        .expect("a certificate")
}

pub(crate) fn credentials(authority: &Authority, role: Role, node: u8) -> Credentials {
    let key = Key::generate().expect("a key");
    let der = issue(authority, &key, subject(role, node), -60_000, HOUR_MS);
    Credentials {
        key,
        certificate: Certificate::from_der(&der).expect("our own certificate"),
        bundle: bundle(authority),
    }
}

pub(crate) fn bundle(authority: &Authority) -> Bundle {
    Bundle::from_ders(vec![authority.root_der().to_vec()]).expect("our own root")
}
