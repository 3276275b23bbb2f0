//! What a program proves itself with, and the live swap of it.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::{ClientConfig, ServerConfig};
use tokio::sync::watch;

use crate::bundle::INTERMEDIATES;
use crate::certificate::CERTIFICATE_BYTES;
use crate::{Bundle, Certificate, Key, Subject, tls};

/// Key, certificate and trust bundle: they change together.
#[derive(Debug)]
pub struct Credentials {
    /// The private key.
    pub key: Key,
    /// Its certificate.
    pub certificate: Certificate,
    /// Certificates between it and an older root, DER: the cross-certificates of rotations.
    pub chain: Vec<Vec<u8>>,
    /// The roots of the cluster.
    pub bundle: Bundle,
}

impl Credentials {
    /// The certificates, DER, that connections of this protocol present: the own one, and those that older roots
    /// signed while these are trusted. With [`tls::ALPN_ENROL`] all are shown.
    pub fn presented(&self, protocol: &[u8]) -> impl Iterator<Item = &[u8]> {
        let shown = move |der: &&Vec<u8>| protocol == tls::ALPN_ENROL || self.bundle.issued(der);
        std::iter::once(self.certificate.der()).chain(self.chain.iter().filter(shown).map(Vec::as_slice))
    }

    /// The same key and certificate with other roots.
    pub fn with_bundle(&self, bundle: Bundle) -> Self {
        Self {
            key: self.key.clone(),
            certificate: self.certificate.clone(),
            chain: self.chain.clone(),
            bundle,
        }
    }
}

/// Parts that do not belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CredentialsError {
    /// The certificate is another key's.
    #[error("the certificate is not for this key")]
    Key,
    /// The certificate is another cluster's than the roots.
    #[error("certificate and roots are of different clusters")]
    Cluster,
    /// More, or longer, than the cross-certificate of a rotation.
    #[error("a chain has at most one certificate between leaf and root")]
    Chain,
    /// The swap would make this another node.
    #[error("new credentials must be of the same cluster, node and role")]
    Subject,
}

/// Who this program is, now. Clones share one identity: a replaced credential holds for each new handshake, in both
/// directions, and connections that stand go on.
#[derive(Clone)]
pub struct Identity {
    shared: Arc<Shared>,
}

struct Shared {
    subject: Subject,
    live: RwLock<Live>,
    changed: watch::Sender<u64>,
}

/// Credentials with the configurations made of them.
#[derive(Clone)]
struct Live {
    credentials: Arc<Credentials>,
    server: Arc<ServerConfig>,
}

impl Live {
    fn new(credentials: Arc<Credentials>) -> Result<Self, CredentialsError> {
        if credentials.certificate.key_id() != credentials.key.key_id() {
            return Err(CredentialsError::Key);
        }
        if credentials.certificate.subject().cluster != credentials.bundle.cluster() {
            return Err(CredentialsError::Cluster);
        }
        let chain = &credentials.chain;
        if chain.len() > INTERMEDIATES || chain.iter().any(|der| der.len() > CERTIFICATE_BYTES) {
            return Err(CredentialsError::Chain);
        }
        let server = Arc::new(tls::server_config(&credentials));
        Ok(Self { credentials, server })
    }
}

impl Identity {
    /// An identity with these credentials.
    ///
    /// # Errors
    /// Where they do not belong together.
    pub fn new(credentials: impl Into<Arc<Credentials>>) -> Result<Self, CredentialsError> {
        let credentials = credentials.into();
        let subject = credentials.certificate.subject();
        let live = RwLock::new(Live::new(credentials)?);
        let (changed, _) = watch::channel(0);
        Ok(Self {
            shared: Arc::new(Shared {
                subject,
                live,
                changed,
            }),
        })
    }

    /// Takes up new credentials of the same subject.
    ///
    /// # Errors
    /// Where they do not belong together or are another subject's; the old ones then stay.
    pub fn replace(&self, credentials: impl Into<Arc<Credentials>>) -> Result<(), CredentialsError> {
        let credentials = credentials.into();
        if credentials.certificate.subject() != self.shared.subject {
            return Err(CredentialsError::Subject);
        }
        let live = Live::new(credentials)?;
        *self.shared.live.write().unwrap_or_else(PoisonError::into_inner) = live;
        self.shared.changed.send_modify(|count| *count += 1);
        Ok(())
    }

    /// The credentials that hold now.
    pub fn current(&self) -> Arc<Credentials> {
        self.live().credentials
    }

    /// Who this is; the same for ever.
    pub fn subject(&self) -> Subject {
        self.shared.subject
    }

    /// Counts the [replacements](Self::replace), and wakes after each; then ask for [`current`](Self::current).
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    pub(crate) fn server_config(&self) -> Arc<ServerConfig> {
        self.live().server
    }

    pub(crate) fn client_config(&self, expect: tls::Expect) -> Arc<ClientConfig> {
        Arc::new(tls::client_config(&self.live().credentials, expect))
    }

    fn live(&self) -> Live {
        // Each write replaces the whole value, so a poisoned lock still guards a good one.
        self.shared
            .live
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.shared.subject).finish()
    }
}
