//! The certificate profile: the one place where a certificate becomes (cluster, node, role).
//!
//! A leaf that differs from the profile in anything is refused, also where X.509 would allow it: the profile has one
//! issuer and two readers, so whatever else turns up is an attack or a mistake.

use std::fmt;

use bulkhead_proto::{ClusterId, KeyId, NodeId, Role};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{ExtendedKeyUsage, GeneralName, ParsedExtension, SubjectAlternativeName};
use x509_parser::oid_registry::{
    OID_SIG_ECDSA_WITH_SHA256, OID_X509_COMMON_NAME, OID_X509_ORGANIZATION_NAME,
    OID_X509_ORGANIZATIONAL_UNIT, Oid,
};
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::{X509Name, X509Version};

use crate::key::is_p256_spki;

/// Bytes of a certificate; ours have about 600.
pub const CERTIFICATE_BYTES: usize = 4 << 10;
/// Bytes of a serial number that the cluster draws: random, positive.
pub const SERIAL_BYTES: usize = 16;
/// Bytes of any serial number (RFC 5280 §4.1.2.2): a given root's is another's to draw.
const SERIAL_BYTES_MAX: usize = 20;

/// Who a certificate names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Subject {
    /// `O=` and the SPIFFE trust domain.
    pub cluster: ClusterId,
    /// `CN=` and the SPIFFE path.
    pub node: NodeId,
    /// `OU=`.
    pub role: Role,
}

impl Subject {
    /// `spiffe://<cluster id>/node/<node id>`.
    pub fn uri(&self) -> String {
        format!("spiffe://{}/node/{}", self.cluster, self.node)
    }
}

/// The DNS name that every manager of a cluster proves.
pub fn manager_name(cluster: ClusterId) -> String {
    format!("manager.{cluster}")
}

/// A leaf certificate that fits the profile. Who signed it is for [`crate::Bundle`] to say.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate {
    der: Vec<u8>,
    pub(crate) subject: Subject,
    key_id: KeyId,
    /// DER of the issuer's name. Roots of one cluster have different names.
    pub(crate) issuer: Vec<u8>,
    serial: [u8; SERIAL_BYTES],
    not_before_ms: i64,
    not_after_ms: i64,
}

/// How a certificate differs from the profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    /// Too many bytes.
    #[error("a certificate has at most {CERTIFICATE_BYTES} bytes")]
    Long,
    /// Not X.509 version 3 in DER, or something after it.
    #[error("this is not an X.509 version 3 certificate in DER")]
    Encoding,
    /// Signed with another algorithm.
    #[error("a certificate is signed with ECDSA and SHA-256, this one is not")]
    Signature,
    /// Another kind of key.
    #[error("a certificate's key is ECDSA on P-256, this one's is not")]
    Key,
    /// The serial number.
    #[error("a serial number is positive and has at most {SERIAL_BYTES_MAX} bytes, a node's {SERIAL_BYTES}")]
    Serial,
    /// The validity is empty or out of range.
    #[error("a certificate ends after it starts, this one does not")]
    Validity,
    /// The subject is not exactly `O, OU, CN` of a cluster, a role and a node.
    #[error("a subject reads O=<cluster id>, OU=<role>, CN=<node id>, this one does not")]
    Subject,
    /// The alternative names are not exactly those of the subject.
    #[error("the alternative names are not exactly those of the subject's cluster, node and role")]
    AlternativeNames,
    /// It may sign certificates, or does not say that it may not.
    #[error("a node's certificate says that it is no authority, this one does not")]
    Authority,
    /// Key usage is not exactly that of the role.
    #[error("the key usages are not exactly those of the role")]
    KeyUsage,
    /// An extension that the profile does not have, or one twice.
    #[error("an extension that the profile does not have, or one twice")]
    Extension,
}

impl Certificate {
    /// Reads a certificate and checks it against the profile.
    ///
    /// # Errors
    /// [`ProfileError`], with the first difference.
    pub fn from_der(der: &[u8]) -> Result<Self, ProfileError> {
        let x509 = parse(der)?;
        let subject = subject(x509.subject())?;
        check_extensions(&x509, &subject)?;
        let (not_before_ms, not_after_ms) = validity(&x509)?;
        Ok(Self {
            der: der.to_vec(),
            subject,
            key_id: KeyId::of_spki(x509.public_key().raw),
            issuer: x509.issuer().as_raw().to_vec(),
            serial: x509.raw_serial().try_into().map_err(|_| ProfileError::Serial)?,
            not_before_ms,
            not_after_ms,
        })
    }

    /// The certificate itself.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// Who it names.
    pub fn subject(&self) -> Subject {
        self.subject
    }

    /// The id of its public key.
    pub fn key_id(&self) -> KeyId {
        self.key_id
    }

    /// Its serial number.
    pub fn serial(&self) -> [u8; SERIAL_BYTES] {
        self.serial
    }

    /// Start of validity, milliseconds since 1970.
    pub fn not_before_ms(&self) -> i64 {
        self.not_before_ms
    }

    /// End of validity, milliseconds since 1970.
    pub fn not_after_ms(&self) -> i64 {
        self.not_after_ms
    }

    /// Whether it is valid at this time, both ends included (RFC 5280 §4.1.2.5).
    pub fn valid_at(&self, now_ms: i64) -> bool {
        (self.not_before_ms..=self.not_after_ms).contains(&now_ms)
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate")
            .field("subject", &self.subject)
            .field("key", &self.key_id)
            .field("not_after_ms", &self.not_after_ms)
            .finish_non_exhaustive()
    }
}

