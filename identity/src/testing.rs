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
        chain: Vec::new(),
        bundle: bundle(authority),
    }
}

pub(crate) fn bundle(authority: &Authority) -> Bundle {
    Bundle::from_ders(vec![authority.root_der().to_vec()]).expect("our own root")
}

/// A good certificate request for an RSA key: `openssl genrsa 2048`, then `openssl req -new -subj / -sha256`. The key
/// is thrown away.
pub(crate) fn rsa_request() -> Vec<u8> {
    let hex = [
        "308202453082012d020100300030820122300d06092a864886f70d01010105000382010f003082010a0282010100de37c76a",
        "d4735c9f1db9480a570d27677df3425b452b8efe9d042d7348db30aa40931d07b0b553422f93d0d244367758a20b22917f5e",
        "481a8f6d0940e7e47a32e9dfde62bceb757deaafc8c2ff7ca54044e4d31cde99aa2d4334205afc5f426aeccc507b592b7037",
        "86668c8139805ff8e159e8e60db0535e47eb7b473c948f10d7c104eda5eb63e46cbc4f0dd6314ab676331e8efa563edef99d",
        "0bbf8e8d1658947763aa36cc4e80d2b326a9815c148f50dd45bb4f7ad404bb00ccf832e8d1b5db64841af9f627fe47ebb19d",
        "0d19dc40fd61bd96a34268ee9c0c94f96a03ca1e7bfc542ec810e7dbce185b0356879526ea16164bd9bc523d027ad0740e58",
        "68f50203010001a000300d06092a864886f70d01010b0500038201010013226640f4dec88a2fb3fa7d56240b05e8ff1ff2c5",
        "2dbc72443c40db79c861479df71ff3e1dbc655959ec311d7fd4d0e63302016c6e96b90caa5b06850726ac14794cd9b437b2a",
        "6fb40586fd21aac2293d187c141bd351b72daca18baca753068f88ad4011057d94da90f67135a94de060538cb094c041944f",
        "ca9ab8a82dd5e472ebf3c89935abfe99a546410998dc88bcd89762c8f0386d5d91445366834a09efd85f9ce9ddb086dbc287",
        "1d05468c5f4bd127466f6c76b330e6eb4dd0e2ba2d876f821a79e9c4ccb0a7ad1ac49ca451401a72434a5868add18b42ff38",
        "6c72c8b5321bf3a75349366363655af5b5afeb9f02e8bd32b0fa325a141acb7a02b923",
    ]
    .concat();
    data_encoding::HEXLOWER.decode(hex.as_bytes()).expect("hex")
}
