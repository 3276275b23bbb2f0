//! The certificate authority: makes roots and signs leaves of the profile. Only the manager has this code.

use std::fmt;
use std::time::Duration;

use bulkhead_proto::limits::ROOT_VALIDITY;
use bulkhead_proto::{ClusterId, KeyId, Role};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyUsagePurpose, SanType, SerialNumber, SubjectPublicKeyInfo, date_time_ymd,
};
use rustls_pki_types::CertificateDer;
use x509_parser::oid_registry::{OID_X509_COMMON_NAME, OID_X509_ORGANIZATION_NAME};

use crate::bundle::{CROSS_LEVELS, Root, RootError};
use crate::certificate::{SERIAL_BYTES, manager_name};
use crate::csr::PublicKey;
use crate::order::{Difference, Order, What};
use crate::seam::{Entropy as _, SystemEntropy};
use crate::{Key, Subject};

/// A root with its key.
pub struct Authority {
    root: Root,
    issuer: Issuer<'static, Key>,
}

/// A certificate that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// No key or serial number.
    #[error("the system gave no random bytes")]
    Entropy,
    /// The times are out of range, or the end is not after the start.
    #[error("a certificate's times are out of range")]
    Validity,
    /// It is for another cluster than the root's.
    #[error("this root signs for cluster {0}, and for no other")]
    Cluster(ClusterId),
    /// The root's certificate is not one.
    #[error("the root certificate does not fit the profile")]
    Root(#[from] RootError),
    /// The root's key is not one, or not this root's.
    #[error("this is not the key of the root certificate")]
    Key,
    /// Signing failed.
    #[error("the certificate could not be signed")]
    Sign(#[from] rcgen::Error),
    /// This root cannot write what was ordered: its own name, or that of the root that follows it, in another encoding.
    #[error("the root cannot sign what is wanted")]
    Differs(#[from] Difference),
}

impl Authority {
    /// Makes a root for a cluster, valid from `now_ms` for [`ROOT_VALIDITY`].
    ///
    /// # Errors
    /// Where the system gives no random bytes or `now_ms` is out of range.
    pub fn generate(cluster: ClusterId, now_ms: i64) -> Result<Self, IssueError> {
        let key = Key::generate().map_err(|_| IssueError::Entropy)?;
        let validity = i64::try_from(ROOT_VALIDITY.as_millis()).map_err(|_| IssueError::Validity)?;
        let mut params = params(
            serial()?,
            now_ms,
            now_ms.checked_add(validity).ok_or(IssueError::Validity)?,
        )?;
        params
            .distinguished_name
            .push(DnType::OrganizationName, cluster.to_string());
        // Roots that follow each other have names of their own, so that a chain has one issuer.
        params
            .distinguished_name
            .push(DnType::CommonName, root_name(key.key_id()));
        // Below it stand the cross-certificates of the rotations that a node missed.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(CROSS_LEVELS + 1));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let root_der = params.self_signed(&key)?.der().to_vec();
        Self::from_parts(&root_der, key.pkcs8())
    }

    /// Takes up a root that was kept.
    ///
    /// # Errors
    /// Where the certificate does not fit the profile or the key is not its own.
    pub fn from_parts(root_der: &[u8], pkcs8: &[u8]) -> Result<Self, IssueError> {
        let root = Root::from_der(root_der)?;
        let key = Key::from_pkcs8(pkcs8).map_err(|_| IssueError::Key)?;
        if key.key_id() != root.key_id() {
            return Err(IssueError::Key);
        }
        let issuer = Issuer::from_ca_cert_der(&CertificateDer::from(root_der), key)?;
        Ok(Self { root, issuer })
    }

    /// The root certificate.
    pub fn root_der(&self) -> &[u8] {
        self.root.der()
    }

    /// The root's key, for a sealed record.
    pub fn key_pkcs8(&self) -> &[u8] {
        self.issuer.key().pkcs8()
    }

    /// The cluster that it signs for.
    pub fn cluster(&self) -> ClusterId {
        self.root.cluster()
    }

    /// Certifies the key of the root that follows this one, for those who know only this one yet: the cross-certificate
    /// of a rotation. It is valid while both roots are.
    ///
    /// # Errors
    /// Where the other root is of another cluster, or one of them is over.
    pub fn cross(&self, next: &Root, now_ms: i64) -> Result<Vec<u8>, IssueError> {
        self.sign(&Order::cross(&self.root, next, now_ms)?)
    }

    /// Signs a leaf of the profile.
    ///
    /// # Errors
    /// Where the subject is of another cluster or the times are out of range.
    pub fn issue(
        &self,
        subject: &Subject,
        key: &PublicKey,
        not_before_ms: i64,
        not_after_ms: i64,
    ) -> Result<Vec<u8>, IssueError> {
        self.sign(&Order::leaf(*subject, key, not_before_ms, not_after_ms)?)
    }

    /// Signs what is ordered.
    ///
    /// # Errors
    /// Where it is for another cluster, its times are out of range, or it would not say what was ordered.
    pub fn sign(&self, order: &Order) -> Result<Vec<u8>, IssueError> {
        let params = params(order.serial(), order.not_before_ms(), order.not_after_ms())?;
        let der = match order.what() {
            What::Leaf { subject, key } => self.leaf(params, subject, key)?,
            What::Cross(next) => self.crossing(params, next)?,
        };
        order.check(&self.root, &der)?;
        Ok(der)
    }

    fn crossing(&self, mut params: CertificateParams, next: &Root) -> Result<Vec<u8>, IssueError> {
        if next.cluster() != self.cluster() {
            return Err(IssueError::Cluster(self.cluster()));
        }
        let x509 = crate::certificate::parse(next.der()).map_err(RootError::from)?;
        // A given root's name is another's to choose.
        let oids = [OID_X509_ORGANIZATION_NAME, OID_X509_COMMON_NAME];
        let [cluster, name] = crate::certificate::attributes(x509.subject(), oids).ok_or(RootError::Name)?;
        params.distinguished_name.push(DnType::OrganizationName, cluster);
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(CROSS_LEVELS));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.use_authority_key_identifier_extension = true;
        let public = SubjectPublicKeyInfo::from_der(x509.public_key().raw)?;
        Ok(params.signed_by(&public, &self.issuer)?.der().to_vec())
    }

    fn leaf(
        &self,
        mut params: CertificateParams,
        subject: &Subject,
        key: &PublicKey,
    ) -> Result<Vec<u8>, IssueError> {
        if subject.cluster != self.cluster() {
            return Err(IssueError::Cluster(self.cluster()));
        }
        let name = &mut params.distinguished_name;
        name.push(DnType::OrganizationName, subject.cluster.to_string());
        name.push(DnType::OrganizationalUnitName, subject.role.as_str());
        name.push(DnType::CommonName, subject.node.to_string());
        params
            .subject_alt_names
            .push(SanType::URI(subject.uri().try_into()?));
        params
            .extended_key_usages
            .push(ExtendedKeyUsagePurpose::ClientAuth);
        if subject.role == Role::Manager {
            params
                .subject_alt_names
                .push(SanType::DnsName(manager_name(subject.cluster).try_into()?));
            params
                .extended_key_usages
                .push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let public = SubjectPublicKeyInfo::from_der(key.spki_der())?;
        Ok(params.signed_by(&public, &self.issuer)?.der().to_vec())
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("root", &self.root)
            .finish_non_exhaustive()
    }
}

/// The name of the root with this key.
fn root_name(key: KeyId) -> String {
    format!("root {}", &key.to_string()[..16])
}

/// A serial number of our own: positive, and never shorter.
pub(crate) fn serial() -> Result<[u8; SERIAL_BYTES], IssueError> {
    let mut serial = [0; SERIAL_BYTES];
    SystemEntropy.fill(&mut serial).map_err(|_| IssueError::Entropy)?;
    serial[0] = serial[0] & 0x7f | 0x40;
    Ok(serial)
}

/// Parameters with this serial number, these times, and nothing else.
fn params(
    serial: [u8; SERIAL_BYTES],
    not_before_ms: i64,
    not_after_ms: i64,
) -> Result<CertificateParams, IssueError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.not_before = date_time_ymd(1970, 1, 1) + since_1970(not_before_ms)?;
    params.not_after = date_time_ymd(1970, 1, 1) + since_1970(not_after_ms)?;
    if params.not_before >= params.not_after {
        return Err(IssueError::Validity);
    }
    Ok(params)
}

/// Whole seconds, as certificates count; up to the year 9999, the last one that they can write.
fn since_1970(millis: i64) -> Result<Duration, IssueError> {
    const YEAR_10000: u64 = 253_402_300_800;
    let seconds = u64::try_from(millis).map_err(|_| IssueError::Validity)? / 1000;
    if seconds < YEAR_10000 {
        Ok(Duration::from_secs(seconds))
    } else {
        Err(IssueError::Validity)
    }
}
