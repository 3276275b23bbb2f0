//! The trust bundle: the roots of one cluster, and the two questions that are asked of them.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_proto::{ClusterId, KeyId, Role, limits};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use x509_parser::extensions::ParsedExtension;
use x509_parser::oid_registry::{OID_X509_COMMON_NAME, OID_X509_ORGANIZATION_NAME};

use crate::certificate::{self, Certificate, ProfileError, manager_name};
use crate::tls::provider;

/// Roots in one bundle: the old, the new, and room for a rotation that was cut short.
pub const ROOTS: usize = 4;
/// Certificates between leaf and root: the cross-certificates of the rotations that a node missed.
pub(crate) const INTERMEDIATES: usize = limits::FORMER_ROOTS;
/// Path length of a cross-certificate (RFC 5280 §4.2.1.9): below it, those of the rotations that came after its own.
pub(crate) const CROSS_LEVELS: u8 = 3;
const _: () = assert!(CROSS_LEVELS as usize + 1 == INTERMEDIATES);

/// A root certificate that fits the profile: self-signed, of one cluster, for signing certificates.
#[derive(Clone)]
pub struct Root {
    der: CertificateDer<'static>,
    cluster: ClusterId,
    key_id: KeyId,
    /// DER of its name.
    name: Vec<u8>,
    not_before_ms: i64,
    not_after_ms: i64,
}

/// A root certificate that is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RootError {
    /// It differs from what every certificate is.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// Its name is not that of a root.
    #[error("a root's subject and issuer read O=<cluster id>, CN=<name>, this one's do not")]
    Name,
    /// It is not for signing certificates.
    #[error("a root says that it is an authority (basic constraints, critical), this one does not")]
    Authority,
    /// Nothing may stand between it and a leaf.
    #[error("a root's path length is at least 1, this one's is 0")]
    PathLength,
    /// Below a cross-certificate stand leaves, and those of later rotations.
    #[error("a cross-certificate's path length is {CROSS_LEVELS}, this one's is not")]
    Levels,
    /// It is for something else, too.
    #[error("a root's key usage is to sign certificates (critical) and nothing else, this one's is not")]
    KeyUsage,
    /// It did not sign itself.
    #[error("a root is signed with its own key, this one is not")]
    Signature,
}

impl Root {
    /// Reads a root and checks it.
    ///
    /// # Errors
    /// [`RootError`], with the first difference.
    pub fn from_der(der: &[u8]) -> Result<Self, RootError> {
        let x509 = certificate::parse(der)?;
        let oids = [OID_X509_ORGANIZATION_NAME, OID_X509_COMMON_NAME];
        let [cluster, _] = certificate::attributes(x509.subject(), oids).ok_or(RootError::Name)?;
        let cluster = cluster.parse().map_err(|_| RootError::Name)?;
        if x509.subject().as_raw() != x509.issuer().as_raw() {
            return Err(RootError::Name);
        }
        let (not_before_ms, not_after_ms) = certificate::validity(&x509)?;
        if check_authority(x509.extensions())? == Some(0) {
            return Err(RootError::PathLength);
        }
        x509.verify_signature(None).map_err(|_| RootError::Signature)?;
        Ok(Self {
            der: CertificateDer::from(der.to_vec()),
            cluster,
            key_id: KeyId::of_spki(x509.public_key().raw),
            name: x509.subject().as_raw().to_vec(),
            not_before_ms,
            not_after_ms,
        })
    }

    /// Whether this certificate names it as its issuer. That it signed it is for the handshake to prove.
    pub fn is_issuer_of(&self, certificate: &Certificate) -> bool {
        self.name == certificate.issuer
    }

    /// The certificate itself.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// DER of its name.
    #[cfg(any(test, feature = "authority"))]
    pub(crate) fn name(&self) -> &[u8] {
        &self.name
    }

    /// Whose root it is.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// The id of its public key.
    pub fn key_id(&self) -> KeyId {
        self.key_id
    }

    /// Whether another root has the same name: of a certificate nobody could say which of the two signed it.
    pub fn is_namesake_of(&self, other: &Root) -> bool {
        self.name == other.name
    }

    /// Start of validity, milliseconds since 1970.
    pub fn not_before_ms(&self) -> i64 {
        self.not_before_ms
    }

    /// End of validity, milliseconds since 1970.
    pub fn not_after_ms(&self) -> i64 {
        self.not_after_ms
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Root")
            .field("cluster", &self.cluster)
            .field("key", &self.key_id)
            .finish_non_exhaustive()
    }
}

/// Bit 5 of a key usage (RFC 5280 §4.2.1.3), as x509-parser counts.
const KEY_CERT_SIGN: u16 = 1 << 5;

/// Whether a certificate is that of a rotation: between a root and the one that followed it.
#[cfg(any(test, feature = "authority"))]
pub(crate) fn check_cross(x509: &x509_parser::certificate::X509Certificate<'_>) -> Result<(), RootError> {
    match check_authority(x509.extensions())? {
        Some(levels) if levels == u32::from(CROSS_LEVELS) => Ok(()),
        _ => Err(RootError::Levels),
    }
}

