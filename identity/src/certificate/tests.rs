use bulkhead_proto::Role;
use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519,
    SanType, SerialNumber, SubjectPublicKeyInfo, date_time_ymd,
};
use x509_parser::certification_request::X509CertificationRequest;

use super::*;
use crate::testing::{CLUSTER, HOUR_MS, authority, bundle, credentials, issue, rsa_request, subject};
use crate::{Authority, Bundle, BundleError, Key, csr};

/// A leaf of the profile, still to be changed.
fn leaf(role: Role) -> CertificateParams {
    let subject = subject(role, 1);
    let mut params = CertificateParams::default();
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2120, 1, 1);
    params.serial_number = Some(SerialNumber::from_slice(&[0x40; SERIAL_BYTES]));
    params.distinguished_name = name(&[
        (DnType::OrganizationName, &CLUSTER.to_string()),
        (DnType::OrganizationalUnitName, role.as_str()),
        (DnType::CommonName, &subject.node.to_string()),
    ]);
    params.subject_alt_names = vec![uri(&subject.uri())];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if role == Role::Manager {
        params.subject_alt_names.push(dns(&manager_name(CLUSTER)));
        params
            .extended_key_usages
            .push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params
}

fn name(attributes: &[(DnType, &str)]) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    for (kind, value) in attributes {
        name.push(kind.clone(), *value);
    }
    name
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().expect("ASCII"))
}

fn dns(text: &str) -> SanType {
    SanType::DnsName(text.try_into().expect("ASCII"))
}

fn sign(params: &CertificateParams, key: &KeyPair, signer: &KeyPair) -> Vec<u8> {
    let root = CertificateParams::default();
    params
        .signed_by(key, &Issuer::from_params(&root, signer))
        .expect("signed")
        .der()
        .to_vec()
}

fn p256() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key")
}

#[test]
fn the_profile_is_what_it_is() {
    for (role, text) in [
        (
            Role::Manager,
            "BasicConstraints KeyUsage ExtendedKeyUsage(client, server) URI DNS",
        ),
        (
            Role::Worker,
            "BasicConstraints KeyUsage ExtendedKeyUsage(client) URI",
        ),
        (
            Role::Operator,
            "BasicConstraints KeyUsage ExtendedKeyUsage(client) URI",
        ),
    ] {
        let authority = authority();
        let key = Key::generate().expect("a key");
        let der = issue(&authority, &key, subject(role, 1), -60_000, HOUR_MS);
        let read = Certificate::from_der(&der).expect("the profile");
        assert_eq!(read.subject(), subject(role, 1), "{text}");
        assert_eq!(read.key_id(), key.key_id());
        assert_eq!(read.not_after_ms() - read.not_before_ms(), HOUR_MS + 60_000);
        assert!(read.valid_at(read.not_before_ms()) && read.valid_at(read.not_after_ms()));
        assert!(!read.valid_at(read.not_before_ms() - 1) && !read.valid_at(read.not_after_ms() + 1));
        Certificate::from_der(&sign(&leaf(role), &p256(), &p256())).expect("what the table below changes");
    }
}

#[test]
fn the_profile_reads_as_it_is_kept() {
    let authority = authority();
    let leaf = |role| {
        issue(
            &authority,
            &Key::generate().expect("a key"),
            subject(role, 1),
            0,
            HOUR_MS,
        )
    };
    let text = [
        describe("root", authority.root_der()),
        describe("manager", &leaf(Role::Manager)),
        describe("worker", &leaf(Role::Worker)),
        describe("operator", &leaf(Role::Operator)),
    ]
    .concat();
    assert_eq!(text, include_str!("profile.txt"), "\n{text}");
}