/// What leaf and root share: size, encoding, algorithm, key, serial number.
pub(crate) fn parse(der: &[u8]) -> Result<X509Certificate<'_>, ProfileError> {
    if der.len() > CERTIFICATE_BYTES {
        return Err(ProfileError::Long);
    }
    let (rest, x509) = X509Certificate::from_der(der).map_err(|_| ProfileError::Encoding)?;
    if !rest.is_empty() || x509.version() != X509Version::V3 {
        return Err(ProfileError::Encoding);
    }
    if x509.signature_algorithm.algorithm != OID_SIG_ECDSA_WITH_SHA256
        || x509.tbs_certificate.signature.algorithm != OID_SIG_ECDSA_WITH_SHA256
    {
        return Err(ProfileError::Signature);
    }
    if !is_p256_spki(x509.public_key().raw) {
        return Err(ProfileError::Key);
    }
    let serial = x509.raw_serial();
    if serial.is_empty() || serial.len() > SERIAL_BYTES_MAX || serial[0] & 0x80 != 0 {
        return Err(ProfileError::Serial);
    }
    Ok(x509)
}

/// Start and end in milliseconds since 1970.
pub(crate) fn validity(x509: &X509Certificate<'_>) -> Result<(i64, i64), ProfileError> {
    let millis =
        |time: x509_parser::time::ASN1Time| time.timestamp().checked_mul(1000).ok_or(ProfileError::Validity);
    let (start, end) = (
        millis(x509.validity().not_before)?,
        millis(x509.validity().not_after)?,
    );
    if start < end {
        Ok((start, end))
    } else {
        Err(ProfileError::Validity)
    }
}

/// The name's attributes, if it has exactly these, in this order, one to a level.
pub(crate) fn attributes<'a, const N: usize>(
    name: &'a X509Name<'_>,
    oids: [Oid<'static>; N],
) -> Option<[&'a str; N]> {
    let mut values = [""; N];
    let mut levels = name.iter_rdn();
    for (oid, value) in oids.iter().zip(&mut values) {
        let mut level = levels.next()?.iter();
        let attribute = level.next()?;
        if attribute.attr_type() != oid || level.next().is_some() {
            return None;
        }
        *value = attribute.as_str().ok()?;
    }
    levels.next().is_none().then_some(values)
}

fn subject(name: &X509Name<'_>) -> Result<Subject, ProfileError> {
    let oids = [
        OID_X509_ORGANIZATION_NAME,
        OID_X509_ORGANIZATIONAL_UNIT,
        OID_X509_COMMON_NAME,
    ];
    let [cluster, role, node] = attributes(name, oids).ok_or(ProfileError::Subject)?;
    Ok(Subject {
        cluster: cluster.parse().map_err(|_| ProfileError::Subject)?,
        node: node.parse().map_err(|_| ProfileError::Subject)?,
        role: role.parse().map_err(|_| ProfileError::Subject)?,
    })
}

/// Bit 0 of a key usage (RFC 5280 §4.2.1.3), as x509-parser counts.
const DIGITAL_SIGNATURE: u16 = 1;

fn check_extensions(x509: &X509Certificate<'_>, subject: &Subject) -> Result<(), ProfileError> {
    let mut seen = [0_u8; 4];
    for extension in x509.extensions() {
        let (at, fits) = match extension.parsed_extension() {
            ParsedExtension::BasicConstraints(basic) => {
                let none = !basic.ca && basic.path_len_constraint.is_none();
                (
                    0,
                    (none && extension.critical)
                        .then_some(())
                        .ok_or(ProfileError::Authority),
                )
            }
            ParsedExtension::KeyUsage(usage) => {
                let exact = usage.flags == DIGITAL_SIGNATURE && extension.critical;
                (1, exact.then_some(()).ok_or(ProfileError::KeyUsage))
            }
            ParsedExtension::ExtendedKeyUsage(usage) => (
                2,
                fits_role(usage, subject.role)
                    .then_some(())
                    .ok_or(ProfileError::KeyUsage),
            ),
            ParsedExtension::SubjectAlternativeName(names) => (
                3,
                names_are(names, subject)
                    .then_some(())
                    .ok_or(ProfileError::AlternativeNames),
            ),
            ParsedExtension::AuthorityKeyIdentifier(_) | ParsedExtension::SubjectKeyIdentifier(_)
                if !extension.critical =>
            {
                continue;
            }
            _ => return Err(ProfileError::Extension),
        };
        fits?;
        seen[at] += 1;
        if seen[at] > 1 {
            return Err(ProfileError::Extension);
        }
    }
    match seen {
        [0, ..] => Err(ProfileError::Authority),
        [_, 0, _, _] | [_, _, 0, _] => Err(ProfileError::KeyUsage),
        [_, _, _, 0] => Err(ProfileError::AlternativeNames),
        _ => Ok(()),
    }
}

/// Managers serve and call; all others only call.
fn fits_role(usage: &ExtendedKeyUsage<'_>, role: Role) -> bool {
    let others = usage.any
        || usage.code_signing
        || usage.email_protection
        || usage.time_stamping
        || usage.ocsp_signing
        || !usage.other.is_empty();
    !others && usage.client_auth && usage.server_auth == (role == Role::Manager)
}

fn names_are(names: &SubjectAlternativeName<'_>, subject: &Subject) -> bool {
    let uri = subject.uri();
    let dns = manager_name(subject.cluster);
    match (subject.role, names.general_names.as_slice()) {
        (Role::Manager, [GeneralName::URI(first), GeneralName::DNSName(second)]) => {
            *first == uri && *second == dns
        }
        (Role::Worker | Role::Operator | Role::Standby, [GeneralName::URI(only)]) => *only == uri,
        _ => false,
    }
}

#[cfg(test)]
mod tests;