/// Whether it is an authority that signs certificates and nothing else; gives its path length.
fn check_authority(
    extensions: &[x509_parser::extensions::X509Extension<'_>],
) -> Result<Option<u32>, RootError> {
    let (mut basic, mut usage) = (0, 0);
    let mut levels = None;
    for extension in extensions {
        let (count, fits, otherwise) = match extension.parsed_extension() {
            ParsedExtension::BasicConstraints(constraints) => {
                levels = constraints.path_len_constraint;
                (&mut basic, constraints.ca, RootError::Authority)
            }
            ParsedExtension::KeyUsage(bits) => (&mut usage, bits.flags == KEY_CERT_SIGN, RootError::KeyUsage),
            ParsedExtension::SubjectKeyIdentifier(_) | ParsedExtension::AuthorityKeyIdentifier(_)
                if !extension.critical =>
            {
                continue;
            }
            _ => return Err(ProfileError::Extension.into()),
        };
        *count += 1;
        if !fits || !extension.critical {
            return Err(otherwise);
        }
    }
    match (basic, usage) {
        (1, 1) => Ok(levels),
        (1, _) => Err(RootError::KeyUsage),
        _ => Err(RootError::Authority),
    }
}

/// The roots of one cluster, oldest first. Cheap to clone.
#[derive(Clone)]
pub struct Bundle {
    roots: Arc<[Root]>,
    servers: Arc<WebPkiServerVerifier>,
    clients: Arc<dyn ClientCertVerifier>,
    /// A root that was rotated away lately, with verifiers of all roots: by it managers meet each other, and nobody else.
    former: Option<Arc<(Root, Verifiers)>>,
}

type Verifiers = (Arc<WebPkiServerVerifier>, Arc<dyn ClientCertVerifier>);

fn verifiers<'a>(roots: impl Iterator<Item = &'a Root>) -> Result<Verifiers, BundleError> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store
            .add(root.der.clone())
            .map_err(|_| RootError::Profile(ProfileError::Encoding))?;
    }
    let store = Arc::new(store);
    let servers = WebPkiServerVerifier::builder_with_provider(store.clone(), provider()).build();
    let clients = WebPkiClientVerifier::builder_with_provider(store, provider()).build();
    Ok((
        servers.expect("a verifier with roots and no revocation list"),
        clients.expect("a verifier with roots and no revocation list"),
    ))
}

/// A list of roots that is no bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// None, or too many.
    #[error("a bundle has 1 to {ROOTS} roots")]
    Count,
    /// One of them is no root.
    #[error(transparent)]
    Root(#[from] RootError),
    /// They are of different clusters.
    #[error("the roots of a bundle are of one cluster")]
    Clusters,
}

impl Bundle {
    /// Reads the roots of one cluster.
    ///
    /// # Errors
    /// Where there are none or too many, one is no root, or they are of different clusters.
    pub fn from_ders(ders: Vec<Vec<u8>>) -> Result<Self, BundleError> {
        if ders.is_empty() || ders.len() > ROOTS {
            return Err(BundleError::Count);
        }
        let roots = ders
            .iter()
            .map(|der| Root::from_der(der))
            .collect::<Result<Arc<[Root]>, _>>()?;
        if roots.iter().any(|root| root.cluster != roots[0].cluster) {
            return Err(BundleError::Clusters);
        }
        let (servers, clients) = verifiers(roots.iter())?;
        Ok(Self {
            roots,
            servers,
            clients,
            former: None,
        })
    }

    /// These roots, and one that was rotated away lately, by which managers still meet each other: one that was off
    /// meanwhile must count for the quorum before it can be taken back.
    ///
    /// # Errors
    /// Where it is no root of this cluster.
    pub fn with_former(self, der: Option<&[u8]>) -> Result<Self, BundleError> {
        let Some(der) = der else {
            return Ok(Self { former: None, ..self });
        };
        let root = Root::from_der(der)?;
        if root.cluster != self.cluster() {
            return Err(BundleError::Clusters);
        }
        let all = verifiers(self.roots.iter().chain([&root]))?;
        Ok(Self {
            former: Some(Arc::new((root, all))),
            ..self
        })
    }

    /// The root that was rotated away lately.
    pub fn former(&self) -> Option<&[u8]> {
        self.former.as_ref().map(|former| former.0.der())
    }

    /// The roots as they go over the wire and into the key file.
    pub fn ders(&self) -> Vec<Vec<u8>> {
        self.roots.iter().map(|root| root.der.to_vec()).collect()
    }

    /// The roots.
    pub fn roots(&self) -> &[Root] {
        &self.roots
    }

    /// Whose roots they are.
    pub fn cluster(&self) -> ClusterId {
        self.roots[0].cluster
    }

    /// The ids of the roots' keys.
    pub fn key_ids(&self) -> Vec<Vec<u8>> {
        self.roots.iter().map(|root| root.key_id.to_wire()).collect()
    }

    /// The root that this certificate names as its issuer, if it is one of these.
    pub fn issuer_of(&self, certificate: &Certificate) -> Option<&Root> {
        self.roots.iter().find(|root| root.is_issuer_of(certificate))
    }