/// A certificate as text: all of it, but for random bytes, of which the lengths.
fn describe(kind: &str, der: &[u8]) -> String {
    use std::fmt::Write as _;
    let x509 = parse(der).expect("what leaf and root share");
    let hidden = |name: &X509Name<'_>| {
        let text = name.to_string();
        match text.split_once("CN=root ") {
            Some((before, id)) => format!("{before}CN=root <{} digits>", id.len()),
            None => text,
        }
    };
    let (start, end) = validity(&x509).expect("a validity");
    let mut text = format!(
        "{kind}\n  version {}, serial {} bytes\n  signature {}\n  issuer {}\n  subject {}\n  valid {} s\n  key {} {}\n",
        x509.version().0 + 1,
        x509.raw_serial().len(),
        x509.signature_algorithm.algorithm,
        hidden(x509.issuer()),
        hidden(x509.subject()),
        (end - start) / 1000,
        x509.public_key().algorithm.algorithm,
        x509.public_key().subject_public_key.data.len(),
    );
    for extension in x509.extensions() {
        let value = match extension.parsed_extension() {
            ParsedExtension::SubjectAlternativeName(names) => names
                .general_names
                .iter()
                .map(|name| format!(" {name}"))
                .collect(),
            ParsedExtension::AuthorityKeyIdentifier(_) | ParsedExtension::SubjectKeyIdentifier(_) => {
                format!(" {} bytes", extension.value.len())
            }
            _ => format!(" {}", data_encoding::HEXLOWER.encode(extension.value)),
        };
        let critical = if extension.critical { " critical" } else { "" };
        writeln!(text, "  {}{critical}{value}", extension.oid).expect("into a string");
    }
    text
}

#[test]
fn whatever_differs_from_the_profile_is_refused() {
    use ProfileError as E;
    type Change = fn(&mut CertificateParams);
    let cluster = CLUSTER.to_string();
    let node = subject(Role::Worker, 1).node.to_string();
    let table: &[(&str, Role, E, Change)] = &[
        ("another role's OU", Role::Worker, E::AlternativeNames, |p| {
            p.distinguished_name
                .push(DnType::OrganizationalUnitName, "manager");
        }),
        ("no known role", Role::Worker, E::Subject, |p| {
            p.distinguished_name.push(DnType::OrganizationalUnitName, "root");
        }),
        ("a role in capitals", Role::Worker, E::Subject, |p| {
            p.distinguished_name
                .push(DnType::OrganizationalUnitName, "Worker");
        }),
        (
            "another CN than the URI",
            Role::Worker,
            E::AlternativeNames,
            |p| {
                p.distinguished_name
                    .push(DnType::CommonName, subject(Role::Worker, 2).node.to_string());
            },
        ),
        ("a CN that is no id", Role::Worker, E::Subject, |p| {
            p.distinguished_name.push(DnType::CommonName, "node");
        }),
        (
            "another cluster than the URI",
            Role::Worker,
            E::AlternativeNames,
            |p| {
                p.distinguished_name.push(
                    DnType::OrganizationName,
                    bulkhead_proto::ClusterId::from_bytes([8; 16]).to_string(),
                );
            },
        ),
        ("one attribute more", Role::Worker, E::Subject, |p| {
            p.distinguished_name.push(DnType::CountryName, "CH");
        }),
        ("an authority", Role::Manager, E::Authority, |p| {
            p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)
        }),
        ("no word on authority", Role::Worker, E::Authority, |p| {
            p.is_ca = IsCa::NoCa
        }),
        ("no alternative name", Role::Worker, E::AlternativeNames, |p| {
            p.subject_alt_names.clear()
        }),
        ("two URIs", Role::Worker, E::AlternativeNames, |p| {
            p.subject_alt_names.push(uri(&subject(Role::Worker, 2).uri()));
        }),
        (
            "a worker with a DNS name",
            Role::Worker,
            E::AlternativeNames,
            |p| {
                p.subject_alt_names.push(dns(&manager_name(CLUSTER)));
            },
        ),
        (
            "a manager without its DNS name",
            Role::Manager,
            E::AlternativeNames,
            |p| {
                p.subject_alt_names.pop();
            },
        ),
        (
            "a manager with another DNS name",
            Role::Manager,
            E::AlternativeNames,
            |p| {
                p.subject_alt_names.pop();
                p.subject_alt_names.push(dns("manager.example"));
            },
        ),
        ("a worker that serves", Role::Worker, E::KeyUsage, |p| {
            p.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }),
        ("a manager that does not", Role::Manager, E::KeyUsage, |p| {
            p.extended_key_usages.pop();
        }),
        ("any extended use", Role::Worker, E::KeyUsage, |p| {
            p.extended_key_usages.push(ExtendedKeyUsagePurpose::Any);
        }),
        ("no extended use", Role::Worker, E::KeyUsage, |p| {
            p.extended_key_usages.clear()
        }),
        ("no key usage", Role::Worker, E::KeyUsage, |p| {
            p.key_usages.clear()
        }),
        ("signs certificates", Role::Worker, E::KeyUsage, |p| {
            p.key_usages.push(KeyUsagePurpose::KeyCertSign)
        }),
        ("a serial number too short", Role::Worker, E::Serial, |p| {
            p.serial_number = Some(SerialNumber::from_slice(&[1]))
        }),
        ("a serial number too long", Role::Worker, E::Serial, |p| {
            p.serial_number = Some(SerialNumber::from_slice(&[0x40; 20]));
        }),
        ("it ends before it starts", Role::Worker, E::Validity, |p| {
            p.not_after = date_time_ymd(2019, 1, 1)
        }),
        ("an extension of its own", Role::Worker, E::Extension, |p| {
            p.custom_extensions.push(CustomExtension::from_oid_content(
                &[1, 3, 6, 1, 4, 1, 99_999, 1],
                vec![5, 0],
            ));
        }),
        ("an extension twice", Role::Worker, E::Extension, |p| {
            let usage = CustomExtension::from_oid_content(
                &[2, 5, 29, 37],
                vec![0x30, 10, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 2],
            );
            p.custom_extensions.push(usage);
        }),
        ("too many bytes", Role::Worker, E::Long, |p| {
            p.subject_alt_names.push(uri(&"x".repeat(CERTIFICATE_BYTES)));
        }),
    ];
    for (why, role, error, change) in table {
        let mut params = leaf(*role);
        change(&mut params);
        assert_eq!(
            Certificate::from_der(&sign(&params, &p256(), &p256())).expect_err(why),
            *error,
            "{why}"
        );
    }
    let mut reversed = leaf(Role::Worker);
    reversed.distinguished_name = name(&[
        (DnType::CommonName, &node),
        (DnType::OrganizationalUnitName, "worker"),
        (DnType::OrganizationName, &cluster),
    ]);
    assert_eq!(
        Certificate::from_der(&sign(&reversed, &p256(), &p256())),
        Err(E::Subject)
    );
}

