//! A root that an operator brings: judged before anything of it is kept.

use bulkhead_identity::authority::{Authority, IssueError};
use bulkhead_identity::bundle::{Root, RootError};
use bulkhead_identity::certificate::ProfileError;
use bulkhead_proto::limits;
use bulkhead_proto::wire::{Cluster, FormerRoot};

use super::{millis, trust};

/// Why a given root is refused.
#[derive(Debug, thiserror::Error)]
pub enum GivenError {
    /// It does not fit the profile.
    #[error(transparent)]
    Root(#[from] RootError),
    /// It names another cluster.
    #[error("its O= names cluster {given}, and this is cluster {own}")]
    Cluster {
        /// Whom it names.
        given: String,
        /// Who this is.
        own: String,
    },
    /// Its time has not come.
    #[error("it is not valid yet")]
    NotYet,
    /// Its time is over, or soon will be.
    #[error("it is valid for {days} more days, and certificates of a year must fit into its time")]
    Ends {
        /// What is left.
        days: i64,
    },
    /// It signs already.
    #[error("it is the cluster's root already")]
    Present,
    /// Another root has its name.
    #[error("another root of this cluster has its name and another key")]
    Name,
    /// It was rotated away since others know its key.
    #[error("it was rotated away as compromised")]
    Compromised,
    /// Who knows the present root's key could show by its certificate that it leads to that one.
    #[error("it certified the present root, or one that led to it, and that one is compromised")]
    Certified,
    /// The key is none, or another certificate's.
    #[error("the key is not a P-256 key in PKCS#8, or not the certificate's")]
    Key,
    /// It cannot sign as the cluster needs it.
    #[error("it cannot sign the cluster's certificates")]
    Sign(#[source] IssueError),
}

impl GivenError {
    /// What to do next.
    pub fn hint(&self) -> &'static str {
        match self {
            GivenError::Root(RootError::Profile(ProfileError::Signature | ProfileError::Key)) => {
                "make it with a P-256 key and SHA-256: no other kind is supported"
            }
            GivenError::Root(_) => {
                "make it as 'A root of your own' in docs/operations/rotate-the-root.md shows"
            }
            GivenError::Cluster { .. } => "make it with '/O=<cluster id>/CN=<name>' as its subject",
            GivenError::NotYet => "check its start and this cluster's clocks",
            GivenError::Ends { .. } => "make one that is valid for at least 366 days; ten years are usual",
            GivenError::Present => "there is nothing to rotate: give another one",
            GivenError::Name => "make it with another CN=",
            GivenError::Compromised | GivenError::Certified => "make a new one, with a new key",
            GivenError::Key => "give the file with the private key of this very certificate",
            GivenError::Sign(_) => {
                "write its O= and CN= as UTF-8 strings, which is what openssl does by itself"
            }
        }
    }
}

/// Takes up a given root with its key.
///
/// # Errors
/// [`GivenError`], with the first difference.
pub fn given(cluster: &Cluster, root: &[u8], pkcs8: &[u8], now_ms: i64) -> Result<Authority, GivenError> {
    let given = fits(cluster, root, now_ms)?;
    let authority = Authority::from_parts(root, pkcs8).map_err(|error| match error {
        IssueError::Key => GivenError::Key,
        other => GivenError::Sign(other),
    })?;
    // Names are compared byte by byte: it must be able to write its own.
    authority
        .cross(&given, now_ms - millis(limits::CERTIFICATE_BACKDATE))
        .map_err(GivenError::Sign)?;
    Ok(authority)
}

/// Refuses to leave a compromised root for one that led to it: what that one certified is valid for as long as it is.
///
/// # Errors
/// [`GivenError::Certified`].
pub fn leaves_compromised(cluster: &Cluster, root: &[u8]) -> Result<(), GivenError> {
    let given = Root::from_der(root)?.key_id();
    let led = |former: &FormerRoot| trust::key_id(&former.root) == Ok(given) && !former.cross.is_empty();
    match cluster.former.iter().any(led) {
        true => Err(GivenError::Certified),
        false => Ok(()),
    }
}

/// Judges a given root without its key.
///
/// # Errors
/// [`GivenError`], with the first difference.
pub fn fits(cluster: &Cluster, root: &[u8], now_ms: i64) -> Result<Root, GivenError> {
    let given = Root::from_der(root)?;
    let present = Root::from_der(&cluster.root_certificate)?;
    if given.cluster() != present.cluster() {
        return Err(GivenError::Cluster {
            given: given.cluster().to_string(),
            own: present.cluster().to_string(),
        });
    }
    if given.not_before_ms() > now_ms {
        return Err(GivenError::NotYet);
    }
    let left = given.not_after_ms().saturating_sub(now_ms);
    if left < millis(limits::GIVEN_ROOT_LEFT) {
        return Err(GivenError::Ends {
            days: left.max(0) / 86_400_000,
        });
    }
    if given.key_id() == present.key_id() {
        return Err(GivenError::Present);
    }
    let root_of = |former: &FormerRoot| Root::from_der(&former.root).ok();
    let mut compromised = cluster.former.iter().filter(|it| it.cross.is_empty());
    if compromised.any(|it| root_of(it).is_some_and(|it| it.key_id() == given.key_id())) {
        return Err(GivenError::Compromised);
    }
    let mut known = cluster.former.iter().filter_map(root_of).chain([present]);
    if known.any(|it| it.is_namesake_of(&given) && it.key_id() != given.key_id()) {
        return Err(GivenError::Name);
    }
    Ok(given)
}

#[cfg(test)]
mod tests {
    use bulkhead_identity::Key;
    use bulkhead_proto::ClusterId;
    use rcgen::{
        BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P384_SHA384,
        PKCS_ED25519, SerialNumber, date_time_ymd,
    };