    /// Whether this certificate, DER, names one of these roots as its issuer.
    pub(crate) fn issued(&self, der: &[u8]) -> bool {
        let x509 = certificate::parse(der);
        x509.is_ok_and(|it| self.roots.iter().any(|root| root.name == it.issuer().as_raw()))
    }

    /// Checks the certificate of a server: chain, validity, profile, role manager, this cluster.
    ///
    /// # Errors
    /// Where any of these does not hold; for the handshake to send and the local log to keep.
    pub fn verify_manager(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Certificate, VerifyError> {
        self.verify_server(&self.servers, leaf, intermediates, now)
    }

    fn verify_server(
        &self,
        servers: &WebPkiServerVerifier,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Certificate, VerifyError> {
        let certificate = self.profile(leaf, intermediates)?;
        if certificate.subject.role != Role::Manager {
            return Err(VerifyError::NotManager(certificate.subject.role));
        }
        let name = ServerName::try_from(manager_name(self.cluster())).expect("a cluster id is a DNS label");
        servers.verify_server_cert(leaf, intermediates, &name, &[], now)?;
        Ok(certificate)
    }

    /// [`Bundle::verify_manager`] for one whose certificate may have ended, or whose root may have been rotated away, a
    /// while ago, as [`Bundle::verify_client`] says.
    ///
    /// # Errors
    /// As there.
    pub fn verify_member(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Certificate, VerifyError> {
        let judged = judged_at(&self.profile(leaf, intermediates)?, now);
        let servers = self.former.as_ref().map_or(&self.servers, |former| &former.1.0);
        self.verify_server(servers, leaf, intermediates, judged)
    }

    /// Checks the certificate of a client: chain, validity, profile, this cluster.
    ///
    /// A manager's may have ended up to [`limits::RETURN_GRACE`] ago, or be of the [former root](Bundle::with_former):
    /// managers that were off for long must count for the quorum before anyone can take them back. Whoever serves must
    /// hold such a one against its time and root, and does so for all but Raft methods and enrolment.
    ///
    /// # Errors
    /// Where any of these does not hold.
    pub fn verify_client(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Certificate, VerifyError> {
        let certificate = self.profile(leaf, intermediates)?;
        let judged = judged_at(&certificate, now);
        let clients = match &self.former {
            Some(former) if certificate.subject.role == Role::Manager => &former.1.1,
            _ => &self.clients,
        };
        clients.verify_client_cert(leaf, intermediates, judged)?;
        Ok(certificate)
    }

    /// Checks the certificate that a node says it holds, as it was at `at_ms`: chain, validity, profile, this cluster.
    ///
    /// # Errors
    /// Where any of these does not hold.
    pub fn verify_held(
        &self,
        certificate: &[u8],
        chain: &[Vec<u8>],
        at_ms: i64,
    ) -> Result<Certificate, VerifyError> {
        let chain: Vec<CertificateDer<'_>> = chain.iter().map(|der| der.as_slice().into()).collect();
        let at = Duration::from_millis(u64::try_from(at_ms).unwrap_or(0));
        self.verify_client(&certificate.into(), &chain, UnixTime::since_unix_epoch(at))
    }

    fn profile(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<Certificate, VerifyError> {
        if intermediates.len() > INTERMEDIATES {
            return Err(VerifyError::Intermediates);
        }
        let certificate = Certificate::from_der(leaf)?;
        if certificate.subject.cluster != self.cluster() {
            return Err(VerifyError::ForeignCluster(certificate.subject.cluster));
        }
        Ok(certificate)
    }
}

/// The moment at which a certificate's validity is judged: a manager's that ended lately, at its end.
fn judged_at(certificate: &Certificate, now: UnixTime) -> UnixTime {
    let end = Duration::from_millis(u64::try_from(certificate.not_after_ms()).unwrap_or(0));
    let late = Duration::from_secs(now.as_secs()).saturating_sub(end);
    let lately = !late.is_zero() && late <= limits::RETURN_GRACE;
    match certificate.subject.role == Role::Manager && lately {
        true => UnixTime::since_unix_epoch(end),
        false => now,
    }
}

impl fmt::Debug for Bundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Bundle").field(&self.roots).finish()
    }
}

/// Why a peer's certificate is not believed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum VerifyError {
    /// It does not fit the profile.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// It is of another cluster.
    #[error("it is of cluster {0}, not of ours")]
    ForeignCluster(ClusterId),
    /// A server that is no manager.
    #[error("it is a {0}'s, and only managers serve")]
    NotManager(Role),
    /// Another manager than the one that was called.
    #[error("it is manager {got}'s, and manager {wanted} was called")]
    WrongManager {
        /// Who was called.
        wanted: bulkhead_proto::NodeId,
        /// Who answered.
        got: bulkhead_proto::NodeId,
    },
    /// A chain that is too long.
    #[error("its chain has more than {INTERMEDIATES} certificates between it and the root")]
    Intermediates,
    /// The chain or the validity.
    #[error("its chain does not verify")]
    Chain(#[from] rustls::Error),
}