#[test]
fn other_keys_and_signatures_are_refused() {
    for algorithm in [&PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
        let other = KeyPair::generate_for(algorithm).expect("a key");
        let params = leaf(Role::Worker);
        assert_eq!(
            Certificate::from_der(&sign(&params, &other, &p256())),
            Err(ProfileError::Key)
        );
        assert_eq!(
            Certificate::from_der(&sign(&params, &p256(), &other)),
            Err(ProfileError::Signature)
        );
    }
    let request = rsa_request();
    let (_, request) = X509CertificationRequest::from_der(&request).expect("PKCS#10");
    let rsa = SubjectPublicKeyInfo::from_der(request.certification_request_info.subject_pki.raw);
    let signer = p256();
    let der = leaf(Role::Worker).signed_by(
        &rsa.expect("a key"),
        &Issuer::from_params(&CertificateParams::default(), &signer),
    );
    assert_eq!(
        Certificate::from_der(der.expect("signed").der()),
        Err(ProfileError::Key),
        "RSA"
    );
    // ecdsa-with-SHA1 (RFC 3279 §2.2.3) in place of ecdsa-with-SHA256, inside and outside.
    let (sha256, sha1) = (
        [0x30, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2],
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 1, 2],
    );
    let mut der = sign(&leaf(Role::Worker), &p256(), &p256());
    while let Some(at) = der.windows(12).position(|bytes| bytes == sha256) {
        der[at + 4..at + 12].copy_from_slice(&sha1);
    }
    assert_eq!(Certificate::from_der(&der), Err(ProfileError::Signature));
    let mut longer = sign(&leaf(Role::Worker), &p256(), &p256());
    longer.push(0);
    assert_eq!(Certificate::from_der(&longer), Err(ProfileError::Encoding));
}