    use super::*;

    const CLUSTER: ClusterId = ClusterId::from_bytes([9; 16]);
    /// In 2026.
    const NOW: i64 = 1_780_000_000_000;

    fn cluster() -> Cluster {
        let present = Authority::generate(CLUSTER, NOW - 1_000).expect("a root");
        Cluster {
            id: CLUSTER.as_bytes().to_vec(),
            root_certificate: present.root_der().to_vec(),
            ..Default::default()
        }
    }

    /// What openssl makes by the line in docs/operations/rotate-the-root.md.
    fn good() -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::OrganizationName, CLUSTER.to_string());
        params.distinguished_name.push(DnType::CommonName, "our root");
        params.serial_number = Some(SerialNumber::from_slice(&[0x40; 20]));
        params.not_before = date_time_ymd(2026, 1, 1);
        params.not_after = date_time_ymd(2036, 1, 1);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
    }

    fn made(change: impl FnOnce(&mut CertificateParams)) -> (Vec<u8>, Vec<u8>) {
        let (key, mut params) = (Key::generate().expect("a key"), good());
        change(&mut params);
        let root = params.self_signed(&key).expect("signed").der().to_vec();
        (root, key.pkcs8().to_vec())
    }

    fn refused(cluster: &Cluster, (root, key): &(Vec<u8>, Vec<u8>)) -> GivenError {
        let error = given(cluster, root, key, NOW).expect_err("refused");
        assert!(!error.hint().is_empty());
        error
    }

    #[test]
    fn a_good_root_signs_and_is_followed_from_the_present_one() {
        for levels in [BasicConstraints::Constrained(1), BasicConstraints::Unconstrained] {
            let (root, key) = made(|params| params.is_ca = IsCa::Ca(levels));
            let authority = given(&cluster(), &root, &key, NOW).expect("good");
            assert_eq!(authority.root_der(), root);
        }
    }

    #[test]
    fn each_bad_root_is_refused_for_its_own_reason() {
        use GivenError as E;
        let cluster = cluster();
        let of = |change: fn(&mut CertificateParams)| refused(&cluster, &made(change));
        let root = |error| E::Root(error).to_string();
        let says = |error: E| error.to_string();

        let expired = of(|params| params.not_after = date_time_ymd(2026, 2, 1));
        assert!(matches!(expired, E::Ends { days: 0 }), "{expired}");
        let soon = of(|params| params.not_after = date_time_ymd(2027, 1, 1));
        assert!(matches!(soon, E::Ends { days: 1.. }), "{soon}");
        let early = of(|params| params.not_before = date_time_ymd(2030, 1, 1));
        assert!(matches!(early, E::NotYet), "{early}");
        let no_ca = of(|params| params.is_ca = IsCa::ExplicitNoCa);
        assert_eq!(says(no_ca), root(RootError::Authority));
        let silent = of(|params| params.is_ca = IsCa::NoCa);
        assert_eq!(says(silent), root(RootError::Authority));
        let short = of(|params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
        assert_eq!(says(short), root(RootError::PathLength));
        let more = of(|params| params.key_usages.push(KeyUsagePurpose::DigitalSignature));
        assert_eq!(says(more), root(RootError::KeyUsage));
        let none = of(|params| params.key_usages.clear());
        assert_eq!(says(none), root(RootError::KeyUsage));
        let name = of(|params| {
            params
                .distinguished_name
                .push(DnType::OrganizationalUnitName, "more");
        });
        assert_eq!(says(name), root(RootError::Name));
        let foreign = of(|params| {
            let other = ClusterId::from_bytes([8; 16]);
            params.distinguished_name = rcgen::DistinguishedName::new();
            params
                .distinguished_name
                .push(DnType::OrganizationName, other.to_string());
            params.distinguished_name.push(DnType::CommonName, "our root");
        });
        assert!(matches!(foreign, E::Cluster { .. }), "{foreign}");

        let (mut forged, key) = made(|_| {});
        *forged.last_mut().expect("bytes") ^= 1;
        assert_eq!(
            says(refused(&cluster, &(forged, key))),
            root(RootError::Signature)
        );
        let (good_root, _) = made(|_| {});
        let (_, others) = made(|_| {});
        assert!(matches!(refused(&cluster, &(good_root.clone(), others)), E::Key));
        assert!(matches!(
            refused(&cluster, &(good_root.clone(), b"no key".to_vec())),
            E::Key
        ));
        let long = vec![0x30; 1 << 20];
        assert_eq!(
            says(refused(&cluster, &(long, Vec::new()))),
            root(ProfileError::Long.into())
        );
        let two = [good_root.clone(), good_root].concat();
        assert_eq!(
            says(refused(&cluster, &(two, Vec::new()))),
            root(ProfileError::Encoding.into())
        );
    }

    #[test]
    fn other_kinds_of_keys_and_weak_signatures_are_refused() {
        let cluster = cluster();
        for (algorithm, want) in [
            (&PKCS_ECDSA_P384_SHA384, ProfileError::Signature),
            (&PKCS_ED25519, ProfileError::Signature),
        ] {
            let key = KeyPair::generate_for(algorithm).expect("a key");
            let root = good().self_signed(&key).expect("signed").der().to_vec();
            let error = refused(&cluster, &(root, key.serialize_der()));
            assert_eq!(error.to_string(), want.to_string());
            assert!(error.hint().contains("P-256"), "{}", error.hint());
        }
        // As `openssl req -x509 -sha1` writes: ecdsa-with-SHA256, and ecdsa-with-SHA1 in its place.
        let (strong, key) = made(|_| {});
        let sha256 = [0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
        let sha1 = [0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x01];
        let error = refused(&cluster, &(with_algorithm(&strong, &sha256, &sha1), key));
        assert_eq!(error.to_string(), ProfileError::Signature.to_string());
    }

    /// The certificate with another algorithm in both places, and lengths that fit.
    fn with_algorithm(der: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
        let mut new = Vec::new();
        let mut rest = der;
        while let Some(at) = rest.windows(from.len()).position(|window| window == from) {
            new.extend_from_slice(&rest[..at - 1]);
            new.push(u8::try_from(to.len()).expect("short")); // of the SEQUENCE around it
            new.extend_from_slice(to);
            rest = &rest[at + from.len()..];
        }
        new.extend_from_slice(rest);
        // The lengths of the certificate and of what is signed: two bytes each.
        let less = u16::try_from(from.len() - to.len()).expect("short");
        for (at, times) in [(2, 2), (6, 1)] {
            let length = u16::from_be_bytes([new[at], new[at + 1]]) - times * less;
            new[at..at + 2].copy_from_slice(&length.to_be_bytes());
        }
        new
    }

    #[test]
    fn a_root_that_the_cluster_knows_comes_back_only_where_its_key_is_not_others() {
        let mut cluster = cluster();
        let present = Authority::generate(CLUSTER, NOW - 1_000).expect("a root");
        cluster.root_certificate = present.root_der().to_vec();
        let again = (present.root_der().to_vec(), present.key_pkcs8().to_vec());
        assert!(matches!(refused(&cluster, &again), GivenError::Present));

        let (former, key) = made(|_| {});
        let other = FormerRoot {
            root: Authority::generate(CLUSTER, NOW - 1_000)
                .expect("a root")
                .root_der()
                .to_vec(),
            cross: b"cross".to_vec(),
            until: NOW + 1_000,
        };
        let wanted = FormerRoot {
            root: former.clone(),
            ..other.clone()
        };
        cluster.former = vec![other, wanted];
        given(&cluster, &former, &key, NOW).expect("back again");
        assert!(matches!(refused(&cluster, &made(|_| {})), GivenError::Name));
        assert!(matches!(
            leaves_compromised(&cluster, &former),
            Err(GivenError::Certified)
        ));
        leaves_compromised(&cluster, &made(|_| {}).0).expect("another one");
        cluster.former[1].cross.clear();
        let back = (former, key);
        assert!(matches!(refused(&cluster, &back), GivenError::Compromised));
    }
}