#[test]
fn an_authority_signs_for_its_cluster_only_and_reads_back() {
    let authority = authority();
    let again = Authority::from_parts(authority.root_der(), authority.key_pkcs8()).expect("our own root");
    let key = Key::generate().expect("a key");
    let public = csr::public_key(&key.csr().expect("a request")).expect("our own request");
    again
        .issue(&subject(Role::Worker, 1), &public, 0, 1_000)
        .expect("a leaf");
    let foreign = Subject {
        cluster: bulkhead_proto::ClusterId::from_bytes([8; 16]),
        ..subject(Role::Worker, 1)
    };
    assert!(again.issue(&foreign, &public, 0, 1_000).is_err());
    for (from, to) in [(0, 0), (1_000, 0), (-1_000, 1_000), (0, i64::MAX), (0, 999)] {
        assert!(
            again.issue(&subject(Role::Worker, 1), &public, from, to).is_err(),
            "{from} to {to}"
        );
    }
    assert!(
        Authority::from_parts(authority.root_der(), key.pkcs8()).is_err(),
        "another key"
    );
    let leaf = credentials(&authority, Role::Manager, 1);
    assert!(
        Authority::from_parts(leaf.certificate.der(), leaf.key.pkcs8()).is_err(),
        "a leaf is no root"
    );
}

#[test]
fn a_bundle_is_one_to_four_roots_of_one_cluster() {
    let (one, two) = (authority(), authority());
    let ders = |count: usize| vec![one.root_der().to_vec(); count];
    assert_eq!(Bundle::from_ders(ders(0)).expect_err("none"), BundleError::Count);
    assert_eq!(Bundle::from_ders(ders(5)).expect_err("five"), BundleError::Count);
    let both = Bundle::from_ders(vec![one.root_der().to_vec(), two.root_der().to_vec()]).expect("a rotation");
    let now = rustls_pki_types::UnixTime::now();
    for authority in [&one, &two] {
        let leaf = credentials(authority, Role::Worker, 1);
        let der = rustls_pki_types::CertificateDer::from(leaf.certificate.der());
        both.verify_client(&der, &[], now).expect("either root");
        assert!(both.verify_manager(&der, &[], now).is_err(), "a worker");
        assert!(bundle(&one).verify_client(&der, &[], now).is_ok() == std::ptr::eq(authority, &one));
    }
    let foreign = Authority::generate(bulkhead_proto::ClusterId::from_bytes([8; 16]), 0).expect("a root");
    let mixed = Bundle::from_ders(vec![one.root_der().to_vec(), foreign.root_der().to_vec()]);
    assert_eq!(mixed.expect_err("two clusters"), BundleError::Clusters);
    let leaf = credentials(&one, Role::Manager, 1);
    assert!(
        Bundle::from_ders(vec![leaf.certificate.der().to_vec()]).is_err(),
        "a leaf is no root"
    );
    let mut forged = one.root_der().to_vec();
    *forged.last_mut().expect("bytes") ^= 1;
    assert!(Bundle::from_ders(vec![forged]).is_err(), "its own signature");
}

proptest! {
    #[test]
    fn changed_bytes_never_panic(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>()) {
        let authority = shared();
        for der in [authority.0.clone(), authority.1.clone(), authority.2.clone()] {
            let mut der = der;
            let at = at.index(der.len());
            der[at] = byte;
            der.truncate(cut.index(der.len()) + 1);
            let _ = Certificate::from_der(&der); // only that they return
            let _ = Bundle::from_ders(vec![der.clone()]);
            let _ = csr::public_key(&der);
            let _ = Key::from_pkcs8(&der);
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(der in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Certificate::from_der(&der); // only that they return
        let _ = Bundle::from_ders(vec![der.clone()]);
        let _ = csr::public_key(&der);
    }
}

/// Root, leaf and request, made once.
fn shared() -> &'static (Vec<u8>, Vec<u8>, Vec<u8>) {
    static SHARED: std::sync::LazyLock<(Vec<u8>, Vec<u8>, Vec<u8>)> = std::sync::LazyLock::new(|| {
        let authority = authority();
        let leaf = credentials(&authority, Role::Manager, 1);
        let csr = leaf.key.csr().expect("a request");
        (
            authority.root_der().to_vec(),
            leaf.certificate.der().to_vec(),
            csr,
        )
    });
    &SHARED
}
